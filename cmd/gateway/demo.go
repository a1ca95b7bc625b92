package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/daemon"
	"github.com/sallyport-ssh/sallyport/internal/durable"
)

type demoCmd struct {
	Listen string        `default:"127.0.0.1:2222" help:"Address to listen on."`
	State  string        `placeholder:"DIR" help:"Folder for keys and state, which the next run finds again (default ~/.local/state/sallyport/demo)."`
	Idle   time.Duration `default:"15m" help:"How long your bastion runs after your last connection."`
}

// Run serves the account that runs it, with a key made for it, and no other user.
func (d *demoCmd) Run(ctx context.Context, s streams) error {
	if d.Idle < time.Second {
		return fmt.Errorf("--idle: %v is less than a second", d.Idle)
	}
	me, err := user.Current()
	if err != nil {
		return fmt.Errorf("looking up your account: %w", err)
	}
	if d.State == "" {
		state := os.Getenv("XDG_STATE_HOME")
		if state == "" {
			state = filepath.Join(me.HomeDir, ".local", "state")
		}
		d.State = filepath.Join(state, "sallyport", "demo")
	}
	if d.State, err = filepath.Abs(d.State); err != nil {
		return err
	}
	unlock, err := lockFolder(d.State)
	if errors.Is(err, durable.ErrLocked) {
		return fmt.Errorf("a demo runs already, with its keys in %s; use that one, or start another with --state DIR and --listen HOST:PORT", d.State)
	}
	if err != nil {
		return fmt.Errorf("preparing %s: %w", d.State, err)
	}
	defer unlock()
	demo, err := prepareDemo(d.State, me)
	if err != nil {
		return fmt.Errorf("preparing %s: %w", d.State, err)
	}

	cfg := config.Defaults()
	cfg.HostKeys = []ssh.Signer{demo.hostKey}
	cfg.FleetKeys = []ssh.Signer{demo.fleetKey}
	cfg.AuthorizedKeysDir = demo.path("authorized_keys.d")
	cfg.StateDir = demo.path("run")
	cfg.Drain = 5 * time.Second
	profile := cfg.Profiles["default"]
	profile.Idle = d.Idle
	profile.Local.Account = me.Username
	cfg.Profiles["default"] = profile
	// Before the instructions, which would be wrong: the agent may be missing.
	if problems := daemon.Check(cfg); len(problems) > 0 {
		return errors.Join(problems...)
	}

	ln, err := net.Listen("tcp", d.Listen)
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%w (another program uses the port; choose another one with --listen)", err)
	}
	if err != nil {
		return err
	}
	if err := demo.writeClientFiles(ln.Addr().(*net.TCPAddr)); err != nil {
		ln.Close()
		return err
	}
	demo.explain(s.err)
	log, err := os.OpenFile(demo.path("gateway.log"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		ln.Close()
		return err
	}
	defer log.Close()
	s.err = demoLog{file: log, screen: s.err}

	return serve(ctx, "", cfg, &sockets{ssh: []socket{{TCPListener: ln.(*net.TCPListener)}}}, s)
}

