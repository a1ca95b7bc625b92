package transport

import (
	"errors"
	"io"
	"math"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// readSize is the size of a read, in bytes: several packets of 32 KiB.
	readSize = 128 << 10
	// earlyReadSize is the first size of a buffer before authentication.
	earlyReadSize = 4 << 10

	// maxEarlyBytes and maxEarlyPackets bound the input before authentication.
	maxEarlyBytes   = 1 << 20
	maxEarlyPackets = 1024
)

var readBuffers = sync.Pool{New: func() any { return new([readSize]byte) }}

// errEarly is the end of a client that sends much and does not log in.
var errEarly = &ProtocolError{ReasonProtocolError, "too much before authentication"}

// A reader is the incoming half of a Conn. It belongs to the goroutine that calls
// ReadPacket, or to the one that ReadPacket waits for.
type reader struct {
	protection protection
	seq        uint32 // of the next packet
	last       uint32 // of the packet that nextPacket has returned last
	usage      usage

	buf []byte // nil if it would be empty
	// buf[start:end] has been read from the network. Its first lent bytes are
	// the packet whose payload the caller has; size is the size of the packet
	// behind it, or 0 if that is not known yet.
	start, end, lent, size int

	early struct{ packets, bytes int } // before authentication
	err   error                        // of all later calls

	// The method value of try, and its results. They are fields to save an
	// allocation for each read.
	tryRead func(fd uintptr) bool
	n       int
	readErr error

	// opened and openedErr are the results of open that Buffered has got and
	// nextPacket has not returned yet.
	opened    []byte
	openedErr error
	ahead     *readAhead // of Peek
}

// ReadPacket returns the next payload whose message number is 5, 6 or at least
// 50. The slice is not empty, is valid until the next ReadPacket, and may be
// modified. ReadPacket handles all other messages, ping@openssh.com and key exchanges
// itself.
//
// The error is a *[DisconnectError] if the peer disconnected, a *[ProtocolError]
// if it violated the protocol, io.EOF if it closed the connection between two
// packets, io.ErrUnexpectedEOF if within one, and otherwise the net.Conn's.
// Every later call returns the same error.
func (c *Conn) ReadPacket() ([]byte, error) {
	if ahead := c.in.ahead; ahead != nil {
		<-ahead.done
		c.in.ahead = nil
		return ahead.payload, ahead.err
	}
	return c.readPacket()
}

func (c *Conn) readPacket() ([]byte, error) {
	in := &c.in
	for in.err == nil {
		p, err := c.nextPacket()
		if err == nil {
			if forCaller(p[0]) {
				return p, nil
			}
			err = c.handle(p)
		}
		if err != nil {
			c.readFailed(err)
		}
	}
	return nil, in.err
}

// forCaller reports whether ReadPacket returns messages of this number.
func forCaller(number byte) bool {
	return number >= msgFirstOther && number != msgPing && number != msgPong ||
		number == MsgServiceRequest || number == MsgServiceAccept
}

// A readAhead is a packet that Peek reads in the background.
type readAhead struct {
	done    chan struct{}
	payload []byte
	err     error
}

// Peek starts to read the next packet in a goroutine, which ends with the packet or
// with the connection. The channel is closed when the next ReadPacket will not block. It
// is for a reader that waits for other events, too.
func (c *Conn) Peek() <-chan struct{} {
	if c.in.ahead == nil {
		ahead := &readAhead{done: make(chan struct{})}
		c.in.ahead = ahead
		go func() {
			defer close(ahead.done)
			ahead.err = guard(func() (err error) {
				ahead.payload, err = c.readPacket()
				return err
			})
		}()
	}
	return c.in.ahead.done
}

// readFailed makes err the error of all later reads. If err is the peer's fault, it
// sends DISCONNECT.
func (c *Conn) readFailed(err error) {
	c.in.err = err
	c.in.release()
	var violation *ProtocolError
	if errors.As(err, &violation) {
		c.sendDisconnect(violation.Reason, violation.Text)
	}
}

// nextPacket returns the payload of the next packet of any kind. It is valid until
// the next call.
func (c *Conn) nextPacket() ([]byte, error) {
	in := &c.in
	for {
		p, err := in.opened, in.openedErr
		in.opened, in.openedErr = nil, nil
		if p == nil && err == nil {
			p, err = c.open()
		}
		if p == nil && err == nil {
			if err = c.fill(); err == nil {
				continue
			}
		}
		in.last = in.seq - 1
		return p, err
	}
}

