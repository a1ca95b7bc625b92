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
	// maxCached bounds the memory for files that were read before. Only users
	// who have a file take a place.
	maxCached = 1024

	// settled is how old the last change of a file must be before a read of it
	// is worth keeping. File systems date changes in steps of some
	// milliseconds, or of 2 s on old ones, so a younger file may change again
	// without looking different.
	settled = 3 * time.Second
)

// state tells two versions of a file apart, and says who may write it.
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

func stat(f *os.File) (state, error) {
	var s unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &s); err != nil {
		return state{}, fmt.Errorf("looking at %s: %w", f.Name(), err)
	}
	return stateOf(&s), nil
}

// glance is the state of what is at path, and the zero state if nothing can be
// seen there. It is for comparing with another glance only.
func glance(path string) state {
	var s unix.Stat_t
	if err := unix.Stat(path, &s); err != nil {
		return state{}
	}
	return stateOf(&s)
}

// settledAt says whether the file, looked at then, cannot have changed since
// without its state changing too.
func (s state) settledAt(then time.Time) bool {
	return then.Sub(time.Unix(0, s.ctime)) >= settled
}

// checkOwner is what sshd's StrictModes checks.
func (s state) checkOwner(path string) error {
	if s.uid != 0 && s.uid != uint32(os.Geteuid()) {
		return fmt.Errorf("%s: belongs to uid %d, and must belong to root or to uid %d; nobody gets in by it", path, s.uid, os.Geteuid())
	}
	if s.mode&0o022 != 0 {
		return fmt.Errorf("%s: mode %04o lets others write to it; nobody gets in by it until chmod go-w", path, s.mode&0o7777)
	}
	return nil
}

// A document is a file as it was read. It does not change.
type document[T any] struct {
	state    state
	readAt   time.Time
	text     T
	problems []error // lines that are passed over
	// unfinished says that the file does not end as a whole one does: it is
	// empty, or its last line has no end.
	unfinished bool
}

// settled says whether the file cannot have changed since without its state
// changing too.
func (d *document[T]) settled() bool { return d.state.settledAt(d.readAt) }

// halfWritten says whether the file may be in the middle of being rewritten in
// place.
func (d *document[T]) halfWritten() bool {
	return d.unfinished && d.readAt.Sub(time.Unix(0, d.state.ctime)) < time.Second
}

// A parser makes the text of a file of what it is for. The problems are the
// lines that it passed over; an error means that nothing can be used.
type parser[T any] func(path string, data []byte) (text T, problems []error, err error)

// read returns cached if f is still the file that was cached, and else reads
// and parses it. path is for messages, most is in bytes.
func read[T any](f *os.File, path string, most int64, cached *document[T], parse parser[T]) (*document[T], error) {
	before, err := stat(f)
	if err != nil {
		return nil, err
	}
	for range 10 {
		if before.mode&unix.S_IFMT != unix.S_IFREG {
			return nil, fmt.Errorf("%s: not a regular file", path)
		}
		if err := before.checkOwner(path); err != nil {
			return nil, err
		}
		if cached != nil && cached.state == before && cached.settled() {
			return cached, nil
		}
		if before.size > most {
			return nil, fmt.Errorf("%s: longer than %d bytes", path, most)
		}
		now := time.Now()
		data := make([]byte, before.size+1) // one more, to see that it has grown
		n, err := f.ReadAt(data, 0)
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("reading %s: %w", path, err)
		}
		after, err := stat(f)
		if err != nil {
			return nil, err
		}
		// Half of one version and half of another must not join to a line
		// that was never written.
		if before == after && int64(n) == after.size {
			data = data[:n]
			d := &document[T]{state: after, readAt: now, unfinished: n == 0 || data[n-1] != '\n'}
			if d.text, d.problems, err = parse(path, data); err != nil {
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
	// O_NONBLOCK, so that a FIFO blocks nobody.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return read(f, path, most, cached, parse)
}

// readIn is read for the file called name in root.
func readIn[T any](root *os.Root, name string, most int64, cached *document[T], parse parser[T]) (*document[T], error) {
	path := filepath.Join(root.Name(), name)
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", path, err)
	}
	defer f.Close()
	return read(f, path, most, cached, parse)
}

// openDir opens a folder of files for users after checking who may write to it:
// whoever may, can rename one user's file to another's. what is for messages.
func openDir(dir, what string) (*os.Root, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("opening the %s: %w", what, err)
	}
	f, err := root.Open(".")
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("opening the %s: %w", what, err)
	}
	defer f.Close()
	s, err := stat(f)
	if err == nil {
		err = s.checkOwner(dir)
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// A cache remembers documents by the name of the user, or of the file.
type cache[T any] struct {
	mu    sync.Mutex
	files map[string]*document[T]

	reading sync.Mutex // see sharedFile
}

func (c *cache[T]) get(name string) *document[T] {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.files[name]
}

func (c *cache[T]) keep(name string, d *document[T]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.files == nil {
		c.files = make(map[string]*document[T])
	}
	if _, ok := c.files[name]; !ok && len(c.files) >= maxCached {
		for other := range c.files { // any one: it is only read again
			delete(c.files, other)
			break
		}
	}
	c.files[name] = d
}

func (c *cache[T]) forget(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.files, name)
}

// userFile returns the user's file in dir as it is on disk at this moment, and
// nil if she has none. Mistakes are told to k's log once for every change; what
// names the folder's files in messages.
func userFile[T any](k *Keys, c *cache[T], dir, what, user string, parse parser[T]) (*document[T], error) {
	cached := c.get(user)
	root, err := openDir(dir, what)
	if err != nil {
		k.report(what, "", []error{err})
		return nil, undecided{err}
	}
	defer root.Close()
	k.report(what, "", nil)

	d, err := readIn(root, user, maxFile, cached, parse)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c.forget(user)
		k.report(what, user, nil)
		return nil, nil
	case err != nil:
		k.report(what, user, []error{err})
		return nil, undecided{err}
	case d == cached:
		return d, nil
	}
	k.report(what, user, d.problems)
	c.keep(user, d)
	return d, nil
}

// unsettledFor is how long a read of a shared file counts that has changed so
// recently that it might change again unseen.
const unsettledFor = 200 * time.Millisecond

// sharedFile returns a file that is not one user's. It may be long, and all who
// log in need it, so it is read by one of them at a time, and not anew for each
// while it is young.
func sharedFile[T any](k *Keys, c *cache[T], path, what string, most int64, parse parser[T]) (*document[T], error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	cached := c.get(path)
	if cached != nil {
		if age := time.Since(cached.readAt); age >= 0 && age < unsettledFor && glance(path) == cached.state {
			return cached, nil
		}
	}
	d, err := readFile(path, most, cached, parse)
	switch {
	case err != nil:
		k.report(what, path, []error{err})
		return nil, undecided{err}
	case d == cached:
		return d, nil
	}
	k.report(what, path, d.problems)
	c.keep(path, d)
	return d, nil
}
