package transfer

import (
	"fmt"
	"math"
	"slices"
	"sync"
)

// Types of packets: draft-ietf-secsh-filexfer-02, section 3.
const (
	fxpInit     = 1
	fxpVersion  = 2
	fxpOpen     = 3
	fxpClose    = 4
	fxpRead     = 5
	fxpWrite    = 6
	fxpSetstat  = 9
	fxpFsetstat = 10
	fxpOpendir  = 11
	fxpRemove   = 13
	fxpMkdir    = 14
	fxpRmdir    = 15
	fxpRename   = 18
	fxpSymlink  = 20
	fxpStatus   = 101
	fxpHandle   = 102
	fxpData     = 103
	fxpExtended = 200
)

// Flags of SSH_FXP_OPEN, section 6.3, and of attributes, section 5.
const (
	openWrite = 0x02

	attrSize        = 0x01
	attrOwner       = 0x02
	attrPermissions = 0x04
)

const (
	fxOK  = 0 // section 7
	fxEOF = 1
)

const (
	// maxPacket bounds the length of a packet. OpenSSH takes 256 KiB, some
	// servers more.
	maxPacket = 16 << 20
	// maxHandle is the maximum length of a handle: section 6.2.
	maxHandle = 256
	// maxBody is the number of bytes of a request that are kept: two paths, and 1 KiB
	// for the rest.
	maxBody = 2*maxPath + 1024
	// maxPending bounds the requests without an answer, maxFiles the open files, and
	// maxKept the bytes of the paths and handles of both.
	maxPending = 8192
	maxFiles   = 4096
	maxKept    = 4 << 20
)

// An SFTP parses an sftp session. Its methods may be called concurrently. The caller must
// pass data to it before it forwards the data.
type SFTP struct {
	report func(Event) error

	mu      sync.Mutex
	err     error // the reason why parsing has stopped
	client  packets
	server  packets
	begun   bool // the client has sent SSH_FXP_INIT
	version uint32
	pending map[uint32]*request
	files   map[string]*file // by handle
	kept    int              // bytes of paths and handles
}

// A request has no answer yet.
type request struct {
	typ    byte
	events []Event // to report when the answer comes
	file   *file   // for fxpOpen, fxpClose, fxpRead and fxpWrite
	// unknown says that a handle in the request is not one of an open file.
	unknown bool
	offset  uint64
	length  uint32
	kept    int
}

// A file is open or being opened.
type file struct {
	path          string
	write         bool // opened for writing
	dir           bool
	read, written span
	failure       string // of the first read or write that failed
	kept          int
}

// A span is the number of bytes that were transferred in one direction, and the lowest
// offset of them.
type span struct{ bytes, offset int64 }

func (s *span) add(offset uint64, n uint32) {
	at := int64(min(offset, math.MaxInt64))
	if s.bytes == 0 || at < s.offset {
		s.offset = at
	}
	s.bytes += int64(n)
}

// NewSFTP returns a parser for a new session. Its methods call report and return its
// errors.
func NewSFTP(report func(Event) error) *SFTP {
	s := &SFTP{report: report, pending: make(map[uint32]*request), files: make(map[string]*file)}
	s.client.needed, s.server.needed = clientBody, serverBody
	return s
}

// FromClient parses data from the client. An error is returned once: it wraps ErrLost or
// is that of report.
func (s *SFTP) FromClient(p []byte) error { return s.take(&s.client, p, s.fromClient) }

// FromServer is FromClient for data from the server.
func (s *SFTP) FromServer(p []byte) error { return s.take(&s.server, p, s.fromServer) }

func (s *SFTP) take(from *packets, p []byte, packet func(typ byte, b body) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil
	}
	if s.err = from.split(p, packet); s.err != nil {
		s.abandon()
	}
	return s.err
}

// End reports the open files and the requests without an answer. It must be the last
// call.
func (s *SFTP) End() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.abandon()
}

