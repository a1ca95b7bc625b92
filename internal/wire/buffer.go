package wire

import (
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// readSize is how much is read ahead: four packets of package ssh.
	readSize = 128 << 10
	// unsentMax is how much may be unsent before Write blocks.
	unsentMax = 256 << 10
	// pieceSize is the size of the buffer through which package ssh writes. A
	// write of just this size is the first piece of a packet.
	pieceSize = 4096
	// closeTimeout is how long Close tries to send what is unsent.
	closeTimeout = time.Second
)

var (
	readBuffers  = sync.Pool{New: func() any { return new([readSize]byte) }}
	writeBuffers = sync.Pool{New: func() any { b := make([]byte, 0, unsentMax+pieceSize); return &b }}
)

// A reader reads ahead.
type reader struct {
	ahead []byte          // read, but not asked for yet; in buf
	buf   *[readSize]byte // nil unless ahead is not empty

	// The arguments and results of try, which is made once to save an
	// allocation at each read.
	try  func(fd uintptr) (done bool)
	into [2][]byte
	n    int
	err  error
}

func (c *Conn) read(p []byte) (int, error) {
	r := &c.reader
	if len(r.ahead) > 0 {
		n := copy(p, r.ahead)
		if r.ahead = r.ahead[n:]; len(r.ahead) == 0 {
			r.release()
		}
		return n, nil
	}
	if c.raw == nil || len(p) == 0 {
		return c.Conn.Read(p)
	}
	r.into[0] = p
	err := c.raw.Read(r.try)
	r.into[0] = nil
	switch {
	case err != nil:
		return 0, err
	case r.err != nil:
		return 0, os.NewSyscallError("read", r.err)
	case r.n == 0:
		return 0, io.EOF
	case r.n <= len(p):
		return r.n, nil
	}
	r.ahead = r.buf[:r.n-len(p)]
	return len(p), nil
}

// tryRead reads into the caller's buffer and on into one of ours, unless there
// is nothing to read. So no buffer is held by a connection that waits.
func (c *Conn) tryRead(fd uintptr) (done bool) {
	r := &c.reader
	r.buf = readBuffers.Get().(*[readSize]byte)
	r.into[1] = r.buf[:]
	for {
		r.n, r.err = unix.Readv(int(fd), r.into[:])
		if r.err != unix.EINTR {
			break
		}
	}
	r.into[1] = nil
	if r.err != nil || r.n <= len(r.into[0]) {
		r.release()
	}
	return r.err != unix.EAGAIN
}

func (r *reader) release() {
	readBuffers.Put(r.buf)
	r.buf, r.ahead = nil, nil
}

// A writer gathers what is to be sent.
type writer struct {
	mu      sync.Mutex
	room    sync.Cond // unsent has shrunk, or err was set, or sending ended
	unsent  *[]byte   // nil if there is nothing
	sending bool      // a goroutine is sending
	err     error
}

func (c *Conn) write(p []byte) (int, error) {
	w := &c.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.err == nil && w.unsent != nil && len(*w.unsent)+len(p) > unsentMax {
		w.room.Wait()
	}
	switch {
	case w.err != nil:
		return 0, w.err
	case !w.sending && len(p) != pieceSize:
		// A whole small packet on a quiet line. Sending it here saves a
		// switch of goroutines, which a keystroke would feel.
		n, err := c.Conn.Write(p)
		w.err = err
		return n, err
	}
	if w.unsent == nil {
		w.unsent = writeBuffers.Get().(*[]byte)
	}
	*w.unsent = append(*w.unsent, p...)
	if !w.sending {
		w.sending = true
		go c.send() // ends when all is sent, or the connection is closed
	}
	return len(p), nil
}

// send writes what has gathered until there is no more.
func (c *Conn) send() {
	w := &c.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.unsent != nil && w.err == nil {
		batch := w.unsent
		w.unsent = nil
		w.room.Broadcast()
		w.mu.Unlock()
		_, err := c.Conn.Write(*batch)
		if cap(*batch) <= 2*unsentMax {
			*batch = (*batch)[:0]
			writeBuffers.Put(batch)
		}
		w.mu.Lock()
		w.err = err
	}
	w.sending = false
	w.room.Broadcast()
}

// Close implements [net.Conn]. It sends what is unsent first, for a second at
// most.
func (c *Conn) Close() error {
	w := &c.writer
	c.Conn.SetWriteDeadline(time.Now().Add(closeTimeout)) // also for a Write that is blocked, with w.mu held
	w.mu.Lock()
	for w.sending {
		w.room.Wait()
	}
	if w.err == nil {
		w.err = net.ErrClosed
	}
	w.mu.Unlock()
	err := c.Conn.Close()
	c.hold.close()
	return err
}
