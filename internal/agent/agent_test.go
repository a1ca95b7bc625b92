package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// A testBastion is an agent that serves on a loopback port, and the fleet key for logins to
// it.
type testBastion struct {
	t      testing.TB
	server *Server
	fleet  ssh.Signer
	addr   string
	// home is the home directory of the account, which is otherwise this process's own.
	home string
	stop context.CancelFunc
	// ended receives the result of Serve.
	ended chan error
}

const principal = "task:test"

// newServer returns an agent that does not serve yet, and its fleet key. The home directory
// of its sessions is empty, and their shell is bash.
func newServer(t testing.TB) (*Server, ssh.Signer) {
	t.Helper()
	fleet := sshtest.NewKey(t)
	return &Server{
		HostKey:   sshtest.NewKey(t),
		Verifier:  sshca.Verifier{Fleet: []ssh.PublicKey{fleet.PublicKey()}, Principal: principal},
		Owner:     "alice",
		Account:   Account{Name: "alice", UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Home: t.TempDir(), Shell: "/bin/bash"},
		SFTP:      []string{opensshSFTP},
		AcceptEnv: []string{"LANG", "LC_*"},
		Log:       slog.New(slog.NewTextHandler(testLog{t}, nil)),
		// Not the files of the machine that runs the tests.
		environmentFiles: []string{},
	}, fleet
}

// testLog writes the agent's log to the log of the test.
type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// start serves an agent until the test ends. change, if not nil, may set its fields before.
func start(t testing.TB, change func(*Server)) *testBastion {
	t.Helper()
	s, fleet := newServer(t)
	if change != nil {
		change(s)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	b := &testBastion{t: t, server: s, fleet: fleet, addr: l.Addr().String(), home: s.Account.Home, stop: stop, ended: make(chan error, 1)}
	go func() {
		b.ended <- s.Serve(ctx, l)
		close(b.ended)
	}()
	t.Cleanup(func() {
		stop()
		if err := <-b.ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return b
}

// alice returns a login of the owner with every permission.
func alice() identity.Identity {
	return identity.Identity{User: "alice", ConnID: "c1", Permissions: identity.AllowAll()}
}

func (b *testBastion) config(id identity.Identity) *ssh.ClientConfig {
	b.t.Helper()
	signer, err := sshca.Sign(b.fleet, id, principal, time.Now())
	if err != nil {
		b.t.Fatal(err)
	}
	return &ssh.ClientConfig{
		User:            id.User,
		Auth:            []ssh.AuthMethod{ssh.PublicKeys(signer)},
		HostKeyCallback: ssh.FixedHostKey(b.server.HostKey.PublicKey()),
	}
}

// dial logs in as id. The connection is closed when the test ends.
func (b *testBastion) dial(id identity.Identity) *ssh.Client {
	b.t.Helper()
	c, err := ssh.Dial("tcp", b.addr, b.config(id))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return c
}

// sshConfig writes a configuration for ssh -F, and the keys for it, and returns its path. The
// host is called "bastion".
func (b *testBastion) sshConfig(id identity.Identity) string {
	b.t.Helper()
	// The certificate of sshca.Sign, but with a key that can be written to a file.
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		b.t.Fatal(err)
	}
	signed, err := sshca.Sign(b.fleet, id, principal, time.Now())
	if err != nil {
		b.t.Fatal(err)
	}
	cert := *signed.PublicKey().(*ssh.Certificate)
	if cert.Key, err = ssh.NewPublicKey(private.Public()); err != nil {
		b.t.Fatal(err)
	}
	if err := cert.SignCert(rand.Reader, b.fleet); err != nil {
		b.t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		b.t.Fatal(err)
	}
	dir := b.t.TempDir()
	write := func(name string, content []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, content, 0o600); err != nil {
			b.t.Fatal(err)
		}
		return file
	}
	key := write("id", pem.EncodeToMemory(block))
	write("id-cert.pub", ssh.MarshalAuthorizedKey(&cert))
	host, port, _ := net.SplitHostPort(b.addr)
	known := write("known_hosts", fmt.Appendf(nil, "bastion %s", ssh.MarshalAuthorizedKey(b.server.HostKey.PublicKey())))
	return write("config", fmt.Appendf(nil, `Host bastion
  HostName %s
  Port %s
  HostKeyAlias bastion
  User %s
  IdentityFile %s
  IdentitiesOnly yes
  UserKnownHostsFile %s
  GlobalKnownHostsFile /dev/null
  BatchMode yes
  LogLevel ERROR
`, host, port, id.User, key, known))
}

// run runs a program with input, and returns its output and exit status.
func run(t testing.TB, input string, name string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errs
	err := cmd.Run()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestSSH(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	config := b.sshConfig(alice())
	tests := []struct {
		name, input    string
		args           []string
		stdout, stderr string
		code           int
	}{
		{"exit status", "", []string{"exit 7"}, "", "", 7},
		{"streams apart", "", []string{"echo out; echo err >&2"}, "out\n", "err\n", 0},
		{"half-close", "b\na\n", []string{"sort; echo end"}, "a\nb\nend\n", "", 0},
		{"login shell", "echo $0; pwd\n", []string{}, "-bash\n" + b.home + "\n", "", 0},
		{"command", "", []string{"echo $0 $USER $LOGNAME $SHELL"}, "bash alice alice /bin/bash\n", "", 0},
		{"stdin is a pipe", "x\n", []string{"cat /dev/stdin"}, "x\n", "", 0},
		{"not found", "", []string{"exec nonesuch-program"}, "", "bash: line 1: exec: nonesuch-program: not found\n", 127},
		{"stderr after stdout", "", []string{"exec >&-; sleep 0.1; echo late >&2; exit 3"}, "", "late\n", 3},
		{"stdin not read", strings.Repeat("x", 1<<20), []string{"exit 5"}, "", "", 5},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, code := run(t, tt.input, "ssh", append([]string{"-F", config, "bastion"}, tt.args...)...)
			if stdout != tt.stdout || stderr != tt.stderr || code != tt.code {
				t.Errorf("ssh %q\n got %q, %q, %d\nwant %q, %q, %d", tt.args, stdout, stderr, code, tt.stdout, tt.stderr, tt.code)
			}
		})
	}
}