// abandon reports open files and unanswered requests as unfinished. The caller holds s.mu.
func (s *SFTP) abandon() error {
	var first error
	keep := func(err error) {
		if first == nil {
			first = err
		}
	}
	closing := make(map[*file]bool)
	for _, r := range s.pending {
		if r.file != nil && (r.typ == fxpClose || r.typ == fxpOpen) {
			closing[r.file] = true
		}
	}
	for _, f := range s.files {
		closing[f] = true
	}
	for f := range closing {
		keep(s.transfers(f, unfinished))
	}
	for _, r := range s.pending {
		for _, e := range r.events {
			e.Failure = unfinished
			keep(s.report(e))
		}
	}
	clear(s.files)
	clear(s.pending)
	return first
}

// clientBody and serverBody return how many bytes of the body of a packet are needed.
func clientBody(typ byte) int {
	if typ == fxpWrite {
		return 4 + 4 + maxHandle + 8 + 4
	}
	return maxBody
}

func serverBody(typ byte) int {
	if typ == fxpData {
		return 4 + 4
	}
	return 4 + 4 + maxHandle
}

func (s *SFTP) fromClient(typ byte, b body) error {
	if !s.begun {
		if typ != fxpInit {
			return lost("the client does not begin with SSH_FXP_INIT")
		}
		s.begun = true
		return nil
	}
	id := b.uint32()
	r := &request{typ: typ}
	switch typ {
	case fxpInit:
		return lost("a second SSH_FXP_INIT")
	case fxpOpen:
		path := b.path()
		flags := b.uint32()
		r.file = &file{path: path, write: flags&openWrite != 0}
	case fxpOpendir:
		r.file = &file{path: b.path(), dir: true}
	case fxpClose:
		handle := b.string(maxHandle)
		if r.file = s.find(handle, r); r.file != nil {
			// The server may reuse the handle once it has answered.
			delete(s.files, handle)
		}
	case fxpRead:
		r.file, r.offset = s.find(b.string(maxHandle), r), b.uint64()
	case fxpWrite:
		r.file, r.offset, r.length = s.find(b.string(maxHandle), r), b.uint64(), b.uint32()
	case fxpSetstat:
		r.events = b.attributes(b.path())
	case fxpFsetstat:
		if f := s.find(b.string(maxHandle), r); f != nil {
			// Omit truncate for a file that is being written, because scp sets
			// the size of every file at the end. The Transfer has its size.
			r.events = slices.DeleteFunc(b.attributes(f.path), func(e Event) bool { return e.Op == "truncate" && f.write })
		}
	case fxpRemove:
		r.events = []Event{{Op: "remove", Path: b.path()}}
	case fxpMkdir:
		r.events = []Event{{Op: "mkdir", Path: b.path()}}
	case fxpRmdir:
		r.events = []Event{{Op: "rmdir", Path: b.path()}}
	case fxpRename:
		r.events = []Event{{Op: "rename", Path: b.path(), To: b.path()}}
	case fxpSymlink: // OpenSSH PROTOCOL, section 4.1: the target comes first
		r.events = []Event{{Op: "symlink", To: b.path(), Path: b.path()}}
	case fxpExtended:
		r.events = s.extended(b.string(maxPath), &b, r)
	}
	if b.bad {
		return lost("a malformed packet of type %d", typ)
	}
	for i := range r.events {
		r.events[i].Kind = Change
	}
	return s.await(id, r)
}

// find returns the open file with a handle, for a request. It returns nil if there is none.
func (s *SFTP) find(handle string, r *request) *file {
	f := s.files[handle]
	r.unknown = r.unknown || f == nil
	return f
}

// extended returns the events of an extended request: OpenSSH PROTOCOL, section 4.
func (s *SFTP) extended(name string, b *body, r *request) []Event {
	switch name {
	case "posix-rename@openssh.com":
		return []Event{{Op: "rename", Path: b.path(), To: b.path()}}
	case "hardlink@openssh.com":
		return []Event{{Op: "link", To: b.path(), Path: b.path()}}
	case "lsetstat@openssh.com":
		return b.attributes(b.path())
	case "copy-data": // draft-ietf-secsh-filexfer-extensions-00, section 7
		from := s.find(b.string(maxHandle), r)
		b.uint64()
		b.uint64()
		to := s.find(b.string(maxHandle), r)
		if from != nil && to != nil {
			return []Event{{Op: "copy", Path: from.path, To: to.path}}
		}
	}
	return nil
}

