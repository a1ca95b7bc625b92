// Package unixsock listens on and connects to Unix sockets for processes of one account,
// at paths of any length.
//
// The address of a Unix socket holds at most 107 bytes of path (unix(7), sun_path).
// [Listen] and [Dial] open the socket's directory and name the socket through the
// directory's descriptor, as /proc/self/fd/N/NAME, so that only the length of the file
// name is limited.
//
// An address of this package is [Prefix] followed by an absolute path.
package unixsock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Prefix begins the address of a Unix socket.
const Prefix = "unix:"

// Path returns the path of an address. ok reports whether addr begins with [Prefix] and
// the path is absolute and clean.
func Path(addr string) (path string, ok bool) {
	path, ok = strings.CutPrefix(addr, Prefix)
	if !ok || !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" || strings.ContainsRune(path, 0) {
		return "", false
	}
	return path, true
}

// shortName returns a short name of the socket at path. The name is valid until the caller
// closes dir.
func shortName(path string) (name string, dir *os.File, err error) {
	dir, err = os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", nil, err
	}
	return "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + filepath.Base(path), dir, nil
}

// A Listener accepts connections from processes of this process's account and of root.
type Listener struct {
	*net.UnixListener
	path string
	dir  *os.File
}

// Listen listens at path and removes a file that is already there. The caller must know
// that no other process listens at path.
func Listen(path string) (*Listener, error) {
	name, dir, err := shortName(path)
	if err != nil {
		return nil, fmt.Errorf("listening at %s: %w", path, err)
	}
	if err := unix.Unlinkat(int(dir.Fd()), filepath.Base(path), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		dir.Close()
		return nil, fmt.Errorf("removing %s: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("listening at %s: %w", path, err)
	}
	// Package net would unlink the short name, whose descriptor may be another file's by
	// then. Close unlinks the socket.
	l.SetUnlinkOnClose(false)
	out := &Listener{UnixListener: l, path: path, dir: dir}
	if err := unix.Fchmodat(int(dir.Fd()), filepath.Base(path), 0o600, 0); err != nil {
		out.Close()
		return nil, fmt.Errorf("chmod of %s: %w", path, err)
	}
	return out, nil
}

// Addr implements [net.Listener].
func (l *Listener) Addr() net.Addr { return addr(l.path) }

// Accept implements [net.Listener]. It closes connections of other accounts. The mode of
// the socket keeps those out already, unless it has been changed.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if uid, err := PeerUID(c); err == nil && (uid == 0 || int(uid) == os.Geteuid()) {
			return c, nil
		}
		c.Close()
	}
}

// PeerUID returns the effective user id of the process at the other end of a Unix socket,
// at the time when it connected (unix(7), SO_PEERCRED).
func PeerUID(c syscall.Conn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, os.NewSyscallError("getsockopt", credErr)
	}
	return cred.Uid, nil
}

// Close implements [net.Listener], and removes the socket.
func (l *Listener) Close() error {
	err := l.UnixListener.Close()
	if errors.Is(err, net.ErrClosed) {
		return err
	}
	unlinked := unix.Unlinkat(int(l.dir.Fd()), filepath.Base(l.path), 0)
	if errors.Is(unlinked, fs.ErrNotExist) {
		unlinked = nil
	}
	return errors.Join(err, unlinked, l.dir.Close())
}

// Dial connects to the socket at path.
func Dial(ctx context.Context, path string) (net.Conn, error) {
	name, dir, err := shortName(path)
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", path, err)
	}
	defer dir.Close()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", name)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err // without the short name
		}
		return nil, fmt.Errorf("connecting to %s: %w", path, err)
	}
	return c, nil
}

// addr is the address of a listener.
type addr string

func (addr) Network() string  { return "unix" }
func (a addr) String() string { return Prefix + string(a) }
