package agent

import (
	"io"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// bufferSize is the maximum of one read, which is the capacity of a pipe.
const bufferSize = 64 << 10

// buffers are taken only while there is data to copy, so that idle sessions and forwards have
// none.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// copyFrom copies from a pipe, terminal or socket to w until EOF (nil), or an error of
// either. It takes a buffer only when there is data to read.
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

// copyRest copies the data that can be read from r without blocking to w. It ignores r's
// deadline.
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
