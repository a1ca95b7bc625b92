// Package config reads the gateway's YAML file into values: parsed keys, durations,
// absolute paths. Settings that sshd_config(5) has, too, keep their name, in
// snake_case, and their meaning.
//
// All mistakes of a file are reported at once, each with its line. An unknown key is
// a mistake.
package config

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/fargate"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/local"
)

// Gateway is the content of the gateway's file. Its keys are the fields' names in
// snake_case, unless a comment gives another; defaults are those of [Defaults].
// Fields without a comment here have one in the package of their type.
type Gateway struct {
	// Listen is the "host:port" addresses to accept SSH connections at; one
	// or a list. Port 0 takes any free port.
	Listen []string

	// Options are the settings of the server. HostKeys is required; it is
	// written as paths of private keys or references to them (see [AWS]),
	// HostCertificates likewise as certificates of these keys, and Banner as the
	// path of a text. MACs is written macs,
	// DisableTCPKeepAlive as its opposite, tcp_keep_alive, and RekeyBytes and
	// RekeyInterval together as in sshd_config(5), as rekey_limit.
	gateway.Options

	// FleetKeys (in the file: fleet_key) are one to three paths of private keys,
	// or references to them. They are the certificate authority for logins to bastions. The first signs;
	// bastions accept all. Required.
	FleetKeys []ssh.Signer
	// AuthorizedKeysDir holds one authorized_keys file per user; see package
	// auth. Required, and must exist.
	AuthorizedKeysDir string
	Auth
	// StateDir is the folder of data that must survive the gateway. It need not
	// exist yet.
	StateDir string
	// Deployment tells two installations apart that share a machine or a
	// cloud account: 1 to 32 letters, digits, "-" and "_".
	Deployment string
	// Ledger says where it is kept which bastion is whose. It needs all profiles
	// to be on Fargate, if it is shared.
	Ledger Ledger
	// Advertise is the "host:port" at which the gateways that share the ledger reach
	// this one's SSH port. Empty, the default, means the address of this machine and
	// the port of the first listener.
	Advertise string
	// TaskProtection is how long the task of ECS in which the gateway runs, if it
	// does, is protected from being stopped by its service while there are
	// connections: 1m to 48h, or zero, "none".
	TaskProtection time.Duration
	// StartsPerUser is written as in 30/1h, or "none".
	StartsPerUser bastion.StartRate

	Monitoring Monitoring
	API        API
	Audit      Audit
	Recordings Recordings
	Tracing    Tracing

	// Copies are not in the file: they are those of AuthorizedKeysDir, TOTPDir,
	// AuthorizedPrincipalsDir, TrustedUserCAKeys and RevokedKeys that are written as
	// references.
	Copies []Copy
	// Digest is the SHA-256 hash of the text of the file.
	Digest [sha256.Size]byte

	// Profiles are the kinds of bastion that users may ask for, by name; there
	// is always one called "default". Names are 1 to 32 letters, digits, "-" and
	// "_"; "ctl" is reserved.
	Profiles map[string]Profile
}

// Profile is a named kind of bastion.
type Profile struct {
	// Launcher starts the bastions: "local" as processes on the gateway's own
	// machine, "fargate" as tasks on AWS.
	Launcher string
	bastion.ProfileOptions
	// Record are the recorded parts of sessions: "none", or one or several of
	// "output", "input", "exec" and "transfers".
	Record identity.Record
	// Local and Fargate are the settings of the launchers of these names. An
	// empty Local.Agent means the program beside the gateway's own.
	Local   local.Options
	Fargate fargate.Options
}

