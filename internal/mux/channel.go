package mux

import (
	"io"
	"iter"
	"math"
	"sync"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// A Channel is an open channel. Read, Write and CloseWrite are of its data;
// [Channel.Stderr] is its extended data of type stderr. Any goroutine may call any
// method.
type Channel struct {
	c         *Conn
	number    uint32 // ours
	peer      uint32 // the peer's
	maxPacket int    // of data in a packet to the peer
	window    int    // initial receive window

	mu      sync.Mutex
	changed sync.Cond // broadcast when a field below changes

	sendWindow int64 // bytes that this side may send

	in, inStderr buffer
	direct       directWriter // of a WriteTo that waits for data; else nil
	directBytes  int64        // written to it
	received     int          // bytes consumed since the last window adjustment
	left         int          // bytes that the peer may still send; negative within the grace

	requests     []*Request  // unread, oldest first
	requestBytes int         // of requests
	replies      []chan bool // that the peer owes, oldest first

	sentEOF, sentClose bool
	gotEOF, gotClose   bool       // also set when the connection has ended
	gone               bool       // the connection has ended
	opening            chan error // gets the answer to OpenChannel; nil once it has
}

func newChannel(c *Conn, window int) *Channel {
	ch := &Channel{c: c, window: window, left: window}
	ch.changed.L = &ch.mu
	return ch
}

// lateWindowAdjust drops a window adjustment for a channel that its sender has closed, as
// OpenSSH does. Apache MINA sends one if a key exchange has delayed it.
func lateWindowAdjust(packet []byte) error {
	if _, err := sshmsg.ParseWindowAdjust(packet); err != nil {
		return violation("malformed window adjustment")
	}
	return nil
}

// handle handles a message of the peer.
func (ch *Channel) handle(packet []byte) error {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	switch {
	case ch.opening != nil:
		return violation("message on a channel that is not open")
	case ch.gotClose && packet[0] == sshmsg.NumWindowAdjust:
		return lateWindowAdjust(packet)
	case ch.gotClose:
		return violation("message on a closed channel")
	}
	switch packet[0] {
	case sshmsg.NumEOF, sshmsg.NumClose, sshmsg.NumSuccess, sshmsg.NumFailure:
		if _, err := sshmsg.ParseRecipient(packet); err != nil {
			return violation("malformed channel message")
		}
	}
	switch packet[0] {
	case sshmsg.NumData, sshmsg.NumExtendedData:
		m, err := sshmsg.ParseData(packet)
		if err != nil {
			return violation("malformed channel data")
		}
		if ch.left -= len(m.Data); ch.left < -ch.window/windowGrace {
			return violation("data beyond the window")
		}
		switch {
		case ch.gotEOF || ch.sentClose, m.Extended && m.Code != sshmsg.Stderr:
			ch.consumed(len(m.Data)) // dropped
		case m.Extended:
			ch.inStderr.add(m.Data)
		default:
			rest := ch.writeDirect(m.Data)
			if len(rest) == 0 {
				return nil // nothing has changed for a goroutine that waits
			}
			ch.in.add(rest)
		}
	case sshmsg.NumWindowAdjust:
		m, err := sshmsg.ParseWindowAdjust(packet)
		if err != nil {
			return violation("malformed window adjustment")
		}
		if ch.sendWindow += int64(m.Bytes); ch.sendWindow > math.MaxUint32 {
			return violation("window beyond 2^32-1 bytes") // RFC 4254, section 5.2
		}
	case sshmsg.NumRequest:
		m, err := sshmsg.ParseRequest(packet)
		if err != nil {
			return violation("malformed channel request")
		}
		req := &Request{Type: m.Type, WantReply: m.WantReply, Payload: append([]byte(nil), m.Payload...), conn: ch.c, ch: ch}
		if ch.requestBytes += req.size(); len(ch.requests) >= requestsMax || ch.requestBytes > requestBytesMax {
			return violation("too many channel requests")
		}
		ch.requests = append(ch.requests, req)
	case sshmsg.NumSuccess, sshmsg.NumFailure:
		if len(ch.replies) > 0 {
			ch.replies[0] <- packet[0] == sshmsg.NumSuccess
			ch.replies = ch.replies[1:]
		}
	case sshmsg.NumEOF:
		ch.gotEOF = true
	case sshmsg.NumClose:
		ch.gotEOF, ch.gotClose = true, true
		ch.endReplies()
		ch.sendCloseLocked()
		ch.c.remove(ch)
	}
	ch.changed.Broadcast()
	return nil
}

// endReplies tells callers of SendRequest that no reply comes.
func (ch *Channel) endReplies() {
	for _, waiting := range ch.replies {
		close(waiting)
	}
	ch.replies = nil
}

// connectionEnded unblocks all calls.
func (ch *Channel) connectionEnded() {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ch.gotEOF, ch.gotClose, ch.gone = true, true, true
	ch.endReplies()
	if ch.opening != nil {
		ch.opening <- ErrClosed
		ch.opening = nil
	}
	ch.changed.Broadcast()
}

// consumed counts data that has been read, and adjusts the peer's window once an eighth
// of the initial one has been read, because an adjustment for each packet would cost
// more than the packet.
func (ch *Channel) consumed(n int) {
	if ch.received += n; ch.received < ch.window/8 || ch.gotEOF || ch.sentClose {
		return
	}
	ch.c.t.WritePacket(sshmsg.WindowAdjust{Recipient: ch.peer, Bytes: uint32(ch.received)}.Append(nil))
	ch.c.t.Flush()
	ch.left += ch.received
	ch.received = 0
}

// Read reads data. After the last byte it returns io.EOF, if the peer has sent EOF or
// closed the channel, or the connection has ended.
func (ch *Channel) Read(p []byte) (int, error) { return ch.read(&ch.in, p) }

func (ch *Channel) read(b *buffer, p []byte) (int, error) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	for b.empty() && !ch.gotEOF {
		ch.changed.Wait()
	}
	n := b.read(p)
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	ch.consumed(n)
	return n, nil
}

