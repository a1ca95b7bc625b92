package main

import (
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
	"golang.org/x/crypto/ssh/agent"

	"github.com/sallyport-ssh/sallyport/internal/config"
)

type demoCmd struct {
	Listen string        `default:"127.0.0.1:2222" help:"Where to listen."`
	State  string        `help:"Folder that keeps keys from run to run. (default ~/.local/state/sallyport/demo)"`
	Idle   time.Duration `default:"15m" help:"How long your bastion stays after your last connection."`
}

// Run serves the person who runs it, and nobody else, with the keys she has.
func (d *demoCmd) Run(ctx context.Context, s streams) error {
	me, err := user.Current()
	if err != nil {
		return fmt.Errorf("finding out who you are: %w", err)
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
	demo, err := prepareDemo(d.State, me)
	if err != nil {
		return fmt.Errorf("preparing %s: %w", d.State, err)
	}

	ln, err := net.Listen("tcp", d.Listen)
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%w (another one running? choose another port with --listen)", err)
	}
	if err != nil {
		return err
	}
	if err := demo.writeClientFiles(ln.Addr().(*net.TCPAddr)); err != nil {
		ln.Close()
		return err
	}
	demo.explain(s.err)

	cfg := config.Defaults()
	cfg.HostKeys = []ssh.Signer{demo.hostKey}
	cfg.FleetKey = demo.fleetKey
	cfg.AuthorizedKeysDir = demo.path("authorized_keys.d")
	cfg.StateDir = demo.path("run")
	cfg.Drain = 5 * time.Second
	profile := cfg.Profiles["default"]
	profile.Idle = d.Idle
	profile.Local.Account = me.Username
	cfg.Profiles["default"] = profile
	return serve(ctx, cfg, []net.Listener{ln}, s)
}

// A demo is the state folder, made ready.
type demo struct {
	dir               string
	user              string
	hostKey, fleetKey ssh.Signer
	port              int
	ownKey            bool // none of the user's own keys was found
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
	keys := publicKeys(filepath.Join(me.HomeDir, ".ssh"))
	if len(keys) == 0 {
		own, err := keepKey(d.path("demo_key"))
		if err != nil {
			return nil, err
		}
		d.ownKey = true
		keys = []string{authorizedKey(own.PublicKey())}
	}
	return d, writeFile(filepath.Join(d.path("authorized_keys.d"), me.Username), strings.Join(keys, ""))
}

// publicKeys returns the keys of the folder and of the running ssh-agent, a
// line each. What is not a key is passed over: the folder is not ours.
func publicKeys(dir string) []string {
	var lines []string
	seen := make(map[string]bool)
	add := func(k ssh.PublicKey) {
		if _, cert := k.(*ssh.Certificate); !cert && !seen[string(k.Marshal())] {
			seen[string(k.Marshal())] = true
			lines = append(lines, authorizedKey(k))
		}
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*.pub"))
	for _, file := range files {
		if data, err := os.ReadFile(file); err == nil {
			if key, _, _, _, err := ssh.ParseAuthorizedKey(data); err == nil {
				add(key)
			}
		}
	}
	if conn, err := net.Dial("unix", os.Getenv("SSH_AUTH_SOCK")); err == nil {
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if keys, err := agent.NewClient(conn).List(); err == nil {
			for _, k := range keys {
				if key, err := ssh.ParsePublicKey(k.Blob); err == nil {
					add(key)
				}
			}
		}
	}
	return lines
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

// writeFile replaces a file as a whole, so that no run ever finds half of one.
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

// writeClientFiles writes a known_hosts and an ssh_config with which every
// client of OpenSSH finds the gateway, without questions and without touching
// the user's own files.
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
	if d.ownKey {
		fmt.Fprintf(&b, "  IdentityFile %q\n  IdentitiesOnly yes\n", d.path("demo_key"))
	}
	d.port = addr.Port
	return writeFile(d.path("ssh_config"), b.String())
}

// explain prints what to try.
func (d *demo) explain(w io.Writer) {
	cfg, jump := d.path("ssh_config"), "-J bastion"
	if strings.ContainsAny(cfg, " '\"\\$") {
		cfg = "'" + strings.ReplaceAll(cfg, "'", `'\''`) + "'"
		// ssh passes the path on to the ssh that -J starts without quotes.
		jump = fmt.Sprintf(`-o ProxyCommand="ssh -F %s -W %%h:%%p bastion"`, cfg)
	}
	key := "your own SSH keys are authorised"
	if d.ownKey {
		key = "you had no SSH key, so one was made for this demo"
	}
	fmt.Fprintf(w, `
Sallyport is listening; %s. In another terminal:

  ssh -F %[2]s bastion
      a shell in your bastion, which is started for it
  ssh -F %[2]s bastion hostname
      one command; the bastion is there already
  scp -F %[2]s /etc/hostname bastion:/tmp/copied-by-scp
      copies a file; sftp and rsync work the same way
  ssh -F %[2]s %[4]s inside
      jumps through your bastion; any host that it reaches may stand for "inside"
  ssh -F %[2]s -N -L 127.0.0.1:8022:127.0.0.1:%[3]d bastion
      while it runs, port 8022 here is what port %[3]d is for your bastion

Your bastion ends a while after your last connection. Ctrl-C ends this gateway;
the bastion stays, and the next demo finds it again.

`, key, cfg, d.port, jump)
}