// await stores a request until its answer comes.
func (s *SFTP) await(id uint32, r *request) error {
	if s.pending[id] != nil {
		return lost("a request has the id of one that is not answered yet")
	}
	if r.file != nil && (r.typ == fxpOpen || r.typ == fxpOpendir) {
		r.kept = len(r.file.path)
	}
	for _, e := range r.events {
		r.kept += len(e.Path) + len(e.To)
	}
	if s.kept += r.kept; len(s.pending) >= maxPending || s.kept > maxKept {
		return lost("too many requests wait for an answer")
	}
	s.pending[id] = r
	return nil
}

func (s *SFTP) fromServer(typ byte, b body) error {
	if s.version == 0 {
		if typ != fxpVersion || !s.begun {
			return lost("the server does not begin with SSH_FXP_VERSION")
		}
		if s.version = b.uint32(); s.version != 3 {
			return lost("version %d of the protocol", s.version)
		}
		return nil
	}
	id := b.uint32()
	r := s.pending[id]
	if b.bad || r == nil {
		if b.bad {
			return lost("a malformed answer of type %d", typ)
		}
		return lost("an answer to no request")
	}
	delete(s.pending, id)
	s.kept -= r.kept
	code := uint32(fxOK)
	if typ == fxpStatus {
		code = b.uint32()
	}
	handle := ""
	if typ == fxpHandle {
		handle = b.string(maxHandle)
	}
	length := uint32(0)
	if typ == fxpData {
		length = b.uint32()
	}
	if b.bad {
		return lost("a malformed answer of type %d", typ)
	}
	failure := statusText(code)
	switch {
	case r.unknown && code == fxOK:
		// Handles can be guessed, so a client can use one before the server has sent it.
		return lost("a handle was used while no open file had it")
	case (r.typ == fxpOpen || r.typ == fxpOpendir) && typ == fxpHandle:
		return s.opened(r.file, handle)
	case r.typ == fxpOpen:
		return s.report(Event{Kind: Transfer, Path: r.file.path, Upload: r.file.write, Failure: failure})
	case r.typ == fxpClose && r.file != nil:
		return s.transfers(r.file, failure)
	case r.typ == fxpRead && r.file != nil && typ == fxpData:
		r.file.read.add(r.offset, length)
	case r.typ == fxpWrite && r.file != nil && code == fxOK:
		r.file.written.add(r.offset, r.length)
	case (r.typ == fxpWrite || r.typ == fxpRead && code != fxEOF) && r.file != nil && r.file.failure == "":
		r.file.failure = failure
	}
	for _, e := range r.events {
		e.Failure = failure
		if err := s.report(e); err != nil {
			return err
		}
	}
	return nil
}

// opened stores the handle of a file.
func (s *SFTP) opened(f *file, handle string) error {
	f.kept = len(f.path) + len(handle)
	if s.files[handle] != nil {
		return lost("two open files have the same handle")
	}
	if s.kept += f.kept; len(s.files) >= maxFiles || s.kept > maxKept {
		return lost("too many files are open")
	}
	s.files[handle] = f
	if f.dir {
		return nil
	}
	return s.report(Event{Kind: Opened, Path: f.path, Upload: f.write})
}

// transfers reports the bytes that were read and written of a file. failure is that of
// closing the file.
func (s *SFTP) transfers(f *file, failure string) error {
	s.kept -= f.kept
	if f.dir {
		return nil
	}
	if f.failure != "" && (failure == "" || failure == unfinished) {
		failure = f.failure
	}
	if f.read.bytes > 0 || !f.write {
		err := s.report(Event{Kind: Transfer, Path: f.path, Bytes: f.read.bytes, Offset: f.read.offset, Failure: failure})
		if err != nil {
			return err
		}
	}
	if f.written.bytes > 0 || f.write && f.read.bytes == 0 {
		return s.report(Event{Kind: Transfer, Path: f.path, Upload: true, Bytes: f.written.bytes, Offset: f.written.offset, Failure: failure})
	}
	return nil
}

// statusText returns the meaning of a code of SSH_FXP_STATUS, empty for success:
// section 7.
func statusText(code uint32) string {
	texts := []string{"", "end of file", "no such file", "permission denied", "failure", "bad message", "no connection", "connection lost", "operation unsupported"}
	if int64(code) < int64(len(texts)) {
		return texts[code]
	}
	return fmt.Sprintf("status %d", code)
}
