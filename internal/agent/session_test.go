package agent

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// output runs a command in a new session and returns its standard output.
func output(t testing.TB, c *ssh.Client, command string) string {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	out, err := s.Output(command)
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return string(out)
}

func TestLargeOutput(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	h := sha256.New()
	const size = 64 << 20
	cmd := exec.Command("ssh", "-F", b.sshConfig(alice()), "bastion", fmt.Sprintf("head -c %d /dev/zero", size))
	cmd.Stdout = h
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	want := sha256.New()
	io.CopyN(want, zeros{}, size)
	if !bytes.Equal(h.Sum(nil), want.Sum(nil)) {
		t.Errorf("output differs from %d zeros", size)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestEcho sends data in both directions at the same time, in sizes around those of buffers.
func TestEcho(t *testing.T) {
	t.Parallel()
	c := start(t, nil).dial(alice())
	for _, size := range []int{0, 1, 511, 512, 513, 16384, 32768, 65536, 65537, 3<<20 + 7} {
		want := make([]byte, size)
		for i := range want {
			want[i] = byte(i * 7 >> 3)
		}
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		s.Stdin = bytes.NewReader(want)
		got, err := s.Output("cat")
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("echo of %d bytes: got %d, err %v", size, len(got), err)
		}
	}
}

// TestFrameOrder checks that exit-status precedes EOF, even if the program has closed its
// output long before its end.
func TestFrameOrder(t *testing.T) {
	t.Parallel()
	c := start(t, nil).dial(alice())
	for _, command := range []string{"exit 7", "echo x; exit 7", "exec >&- 2>&-; sleep 0.2; exit 7"} {
		ch, reqs, err := c.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := ch.SendRequest("exec", true, ssh.Marshal(commandRequest{command})); !ok || err != nil {
			t.Fatal(ok, err)
		}
		eof := make(chan struct{})
		go func() { io.Copy(io.Discard, ch); close(eof) }()
		status := false
		for open := true; open; {
			// Package ssh delivers requests and data on separate Go channels. A request
			// that was received before EOF has been delivered when EOF is.
			select {
			case req, ok := <-reqs:
				if open = ok; ok && req.Type == "exit-status" {
					status = bytes.Equal(req.Payload, ssh.Marshal(exitStatus{7}))
				}
			case <-eof:
				select {
				case req, ok := <-reqs:
					if open = ok; ok && req.Type == "exit-status" {
						status = true
					}
				default:
				}
				if !status {
					t.Errorf("%q: EOF came before exit-status", command)
				}
				eof = nil
			}
		}
		if !status {
			t.Errorf("%q: no exit-status 7", command)
		}
	}
}

func TestExitSignal(t *testing.T) {
	t.Parallel()
	c := start(t, nil).dial(alice())
	for _, tt := range []struct{ command, want string }{
		{"kill -TERM $$", "TERM"},
		{"kill -KILL $$", "KILL"},
		{"ulimit -c 0; kill -SEGV $$", "SEGV"},
		{"kill -STKFLT $$", "SIG@openssh.com"},
	} {
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		err = s.Run(tt.command)
		if exit, ok := err.(*ssh.ExitError); !ok || exit.Signal() != tt.want {
			t.Errorf("%q: %v, want signal %s", tt.command, err, tt.want)
		}
	}
}

// TestRequests sends requests of a session in various orders.
func TestRequests(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	limited := alice()
	limited.Permissions.PTY, limited.Permissions.AgentForwarding, limited.Permissions.X11Forwarding = false, false, false
	pty := ssh.Marshal(ptyRequest{Term: "xterm", Cols: 80, Rows: 24})
	type step struct {
		kind    string
		payload []byte
		want    bool
	}
	exec := step{"exec", ssh.Marshal(commandRequest{"sleep 1000"}), true}
	env := func(name, value string) []byte { return ssh.Marshal(envRequest{name, value}) }
	x11 := ssh.Marshal(x11Request{true, "MIT-MAGIC-COOKIE-1", "0123abcd", 0})
	tests := []struct {
		name    string
		limited bool
		steps   []step
	}{
		{"one program only", false, []step{exec, {"exec", exec.payload, false}, {"shell", nil, false}, {"subsystem", ssh.Marshal(commandRequest{"sftp"}), false}, {"env", env("LANG", "C"), false}}},
		{"one terminal only", false, []step{{"pty-req", pty, true}, {"pty-req", pty, false}}},
		{"terminal comes first", false, []step{exec, {"pty-req", pty, false}}},
		{"no terminal", true, []step{{"pty-req", pty, false}, {"x11-req", x11, false}, {"auth-agent-req@openssh.com", nil, false}, exec}},
		{"environment", false, []step{{"env", env("LANG", "C"), true}, {"env", env("LC_ALL", "C"), true}, {"env", env("LD_PRELOAD", "x"), false}, {"env", env("PATH", "x"), false}, {"env", env("", "x"), false}, {"env", env("LC_A=B", "x"), false}, {"env", env("LC_A", "a\x00b"), false}}},
		{"big environment", false, []step{{"env", env("LC_A", strings.Repeat("x", maxEnvBytes-10)), true}, {"env", env("LC_B", strings.Repeat("x", 100)), false}}},
		{"window without terminal", false, []step{{"window-change", ssh.Marshal(windowChangeRequest{}), false}, {"break", ssh.Marshal(breakRequest{}), false}}},
		{"break", false, []step{{"pty-req", pty, true}, exec, {"break", ssh.Marshal(breakRequest{500}), true}, {"window-change", ssh.Marshal(windowChangeRequest{}), true}}},
		{"signal", false, []step{{"signal", ssh.Marshal(commandRequest{"TERM"}), false}, exec, {"signal", ssh.Marshal(commandRequest{"NONE"}), false}, {"signal", ssh.Marshal(commandRequest{"TERM"}), true}}},
		{"no signals for subsystems", false, []step{{"subsystem", ssh.Marshal(commandRequest{"sftp"}), true}, {"signal", ssh.Marshal(commandRequest{"TERM"}), false}}},
		{"unknown subsystem", false, []step{{"subsystem", ssh.Marshal(commandRequest{"netconf"}), false}, {"unknown@example.com", nil, false}, {"keepalive@openssh.com", nil, false}, exec}},
		{"garbage", false, []step{{"pty-req", []byte{1}, false}, {"env", []byte{0, 0, 0, 9, 1}, false}, {"exec", nil, false}, {"subsystem", []byte{255, 255, 255, 255}, false}, {"x11-req", nil, false}, {"window-change", nil, false}, {"signal", nil, false}, {"break", nil, false}, exec}},
		{"command with NUL", false, []step{{"exec", ssh.Marshal(commandRequest{"true\x00false"}), false}}},
		{"bad cookie", false, []step{{"x11-req", ssh.Marshal(x11Request{false, "MIT-MAGIC-COOKIE-1", "ab\nquit", 0}), false}, {"x11-req", ssh.Marshal(x11Request{false, "-f", "ab", 0}), false}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id := alice()
			if tt.limited {
				id = limited
			}
			ch, reqs, err := b.dial(id).OpenChannel("session", nil)
			if err != nil {
				t.Fatal(err)
			}
			defer ch.Close()
			go ssh.DiscardRequests(reqs)
			for _, step := range tt.steps {
				ok, err := ch.SendRequest(step.kind, true, step.payload)
				if err != nil || ok != step.want {
					t.Errorf("%s %q: %v, %v; want %v", step.kind, step.payload, ok, err, step.want)
				}
			}
		})
	}
}

// TestEOW sends eow@openssh.com when the window is full. The process must get SIGPIPE, and the
// session must end although the window stays full.
func TestEOW(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, command string
		pty           bool
		status        byte
	}{
		{"endless output", "yes; exit 5", false, 5},
		{"finite output", "head -c 3000000 /dev/zero; exit 6", false, 6},
		{"output on stderr", "yes; echo end >&2; exit 7", false, 7},
		{"a terminal", "head -c 3000000 /dev/zero & read line; exit 8", true, 8},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := start(t, nil)
			ch, reqs, err := b.dial(alice()).OpenChannel("session", nil)
			if err != nil {
				t.Fatal(err)
			}
			if tt.pty {
				ch.SendRequest("pty-req", true, ssh.Marshal(ptyRequest{Term: "vt100"}))
			}
			ch.SendRequest("exec", true, ssh.Marshal(commandRequest{tt.command}))
			sshtest.Eventually(t, "the window is full", func() bool {
				for _, c := range b.server.connections() {
					for _, s := range c.openSessions() {
						// A write blocks for so long only if the window is full.
						s.mu.Lock()
						started := s.proc != nil // after stdout has been set
						s.mu.Unlock()
						return started && s.stdout.stuck(100*time.Millisecond)
					}
				}
				return false
			})
			var got byte
			if tt.pty { // end the shell, so that output is left in the terminal
				io.WriteString(ch, "\n")
				got = (<-reqs).Payload[3]
			}
			ch.SendRequest("eow@openssh.com", false, nil)
			for req := range reqs { // until the channel is closed
				if req.Type == "exit-status" {
					got = req.Payload[3]
				}
			}
			if got != tt.status {
				t.Errorf("the session ends with status %d, want %d", got, tt.status)
			}
		})
	}
}

