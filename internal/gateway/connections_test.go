package gateway

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// plainConsole accepts sessions and prints notices on them.
func plainConsole(_ context.Context, c ConsoleConn) {
	go ssh.DiscardRequests(c.Reqs)
	for nc := range c.Chans {
		ch, reqs, err := nc.Accept()
		if err != nil {
			continue
		}
		go func() {
			for {
				select {
				case notice := <-c.Notices:
					io.WriteString(ch, notice)
				case req, ok := <-reqs:
					if !ok {
						return
					}
					req.Reply(true, nil)
				}
			}
		}()
	}
}

// TestConsoleLogin: user+ctl is her console, starts nothing, and counts apart.
func TestConsoleLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var got ConsoleConn
		w.srv.Console = func(ctx context.Context, c ConsoleConn) {
			got = c
			plainConsole(ctx, c)
		}
		w.srv.MaxConnections = 1
		bastion, err := w.connect(t.Context(), "alice", w.alice)
		if err != nil {
			t.Fatal(err)
		}
		defer bastion.Close()
		time.Sleep(time.Second)
		console, err := w.connect(t.Context(), "alice+ctl", w.alice)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if id := got.Identity; id.User != "alice" || id.Key != ssh.FingerprintSHA256(w.alice.PublicKey()) || got.User() != "alice+ctl" {
			t.Errorf("the console was given %+v", id)
		}
		if len(w.dials) != 1 {
			t.Errorf("%d bastions were asked for", len(w.dials))
		}
		if c, err := w.connect(t.Context(), "alice+ctl", w.alice); err == nil || !strings.Contains(c.shown(), "too many connections") {
			t.Errorf("a second console: %v, %q", err, c.shown())
		}
		if _, err := w.connect(t.Context(), "alice+ctl", w.bob); err == nil {
			t.Error("bob is in alice's console")
		}

		all := w.srv.Connections()
		if len(all) != 2 || all[0].Console || !all[1].Console || all[1].ID() != got.Identity.ConnID || !strings.HasPrefix(all[0].ClientVersion, "SSH-2.0-Go") {
			t.Errorf("connections are %+v", all)
		}
		console.Close()
		synctest.Wait()
		if all := w.srv.Connections(); len(all) != 1 {
			t.Errorf("after the end of the console there are %+v", all)
		}
	})
}

// TestForcedCommandAndConsole: a key that may run one command only does not open
// the console.
func TestForcedCommandAndConsole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		p := identity.AllowAll()
		p.ForceCommand = "uptime"
		w.forced(p)
		w.srv.Console = func(context.Context, ConsoleConn) { t.Error("the console was opened") }
		c, err := w.connect(t.Context(), "alice+ctl", w.alice)
		if err == nil {
			t.Fatal("logged in")
		}
		if !strings.Contains(c.shown(), "may run one command only") || len(w.dials) != 0 {
			t.Errorf("shown %q; %d dials", c.shown(), len(w.dials))
		}
	})
}

// TestDisconnect: sessions with and without a terminal are told why, and a
// client that reads nothing is cut off.
func TestDisconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.srv.Console = plainConsole
		var clients []*client
		for _, name := range []string{"alice", "alice+prod", "bob", "alice+ctl"} {
			key := w.alice
			if name == "bob" {
				key = w.bob
			}
			c, err := w.connect(t.Context(), name, key)
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

		ended := w.srv.Disconnect("Out you go.", func(c Connection) bool {
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
		if err := sess.Wait(); err == nil || errors.As(err, &exit) {
			t.Errorf("the session ended with %v", err)
		}
		time.Sleep(disconnectGrace)
		synctest.Wait()
		var left []string
		for _, c := range w.srv.Connections() {
			left = append(left, c.Identity.User+"+"+c.Identity.Profile)
		}
		if strings.Join(left, " ") != "alice+prod bob+default" {
			t.Errorf("left are %v", left)
		}
	})
}

// TestConsoleAndDrain: who only watches does not hold up the end of the gateway.
func TestConsoleAndDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.srv.Drain = time.Hour
		w.srv.Console = plainConsole
		ln := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- w.srv.Serve(ctx, ln) }()
		near, far := sshtest.Pipe()
		ln.conns <- far
		conn, chans, reqs, err := ssh.NewClientConn(near, "gateway", &ssh.ClientConfig{
			User: "alice+ctl", Auth: []ssh.AuthMethod{ssh.PublicKeys(w.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		})
		if err != nil {
			t.Fatal(err)
		}
		c := ssh.NewClient(conn, chans, reqs)
		began := time.Now()
		cancel()
		if err := <-served; err != nil || time.Since(began) > time.Second {
			t.Errorf("served until %v after: %v", time.Since(began), err)
		}
		if err := c.Wait(); err == nil {
			t.Error("the console stays open")
		}
	})
}

// TestStrangerAndDrain wants whoever has not proven who she is to hold up nobody.
func TestStrangerAndDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.srv.Drain = time.Hour
		ln := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- w.srv.Serve(ctx, ln) }()
		silent, far := sshtest.Pipe()
		ln.conns <- far
		synctest.Wait()
		began := time.Now()
		cancel()
		if err := <-served; err != nil || time.Since(began) > 2*time.Second {
			t.Errorf("served until %v after: %v", time.Since(began), err)
		}
		silent.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := io.Copy(io.Discard, silent); err != nil {
			t.Errorf("the stranger's connection stays open: %v", err)
		}
	})
}

// forced gives every login these permissions.
func (w *world) forced(p identity.Permissions) {
	authorize := w.srv.Authorize
	w.srv.Authorize = func(user string, key ssh.PublicKey, from netip.Addr, now time.Time) (auth.Grant, error) {
		g, err := authorize(user, key, from, now)
		g.Permissions = p
		return g, err
	}
}

// A pipeListener accepts the far ends of pipes.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { close(l.closed); return nil }
func (l *pipeListener) Addr() net.Addr { return nil }