// lockFolder makes dir and locks it until unlock is called, because two demos in one
// folder would overwrite each other's ssh_config. Its error is durable.ErrLocked
// (wrapped) if another process has the lock.
func lockFolder(dir string) (unlock func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := durable.TryLock(f, syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return f.Close, nil
}

// A demo is the state folder, made ready.
type demo struct {
	dir               string
	user              string
	hostKey, fleetKey ssh.Signer
	port              int
}

// A demoLog writes the gateway's log, one record in each call, to a file. Warnings
// and errors also go to the screen; INFO would push the instructions off it.
type demoLog struct{ file, screen io.Writer }

func (l demoLog) Write(record []byte) (int, error) {
	if !bytes.Contains(record, []byte(`"level":"INFO"`)) {
		l.screen.Write(record) // an error must not keep it from the file
	}
	return l.file.Write(record)
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

func prepareDemo(dir string, me *user.User) (*demo, error) {
	d := &demo{dir: dir, user: me.Username}
	if err := os.MkdirAll(d.path("authorized_keys.d"), 0o700); err != nil {
		return nil, err
	}
	var err error
	if d.hostKey, err = keepKey(d.path("ssh_host_ed25519_key")); err != nil {
		return nil, err
	}
	if d.fleetKey, err = keepKey(d.path("fleet_key")); err != nil {
		return nil, err
	}
	key, err := keepKey(d.path("demo_key"))
	if err != nil {
		return nil, err
	}
	return d, writeFile(filepath.Join(d.path("authorized_keys.d"), me.Username), authorizedKey(key.PublicKey()))
}

// keepKey reads the private key at path, or makes one and keeps it there.
func keepKey(path string) (ssh.Signer, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		_, priv, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, err
		}
		block, err := ssh.MarshalPrivateKey(priv, "sallyport demo")
		if err != nil {
			return nil, err
		}
		data = pem.EncodeToMemory(block)
		if err := writeFile(path, string(data)); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	signer, err := ssh.ParsePrivateKey(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return signer, nil
}

// writeFile replaces a file atomically.
func writeFile(path, text string) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if _, err := tmp.WriteString(text); err != nil {
		tmp.Close()
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// writeClientFiles writes a known_hosts and an ssh_config, with which OpenSSH's
// clients connect to the gateway without questions and without changing the user's
// own files.
func (d *demo) writeClientFiles(addr *net.TCPAddr) error {
	host := addr.IP.String()
	if addr.IP.IsUnspecified() {
		host = "127.0.0.1"
	}
	known := fmt.Sprintf("[%s]:%d %s", host, addr.Port, authorizedKey(d.hostKey.PublicKey()))
	if err := writeFile(d.path("known_hosts"), known); err != nil {
		return err
	}
	var b strings.Builder
	// "inside" is the same gateway under another name, for a jump from the
	// bastion: ssh refuses to jump from a host to itself.
	fmt.Fprintf(&b, "Host bastion inside\n  HostName %s\n  Port %d\n  User %s\n  UserKnownHostsFile %q\n", host, addr.Port, d.user, d.path("known_hosts"))
	// Otherwise ssh would offer the keys of ~/.ssh and of an agent first, and reach
	// max_auth_tries before this one.
	fmt.Fprintf(&b, "  IdentityFile %q\n  IdentitiesOnly yes\n", d.path("demo_key"))
	d.port = addr.Port
	return writeFile(d.path("ssh_config"), b.String())
}

// explain prints commands to try.
func (d *demo) explain(w io.Writer) {
	cfg, jump := d.path("ssh_config"), "-J bastion"
	if strings.ContainsAny(cfg, " '\"\\$") {
		cfg = "'" + strings.ReplaceAll(cfg, "'", `'\''`) + "'"
		// ssh passes the path without quotes to the ssh that -J starts.
		jump = fmt.Sprintf(`-o ProxyCommand="ssh -F %s -W %%h:%%p bastion"`, cfg)
	}
	fmt.Fprintf(w, `
Sallyport is listening. In another terminal:

  ssh -F %[2]s bastion
      a shell in your bastion, which this starts
  ssh -F %[2]s bastion hostname
      a command; the bastion is running now
  scp -F %[2]s /etc/hostname bastion:/tmp/copied-by-scp
      copies a file; sftp and rsync work the same way
  ssh -F %[2]s %[4]s inside
      jumps through your bastion; "inside" can be any host that it can reach
  ssh -F %[2]s -N -L 127.0.0.1:8022:127.0.0.1:%[3]d bastion
      while it runs, forwards port 8022 here to port %[3]d of your bastion

Your bastion ends some time after your last connection. Ctrl-C ends this gateway;
the bastion keeps running, and the next demo finds it. Warnings are shown here; the
complete log is in
  %[1]s

`, d.path("gateway.log"), cfg, d.port, jump)
}
