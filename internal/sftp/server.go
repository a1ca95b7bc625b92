// Package sftp is a server for the SSH File Transfer Protocol, version 3
// (draft-ietf-secsh-filexfer-02). It replaces OpenSSH's sftp-server(8) where that is not
// installed, and behaves the same: it makes the same system calls, has the same
// extensions (OpenSSH PROTOCOL, section 4), and maps errors to the same statuses.
//
// A server has the rights of its process. Paths are relative to its working directory.
package sftp

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Server has the options of sftp-server(8) that are useful in a forced command.
type Server struct {
	ReadOnly bool     `short:"R" help:"Refuse requests that change anything."`
	Dir      string   `short:"d" placeholder:"DIR" help:"Start in this directory; %d is the home directory, %u the user name, %% a %."`
	Umask    string   `short:"u" placeholder:"UMASK" help:"Umask, in octal."`
	Denied   []string `short:"P" placeholder:"REQUEST" help:"Refuse these requests; sftp-server -Q requests lists the names."`
	Allowed  []string `short:"p" placeholder:"REQUEST" help:"Refuse all requests but these."`

	// Accepted and ignored, because forced commands have them.
	LogLevel string `short:"l" hidden:""`
	Facility string `short:"f" hidden:""`
	LogToErr bool   `short:"e" hidden:""`
}

const (
	maxMessage = 256 << 10         // OpenSSH's SFTP_MAX_MSG_LENGTH
	maxData    = maxMessage - 1024 // in one read or write
)

// The types of messages.
const (
	typeInit          = 1
	typeVersion       = 2
	typeOpen          = 3
	typeClose         = 4
	typeRead          = 5
	typeWrite         = 6
	typeLstat         = 7
	typeFstat         = 8
	typeSetstat       = 9
	typeFsetstat      = 10
	typeOpendir       = 11
	typeReaddir       = 12
	typeRemove        = 13
	typeMkdir         = 14
	typeRmdir         = 15
	typeRealpath      = 16
	typeStat          = 17
	typeRename        = 18
	typeReadlink      = 19
	typeSymlink       = 20
	typeStatus        = 101
	typeHandle        = 102
	typeData          = 103
	typeName          = 104
	typeAttrs         = 105
	typeExtended      = 200
	typeExtendedReply = 201
)

// A status is the result of a request, in answers without data.
type status uint32

const (
	statusOK status = iota
	statusEOF
	statusNoSuchFile
	statusPermissionDenied
	statusFailure
	statusBadMessage
	_ // no connection
	_ // connection lost
	statusUnsupported
)

var statusTexts = [...]string{"Success", "End of file", "No such file", "Permission denied", "Failure", "Bad message", "No connection", "Connection lost", "Operation unsupported"}

// statusOf is OpenSSH's errno_to_portable.
func statusOf(err error) status {
	var errno unix.Errno
	switch {
	case err == nil:
		return statusOK
	case !errors.As(err, &errno):
		return statusFailure
	}
	switch errno {
	case unix.ENOENT, unix.ENOTDIR, unix.EBADF, unix.ELOOP:
		return statusNoSuchFile
	case unix.EPERM, unix.EACCES, unix.EFAULT:
		return statusPermissionDenied
	case unix.ENAMETOOLONG, unix.EINVAL:
		return statusBadMessage
	case unix.ENOSYS:
		return statusUnsupported
	}
	return statusFailure
}

// A request is a type of request.
type request struct {
	name   string // for -P and -p
	writes bool   // refused with -R
	serve  func(*session, *packet)
}

var requests = map[byte]request{
	typeOpen:     {"open", false, (*session).open}, // open checks ReadOnly itself
	typeClose:    {"close", false, (*session).close},
	typeRead:     {"read", false, (*session).read},
	typeWrite:    {"write", true, (*session).write},
	typeLstat:    {"lstat", false, (*session).lstat},
	typeFstat:    {"fstat", false, (*session).fstat},
	typeSetstat:  {"setstat", true, (*session).setstat},
	typeFsetstat: {"fsetstat", true, (*session).fsetstat},
	typeOpendir:  {"opendir", false, (*session).opendir},
	typeReaddir:  {"readdir", false, (*session).readdir},
	typeRemove:   {"remove", true, (*session).remove},
	typeMkdir:    {"mkdir", true, (*session).mkdir},
	typeRmdir:    {"rmdir", true, (*session).rmdir},
	typeRealpath: {"realpath", false, (*session).realpath},
	typeStat:     {"stat", false, (*session).stat},
	typeRename:   {"rename", true, (*session).rename},
	typeReadlink: {"readlink", false, (*session).readlink},
	typeSymlink:  {"symlink", true, (*session).symlink},
}

