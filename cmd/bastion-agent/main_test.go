package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/unixsock"
)

func TestCommandLine(t *testing.T) {
	const fleetKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ"
	for _, tt := range []struct {
		args        []string
		stdout, err string
	}{
		{[]string{"version"}, "bastion-agent ", ""},
		{[]string{"--help"}, "Gateways log in to it", ""},
		{[]string{"serve", "--help"}, "SALLYPORT_FLEET_KEY", ""},
		{nil, "", "missing flags"},
		{[]string{"--owner=a", "--account=root", "--principal=p", "--fleet-key=nonsense"}, "", "--fleet-key"},
		{[]string{"--owner=a", "--account=root", "--principal=p", "--fleet-key=" + fleetKey, "--groups=no-such-group"}, "", `--groups: there is no group "no-such-group"`},
		{[]string{"--nonsense"}, "", "unknown flag"},
	} {
		var stdout, stderr bytes.Buffer
		err := run(context.Background(), tt.args, strings.NewReader(""), &stdout, &stderr)
		if !strings.Contains(stdout.String(), tt.stdout) || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: %v, printed %q", tt.args, err, stdout.String())
		}
	}
}

// An agentProcess is the real program, serving alice.
type agentProcess struct {
	cmd  *exec.Cmd
	lock string // the file that it holds locked
	addr string
	host ssh.PublicKey
	// signer is of the fleet.
	signer ssh.Signer
}

// startAgent starts the program with a second of idle time and the given flags
// in args, and waits until it listens.
func startAgent(t *testing.T, stderr io.Writer, args ...string) *agentProcess {
	t.Helper()
	dir := t.TempDir()
	binary := filepath.Join(dir, "bastion-agent")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	fleet, err := ssh.NewSignerFromSigner(private)
	if err != nil {
		t.Fatal(err)
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()

	cmd := exec.Command(binary, append([]string{"--ready-fd=3", "--lock-fd=4", "--listen=127.0.0.1:0"}, args...)...)
	cmd.Env = append(os.Environ(), "SALLYPORT_OWNER=alice", "SALLYPORT_ACCOUNT="+me.Username, "SALLYPORT_PRINCIPAL=task:1",
		"SALLYPORT_IDLE=1s", "SALLYPORT_FLEET_KEY="+string(ssh.MarshalAuthorizedKey(fleet.PublicKey())))
	cmd.ExtraFiles = []*os.File{w, lock}
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	w.Close()
	lock.Close()

	lines := bufio.NewScanner(r)
	if !lines.Scan() {
		t.Fatalf("the agent did not come up: %v", cmd.Wait())
	}
	var ready struct {
		Addr    string `json:"addr"`
		HostKey string `json:"host_key"`
	}
	if err := json.Unmarshal(lines.Bytes(), &ready); err != nil {
		t.Fatal(err)
	}
	if lines.Scan() {
		t.Errorf("and then %q", lines.Text())
	}
	hostKey, _, _, _, err := ssh.ParseAuthorizedKey([]byte(ready.HostKey))
	if err != nil {
		t.Fatal(err)
	}
	return &agentProcess{cmd: cmd, lock: lock.Name(), addr: ready.Addr, host: hostKey, signer: fleet}
}

// login returns a connection of alice's.
func (a *agentProcess) login(t *testing.T) *ssh.Client {
	t.Helper()
	signer, err := sshca.Sign(a.signer, identity.Identity{User: "alice", ConnID: "1"}, "task:1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	network, addr := "tcp", a.addr
	if path, ok := unixsock.Path(a.addr); ok {
		network, addr = "unix", path
	}
	nc, err := net.Dial(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	c, chans, reqs, err := ssh.NewClientConn(nc, addr, &ssh.ClientConfig{
		User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(a.host),
	})
	if err != nil {
		t.Fatal(err)
	}
	return ssh.NewClient(c, chans, reqs)
}

// TestServe runs the real program: it says where it listens, keeps a lock from
// its sessions, keeps its environment to itself, and exits with 0 when it has
// been idle.
func TestServe(t *testing.T) {
	t.Run("TCP", func(t *testing.T) { testServe(t) })
	t.Run("Unix", func(t *testing.T) {
		socket := filepath.Join(t.TempDir(), "socket")
		testServe(t, "--listen=unix:"+socket)
		if _, err := os.Lstat(socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the agent's socket is left: %v", err)
		}
	})
}

func testServe(t *testing.T, args ...string) {
	var stderr bytes.Buffer
	a := startAgent(t, &stderr, args...)
	c := a.login(t)
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.Output("env | grep -c SALLYPORT; ls -l /proc/self/fd; umask; kill -PIPE $$; exit 3")
	if exit, ok := err.(*ssh.ExitError); !ok || exit.Signal() != "PIPE" {
		t.Errorf("the session ended with %v", err)
	}
	if !strings.HasPrefix(string(out), "0\n") || strings.Contains(string(out), "lock") || !strings.HasSuffix(string(out), "0022\n") {
		t.Errorf("the session says %q", out)
	}

	other, err := os.Open(a.lock)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("the lock of a live agent: %v", err)
	}
	c.Close()
	if err := a.cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, fmt.Sprint(stderr.String()))
	}
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("the lock of an agent that has exited: %v", err)
	}
}

