package gateway

import (
	"context"
	"crypto/ed25519"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

func TestLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		c, err := gw.connect(t.Context(), "alice+prod", sshtest.NewKey(t), gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if out, err := c.run("who"); out != "I am alice" || err != nil {
			t.Errorf("run = %q, %v", out, err)
		}
		if c.shown() != "" {
			t.Errorf("banner %q, although no bastion had to start", c.shown())
		}
		id := gw.dials[0]
		if id.User != "alice" || id.Profile != "prod" || id.Key != ssh.FingerprintSHA256(gw.alice.PublicKey()) || id.ConnID == "" {
			t.Errorf("identity is %+v", id)
		}
	})
}

// TestBootTimes checks the progress that a user sees while the bastion starts.
func TestBootTimes(t *testing.T) {
	tests := []struct {
		boot    time.Duration
		version string // of the client
		shown   string
		login   time.Duration // until the end of authentication
	}{
		{3 * time.Second, "", "Starting your bastion \r\n", 3 * time.Second},
		{9 * time.Second, "", "Starting your bastion ..\r\n", 9 * time.Second},
		// Authentication ends after 10 s; the session waits for the rest.
		{time.Minute, "", "Starting your bastion ..\r\n", 10 * time.Second},
		{59 * time.Second, "SSH-2.0-phpseclib_3.0 (openssl)", "Starting your bastion " + strings.Repeat(".", 14) + "\r\n", 59 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.boot.String()+tt.version, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newTestGateway(t)
				gw.boot, gw.clientVersion = tt.boot, tt.version
				began := time.Now()
				c, err := gw.connect(t.Context(), "alice", gw.alice)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if got := time.Since(began); got != tt.login {
					t.Errorf("logged in after %v, want %v", got, tt.login)
				}
				if got := c.shown(); got != tt.shown {
					t.Errorf("shown %q, want %q", got, tt.shown)
				}
				if out, err := c.run("who"); out != "I am alice" || err != nil {
					t.Errorf("run = %q, %v\n%s", out, err, gw.log.String())
				}
				if got := time.Since(began); got != tt.boot {
					t.Errorf("command ran after %v, want %v", got, tt.boot)
				}
			})
		})
	}
}

// TestNoBastion: in each phase of the login, the user sees the message and its reference,
// and only the operator sees the error.
func TestNoBastion(t *testing.T) {
	secret := errors.New("arn:aws:iam::123456789012:role/x")
	t.Run("in authentication", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			gw := newTestGateway(t)
			gw.boot, gw.fail = 5*time.Second, secret
			c, err := gw.connect(t.Context(), "alice", gw.alice)
			if err == nil {
				t.Fatal("logged in")
			}
			if strings.Contains(err.Error(), "unable to authenticate") {
				t.Errorf("the client reports a refused key: %v", err)
			}
			if got := c.shown(); !strings.Contains(got, "could not be started") || strings.Contains(got, "arn:") {
				t.Errorf("shown %q", got)
			}
			synctest.Wait()
			ref := gw.dials[0].ConnID
			if !strings.Contains(c.shown(), ref) || !strings.Contains(gw.log.String(), "conn="+ref) || !strings.Contains(gw.log.String(), secret.Error()) {
				t.Errorf("reference %s is not in %q or not beside the cause in\n%s", ref, c.shown(), gw.log.String())
			}
		})
	})
	t.Run("after login", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			gw := newTestGateway(t)
			gw.boot, gw.fail = time.Minute, bastion.ErrTimeout
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
			var exit *ssh.ExitError
			if err := session.Run("who"); !errors.As(err, &exit) || exit.ExitStatus() != 255 || !strings.Contains(stderr.String(), "did not start in time") {
				t.Errorf("session: %v, %q", err, &stderr)
			}
			if err := c.Wait(); err == nil {
				t.Error("the connection stays open")
			}
		})
	})
}

// TestProofOfKey: only a key that is proven, for the user name in the same request, logs
// in. An offered key has no influence (the mistake of CVE-2024-45337).
func TestProofOfKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		// Bob's client offers Alice's public key without the private key.
		stolen := &publicOnly{gw.alice.PublicKey()}
		if _, err := gw.connect(t.Context(), "alice", stolen); err == nil {
			t.Error("logged in with a key that was only offered")
		}
		// It offers her key and proves his own.
		if c, err := gw.connect(t.Context(), "alice", &publicOnly{gw.alice.PublicKey()}, gw.bob); err == nil {
			c.Close()
			t.Error("logged in as alice by bob's key")
		}
		synctest.Wait()
		if len(gw.dials) != 0 {
			t.Errorf("bastions were dialed for %+v", gw.dials)
		}
		// A key that was offered before is not in the identity.
		c, err := gw.connect(t.Context(), "bob", gw.alice, gw.bob)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if id := gw.dials[0]; id.User != "bob" || id.Key != ssh.FingerprintSHA256(gw.bob.PublicKey()) {
			t.Errorf("identity is %+v", id)
		}
	})
}

// publicOnly is a public key that makes wrong signatures.
type publicOnly struct{ key ssh.PublicKey }

