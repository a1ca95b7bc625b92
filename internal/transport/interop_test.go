package transport_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/transport"
	"github.com/sallyport-ssh/sallyport/internal/userauth"
)

// The tests here put a relay of two Conns, one of each role, between a client and
// a server of another implementation. It passes on every packet as it is.

// login has the client of c log in with any key.
func login(c *transport.Conn) error {
	if err := c.Handshake(); err != nil {
		return err
	}
	s := userauth.NewServer(c, userauth.ServerConfig{})
	for {
		req, err := s.Next()
		if err != nil {
			return err
		}
		switch req := req.(type) {
		case *userauth.Query:
			err = s.Accept(req)
		case *userauth.Signed:
			return s.Succeed()
		default:
			err = s.Fail()
		}
		if err != nil {
			return err
		}
	}
}

// relay passes packets between client and server until either ends, and returns
// why. Both are closed then.
func relay(client, server *transport.Conn) error {
	const bound = 1 << 20
	ended := make(chan error, 2)
	pass := func(to, from *transport.Conn) {
		for {
			p, err := from.ReadPacket()
			if err == nil {
				err = to.WritePacket(p)
			}
			if err == nil && !from.Buffered() {
				to.Flush()
				err = to.WaitWritableUnless(bound, from.Exchanging())
			}
			if err != nil {
				ended <- err
				return
			}
		}
	}
	go pass(client, server)
	go pass(server, client)
	err := <-ended
	// What was written last is still to be sent.
	client.Close()
	server.Close()
	<-ended
	return err
}

// A through is a relay in front of a server of package ssh.
type through struct {
	client net.Conn // for the client of another implementation
	done   chan error
}

// newThrough starts a relay with these configurations in front of the server that
// serve is.
func newThrough(t testing.TB, front, back transport.Config, serve func(net.Conn)) *through {
	t.Helper()
	outer, frontConn := sshtest.TCPPipe(t)
	backConn, inner := sshtest.TCPPipe(t)
	go serve(inner)
	th := &through{client: outer, done: make(chan error, 1)}
	key := sshtest.NewKey(t)
	go func() { th.done <- runThrough(frontConn, backConn, &front, &back, "bob", key) }()
	return th
}

// runThrough has a client log in on frontConn, logs in to a server on backConn, and
// relays.
func runThrough(frontConn, backConn net.Conn, front, back *transport.Config, user string, key ssh.Signer) error {
	client := transport.NewServer(frontConn, front)
	defer client.Close()
	if err := login(client); err != nil {
		return fmt.Errorf("front: %w", err)
	}
	server := transport.NewClient(backConn, back)
	defer server.Close()
	if err := server.Handshake(); err != nil {
		return fmt.Errorf("back: %w", err)
	}
	if err := userauth.Client(server, user, nil, key); err != nil {
		return fmt.Errorf("back: %w", err)
	}
	return relay(client, server)
}

// echoServer is a server of package ssh that echoes the data of channels.
func echoServer(t testing.TB, cfg ssh.Config, keys ...ssh.Signer) func(net.Conn) {
	return func(nc net.Conn) {
		sc := &ssh.ServerConfig{Config: cfg, PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil }}
		for _, k := range keys {
			sc.AddHostKey(k)
		}
		conn, chans, reqs, err := ssh.NewServerConn(nc, sc)
		if err != nil {
			nc.Close()
			return
		}
		defer conn.Close()
		go func() {
			for r := range reqs {
				r.Reply(true, r.Payload)
			}
		}()
		for n := range chans {
			ch, reqs, err := n.Accept()
			if err != nil {
				return
			}
			go ssh.DiscardRequests(reqs)
			go func() {
				io.Copy(ch, ch)
				ch.CloseWrite()
				ch.Close()
			}()
		}
	}
}

func xclient(t testing.TB, nc net.Conn, cfg ssh.Config, hostKeyAlgorithms ...string) *ssh.Client {
	t.Helper()
	conn, chans, reqs, err := ssh.NewClientConn(nc, "", &ssh.ClientConfig{
		Config: cfg, User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(sshtest.NewKey(t))},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(), HostKeyAlgorithms: hostKeyAlgorithms,
	})
	if err != nil {
		t.Fatalf("package ssh's client: %v", err)
	}
	return ssh.NewClient(conn, chans, reqs)
}

// echo sends size bytes through a new channel and compares the echo. If
// window is not zero no more than that is under way at once.
func echo(client *ssh.Client, size, window int) error {
	ch, reqs, err := client.OpenChannel("session", nil)
	if err != nil {
		return err
	}
	go ssh.DiscardRequests(reqs)
	sent := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{byte(size)})
	rng.Read(sent)
	if window > 0 {
		got := make([]byte, window)
		for rest := sent; len(rest) > 0; rest = rest[min(window, len(rest)):] {
			n := min(window, len(rest))
			if _, err := ch.Write(rest[:n]); err != nil {
				return err
			}
			if _, err := io.ReadFull(ch, got[:n]); err != nil {
				return err
			}
			if !bytes.Equal(got[:n], rest[:n]) {
				return errors.New("echo differs")
			}
		}
		return ch.Close()
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		ch.Write(sent)
		ch.CloseWrite()
	})
	got, err := io.ReadAll(ch)
	wg.Wait()
	if err == nil && !bytes.Equal(got, sent) {
		err = fmt.Errorf("echo differs: %d bytes of %d", len(got), len(sent))
	}
	return err
}

