package audit

import (
	"errors"
	"fmt"
	"io"
	"log/syslog"
	"os"
	"sync/atomic"
	"syscall"
)

// A file is the sink for Config.File. Several processes may append to the same file:
// a gateway that drains, and its successor.
type file struct {
	path    string
	f       *os.File
	regular bool
	torn    bool // the last write left part of a line
	reserve reserve
	space   spaceCache
	onDisk  atomic.Bool // regular, for concurrent calls of free
}

func openFile(cfg Config) (*file, error) {
	s := &file{path: cfg.File, reserve: reserve{size: cfg.Reserve, log: cfg.Log}}
	return s, s.open()
}

// open opens the path, and closes the file that was open before.
func (s *file) open() error {
	// Without O_NONBLOCK, opening a FIFO might block.
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
	s.closeFile()
	s.f, s.regular, s.torn = f, info.Mode().IsRegular(), torn
	s.onDisk.Store(s.regular)
	if s.regular {
		s.reserve.begin(f)
	}
	return nil
}

// closeFile closes the file, if one is open.
func (s *file) closeFile() error {
	if s.f == nil {
		return nil
	}
	s.reserve.release(s.f)
	return s.f.Close()
}

// free returns how many bytes can still be written; -1 if that is unknown.
func (s *file) free() int64 {
	if !s.onDisk.Load() {
		return -1
	}
	free := s.space.free(s.path)
	if free < 0 {
		return -1
	}
	return free + s.reserve.left.Load()
}

// endsTorn reports whether the file ends within a line, because a gateway was killed
// or the machine lost power.
func endsTorn(f *os.File, info os.FileInfo) (bool, error) {
	if !info.Mode().IsRegular() || info.Size() == 0 {
		return false, nil
	}
	var last [1]byte
	if _, err := f.ReadAt(last[:], info.Size()-1); err != nil {
		return false, fmt.Errorf("reading the end of %s: %w", f.Name(), err)
	}
	return last[0] != '\n', nil
}

func (s *file) write(line []byte) error {
	if s.torn {
		line = append([]byte{'\n'}, line...)
	}
	// No other process may append between the write and the cut below.
	if s.regular {
		if err := flock(s.f, syscall.LOCK_EX); err != nil {
			return err
		}
		defer flock(s.f, syscall.LOCK_UN)
	}
	n, err := s.f.Write(line)
	if err == nil {
		s.torn = false
		if s.regular {
			s.reserve.used(s.f, n)
		}
		return nil
	}
	if n > 0 && s.cut(n) != nil {
		s.torn = true
	}
	return err
}

// cut removes the last n bytes.
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
func (s *file) close() error  { return s.closeFile() }

// A stream is the sink for Config.Stdout.
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
func (s *stream) close() error  { return nil } // w belongs to the caller

// A daemon is the sink for Config.Syslog.
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

// write reconnects if the daemon has been restarted; package syslog does so.
func (s *daemon) write(line []byte) error {
	_, err := s.w.Write(line)
	return err
}

func (s *daemon) close() error { return s.w.Close() }