func (p *publicOnly) PublicKey() ssh.PublicKey { return p.key }

func (p *publicOnly) Sign(io.Reader, []byte) (*ssh.Signature, error) {
	return &ssh.Signature{Format: p.key.Type(), Blob: make([]byte, ed25519.SignatureSize)}, nil
}

// TestLoginWithoutKey: the method none does not log in.
func TestLoginWithoutKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		if _, err := gw.connect(t.Context(), "alice"); err == nil {
			t.Error("logged in without a key")
		}
	})
}

func TestLoginGraceTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.LoginGraceTime = 10 * time.Second
		near, far := sshtest.Pipe()
		go io.Copy(io.Discard, near)
		began := time.Now()
		gw.srv.ServeConn(t.Context(), far)
		// Close may take another second to send.
		if got := time.Since(began); got < 10*time.Second || got > 12*time.Second {
			t.Errorf("a silent client was closed after %v", got)
		}

		// The grace time ends when the key is proven; the start of a bastion does
		// not count.
		gw.boot = 20 * time.Second
		c, err := gw.connect(t.Context(), "alice", gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	})
}

func TestMaxConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.MaxConnectionsPerUser = 2
		var open []*client
		for range 2 {
			c, err := gw.connect(t.Context(), "alice", gw.alice)
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, c)
		}
		if c, err := gw.connect(t.Context(), "alice", gw.alice); err == nil || !strings.Contains(c.shown(), "too many connections") {
			t.Errorf("third connection: %v, shown %q", err, c.shown())
		}
		if c, err := gw.connect(t.Context(), "bob", gw.bob); err != nil {
			t.Errorf("alice's connections count for bob: %v", err)
		} else {
			c.Close()
		}
		open[0].Close()
		synctest.Wait()
		c, err := gw.connect(t.Context(), "alice", gw.alice)
		if err != nil {
			t.Fatalf("after one has ended: %v", err)
		}
		c.Close()
		open[1].Close()
	})
}

// TestDrain: terminals see a notice, connections may go on for the drain time, and then
// Serve returns.
func TestDrain(t *testing.T) {
	gw := newTestGateway(t)
	gw.srv.Drain = 300 * time.Millisecond
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- gw.srv.Serve(ctx, ln) }()
	c, err := ssh.Dial("tcp", ln.Addr().String(), &ssh.ClientConfig{
		User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(gw.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := s.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	cancel()
	told, _ := io.ReadAll(stderr)
	if !strings.Contains(string(told), "going down for maintenance; this connection ends in") {
		t.Errorf("the terminal was told %q", told)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("still accepting: %v", err)
	}
}

// TestDrainDelay: after the end of Serve's context, logins succeed until DrainDelay is over
// or the listener is closed.
func TestDrainDelay(t *testing.T) {
	for _, closes := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			gw := newTestGateway(t)
			gw.srv.DrainDelay, gw.srv.Drain = 20*time.Second, time.Hour
			if got := gw.srv.DrainTime(); got != time.Hour+20*time.Second {
				t.Errorf("the time of the drain is %v", got)
			}
			ln := sshtest.NewListener()
			ctx, cancel := context.WithCancel(t.Context())
			served := make(chan error, 1)
			go func() { served <- gw.srv.Serve(ctx, ln) }()
			cancel()
			time.Sleep(19 * time.Second)
			client, err := ln.Dial()
			if err != nil {
				t.Fatalf("a connection within the delay: %v", err)
			}
			conn, chans, reqs, err := ssh.NewClientConn(client, "gateway", &ssh.ClientConfig{
				User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(gw.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
			})
			if err != nil {
				t.Fatalf("a login within the delay: %v", err)
			}
			c := ssh.NewClient(conn, chans, reqs)
			if closes {
				ln.Close()
			} else {
				time.Sleep(2 * time.Second)
			}
			synctest.Wait()
			if _, err := ln.Dial(); err == nil {
				t.Error("a connection after the delay is accepted")
			}
			time.Sleep(time.Minute)
			select {
			case err := <-served:
				t.Fatalf("Serve returned (%v) while a user was connected", err)
			default:
			}
			c.Close()
			if err := <-served; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
}

// TestHandOver: when another process accepts from the same socket, no login fails: neither
// one that has not begun, nor one that waits for its bastion. A stranger delays the end for
// LoginGraceTime at most.
func TestHandOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.boot = 5 * time.Second
		gw.srv.Drain, gw.srv.LoginGraceTime, gw.srv.DrainDelay = time.Hour, 30*time.Second, time.Hour
		ln := sshtest.NewListener()
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- gw.srv.Serve(ctx, ln) }()
		login := func(nc net.Conn) error {
			conn, chans, reqs, err := ssh.NewClientConn(nc, "gateway", &ssh.ClientConfig{
				User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(gw.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
			})
			if err != nil {
				return err
			}
			c := &client{Client: ssh.NewClient(conn, chans, reqs)}
			defer c.Close()
			_, err = c.run("who")
			return err
		}
		var conns [3]net.Conn
		for i := range conns {
			var err error
			if conns[i], err = ln.Dial(); err != nil {
				t.Fatal(err)
			}
		}
		waiting := make(chan error, 1)
		go func() { waiting <- login(conns[0]) }()
		time.Sleep(time.Second)

		gw.srv.HandOver()
		cancel()
		ln.Close()
		synctest.Wait()
		if err := login(conns[1]); err != nil {
			t.Errorf("a login after the hand-over, on a connection from before: %v", err)
		}
		if err := <-waiting; err != nil {
			t.Errorf("a login that waited for its bastion: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := io.ReadAll(conns[2]); err != nil {
			t.Errorf("the silent connection: %v", err)
		}
	})
}

// A hangingListener has no connections. While hangs is set, it ignores its deadline.
type hangingListener struct {
	net.Listener
	hangs    atomic.Bool
	deadline time.Time
	closed   chan struct{}
}

func (l *hangingListener) SetDeadline(t time.Time) error { l.deadline = t; return nil }

func (l *hangingListener) Accept() (net.Conn, error) {
	var passed <-chan time.Time
	if !l.hangs.Load() {
		passed = time.After(time.Until(l.deadline))
	}
	select {
	case <-passed:
		return nil, os.ErrDeadlineExceeded
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *hangingListener) Close() error { close(l.closed); return nil }

// TestAcceptStuck: an accept loop without connections is not stuck, and one that does not
// return from Accept is.
func TestAcceptStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		if gw.srv.AcceptStuck() {
			t.Error("stuck before Serve")
		}
		ln := &hangingListener{closed: make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- gw.srv.Serve(ctx, ln) }()
		time.Sleep(time.Hour)
		if gw.srv.AcceptStuck() {
			t.Error("a loop without connections is stuck")
		}
		ln.hangs.Store(true)
		time.Sleep(2 * stuckAfter)
		if !gw.srv.AcceptStuck() {
			t.Error("a loop that hangs is not stuck")
		}
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if gw.srv.AcceptStuck() {
			t.Error("stuck after the end of Serve")
		}
	})
}

