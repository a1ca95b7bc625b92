package audit

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// reserveParts is how often the reserve is topped up per reserve of written
	// bytes. It is also topped up by the first event after alertInterval, so that
	// the operator of a quiet gateway is told soon that the file system is full.
	reserveParts = 16
	// minReserve is the smallest reserve, in bytes.
	minReserve = 64 << 10
	// freeTTL is how long the result of spaceCache.free is used.
	freeTTL = time.Second
)

// A reserve is space that is allocated beyond the end of the log file: fallocate(2)
// with FALLOC_FL_KEEP_SIZE. Appending to the file uses it, also when the file system is
// full. As long as the file system has free space, the reserve is topped up.
//
// Its methods are called by one goroutine at a time; left may be read by any.
type reserve struct {
	size int64 // zero: no reserve
	log  *slog.Logger

	written int64     // since it was topped up
	topped  time.Time // when it was topped up, or this was tried
	alerted time.Time // when its use was last logged; zero if it is not used

	left atomic.Int64 // bytes
}

// begin allocates the reserve of a file that has just been opened. If the file system
// has too little space, begin tries a half, a quarter, and so on.
func (r *reserve) begin(f *os.File) {
	r.left.Store(0)
	r.written, r.topped = 0, time.Now()
	if r.size == 0 {
		return
	}
	for size := r.size; size >= minReserve; size /= 2 {
		err := r.allocate(f, size)
		if err == nil {
			if size < r.size {
				r.log.Warn("the file system of the audit log has no room for the whole reserve", "reserve", size)
			}
			return
		}
		if !isFull(err) {
			r.log.Warn("the audit log has no reserve for a full file system", "err", err)
			r.size = 0
			return
		}
	}
	r.log.Error("the file system of the audit log is full, and has no room for a reserve")
}

// used counts n written bytes, and tops the reserve up after each part of it, and after
// alertInterval.
func (r *reserve) used(f *os.File, n int) {
	if r.size == 0 {
		return
	}
	r.written += int64(n)
	r.left.Store(max(r.left.Load()-int64(n), 0))
	now := time.Now()
	if r.written < r.size/reserveParts && now.Sub(r.topped) < alertInterval {
		return
	}
	r.written, r.topped = 0, now
	err := r.allocate(f, r.size)
	switch {
	case err == nil && !r.alerted.IsZero():
		r.alerted = time.Time{}
		r.log.Warn("the file system of the audit log has room again")
	case isFull(err) && now.Sub(r.alerted) >= alertInterval:
		r.alerted = now
		r.log.Error("THE FILE SYSTEM OF THE AUDIT LOG IS FULL: it is written into its reserve", "left", r.left.Load())
	}
}

// allocate reserves size bytes beyond the end of f.
func (r *reserve) allocate(f *os.File, size int64) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	for {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, info.Size(), size)
		if err != syscall.EINTR {
			break
		}
	}
	if err != nil {
		return os.NewSyscallError("fallocate", err)
	}
	r.left.Store(size)
	return nil
}

// release frees the rest of the reserve.
func (r *reserve) release(f *os.File) {
	if r.left.Swap(0) == 0 || flock(f, syscall.LOCK_EX) != nil { // another process may be appending
		return
	}
	defer flock(f, syscall.LOCK_UN)
	if info, err := f.Stat(); err == nil {
		f.Truncate(info.Size())
	}
}

// isFull reports whether err means that a file system or a quota is full.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// A spaceCache caches the free space of a file system.
type spaceCache struct {
	at    atomic.Int64 // in nanoseconds since 1970
	bytes atomic.Int64
}

// free returns how many bytes are available to users other than root; -1 if that is
// unknown.
func (s *spaceCache) free(path string) int64 {
	now := time.Now().UnixNano()
	if last := s.at.Load(); last != 0 && now-last < int64(freeTTL) {
		return s.bytes.Load()
	}
	free := int64(-1)
	var st unix.Statfs_t
	if unix.Statfs(filepath.Dir(path), &st) == nil {
		free = int64(st.Bavail) * st.Bsize
	}
	s.bytes.Store(free)
	s.at.Store(now)
	return free
}