// extensions are the extended requests, in the order in which the server announces them.
var extensions = []struct {
	extension, version string
	request
}{
	{"posix-rename@openssh.com", "1", request{"posix-rename", true, (*session).posixRename}},
	{"statvfs@openssh.com", "2", request{"statvfs", false, (*session).statvfs}},
	{"fstatvfs@openssh.com", "2", request{"fstatvfs", false, (*session).fstatvfs}},
	{"hardlink@openssh.com", "1", request{"hardlink", true, (*session).hardlink}},
	{"fsync@openssh.com", "1", request{"fsync", true, (*session).fsync}},
	{"lsetstat@openssh.com", "1", request{"lsetstat", true, (*session).lsetstat}},
	{"limits@openssh.com", "1", request{"limits", false, (*session).limits}},
	{"expand-path@openssh.com", "1", request{"expand-path", false, (*session).expandPath}},
	{"copy-data", "1", request{"copy-data", true, (*session).copyData}},
	{"home-directory", "1", request{"home-directory", false, (*session).homeDirectory}},
	{"users-groups-by-id@openssh.com", "1", request{"users-groups-by-id", false, (*session).usersGroups}},
}

// permits reports whether the options permit a request.
func (s *Server) permits(r request) bool {
	if s.ReadOnly && r.writes || slices.Contains(s.Denied, r.name) {
		return false
	}
	return len(s.Allowed) == 0 || slices.Contains(s.Allowed, r.name)
}

// Serve serves one client on r and w until the end of r.
//
// It needs a process of its own: it sets the working directory and umask of the process,
// and makes the process undumpable. If the process were dumpable, the client could write
// code to /proc/self/mem and run it.
func (s Server) Serve(r io.Reader, w io.Writer) error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	if s.Umask != "" {
		umask, err := strconv.ParseUint(s.Umask, 8, 12)
		if err != nil || umask > 0o777 {
			return fmt.Errorf("%q is not a umask", s.Umask)
		}
		unix.Umask(int(umask))
	}
	if s.Dir != "" {
		dir := strings.NewReplacer("%%", "%", "%d", os.Getenv("HOME"), "%u", os.Getenv("USER")).Replace(s.Dir)
		if err := os.Chdir(dir); err != nil {
			return err
		}
	}
	return s.serve(r, w)
}

// A session serves one client.
type session struct {
	*Server
	out     *bufio.Writer
	handles map[uint32]*handle
	next    uint32 // the next handle
	inited  bool

	users, groups map[uint32]string // cached names, "" for unknown ids
}

// serve answers requests one after the other until the end of r.
func (s *Server) serve(r io.Reader, w io.Writer) error {
	in := bufio.NewReaderSize(r, 64<<10)
	c := &session{Server: s, out: bufio.NewWriterSize(w, 64<<10), handles: map[uint32]*handle{}, users: map[uint32]string{}, groups: map[uint32]string{}}
	defer func() {
		for _, h := range c.handles {
			unix.Close(h.fd)
		}
	}()
	var buf []byte
	for {
		if in.Buffered() == 0 {
			if err := c.out.Flush(); err != nil {
				return err
			}
		}
		var head [4]byte
		if _, err := io.ReadFull(in, head[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		n := binary.BigEndian.Uint32(head[:])
		if n == 0 || n > maxMessage {
			return fmt.Errorf("a message of %d bytes", n)
		}
		buf = slices.Grow(buf[:0], int(n))[:n]
		if _, err := io.ReadFull(in, buf); err != nil {
			return err
		}
		if err := c.handle(buf[0], &packet{data: buf[1:]}); err != nil {
			c.out.Flush()
			return err
		}
	}
}

// handle answers one message. A protocol error of the client ends the session, as with
// OpenSSH.
func (c *session) handle(kind byte, p *packet) error {
	if kind == typeInit {
		p.uint32() // the client's version; every later version includes version 3
		c.inited = true
		reply := message(typeVersion).uint32(3)
		for _, e := range extensions {
			if c.permits(e.request) {
				reply.string(e.extension).string(e.version)
			}
		}
		c.send(reply)
		return p.err
	}
	if !c.inited {
		return errors.New("a request before SSH_FXP_INIT")
	}
	r, known := requests[kind]
	p.id = p.uint32()
	if kind == typeExtended {
		name := p.string()
		for _, e := range extensions {
			if e.extension == name {
				r, known = e.request, true
			}
		}
		if !known && p.err == nil {
			c.status(p, statusUnsupported)
			return nil
		}
	}
	switch {
	case !known: // no answer, as in OpenSSH
	case !c.permits(r):
		c.status(p, statusPermissionDenied)
		return nil
	default:
		r.serve(c, p)
	}
	return p.err
}

func (c *session) send(m *reply) {
	binary.BigEndian.PutUint32(m.data, uint32(len(m.data)-4))
	c.out.Write(m.data)
}

func (c *session) status(p *packet, s status) { c.statusText(p, s, statusTexts[s]) }

func (c *session) statusText(p *packet, s status, text string) {
	if p.err == nil {
		c.send(message(typeStatus).uint32(p.id).uint32(uint32(s)).string(text).string(""))
	}
}

// done answers with the status of an error, or of success.
func (c *session) done(p *packet, err error) { c.status(p, statusOf(err)) }

// name answers with one name.
func (c *session) name(p *packet, name string) {
	c.send(message(typeName).uint32(p.id).uint32(1).string(name).string(name).uint32(0))
}
