// Package config turns the gateway's YAML file into ready values: parsed keys,
// durations, absolute paths. What sshd_config(5) has too keeps its name, in
// snake_case, and its meaning.
//
// All mistakes of a file are reported at once, each with its line, so that
// nobody has to start the gateway ten times to find ten of them. A key that is
// not known is a mistake.
package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// Gateway is everything the gateway's file says. Its keys are the fields' names
// in snake_case; the defaults given here are those of [Defaults].
type Gateway struct {
	// Listen is the "host:port" addresses to accept SSH connections at; one
	// or a list. Port 0 takes any free port. Default ":2222".
	Listen []string

	// HostKeys prove to clients who the gateway is: one for each type of key,
	// written as paths of private keys. RSA keys sign with SHA-2 only.
	// Required.
	HostKeys []ssh.Signer
	// FleetKey is the certificate authority that signs logins to bastions,
	// written as the path of a private key. Required.
	FleetKey ssh.Signer
	// AuthorizedKeysDir holds one authorized_keys file per user; see package
	// auth. Required, and must exist.
	AuthorizedKeysDir string
	Auth
	// StateDir is where the gateway keeps what must survive it. It need not
	// exist yet. Default "/var/lib/sallyport".
	StateDir string
	// Deployment tells two installations apart that share a machine or a
	// cloud account: 1 to 32 letters, digits, "-" and "_". Default "default".
	Deployment string

	// LoginGraceTime is how long a connection may take to log in. The wait
	// for a bastion to start does not count. At least 1s; default 60s.
	LoginGraceTime time.Duration
	// MaxStartups limits connections that have not logged in, all together.
	// Default 10:30:100.
	MaxStartups MaxStartups
	// PerSourceMaxStartups limits them for one source; 0, written "none",
	// means no such limit. Default 0.
	PerSourceMaxStartups int
	Network
	// MaxAuthTries is how many failed attempts to authenticate end a
	// connection. Default 6.
	MaxAuthTries int
	// MaxSessions is how many shells, commands and subsystems may be open on
	// one connection. Default 10.
	MaxSessions int
	// MaxConnectionsPerUser is how many connections one user may have on this
	// gateway. Default 100.
	MaxConnectionsPerUser int
	// StartsPerUser is how often the bastions of one user may be started; in
	// the file as 30/1h, which is the default, or "none".
	StartsPerUser StartRate
	// MaxMemory is how many bytes the gateway may hold for its connections
	// before it closes those that hold most. At least 64M; 0, which is the
	// default and written "auto", means that it is found out when it starts.
	MaxMemory int64
	// ClientAliveInterval is how long a client may be silent before it is
	// asked whether it is there. At least 1s; default 15s.
	ClientAliveInterval time.Duration
	// ClientAliveCountMax is how many such questions may stay without an
	// answer before the connection is closed. Default 4.
	ClientAliveCountMax int
	// Drain is how long open sessions may go on after the gateway was told
	// to stop. 0 closes them at once. Default 30s.
	Drain time.Duration

	// Ciphers, MACs (in the file: macs) and KexAlgorithms are offered to
	// clients. Default none, which leaves the choice to package gateway: it
	// offers an OpenSSH client other ciphers than the rest.
	Ciphers, MACs, KexAlgorithms []string

	// VersionAddendum is appended to the version the gateway tells everybody
	// who connects. Default none.
	VersionAddendum string
	// Banner is shown to users before they log in. In the file it is the path
	// of a text, or "none". Default none.
	Banner string

	// Audit says where it is written down who did what, and Recordings where
	// recordings of sessions are kept.
	Audit      Audit
	Recordings Recordings

	// Roles say who may do what. Nil means that there are none: everybody who
	// has a key may do what it permits. Default none.
	Roles policy.Roles

	// Profiles are the kinds of bastion users may ask for, by name; there is
	// always one called "default". Names are 1 to 32 letters, digits, "-" and
	// "_"; "ctl" is taken.
	Profiles map[string]Profile
}

