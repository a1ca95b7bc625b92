package gateway

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
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

func newKey(t testing.TB) ssh.Signer {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromSigner(priv)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A world is a gateway in memory, its users, and their one bastion.
type world struct {
	t     testing.TB
	srv   *Server
	alice ssh.Signer
	bob   ssh.Signer

	// boot is how long a bastion takes; fail is what becomes of it.
	boot time.Duration
	fail error

	mu    sync.Mutex
	dials []identity.Identity
	log   strings.Builder
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, alice: newKey(t), bob: newKey(t)}
	users := map[string]ssh.Signer{"alice": w.alice, "bob": w.bob}
	w.srv = &Server{
		HostKeys: []ssh.Signer{newKey(t)},
		Authorize: func(user string, key ssh.PublicKey, _ netip.Addr, _ time.Time) (auth.Grant, error) {
			if k := users[user]; k != nil && string(k.PublicKey().Marshal()) == string(key.Marshal()) {
				return auth.Grant{Permissions: identity.AllowAll()}, nil
			}
			return auth.Grant{}, errors.New("not a key of this user")
		},
		Dial: w.dial,
		Log:  slog.New(slog.NewTextHandler(lockedWriter{w}, nil)),
	}
	return w
}

type lockedWriter struct{ w *world }

func (l lockedWriter) Write(p []byte) (int, error) {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	return l.w.log.Write(p)
}

// dial is a bastion that answers every exec with who is logged in.
func (w *world) dial(ctx context.Context, id identity.Identity, notify func(bool)) (*bastion.Conn, error) {
	w.mu.Lock()
	w.dials = append(w.dials, id)
	w.mu.Unlock()
	if w.boot > 0 {
		notify(true)
		select {
		case <-time.After(w.boot):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if w.fail != nil {
		return nil, w.fail
	}
	near, far := sshtest.Pipe()
	go serveBastion(far, id.User)
	conn, chans, reqs, err := ssh.NewClientConn(near, "bastion", &ssh.ClientConfig{HostKeyCallback: ssh.InsecureIgnoreHostKey()})
	if err != nil {
		return nil, err
	}
	return &bastion.Conn{Conn: conn, Chans: chans, Reqs: reqs}, nil
}

var bastionHostKey = sync.OnceValue(func() ssh.Signer {
	_, priv, _ := ed25519.GenerateKey(rand.Reader)
	s, _ := ssh.NewSignerFromSigner(priv)
	return s
})

func serveBastion(nc net.Conn, user string) {
	cfg := &ssh.ServerConfig{NoClientAuth: true}
	cfg.AddHostKey(bastionHostKey())
	conn, chans, reqs, err := ssh.NewServerConn(nc, cfg)
	if err != nil {
		return
	}
	defer conn.Close()
	go ssh.DiscardRequests(reqs)
	for nc := range chans {
		ch, reqs, err := nc.Accept()
		if err != nil {
			continue
		}
		go func() {
			for req := range reqs {
				req.Reply(req.Type == "exec" || req.Type == "pty-req" || req.Type == "shell", nil)
				switch req.Type {
				case "exec":
					fmt.Fprintf(ch, "I am %s", user)
					ch.SendRequest("exit-status", false, []byte{0, 0, 0, 0})
					ch.Close()
				}
			}
		}()
	}
}

// A client is one who connects; banners gathers what she is shown meanwhile.
type client struct {
	*ssh.Client
	mu      sync.Mutex
	banners strings.Builder
}

func (c *client) shown() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.banners.String()
}

func (w *world) connect(ctx context.Context, user string, keys ...ssh.Signer) (*client, error) {
	near, far := sshtest.Pipe()
	go w.srv.ServeConn(ctx, far)
	c := &client{}
	conn, chans, reqs, err := ssh.NewClientConn(near, "gateway", &ssh.ClientConfig{
		User:            user,
		Auth:            []ssh.AuthMethod{ssh.PublicKeys(keys...)},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		BannerCallback: func(message string) error {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.banners.WriteString(message)
			return nil
		},
	})
	if err != nil {
		near.Close()
		return c, err
	}
	c.Client = ssh.NewClient(conn, chans, reqs)
	return c, nil
}

func (c *client) run(cmd string) (string, error) {
	s, err := c.NewSession()
	if err != nil {
		return "", err
	}
	defer s.Close()
	out, err := s.Output(cmd)
	return string(out), err
}

func TestLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c, err := w.connect(t.Context(), "alice+prod", newKey(t), w.alice)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if out, err := c.run("who"); out != "I am alice" || err != nil {
			t.Errorf("run = %q, %v", out, err)
		}
		if c.shown() != "" {
			t.Errorf("shown %q although the bastion was there", c.shown())
		}
		id := w.dials[0]
		if id.User != "alice" || id.Profile != "prod" || id.Key != ssh.FingerprintSHA256(w.alice.PublicKey()) || id.ConnID == "" {
			t.Errorf("identity is %+v", id)
		}
	})
}