func within(t testing.TB, d time.Duration, what string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	case <-time.After(d):
		t.Fatalf("%s: stuck", what)
	}
}

// TestPackageSSH does a handshake with each algorithm, in both roles, and key
// exchanges afterwards.
func TestPackageSSH(t *testing.T) {
	for _, cfg := range transport.Combinations() {
		t.Run(strings.Join(strings.Fields(cfg.TestName()), "_"), func(t *testing.T) {
			t.Parallel()
			back := cfg
			cfg.HostKeys = transport.TestHostKeys()
			back.HostKey = func(ssh.PublicKey) error { return nil }
			back.RekeyBytes = 100 << 10
			cfg.RekeyBytes = 150 << 10
			xcfg := ssh.Config{KeyExchanges: cfg.KexAlgorithms, Ciphers: cfg.Ciphers, MACs: cfg.MACs, RekeyThreshold: 200 << 10}
			th := newThrough(t, cfg, back, echoServer(t, xcfg, transport.TestHostKeys()...))
			client := xclient(t, th.client, xcfg, cfg.HostKeyAlgorithms...)
			within(t, time.Minute, "echo", func() error { return echo(client, 2<<20, 16<<10) })
			client.Close()
			within(t, time.Minute, "end", func() error {
				// A reset, if something was on its way to the client.
				if err := <-th.done; !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, syscall.ECONNRESET) {
					return err
				}
				return nil
			})
		})
	}
}

// TestRekeyUnderLoad has both of our sides start key exchanges all the time, while
// five channels are full in both directions. Package ssh itself may start none: it
// deadlocks under load.
func TestRekeyUnderLoad(t *testing.T) {
	never := ssh.Config{RekeyThreshold: 1 << 40}
	front := transport.Config{HostKeys: []ssh.Signer{sshtest.NewKey(t)}, RekeyBytes: 1 << 20}
	back := transport.Config{HostKey: func(ssh.PublicKey) error { return nil }, RekeyBytes: 700 << 10}
	th := newThrough(t, front, back, echoServer(t, never, sshtest.NewKey(t)))
	client := xclient(t, th.client, never)
	defer client.Close()
	within(t, time.Minute, "echo", func() error {
		errs := make(chan error, 5)
		for range 5 {
			go func() { errs <- echo(client, 8<<20, 0) }()
		}
		for range 5 {
			if err := <-errs; err != nil {
				return err
			}
		}
		return nil
	})
}

// TestFakeTime does a handshake in memory and in fake time, as the gateway's tests
// do, and ends with a peer that reads nothing.
func TestFakeTime(t *testing.T) {
	keys := []ssh.Signer{sshtest.NewKey(t)}
	synctest.Test(t, func(t *testing.T) {
		nc, ns := sshtest.Pipe()
		client := transport.NewClient(nc, &transport.Config{HostKey: func(ssh.PublicKey) error { return nil }})
		server := transport.NewServer(ns, &transport.Config{HostKeys: keys})
		done := make(chan error, 1)
		go func() { done <- server.Handshake() }()
		if err := errors.Join(client.Handshake(), <-done); err != nil {
			t.Fatal(err)
		}
		client.LoggedIn()
		server.LoggedIn()
		client.WritePacket([]byte{94, 1})
		client.Flush()
		if p, err := server.ReadPacket(); err != nil || p[1] != 1 {
			t.Errorf("got %v, %v", p, err)
		}
		for client.Queued() < 1<<20 {
			client.WritePacket(append([]byte{94}, make([]byte, 30000)...))
			client.Flush()
			synctest.Wait() // for the part that the pipe has room for
		}
		begun := time.Now()
		client.Close()
		if took := time.Since(begun); took != time.Second {
			t.Errorf("Close took %v", took)
		}
		server.Close()
	})
}

// TestRekeyInterval leaves a connection idle, and wants a key exchange whenever the
// keys have been used for the interval, and none after Close.
func TestRekeyInterval(t *testing.T) {
	keys := []ssh.Signer{sshtest.NewKey(t)}
	synctest.Test(t, func(t *testing.T) {
		nc, ns := sshtest.Pipe()
		client := transport.NewClient(nc, &transport.Config{HostKey: func(ssh.PublicKey) error { return nil }})
		server := transport.NewServer(ns, &transport.Config{HostKeys: keys, RekeyInterval: time.Hour})
		done := make(chan error, 1)
		go func() { done <- server.Handshake() }()
		if err := errors.Join(client.Handshake(), <-done); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour) // no interval counts before the login
		client.LoggedIn()
		server.LoggedIn()
		exchanges, ends := 0, make(chan error, 2)
		for _, c := range []*transport.Conn{client, server} {
			go func() { _, err := c.ReadPacket(); ends <- err }()
		}
		for range 3 {
			before := server.Sent()
			time.Sleep(time.Hour - time.Second)
			if server.Sent() != before {
				t.Fatal("a key exchange before the interval was over")
			}
			time.Sleep(2 * time.Second)
			synctest.Wait()
			if server.Sent() > before {
				exchanges++
			}
			server.Rekey() // by which the interval begins anew
			synctest.Wait()
		}
		if exchanges != 3 {
			t.Errorf("%d key exchanges in 3 intervals", exchanges)
		}
		server.Close()
		client.Close()
		<-ends
		<-ends
		sent := server.Sent()
		time.Sleep(3 * time.Hour)
		if server.Sent() != sent {
			t.Error("a key exchange after Close")
		}
	})
}