// TestPanic: a panic ends only its own connection.
func TestPanic(t *testing.T) {
	gw := newTestGateway(t)
	dial := gw.srv.Dial
	gw.srv.Dial = func(ctx context.Context, id identity.Identity, notify func(bool)) (*bastion.Conn, error) {
		if id.User == "alice" {
			panic("boom")
		}
		return dial(ctx, id, notify)
	}
	if _, err := gw.connect(t.Context(), "alice", gw.alice); err == nil {
		t.Error("alice logged in")
	}
	c, err := gw.connect(t.Context(), "bob", gw.bob)
	if err != nil {
		t.Fatalf("bob: %v", err)
	}
	defer c.Close()
	if out, err := c.run("who"); err != nil {
		t.Errorf("bob: %q, %v", out, err)
	}
}

// TestPanicInOtherGoroutines: a panic in another goroutine that works for a connection
// ends only that connection.
func TestPanicInOtherGoroutines(t *testing.T) {
	for _, in := range []string{"recheck", "disconnect"} {
		t.Run(in, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newTestGateway(t)
				gw.srv.Recheck = func(user string, _ ssh.PublicKey, _ netip.Addr, _ time.Time, g auth.Grant) (auth.Grant, error) {
					if in == "recheck" && user == "alice" {
						panic("boom")
					}
					return g, nil
				}
				if in == "disconnect" {
					gw.srv.Log = slog.New(&bomb{Handler: gw.srv.Log.Handler(), message: "disconnecting"})
				}
				ctx, cancel := context.WithCancel(t.Context())
				var loop sync.WaitGroup
				loop.Go(func() { gw.srv.recheckLogins(ctx) })
				defer loop.Wait()
				defer cancel()

				alice, err := gw.connect(t.Context(), "alice", gw.alice)
				if err != nil {
					t.Fatal(err)
				}
				defer alice.Close()
				bob, err := gw.connect(t.Context(), "bob", gw.bob)
				if err != nil {
					t.Fatal(err)
				}
				defer bob.Close()
				if in == "disconnect" {
					gw.srv.Disconnect("Goodbye.", func(c Connection) bool { return c.Identity.User == "alice" })
				}
				time.Sleep(time.Minute)
				if all := gw.srv.Connections(); len(all) != 1 || all[0].Identity.User != "bob" {
					t.Errorf("connections: %v", all)
				}
				if out, err := bob.run("who"); err != nil {
					t.Errorf("bob: %q, %v", out, err)
				}
				if !strings.Contains(gw.logged(), "boom") {
					t.Errorf("the log:\n%s", gw.logged())
				}
			})
		})
	}
}

// A bomb is a log handler that panics once, at a given message.
type bomb struct {
	slog.Handler
	message string
	once    sync.Once
}

func (b *bomb) Handle(ctx context.Context, r slog.Record) error {
	if r.Message == b.message {
		b.once.Do(func() { panic("boom") })
	}
	return b.Handler.Handle(ctx, r)
}

func (b *bomb) WithAttrs([]slog.Attr) slog.Handler { return b }