// TestBootTimes follows what a user sees while her bastion starts.
func TestBootTimes(t *testing.T) {
	tests := []struct {
		boot  time.Duration
		shown string
		login time.Duration // when authentication is over
	}{
		{3 * time.Second, "Starting your bastion \r\n", 3 * time.Second},
		{17 * time.Second, "Starting your bastion ....\r\n", 17 * time.Second},
		// A client must not be kept in authentication for longer than this;
		// the rest of the wait is in the opening of the session.
		{time.Minute, "Starting your bastion ......\r\n", 25 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.boot.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.boot = tt.boot
				began := time.Now()
				c, err := w.connect(t.Context(), "alice", w.alice)
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
					t.Errorf("run = %q, %v\n%s", out, err, w.log.String())
				}
				if got := time.Since(began); got != tt.boot {
					t.Errorf("command ran after %v, want %v", got, tt.boot)
				}
			})
		})
	}
}

// TestNoBastion wants the reason to reach the user, in each phase, and the
// error to reach only the operator.
func TestNoBastion(t *testing.T) {
	secret := errors.New("arn:aws:iam::123456789012:role/x")
	t.Run("in authentication", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.boot, w.fail = 5*time.Second, secret
			c, err := w.connect(t.Context(), "alice", w.alice)
			if err == nil {
				t.Fatal("logged in")
			}
			if strings.Contains(err.Error(), "unable to authenticate") {
				t.Errorf("the client takes it for a refused key: %v", err)
			}
			if got := c.shown(); !strings.Contains(got, "could not be started") || strings.Contains(got, "arn:") {
				t.Errorf("shown %q", got)
			}
			synctest.Wait()
			ref := w.dials[0].ConnID
			if !strings.Contains(c.shown(), ref) || !strings.Contains(w.log.String(), "conn="+ref) || !strings.Contains(w.log.String(), secret.Error()) {
				t.Errorf("reference %s does not lead from %q to the cause in\n%s", ref, c.shown(), w.log.String())
			}
		})
	})
	t.Run("after login", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.boot, w.fail = time.Minute, bastion.ErrTimeout
			c, err := w.connect(t.Context(), "alice", w.alice)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var refused *ssh.OpenChannelError
			if _, err := c.run("who"); !errors.As(err, &refused) || !strings.Contains(refused.Message, "did not start in time") {
				t.Errorf("session: %v", err)
			}
			if err := c.Wait(); err == nil {
				t.Error("the connection stays open")
			}
		})
	})
}

// TestProofOfKey is about keys that are offered and not proven, and about user
// names that change between the two (the mistake behind CVE-2024-45337).
func TestProofOfKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		// Bob's client offers Alice's public key, which it cannot sign with.
		stolen := &publicOnly{w.alice.PublicKey()}
		if _, err := w.connect(t.Context(), "alice", stolen); err == nil {
			t.Error("logged in with a key that was only offered")
		}
		// He offers hers and proves his own.
		if c, err := w.connect(t.Context(), "alice", &publicOnly{w.alice.PublicKey()}, w.bob); err == nil {
			c.Close()
			t.Error("logged in as alice by bob's key")
		}
		synctest.Wait()
		if len(w.dials) != 0 {
			t.Errorf("something was spent on %+v", w.dials)
		}
		// What was offered before does not colour the identity.
		c, err := w.connect(t.Context(), "bob", w.alice, w.bob)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if id := w.dials[0]; id.User != "bob" || id.Key != ssh.FingerprintSHA256(w.bob.PublicKey()) {
			t.Errorf("identity is %+v", id)
		}
	})
}

// publicOnly is the half of a key that everybody may have.
type publicOnly struct{ key ssh.PublicKey }

func (p *publicOnly) PublicKey() ssh.PublicKey { return p.key }
func (p *publicOnly) Sign(io.Reader, []byte) (*ssh.Signature, error) {
	return &ssh.Signature{Format: p.key.Type(), Blob: make([]byte, ed25519.SignatureSize)}, nil
}

// TestRefusesNone wants nobody in without a credential.
func TestRefusesNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		if _, err := w.connect(t.Context(), "alice"); err == nil {
			t.Error("logged in without a key")
		}
	})
}

func TestLoginGraceTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.srv.LoginGraceTime = 10 * time.Second
		near, far := sshtest.Pipe()
		go io.Copy(io.Discard, near)
		began := time.Now()
		w.srv.ServeConn(t.Context(), far)
		// Close may take a second more, for what is unsent.
		if got := time.Since(began); got < 10*time.Second || got > 12*time.Second {
			t.Errorf("a silent client was cut off after %v", got)
		}

		// The grace ends with the proof: a slow bastion is not the client's fault.
		w.boot = 20 * time.Second
		c, err := w.connect(t.Context(), "alice", w.alice)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	})
}

func TestMaxConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.srv.MaxConnections = 2
		var open []*client
		for range 2 {
			c, err := w.connect(t.Context(), "alice", w.alice)
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, c)
		}
		if c, err := w.connect(t.Context(), "alice", w.alice); err == nil || !strings.Contains(c.shown(), "too many connections") {
			t.Errorf("third connection: %v, shown %q", err, c.shown())
		}
		if c, err := w.connect(t.Context(), "bob", w.bob); err != nil {
			t.Errorf("bob is kept out by alice: %v", err)
		} else {
			c.Close()
		}
		open[0].Close()
		synctest.Wait()
		c, err := w.connect(t.Context(), "alice", w.alice)
		if err != nil {
			t.Fatalf("after one has left: %v", err)
		}
		c.Close()
		open[1].Close()
	})
}

// TestKeepalive wants a client that is there no more to be noticed, and one that
// is merely silent to be left alone.
func TestKeepalive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.srv.ClientAliveInterval, w.srv.ClientAliveCountMax = 10*time.Second, 3
		silent, err := w.connect(t.Context(), "bob", w.bob)
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()

		near, far := sshtest.Pipe()
		gone := make(chan struct{})
		go func() { w.srv.ServeConn(t.Context(), far); close(gone) }()
		cable := &cable{Conn: near}
		conn, _, reqs, err := ssh.NewClientConn(cable, "gateway", &ssh.ClientConfig{
			User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(w.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		go ssh.DiscardRequests(reqs)
		time.Sleep(5 * time.Minute)
		select {
		case <-gone:
			t.Fatal("a connection was ended that answers its keepalives")
		default:
		}
		cable.pull()
		pulled := time.Now()
		<-gone
		if got := time.Since(pulled); got > 45*time.Second {
			t.Errorf("noticed after %v", got)
		}
		if out, err := silent.run("who"); err != nil {
			t.Errorf("bob: %q, %v", out, err)
		}
	})
}

// TestKeepaliveTogether wants clients to be asked about once per interval, and at
// the same moments if they came at almost the same.
func TestKeepaliveTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.srv.ClientAliveInterval = 15 * time.Second
		began := time.Now().Truncate(time.Second).Add(time.Second)
		time.Sleep(time.Until(began) - 200*time.Millisecond)
		var asked [2][]time.Time
		for i := range asked {
			near, far := sshtest.Pipe()
			go w.srv.ServeConn(t.Context(), far)
			conn, _, reqs, err := ssh.NewClientConn(near, "gateway", &ssh.ClientConfig{
				User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(w.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
			})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			go func() {
				for req := range reqs {
					asked[i] = append(asked[i], time.Now())
					req.Reply(false, nil)
				}
			}()
			time.Sleep(300 * time.Millisecond)
		}
		time.Sleep(5*time.Minute + 5*time.Second)
		synctest.Wait()
		if len(asked[0]) != 20 || !slices.Equal(asked[0], asked[1]) {
			t.Errorf("asked at %v\nand at %v", asked[0], asked[1])
		}
	})
}

// TestKeepaliveSlowLink wants a client to be left alone that sends, although its
// answers do not come: on a slow link they are behind everything else.
func TestKeepaliveSlowLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		near, far := sshtest.Pipe()
		gone := make(chan struct{})
		go func() { w.srv.ServeConn(t.Context(), far); close(gone) }()
		conn, chans, reqs, err := ssh.NewClientConn(near, "gateway", &ssh.ClientConfig{
			User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(w.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		})
		if err != nil {
			t.Fatal(err)
		}
		for range 60 { // and nobody reads reqs
			time.Sleep(20 * time.Second)
			if _, _, err := conn.SendRequest("data@example.com", false, nil); err != nil {
				t.Fatalf("sending: %v", err)
			}
		}
		silent := time.Now()
		<-gone
		if got := time.Since(silent); got < time.Minute || got > 3*time.Minute {
			t.Errorf("ended %v after the last sign of life", got)
		}
		conn.Close()
		go ssh.DiscardRequests(reqs)
		for range chans {
		}
	})
}

// A cable passes nothing once it is pulled, and says nothing of that.
type cable struct {
	net.Conn
	mu     sync.Mutex
	pulled bool
}

