package sftp

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// onPath serves a request with one path.
func (c *session) onPath(p *packet, do func(string) error) {
	if path := p.string(); p.err == nil {
		c.done(p, do(path))
	}
}

// onPaths serves a request with two paths.
func (c *session) onPaths(p *packet, do func(from, to string) error) {
	if from, to := p.string(), p.string(); p.err == nil {
		c.done(p, do(from, to))
	}
}

func (c *session) remove(p *packet)      { c.onPath(p, unix.Unlink) }
func (c *session) rmdir(p *packet)       { c.onPath(p, unix.Rmdir) }
func (c *session) symlink(p *packet)     { c.onPaths(p, unix.Symlink) } // OpenSSH and its clients send the target first, unlike the draft
func (c *session) hardlink(p *packet)    { c.onPaths(p, unix.Link) }
func (c *session) posixRename(p *packet) { c.onPaths(p, unix.Rename) }
func (c *session) rename(p *packet)      { c.onPaths(p, renameNew) }

func (c *session) mkdir(p *packet) {
	path, a := p.string(), p.attributes()
	if p.err != nil {
		return
	}
	mode := uint32(0o777)
	if a.flags&hasPermissions != 0 {
		mode = a.permissions & 0o7777
	}
	c.done(p, unix.Mkdir(path, mode))
}

// renameNew renames from to to, which must not exist (draft, section 6.5).
func renameNew(from, to string) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		// Unlike rename(2), link(2) fails if to exists, so there is no race.
		switch err := unix.Link(from, to); err {
		case nil:
			if err := unix.Unlink(from); err != nil {
				unix.Unlink(to)
				return err
			}
			return nil
		case unix.EOPNOTSUPP, unix.ENOSYS, unix.EXDEV, unix.EPERM: // the file system has no hard links
		default:
			return err
		}
	}
	if unix.Stat(to, &st) == nil {
		return unix.EEXIST
	}
	return unix.Rename(from, to)
}

func (c *session) readlink(p *packet) {
	path := p.string()
	if p.err != nil {
		return
	}
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlink(path, buf)
	if err != nil {
		c.done(p, err)
		return
	}
	c.name(p, string(buf[:n]))
}

func (c *session) realpath(p *packet) {
	path := p.string()
	if p.err != nil {
		return
	}
	if path == "" {
		path = "."
	}
	c.resolve(p, path)
}

func (c *session) resolve(p *packet, path string) {
	resolved, err := realpath(path)
	if err != nil {
		c.done(p, err)
		return
	}
	c.name(p, resolved)
}

// realpath returns the absolute path of a file, without symbolic links. The last component
// need not exist.
func realpath(path string) (string, error) {
	if len(path) >= unix.PathMax {
		return "", unix.ENAMETOOLONG
	}
	resolved := "/"
	if path[0] != '/' {
		var err error
		if resolved, err = os.Getwd(); err != nil {
			return "", unix.ENOENT
		}
	}
	const maxLinks = 40
	for links, rest := 0, path; rest != ""; {
		part, after, more := strings.Cut(rest, "/")
		rest = after
		switch part {
		case "", ".":
			continue
		case "..":
			resolved = resolved[:max(1, strings.LastIndexByte(resolved, '/'))]
			continue
		}
		parent := resolved
		resolved = strings.TrimSuffix(resolved, "/") + "/" + part
		if len(resolved) >= unix.PathMax {
			return "", unix.ENAMETOOLONG
		}
		var st unix.Stat_t
		if err := unix.Lstat(resolved, &st); err == unix.ENOENT && !more {
			return resolved, nil
		} else if err != nil {
			return "", err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			continue
		}
		if links++; links > maxLinks {
			return "", unix.ELOOP
		}
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlink(resolved, buf)
		if err != nil {
			return "", err
		}
		target := string(buf[:n])
		if resolved = parent; strings.HasPrefix(target, "/") {
			resolved = "/"
		}
		if more {
			target = strings.TrimSuffix(target, "/") + "/" + rest
		}
		if len(target) >= unix.PathMax {
			return "", unix.ENAMETOOLONG
		}
		rest = target
	}
	return resolved, nil
}

