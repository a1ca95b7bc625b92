package transport

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// sendSize is the size of pooled send buffers: room for the packets of one
	// read, sealed again. sealOverhead bounds the bytes of a packet that are not
	// its payload: length, padding and MAC.
	sendSize     = readSize + 8<<10
	sealOverhead = 4 + 1 + 255 + 64
	// heldOverhead is the memory, in bytes, that a payload takes beside its own
	// bytes while it is held back.
	heldOverhead = 64
	// closeTimeout limits the time for which Close sends queued packets.
	closeTimeout = time.Second
	// defaultMaxQueued is Config.MaxQueued's default.
	defaultMaxQueued = 16 << 20
)

var sendBuffers = sync.Pool{New: func() any { b := make([]byte, 0, sendSize); return &b }}

// A writer is the outgoing half of a Conn. Its fields are guarded by mu.
//
// WritePacket seals a packet at once, into the last buffer of out. Flush writes out to
// the socket; if the socket is full, it starts a goroutine, send, which waits for room
// until all is sent. Buffers do not grow, so that a slow peer causes no copies and no
// garbage. During a key exchange, payloads are held back in held, unsealed.
type writer struct {
	mu      sync.Mutex
	changed chan struct{} // closed by broadcast; nil if no goroutine waits

	protection protection
	seq        uint32
	usage      usage

	out      []*[]byte // sealed packets, oldest first; nil if there are none
	outSent  int       // bytes of the first buffer that are sent
	outBytes int       // bytes of all buffers that are not sent
	sender   bool      // send is running

	exchanging bool     // a key exchange is under way, in either direction
	holding    bool     // KEXINIT was sent, and NEWKEYS was not
	held       [][]byte // payloads for after NEWKEYS
	heldBytes  int
	rekeyTimer *time.Timer // starts the next key exchange; nil without Config.RekeyInterval

	sent   uint64
	closed bool
	err    error // returned by all later calls; nil while the connection works
}

// WritePacket puts a payload into the send buffer and returns. It copies payload
// and never waits for the peer. During a key exchange the payload is held back
// until the new keys are in use. Packets are sent in the order of the calls. The
// payload must not be empty, longer than MaxPayload or a message of the transport
// (1 to 49, except 5 and 6).
//
// The packet is sent by the next Flush of any goroutine. The error is the reason for
// which the connection has failed; ReadPacket may return another one.
func (c *Conn) WritePacket(payload []byte) error {
	if len(payload) == 0 || len(payload) > MaxPayload {
		return fmt.Errorf("a payload of %d bytes", len(payload))
	}
	w := &c.out
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	if w.queued()+len(payload) > c.maxQueued() {
		c.failLocked(ErrQueueFull)
		c.nc.Close() // also ends a ReadPacket that waits
		return w.err
	}
	if w.holding {
		w.held = append(w.held, slices.Clone(payload))
		w.heldBytes += len(payload) + heldOverhead
		return nil
	}
	w.seal(payload)
	if w.usage.exceeds(c.rekeyBytes()) && c.loggedIn.Load() {
		c.beginExchangeLocked()
	}
	return w.err
}

// seal puts the packet of payload into out.
func (w *writer) seal(payload []byte) {
	last := w.room(len(payload) + sealOverhead)
	before := len(*last)
	*last = w.protection.seal(*last, w.seq, payload) // it grows if payload is longer than sendSize
	w.seq++
	w.outBytes += len(*last) - before
	w.usage.add(len(*last) - before)
}

// room returns a buffer of out to which n bytes can be appended. The caller adds them to
// outBytes.
func (w *writer) room(n int) *[]byte {
	if len(w.out) > 0 {
		if last := w.out[len(w.out)-1]; cap(*last)-len(*last) >= n {
			return last
		}
	}
	last := sendBuffers.Get().(*[]byte)
	w.out = append(w.out, last)
	return last
}

// unsent returns the bytes to send next. Until taken is called, seal may append to their
// buffer, behind them, and nothing else changes it.
func (w *writer) unsent() []byte { return (*w.out[0])[w.outSent:] }

// taken notes that the kernel has taken n bytes of unsent.
func (w *writer) taken(n int) {
	w.sent += uint64(n)
	w.outSent += n
	w.outBytes -= n
	if w.outSent < len(*w.out[0]) {
		return
	}
	recycle(w.out[0])
	w.outSent = 0
	if w.out = append(w.out[:0], w.out[1:]...); len(w.out) == 0 {
		w.out = nil
	}
}

func recycle(b *[]byte) {
	if cap(*b) == sendSize {
		*b = (*b)[:0]
		sendBuffers.Put(b)
	}
}

func (w *writer) queued() int { return w.outBytes + w.heldBytes }

// Flush sends the packets written so far, with one write(2) if the socket has room. If
// not, Flush returns nil, and a goroutine sends the rest.
func (c *Conn) Flush() error {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.flushLocked()
	return c.out.err
}

// flushLocked is Flush with mu held.
func (c *Conn) flushLocked() {
	w := &c.out
	if w.err != nil || w.sender || w.out == nil {
		return
	}
	for c.raw != nil && w.out != nil {
		rest := w.unsent()
		n, err := c.tryWrite(rest)
		if err != nil {
			c.failLocked(err)
			return
		}
		if w.taken(n); n < len(rest) {
			break
		}
	}
	if w.out == nil {
		w.broadcast()
		return
	}
	w.sender = true
	go c.send() // ends when all is sent, or the net.Conn fails or is closed
}