func (c *cable) pull() { c.mu.Lock(); c.pulled = true; c.mu.Unlock() }
func (c *cable) Write(p []byte) (int, error) {
	c.mu.Lock()
	pulled := c.pulled
	c.mu.Unlock()
	if pulled {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

// TestDrain wants terminals to be told, sessions to get their time, and Serve to
// return with nothing left behind.
func TestDrain(t *testing.T) {
	w := newWorld(t)
	w.srv.Drain = 300 * time.Millisecond
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- w.srv.Serve(ctx, ln) }()
	c, err := ssh.Dial("tcp", ln.Addr().String(), &ssh.ClientConfig{
		User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(w.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
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
	if _, err := net.Dial("tcp", ln.Addr().String()); err == nil {
		t.Error("still accepting")
	}
}

// TestPanic wants a panic to end one connection only.
func TestPanic(t *testing.T) {
	w := newWorld(t)
	dial := w.srv.Dial
	w.srv.Dial = func(ctx context.Context, id identity.Identity, notify func(bool)) (*bastion.Conn, error) {
		if id.User == "alice" {
			panic("boom")
		}
		return dial(ctx, id, notify)
	}
	if _, err := w.connect(t.Context(), "alice", w.alice); err == nil {
		t.Error("alice logged in")
	}
	c, err := w.connect(t.Context(), "bob", w.bob)
	if err != nil {
		t.Fatalf("bob: %v", err)
	}
	defer c.Close()
	if out, err := c.run("who"); err != nil {
		t.Errorf("bob: %q, %v", out, err)
	}
}

// TestPanicBeside wants one in what is done beside a connection, for it, to end
// no other either.
func TestPanicBeside(t *testing.T) {
	for _, in := range []string{"recheck", "keepalive", "disconnect"} {
		t.Run(in, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.srv.Recheck = func(user string, _ ssh.PublicKey, _ netip.Addr, _ time.Time, g auth.Grant) (auth.Grant, error) {
					if in == "recheck" && user == "alice" {
						panic("boom")
					}
					return g, nil
				}
				w.srv.Dial = func(ctx context.Context, id identity.Identity, notify func(bool)) (*bastion.Conn, error) {
					b, err := w.dial(ctx, id, notify)
					if err == nil && id.User == "alice" {
						b.Conn = &bomb{Conn: b.Conn, in: in}
					}
					return b, err
				}
				ctx, cancel := context.WithCancel(t.Context())
				var loop sync.WaitGroup
				loop.Go(func() { w.srv.recheckLogins(ctx) })
				defer loop.Wait()
				defer cancel()

				alice, err := w.connect(t.Context(), "alice", w.alice)
				if err != nil {
					t.Fatal(err)
				}
				defer alice.Close()
				bob, err := w.connect(t.Context(), "bob", w.bob)
				if err != nil {
					t.Fatal(err)
				}
				defer bob.Close()
				if in == "disconnect" {
					w.srv.Disconnect("Goodbye.", func(c Connection) bool { return c.Identity.User == "alice" })
				}
				time.Sleep(time.Minute)
				if all := w.srv.Connections(); len(all) != 1 || all[0].Identity.User != "bob" {
					t.Errorf("connections: %v", all)
				}
				if out, err := bob.run("who"); err != nil {
					t.Errorf("bob: %q, %v", out, err)
				}
				if !strings.Contains(w.logged(), "boom") {
					t.Errorf("the log:\n%s", w.logged())
				}
			})
		})
	}
}

// A bomb is a bastion's connection that panics, once.
type bomb struct {
	ssh.Conn
	in   string
	once sync.Once
}

func (b *bomb) SendRequest(name string, reply bool, payload []byte) (bool, []byte, error) {
	if b.in == "keepalive" {
		b.once.Do(func() { panic("boom") })
	}
	return b.Conn.SendRequest(name, reply, payload)
}

func (b *bomb) Close() error {
	if b.in == "disconnect" {
		b.once.Do(func() { panic("boom") })
	}
	return b.Conn.Close()
}

// TestKeepaliveEnds wants nobody to be asked any more when ServeConn has returned.
func TestKeepaliveEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		asked := &counter{}
		w.srv.Dial = func(ctx context.Context, id identity.Identity, notify func(bool)) (*bastion.Conn, error) {
			b, err := w.dial(ctx, id, notify)
			if err == nil {
				asked.Conn = b.Conn
				b.Conn = asked
			}
			return b, err
		}
		near, far := sshtest.Pipe()
		served := make(chan struct{})
		go func() { w.srv.ServeConn(t.Context(), far); close(served) }()
		c, err := loginOn(near, "alice", w.alice)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		c.Close()
		<-served
		before := asked.n.Load()
		time.Sleep(time.Minute)
		if n := asked.n.Load(); before == 0 || n != before {
			t.Errorf("asked %d times, and %d times after the end", before, n-before)
		}
	})
}

// A counter counts the requests that are sent.
type counter struct {
	ssh.Conn
	n atomic.Int32
}

func (c *counter) SendRequest(name string, reply bool, payload []byte) (bool, []byte, error) {
	c.n.Add(1)
	return c.Conn.SendRequest(name, reply, payload)
}
