package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"
)

// A login is one with a terminal.
type login struct {
	at   time.Time // zero if there was none
	line string    // the terminal, such as pts/3
	from string    // the client's address
}

// String is what the next interactive session shows.
func (l login) String() string {
	return fmt.Sprintf("Last login: %s from %s", l.at.Format("Mon Jan _2 15:04:05 2006"), l.from)
}

// login records that the session is a login, if it has a terminal, and returns
// the one before.
func (s *session) login() login {
	if s.tty == nil {
		return login{}
	}
	now := login{at: time.Now(), line: strings.TrimPrefix(s.tty.name(), "/dev/"), from: "nowhere"}
	if s.c.id.Client.IsValid() {
		now.from = s.c.id.Client.Addr().String()
	}
	return s.c.server.recordLogin(now)
}

// recordLogin remembers a login, and returns the one before it. Without a file
// that it may write it knows of those to this agent only.
func (s *Server) recordLogin(now login) (before login) {
	s.mu.Lock()
	before, s.lastLogin = s.lastLogin, now
	s.mu.Unlock() // a disk may be slow
	if s.Lastlog == "" {
		return before
	}
	logged, err := swapLastlog(s.Lastlog, s.Account.UID, now)
	switch {
	case err == nil && !logged.at.IsZero():
		return logged
	case err == nil: // the first, or the file is a link to /dev/null
	case !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission):
		s.Log.Warn("recording a login", "file", s.Lastlog, "err", err)
	}
	return before
}

// The struct lastlog of glibc's <lastlog.h>: a time, the terminal and the host,
// the last two filled up with zeros.
const (
	lastlogLine = 32
	lastlogHost = 256
)

// lastlogTime is the size of the time, for which amd64 has kept 32 bits.
func lastlogTime() int {
	if runtime.GOARCH == "arm64" {
		return 8
	}
	return 4
}

// swapLastlog puts a login into the record of a user id, and returns what was
// there.
func swapLastlog(path string, uid uint32, now login) (before login, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return login{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	record := make([]byte, lastlogTime()+lastlogLine+lastlogHost)
	at := int64(uid) * int64(len(record))
	if _, err := f.ReadAt(record, at); err == nil {
		before = decodeLastlog(record)
	} else if err != io.EOF { // which says that the file does not reach as far
		return login{}, err
	}
	encodeLastlog(record, now)
	_, err = f.WriteAt(record, at)
	return before, err
}

func encodeLastlog(record []byte, l login) {
	clear(record)
	line := record[lastlogTime():]
	host := line[lastlogLine:]
	seconds := l.at.Unix()
	if lastlogTime() == 8 {
		binary.NativeEndian.PutUint64(record, uint64(seconds))
	} else {
		binary.NativeEndian.PutUint32(record, uint32(seconds))
	}
	copy(line[:lastlogLine-1], l.line)
	copy(host[:lastlogHost-1], l.from)
}

func decodeLastlog(record []byte) (l login) {
	line := record[lastlogTime():]
	host := line[lastlogLine:]
	var seconds int64
	if lastlogTime() == 8 {
		seconds = int64(binary.NativeEndian.Uint64(record))
	} else {
		seconds = int64(binary.NativeEndian.Uint32(record)) // as unsigned it lasts until 2106
	}
	if seconds != 0 {
		l.at = time.Unix(seconds, 0)
	}
	text := func(b []byte) string {
		b, _, _ = bytes.Cut(b, []byte{0})
		return string(b)
	}
	l.line, l.from = text(line[:lastlogLine]), text(host[:lastlogHost])
	return l
}