// TestContainerEnv: sessions get the variables of a container if that is asked
// for, the agent's own never, and those of credentials if the role is granted.
func TestContainerEnv(t *testing.T) {
	t.Setenv("FROM_IMAGE", "a b=c")
	t.Setenv("AWS_REGION", "eu-west-1")
	t.Setenv("ECS_CONTAINER_METADATA_URI_V4", "http://169.254.170.2/v4/x")
	t.Setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/x")
	t.Setenv("SALLYPORT_GENERATION", "7")
	t.Setenv("SHLVL", "17")
	const public = "AWS_REGION=eu-west-1\nECS_CONTAINER_METADATA_URI_V4=http://169.254.170.2/v4/x\nFROM_IMAGE=a b=c\n"
	for _, tt := range []struct {
		args []string
		want string
	}{
		{nil, ""},
		{[]string{"--task-role"}, ""},
		{[]string{"--container-env"}, public},
		{[]string{"--container-env", "--task-role"}, "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=/v2/credentials/x\n" + public},
	} {
		a := startAgent(t, io.Discard, tt.args...)
		c := a.login(t)
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		out, err := s.Output("env | LC_ALL=C sort | grep -E '^(FROM_IMAGE|AWS_REGION|AWS_CONTAINER|ECS_|SALLYPORT|SHLVL=1[78])'; true")
		if string(out) != tt.want || err != nil {
			t.Errorf("%q: %q, %v; want %q", tt.args, out, err, tt.want)
		}
		c.Close()
		if err := a.cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
}

// TestLogUnread serves logins while the log's reader is stuck, and while it is
// gone, which raises SIGPIPE. The agent's end does not wait for the reader either.
func TestLogUnread(t *testing.T) {
	for _, gone := range []bool{false, true} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if gone {
			r.Close()
		} else {
			fill(t, w)
		}
		a := startAgent(t, w)
		for range 20 {
			c := a.login(t)
			s, err := c.NewSession()
			if err != nil {
				t.Fatal(err)
			}
			if out, err := s.Output("echo here"); err != nil || string(out) != "here\n" {
				t.Errorf("reader gone %v: %q, %v", gone, out, err)
			}
			c.Close()
		}
		if err := a.cmd.Wait(); err != nil {
			t.Errorf("reader gone %v: the idle agent ended with %v", gone, err)
		}
		r.Close()
		w.Close()
	}
}

// fill writes to a pipe until it takes no more.
func fill(t *testing.T, w *os.File) {
	t.Helper()
	fd := int(w.Fd())
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	var err error
	for page := make([]byte, 4096); err == nil; {
		_, err = unix.Write(fd, page)
	}
	if err != unix.EAGAIN {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, false); err != nil { // the agent's end is to block
		t.Fatal(err)
	}
}
