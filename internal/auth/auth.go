// Package auth decides who may log in as whom, and what the login may do, from
// a folder of authorized_keys files: one per user, named as the user, in the
// format of sshd(8), AUTHORIZED_KEYS FILE FORMAT.
//
// What this package does not understand or cannot enforce, it refuses. A line
// with a mistake, an unknown option or one that is not honoured here lets
// nobody in, and harms no other line. [Check] lists such lines for the
// operator; [Keys] also logs them once for every change of the file.
//
// # Changing keys while the gateway runs
//
// Files are looked at again for every login, so a change counts at once.
// Writers should make a new file and rename it over the old one: a reader then
// sees either the old file or the new one. A file that is rewritten in place is
// safe too (a cut-off line is no key, and a file that changes while it is read
// is read again), but while it is empty its user cannot log in.
package auth

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

const (
	maxFile = 1 << 20 // bytes of one user's keys
	maxLine = 8 << 10 // as sshd(8) says
	maxUser = 64      // bytes of a user name

	// maxCached bounds the memory for files that were read before. Only users
	// who have a file take a place.
	maxCached = 1024

	// settled is how old the last change of a file must be before a read of it
	// is worth keeping. File systems date changes in steps of some
	// milliseconds, or of 2 s on old ones, so a younger file may change again
	// without looking different.
	settled = 3 * time.Second
)

// Keys lets people in by the files in Dir. It is safe for concurrent use, must
// not be copied after its first use, and its methods touch nothing but those
// files.
type Keys struct {
	// Dir holds one authorized_keys file per user. Like every file in it, it
	// must belong to root or to the user the gateway runs as, and be writable
	// by its owner only.
	Dir string
	// Log, if not nil, is told what is wrong with the files: once for every
	// change.
	Log *slog.Logger

	mu    sync.Mutex
	files map[string]*keyFile // by user
	said  map[string]string   // by user, "" for Dir: what was last logged
}

// A Grant is what one line of authorized_keys gives to who proves its key.
type Grant struct {
	identity.Permissions
	// NoTouchRequired waives the touch of a FIDO key. It must reach
	// golang.org/x/crypto/ssh as the extension "no-touch-required" of
	// ssh.Permissions, or that package insists on the touch.
	NoTouchRequired bool
	// Expires is the moment after which the line is good for nothing; zero
	// means never. Sessions that are open then are the caller's business.
	Expires time.Time
	// Line is where the grant was found, as "alice:3". It is for logs.
	Line string
	// Principals are those of the certificate by which the login came in;
	// empty for a plain key.
	Principals []string
}

// Authorize says what the owner of key may do as user, when coming from the
// address from at the time now. The first line with that key whose from and
// expiry-time options fit decides, as with sshd.
//
// It has no effect other than filling a cache, and costs a user who does not
// exist the same steps as one who does, so it may be asked about keys that are
// offered and not proven. The error is for the operator's log, not for the user.
func (k *Keys) Authorize(user string, key ssh.PublicKey, from netip.Addr, now time.Time) (Grant, error) {
	if !validUser(user) {
		return Grant{}, errors.New("not a possible user name")
	}
	if _, ok := key.(*ssh.Certificate); ok {
		return Grant{}, errors.New("a certificate, where only plain keys are accepted")
	}
	file, err := k.file(user)
	if err != nil {
		return Grant{}, err
	}
	refusal := fmt.Errorf("no line of %s's authorized keys has this key", user)
	for _, e := range file.entries[string(key.Marshal())] {
		at := fmt.Sprintf("%s:%d", user, e.line)
		switch {
		case e.from != nil && !e.from.match(from):
			refusal = fmt.Errorf("%s: the key may not be used from %v", at, from)
		case !e.expires.IsZero() && now.After(e.expires):
			refusal = fmt.Errorf("%s: the key expired at %s", at, e.expires.Format(time.RFC3339))
		default:
			return e.grant(at), nil
		}
	}
	return Grant{}, refusal
}

// validUser says whether name may become part of a path. It is what
// useradd(8) and mail addresses need, and nothing that a file system, a shell
// or the "user+profile" of a login gives a meaning to.
func validUser(name string) bool {
	if name == "" || len(name) > maxUser || name[0] == '-' || name[0] == '.' || strings.Contains(name, "..") {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == '.', c == '_', c == '@', c == '-':
		default:
			return false
		}
	}
	return true
}

// A keyFile is one user's file as it was read. It does not change.
type keyFile struct {
	state    state
	readAt   time.Time
	entries  map[string][]entry // by the key's wire format, in the order of the file
	problems []error
}

// state tells two versions of a file apart, and says who may write it.
type state struct {
	dev, ino     uint64
	size         int64
	mtime, ctime int64 // ns
	mode, uid    uint32
}

// file returns the user's keys as they are on disk at this moment. A user
// without a file has no keys, and that is no error.
func (k *Keys) file(user string) (*keyFile, error) {
	k.mu.Lock()
	cached := k.files[user]
	k.mu.Unlock()

	root, err := openDir(k.Dir)
	if err != nil {
		k.report("", []error{err})
		return nil, err
	}
	defer root.Close()
	k.report("", nil)

	file, err := readKeys(root, user, cached)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		k.forget(user)
		return &keyFile{}, nil
	case err != nil:
		k.report(user, []error{err})
		return nil, err
	case file == cached:
		return file, nil
	}
	k.report(user, file.problems)
	k.keep(user, file)
	return file, nil
}

