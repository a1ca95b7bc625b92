package gateway

import (
	"context"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// TestKeepalive: a client that does not answer keepalives is closed, and a silent one that
// does answer goes on.
func TestKeepalive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.ClientAliveInterval, gw.srv.ClientAliveCountMax = 10*time.Second, 3
		silent, err := gw.connect(t.Context(), "bob", gw.bob)
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()

		near, far := sshtest.Pipe()
		gone := make(chan struct{})
		go func() { gw.srv.ServeConn(t.Context(), far); close(gone) }()
		cable := &cable{Conn: near}
		conn, _, reqs, err := ssh.NewClientConn(cable, "gateway", &ssh.ClientConfig{
			User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(gw.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		go ssh.DiscardRequests(reqs)
		time.Sleep(5 * time.Minute)
		select {
		case <-gone:
			t.Fatal("a connection that answers its keepalives has ended")
		default:
		}
		cable.pull()
		pulled := time.Now()
		<-gone
		if got := time.Since(pulled); got > 45*time.Second {
			t.Errorf("closed after %v", got)
		}
		if out, err := silent.run("who"); err != nil {
			t.Errorf("bob: %q, %v", out, err)
		}
	})
}

// TestKeepaliveTogether: a client gets one keepalive per interval, and clients that
// connected at almost the same time get them at the same time.
func TestKeepaliveTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.ClientAliveInterval = 15 * time.Second
		began := time.Now().Truncate(time.Second).Add(time.Second)
		time.Sleep(time.Until(began) - 200*time.Millisecond)
		var asked [2][]time.Time
		for i := range asked {
			near, far := sshtest.Pipe()
			go gw.srv.ServeConn(t.Context(), far)
			conn, _, reqs, err := ssh.NewClientConn(near, "gateway", &ssh.ClientConfig{
				User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(gw.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
			})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			go func() {
				for req := range reqs {
					if req.WantReply { // which the announcement of host keys does not
						asked[i] = append(asked[i], time.Now())
					}
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

// TestKeepaliveSlowLink: a client that sends data is not closed, even if its answers to
// keepalives are late, because on a slow link they queue behind the data.
func TestKeepaliveSlowLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.ClientAliveInterval, gw.srv.ClientAliveCountMax = 15*time.Second, 4
		near, far := sshtest.Pipe()
		gone := make(chan struct{})
		go func() { gw.srv.ServeConn(t.Context(), far); close(gone) }()
		conn, chans, reqs, err := ssh.NewClientConn(near, "gateway", &ssh.ClientConfig{
			User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(gw.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
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
			t.Errorf("ended %v after the last data", got)
		}
		conn.Close()
		go ssh.DiscardRequests(reqs)
		for range chans {
		}
	})
}

// A cable is a connection that drops all writes, without an error, once it is pulled.
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

// TestKeepaliveEnds: no keepalive is sent after ServeConn has returned.
func TestKeepaliveEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		var b *bastion.Conn
		gw.srv.Dial = func(ctx context.Context, id identity.Identity, notify func(bool)) (*bastion.Conn, error) {
			var err error
			b, err = gw.dial(ctx, id, notify)
			return b, err
		}
		near, far := sshtest.Pipe()
		served := make(chan struct{})
		go func() { gw.srv.ServeConn(t.Context(), far); close(served) }()
		c, err := loginOn(near, "alice", gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		login := b.Sent()
		time.Sleep(20 * time.Second)
		if b.Sent() == login {
			t.Error("the bastion got no keepalive")
		}
		c.Close()
		<-served
		before := b.Sent()
		time.Sleep(time.Minute)
		if n := b.Sent(); n != before {
			t.Errorf("%d bytes were sent after the end", n-before)
		}
	})
}

// TestStoppedClient: by default, a suspended client may be silent for any time.
func TestStoppedClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		near, far := sshtest.Pipe()
		gone := make(chan struct{})
		go func() { gw.srv.ServeConn(t.Context(), far); close(gone) }()
		cable := &cable{Conn: near}
		conn, _, reqs, err := ssh.NewClientConn(cable, "gateway", &ssh.ClientConfig{
			User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(gw.alice)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		})
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(reqs)
		cable.pull()
		time.Sleep(12 * time.Hour)
		select {
		case <-gone:
			t.Error("its connection has ended")
		default:
		}
		conn.Close()
		<-gone
	})
}

func TestTCPKeepAlive(t *testing.T) {
	for _, disabled := range []bool{false, true} {
		gw := newTestGateway(t)
		gw.srv.DisableTCPKeepAlive = disabled
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		client, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		server, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		gw.srv.newConn(server)
		raw, err := server.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		option := func(level, name int) (value int) {
			t.Helper()
			raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), level, name) })
			if err != nil {
				t.Fatal(err)
			}
			return value
		}
		if on := option(unix.SOL_SOCKET, unix.SO_KEEPALIVE) != 0; on == disabled {
			t.Errorf("disabled: %v; SO_KEEPALIVE is %v", disabled, on)
		}
		if disabled {
			continue
		}
		idle, interval, count := option(unix.SOL_TCP, unix.TCP_KEEPIDLE), option(unix.SOL_TCP, unix.TCP_KEEPINTVL), option(unix.SOL_TCP, unix.TCP_KEEPCNT)
		// Below the idle timeout of load balancers, 350 s.
		if after := idle + interval*count; after != 16*60 || interval > 300 || idle > 300 {
			t.Errorf("probes after %d s, %d times every %d s", idle, count, interval)
		}
	}
}
