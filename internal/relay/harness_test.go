package relay

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// A peer is the far end of a Conn, in the hands of a test.
type peer struct {
	t  testing.TB
	mu sync.Mutex
	// changed is broadcast when one of the rest changes.
	changed  sync.Cond
	toRelay  [][]byte
	toPeer   [][]byte
	closed   bool
	stuck    bool // reads nothing
	reason   uint32
	said     string
	unknowns int // UNIMPLEMENTED replies
	queued   int // bytes of toPeer
}

func newPeer(t testing.TB) *peer {
	p := &peer{t: t}
	p.changed.L = &p.mu
	return p
}

// conn is the relay's side of a peer.
type conn struct{ *peer }

func (c conn) ReadPacket() ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.toRelay) == 0 && !c.closed {
		c.changed.Wait()
	}
	if len(c.toRelay) == 0 {
		return nil, io.EOF
	}
	p := c.toRelay[0]
	c.toRelay = c.toRelay[1:]
	return p, nil
}

func (c conn) Buffered() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.toRelay) > 0
}

func (c conn) WritePacket(p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return io.ErrClosedPipe
	}
	c.toPeer = append(c.toPeer, bytes.Clone(p))
	c.queued += len(p)
	c.changed.Broadcast()
	return nil
}

func (c conn) Flush() error { return nil }

func (c conn) Exchanging() <-chan struct{} { return nil }

func (c conn) WaitWritableUnless(bound int, _ <-chan struct{}) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.stuck && c.queued > bound && !c.closed {
		c.changed.Wait()
	}
	return nil
}

func (c conn) Unimplemented() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unknowns++
	return nil
}

func (c conn) Disconnect(reason uint32, text string) error {
	c.mu.Lock()
	if !c.closed {
		c.reason, c.said = reason, text
	}
	c.mu.Unlock()
	return c.Close()
}

func (c conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.changed.Broadcast()
	return nil
}

// send has the relay read packets.
func (p *peer) send(packets ...[]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, packet := range packets {
		p.toRelay = append(p.toRelay, bytes.Clone(packet))
	}
	p.changed.Broadcast()
}

// hangUp closes the connection from the peer's side.
func (p *peer) hangUp() { conn{p}.Close() }

func (p *peer) isClosed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closed
}

// got waits until the relay is idle, and returns the packets that it has written since
// the last call.
func (p *peer) got() [][]byte {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.toPeer
	p.toPeer, p.queued = nil, 0
	p.changed.Broadcast()
	return all
}

// want compares the packets of got with the packets given.
func (p *peer) want(name string, packets ...[]byte) {
	p.t.Helper()
	got := p.got()
	if len(got) != len(packets) {
		p.t.Fatalf("%s: %d packets, want %d\n%s", name, len(got), len(packets), describe(got))
	}
	for i := range got {
		if !bytes.Equal(got[i], packets[i]) {
			p.t.Fatalf("%s: packet %d is\n%swant\n%s", name, i, describe(got[i:i+1]), describe(packets[i:i+1]))
		}
	}
}

func describe(packets [][]byte) string {
	var b strings.Builder
	for _, p := range packets {
		if len(p) == 0 {
			b.WriteString("  empty\n")
			continue
		}
		fmt.Fprintf(&b, "  %3d %q\n", p[0], p[1:min(len(p), 120)])
	}
	return b.String()
}

// joined is a relay between two peers.
type joined struct {
	*Relay
	client, bastion *peer
	server          chan Conn
	done            chan struct{}
	byClient        bool
	err             error
}

func permitAll() *Relay {
	return &Relay{
		Permissions: identity.AllowAll(), Lost: func() string { return "lost" }, NotGranted: "refused", Interrupted: "interrupted",
		Log: slog.New(slog.DiscardHandler),
	}
}

// start runs r, whose bastion is still starting.
func start(t testing.TB, r *Relay) *joined {
	j := &joined{Relay: r, client: newPeer(t), bastion: newPeer(t), server: make(chan Conn, 1), done: make(chan struct{})}
	r.Client = conn{j.client}
	go func() {
		defer close(j.done)
		j.byClient, j.err = r.Run(j.server, func() string { return "no room" })
	}()
	return j
}

func (j *joined) arrive() { j.server <- conn{j.bastion} }

// join runs r with a bastion.
func join(t testing.TB, r *Relay) *joined {
	j := start(t, r)
	j.arrive()
	synctest.Wait()
	return j
}

// end closes both peers and waits for Run.
func (j *joined) end() {
	j.client.hangUp()
	j.bastion.hangUp()
	<-j.done
}

// Messages as peers send them.
func open(kind string, sender uint32, payload string) []byte {
	return sshmsg.Open{Type: kind, Sender: sender, Window: 1000, MaxPacket: 500, Payload: []byte(payload)}.Append(nil)
}
func confirm(recipient, sender uint32) []byte {
	return sshmsg.OpenConfirm{Recipient: recipient, Sender: sender, Window: 8192, MaxPacket: 700}.Append(nil)
}
func data(recipient uint32, text string) []byte {
	return sshmsg.Data{Recipient: recipient, Data: []byte(text)}.Append(nil)
}
func stderr(recipient uint32, text string) []byte {
	return sshmsg.Data{Recipient: recipient, Extended: true, Code: 1, Data: []byte(text)}.Append(nil)
}
func request(recipient uint32, kind string, wantReply bool, payload string) []byte {
	return sshmsg.Request{Recipient: recipient, Type: kind, WantReply: wantReply, Payload: []byte(payload)}.Append(nil)
}
func global(kind string, wantReply bool, payload string) []byte {
	return sshmsg.GlobalRequest{Type: kind, WantReply: wantReply, Payload: []byte(payload)}.Append(nil)
}
func adjust(recipient, n uint32) []byte {
	return sshmsg.WindowAdjust{Recipient: recipient, Bytes: n}.Append(nil)
}
func short(num byte, recipient uint32) []byte {
	return sshmsg.AppendRecipient(nil, num, recipient)
}
func eof(recipient uint32) []byte     { return short(sshmsg.NumEOF, recipient) }
func closing(recipient uint32) []byte { return short(sshmsg.NumClose, recipient) }
func success(recipient uint32) []byte { return short(sshmsg.NumSuccess, recipient) }
func failure(recipient uint32) []byte { return short(sshmsg.NumFailure, recipient) }
func exitStatus(recipient uint32, status byte) []byte {
	return request(recipient, "exit-status", false, string([]byte{0, 0, 0, status}))
}

var (
	pty            = string(sshmsg.AppendString(nil, "xterm")) + strings.Repeat("\x00\x00\x00\x50", 4) + "\x00\x00\x00\x00"
	execTrue       = string(sshmsg.AppendString(nil, "true"))
	requestSuccess = []byte{sshmsg.NumRequestSuccess}
	requestFailure = []byte{sshmsg.NumRequestFailure}
)

// session opens channel 0 as the client's 40 and the bastion's 70.
func (j *joined) session() {
	j.client.t.Helper()
	j.client.send(open("session", 40, ""))
	j.bastion.want("bastion", open("session", 0, ""))
	j.bastion.send(confirm(0, 70))
	j.client.want("client", confirm(40, 0))
}