// openDir opens the folder of keys after checking who may write to it: whoever
// may, can rename one user's file to another's.
func openDir(dir string) (*os.Root, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("opening the authorized keys: %w", err)
	}
	f, err := root.Open(".")
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("opening the authorized keys: %w", err)
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

// readKeys returns cached if the file is still the one that was cached, and
// else reads and parses it.
func readKeys(root *os.Root, user string, cached *keyFile) (*keyFile, error) {
	path := filepath.Join(root.Name(), user)
	// O_NONBLOCK, so that a FIFO in the folder blocks nobody.
	f, err := root.OpenFile(user, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", path, err)
	}
	defer f.Close()
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
		if before.size > maxFile {
			return nil, fmt.Errorf("%s: longer than %d bytes", path, maxFile)
		}
		now := time.Now()
		data := make([]byte, before.size+1) // one more, to see that it has grown
		n, err := f.ReadAt(data, 0)
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("reading the authorized keys: %w", err)
		}
		after, err := stat(f)
		if err != nil {
			return nil, err
		}
		// Half of one version and half of another must not join to a line
		// that was never written.
		if before == after && int64(n) == after.size {
			file := parseFile(path, data[:n])
			file.state, file.readAt = after, now
			return file, nil
		}
		before = after
	}
	return nil, fmt.Errorf("%s: changes faster than it can be read", path)
}

// settled says whether the file cannot have changed since without its state
// changing too.
func (f *keyFile) settled() bool {
	return f.readAt.Sub(time.Unix(0, f.state.ctime)) >= settled
}

func stat(f *os.File) (state, error) {
	var s unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &s); err != nil {
		return state{}, fmt.Errorf("looking at %s: %w", f.Name(), err)
	}
	return state{
		dev: uint64(s.Dev), ino: uint64(s.Ino), size: s.Size,
		mtime: s.Mtim.Nano(), ctime: s.Ctim.Nano(),
		mode: uint32(s.Mode), uid: s.Uid,
	}, nil
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

// parseFile parses every line, and keeps those without a mistake.
func parseFile(path string, data []byte) *keyFile {
	f := &keyFile{entries: make(map[string][]entry)}
	n := 0
	for line := range bytes.SplitSeq(data, []byte("\n")) {
		n++
		e, err := parseLine(string(line), time.Local)
		if err != nil {
			f.problems = append(f.problems, fmt.Errorf("%s:%d: %w", path, n, err))
			continue
		}
		if e.key == nil {
			continue
		}
		e.line = n
		blob := string(e.key.Marshal())
		f.entries[blob] = append(f.entries[blob], e)
	}
	return f
}

func (k *Keys) keep(user string, f *keyFile) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.files == nil {
		k.files = make(map[string]*keyFile)
	}
	if _, ok := k.files[user]; !ok && len(k.files) >= maxCached {
		for other := range k.files { // any one: it is only read again
			delete(k.files, other)
			break
		}
	}
	k.files[user] = f
}

func (k *Keys) forget(user string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.files, user)
	delete(k.said, user)
}

// report logs what is wrong with a user's file, or with Dir if user is empty,
// unless that was the last thing said about it.
func (k *Keys) report(user string, problems []error) {
	if k.Log == nil {
		return
	}
	all := ""
	if len(problems) > 0 {
		all = errors.Join(problems...).Error()
	}
	k.mu.Lock()
	news := k.said[user] != all
	switch {
	case all == "":
		delete(k.said, user)
	case news:
		if k.said == nil || len(k.said) >= maxCached {
			k.said = make(map[string]string)
		}
		k.said[user] = all
	}
	k.mu.Unlock()
	if !news {
		return
	}
	// A file may hold thousands of mistakes; Check lists all.
	for i, err := range problems {
		if i == 20 {
			k.Log.LogAttrs(context.Background(), slog.LevelWarn, "more lines of authorized keys refused",
				slog.String("user", user), slog.Int("count", len(problems)-i))
			break
		}
		k.Log.LogAttrs(context.Background(), slog.LevelWarn, "authorized keys refused",
			slog.String("user", user), slog.Any("err", err))
	}
}

// Check returns all that is wrong with the authorized keys in dir, in the order
// of the files' names, each as "path:line: reason" or "path: reason". Files
// whose name starts with a dot are nobody's keys and are passed over.
func Check(dir string) []error {
	root, err := openDir(dir)
	if err != nil {
		return []error{err}
	}
	defer root.Close()
	files, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return []error{fmt.Errorf("listing the authorized keys: %w", err)}
	}
	var problems []error
	for _, f := range files {
		name := f.Name()
		if name[0] == '.' {
			continue
		}
		if !validUser(name) {
			problems = append(problems, fmt.Errorf("%s: the file's name is not a possible user name, so nobody gets in by it", filepath.Join(dir, name)))
			continue
		}
		file, err := readKeys(root, name, nil)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		problems = append(problems, file.problems...)
	}
	return problems
}

// grant is the entry's for the caller to keep and change.
func (e entry) grant(at string) Grant {
	p := e.permissions
	p.PermitOpen = slices.Clone(p.PermitOpen)
	p.PermitListen = slices.Clone(p.PermitListen)
	p.Environment = slices.Clone(p.Environment)
	return Grant{Permissions: p, NoTouchRequired: e.noTouch, Expires: e.expires, Line: at}
}
