package agent

import (
	"bytes"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// alive reports whether a process exists and is not a zombie.
func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(stat[bytes.LastIndexByte(stat, ')'):]), ") Z")
}

// TestDisconnect disconnects a client while its processes run. As with sshd, the terminal is
// hung up and the pipes are closed, and processes that survive that continue. When the
// bastion ends, all of them are killed, except those in a session of their own.
func TestDisconnect(t *testing.T) {
	t.Parallel()
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
			sshtest.Eventually(t, "pids", func() bool {
				text, _ := os.ReadFile(pids)
				n, _ := fmt.Sscan(string(text), &free, &deaf, &talks, &plain, &reads)
				return n == 5
			})
			sshtest.Eventually(t, "setsid", func() bool { sid, _ := unix.Getsid(free); return sid == free })
			sshtest.Eventually(t, "nohup", func() bool { // which ignores SIGHUP, then becomes sleep
				comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", deaf))
				return string(comm) == "sleep\n"
			})
			defer unix.Kill(free, unix.SIGKILL)
			c.Close()
			sshtest.Eventually(t, "processes that read or write have ended", func() bool { return !alive(reads) && !alive(talks) })
			sshtest.Eventually(t, "the shell has been reaped", func() bool { return unix.Kill(reads, 0) == unix.ESRCH })
			if pty {
				sshtest.Eventually(t, "the terminal has been hung up", func() bool { return !alive(plain) })
			}
			time.Sleep(100 * time.Millisecond) // a signal would have arrived by now
			if !pty && !alive(plain) {
				t.Error("without a terminal, a process has received a signal")
			}
			if !alive(deaf) {
				t.Error("a process with nohup has ended")
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

// TestDrainInput closes the channel right after the input. The process must get all of it,
// even if it reads later.
func TestDrainInput(t *testing.T) {
	t.Parallel()
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
				sshtest.Eventually(t, "the process has ended", func() (ended bool) { st, err = os.Stat(file); return err == nil })
				if st.Size() != int64(size) {
					t.Errorf("%d bytes arrived", st.Size())
				}
			})
		}
	}
}

// TestTraced waits for a process whose tracer has not waited for it. signal must not block
// meanwhile.
func TestTraced(t *testing.T) {
	t.Parallel()
	script := fmt.Sprintf(`my $parent = $$; syscall(%[2]d, 0x59616d61, -1, 0, 0, 0);
		if (!fork) { syscall(%[1]d, 0x4206, $parent, 0, 0) == 0 or exit 1; print "$$\n"; close STDOUT; sleep 1000; exit }
		<STDIN>; exit 3`, unix.SYS_PTRACE, unix.SYS_PRCTL) // PTRACE_SEIZE, PR_SET_PTRACER
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	stdin, untilTraced, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer untilTraced.Close()
	a := Account{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	p, err := Login{Account: a}.start(command{path: "/usr/bin/perl", argv: []string{"perl", "-e", "$| = 1; " + script}, files: [3]*os.File{stdin, w, os.Stderr}})
	w.Close()
	stdin.Close()
	if err != nil {
		t.Fatal(err)
	}
	var tracer int
	if _, err := fmt.Fscan(r, &tracer); err != nil {
		t.Fatalf("the tracer does not trace: %v", err)
	}
	untilTraced.Close()
	ended := make(chan unix.WaitStatus, 1)
	go func() { ended <- p.wait() }()
	sshtest.Eventually(t, "the process is a zombie", func() bool { return !alive(p.pid) })
	select {
	case <-ended:
		t.Error("wait returned before the tracer")
	case <-time.After(200 * time.Millisecond):
	}
	signalled := make(chan struct{})
	go func() { p.signal(unix.SIGCONT); close(signalled) }()
	select {
	case <-signalled:
	case <-time.After(10 * time.Second):
		t.Error("signal blocks")
	}
	unix.Kill(tracer, unix.SIGKILL)
	if status := <-ended; status.ExitStatus() != 3 {
		t.Errorf("it ended with %v", status)
	}
}

// TestStopDetached ends the bastion after a client has disconnected. Its processes must be
// killed, even those that ignore SIGHUP.
func TestStopDetached(t *testing.T) {
	t.Parallel()
	b := start(t, func(s *Server) { s.hangupGrace = 100 * time.Millisecond })
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
	sshtest.Eventually(t, "the connection has been removed", func() bool { return len(b.server.connections()) == 0 })
	if !alive(deaf) || !alive(shell) {
		t.Error("a process has ended with its client")
	}
	b.stop()
	if err := <-b.ended; err != nil {
		t.Error(err)
	}
	// SIGKILL has been sent, but takes effect later.
	sshtest.Eventually(t, "all processes have ended", func() bool { return !alive(deaf) && !alive(shell) })
}

// TestReapOrphans makes this process the parent of an orphan, as if it were process 1.
func TestReapOrphans(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	b := start(t, nil)
	c := b.dial(alice())
	var orphan int
	fmt.Sscan(output(t, c, "setsid sh -c 'exit 0' >/dev/null 2>&1 & echo $!"), &orphan)
	sshtest.Eventually(t, "the orphan has been reaped", func() bool {
		if err := reapOrphans(); err != nil {
			t.Fatal(err)
		}
		return unix.Kill(orphan, 0) == unix.ESRCH
	})
	// Reaping orphans must not reap the children of sessions, nor the programs that look
	// up the account at a login.
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	account, err := LookupAccount(me.Username)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 20 {
			if _, _, err := LookupLogin(account, time.Now()); err != nil {
				t.Error(err)
			}
			s, err := c.NewSession()
			if err != nil {
				t.Error(err)
				return
			}
			if exit, ok := s.Run("exit 7").(*ssh.ExitError); !ok || exit.ExitStatus() != 7 {
				t.Error("an exit status was lost")
			}
		}
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
			reapOrphans()
		}
	}
}
