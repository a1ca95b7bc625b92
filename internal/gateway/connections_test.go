package gateway

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/mux"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// plainConsole is a console that accepts sessions and writes notices to them.
func plainConsole(_ context.Context, c ConsoleConn) error {
	defer c.Conn.Close()
	m := mux.New(c.Conn, 10)
	return m.Serve(func(req *mux.Request) { req.Reply(false, nil) }, func(nc *mux.NewChannel) {
		ch, err := nc.Accept(0)
		if err != nil {
			return
		}
		go func() {
			for req := range ch.Requests() {
				req.Reply(true, nil)
			}
		}()
		go func() {
			for {
				select {
				case notice := <-c.Notices:
					io.WriteString(ch, notice)
				case <-m.Done():
					return
				}
			}
		}()
	})
}

// TestConsoleLogin: user+ctl opens the console, starts no bastion, and has a limit of
// connections of its own.
func TestConsoleLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		var got ConsoleConn
		gw.srv.Console = func(ctx context.Context, c ConsoleConn) error {
			got = c
			return plainConsole(ctx, c)
		}
		gw.srv.MaxConnectionsPerUser = 1
		bastion, err := gw.connect(t.Context(), "alice", gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		defer bastion.Close()
		time.Sleep(time.Second)
		console, err := gw.connect(t.Context(), "alice+ctl", gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if id := got.Identity; id.User != "alice" || id.Key != ssh.FingerprintSHA256(gw.alice.PublicKey()) {
			t.Errorf("the console was given %+v", id)
		}
		if len(gw.dials) != 1 {
			t.Errorf("%d dials, want 1", len(gw.dials))
		}
		if c, err := gw.connect(t.Context(), "alice+ctl", gw.alice); err == nil || !strings.Contains(c.shown(), "too many connections") {
			t.Errorf("a second console: %v, %q", err, c.shown())
		}
		if _, err := gw.connect(t.Context(), "alice+ctl", gw.bob); err == nil {
			t.Error("bob has opened alice's console")
		}

		all := gw.srv.Connections()
		if len(all) != 2 || all[0].Console || !all[1].Console || all[1].ID() != got.Identity.ConnID || !strings.HasPrefix(all[0].ClientVersion, "SSH-2.0-Go") {
			t.Errorf("connections are %+v", all)
		}
		console.Close()
		synctest.Wait()
		if all := gw.srv.Connections(); len(all) != 1 {
			t.Errorf("after the end of the console there are %+v", all)
		}
	})
}

// TestForcedCommandAndConsole: a key with a forced command cannot open the console.
func TestForcedCommandAndConsole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		p := identity.AllowAll()
		p.ForceCommand = "uptime"
		gw.permit(p)
		gw.srv.Console = func(context.Context, ConsoleConn) error { t.Error("the console was opened"); return nil }
		c, err := gw.connect(t.Context(), "alice+ctl", gw.alice)
		if err == nil {
			t.Fatal("logged in")
		}
		if !strings.Contains(c.shown(), "may run one command only") || len(gw.dials) != 0 {
			t.Errorf("shown %q; %d dials", c.shown(), len(gw.dials))
		}
	})
}

// TestDisconnectWhileStarting: a session that waits for its bastion sees the reason of
// Disconnect.
func TestDisconnectWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.boot = time.Minute
		c, err := gw.connect(t.Context(), "alice", gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		session, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		var stderr strings.Builder
		session.Stderr = &stderr
		if err := session.Start("who"); err != nil {
			t.Fatal(err)
		}
		gw.srv.Disconnect("Because.", func(Connection) bool { return true })
		var exit *ssh.ExitError
		if err := session.Wait(); !errors.As(err, &exit) || exit.ExitStatus() != 255 || !strings.Contains(stderr.String(), "Because.") {
			t.Errorf("the session ended with %v, %q", err, &stderr)
		}
	})
}