// Defaults returns the settings of an empty file. HostKeys, FleetKeys and
// AuthorizedKeysDir have no default. The caller owns the result.
func Defaults() *Gateway {
	return &Gateway{
		Listen: []string{":2222"},
		Options: gateway.Options{
			LoginGraceTime:        60 * time.Second,
			MaxStartups:           gateway.Startups{Start: 10, Rate: 30, Full: 100},
			PerSourceMaxStartups:  10, // one source cannot hold all places of MaxStartups
			PerSourceNetBlockSize: gateway.NetBlockSize{IPv4: 32, IPv6: 64},
			PerSourcePenalties:    defaultPenalties(),
			MaxAuthTries:          6,
			MaxSessions:           10,
			MaxChannels:           1000,
			MaxConnectionsPerUser: 100,
			LogPerUser:            gateway.LogLimit{Bytes: 250 << 20, Per: time.Hour},
			ClientAliveCountMax:   3,
			Drain:                 30 * time.Second,
		},
		Auth:          defaultAuth(),
		StateDir:      "/var/lib/sallyport",
		Deployment:    "default",
		StartsPerUser: bastion.StartRate{Starts: 30, Per: time.Hour},

		Audit:      defaultAudit(),
		Recordings: defaultRecordings(),

		Profiles: map[string]Profile{"default": defaultProfile()},
	}
}

func defaultProfile() Profile {
	return Profile{
		Launcher: "local",
		ProfileOptions: bastion.ProfileOptions{
			Idle:         15 * time.Minute,
			MaxLife:      12 * time.Hour,
			StartTimeout: 5 * time.Minute,
			Forwarding:   bastion.Forwarding{GatewayPorts: "no", StreamLocalBindMask: "0177"},
		},
		Local:   local.Options{AcceptEnv: defaultAcceptEnv()},
		Fargate: fargate.Options{Container: "bastion", Account: "bastion", AcceptEnv: defaultAcceptEnv()},
	}
}

func defaultAcceptEnv() []string {
	return []string{"LANG", "LC_*", "COLORTERM", "TERM_PROGRAM*", "GIT_PROTOCOL"}
}

// maxFile bounds the size of the file, in bytes.
const maxFile = 1 << 20

// Load reads the file at path and the keys it names. Relative paths in it are
// relative to the folder of the file. If aws is nil, references are mistakes. The path
// may be a reference itself; then relative paths are mistakes.
//
// If there are mistakes, the error is of type [Mistakes] and has one line for each,
// in the order of the file:
//
//	gateway.yaml:12: profiles.default.idle: "15 minutes" is not a duration; write it like 15m
//
// where gateway.yaml stands for path. No error contains a secret.
func Load(path string, aws *AWS) (*Gateway, error) { return load(path, aws, nil) }

// Reload is Load for a gateway that runs with the settings in running. To change a
// setting that requires a restart is a mistake.
func Reload(path string, aws *AWS, running *Gateway) (*Gateway, error) {
	return load(path, aws, running)
}

func load(path string, aws *AWS, running *Gateway) (*Gateway, error) {
	data, dir, err := text(path, aws)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	g, err := parse(data, path, dir, aws, running)
	if err != nil {
		return nil, err
	}
	g.Digest = sha256.Sum256(data)
	return g, nil
}

// text returns the text at path, and the folder that relative paths in it are
// relative to; empty if path is a reference.
func text(path string, aws *AWS) (data []byte, dir string, err error) {
	if aws != nil && IsReference(path) {
		if data, _, err = aws.Secret(path); err != nil {
			return nil, "", fmt.Errorf("%s: %w", path, err)
		}
		return data, "", nil
	}
	if dir, err = filepath.Abs(filepath.Dir(path)); err != nil {
		return nil, "", fmt.Errorf("finding the folder of %s: %w", path, err)
	}
	data, _, err = readFile(path, maxFile)
	return data, dir, err
}

// readFile reads a regular file of at most max bytes. Its errors are of type
// *os.PathError.
func readFile(path string, max int64) ([]byte, os.FileInfo, error) {
	// Before os.Open, which would block on a FIFO.
	if info, err := os.Stat(path); err != nil {
		return nil, nil, err
	} else if !info.Mode().IsRegular() {
		return nil, nil, &os.PathError{Op: "open", Path: path, Err: errors.New("not a regular file")}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, nil, err
	}
	if int64(len(data)) > max {
		return nil, nil, &os.PathError{Op: "read", Path: path, Err: fmt.Errorf("longer than %d bytes", max)}
	}
	return data, info, nil
}

// reason returns err without the path that an *os.PathError repeats.
func reason(err error) error {
	if pathErr := (*os.PathError)(nil); errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}
