package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
)

func TestLogin(t *testing.T) {
	b := start(t, nil)
	sign := func(fleet ssh.Signer, id identity.Identity, principal string, at time.Time) ssh.Signer {
		s, err := sshca.Sign(fleet, id, principal, at)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	// with changes a good certificate and signs it again.
	with := func(change func(*ssh.Certificate)) ssh.Signer {
		_, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		signer, err := ssh.NewSignerFromSigner(private)
		if err != nil {
			t.Fatal(err)
		}
		cert := *sign(b.fleet, alice(), principal, time.Now()).PublicKey().(*ssh.Certificate)
		cert.Key = signer.PublicKey()
		change(&cert)
		if err := cert.SignCert(rand.Reader, b.fleet); err != nil {
			t.Fatal(err)
		}
		out, err := ssh.NewCertSigner(&cert, signer)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	bob := alice()
	bob.User = "bob"
	now := time.Now()
	for _, tt := range []struct {
		name string
		auth ssh.AuthMethod
		ok   bool
	}{
		{"good", ssh.PublicKeys(sign(b.fleet, alice(), principal, now)), true},
		{"another principal", ssh.PublicKeys(sign(b.fleet, alice(), "task:other", now)), false},
		{"no principal", ssh.PublicKeys(with(func(c *ssh.Certificate) { c.ValidPrincipals = nil })), false},
		{"another owner", ssh.PublicKeys(sign(b.fleet, bob, principal, now)), false},
		{"expired", ssh.PublicKeys(sign(b.fleet, alice(), principal, now.Add(-time.Hour))), false},
		{"not yet valid", ssh.PublicKeys(sign(b.fleet, alice(), principal, now.Add(time.Hour))), false},
		{"another fleet", ssh.PublicKeys(sign(newSigner(t), alice(), principal, now)), false},
		{"plain key", ssh.PublicKeys(newSigner(t)), false},
		{"the fleet's own key", ssh.PublicKeys(b.fleet), false},
		{"host certificate", ssh.PublicKeys(with(func(c *ssh.Certificate) { c.CertType = ssh.HostCert })), false},
		{"from here", ssh.PublicKeys(with(func(c *ssh.Certificate) { c.CriticalOptions["source-address"] = "127.0.0.0/8" })), true},
		{"from elsewhere", ssh.PublicKeys(with(func(c *ssh.Certificate) { c.CriticalOptions["source-address"] = "192.0.2.1/32" })), false},
		{"unknown restriction", ssh.PublicKeys(with(func(c *ssh.Certificate) { c.CriticalOptions["new@sallyport"] = "" })), false},
		{"password", ssh.Password("x"), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config := b.config(alice())
			config.Auth = []ssh.AuthMethod{tt.auth}
			c, err := ssh.Dial("tcp", b.addr, config)
			if (err == nil) != tt.ok {
				t.Errorf("login: %v", err)
			}
			if err == nil {
				c.Close()
			}
		})
	}
	config := b.config(alice())
	config.Auth = nil
	if _, err := ssh.Dial("tcp", b.addr, config); err == nil {
		t.Error("logged in without a credential")
	}
}

func TestLimits(t *testing.T) {
	baseGoroutines, baseFiles := runtime.NumGoroutine(), openFiles(t)
	b := start(t, nil)
	c := b.dial(alice())

	refused := 0
	for range 10_000 {
		ch, reqs, err := c.OpenChannel("session", nil)
		if err != nil {
			refused++
			continue
		}
		go ssh.DiscardRequests(reqs)
		defer ch.Close()
	}
	if refused != 10_000-defaultMaxSessions {
		t.Errorf("%d of 10000 sessions refused", refused)
	}
	l := listen(t, "tcp", "127.0.0.1:0")
	defer l.Close()
	var conns []net.Conn
	for {
		conn, err := c.Dial("tcp", l.Addr().String())
		if err != nil {
			break
		}
		conns = append(conns, conn)
	}
	if len(conns) != maxChannels-defaultMaxSessions {
		t.Errorf("%d forwards beside %d sessions", len(conns), defaultMaxSessions)
	}
	listeners := 0
	for {
		if ok, _, _ := c.SendRequest("tcpip-forward", true, ssh.Marshal(tcpAddr{"127.0.0.1", 0})); !ok {
			break
		}
		listeners++
	}
	if listeners != maxListeners {
		t.Errorf("%d remote forwards", listeners)
	}
	other := b.dial(alice())
	if ok, _, err := other.SendRequest("no-more-sessions@openssh.com", true, nil); !ok || err != nil {
		t.Error(ok, err)
	}
	if _, err := other.NewSession(); err == nil {
		t.Error("a session after no-more-sessions")
	}
	output(t, b.dial(alice()), "true") // another connection is not affected

	l.Close()
	c.Close()
	other.Close()
	b.stop()
	if err := <-b.ended; err != nil {
		t.Error(err)
	}
	eventually(t, "goroutines and files back to where they were", func() bool {
		return runtime.NumGoroutine() <= baseGoroutines+1 && openFiles(t) <= baseFiles+1
	})
}

func openFiles(t testing.TB) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestStrangers: whatever is said before the login ends that connection only.
func TestStrangers(t *testing.T) {
	b := start(t, nil)
	for _, text := range []string{"", "GET / HTTP/1.1\r\n\r\n", "SSH-1.0-x\r\n", "SSH-2.0-x\r\n\xff\xff\xff\xff\x00\x00", "SSH-2.0-x\r\n\x00\x00\x00\x0c\x0a\x14garbagegarb", strings.Repeat("x", 100_000)} {
		c, err := net.Dial("tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, text)
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
		c.Close()
	}
	if got := output(t, b.dial(alice()), "echo fine"); got != "fine\n" {
		t.Error(got)
	}
}

// TestPanic: a panic in what serves one connection ends that connection, is
// logged with its stack, and leaves others alone.
func TestPanic(t *testing.T) {
	var log lockedBuffer
	b := start(t, func(s *Server) { s.Log = newLogger(&log) })
	victim, other := b.dial(alice()), b.dial(alice())
	output(t, victim, "true")
	for _, c := range b.server.open() {
		if c.ssh.RemoteAddr().String() == victim.LocalAddr().String() {
			c.spawn("test", func() { panic("boom") })
		}
	}
	victim.Wait()
	if got := output(t, other, "echo fine"); got != "fine\n" {
		t.Error(got)
	}
	if s := log.String(); !strings.Contains(s, "boom") || !strings.Contains(s, "TestPanic") {
		t.Errorf("log %q", s)
	}
}

// TestPanicInLogin: a login that was promised to be let in and ended in a panic is
// no use of the bastion.
func TestPanicInLogin(t *testing.T) {
	s, fleet := newServer(t)
	near, far := net.Pipe()
	defer near.Close()
	signer, err := sshca.Sign(fleet, alice(), principal, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	var client sync.WaitGroup
	defer client.Wait()
	client.Go(func() {
		ssh.NewClientConn(buffered(near), "", &ssh.ClientConfig{
			User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		})
		near.Close()
	})
	panicked := func() (p any) {
		defer far.Close()
		defer func() { p = recover() }()
		s.login(&breaking{Conn: buffered(far), s: s})
		return nil
	}()
	if panicked != "boom" || s.entering != 0 {
		t.Errorf("it ended with %v; %d logins are still promised to be let in", panicked, s.entering)
	}
}

// A breaking connection panics when something is written to it after a login has
// been promised to be let in.
type breaking struct {
	net.Conn
	s *Server
}

func (b *breaking) Write(p []byte) (int, error) {
	b.s.mu.Lock()
	promised := b.s.entering > 0
	b.s.mu.Unlock()
	if promised {
		panic("boom")
	}
	return b.Conn.Write(p)
}

// TestStop: when the agent is told to stop, terminals are told why, processes
// hang up, and clients learn how they ended.
func TestStop(t *testing.T) {
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
	eventually(t, "the session is known to run", func() bool {
		for _, c := range b.server.open() {
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

// A pipeListener and its connections live in memory, for a fake clock.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// dial returns the client's end of a connection that, unlike net.Pipe's, does
// not wait for its reader: both sides of SSH begin by writing.
func (l *pipeListener) dial() (net.Conn, error) {
	a, b := net.Pipe()
	c, d := buffered(a), buffered(b)
	select {
	case l.conns <- c:
		return d, nil
	case <-l.closed:
		c.Close()
		d.Close()
		return nil, errors.New("refused")
	}
}

type bufferedConn struct {
	net.Conn
	writes chan []byte
	closed chan struct{}
	once   sync.Once
}

func buffered(c net.Conn) *bufferedConn {
	b := &bufferedConn{Conn: c, writes: make(chan []byte, 1000), closed: make(chan struct{})}
	go func() {
		for {
			select {
			case p := <-b.writes:
				if _, err := c.Write(p); err != nil {
					b.Close()
				}
			case <-b.closed:
				return
			}
		}
	}()
	return b
}

func (b *bufferedConn) Write(p []byte) (int, error) {
	select {
	case b.writes <- append([]byte(nil), p...):
		return len(p), nil
	case <-b.closed:
		return 0, net.ErrClosed
	}
}

func (b *bufferedConn) Close() error {
	b.once.Do(func() { close(b.closed) })
	return b.Conn.Close()
}

// clocked serves an agent on a fake clock. login logs in over memory, as a
// client that does or does not answer requests.
func clocked(t *testing.T, idle, maxLife time.Duration) (login func(answer bool) (ssh.Conn, error), ended func() time.Duration, l *pipeListener) {
	s, fleet := newServer(t)
	s.Idle, s.MaxLife = idle, maxLife
	s.Log = newLogger(io.Discard)
	l = newPipeListener()
	start := time.Now()
	var at time.Duration
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(context.Background(), l); err != nil {
			t.Errorf("Serve: %v", err)
		}
		at = time.Since(start)
	}()
	login = func(answer bool) (ssh.Conn, error) {
		signer, err := sshca.Sign(fleet, alice(), principal, time.Now())
		if err != nil {
			return nil, err
		}
		nc, err := l.dial()
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
		_, ended, _ := clocked(t, 15*time.Minute, 0)
		if got := ended(); got != 15*time.Minute {
			t.Errorf("ended after %v", got)
		}
	})
}

func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		login, ended, _ := clocked(t, 15*time.Minute, 0)
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
			t.Error("logged in to an agent that has ended")
		}
	})
}

// TestStrangersAreNoUse: neither a half-open login nor a refused one keeps a
// bastion.
func TestStrangersAreNoUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, ended, l := clocked(t, 15*time.Minute, 0)
		time.Sleep(14*time.Minute + 50*time.Second)
		nc, err := l.dial()
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
		login, ended, _ := clocked(t, 15*time.Minute, 2*time.Hour)
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

// TestKeepalive: a gateway that vanished without closing its connection does
// not count as use for long.
func TestKeepalive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		login, ended, _ := clocked(t, 15*time.Minute, 0)
		if _, err := login(false); err != nil {
			t.Fatal(err)
		}
		got := ended()
		if min, max := 15*time.Minute+keepaliveEvery, 15*time.Minute+(keepaliveMax+2)*keepaliveEvery; got < min || got > max {
			t.Errorf("ended after %v, want between %v and %v", got, min, max)
		}
	})
}

func newLogger(w io.Writer) *slog.Logger { return slog.New(slog.NewJSONHandler(w, nil)) }

type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestIdleKeepsPromises: a gateway that is being told that it is in will find
// the bastion there, even if the idle time ends at that moment.
func TestIdleKeepsPromises(t *testing.T) {
	s := &Server{Idle: time.Hour, idle: time.NewTimer(time.Hour), conns: map[*conn]struct{}{}}
	stopped := false
	stop := func(error) { stopped = true }
	if !s.promise() {
		t.Fatal("no promise although nothing ends")
	}
	s.idled(stop)
	if stopped {
		t.Error("the bastion ended under a login")
	}
	s.leave(nil) // which came to nothing
	s.idled(stop)
	if !stopped || s.promise() {
		t.Errorf("stopped is %v, or a promise was given after the end", stopped)
	}
}
