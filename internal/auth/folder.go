package auth

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A folder has one file per user, named like the user.
type folder struct {
	*os.File
	path  string
	state state
}

// openDir opens a folder and checks its owner and mode: an account that can write to
// it could rename one user's file to another's. kind is for messages.
func openDir(dir string, kind fileKind) (*folder, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the %s: %w", kind, err)
	}
	s, err := fstat(f)
	if err == nil {
		err = s.checkStrictModes(f, dir)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &folder{File: f, path: dir, state: s}, nil
}

// Users returns the users with a file in a folder of authorized keys.
func Users(keys string) ([]string, error) {
	dir, err := openDir(keys, kindKeys)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.names()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(names, func(name string) bool { return !validUser(name) }), nil
}

// names returns the sorted names of the files, except those that begin with a dot.
func (d *folder) names() ([]string, error) {
	// A separate descriptor, because reading a folder moves the offset.
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", d.Fd()))
	if err != nil {
		return nil, fmt.Errorf("listing %s: %w", d.path, err)
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("listing %s: %w", d.path, err)
	}
	names = slices.DeleteFunc(names, func(name string) bool { return name[0] == '.' })
	slices.Sort(names)
	return names, nil
}

// maxLinks limits the symbolic links on the way to a file, as in
// path_resolution(7).
const maxLinks = 40

// open opens the file called name for reading. It may be a symbolic link, also to a
// place outside the folder, like the files of a Kubernetes Secret. Then every link
// and every folder on the way must belong to root or to the user of this process.
// Other users must not be able to write to a folder on the way, unless its sticky bit
// keeps them from replacing files of others. So no other user can have chosen the
// file. The error wraps fs.ErrNotExist if there is no such name, or if a link has no
// target.
func (d *folder) open(name string) (*os.File, error) {
	path := filepath.Join(d.path, name) // of the current step, for messages
	fail := func(err error) (*os.File, error) { return nil, fmt.Errorf("opening %s: %w", path, err) }
	at, err := openAt(d.File, ".", unix.O_PATH|unix.O_DIRECTORY, d.path)
	if err != nil {
		return fail(err)
	}
	defer func() { at.Close() }()
	here := d.path
	rest := []string{name}
	for links := 0; ; {
		next := rest[0]
		rest = rest[1:]
		path = filepath.Join(here, next)
		if next == "" || next == "." {
			if len(rest) == 0 {
				return fail(errNotRegular)
			}
			continue
		}
		step, err := openAt(at, next, unix.O_PATH|unix.O_NOFOLLOW, path)
		if err != nil {
			return fail(err)
		}
		s, err := fstat(step)
		switch kind := s.mode & unix.S_IFMT; {
		case err != nil:
		case kind == unix.S_IFLNK:
			var target string
			if target, err = readLink(step); err != nil {
				break
			}
			if links++; links > maxLinks {
				err = unix.ELOOP
				break
			}
			if err = s.checkOwner(path); err != nil {
				break
			}
			if strings.HasPrefix(target, "/") {
				root, err := openAt(at, "/", unix.O_PATH|unix.O_DIRECTORY, "/")
				if err != nil {
					step.Close()
					return fail(err)
				}
				at.Close()
				at, here = root, "/"
				err = checkStep(root, "/")
				if err != nil {
					step.Close()
					return nil, err
				}
			}
			rest = slices.Concat(strings.Split(strings.Trim(target, "/"), "/"), rest)
			step.Close()
			continue
		case kind == unix.S_IFDIR && len(rest) > 0:
			if err = checkStep(step, path); err == nil {
				at.Close()
				at, here = step, path
				continue
			}
		case len(rest) > 0:
			err = unix.ENOTDIR
		default:
			// With O_NONBLOCK, opening a FIFO does not block.
			step.Close()
			f, err := openAt(at, next, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, path)
			if err != nil {
				return fail(err)
			}
			return f, nil
		}
		step.Close()
		var insecure insecureError
		if errors.As(err, &insecure) {
			return nil, err
		}
		return fail(err)
	}
}

// checkStep refuses a folder on the way to a file if other users can replace that
// file in it.
func checkStep(f *os.File, path string) error {
	s, err := fstat(f)
	if err != nil {
		return err
	}
	if s.mode&unix.S_ISVTX != 0 { // the owner of the next step is checked, too
		return s.checkOwner(path)
	}
	return s.checkStrictModes(f, path)
}

func openAt(dir *os.File, name string, flags int, path string) (*os.File, error) {
	for {
		fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_CLOEXEC, 0)
		if err == nil {
			return os.NewFile(uintptr(fd), path), nil
		}
		if err != unix.EINTR {
			return nil, err
		}
	}
}

// readLink returns the target of a link that was opened with O_PATH.
func readLink(f *os.File) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(f.Fd()), "", buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// missing reports whether the folder has no entry of that name. A link without a
// target is an entry.
func (d *folder) missing(name string) bool {
	var s unix.Stat_t
	return unix.Fstatat(int(d.Fd()), name, &s, unix.AT_SYMLINK_NOFOLLOW) == unix.ENOENT
}
