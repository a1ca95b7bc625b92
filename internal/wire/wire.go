// Package wire is the byte stream under an SSH connection: it exchanges the
// identification strings, and stands between package ssh and the socket.
package wire

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"
)

// A Conn is a connection to hand to package ssh. It is not slower than the
// socket for a keystroke, and saves system calls when much is moved; idle, it
// holds no buffers.
//
// Package ssh reads and writes each packet in two pieces, with a system call
// for each. A Conn reads all that has arrived and keeps what was not asked for.
// It writes a small piece at once, but puts off one that is likely to be
// followed by another, and a goroutine then writes what has gathered.
type Conn struct {
	net.Conn
	raw syscall.RawConn // nil if there is no file descriptor

	// For ExchangeVersions.
	unread  []byte // of the client's identification, for package ssh
	written []byte // of ours, which package ssh is going to write again

	reader
	writer
	hold     hold
	heard    atomic.Uint64
	received atomic.Int64
}

// New returns a Conn on nc, which it owns from now on.
func New(nc net.Conn) *Conn {
	c := &Conn{Conn: nc}
	if sc, ok := nc.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			c.raw = raw
			c.reader.try = c.tryRead
		}
	}
	c.writer.room.L = &c.writer.mu
	c.hold.over.L = &c.hold.mu
	return c
}

// versionMax is the longest identification string with its CR and LF (RFC 4253,
// section 4.2).
const versionMax = 255

// ErrVersion says that the client is not one of SSH 2. It has been told.
var ErrVersion = errors.New("not an SSH 2 client")

// ExchangeVersions sends the server's identification string and returns the
// client's, both without CR LF (RFC 4253, section 4.2). It blocks until the
// client has sent one; closing c ends that. Package ssh may then be given c and
// the same server version, and will not notice.
func (c *Conn) ExchangeVersions(server string) (client string, err error) {
	c.written = []byte(server + "\r\n")
	if _, err := c.Conn.Write(c.written); err != nil {
		return "", err
	}
	line := make([]byte, 0, versionMax)
	for {
		// A byte at a time: what follows belongs to package ssh. It is one
		// short line for each connection.
		n, err := c.Conn.Read(line[len(line) : len(line)+1])
		if err != nil {
			return "", fmt.Errorf("reading the client's identification: %w", err)
		}
		line = line[:len(line)+n]
		ended := n > 0 && line[len(line)-1] == '\n'
		if prefix := []byte("SSH-"); !bytes.HasPrefix(line, prefix[:min(len(line), len(prefix))]) || !ended && len(line) == versionMax {
			// The words are OpenSSH's; tests and scanners know them.
			c.Conn.Write([]byte("Invalid SSH identification string.\r\n"))
			return "", fmt.Errorf("%w: it began with %q", ErrVersion, line[:min(len(line), 32)])
		}
		if ended {
			break
		}
	}
	client = string(bytes.TrimRight(line, "\r\n"))
	if !bytes.HasPrefix(line, []byte("SSH-2.0-")) && !bytes.HasPrefix(line, []byte("SSH-1.99-")) {
		c.Conn.Write([]byte("Protocol major versions differ.\r\n"))
		return "", fmt.Errorf("%w: it is %q", ErrVersion, client)
	}
	c.unread = line
	return client, nil
}

// Read implements [net.Conn]. Only one goroutine may read.
func (c *Conn) Read(p []byte) (int, error) {
	if len(c.unread) > 0 {
		n := copy(p, c.unread)
		c.unread = c.unread[n:]
		return n, nil
	}
	p, err := c.hold.limit(p)
	if err != nil {
		return 0, err
	}
	n, err := c.read(p)
	if n > 0 {
		c.hold.took(n)
		c.heard.Add(1)
		c.received.Add(int64(n))
	}
	return n, err
}

// Heard grows whenever something has been read. It is for telling a peer that is
// slow from one that is gone.
func (c *Conn) Heard() uint64 { return c.heard.Load() }

// Received returns how many bytes have been read.
func (c *Conn) Received() int64 { return c.received.Load() }

// Write implements [net.Conn]. It may return before p is sent; an error in
// sending it is returned by a later Write. It blocks while much is unsent.
func (c *Conn) Write(p []byte) (int, error) {
	if c.written != nil {
		again := bytes.Equal(p, c.written)
		c.written = nil
		if again {
			return len(p), nil
		}
	}
	c.hold.wrote(p)
	return c.write(p)
}
