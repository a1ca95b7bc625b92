package sftp

import (
	"encoding/binary"
	"strconv"

	"golang.org/x/sys/unix"
)

// A handle is an open file or directory.
type handle struct {
	path  string
	fd    int
	flags int // of open(2)
	dir   bool
	// entries are the names in a directory that were read and not yet sent.
	entries []string
}

// addHandle stores h and answers with its handle.
func (c *session) addHandle(p *packet, h *handle) {
	id := c.next
	for c.handles[id] != nil {
		id++
	}
	c.next = id + 1
	c.handles[id] = h
	c.send(message(typeHandle).uint32(p.id).string(string(binary.BigEndian.AppendUint32(nil, id))))
}

// readHandle reads a handle from a request. It returns nil if there is none.
func (c *session) readHandle(p *packet) *handle {
	name := p.bytes()
	if p.err != nil || len(name) != 4 {
		return nil
	}
	return c.handles[binary.BigEndian.Uint32(name)]
}

// readFileHandle is readHandle for files; it returns nil for a directory.
func (c *session) readFileHandle(p *packet) *handle {
	if h := c.readHandle(p); h != nil && !h.dir {
		return h
	}
	return nil
}

func (c *session) open(p *packet) {
	path, wanted, attr := p.string(), p.uint32(), p.attributes()
	const read, write, appends, create, truncate, exclusive = 1, 2, 4, 8, 16, 32
	flags := 0
	switch {
	case wanted&read != 0 && wanted&write != 0:
		flags = unix.O_RDWR
	case wanted&write != 0:
		flags = unix.O_WRONLY
	}
	for bit, flag := range map[uint32]int{appends: unix.O_APPEND, create: unix.O_CREAT, truncate: unix.O_TRUNC, exclusive: unix.O_EXCL} {
		if wanted&bit != 0 {
			flags |= flag
		}
	}
	mode := uint32(0o666)
	if attr.flags&hasPermissions != 0 {
		mode = attr.permissions
	}
	if p.err != nil {
		return
	}
	if c.ReadOnly && flags != unix.O_RDONLY && flags&^(unix.O_APPEND|unix.O_EXCL) != unix.O_RDONLY {
		c.status(p, statusPermissionDenied)
		return
	}
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, mode)
	for err == unix.EINTR {
		fd, err = unix.Open(path, flags|unix.O_CLOEXEC, mode)
	}
	if err != nil {
		c.done(p, err)
		return
	}
	c.addHandle(p, &handle{path: path, fd: fd, flags: flags})
}

func (c *session) close(p *packet) {
	name := p.bytes()
	if p.err != nil {
		return
	}
	if len(name) == 4 {
		id := binary.BigEndian.Uint32(name)
		if h := c.handles[id]; h != nil {
			delete(c.handles, id)
			c.next = id
			c.done(p, unix.Close(h.fd))
			return
		}
	}
	c.done(p, unix.ENOENT)
}

func (c *session) read(p *packet) {
	h, offset, n := c.readFileHandle(p), p.uint64(), p.uint32()
	if p.err != nil {
		return
	}
	if h == nil {
		c.status(p, statusFailure)
		return
	}
	if _, err := unix.Seek(h.fd, int64(offset), unix.SEEK_SET); err != nil {
		c.done(p, err)
		return
	}
	data := make([]byte, min(n, maxData))
	got := 0
	if len(data) > 0 {
		var err error
		if got, err = readFD(h.fd, data); err != nil {
			c.done(p, err)
			return
		}
		if got == 0 {
			c.status(p, statusEOF)
			return
		}
	}
	c.send(message(typeData).uint32(p.id).string(string(data[:got])))
}