// A directWriter can write without waiting. TryWrite returns how many bytes it has
// written: less than all of p if it would have to wait, or has failed.
type directWriter interface{ TryWrite(p []byte) (n int) }

// writeDirect writes data to the directWriter, if no other data comes before it, and
// returns the rest.
func (ch *Channel) writeDirect(data []byte) (rest []byte) {
	if ch.direct == nil || !ch.in.empty() {
		return data
	}
	n := ch.direct.TryWrite(data)
	ch.directBytes += int64(n)
	ch.consumed(n)
	return data[n:]
}

// WriteTo implements [io.WriterTo]: it writes data to w, without another copy, until
// Read would return io.EOF. While it waits for data, [Conn.Serve] writes to a w that has
// a method TryWrite, which spares a keystroke the way through another goroutine.
func (ch *Channel) WriteTo(w io.Writer) (total int64, err error) {
	direct, _ := w.(directWriter)
	for {
		ch.mu.Lock()
		for ch.in.empty() && !ch.gotEOF {
			ch.direct = direct
			ch.changed.Wait()
		}
		total += ch.directBytes
		ch.direct, ch.directBytes = nil, 0
		chunk := ch.in.take()
		ch.mu.Unlock()
		if chunk == nil {
			return total, nil
		}
		n, err := w.Write(*chunk)
		total += int64(n)
		ch.mu.Lock()
		ch.consumed(len(*chunk))
		ch.mu.Unlock()
		recycle(chunk)
		if err != nil {
			return total, err
		}
	}
}

// Write sends data. It blocks while the peer's window is used up or queueMax bytes are
// queued for the network. The error is io.EOF if the channel is closed or CloseWrite was
// called.
func (ch *Channel) Write(p []byte) (int, error) { return ch.write(p, false) }

func (ch *Channel) write(p []byte, stderr bool) (written int, err error) {
	buf := packets.Get().(*[]byte)
	defer packets.Put(buf)
	for len(p) > 0 {
		if err := ch.c.t.WaitWritable(queueMax); err != nil {
			return written, err
		}
		n, err := ch.writePacket(buf, p, stderr)
		written += n
		if err != nil {
			return written, err
		}
		p = p[n:]
	}
	return written, ch.c.t.Flush()
}

var packets = sync.Pool{New: func() any { b := make([]byte, 0, MaxPacket+64); return &b }}

