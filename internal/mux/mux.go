// Package mux is an endpoint of the SSH connection protocol (RFC 4254), over a
// connection that has logged in: it opens and accepts channels, moves their data,
// and sends and answers requests. The agent and the console are such endpoints. The
// gateway's relay, which joins two connections, is not.
//
// # Goroutines and order
//
// [Conn.Serve] reads the connection. It calls back for global requests and for
// channels that the peer opens, one at a time and in the order in which they came.
// Data and requests of a channel are queued for the channel: data up to the window
// that the peer was given, requests up to a limit beyond which the peer has violated
// the protocol. So a channel that is not read does not block the others.
//
// # Reading the package
//
//	mux.go      the connection: reading, global requests, opening channels
//	channel.go  a channel: data, windows, requests, its end
//	buffer.go   data that has not been read
package mux

import (
	"errors"
	"fmt"
	"sync"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// A Transport carries packets; *transport.Conn is one.
type Transport interface {
	// ReadPacket returns the next packet, which is valid until the next call.
	ReadPacket() ([]byte, error)
	// WritePacket queues a copy of a packet and does not block.
	WritePacket(p []byte) error
	// Flush sends what is queued, and does not block.
	Flush() error
	// WaitWritable blocks while more than bound bytes are queued.
	WaitWritable(bound int) error
	// Unimplemented answers the packet last read with UNIMPLEMENTED.
	Unimplemented() error
	// Disconnect sends DISCONNECT and closes.
	Disconnect(reason uint32, text string) error
	// Close closes the connection and unblocks the other methods.
	Close() error
}

const (
	// MaxPacket is the maximum of data, in bytes, in a packet that this side
	// receives (RFC 4253, section 6.1).
	MaxPacket = 32 << 10
	// DefaultWindow is the default of a channel's initial receive window, in
	// bytes; it is OpenSSH's.
	DefaultWindow = 2 << 20

	// windowGrace is the part of its initial window, a tenth, by which a peer may
	// exceed a window before it is disconnected, as with current versions of
	// OpenSSH.
	windowGrace = 10

	// requestsMax limits the requests that wait on a channel, and the requests to
	// the peer that are unanswered. requestBytesMax limits the bytes of the
	// requests that wait on a channel.
	requestsMax     = 1024
	requestBytesMax = 1 << 20
	// queueMax is how many bytes may be queued for the network before writers of
	// data block.
	queueMax = 256 << 10

	reasonProtocolError = 2 // RFC 4253, section 11.1
)

// A Conn is one end of a connection. See [New].
type Conn struct {
	t Transport

	mu       sync.Mutex
	channels []*Channel    // by our number; nil where it is free
	max      int           // of channels
	replies  []chan reply  // that the peer owes to global requests, oldest first
	err      error         // why the connection has ended; nil before
	done     chan struct{} // closed when it has ended
}

// A reply is the peer's to a global request.
type reply struct {
	ok      bool
	payload []byte
}

// New returns the end of a connection; the caller then calls Serve. At most
// maxChannels may be open at once, of both sides together. The peer's are rejected
// beyond that.
func New(t Transport, maxChannels int) *Conn {
	return &Conn{t: t, max: maxChannels, done: make(chan struct{})}
}

// ErrClosed is the error of calls on a connection or channel that has ended.
var ErrClosed = errors.New("mux: closed")

// A violation says how a message of the peer violates the protocol. It ends the
// connection, with DISCONNECT.
type violation string

func (v violation) Error() string { return string(v) }

// Serve reads and handles packets until the connection ends, and returns the reason,
// [io.EOF] if the peer closed it. It calls global and open one at a time, and reads
// nothing meanwhile, so they must not block for long. The callee, or a later call,
// replies to every request that wants a reply, and accepts or rejects every channel.
func (c *Conn) Serve(global func(*Request), open func(*NewChannel)) (err error) {
	defer func() { c.end(err) }()
	for {
		packet, err := c.t.ReadPacket()
		if err != nil {
			return err
		}
		if err := c.handle(packet, global, open); err != nil {
			var bad violation
			if errors.As(err, &bad) {
				c.t.Disconnect(reasonProtocolError, err.Error())
			}
			return err
		}
	}
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Close closes the connection. Serve returns.
func (c *Conn) Close() error { return c.t.Close() }

// end notes why the connection has ended, and unblocks all calls.
func (c *Conn) end(err error) {
	c.t.Close()
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	if c.err = err; err == nil {
		c.err = ErrClosed // Serve panics
	}
	close(c.done)
	for _, waiting := range c.replies {
		close(waiting)
	}
	c.replies = nil
	channels := c.channels
	c.channels = nil
	c.mu.Unlock()
	for _, ch := range channels {
		if ch != nil {
			ch.connectionEnded()
		}
	}
}

func (c *Conn) handle(packet []byte, global func(*Request), open func(*NewChannel)) error {
	if len(packet) == 0 {
		return violation("empty packet")
	}
	switch packet[0] {
	case sshmsg.NumGlobalRequest:
		m, err := sshmsg.ParseGlobalRequest(packet)
		if err != nil {
			return violation("malformed global request")
		}
		global(&Request{Type: m.Type, WantReply: m.WantReply, Payload: append([]byte(nil), m.Payload...), conn: c})
		return nil
	case sshmsg.NumRequestSuccess, sshmsg.NumRequestFailure:
		c.mu.Lock()
		defer c.mu.Unlock()
		if len(c.replies) > 0 {
			c.replies[0] <- reply{packet[0] == sshmsg.NumRequestSuccess, append([]byte(nil), packet[1:]...)}
			c.replies = c.replies[1:]
		}
		return nil
	case sshmsg.NumOpen:
		return c.opened(packet, open)
	case sshmsg.NumOpenConfirm:
		m, err := sshmsg.ParseOpenConfirm(packet)
		if err != nil {
			return violation("malformed channel open confirmation")
		}
		return c.answered(m.Recipient, m, nil)
	case sshmsg.NumOpenFailure:
		m, err := sshmsg.ParseOpenFailure(packet)
		if err != nil {
			return violation("malformed channel open failure")
		}
		return c.answered(m.Recipient, sshmsg.OpenConfirm{}, &OpenError{m.Reason, m.Description})
	case sshmsg.NumWindowAdjust, sshmsg.NumData, sshmsg.NumExtendedData, sshmsg.NumEOF, sshmsg.NumClose,
		sshmsg.NumRequest, sshmsg.NumSuccess, sshmsg.NumFailure:
		n, err := sshmsg.Recipient(packet)
		if err != nil {
			return violation("malformed channel message")
		}
		if ch := c.channel(n); ch != nil {
			return ch.handle(packet)
		}
		if packet[0] == sshmsg.NumWindowAdjust {
			return lateWindowAdjust(packet)
		}
		return violation("unknown channel")
	}
	return c.t.Unimplemented()
}

func (c *Conn) channel(n uint32) *Channel {
	c.mu.Lock()
	defer c.mu.Unlock()
	if uint64(n) >= uint64(len(c.channels)) {
		return nil
	}
	return c.channels[n]
}

// add gives a channel a number. It returns false if there are too many channels or the
// connection has ended.
func (c *Conn) add(ch *Channel) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return false
	}
	for n, other := range c.channels {
		if other == nil {
			ch.number = uint32(n)
			c.channels[n] = ch
			return true
		}
	}
	if len(c.channels) >= c.max {
		return false
	}
	ch.number = uint32(len(c.channels))
	c.channels = append(c.channels, ch)
	return true
}