func readFD(fd int, p []byte) (int, error) {
	for {
		n, err := unix.Read(fd, p)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

func writeFD(fd int, p []byte) (int, error) {
	for {
		n, err := unix.Write(fd, p)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

func (c *session) write(p *packet) {
	h, offset, data := c.readFileHandle(p), p.uint64(), p.bytes()
	if p.err != nil {
		return
	}
	if h == nil {
		c.status(p, statusFailure)
		return
	}
	if h.flags&unix.O_APPEND == 0 {
		if _, err := unix.Seek(h.fd, int64(offset), unix.SEEK_SET); err != nil {
			c.done(p, err)
			return
		}
	}
	n, err := writeFD(h.fd, data)
	switch {
	case err != nil:
		c.done(p, err)
	case n == len(data):
		c.status(p, statusOK)
	default:
		c.status(p, statusFailure)
	}
}

func (c *session) stat(p *packet)  { c.statBy(p, unix.Stat) }
func (c *session) lstat(p *packet) { c.statBy(p, unix.Lstat) }

func (c *session) statBy(p *packet, stat func(string, *unix.Stat_t) error) {
	path := p.string()
	if p.err != nil {
		return
	}
	var st unix.Stat_t
	if err := stat(path, &st); err != nil {
		c.done(p, err)
		return
	}
	c.send(message(typeAttrs).uint32(p.id).stat(&st))
}

func (c *session) fstat(p *packet) {
	h := c.readFileHandle(p)
	if p.err != nil {
		return
	}
	var st unix.Stat_t
	if h == nil {
		c.status(p, statusFailure)
	} else if err := unix.Fstat(h.fd, &st); err != nil {
		c.done(p, err)
	} else {
		c.send(message(typeAttrs).uint32(p.id).stat(&st))
	}
}

// setAttributes sets the attributes in a, and answers with the last error. As in OpenSSH, a
// failure does not keep it from setting the others.
func (c *session) setAttributes(p *packet, a attributes, size, permissions, times, owner func() error) {
	if p.err != nil {
		return
	}
	result := statusOK
	for _, one := range []struct {
		flag uint32
		do   func() error
	}{{hasSize, size}, {hasPermissions, permissions}, {hasTimes, times}, {hasOwner, owner}} {
		if a.flags&one.flag != 0 {
			if err := one.do(); err != nil {
				result = statusOf(err)
			}
		}
	}
	c.status(p, result)
}

func (c *session) setstat(p *packet) {
	path, a := p.string(), p.attributes()
	c.setAttributes(p, a,
		func() error { return unix.Truncate(path, int64(a.size)) },
		func() error { return unix.Chmod(path, a.permissions&0o7777) },
		func() error { return unix.UtimesNanoAt(unix.AT_FDCWD, path, a.times(), 0) },
		func() error { return unix.Chown(path, int(a.uid), int(a.gid)) })
}

func (c *session) fsetstat(p *packet) {
	h, a := c.readFileHandle(p), p.attributes()
	if h == nil {
		c.status(p, statusFailure)
		return
	}
	c.setAttributes(p, a,
		func() error { return unix.Ftruncate(h.fd, int64(a.size)) },
		func() error { return unix.Fchmod(h.fd, a.permissions&0o7777) },
		func() error {
			t := a.times()
			return unix.Futimes(h.fd, []unix.Timeval{{Sec: t[0].Sec}, {Sec: t[1].Sec}})
		},
		func() error { return unix.Fchown(h.fd, int(a.uid), int(a.gid)) })
}

func (c *session) lsetstat(p *packet) {
	path, a := p.string(), p.attributes()
	c.setAttributes(p, a,
		func() error { return unix.EINVAL }, // links have no size
		func() error { return lchmod(path, a.permissions&0o7777) },
		func() error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, path, a.times(), unix.AT_SYMLINK_NOFOLLOW)
		},
		func() error {
			return unix.Fchownat(unix.AT_FDCWD, path, int(a.uid), int(a.gid), unix.AT_SYMLINK_NOFOLLOW)
		})
}

// lchmod changes a mode and does not follow a link, in the same way as glibc.
func lchmod(path string, mode uint32) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return unix.EOPNOTSUPP
	}
	return unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), mode)
}

func (c *session) fsync(p *packet) {
	h := c.readFileHandle(p)
	if h == nil {
		c.status(p, statusNoSuchFile)
		return
	}
	c.done(p, unix.Fsync(h.fd))
}

// copyData copies between files (draft-ietf-secsh-filexfer-extensions-00, section 7). If
// the length is 0, it copies up to the end of the file. (OpenSSH 9.2 reports success for
// an error in the last 64 KiB.)
func (c *session) copyData(p *packet) {
	from, fromOffset, length, to, toOffset := c.readFileHandle(p), p.uint64(), p.uint64(), c.readFileHandle(p), p.uint64()
	if p.err != nil {
		return
	}
	if from == nil || to == nil || from == to || from.path == to.path {
		c.status(p, statusFailure)
		return
	}
	if _, err := unix.Seek(from.fd, int64(fromOffset), unix.SEEK_SET); err != nil {
		c.done(p, err)
		return
	}
	if to.flags&unix.O_APPEND == 0 {
		if _, err := unix.Seek(to.fd, int64(toOffset), unix.SEEK_SET); err != nil {
			c.done(p, err)
			return
		}
	}
	buf := make([]byte, 64<<10)
	for rest := length; length == 0 || rest > 0; {
		part := buf
		if length > 0 {
			part = buf[:min(rest, uint64(len(buf)))]
			rest -= uint64(len(part)) // even if the file is shorter, as in OpenSSH
		}
		n, err := readFD(from.fd, part)
		if err != nil {
			c.done(p, err)
			return
		}
		if n == 0 {
			if rest > 0 {
				c.status(p, statusEOF)
				return
			}
			break
		}
		for part = part[:n]; len(part) > 0; part = part[n:] {
			if n, err = writeFD(to.fd, part); err != nil {
				c.done(p, err)
				return
			}
		}
	}
	c.status(p, statusOK)
}
