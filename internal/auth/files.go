package auth

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxCached limits the number of files in a cache. Only users with a file
	// have an entry.
	maxCached = 1024

	// settleTime is how old the last change of a file must be before a copy of it
	// may be cached. File systems have timestamps in steps of some milliseconds,
	// old ones of 2 s, so a file may change twice with one timestamp.
	settleTime = 3 * time.Second

	// A file that may be half written is read again, this often and after this
	// delay.
	halfWrittenRetries = 3
	halfWrittenDelay   = 50 * time.Millisecond
	// halfWrittenAge is the age after which a file is not half written any more.
	halfWrittenAge = time.Second
)

// state distinguishes two versions of a file, and has its owner and mode.
type state struct {
	dev, ino     uint64
	size         int64
	mtime, ctime int64 // ns
	mode, uid    uint32
}

func stateOf(s *unix.Stat_t) state {
	return state{
		dev: uint64(s.Dev), ino: uint64(s.Ino), size: s.Size,
		mtime: s.Mtim.Nano(), ctime: s.Ctim.Nano(),
		mode: uint32(s.Mode), uid: s.Uid,
	}
}

func fstat(f *os.File) (state, error) {
	var s unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &s); err != nil {
		return state{}, fmt.Errorf("fstat %s: %w", f.Name(), err)
	}
	return stateOf(&s), nil
}

// stat returns the state of the file at path, and the zero state if there is an
// error. It is for comparison with another result of stat only.
func stat(path string) state {
	var s unix.Stat_t
	if err := unix.Stat(path, &s); err != nil {
		return state{}
	}
	return stateOf(&s)
}

// settledAt reports whether a file that had the state s at the time at cannot have
// changed since without a change of its state.
func (s state) settledAt(at time.Time) bool {
	return at.Sub(time.Unix(0, s.ctime)) >= settleTime
}

// An insecureError refuses a file that other users can write to.
type insecureError string

func (e insecureError) Error() string { return string(e) }

// checkOwner refuses a file of another user than root and that of this process.
func (s state) checkOwner(path string) error {
	if s.uid != 0 && s.uid != uint32(os.Geteuid()) {
		return insecureError(fmt.Sprintf("%s: belongs to uid %d, and must belong to root or to uid %d; logins that depend on it are refused", path, s.uid, os.Geteuid()))
	}
	return nil
}

// checkStrictModes is the check of sshd's StrictModes, except that on a read-only
// mount the mode does not matter. Kubernetes mounts Secrets like that, with a folder
// of mode 1777.
func (s state) checkStrictModes(f *os.File, path string) error {
	if err := s.checkOwner(path); err != nil {
		return err
	}
	if s.mode&0o022 != 0 && !readOnly(f) {
		return insecureError(fmt.Sprintf("%s: mode %04o lets others write to it; logins that depend on it are refused until chmod go-w", path, s.mode&0o7777))
	}
	return nil
}

// readOnly reports whether f is on a read-only mount or file system.
func readOnly(f *os.File) bool {
	var s unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &s) == nil && s.Flags&unix.ST_RDONLY != 0
}

// A document is the parsed content of a file. It is immutable.
type document[T any] struct {
	state    state
	readAt   time.Time
	content  T
	problems []error // of the lines that were refused
	// unfinished reports that the file is empty, or that its last line has no
	// newline.
	unfinished bool
}

// settled reports whether the file cannot have changed since it was read without a
// change of its state.
func (d *document[T]) settled() bool { return d.state.settledAt(d.readAt) }

// halfWritten reports whether a writer may be rewriting the file in place.
func (d *document[T]) halfWritten() bool {
	return d.unfinished && d.readAt.Sub(time.Unix(0, d.state.ctime)) < halfWrittenAge
}

// A parser parses a file. The problems are those of refused lines; an error means
// that the whole file is refused.
type parser[T any] func(path string, data []byte) (content T, problems []error, err error)