// MaxStartups limits unauthenticated connections as sshd does: from Start of
// them on, a new one is refused with a probability of Rate percent, which rises
// to 100 percent at Full of them. A single number in the file sets both Start
// and Full to it.
type MaxStartups struct {
	Start, Rate, Full int
}

// Profile is a named kind of bastion.
type Profile struct {
	// Launcher is what starts such bastions: "local", which is the default,
	// as processes on the gateway's own machine, "fargate" as tasks on AWS.
	Launcher string
	// Idle is how long a bastion lives on after its last connection. At
	// least 1s; default 15m.
	Idle time.Duration
	// MaxLife is how long it lives at most, whatever is going on in it. Not
	// shorter than Idle; default 12h.
	MaxLife time.Duration
	// StartTimeout is how long a bastion may take to become reachable. At
	// least 1s; default 5m.
	StartTimeout time.Duration
	// Record says what is recorded of sessions with a terminal: in the file
	// "none", which is the default, "output" or "input".
	Record identity.Record
	// Local and Fargate are for the launchers of these names.
	Local   Local
	Fargate Fargate
}

// Local is what the local launcher has to know.
type Local struct {
	// Account is the account of this machine that sessions run as. Empty, the
	// default, means the account with the user's own name.
	Account string
	// Agent is the path of the bastion-agent binary. Empty, the default,
	// means the one beside the gateway's own binary.
	Agent string
	// AcceptEnv is which variables a client may set in its sessions; "*" and
	// "?" are wildcards, and empty means none. Default LANG, LC_*, COLORTERM,
	// TERM_PROGRAM* and GIT_PROTOCOL.
	AcceptEnv []string
}

// Defaults returns what an empty file means. HostKeys, FleetKey and
// AuthorizedKeysDir have no default. The caller owns the result.
func Defaults() *Gateway {
	return &Gateway{
		Listen:                []string{":2222"},
		Auth:                  defaultAuth(),
		StateDir:              "/var/lib/sallyport",
		Deployment:            "default",
		LoginGraceTime:        60 * time.Second,
		MaxStartups:           MaxStartups{Start: 10, Rate: 30, Full: 100},
		MaxAuthTries:          6,
		MaxSessions:           10,
		Network:               defaultNetwork(),
		MaxConnectionsPerUser: 100,
		StartsPerUser:         StartRate{Starts: 30, Per: time.Hour},
		ClientAliveInterval:   15 * time.Second,
		ClientAliveCountMax:   4,
		Drain:                 30 * time.Second,

		Audit:      defaultAudit(),
		Recordings: defaultRecordings(),

		Profiles: map[string]Profile{"default": defaultProfile()},
	}
}

func defaultProfile() Profile {
	return Profile{
		Launcher:     "local",
		Idle:         15 * time.Minute,
		MaxLife:      12 * time.Hour,
		StartTimeout: 5 * time.Minute,
		Local:        Local{AcceptEnv: defaultAcceptEnv()},
		Fargate:      defaultFargate(),
	}
}

func defaultAcceptEnv() []string {
	return []string{"LANG", "LC_*", "COLORTERM", "TERM_PROGRAM*", "GIT_PROTOCOL"}
}

// maxFile bounds the size of the file, in bytes.
const maxFile = 1 << 20

// Load reads the file at path and the keys it names. Relative paths in it start
// at the file's own folder.
//
// If anything is wrong, the error has one line for each mistake, in the order of
// the file, as in
//
//	gateway.yaml:12: profiles.default.idle: "15 minutes" is not a duration; write it like 15m
//
// where the path is the one that was given. No error holds a secret.
func Load(path string) (*Gateway, error) {
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("finding the folder of %s: %w", path, err)
	}
	data, _, err := readFile(path, maxFile)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	return parse(data, path, dir)
}

// readFile reads a regular file of at most max bytes. Its errors are of type
// *os.PathError.
func readFile(path string, max int64) ([]byte, os.FileInfo, error) {
	// Looked at first, because opening a FIFO would block.
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

// reason returns what went wrong with a file without repeating its path.
func reason(err error) error {
	if pathErr := (*os.PathError)(nil); errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}
