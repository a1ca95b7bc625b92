package gateway

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// A testGateway is a gateway in memory with two users. Each dial gets a new bastion.
type testGateway struct {
	t     testing.TB
	srv   *Server
	alice ssh.Signer
	bob   ssh.Signer

	// boot is the time that the start of a bastion takes; fail is its result.
	boot time.Duration
	fail error

	clientVersion string // of the clients; empty is that of package ssh

	mu    sync.Mutex
	dials []identity.Identity
	log   strings.Builder
}

func newTestGateway(t testing.TB) *testGateway {
	gw := &testGateway{t: t, alice: sshtest.NewKey(t), bob: sshtest.NewKey(t)}
	users := map[string]ssh.Signer{"alice": gw.alice, "bob": gw.bob}
	gw.srv = &Server{
		Settings: Settings{Options: Options{HostKeys: []ssh.Signer{sshtest.NewKey(t)}}, Authorize: func(user string, key ssh.PublicKey, _ netip.Addr, _ time.Time) (auth.Grant, error) {
			if k := users[user]; k != nil && string(k.PublicKey().Marshal()) == string(key.Marshal()) {
				return auth.Grant{Permissions: identity.AllowAll()}, nil
			}
			return auth.Grant{}, errors.New("not a key of this user")
		}},
		Dial: gw.dial,
		Log:  slog.New(slog.NewTextHandler(lockedWriter{gw}, nil)),
	}
	return gw
}

type lockedWriter struct{ gw *testGateway }

func (l lockedWriter) Write(p []byte) (int, error) {
	l.gw.mu.Lock()
	defer l.gw.mu.Unlock()
	return l.gw.log.Write(p)
}

// dial connects to a bastion that answers every exec with the user's name.
func (gw *testGateway) dial(ctx context.Context, id identity.Identity, notify func(bool)) (*bastion.Conn, error) {
	gw.mu.Lock()
	gw.dials = append(gw.dials, id)
	gw.mu.Unlock()
	if gw.boot > 0 {
		notify(true)
		select {
		case <-time.After(gw.boot):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if gw.fail != nil {
		return nil, gw.fail
	}
	near, far := sshtest.Pipe()
	go serveBastion(far, id.User)
	conn, err := sshtest.Connect(near, "bastion")
	if err != nil {
		return nil, err
	}
	return &bastion.Conn{Conn: conn}, nil
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

// A client is a client's connection, with the banners of its login.
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

func (gw *testGateway) connect(ctx context.Context, user string, keys ...ssh.Signer) (*client, error) {
	near, far := sshtest.Pipe()
	go gw.srv.ServeConn(ctx, far)
	c := &client{}
	conn, chans, reqs, err := ssh.NewClientConn(near, "gateway", &ssh.ClientConfig{
		User:            user,
		ClientVersion:   gw.clientVersion,
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

// An addressed connection has a given remote address.
type addressed struct {
	net.Conn
	remote *net.TCPAddr
}

func (a addressed) RemoteAddr() net.Addr { return a.remote }

func (a addressed) LocalAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(10, 0, 0, 9), Port: 22} }

// dialFrom makes a connection from an address, and serves it.
func (gw *testGateway) dialFrom(ctx context.Context, ip string) (near net.Conn, served <-chan struct{}) {
	near, far := sshtest.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		gw.srv.ServeConn(ctx, addressed{far, &net.TCPAddr{IP: net.ParseIP(ip), Port: 4711}})
	}()
	return near, done
}

// loginOn logs in on a connection.
func loginOn(nc net.Conn, user string, keys ...ssh.Signer) (*client, error) {
	conn, chans, reqs, err := ssh.NewClientConn(nc, "gateway", &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(keys...)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		return nil, err
	}
	return &client{Client: ssh.NewClient(conn, chans, reqs)}, nil
}

func (gw *testGateway) logged() string {
	gw.mu.Lock()
	defer gw.mu.Unlock()
	return gw.log.String()
}

// auditTo opens an audit log for gw. The function that it returns closes the log and
// returns its events.
func (gw *testGateway) auditTo(t testing.TB) func() []audit.Event {
	t.Helper()
	path := filepath.Join(t.TempDir(), "audit.log")
	log, err := audit.Open(audit.Config{File: path, FailClosed: true, Log: gw.srv.Log})
	if err != nil {
		t.Fatal(err)
	}
	gw.srv.Audit = log
	return func() []audit.Event {
		t.Helper()
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var events []audit.Event
		for line := range strings.Lines(string(data)) {
			var e audit.Event
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				t.Fatal(err)
			}
			events = append(events, e)
		}
		return events
	}
}

// permit gives every login these permissions.
func (gw *testGateway) permit(p identity.Permissions) {
	authorize := gw.srv.Authorize
	gw.srv.Authorize = func(user string, key ssh.PublicKey, from netip.Addr, now time.Time) (auth.Grant, error) {
		g, err := authorize(user, key, from, now)
		g.Permissions = p
		return g, err
	}
}

// startShell opens a session with a terminal. Told returns the output so far.
func startShell(t *testing.T, c *client) (told func() string) {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var text strings.Builder
	gw := writerFunc(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return text.Write(p)
	})
	s.Stdout, s.Stderr = io.Writer(gw), io.Writer(gw)
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	return func() string {
		mu.Lock()
		defer mu.Unlock()
		return text.String()
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
