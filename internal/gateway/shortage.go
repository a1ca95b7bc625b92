package gateway

import (
	"errors"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// isShortage reports whether err is caused by a lack of descriptors, memory, processes
// or ports on this machine, which may be free again soon.
func isShortage(err error) bool {
	for _, want := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.EAGAIN, syscall.EADDRNOTAVAIL} {
		if errors.Is(err, want) {
			return true
		}
	}
	return false
}

// shortageInterval is the interval of accepts and log lines while a listener is out of
// descriptors.
const shortageInterval = time.Second

// A spareFile reserves one descriptor of a listener. When descriptors run out, it is
// closed to accept one connection and reject it with a message. Otherwise clients
// would wait in the kernel's queue without an answer.
type spareFile struct{ file *os.File }

// open opens the descriptor, if there is one.
func (s *spareFile) open() {
	if s.file == nil {
		s.file, _ = os.Open(os.DevNull)
	}
}

func (s *spareFile) close() {
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// rejectOne accepts one connection from ln and rejects it with busyMessage. It waits
// for a connection for shortageInterval at most. It reports false if it cannot accept.
func (s *Server) rejectOne(ln net.Listener, spare *spareFile) bool {
	timed, ok := ln.(interface{ SetDeadline(time.Time) error })
	if !ok || spare.file == nil {
		return false
	}
	spare.close()
	defer spare.open()
	timed.SetDeadline(time.Now().Add(shortageInterval))
	defer timed.SetDeadline(time.Time{})
	nc, err := ln.Accept()
	if err != nil {
		return errors.Is(err, os.ErrDeadlineExceeded)
	}
	c := s.newConn(nc)
	s.counters.rejected[rejectedShortage].Add(1)
	defer c.closeOnPanic(nc)
	c.reject(nc, transport.ReasonServiceNotAvailable, busyMessage)
	return true
}
