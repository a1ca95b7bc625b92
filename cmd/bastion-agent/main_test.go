package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
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
)

func TestCommandLine(t *testing.T) {
	for _, tt := range []struct {
		args        []string
		stdout, err string
	}{
		{[]string{"version"}, "bastion-agent ", ""},
		{[]string{"--help"}, "Gateways log in to it", ""},
		{[]string{"serve", "--help"}, "SALLYPORT_FLEET_KEY", ""},
		{nil, "", "missing flags"},
		{[]string{"--owner=a", "--account=root", "--principal=p", "--fleet-key=nonsense"}, "", "--fleet-key"},
		{[]string{"--nonsense"}, "", "unknown flag"},
	} {
		var stdout, stderr bytes.Buffer
		err := run(context.Background(), tt.args, strings.NewReader(""), &stdout, &stderr)
		if !strings.Contains(stdout.String(), tt.stdout) || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: %v, printed %q", tt.args, err, stdout.String())
		}
	}
}

// TestServe runs the real program: it says where it listens, keeps a lock from
// its sessions, keeps its environment to itself, and exits with 0 when it has
// been idle.
func TestServe(t *testing.T) {
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

	var stderr bytes.Buffer
	cmd := exec.Command(binary, "--ready-fd=3", "--lock-fd=4", "--listen=127.0.0.1:0")
	cmd.Env = append(os.Environ(), "SALLYPORT_OWNER=alice", "SALLYPORT_ACCOUNT="+me.Username, "SALLYPORT_PRINCIPAL=task:1",
		"SALLYPORT_IDLE=1s", "SALLYPORT_FLEET_KEY="+string(ssh.MarshalAuthorizedKey(fleet.PublicKey())))
	cmd.ExtraFiles = []*os.File{w, lock}
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	w.Close()
	lock.Close()

	lines := bufio.NewScanner(r)
	if !lines.Scan() {
		cmd.Wait()
		t.Fatalf("the agent did not come up: %s", stderr.String())
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
	signer, err := sshca.Sign(fleet, identity.Identity{User: "alice", ConnID: "1"}, "task:1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c, err := ssh.Dial("tcp", ready.Addr, &ssh.ClientConfig{
		User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(hostKey),
	})
	if err != nil {
		t.Fatal(err)
	}
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

	other, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("the lock of a live agent: %v", err)
	}
	c.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, fmt.Sprint(stderr.String()))
	}
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("the lock of an agent that has exited: %v", err)
	}
}