// expandPath is realpath for paths that may begin with ~user, or with ~ for the working
// directory.
func (c *session) expandPath(p *packet) {
	path := p.string()
	if p.err != nil {
		return
	}
	if name, isHome := strings.CutPrefix(path, "~"); isHome {
		name, rest, _ := strings.Cut(name, "/")
		home := "."
		if name != "" {
			u, err := user.Lookup(name)
			if err != nil {
				c.statusText(p, statusNoSuchFile, "no such user")
				return
			}
			home = u.HomeDir
		}
		path = home + "/" + rest
	}
	if path == "" {
		path = "."
	}
	c.resolve(p, path)
}

// homeDirectory answers with a user's home directory. (OpenSSH 9.2 answers with the
// session's own for every user that exists.)
func (c *session) homeDirectory(p *packet) {
	name := p.string()
	if p.err != nil {
		return
	}
	u, err := user.Lookup(name)
	if err != nil {
		c.status(p, statusFailure)
		return
	}
	c.name(p, u.HomeDir)
}

// usersGroups answers lists of user and group ids with lists of names. The name of an
// unknown id is empty.
func (c *session) usersGroups(p *packet) {
	uids, gids := p.bytes(), p.bytes()
	if len(uids)%4 != 0 || len(gids)%4 != 0 {
		p.err = errMalformed
	}
	if p.err != nil {
		return
	}
	list := func(ids []byte, name func(uint32) string) string {
		var names reply
		for ; len(ids) > 0; ids = ids[4:] {
			names.string(name(binary.BigEndian.Uint32(ids)))
		}
		return string(names.data)
	}
	c.send(message(typeExtendedReply).uint32(p.id).string(list(uids, c.user)).string(list(gids, c.group)))
}

// user returns the name of a user, or "".
func (c *session) user(id uint32) string {
	name, known := c.users[id]
	if !known {
		if u, err := user.LookupId(strconv.FormatUint(uint64(id), 10)); err == nil {
			name = u.Username
		}
		c.users[id] = name
	}
	return name
}

// group returns the name of a group, or "".
func (c *session) group(id uint32) string {
	name, known := c.groups[id]
	if !known {
		if g, err := user.LookupGroupId(strconv.FormatUint(uint64(id), 10)); err == nil {
			name = g.Name
		}
		c.groups[id] = name
	}
	return name
}

func (c *session) statvfs(p *packet) {
	path := p.string()
	if p.err != nil {
		return
	}
	c.sendStatfs(p, func(st *unix.Statfs_t) error { return unix.Statfs(path, st) })
}

func (c *session) fstatvfs(p *packet) {
	h := c.readFileHandle(p)
	if p.err != nil {
		return
	}
	if h == nil {
		c.status(p, statusFailure)
		return
	}
	c.sendStatfs(p, func(st *unix.Statfs_t) error { return unix.Fstatfs(h.fd, st) })
}

func (c *session) sendStatfs(p *packet, statfs func(*unix.Statfs_t) error) {
	var st unix.Statfs_t
	if err := statfs(&st); err != nil {
		c.done(p, err)
		return
	}
	fragment := uint64(st.Frsize)
	if fragment == 0 {
		fragment = uint64(st.Bsize)
	}
	const readOnly, noSetuid = 1, 2 // the same in the protocol and in Linux
	c.send(message(typeExtendedReply).uint32(p.id).
		uint64(uint64(st.Bsize)).uint64(fragment).uint64(st.Blocks).uint64(st.Bfree).uint64(st.Bavail).
		uint64(st.Files).uint64(st.Ffree).uint64(st.Ffree).
		uint64(uint64(uint32(st.Fsid.Val[0])) | uint64(uint32(st.Fsid.Val[1]))<<32).
		uint64(uint64(st.Flags) & (readOnly | noSetuid)).uint64(uint64(st.Namelen)))
}

