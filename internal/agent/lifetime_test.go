package agent

import (
	"context"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// TestStop stops the agent. Its terminals must show a message, its processes must get SIGHUP,
// and the clients must get the exit signal.
func TestStop(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	c := b.dial(alice())
	ch, reqs, err := c.OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan string, 10)
	go func() {
		for req := range reqs {
			ended <- req.Type
		}
		close(ended)
	}()
	ch.SendRequest("pty-req", true, ssh.Marshal(ptyRequest{Term: "vt100"}))
	ch.SendRequest("exec", true, ssh.Marshal(commandRequest{"echo ready; exec sleep 1000"}))
	buf := make([]byte, 100)
	if n, _ := ch.Read(buf); !strings.Contains(string(buf[:n]), "ready") {
		t.Fatalf("got %q", buf[:n])
	}
	sshtest.Eventually(t, "the process has started", func() bool {
		for _, c := range b.server.connections() {
			for _, s := range c.openSessions() {
				s.mu.Lock()
				running := s.proc != nil
				s.mu.Unlock()
				return running
			}
		}
		return false
	})
	b.stop()
	rest, _ := io.ReadAll(ch)
	if !strings.Contains(string(rest), "This bastion is being stopped.\r\n") {
		t.Errorf("the terminal shows %q", rest)
	}
	if got := <-ended; got != "exit-signal" {
		t.Errorf("got %q, want exit-signal", got)
	}
	if err := <-b.ended; err != nil {
		t.Error(err)
	}
}

// serveInMemory serves an agent in a synctest bubble. login logs in, and answers requests or
// not. ended waits for the end of Serve, and returns when that was after the start.
func serveInMemory(t *testing.T, idle, maxLife time.Duration) (login func(answer bool) (ssh.Conn, error), ended func() time.Duration, l *sshtest.Listener) {
	return serveInMemoryUntil(t, context.Background(), idle, maxLife, 0)
}

// serveInMemoryUntil is serveInMemory for an agent that is stopped when ctx ends.
func serveInMemoryUntil(t *testing.T, ctx context.Context, idle, maxLife, stopTimeout time.Duration) (login func(answer bool) (ssh.Conn, error), ended func() time.Duration, l *sshtest.Listener) {
	s, fleet := newServer(t)
	s.Idle, s.MaxLife, s.StopTimeout = idle, maxLife, stopTimeout
	s.Log = newLogger(io.Discard)
	l = sshtest.NewListener()
	start := time.Now()
	var at time.Duration
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(ctx, l); err != nil {
			t.Errorf("Serve: %v", err)
		}
		at = time.Since(start)
	}()
	login = func(answer bool) (ssh.Conn, error) {
		signer, err := sshca.Sign(fleet, alice(), principal, time.Now())
		if err != nil {
			return nil, err
		}
		nc, err := l.Dial()
		if err != nil {
			return nil, err
		}
		c, chans, reqs, err := ssh.NewClientConn(nc, "", &ssh.ClientConfig{
			User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(s.HostKey.PublicKey()),
		})
		if err != nil {
			return nil, err
		}
		if answer {
			go ssh.DiscardRequests(reqs)
			go func() {
				for range chans {
				}
			}()
		}
		return c, nil
	}
	ended = func() time.Duration { <-done; return at }
	return login, ended, l
}

func TestIdleUnused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, ended, _ := serveInMemory(t, 15*time.Minute, 0)
		if got := ended(); got != 15*time.Minute {
			t.Errorf("ended after %v", got)
		}
	})
}

func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		login, ended, _ := serveInMemory(t, 15*time.Minute, 0)
		time.Sleep(14 * time.Minute)
		first, err := login(true)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		second, err := login(true)
		if err != nil {
			t.Fatal(err)
		}
		first.Close()
		time.Sleep(time.Hour)
		second.Close()
		if got, want := ended(), 2*time.Hour+29*time.Minute; got != want {
			t.Errorf("ended after %v, want %v", got, want)
		}
		if _, err := login(true); err == nil {
			t.Error("logged in after Serve has returned")
		}
	})
}