// TestDisconnect: sessions with and without a terminal see the reason, and a client that
// does not read is closed.
func TestDisconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.Console = plainConsole
		var clients []*client
		for _, name := range []string{"alice", "alice+prod", "bob", "alice+ctl"} {
			key := gw.alice
			if name == "bob" {
				key = gw.bob
			}
			c, err := gw.connect(t.Context(), name, key)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			clients = append(clients, c)
			time.Sleep(time.Second)
		}
		said := make(chan string, 1)
		sess, err := clients[0].NewSession()
		if err != nil {
			t.Fatal(err)
		}
		stderr, _ := sess.StderrPipe()
		go func() {
			text, _ := io.ReadAll(stderr)
			said <- string(text)
		}()
		if err := sess.Shell(); err != nil {
			t.Fatal(err)
		}
		console, err := clients[3].NewSession()
		if err != nil {
			t.Fatal(err)
		}
		stdout, _ := console.StdoutPipe()
		if err := console.Shell(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()

		ended := gw.srv.Disconnect("Out you go.", func(c Connection) bool {
			return c.Identity.User == "alice" && c.Identity.Profile != "prod"
		})
		if len(ended) != 2 || ended[0].Identity.User != "alice" {
			t.Errorf("ended %+v", ended)
		}
		if got := <-said; got != "\r\nOut you go.\r\n" {
			t.Errorf("the session read %q", got)
		}
		if text, _ := io.ReadAll(stdout); string(text) != "Out you go." {
			t.Errorf("the console read %q", text)
		}
		var exit *ssh.ExitError
		if err := sess.Wait(); !errors.As(err, &exit) || exit.ExitStatus() != 255 {
			t.Errorf("the session ended with %v", err)
		}
		time.Sleep(disconnectGrace)
		synctest.Wait()
		var left []string
		for _, c := range gw.srv.Connections() {
			left = append(left, c.Identity.User+"+"+c.Identity.Profile)
		}
		if strings.Join(left, " ") != "alice+prod bob+default" {
			t.Errorf("remaining connections: %v", left)
		}
	})
}

// TestConsoleAndDrain: a connection to the console does not delay the end of a drain.
func TestConsoleAndDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.Drain = time.Hour
		gw.srv.Console = plainConsole
		ln := sshtest.NewListener()
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- gw.srv.Serve(ctx, ln) }()
		near, err := ln.Dial()
		if err != nil {
			t.Fatal(err)
		}
		conn, chans, reqs, err := ssh.NewClientConn(near, "gateway", &ssh.ClientConfig{
			User: "alice+ctl", Auth: []ssh.AuthMethod{ssh.PublicKeys(gw.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		})
		if err != nil {
			t.Fatal(err)
		}
		c := ssh.NewClient(conn, chans, reqs)
		began := time.Now()
		cancel()
		if err := <-served; err != nil || time.Since(began) > time.Second {
			t.Errorf("Serve returned after %v: %v", time.Since(began), err)
		}
		if err := c.Wait(); err == nil {
			t.Error("the console stays open")
		}
	})
}

// TestUnauthenticatedAndDrain: a connection without a login does not delay the end of a
// drain.
func TestUnauthenticatedAndDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.Drain = time.Hour
		ln := sshtest.NewListener()
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- gw.srv.Serve(ctx, ln) }()
		silent, err := ln.Dial()
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		began := time.Now()
		cancel()
		if err := <-served; err != nil || time.Since(began) > 2*time.Second {
			t.Errorf("Serve returned after %v: %v", time.Since(began), err)
		}
		silent.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := io.Copy(io.Discard, silent); err != nil {
			t.Errorf("the connection stays open: %v", err)
		}
	})
}

// TestWaitAndDrain: a login that waits for its bastion when the drain begins may go on for
// the drain time, and is then told why it ends.
func TestWaitAndDrain(t *testing.T) {
	for _, tt := range []struct {
		name        string
		boot, drain time.Duration
		served      bool
	}{
		{"starts in time", 8 * time.Second, time.Minute, true},
		{"does not start in time", time.Hour, 5 * time.Second, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newTestGateway(t)
				gw.boot, gw.srv.Drain = tt.boot, tt.drain
				ln := sshtest.NewListener()
				ctx, cancel := context.WithCancel(t.Context())
				served := make(chan error, 1)
				go func() { served <- gw.srv.Serve(ctx, ln) }()
				time.AfterFunc(time.Second, cancel)
				near, err := ln.Dial()
				if err != nil {
					t.Fatal(err)
				}
				told := ""
				began := time.Now()
				conn, chans, reqs, err := ssh.NewClientConn(near, "gateway", &ssh.ClientConfig{
					User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(gw.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
					BannerCallback: func(text string) error { told += text; return nil },
				})
				if !tt.served {
					if err == nil || !strings.Contains(told+err.Error(), "going down for maintenance") || time.Since(began) < tt.drain {
						t.Errorf("after %v: %v, told %q", time.Since(began), err, told)
					}
					near.Close()
				} else if err != nil {
					t.Fatalf("after %v: %v, told %q", time.Since(began), err, told)
				} else {
					c := ssh.NewClient(conn, chans, reqs)
					s, err := c.NewSession()
					if err != nil {
						t.Fatal(err)
					}
					if out, err := s.Output("whoami"); err != nil || !strings.Contains(string(out), "alice") {
						t.Errorf("a session during the drain: %q, %v", out, err)
					}
					c.Close()
				}
				if err := <-served; err != nil {
					t.Error(err)
				}
			})
		})
	}
}
