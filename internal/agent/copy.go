package agent

import (
	"io"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// bufferSize is what one read takes from a pipe, a terminal or a socket. A
// pipe holds as much.
const bufferSize = 64 << 10

// buffers are lent out only while there are bytes to carry, so that an idle
// session or forward holds none.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// copyFrom copies from a pipe, terminal or socket to w until the end of file
// (nil), or an error of either. It takes a buffer only once there is something
// to read.
func copyFrom(w io.Writer, r syscall.Conn) error {
	raw, err := r.SyscallConn()
	if err != nil {
		return err
	}
	var buf *[bufferSize]byte
	var n int
	var readErr error
	read := func(fd uintptr) bool {
		buf = buffers.Get().(*[bufferSize]byte)
		for {
			n, readErr = unix.Read(int(fd), buf[:])
			if readErr != unix.EINTR {
				break
			}
		}
		if readErr == unix.EAGAIN {
			buffers.Put(buf)
			return false
		}
		return true
	}
	for {
		if err := raw.Read(read); err != nil {
			return err
		}
		if readErr == nil && n > 0 {
			_, readErr = w.Write(buf[:n])
		} else if readErr == nil {
			readErr = io.EOF
		}
		buffers.Put(buf)
		if readErr == io.EOF && n == 0 {
			return nil
		}
		if readErr != nil {
			return readErr
		}
	}
}

// copyRest copies what can be read from r without waiting, whatever r's
// deadline, to w.
func copyRest(w io.Writer, r syscall.Conn) error {
	raw, err := r.SyscallConn()
	if err != nil {
		return err
	}
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	for {
		var n int
		var readErr error
		if err := raw.Control(func(fd uintptr) { n, readErr = unix.Read(int(fd), buf[:]) }); err != nil {
			return err
		}
		if readErr == unix.EINTR {
			continue
		}
		if n <= 0 {
			return readErr
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
	}
}

// copyTo copies from an SSH channel's stream, which cannot say that it has
// bytes without handing them over, until its end (nil) or an error. It waits
// with a small buffer, which suffices for keystrokes, and borrows a big one
// while bytes come in bulk.
func copyTo(w io.Writer, r io.Reader) error {
	small := make([]byte, 512)
	for {
		n, err := r.Read(small)
		if n > 0 {
			if _, werr := w.Write(small[:n]); werr != nil {
				return werr
			}
		}
		if err == nil && n == len(small) {
			err = copyBulk(w, r)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// copyBulk copies until reads get short.
func copyBulk(w io.Writer, r io.Reader) error {
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	for {
		n, err := r.Read(buf[:])
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				return werr
			}
		}
		if err != nil || n < bufferSize/4 {
			return err
		}
	}
}
