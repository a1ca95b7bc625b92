package audit

import (
	"errors"
	"fmt"
	"io"
	"log/syslog"
	"os"
	"syscall"
)

// A file is appended to. Several processes may write to the same one, as they
// do while one gateway drains and its successor is at work already.
type file struct {
	path    string
	f       *os.File
	regular bool
	torn    bool // what was written last is part of a line
}

func openFile(path string) (*file, error) {
	s := &file{path: path}
	return s, s.open()
}

// open opens the file at the path, and puts it in place of the present one.
func (s *file) open() error {
	// Without O_NONBLOCK opening a FIFO might wait for ever.
	f, err := os.OpenFile(s.path, os.O_CREATE|os.O_RDWR|os.O_APPEND|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	if mode := info.Mode(); !mode.IsRegular() && mode&os.ModeCharDevice == 0 {
		f.Close()
		return fmt.Errorf("%s is not a file", s.path)
	}
	torn, err := endsTorn(f, info)
	if err != nil {
		f.Close()
		return err
	}
	if s.f != nil {
		s.f.Close()
	}
	s.f, s.regular, s.torn = f, info.Mode().IsRegular(), torn
	return nil
}

// endsTorn says whether the file ends within a line: a gateway was killed while
// it wrote, or the machine lost its power.
func endsTorn(f *os.File, info os.FileInfo) (bool, error) {
	if !info.Mode().IsRegular() || info.Size() == 0 {
		return false, nil
	}
	var last [1]byte
	if _, err := f.ReadAt(last[:], info.Size()-1); err != nil {
		return false, fmt.Errorf("looking at the end of %s: %w", f.Name(), err)
	}
	return last[0] != '\n', nil
}

func (s *file) write(line []byte) error {
	if s.torn {
		line = append([]byte{'\n'}, line...)
	}
	// Held so that nobody appends between the write and the cut below.
	if s.regular {
		if err := flock(s.f, syscall.LOCK_EX); err != nil {
			return err
		}
		defer flock(s.f, syscall.LOCK_UN)
	}
	n, err := s.f.Write(line)
	if err == nil {
		s.torn = false
		return nil
	}
	if n > 0 && s.cut(n) != nil {
		s.torn = true
	}
	return err
}

// cut takes the last n bytes away again.
func (s *file) cut(n int) error {
	if !s.regular {
		return errors.ErrUnsupported
	}
	info, err := s.f.Stat()
	if err != nil {
		return err
	}
	return s.f.Truncate(info.Size() - int64(n))
}

func flock(f *os.File, how int) error {
	for {
		err := syscall.Flock(int(f.Fd()), how)
		if err == nil {
			return nil
		}
		if err != syscall.EINTR {
			return &os.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
	}
}

func (s *file) reopen() error { return s.open() }
func (s *file) close() error  { return s.f.Close() }

// A stream is standard output.
type stream struct {
	w    io.Writer
	torn bool
}

func (s *stream) write(line []byte) error {
	if s.torn {
		line = append([]byte{'\n'}, line...)
	}
	n, err := s.w.Write(line)
	if err != nil {
		s.torn = s.torn || n > 0
		return err
	}
	s.torn = false
	return nil
}

func (s *stream) reopen() error { return nil }
func (s *stream) close() error  { return nil } // it is not ours

// A daemon is that of syslog(3).
type daemon struct {
	socket   string
	facility syslog.Priority
	w        *syslog.Writer
}

func openSyslog(socket string, facility syslog.Priority) (*daemon, error) {
	s := &daemon{socket: socket, facility: facility}
	return s, s.reopen()
}

func (s *daemon) reopen() error {
	const tag = "sallyport"
	var w *syslog.Writer
	var err error
	if s.socket == "" {
		w, err = syslog.New(s.facility|syslog.LOG_INFO, tag)
	} else if w, err = syslog.Dial("unixgram", s.socket, s.facility|syslog.LOG_INFO, tag); err != nil {
		w, err = syslog.Dial("unix", s.socket, s.facility|syslog.LOG_INFO, tag)
	}
	if err != nil {
		return err
	}
	if s.w != nil {
		s.w.Close()
	}
	s.w = w
	return nil
}

// write connects again by itself when the daemon has been restarted.
func (s *daemon) write(line []byte) error {
	_, err := s.w.Write(line)
	return err
}

func (s *daemon) close() error { return s.w.Close() }
