package agent

import (
	"crypto/ed25519"
	"crypto/rand"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

func TestLogin(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	sign := func(fleet ssh.Signer, id identity.Identity, principal string, at time.Time) ssh.Signer {
		s, err := sshca.Sign(fleet, id, principal, at)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	// with changes a valid certificate and signs it again.
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
		sshtest.SignCert(t, &cert, b.fleet)
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
		{"valid", ssh.PublicKeys(sign(b.fleet, alice(), principal, now)), true},
		{"another principal", ssh.PublicKeys(sign(b.fleet, alice(), "task:other", now)), false},
		{"no principal", ssh.PublicKeys(with(func(c *ssh.Certificate) { c.ValidPrincipals = nil })), false},
		{"another owner", ssh.PublicKeys(sign(b.fleet, bob, principal, now)), false},
		{"expired", ssh.PublicKeys(sign(b.fleet, alice(), principal, now.Add(-time.Hour))), false},
		{"not yet valid", ssh.PublicKeys(sign(b.fleet, alice(), principal, now.Add(time.Hour))), false},
		{"another fleet", ssh.PublicKeys(sign(sshtest.NewKey(t), alice(), principal, now)), false},
		{"plain key", ssh.PublicKeys(sshtest.NewKey(t)), false},
		{"the fleet's own key", ssh.PublicKeys(b.fleet), false},
		{"host certificate", ssh.PublicKeys(with(func(c *ssh.Certificate) { c.CertType = ssh.HostCert })), false},
		{"restricted to an address", ssh.PublicKeys(with(func(c *ssh.Certificate) { c.CriticalOptions["source-address"] = "127.0.0.0/8" })), false},
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
		t.Error("logged in without a key")
	}
}

func TestMaxChannels(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	b := start(t, func(s *Server) {
		s.MaxChannels = 5
		s.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	c := b.dial(alice())
	l := listen(t, "tcp", "127.0.0.1:0")
	defer l.Close()
	opened := 0
	for range 10 {
		if _, err := c.Dial("tcp", l.Addr().String()); err == nil {
			opened++
		}
	}
	c.Close()
	b.stop()
	<-b.ended
	if lines := strings.Count(log.String(), "too many channels"); opened != 5 || lines != 1 {
		t.Errorf("%d channels, %d lines in the log: %s", opened, lines, log.String())
	}
}

func TestLimits(t *testing.T) {
	listen(t, "tcp", "127.0.0.1:0").Close() // opens the files of the runtime's poller
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
		t.Errorf("%d of 10000 sessions were rejected", refused)
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
	if len(conns) != defaultMaxChannels-defaultMaxSessions {
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
		t.Error("a session was opened after no-more-sessions")
	}
	output(t, b.dial(alice()), "true") // another connection is not affected

	l.Close()
	c.Close()
	other.Close()
	b.stop()
	if err := <-b.ended; err != nil {
		t.Error(err)
	}
	sshtest.Eventually(t, "as many goroutines and files as before", func() bool {
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

// TestGarbage sends invalid data before the login. Only that connection must end.
func TestGarbage(t *testing.T) {
	t.Parallel()
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

// TestPanic causes a panic in a goroutine of one connection. It must end that connection
// only, and be logged with its stack.
func TestPanic(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	b := start(t, func(s *Server) { s.Log = newLogger(&log) })
	victim, other := b.dial(alice()), b.dial(alice())
	output(t, victim, "true")
	for _, c := range b.server.connections() {
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

// TestPanicInLogin causes a panic after reserve. The reservation must be released, or the
// bastion would never be idle.
func TestPanicInLogin(t *testing.T) {
	t.Parallel()
	s, fleet := newServer(t)
	near, far := sshtest.Pipe()
	defer near.Close()
	signer, err := sshca.Sign(fleet, alice(), principal, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	var client sync.WaitGroup
	defer client.Wait()
	client.Go(func() {
		ssh.NewClientConn(near, "", &ssh.ClientConfig{
			User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		})
		near.Close()
	})
	panicked := func() (p any) {
		defer far.Close()
		defer func() { p = recover() }()
		s.handshake(far) // panics, because s.ClientLog is nil
		return nil
	}()
	if panicked == nil || s.reserved != 0 {
		t.Errorf("panic %v, %d reservations", panicked, s.reserved)
	}
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

// TestRekeyBeforeLogin exchanges keys again before the login. The agent must close the
// connection.
func TestRekeyBeforeLogin(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	nc, err := net.Dial("tcp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	config := b.config(alice())
	config.RekeyThreshold = 1 // which means 256 bytes
	config.User = strings.Repeat("a", 256)
	tries := 0
	config.Auth = []ssh.AuthMethod{ssh.RetryableAuthMethod(ssh.PublicKeysCallback(func() ([]ssh.Signer, error) {
		if tries++; tries > 1 { // the keys have been asked for
			sshtest.Eventually(t, "the agent has closed the connection", func() bool {
				_, err := nc.Write([]byte{0})
				return err != nil
			})
		}
		return []ssh.Signer{sshtest.NewKey(t)}, nil
	}), 3)}
	if _, _, _, err := ssh.NewClientConn(nc, b.addr, config); err == nil {
		t.Error("logged in after a second key exchange")
	}
}