// tryWrite writes as much of b as the socket has room for.
func (c *Conn) tryWrite(b []byte) (n int, err error) {
	// The callback never asks to wait, so that Write fails only if the
	// deadline has expired or the net.Conn is closed.
	failed := c.raw.Write(func(fd uintptr) bool {
		n, err = write(fd, b)
		return true
	})
	if failed != nil {
		return 0, failed
	}
	if err == unix.EAGAIN {
		return 0, nil
	}
	return n, err
}

// write is write(2). N is not negative.
func write(fd uintptr, b []byte) (int, error) {
	for {
		n, err := rawWrite(fd, b)
		switch {
		case err == nil:
			return n, nil
		case err == unix.EAGAIN:
			return 0, err
		case err != unix.EINTR:
			return 0, os.NewSyscallError("write", err)
		}
	}
}

// send sends out, and the packets that are sealed meanwhile, until there are none.
func (c *Conn) send() {
	w := &c.out
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.out != nil && w.err == nil {
		rest := w.unsent()
		w.mu.Unlock()
		n, err := c.writeSome(rest)
		w.mu.Lock()
		if w.out != nil { // else the connection has failed
			w.taken(n)
		}
		if err != nil {
			c.failLocked(err)
		}
		w.broadcast()
	}
	w.sender = false
	w.broadcast()
}

// writeSome writes at least a part of b, and waits for room if need be.
func (c *Conn) writeSome(b []byte) (n int, err error) {
	if c.raw == nil {
		return c.nc.Write(b)
	}
	failed := c.raw.Write(func(fd uintptr) bool {
		n, err = write(fd, b)
		return err != unix.EAGAIN
	})
	if failed != nil {
		return 0, failed
	}
	return n, err
}

// Queued returns the number of bytes that have been written and that the kernel has not
// taken, with those that a key exchange holds back.
func (c *Conn) Queued() int {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return c.out.queued()
}

// WaitWritable returns at once, without a flush, if at most bound bytes are queued.
// Otherwise it flushes and waits until half of bound is left, so that the caller is not
// woken up for each packet. It is called before data is written; a message that must not
// wait behind data is written without it. The error is WritePacket's.
//
// With a bound of zero it waits until all packets are sent. A peer that does not read
// blocks it until the connection is closed or the write deadline of the net.Conn
// expires.
//
// A goroutine that also reads, from this Conn or another one, must use
// [Conn.WaitWritableUnless].
func (c *Conn) WaitWritable(bound int) error { return c.WaitWritableUnless(bound, nil) }

// WaitWritableUnless is WaitWritable, but also returns nil when unless is closed.
// A relay that reads packets from one Conn and writes them to another calls
//
//	to.WaitWritableUnless(bound, from.Exchanging())
//
// because it must read on if a key exchange begins on from. Until that is over, the peer
// of from may neither read nor write data. If the peer of to waits for the peer of from,
// and the relay waited for the peer of to, all would wait for ever. Meanwhile
// Config.MaxQueued limits the queue.
func (c *Conn) WaitWritableUnless(bound int, unless <-chan struct{}) error {
	w := &c.out
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil || w.queued() <= bound {
		return w.err
	}
	c.flushLocked()
	for w.err == nil && w.queued() > bound/2 {
		changed := w.wait()
		w.mu.Unlock()
		select {
		case <-changed:
			w.mu.Lock()
		case <-unless:
			w.mu.Lock()
			return w.err
		}
	}
	return w.err
}

// wait returns a channel that is closed by the next broadcast.
func (w *writer) wait() <-chan struct{} {
	if w.changed == nil {
		w.changed = make(chan struct{})
	}
	return w.changed
}

// broadcast wakes the goroutines that wait: less is queued, send has ended or err is set.
func (w *writer) broadcast() {
	if w.changed != nil {
		close(w.changed)
		w.changed = nil
	}
}

// failLocked makes err the error of all later writes. Unless the peer has reset the
// connection, it closes the net.Conn, which ends a ReadPacket that waits.
func (c *Conn) failLocked(err error) {
	w := &c.out
	if w.err == nil {
		w.err = err
	}
	// Its buffers are not recycled: send may be writing one.
	w.out, w.outSent, w.outBytes = nil, 0, 0
	w.held, w.heldBytes = nil, 0
	if w.rekeyTimer != nil {
		w.rekeyTimer.Stop()
	}
	w.broadcast()
	if !w.closed && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
		c.nc.Close()
	}
}

// Disconnect sends DISCONNECT (RFC 4253 section 11.1) behind the packets written so
// far, and closes the connection as Close does. Text should be printable
// ASCII.
func (c *Conn) Disconnect(reason uint32, text string) error {
	c.sendDisconnect(reason, text)
	return c.Close()
}

// sendDisconnect may be called at any time, also during a key exchange (RFC 4253
// section 7.1); packets that the key exchange holds back are lost then.
func (c *Conn) sendDisconnect(reason uint32, text string) {
	w := &c.out
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil || w.closed {
		return
	}
	w.seal(marshalDisconnect(reason, text))
	c.flushLocked()
}

// Close sends the packets written so far, for a second at most, and closes the
// net.Conn. Calls that block return net.ErrClosed. It may be called more than
// once.
func (c *Conn) Close() error {
	w := &c.out
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return nil
	}
	c.flushLocked()
	w.closed = true
	late := time.AfterFunc(closeTimeout, func() { c.nc.Close() })
	for w.sender {
		changed := w.wait()
		w.mu.Unlock()
		<-changed
		w.mu.Lock()
	}
	late.Stop()
	c.failLocked(net.ErrClosed)
	w.mu.Unlock()
	return c.nc.Close()
}