// writePacket sends one packet of data. It waits until the window has room.
func (ch *Channel) writePacket(buf *[]byte, p []byte, stderr bool) (int, error) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	for first := true; ch.sendWindow <= 0 && !ch.closedForWriting(); first = false {
		if first {
			ch.c.t.Flush()
		}
		ch.changed.Wait()
	}
	if ch.closedForWriting() {
		return 0, io.EOF
	}
	n := min(len(p), int(min(ch.sendWindow, MaxPacket)), max(ch.maxPacket, 1))
	ch.sendWindow -= int64(n)
	*buf = sshmsg.Data{Recipient: ch.peer, Extended: stderr, Code: sshmsg.Stderr, Data: p[:n]}.Append((*buf)[:0])
	// With mu held, so that no EOF is sent before it.
	return n, ch.c.t.WritePacket(*buf)
}

func (ch *Channel) closedForWriting() bool { return ch.sentEOF || ch.sentClose || ch.gotClose }

// CloseWrite sends EOF (RFC 4254, section 5.3).
func (ch *Channel) CloseWrite() error {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.closedForWriting() {
		return io.EOF
	}
	ch.sentEOF = true
	ch.changed.Broadcast()
	return ch.c.send(sshmsg.AppendRecipient(nil, sshmsg.NumEOF, ch.peer))
}

// Close closes the channel. Data that has come may still be read.
func (ch *Channel) Close() error {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.sentClose || ch.gone {
		return io.EOF
	}
	return ch.sendCloseLocked()
}

func (ch *Channel) sendCloseLocked() error {
	if ch.sentClose {
		return nil
	}
	ch.sentClose = true
	ch.changed.Broadcast()
	return ch.c.send(sshmsg.AppendRecipient(nil, sshmsg.NumClose, ch.peer))
}

// Requests yields the peer's requests on the channel, in their order. It waits for the
// next one until the peer has closed the channel. Only one goroutine may range over it.
func (ch *Channel) Requests() iter.Seq[*Request] {
	return func(yield func(*Request) bool) {
		for {
			ch.mu.Lock()
			for len(ch.requests) == 0 && !ch.gotClose {
				ch.changed.Wait()
			}
			if len(ch.requests) == 0 {
				ch.mu.Unlock()
				return
			}
			req := ch.requests[0]
			ch.requests = ch.requests[1:]
			ch.requestBytes -= req.size()
			ch.mu.Unlock()
			if !yield(req) {
				return
			}
		}
	}
}

// SendRequest sends a request on the channel (RFC 4254, section 5.4). If wantReply is
// set, it waits for the reply.
func (ch *Channel) SendRequest(kind string, wantReply bool, payload []byte) (bool, error) {
	if !wantReply {
		return false, ch.send(sshmsg.NumRequest, &sshmsg.Request{Type: kind, Payload: payload})
	}
	waiting := make(chan bool, 1)
	ch.mu.Lock()
	if ch.sentClose || ch.gotClose || len(ch.replies) >= requestsMax {
		ch.mu.Unlock()
		return false, io.EOF
	}
	ch.replies = append(ch.replies, waiting)
	err := ch.c.send(sshmsg.Request{Recipient: ch.peer, Type: kind, WantReply: true, Payload: payload}.Append(nil))
	ch.mu.Unlock()
	if err != nil {
		return false, err
	}
	ok, answered := <-waiting
	if !answered {
		return false, io.EOF
	}
	return ok, nil
}

// send sends a request or a reply, unless the channel is closed.
func (ch *Channel) send(num byte, req *sshmsg.Request) error {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.sentClose || ch.gone {
		return io.EOF
	}
	if req != nil {
		req.Recipient = ch.peer
		return ch.c.send(req.Append(nil))
	}
	return ch.c.send(sshmsg.AppendRecipient(nil, num, ch.peer))
}

// Stderr returns the channel's extended data of type stderr (RFC 4254, section
// 5.2). CloseWrite ends it as well.
func (ch *Channel) Stderr() io.ReadWriter { return extended{ch} }

type extended struct{ ch *Channel }

func (e extended) Read(p []byte) (int, error)  { return e.ch.read(&e.ch.inStderr, p) }
func (e extended) Write(p []byte) (int, error) { return e.ch.write(p, true) }