func TestForcedCommand(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	id := alice()
	id.Permissions.ForceCommand = `echo "forced [$SSH_ORIGINAL_COMMAND]"`
	c := b.dial(id)
	if got := output(t, c, "rm -rf /"); got != "forced [rm -rf /]\n" {
		t.Errorf("got %q", got)
	}
	ch, reqs, err := c.OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	ch.SendRequest("subsystem", true, ssh.Marshal(commandRequest{"sftp"}))
	out, _ := io.ReadAll(ch)
	if want := "forced [" + opensshSFTP + "]\n"; string(out) != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

func TestStartFails(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name         string
		change       func(*Server)
		stdout, errs string
		code         int
	}{
		{"no shell", func(s *Server) { s.Account.Shell = "/nonexistent/shell" }, "", "/nonexistent/shell: No such file or directory\n", 127},
		{"no shell on purpose", func(s *Server) { s.Account.Shell = "/nonexistent/nologin" }, "", forwardsOnly, 127},
		{"nologin", func(s *Server) { s.Account.Shell = "/usr/sbin/nologin" }, "This account is currently not available.\n", "", 1},
		{"no home", func(s *Server) { s.Account.Home = "/nonexistent" }, "/\n", "Could not chdir to home directory /nonexistent: No such file or directory\n", 0},
		{"no account's shell", func(s *Server) { s.Account.Shell = "" }, "/\n", "", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := start(t, tt.change)
			stdout, stderr, code := run(t, "", "ssh", "-F", b.sshConfig(alice()), "bastion", "cd / 2>&1; pwd")
			if tt.name == "no home" {
				stdout, stderr, code = run(t, "", "ssh", "-F", b.sshConfig(alice()), "bastion", "pwd")
			}
			if stdout != tt.stdout || stderr != tt.errs || code != tt.code {
				t.Errorf("got %q, %q, %d", stdout, stderr, code)
			}
		})
	}
}

// TestRequirePTY checks that the agent itself enforces require_pty.
func TestRequirePTY(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	id := alice()
	id.Permissions.RequirePTY = true
	c := b.dial(id)
	defer c.Close()
	for _, terminal := range []bool{false, true} {
		for _, kind := range []string{"shell", "exec"} {
			ch, reqs, err := c.OpenChannel("session", nil)
			if err != nil {
				t.Fatal(err)
			}
			go ssh.DiscardRequests(reqs)
			if terminal {
				if ok, err := ch.SendRequest("pty-req", true, ssh.Marshal(ptyRequest{Term: "xterm", Cols: 80, Rows: 24})); !ok || err != nil {
					t.Fatalf("no terminal: %v", err)
				}
			}
			payload := []byte(nil)
			if kind == "exec" {
				payload = ssh.Marshal(struct{ Command string }{"true"})
			}
			if ok, err := ch.SendRequest(kind, true, payload); ok != terminal || err != nil {
				t.Errorf("%s, with a terminal %v: %v, %v", kind, terminal, ok, err)
			}
			ch.Close()
		}
	}
}