func (c *Conn) remove(ch *Channel) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.channels != nil {
		c.channels[ch.number] = nil
	}
}

// send writes packets and flushes.
func (c *Conn) send(packets ...[]byte) error {
	for _, p := range packets {
		if err := c.t.WritePacket(p); err != nil {
			return err
		}
	}
	return c.t.Flush()
}

// SendRequest sends a global request (RFC 4254, section 4). If wantReply is set, it
// waits for the reply, and returns its payload as answer.
func (c *Conn) SendRequest(kind string, wantReply bool, payload []byte) (ok bool, answer []byte, err error) {
	packet := sshmsg.GlobalRequest{Type: kind, WantReply: wantReply, Payload: payload}.Append(nil)
	if !wantReply {
		return false, nil, c.send(packet)
	}
	waiting := make(chan reply, 1)
	c.mu.Lock()
	if c.err != nil || len(c.replies) >= requestsMax {
		c.mu.Unlock()
		return false, nil, ErrClosed
	}
	c.replies = append(c.replies, waiting)
	err = c.t.WritePacket(packet) // with mu held, because replies come in the order of requests
	c.mu.Unlock()
	c.t.Flush()
	if err != nil {
		return false, nil, err
	}
	r, answered := <-waiting
	if !answered {
		return false, nil, ErrClosed
	}
	return r.ok, r.payload, nil
}