// read returns cached if f has not changed since, or else reads and parses f. path
// is for messages. A file of more than most bytes is an error.
func read[T any](f *os.File, path string, most int64, cached *document[T], parse parser[T]) (*document[T], error) {
	const maxTries = 10
	before, err := fstat(f)
	if err != nil {
		return nil, err
	}
	for range maxTries {
		if before.mode&unix.S_IFMT != unix.S_IFREG {
			return nil, fmt.Errorf("%s: %w", path, errNotRegular)
		}
		if err := before.checkStrictModes(f, path); err != nil {
			return nil, err
		}
		if cached != nil && cached.state == before && cached.settled() {
			return cached, nil
		}
		if before.size > most {
			return nil, fmt.Errorf("%s: longer than %d bytes, so nothing in it counts", path, most)
		}
		now := time.Now()
		data := make([]byte, before.size+1) // one more, to notice that it has grown
		n, err := f.ReadAt(data, 0)
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("reading %s: %w", path, err)
		}
		after, err := fstat(f)
		if err != nil {
			return nil, err
		}
		// Parts of two versions must not form a line that no writer has written.
		if before == after && int64(n) == after.size {
			data = data[:n]
			d := &document[T]{state: after, readAt: now, unfinished: n == 0 || data[n-1] != '\n'}
			if d.content, d.problems, err = parse(path, data); err != nil {
				return nil, err
			}
			return d, nil
		}
		before = after
	}
	return nil, fmt.Errorf("%s: changes faster than it can be read", path)
}

// readFile is read for the file at path.
func readFile[T any](path string, most int64, cached *document[T], parse parser[T]) (*document[T], error) {
	// With O_NONBLOCK, opening a FIFO does not block.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return read(f, path, most, cached, parse)
}

var errNotRegular = errors.New("not a regular file")

// readIn is read for the file called name in dir.
func readIn[T any](dir *folder, name string, most int64, cached *document[T], parse parser[T]) (*document[T], error) {
	f, err := dir.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return read(f, filepath.Join(dir.path, name), most, cached, parse)
}

// A cache has documents by the name of a user, or by a path.
type cache[T any] struct {
	mu    sync.Mutex
	files map[string]*document[T]

	reading sync.Mutex // held by sharedFile
}

func (c *cache[T]) get(name string) *document[T] {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.files[name]
}

func (c *cache[T]) put(name string, d *document[T]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.files == nil {
		c.files = make(map[string]*document[T])
	}
	if _, ok := c.files[name]; !ok && len(c.files) >= maxCached {
		for other := range c.files { // evict a random one
			delete(c.files, other)
			break
		}
	}
	c.files[name] = d
}

func (c *cache[T]) remove(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.files, name)
}

// userFile returns the user's file in dir as it is on disk, or nil if there is none.
// Mistakes are logged once per change.
func userFile[T any](k *Keys, c *cache[T], dir string, kind fileKind, user string, parse parser[T]) (*document[T], error) {
	cached := c.get(user)
	root, err := openDir(dir, kind)
	if err != nil {
		k.report(kind, "", []error{err})
		return nil, undecided{err}
	}
	defer root.Close()
	k.report(kind, "", nil)
	k.reportMisnamed(root, kind)

	d, err := readIn(root, user, maxFile, cached, parse)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c.remove(user)
		k.report(kind, user, nil)
		return nil, nil
	case err != nil:
		k.report(kind, user, []error{err})
		return nil, undecided{err}
	case d == cached:
		return d, nil
	}
	k.report(kind, user, d.problems)
	c.put(user, d)
	return d, nil
}

// unsettledTTL is how long a copy of a shared file is used although the file has
// changed so recently that it might change again unseen.
const unsettledTTL = 200 * time.Millisecond

// sharedFile returns a file that all logins need. It may be long, so one goroutine
// reads it at a time, and while it has not settled it is not read for every login.
func sharedFile[T any](k *Keys, c *cache[T], path string, kind fileKind, most int64, parse parser[T]) (*document[T], error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	cached := c.get(path)
	if cached != nil {
		if age := time.Since(cached.readAt); age >= 0 && age < unsettledTTL && stat(path) == cached.state {
			return cached, nil
		}
	}
	d, err := readFile(path, most, cached, parse)
	switch {
	case err != nil:
		k.report(kind, path, []error{err})
		return nil, undecided{err}
	case d == cached:
		return d, nil
	}
	k.report(kind, path, d.problems)
	c.put(path, d)
	return d, nil
}
