package sshtest

import (
	"bytes"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// pipeBuffer is how many bytes one direction holds before writes block.
const pipeBuffer = 256 << 10

// Pipe is [net.Pipe] with a buffer in each direction: both ends of an SSH connection
// begin by writing. It works in a synctest bubble and uses the clock of the bubble.
func Pipe() (net.Conn, net.Conn) {
	a, b := newBuffer(), newBuffer()
	return &pipeEnd{in: a, out: b}, &pipeEnd{in: b, out: a}
}

// TCPPipe returns both ends of a TCP connection on the loopback interface. They are
// closed at the end of the test.
func TCPPipe(t testing.TB) (client, server net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if client, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

type buffer struct {
	mu            sync.Mutex
	changed       *sync.Cond
	data          bytes.Buffer
	closed        bool
	reads, writes deadline
}

// A deadline is guarded by the buffer's mu.
type deadline struct {
	timer   *time.Timer
	expired bool
}

func newBuffer() *buffer {
	b := &buffer{}
	b.changed = sync.NewCond(&b.mu)
	return b
}

type pipeEnd struct{ in, out *buffer }

func (p *pipeEnd) Read(data []byte) (int, error) {
	b := p.in
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.data.Len() == 0 && !b.closed && !b.reads.expired {
		b.changed.Wait()
	}
	if b.reads.expired {
		return 0, os.ErrDeadlineExceeded
	}
	if b.data.Len() == 0 {
		return 0, io.EOF
	}
	b.changed.Broadcast()
	return b.data.Read(data)
}

func (p *pipeEnd) Write(data []byte) (int, error) {
	b := p.out
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.data.Len() > pipeBuffer && !b.closed && !b.writes.expired {
		b.changed.Wait()
	}
	if b.closed {
		return 0, io.ErrClosedPipe
	}
	if b.writes.expired {
		return 0, os.ErrDeadlineExceeded
	}
	b.changed.Broadcast()
	return b.data.Write(data)
}

func (p *pipeEnd) Close() error {
	p.SetReadDeadline(time.Time{})
	p.SetWriteDeadline(time.Time{})
	for _, b := range []*buffer{p.in, p.out} {
		b.mu.Lock()
		b.closed = true
		b.changed.Broadcast()
		b.mu.Unlock()
	}
	return nil
}

// SetDeadline sets the deadline of reads only.
func (p *pipeEnd) SetDeadline(when time.Time) error { return p.SetReadDeadline(when) }

func (p *pipeEnd) SetReadDeadline(when time.Time) error {
	p.in.expire(&p.in.reads, when)
	return nil
}

func (p *pipeEnd) SetWriteDeadline(when time.Time) error {
	p.out.expire(&p.out.writes, when)
	return nil
}

// expire sets a deadline of the buffer; zero means none.
func (b *buffer) expire(d *deadline, when time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
	}
	d.timer, d.expired = nil, false
	if !when.IsZero() {
		d.timer = time.AfterFunc(time.Until(when), func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			d.expired = true
			b.changed.Broadcast()
		})
	}
}

func (p *pipeEnd) LocalAddr() net.Addr  { return pipeAddr{} }
func (p *pipeEnd) RemoteAddr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }

// A Listener accepts connections in memory. It works in a synctest bubble.
type Listener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

// NewListener returns a listener for [Listener.Dial].
func NewListener() *Listener {
	return &Listener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

// Dial returns the client's end of a [Pipe] when the other end has been accepted. If
// the listener is closed, the error is [net.ErrClosed].
func (l *Listener) Dial() (net.Conn, error) {
	client, server := Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Accept implements [net.Listener].
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener]. It may be called more than once.
func (l *Listener) Close() error { l.once.Do(func() { close(l.closed) }); return nil }

// Addr implements [net.Listener].
func (l *Listener) Addr() net.Addr { return pipeAddr{} }