// An OpenError is the peer's refusal of a channel (RFC 4254, section 5.1).
type OpenError struct {
	Reason  uint32 // sshmsg.Prohibited and so on
	Message string
}

func (e *OpenError) Error() string {
	return fmt.Sprintf("channel open failed: %s (%d)", e.Message, e.Reason)
}

// OpenChannel opens a channel, and waits for the answer. The error is an *OpenError if
// the peer refuses, and ErrClosed if there are too many channels.
func (c *Conn) OpenChannel(kind string, payload []byte) (*Channel, error) {
	ch := newChannel(c, DefaultWindow)
	answer := make(chan error, 1)
	ch.opening = answer
	if !c.add(ch) {
		return nil, ErrClosed
	}
	err := c.send(sshmsg.Open{Type: kind, Sender: ch.number, Window: DefaultWindow, MaxPacket: MaxPacket, Payload: payload}.Append(nil))
	if err != nil {
		c.remove(ch)
		return nil, err
	}
	if err := <-answer; err != nil {
		return nil, err
	}
	return ch, nil
}

// answered handles the peer's answer to OpenChannel.
func (c *Conn) answered(number uint32, m sshmsg.OpenConfirm, refusal error) error {
	ch := c.channel(number)
	if ch == nil {
		return violation("answer for an unknown channel")
	}
	ch.mu.Lock()
	opening := ch.opening
	ch.opening = nil
	ch.peer, ch.sendWindow, ch.maxPacket = m.Sender, int64(m.Window), int(m.MaxPacket)
	ch.mu.Unlock()
	if opening == nil {
		return violation("answer to no channel open")
	}
	if refusal != nil {
		c.remove(ch)
	}
	opening <- refusal
	return nil
}

// opened handles CHANNEL_OPEN.
func (c *Conn) opened(packet []byte, open func(*NewChannel)) error {
	m, err := sshmsg.ParseOpen(packet)
	if err != nil {
		return violation("malformed channel open")
	}
	open(&NewChannel{Type: m.Type, Payload: append([]byte(nil), m.Payload...), c: c, m: m})
	return nil
}

// A NewChannel is a channel that the peer asks to open.
type NewChannel struct {
	Type    string
	Payload []byte

	c *Conn
	m sshmsg.Open // without the payload, which is Payload
}

// Accept opens the channel with a receive window of so many bytes; zero means
// DefaultWindow. If there are too many channels, Accept rejects it and returns
// ErrClosed.
func (n *NewChannel) Accept(window int) (*Channel, error) {
	if window == 0 {
		window = DefaultWindow
	}
	ch := newChannel(n.c, window)
	ch.peer, ch.sendWindow, ch.maxPacket = n.m.Sender, int64(n.m.Window), int(n.m.MaxPacket)
	if !n.c.add(ch) {
		n.Reject(sshmsg.ResourceShortage, "too many channels")
		return nil, ErrClosed
	}
	return ch, n.c.send(sshmsg.OpenConfirm{Recipient: ch.peer, Sender: ch.number, Window: uint32(window), MaxPacket: MaxPacket}.Append(nil))
}

// Reject refuses the channel. Reason is a constant of package sshmsg.
func (n *NewChannel) Reject(reason uint32, message string) error {
	return n.c.send(sshmsg.OpenFailure{Recipient: n.m.Sender, Reason: reason, Description: message}.Append(nil))
}

// A Request is a request of the peer, global or on a channel.
type Request struct {
	Type      string
	WantReply bool
	Payload   []byte

	conn *Conn
	ch   *Channel // nil for a global request
}

func (r *Request) size() int { return len(r.Type) + len(r.Payload) }

// Reply sends the reply, if the request wants one. Replies must have the order of the
// requests. The payload is for global requests only.
func (r *Request) Reply(ok bool, payload []byte) error {
	switch {
	case !r.WantReply:
		return nil
	case r.ch != nil:
		num := byte(sshmsg.NumFailure)
		if ok {
			num = sshmsg.NumSuccess
		}
		return r.ch.send(num, nil)
	case ok:
		return r.conn.send(append([]byte{sshmsg.NumRequestSuccess}, payload...))
	}
	return r.conn.send([]byte{sshmsg.NumRequestFailure})
}
