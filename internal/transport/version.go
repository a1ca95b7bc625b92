package transport

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

const (
	defaultVersion = "SSH-2.0-Sallyport"

	// maxVersion is the longest identification string with CR LF (RFC 4253
	// section 4.2).
	maxVersion = 255
	// maxPreamble bounds the lines, in bytes, that a server may send before its
	// identification string.
	maxPreamble = 64 << 10
)

// ErrVersion says that the peer does not speak SSH 2. A client has been told so.
var ErrVersion = errors.New("not an SSH 2 peer")

// sendVersion puts this side's identification string into the send buffer.
func (c *Conn) sendVersion() error {
	version := c.Version()
	if !strings.HasPrefix(version, "SSH-2.0-") || len(version)+2 > maxVersion || strings.ContainsAny(version, "\r\n\x00") {
		return fmt.Errorf("%q cannot be an identification string", version)
	}
	c.sendRaw(version + "\r\n")
	return nil
}

// sendRaw puts text, which is no packet, into the send buffer.
func (c *Conn) sendRaw(text string) {
	w := &c.out
	w.mu.Lock()
	defer w.mu.Unlock()
	last := w.room(len(text))
	*last = append(*last, text...)
	w.outBytes += len(text)
}

// readVersion reads the peer's identification string (RFC 4253 section 4.2). A
// client must begin with it; a server may send other lines first, which are
// ignored.
func (c *Conn) readVersion() error {
	preamble := 0
	for {
		line, err := c.readLine()
		if err != nil {
			return fmt.Errorf("reading the identification string: %w", err)
		}
		if !c.server && !bytes.HasPrefix(line, []byte("SSH-")) {
			if preamble += len(line); preamble > maxPreamble {
				return fmt.Errorf("%w: it began with %q", ErrVersion, line[:min(len(line), 32)])
			}
			continue
		}
		return c.setVersion(line)
	}
}

// setVersion checks the line that should be the peer's identification string, and
// keeps it.
func (c *Conn) setVersion(line []byte) error {
	version := bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r"))
	// The texts are OpenSSH's, because scanners and its tests match them.
	switch {
	case !bytes.HasPrefix(line, []byte("SSH-")), line[len(line)-1] != '\n', bytes.ContainsAny(version, "\r\x00"):
		if c.server {
			c.sendRaw("Invalid SSH identification string.\r\n")
			c.Flush()
		}
		return fmt.Errorf("%w: it began with %q", ErrVersion, line[:min(len(line), 32)])
	case !bytes.HasPrefix(line, []byte("SSH-2.0-")) && !bytes.HasPrefix(line, []byte("SSH-1.99-")):
		c.peerVersion = string(version)
		if c.server {
			c.sendRaw("Protocol major versions differ.\r\n")
			c.Flush()
		}
		return fmt.Errorf("%w: it is %q", ErrVersion, version)
	}
	c.peerVersion = string(version)
	return nil
}

// readLine reads a line, with its LF. If a line is too long, or a client's does not begin
// with SSH-, readLine does not wait for its end and returns the part that has come.
func (c *Conn) readLine() ([]byte, error) {
	in := &c.in
	for {
		b := in.buf[in.start:in.end]
		n := bytes.IndexByte(b, '\n') + 1
		prefix := "SSH-"
		switch {
		case n > maxVersion, n == 0 && len(b) >= maxVersion:
			n = maxVersion
		case n > 0:
		case c.server && !bytes.HasPrefix(b, []byte(prefix)[:min(len(b), len(prefix))]):
			n = len(b)
		}
		if n > 0 {
			in.start += n
			return b[:n], nil
		}
		if err := c.fill(); err != nil {
			return nil, err
		}
	}
}