// open returns the payload of the next packet, or nil if a part of the packet has not
// been read from the network yet.
func (c *Conn) open() ([]byte, error) {
	in := &c.in
	in.start += in.lent
	in.lent = 0
	loggedIn := c.loggedIn.Load()
	limit := uint32(maxPacketLength)
	if !loggedIn {
		limit = maxEarlyPacketLength
		if in.early.packets > maxEarlyPackets || in.early.bytes > maxEarlyBytes {
			return nil, errEarly
		}
	}
	size, err := in.protection.size(in.buf[in.start:in.end], limit)
	if err != nil {
		return nil, err
	}
	if in.size = size; size == 0 || size > in.end-in.start {
		return nil, nil
	}
	p, err := in.protection.open(in.buf[in.start:in.start+size], in.seq)
	if err != nil {
		return nil, err
	}
	if len(p) > MaxPayload {
		return nil, errPacketLength
	}
	in.lent, in.size = size, 0
	in.seq++
	if !loggedIn {
		in.early.packets++
	}
	in.usage.add(size)
	if in.usage.packets == math.MaxUint32 {
		return nil, &ProtocolError{ReasonProtocolError, "too many packets under one key"}
	}
	if in.usage.exceeds(c.rekeyBytes()) && loggedIn {
		if err := c.Rekey(); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// Buffered reports whether ReadPacket would return without reading from the network:
// with a payload, or with the error of an invalid packet. The slice that ReadPacket has
// returned stays valid. If Buffered returns false, a relay flushes the packets that it
// has written before it reads on.
func (c *Conn) Buffered() bool {
	in := &c.in
	switch {
	case in.ahead != nil:
		select {
		case <-in.ahead.done:
			return true
		default:
			return false
		}
	case in.err != nil:
		return true
	case in.opened == nil && in.openedErr == nil:
		in.opened, in.openedErr = c.open()
	}
	// Behind a message that is not for the caller may be none, so return false.
	return in.openedErr != nil || in.opened != nil && forCaller(in.opened[0])
}

// fill reads at least one byte from the network. The caller of ReadPacket has no packet
// any more.
func (c *Conn) fill() error {
	in := &c.in
	c.makeRoom()
	if c.raw == nil {
		if in.buf == nil {
			in.take(c.loggedIn.Load())
		}
		in.n, in.readErr = c.nc.Read(in.buf[in.end:])
		if in.n > 0 {
			in.readErr = nil // the next read returns it again
		}
	} else if err := c.raw.Read(in.tryRead); err != nil {
		return err
	}
	if in.readErr == io.EOF {
		in.readErr = nil
	}
	switch {
	case in.readErr != nil:
		return in.readErr
	case in.n == 0 && in.end > in.start:
		return io.ErrUnexpectedEOF
	case in.n == 0:
		return io.EOF
	}
	in.end += in.n
	if !c.loggedIn.Load() {
		in.early.bytes += in.n
	}
	c.received.Add(uint64(in.n))
	return nil
}

// try reads without blocking. If no byte can be read, it returns false, so that the
// goroutine waits, and releases the buffer unless that holds the beginning of a packet.
func (c *Conn) try(fd uintptr) (done bool) {
	in := &c.in
	if in.buf == nil {
		in.take(c.loggedIn.Load())
	}
	for {
		in.n, in.readErr = rawRead(fd, in.buf[in.end:])
		if in.readErr != unix.EINTR {
			break
		}
	}
	if in.readErr == unix.EAGAIN {
		if in.start == in.end {
			in.release()
		}
		return false
	}
	if in.readErr != nil {
		in.n, in.readErr = 0, os.NewSyscallError("read", in.readErr)
	}
	return true
}

// makeRoom makes room in the buffer for the rest of the packet that buf[start:] begins
// with, and for packets behind it.
func (c *Conn) makeRoom() {
	in := &c.in
	if in.buf == nil {
		return
	}
	switch {
	case in.start == in.end:
		in.start, in.end = 0, 0
		if len(in.buf) != readSize && c.loggedIn.Load() {
			in.release() // it was for a long packet, or is from before the login
		}
	case in.size > len(in.buf):
		longer := make([]byte, in.size)
		in.end = copy(longer, in.buf[in.start:in.end])
		in.start = 0
		in.recycle()
		in.buf = longer
	case in.start > 0 && (in.size > len(in.buf)-in.start || len(in.buf)-in.end < len(in.buf)/2):
		in.end = copy(in.buf, in.buf[in.start:in.end])
		in.start = 0
	}
}

// take gets a buffer.
func (in *reader) take(loggedIn bool) {
	in.start, in.end = 0, 0
	if loggedIn {
		in.buf = readBuffers.Get().(*[readSize]byte)[:]
	} else {
		in.buf = make([]byte, earlyReadSize)
	}
}

// release returns the buffer to the pool. Its content is not needed any more.
func (in *reader) release() {
	in.recycle()
	in.buf, in.start, in.end, in.lent = nil, 0, 0, 0
}

func (in *reader) recycle() {
	if len(in.buf) == readSize {
		readBuffers.Put((*[readSize]byte)(in.buf))
	}
}

// A usage counts the packets and bytes that one key has protected.
type usage struct{ packets, bytes uint64 }

func (u *usage) add(size int) {
	u.packets++
	u.bytes += uint64(size)
}

// maxPackets is the number of packets after which this side starts a key exchange (RFC
// 4344 section 3.1), long before sequence numbers repeat.
const maxPackets = 1 << 31

func (u *usage) exceeds(bytes uint64) bool { return u.bytes >= bytes || u.packets >= maxPackets }

// ReadError returns the error of the last ReadPacket, or of Peek's if that is done. It
// returns nil while Peek's packet has not come.
func (c *Conn) ReadError() error {
	if ahead := c.in.ahead; ahead != nil {
		select {
		case <-ahead.done:
			return ahead.err
		default:
			return nil
		}
	}
	return c.in.err
}
