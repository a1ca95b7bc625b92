package record

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// rescanAfter is the maximum age of the sum of a user's files for a refusal:
	// files may have been deleted since, or written by another gateway.
	rescanAfter = 10 * time.Second
	// rescanEvery is its maximum age at the start of a recording.
	rescanEvery = time.Minute
	// minFile is the size of a block of most file systems, in bytes: the least
	// space of a file.
	minFile = 4096
	// A user's recordings of about a day may use a quarter (dayShare) of the free
	// space, but at least minDay bytes. The share shrinks with the free space, so
	// one user cannot fill the file system.
	dayShare = 4
	minDay   = 1 << 20
	day      = 24 * time.Hour
)

// ErrUserFull is the error if a user's recordings have reached Store.MaxPerUser.
var ErrUserFull = errors.New("the user's recordings have reached their maximum size")

// errShare is the error if one user would fill the file system.
var errShare = errors.New("the user's recordings of the last day use a quarter of the free space")

// A usage counts the space that a user's recordings use.
type usage struct {
	dir        string
	maxPerUser int64
	space      func() int64

	mu      sync.Mutex
	total   int64     // bytes
	scanned time.Time // time of the last scan
	recent  float64   // bytes of about the last day: a leaky bucket
	leaked  time.Time // when recent was last updated
}

// usageOf returns the usage of a user.
func (s *Store) usageOf(user string) *usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.users[user]
	if u == nil {
		if s.users == nil {
			s.users = make(map[string]*usage)
		}
		u = &usage{dir: filepath.Join(s.Dir, pathElement(user)), maxPerUser: s.MaxPerUser, space: s.space}
		if u.space == nil {
			u.space = func() int64 { return freeSpace(s.Dir) }
		}
		s.users[user] = u
	}
	return u
}

// freeSpace returns how many bytes are free; -1 if that is unknown.
func freeSpace(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return -1
	}
	return int64(st.Bavail) * st.Bsize
}

// check returns why n more bytes may not be written, or nil. n is 0 for a new file.
func (u *usage) check(n int64) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := time.Now()
	newFile := n == 0
	if newFile {
		// Do not begin a recording that would reach the limit at once.
		n = max(minFile, min(u.maxPerUser/16, 1<<20))
	}
	if u.maxPerUser > 0 {
		age := now.Sub(u.scanned)
		if newFile && age >= rescanEvery || u.total+n > u.maxPerUser && age >= rescanAfter {
			if err := u.scan(now); err != nil {
				return err
			}
		}
		if u.total+n > u.maxPerUser {
			return fmt.Errorf("%w of %d bytes", ErrUserFull, u.maxPerUser)
		}
	}
	u.leak(now)
	if recent := u.recent + float64(n); recent > minDay {
		if free := u.space(); free >= 0 && recent > float64(free)/dayShare {
			return errShare
		}
	}
	return nil
}

// add counts n written bytes.
func (u *usage) add(n int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.total += n
	u.leak(time.Now())
	u.recent += float64(n)
}

// addFile counts a new file.
func (u *usage) addFile() { u.add(minFile) }

// leak updates recent. The caller holds u.mu.
func (u *usage) leak(now time.Time) {
	u.recent *= max(1-now.Sub(u.leaked).Seconds()/day.Seconds(), 0)
	u.leaked = now
}

// scan sums up the user's files. The caller holds u.mu.
func (u *usage) scan(now time.Time) error {
	var total int64
	err := filepath.WalkDir(u.dir, func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // deleted meanwhile, or not created yet
			return nil
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		case info.Mode().IsRegular():
			total += max(info.Size(), minFile)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("summing up the user's recordings: %w", err)
	}
	u.total, u.scanned = total, now
	return nil
}