func (c *session) limits(p *packet) {
	var files uint64
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil && limit.Cur > 5 {
		files = limit.Cur - 5
	}
	c.send(message(typeExtendedReply).uint32(p.id).uint64(maxMessage).uint64(maxData).uint64(maxData).uint64(files))
}

func (c *session) opendir(p *packet) {
	path := p.string()
	if p.err != nil {
		return
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		c.done(p, err)
		return
	}
	c.addHandle(p, &handle{path: path, fd: fd, dir: true})
}

// maxNames is the number of names in one answer to readdir.
const maxNames = 100

func (c *session) readdir(p *packet) {
	h := c.readHandle(p)
	if p.err != nil {
		return
	}
	if h == nil || !h.dir {
		c.status(p, statusFailure)
		return
	}
	count := uint32(0)
	m := message(typeName).uint32(p.id).uint32(0)
	for count < maxNames {
		if len(h.entries) == 0 {
			if h.entries = readEntries(h.fd); len(h.entries) == 0 {
				break
			}
		}
		name := h.entries[0]
		h.entries = h.entries[1:]
		path := h.path + "/" + name
		if h.path == "/" {
			path = "/" + name
		}
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil {
			continue
		}
		m.string(name).string(c.longName(name, &st)).stat(&st)
		count++
	}
	if count == 0 {
		c.status(p, statusEOF)
		return
	}
	binary.BigEndian.PutUint32(m.data[9:], count)
	c.send(m)
}

// readEntries returns the next names in a directory, "." and ".." included (getdents64(2)).
// It returns none at the end.
func readEntries(fd int) (names []string) {
	buf := make([]byte, 32<<10)
	n, err := unix.Getdents(fd, buf)
	if err != nil {
		return nil
	}
	for b := buf[:max(n, 0)]; len(b) > 19; {
		length := int(binary.NativeEndian.Uint16(b[16:]))
		if length < 19 || length > len(b) {
			break
		}
		name, _, _ := strings.Cut(string(b[19:length]), "\x00")
		names = append(names, name)
		b = b[length:]
	}
	return names
}

// longName formats a line of ls -l.
func (c *session) longName(name string, st *unix.Stat_t) string {
	owner, group := c.user(st.Uid), c.group(st.Gid)
	if owner == "" {
		owner = strconv.FormatUint(uint64(st.Uid), 10)
	}
	if group == "" {
		group = strconv.FormatUint(uint64(st.Gid), 10)
	}
	at := time.Unix(st.Mtim.Sec, 0)
	when := at.Format("Jan _2  2006")
	const halfYear = 365 * 24 * 60 * 60 / 2
	if now := time.Now().Unix(); now-halfYear < st.Mtim.Sec && now >= st.Mtim.Sec {
		when = at.Format("Jan _2 15:04")
	}
	line := fmt.Sprintf("%s  %3d %-8s %-8s %8d %s %s", modeString(st.Mode), st.Nlink, owner, group, uint64(st.Size), when, name)
	return line[:min(len(line), 1023)]
}

// modeString is strmode(3) without the trailing space.
func modeString(mode uint32) string {
	kinds := map[uint32]byte{
		unix.S_IFDIR: 'd', unix.S_IFCHR: 'c', unix.S_IFBLK: 'b', unix.S_IFREG: '-', unix.S_IFLNK: 'l', unix.S_IFSOCK: 's', unix.S_IFIFO: 'p',
	}
	s := []byte("?rwxrwxrwx")
	if kind, ok := kinds[mode&unix.S_IFMT]; ok {
		s[0] = kind
	}
	for i := range 9 {
		if mode&(1<<(8-i)) == 0 {
			s[1+i] = '-'
		}
	}
	for _, special := range []struct {
		bit  uint32
		at   int
		with byte
	}{{unix.S_ISUID, 3, 's'}, {unix.S_ISGID, 6, 's'}, {unix.S_ISVTX, 9, 't'}} {
		if mode&special.bit == 0 {
			continue
		}
		if s[special.at] == 'x' {
			s[special.at] = special.with
		} else {
			s[special.at] = special.with - 'a' + 'A'
		}
	}
	return string(s)
}
