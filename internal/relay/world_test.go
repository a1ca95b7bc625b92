package relay

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/wire"
)

// A world is a client and a bastion, joined by a relay: four ends of package
// ssh, all real.
type world struct {
	t       testing.TB
	relay   *Relay
	client  Peer // the client's end of its connection
	bastion Peer // the bastion's end of its connection
	up      Peer // the relay's end of that
	server  chan Peer

	// What Run returned, when done is closed.
	done     chan struct{}
	byClient bool
	err      error
}

const lostText = "Your bastion has gone."

// permitAll returns a relay that permits everything.
func permitAll() *Relay {
	return &Relay{Permissions: identity.AllowAll(), Lost: lostText, Log: slog.New(slog.DiscardHandler)}
}

// start runs the relay with a bastion that is still starting.
func start(t testing.TB, r *Relay, link func(testing.TB) (a, b net.Conn)) *world {
	before := runtime.NumGoroutine()
	w := &world{t: t, relay: r, server: make(chan Peer, 1), done: make(chan struct{})}
	w.client, r.Client = connect(t, link, &ssh.ClientConfig{})
	w.up, w.bastion = connect(t, link, &ssh.ClientConfig{})
	go w.run()
	t.Cleanup(func() {
		w.client.Conn.Close()
		w.bastion.Conn.Close()
		w.up.Conn.Close()
		for _, p := range []Peer{w.client, w.bastion, w.up} {
			discard(p)
		}
		<-w.done
		if r.Client.Conn.RemoteAddr().Network() == "pipe" {
			return // synctest reports goroutines that are left
		}
		for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				buf := make([]byte, 1<<20)
				t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
			}
		}
	})
	return w
}

func (w *world) run() {
	defer close(w.done)
	w.byClient, w.err = w.relay.Run(w.server, func() string { return "no room" })
}

// join runs the relay with a bastion that is there.
func join(t testing.TB, r *Relay, link func(testing.TB) (a, b net.Conn)) *world {
	w := start(t, r, link)
	w.server <- w.up
	return w
}

// discard refuses what comes in until the connection has ended.
func discard(p Peer) {
	for reqs, chans := p.Reqs, p.Chans; reqs != nil || chans != nil; {
		select {
		case req, ok := <-reqs:
			if !ok {
				reqs = nil
				continue
			}
			req.Reply(false, nil)
		case nc, ok := <-chans:
			if !ok {
				chans = nil
				continue
			}
			nc.Reject(ssh.Prohibited, "")
		}
	}
}

var hostKey = func() ssh.Signer {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		panic(err)
	}
	return signer
}()

// connect returns the two ends of an SSH connection.
func connect(t testing.TB, link func(testing.TB) (a, b net.Conn), config *ssh.ClientConfig) (client, server Peer) {
	t.Helper()
	algorithms := ssh.Config{
		KeyExchanges:   []string{ssh.KeyExchangeCurve25519},
		Ciphers:        []string{ssh.CipherAES128GCM},
		RekeyThreshold: 1 << 40,
	}
	if config.RekeyThreshold != 0 {
		algorithms.RekeyThreshold = config.RekeyThreshold
	}
	config.Config = algorithms
	config.HostKeyCallback = ssh.FixedHostKey(hostKey.PublicKey())
	serverConfig := &ssh.ServerConfig{Config: algorithms, NoClientAuth: true}
	serverConfig.RekeyThreshold = 1 << 40
	serverConfig.AddHostKey(hostKey)

	a, b := link(t)
	accepted := make(chan error, 1)
	go func() {
		sc, chans, reqs, err := ssh.NewServerConn(b, serverConfig)
		if w, ok := b.(*wire.Conn); ok && err == nil {
			w.Carries(sc)
		}
		if err == nil {
			server = Peer{Conn: sc, Chans: chans, Reqs: reqs}
		}
		accepted <- err
	}()
	conn, chans, reqs, err := ssh.NewClientConn(a, "", config)
	if w, ok := a.(*wire.Conn); ok && err == nil {
		w.Carries(conn)
	}
	if err := errors.Join(err, <-accepted); err != nil {
		t.Fatal(err)
	}
	return Peer{Conn: conn, Chans: chans, Reqs: reqs}, server
}

// overTCP links by loopback, as the gateway does.
func overTCP(t testing.TB) (a, b net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	return wire.New(a), wire.New(b)
}

// inMemory links by memory, for synctest.
func inMemory(testing.TB) (a, b net.Conn) { return sshtest.Pipe() }

// A valve holds up who goes through it while it is shut. It is made open.
type valve chan struct{}

func newValve() valve { v := make(valve, 1); v.open(); return v }
func (v valve) open() { v <- struct{}{} }
func (v valve) shut() { <-v }
func (v valve) goThrough() {
	if v != nil {
		v <- <-v
	}
}

// valved is a connection with valves; nil is none.
type valved struct {
	net.Conn
	reading, writing valve
}

func (c valved) Read(p []byte) (int, error)  { c.reading.goThrough(); return c.Conn.Read(p) }
func (c valved) Write(p []byte) (int, error) { c.writing.goThrough(); return c.Conn.Write(p) }

// A channel is one end of an SSH channel.
type channel struct {
	ssh.Channel
	reqs <-chan *ssh.Request
}

// open opens a channel through the relay.
func (w *world) open(kind string) (client, bastion channel) {
	w.t.Helper()
	return openBetween(w.t, w.client, w.bastion, kind)
}

func openBetween(t testing.TB, from, to Peer, kind string) (near, far channel) {
	t.Helper()
	accepted := make(chan error, 1)
	go func() {
		nc, ok := <-to.Chans
		if !ok {
			accepted <- io.EOF
			return
		}
		var err error
		far.Channel, far.reqs, err = nc.Accept()
		accepted <- err
	}()
	var err error
	near.Channel, near.reqs, err = from.Conn.OpenChannel(kind, nil)
	if err != nil {
		t.Fatalf("opening %s: %v", kind, err)
	}
	if err := <-accepted; err != nil {
		t.Fatal(err)
	}
	return near, far
}

// bubble runs a test on a fake clock, in which a deadlock or a goroutine that
// is left at the end fails it at once.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}