// TestStopIfUnused: the agent agrees to stop only at its last connection, and then accepts no
// other and ends with that one, also without an idle time.
func TestStopIfUnused(t *testing.T) {
	for _, idle := range []time.Duration{0, time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			login, ended, _ := serveInMemory(t, idle, 0)
			mustLogin := func() ssh.Conn {
				c, err := login(true)
				if err != nil {
					t.Fatal(err)
				}
				return c
			}
			ask := func(c ssh.Conn) bool {
				agreed, _, err := c.SendRequest("stop-if-unused@sallyport", true, nil)
				if err != nil {
					t.Fatal(err)
				}
				return agreed
			}
			user, gateway := mustLogin(), mustLogin()
			if ask(gateway) {
				t.Error("the agent agrees although a user is connected")
			}
			user.Close()
			time.Sleep(time.Minute)
			if !ask(gateway) {
				t.Error("the agent does not agree although it is unused")
			}
			if _, err := login(true); err == nil {
				t.Error("logged in after the agent has agreed to stop")
			}
			time.Sleep(time.Minute)
			gateway.Close()
			if got := ended(); got != 2*time.Minute {
				t.Errorf("ended after %v", got)
			}
		})
	}
}

// TestIdleUnauthenticated opens a connection without a login. It must not stop the idle timer.
func TestIdleUnauthenticated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, ended, l := serveInMemory(t, 15*time.Minute, 0)
		time.Sleep(14*time.Minute + 50*time.Second)
		nc, err := l.Dial()
		if err != nil {
			t.Fatal(err)
		}
		if got := ended(); got != 15*time.Minute {
			t.Errorf("ended after %v", got)
		}
		io.Copy(io.Discard, nc)
		nc.Close()
	})
}

func TestMaxLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		login, ended, _ := serveInMemory(t, 15*time.Minute, 2*time.Hour)
		c, err := login(true)
		if err != nil {
			t.Fatal(err)
		}
		c.Wait()
		if got := ended(); got != 2*time.Hour {
			t.Errorf("ended after %v", got)
		}
	})
}

// TestStopTimeout stops an agent with a connection. The agent must reject logins from then on,
// and end when the connection closes or StopTimeout is nearly over.
func TestStopTimeout(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name        string
		stopTimeout time.Duration
		closes      time.Duration // when the client closes the connection; zero means never
		want        time.Duration
	}{
		{"to the end", 120 * time.Second, 0, 100 * time.Second},
		{"the client closes", 120 * time.Second, 30 * time.Second, 30 * time.Second},
		{"ECS's default", 30 * time.Second, 0, 10 * time.Second},
		{"too short", 15 * time.Second, 0, 0},
		{"none", 0, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := context.WithCancel(t.Context())
				login, ended, _ := serveInMemoryUntil(t, ctx, 15*time.Minute, 0, tt.stopTimeout)
				c, err := login(true)
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				stop()
				if tt.closes > 0 {
					time.AfterFunc(tt.closes, func() { c.Close() })
				}
				time.Sleep(time.Second)
				if _, err := login(true); err == nil {
					t.Error("logged in after the signal to stop")
				}
				if got := ended() - time.Minute; got != tt.want {
					t.Errorf("ended %v after the signal to stop, want %v", got, tt.want)
				}
			})
		})
	}
	t.Run("no connection", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			_, ended, _ := serveInMemoryUntil(t, ctx, 15*time.Minute, 0, 2*time.Minute)
			stop()
			if got := ended(); got != 0 {
				t.Errorf("ended after %v", got)
			}
		})
	})
}

// TestKeepalive has a gateway that answers no keepalives. Its connection must be closed, so
// that the bastion becomes idle.
func TestKeepalive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		login, ended, _ := serveInMemory(t, 15*time.Minute, 0)
		if _, err := login(false); err != nil {
			t.Fatal(err)
		}
		got := ended()
		if min, max := 15*time.Minute+keepaliveEvery, 15*time.Minute+(keepaliveMax+2)*keepaliveEvery; got < min || got > max {
			t.Errorf("ended after %v, want between %v and %v", got, min, max)
		}
	})
}

// TestIdleReserved fires the idle timer between a login's reserve and enter. The bastion must
// not end before the reservation is released.
func TestIdleReserved(t *testing.T) {
	t.Parallel()
	s := &Server{Idle: time.Hour, idle: time.NewTimer(time.Hour), conns: map[*conn]struct{}{}}
	stopped := false
	stop := func(error) { stopped = true }
	if !s.reserve() {
		t.Fatal("reserve failed")
	}
	s.idleExpired(stop)
	if stopped {
		t.Error("the bastion ended during a login")
	}
	s.leave(nil)
	s.idleExpired(stop)
	if !stopped || s.reserve() {
		t.Errorf("stopped is %v; or reserve succeeded after the end", stopped)
	}
}
