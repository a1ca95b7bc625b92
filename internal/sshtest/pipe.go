// Package sshtest is for tests only.
package sshtest

import (
	"bytes"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// room is how much one direction holds before writes wait.
const room = 256 << 10

// Pipe is [net.Pipe] with room to write, since both ends of an SSH connection
// begin by writing. It works under synctest: time in it is that of the bubble.
func Pipe() (net.Conn, net.Conn) {
	a, b := newBuffer(), newBuffer()
	return &pipeEnd{in: a, out: b}, &pipeEnd{in: b, out: a}
}

type buffer struct {
	mu       sync.Mutex
	changed  *sync.Cond
	data     bytes.Buffer
	closed   bool
	deadline *time.Timer
	expired  bool
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
	for b.data.Len() == 0 && !b.closed && !b.expired {
		b.changed.Wait()
	}
	if b.expired {
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
	for b.data.Len() > room && !b.closed {
		b.changed.Wait()
	}
	if b.closed {
		return 0, io.ErrClosedPipe
	}
	b.changed.Broadcast()
	return b.data.Write(data)
}

func (p *pipeEnd) Close() error {
	p.SetDeadline(time.Time{})
	for _, b := range []*buffer{p.in, p.out} {
		b.mu.Lock()
		b.closed = true
		b.changed.Broadcast()
		b.mu.Unlock()
	}
	return nil
}

// SetDeadline works for reads, and for deadlines in the future.
func (p *pipeEnd) SetDeadline(when time.Time) error {
	b := p.in
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.deadline != nil {
		b.deadline.Stop()
	}
	b.deadline, b.expired = nil, false
	if !when.IsZero() {
		b.deadline = time.AfterFunc(time.Until(when), func() {
			b.mu.Lock()
			b.expired = true
			b.changed.Broadcast()
			b.mu.Unlock()
		})
	}
	return nil
}

func (p *pipeEnd) SetReadDeadline(when time.Time) error { return p.SetDeadline(when) }
func (p *pipeEnd) SetWriteDeadline(time.Time) error     { return nil }
func (p *pipeEnd) LocalAddr() net.Addr                  { return pipeAddr{} }
func (p *pipeEnd) RemoteAddr() net.Addr                 { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }
