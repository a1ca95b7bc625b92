package agent

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// eventually waits for something another process does. How long it takes does
// not matter to any test; that it never happens fails one.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// alive says whether there is a process that is not a zombie.
func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(stat[bytes.LastIndexByte(stat, ')'):]), ") Z")
}

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

// TestEcho sends bytes both ways at once, in sizes around those of buffers.
func TestEcho(t *testing.T) {
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

// TestFrameOrder looks at what an exit code cannot show: exit-status comes
// before the end of the output, even for a program that closed it long before.
func TestFrameOrder(t *testing.T) {
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
			// Package ssh delivers requests and data apart; a request that
			// came before EOF is there when EOF is.
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

// TestRequests holds which requests a session grants, in which order.
func TestRequests(t *testing.T) {
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
		{"unknown subsystem", false, []step{{"subsystem", ssh.Marshal(commandRequest{"netconf"}), false}, {"what@example.com", nil, false}, {"keepalive@openssh.com", nil, false}, exec}},
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

func TestEnvironment(t *testing.T) {
	b := start(t, func(s *Server) { s.TZ = "Asia/Tokyo" })
	id := alice()
	id.Permissions.Environment = []string{"FROM_KEY=yes"}
	c := b.dial(id)
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	s.Setenv("LANG", "xx_YY")
	if err := s.Setenv("EVIL", "1"); err == nil {
		t.Error("EVIL was accepted")
	}
	out, err := s.Output("env")
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		got[name] = value
	}
	local := c.LocalAddr().String()
	host, port, _ := strings.Cut(local, ":")
	_, serverPort, _ := strings.Cut(b.addr, ":")
	for name, want := range map[string]string{
		"LANG": "xx_YY", "USER": "alice", "LOGNAME": "alice", "HOME": b.home, "SHELL": "/bin/bash",
		"MAIL": "/var/mail/alice", "TZ": "Asia/Tokyo", "FROM_KEY": "yes", "EVIL": "", "SSH_TTY": "", "SSH_ORIGINAL_COMMAND": "",
		"SSH_CONNECTION": host + " " + port + " 127.0.0.1 " + serverPort,
		"SSH_CLIENT":     host + " " + port + " " + serverPort,
	} {
		if got[name] != want {
			t.Errorf("%s=%q, want %q", name, got[name], want)
		}
		delete(got, name)
	}
	for _, name := range []string{"PATH", "PWD", "SHLVL", "_"} {
		delete(got, name)
	}
	if env, _ := os.ReadFile(environmentFile); len(parseEnvironment(string(env))) == 0 && len(got) > 0 {
		t.Errorf("the agent's own environment has leaked: %v", got)
	}
}

// TestNoEnvironment wants an agent that accepts no variables to refuse even the
// usual ones.
func TestNoEnvironment(t *testing.T) {
	b := start(t, func(s *Server) { s.AcceptEnv = nil })
	s, err := b.dial(alice()).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Setenv("LANG", "C"); err == nil {
		t.Error("LANG was accepted")
	}
}

func TestTerminal(t *testing.T) {
	c := start(t, nil).dial(alice())
	ch, reqs, err := c.OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	modes := "\x03\x00\x00\x00\x15" + "\x35\x00\x00\x00\x00" + "\x2a\x00\x00\x00\x01" + "\x48\x00\x00\x00\x00" + // VERASE ^U, no ECHO, IUTF8, no ONLCR
		"\x81\x00\x00\x96\x00" + "\x00" // 38400
	request := func(kind string, payload any) {
		t.Helper()
		if ok, err := ch.SendRequest(kind, true, ssh.Marshal(payload)); !ok || err != nil {
			t.Fatal(kind, ok, err)
		}
	}
	request("pty-req", ptyRequest{"vt100", 91, 17, 910, 170, modes})
	request("window-change", windowChangeRequest{Cols: 92, Rows: 18, XPixels: 920, YPixels: 180})
	request("exec", commandRequest{`trap 'echo winch' WINCH; stty -a; stty size; echo $TERM; [ "$(tty)" = "$SSH_TTY" ] && echo same; ps -o sid= $$ | grep -q $$ && echo leads; echo ready; while read l; do echo "got $l $(stty size)"; done`})

	var got strings.Builder
	until := func(want string) {
		t.Helper()
		buf := make([]byte, 4096)
		for !strings.Contains(got.String(), want) {
			n, err := ch.Read(buf)
			got.Write(buf[:n])
			if err != nil {
				t.Fatalf("no %q: %v in %q", want, err, got.String())
			}
		}
	}
	until("ready\n")
	for _, want := range []string{"erase = ^U", "-echo ", "iutf8", "-onlcr", "speed 38400 baud", "18 92\n", "vt100\n", "same\n", "leads\n"} {
		if !strings.Contains(got.String(), want) {
			t.Errorf("no %q in %q", want, got.String())
		}
	}
	for i := range 50 { // none of them blocks, and the last one counts
		ch.SendRequest("window-change", false, ssh.Marshal(windowChangeRequest{Cols: uint32(100 + i), Rows: 40}))
	}
	request("window-change", windowChangeRequest{Cols: 150, Rows: 41})
	io.WriteString(ch, "line\n")
	until("got line 41 150\n")
	until("winch\n")
	io.WriteString(ch, "\x04") // end of file, at the terminal
	if rest, err := io.ReadAll(ch); err != nil {
		t.Errorf("after ^D: %q, %v", rest, err)
	}
}

// TestBackgroundJobs: with a terminal a session ends with its shell, whatever is
// left running; without, it lasts while somebody holds its output.
func TestBackgroundJobs(t *testing.T) {
	c := start(t, nil).dial(alice())
	session := func(pty bool) (ssh.Channel, chan string) {
		ch, reqs, err := c.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		if pty {
			ch.SendRequest("pty-req", true, ssh.Marshal(ptyRequest{Term: "vt100"}))
		}
		events := make(chan string, 10)
		go func() {
			for req := range reqs {
				events <- req.Type
			}
			events <- "close"
		}()
		return ch, events
	}
	const command = "sleep 1000 & echo $!"

	ch, events := session(true)
	ch.SendRequest("exec", true, ssh.Marshal(commandRequest{"trap '' HUP; " + command}))
	out, _ := io.ReadAll(ch)
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	if got := <-events + " " + <-events; got != "exit-status close" {
		t.Errorf("with a terminal: %s", got)
	}
	if !alive(pid) {
		t.Error("the background job has ended with its terminal")
	}
	unix.Kill(pid, unix.SIGKILL)

	ch, events = session(false)
	ch.SendRequest("exec", true, ssh.Marshal(commandRequest{command}))
	buf := make([]byte, 100)
	n, _ := ch.Read(buf)
	if pid, err = strconv.Atoi(strings.TrimSpace(string(buf[:n]))); err != nil {
		t.Fatal(err)
	}
	if got := <-events; got != "exit-status" {
		t.Errorf("got %s, want exit-status", got)
	}
	select {
	case got := <-events:
		t.Errorf("got %s while a job holds the output", got)
	case <-time.After(100 * time.Millisecond):
	}
	unix.Kill(pid, unix.SIGKILL)
	if got := <-events; got != "close" {
		t.Errorf("got %s, want close", got)
	}
}

// TestClientGoes: what a client leaves behind when it goes is left alone, as sshd
// does. Its terminal hangs up and its pipes are closed; what does not mind that
// goes on. The end of the bastion is the end of all of it, but for what has made
// itself independent.
func TestClientGoes(t *testing.T) {
	for _, pty := range []bool{false, true} {
		t.Run(fmt.Sprintf("pty %v", pty), func(t *testing.T) {
			t.Parallel()
			b := start(t, nil)
			c := b.dial(alice())
			s, err := c.NewSession()
			if err != nil {
				t.Fatal(err)
			}
			if pty {
				if err := s.RequestPty("vt100", 24, 80, nil); err != nil {
					t.Fatal(err)
				}
			}
			stdin, err := s.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			defer stdin.Close()
			pids := filepath.Join(b.home, "pids")
			err = s.Start(fmt.Sprintf(`setsid sleep 1000 >/dev/null 2>&1 </dev/null & free=$!
nohup sleep 1000 >/dev/null 2>&1 & deaf=$!
sh -c 'trap "" HUP PIPE; while echo x; do sleep 0.05; done' & talks=$!
sleep 1000 & plain=$!
echo $free $deaf $talks $plain $$ > %[1]s.new; mv %[1]s.new %[1]s; exec cat`, pids))
			if err != nil {
				t.Fatal(err)
			}
			var free, deaf, talks, plain, reads int
			eventually(t, "pids", func() bool {
				text, _ := os.ReadFile(pids)
				n, _ := fmt.Sscan(string(text), &free, &deaf, &talks, &plain, &reads)
				return n == 5
			})
			eventually(t, "setsid", func() bool { sid, _ := unix.Getsid(free); return sid == free })
			eventually(t, "nohup", func() bool { // which ignores SIGHUP, then becomes sleep
				comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", deaf))
				return string(comm) == "sleep\n"
			})
			defer unix.Kill(free, unix.SIGKILL)
			c.Close()
			eventually(t, "what reads or writes notices", func() bool { return !alive(reads) && !alive(talks) })
			eventually(t, "and is reaped", func() bool { return unix.Kill(reads, 0) == unix.ESRCH })
			if pty {
				eventually(t, "what does not ignore SIGHUP ends with its terminal", func() bool { return !alive(plain) })
			}
			time.Sleep(100 * time.Millisecond) // a signal would have come by now
			if !pty && !alive(plain) {
				t.Error("without a terminal, a process has got a signal")
			}
			if !alive(deaf) {
				t.Error("nohup has not kept a process alive")
			}
			b.stop()
			if err := <-b.ended; err != nil {
				t.Error(err)
			}
			if !alive(free) {
				t.Error("a process with a session of its own was killed")
			}
		})
	}
}

// TestClosedEarly: what a client has sent before it closes the channel reaches the
// process, even if that reads it later.
func TestClosedEarly(t *testing.T) {
	for _, eof := range []bool{false, true} {
		for _, size := range []int{60_000, 1 << 20} {
			t.Run(fmt.Sprintf("%d bytes, EOF %v", size, eof), func(t *testing.T) {
				t.Parallel()
				b := start(t, nil)
				s, err := b.dial(alice()).NewSession()
				if err != nil {
					t.Fatal(err)
				}
				stdin, err := s.StdinPipe()
				if err != nil {
					t.Fatal(err)
				}
				file := filepath.Join(b.home, "got")
				if err := s.Start("sleep 0.3; cat >" + file + ".new; mv " + file + ".new " + file); err != nil {
					t.Fatal(err)
				}
				if _, err := stdin.Write(make([]byte, size)); err != nil {
					t.Fatal(err)
				}
				if eof {
					stdin.Close()
				}
				s.Close()
				var st os.FileInfo
				eventually(t, "the process ends", func() (ended bool) { st, err = os.Stat(file); return err == nil })
				if st.Size() != int64(size) {
					t.Errorf("%d bytes arrived", st.Size())
				}
			})
		}
	}
}

// TestTraced: a process whose end its tracer has not looked at yet cannot be waited
// for; nobody else waits for that.
func TestTraced(t *testing.T) {
	script := fmt.Sprintf(`my $parent = $$;
		if (!fork) { syscall(%[1]d, 0x4206, $parent, 0, 0) == 0 or exit 1; print "$$\n"; close STDOUT; sleep 1000; exit }
		syscall(%[2]d, 0x59616d61, -1, 0, 0, 0); sleep 1; exit 3`, unix.SYS_PTRACE, unix.SYS_PRCTL) // PTRACE_SEIZE, PR_SET_PTRACER
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	a := Account{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	p, err := a.start(command{path: "/usr/bin/perl", argv: []string{"perl", "-e", "$| = 1; " + script}, files: [3]*os.File{r, w, os.Stderr}})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	var tracer int
	if _, err := fmt.Fscan(r, &tracer); err != nil {
		t.Fatalf("the tracer does not trace: %v", err)
	}
	ended := make(chan unix.WaitStatus, 1)
	go func() { ended <- p.wait() }()
	eventually(t, "a zombie", func() bool { return !alive(p.pid) })
	select {
	case <-ended:
		t.Error("waited for what is traced")
	case <-time.After(200 * time.Millisecond):
	}
	told := make(chan struct{})
	go func() { p.signal(unix.SIGCONT); close(told) }()
	select {
	case <-told:
	case <-time.After(10 * time.Second):
		t.Error("who signals it waits for its tracer")
	}
	unix.Kill(tracer, unix.SIGKILL)
	if status := <-ended; status.ExitStatus() != 3 {
		t.Errorf("it ended with %v", status)
	}
}

// TestStopEndsOrphans: when the bastion ends, what clients have left behind ends
// too, even if it ignores SIGHUP.
func TestStopEndsOrphans(t *testing.T) {
	b := start(t, nil)
	c := b.dial(alice())
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(`sh -c 'trap "" HUP; while :; do sleep 1; done' >/dev/null 2>&1 & echo $! $$; sleep 1000 >/dev/null 2>&1; :`); err != nil {
		t.Fatal(err)
	}
	var deaf, shell int
	if _, err := fmt.Fscan(out, &deaf, &shell); err != nil {
		t.Fatal(err)
	}
	c.Close()
	eventually(t, "the connection is not counted any more", func() bool { return len(b.server.open()) == 0 })
	if !alive(deaf) || !alive(shell) {
		t.Error("something has ended with its client")
	}
	b.stop()
	if err := <-b.ended; err != nil {
		t.Error(err)
	}
	// It has been killed, and may take a moment to die.
	eventually(t, "nothing outlives the bastion", func() bool { return !alive(deaf) && !alive(shell) })
}

// TestReadsNoMore: who writes what the client reads no more gets SIGPIPE, even if
// all windows are full and stay that way, and the session ends.
func TestReadsNoMore(t *testing.T) {
	for _, tt := range []struct {
		name, command string
		pty           bool
		status        byte
	}{
		{"a writer", "yes; exit 5", false, 5},
		{"one that has ended", "head -c 3000000 /dev/zero; exit 6", false, 6},
		{"what stderr cannot say", "yes; echo end >&2; exit 7", false, 7},
		{"a terminal", "head -c 3000000 /dev/zero & sleep 0.2; exit 8", true, 8},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ch, reqs, err := start(t, nil).dial(alice()).OpenChannel("session", nil)
			if err != nil {
				t.Fatal(err)
			}
			if tt.pty {
				ch.SendRequest("pty-req", true, ssh.Marshal(ptyRequest{Term: "vt100"}))
			}
			ch.SendRequest("exec", true, ssh.Marshal(commandRequest{tt.command}))
			time.Sleep(500 * time.Millisecond) // for the window of 2 MiB to be full
			ch.SendRequest("eow@openssh.com", false, nil)
			var got byte
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
	for _, tt := range []struct {
		name         string
		change       func(*Server)
		stdout, errs string
		code         int
	}{
		{"no shell", func(s *Server) { s.Account.Shell = "/nonexistent/shell" }, "", "/nonexistent/shell: No such file or directory\n", 127},
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

// greeting is what an interactive shell shows that is left at once.
func greeting(t *testing.T, b *bench) string {
	t.Helper()
	s, err := b.dial(alice()).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s.Stdout = &out
	s.Stdin = strings.NewReader("exit\n")
	if err := s.RequestPty("vt100", 24, 80, ssh.TerminalModes{ssh.ECHO: 0}); err != nil {
		t.Fatal(err)
	}
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	s.Wait()
	return out.String()
}

// TestGreeting: only an interactive shell gets one.
func TestGreeting(t *testing.T) {
	b := start(t, nil)
	if got := greeting(t, b); strings.Contains(got, "Last login") {
		t.Errorf("the first login is greeted with %q", got)
	}
	if got := greeting(t, b); !strings.Contains(got, "Last login: ") || !strings.Contains(got, " from 127.0.0.1\r\n") {
		t.Errorf("the second login is greeted with %q", got)
	}
	if err := os.WriteFile(filepath.Join(b.home, ".hushlogin"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := greeting(t, b); strings.Contains(got, "Last login") {
		t.Errorf("with .hushlogin the login is greeted with %q", got)
	}
}

// TestLastlog wants logins in the file of lastlog(8), which has to understand
// them, and those to an earlier bastion from there.
func TestLastlog(t *testing.T) {
	root := t.TempDir()
	file := filepath.Join(root, "var/log/lastlog")
	etc := filepath.Join(root, "etc")
	for _, dir := range []string{filepath.Dir(file), etc} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	change := func(s *Server) { s.Lastlog = file }

	b := start(t, change)
	greeting(t, b)
	if _, err := os.Stat(file); err == nil {
		t.Fatal("a file was made where the machine keeps none")
	}
	if got := greeting(t, b); !strings.Contains(got, "Last login: ") {
		t.Errorf("without a file the second login is greeted with %q", got)
	}

	nowhere := start(t, func(s *Server) { s.Lastlog = os.DevNull })
	greeting(t, nowhere)
	if got := greeting(t, nowhere); !strings.Contains(got, "Last login: ") {
		t.Errorf("with a file that keeps nothing the second login is greeted with %q", got)
	}

	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := start(t, change).dial(alice()).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RequestPty("vt100", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	line, err := s.Output("tty")
	if err != nil {
		t.Fatal(err)
	}
	if got := greeting(t, start(t, change)); !strings.Contains(got, "Last login: ") || !strings.Contains(got, " from 127.0.0.1\r\n") {
		t.Errorf("after a command with a terminal, to another bastion, the login is greeted with %q", got)
	}

	if _, err := exec.LookPath("lastlog"); err != nil || os.Getuid() != 0 {
		t.Skip("the rest needs lastlog(8), and root for it to look at another file")
	}
	if err := os.WriteFile(filepath.Join(etc, "passwd"), []byte("root:x:0:0::/root:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, errs, code := run(t, "", "lastlog", "-R", root, "-u", "0")
	_, terminal, _ := strings.Cut(strings.TrimSpace(string(line)), "/dev/")
	if code != 0 || !strings.Contains(out, terminal) || !strings.Contains(out, " 127.0.0.1 ") || !strings.Contains(out, time.Now().Format(" 2006")) {
		t.Errorf("lastlog shows %q, %q, exit %d; want terminal %s", out, errs, code, terminal)
	}
}

func TestRC(t *testing.T) {
	b := start(t, nil)
	if err := os.Mkdir(filepath.Join(b.home, ".ssh"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.home, ".ssh/rc"), []byte("echo rc in $PWD as $USER\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := output(t, b.dial(alice()), "echo main"), "rc in "+b.home+" as alice\nmain\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	id := alice()
	id.Permissions.UserRC = false
	if got := output(t, b.dial(id), "echo main"); got != "main\n" {
		t.Errorf("without permission: got %q", got)
	}
}

// TestRequirePTY wants the agent itself to run nothing without a terminal for who
// must have one, whatever the gateway lets pass.
func TestRequirePTY(t *testing.T) {
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
