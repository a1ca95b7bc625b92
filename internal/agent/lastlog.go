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

// A terminalLogin is a login with a terminal.
type terminalLogin struct {
	at   time.Time // zero if there was no login
	line string    // the terminal, such as pts/3
	from string    // the client's address
}

// String returns the line that the next interactive session shows.
func (l terminalLogin) String() string {
	return fmt.Sprintf("Last login: %s from %s", l.at.Format("Mon Jan _2 15:04:05 2006"), l.from)
}

// updateLastlog stores the session as the last login, and returns the previous one. Without
// a terminal it does neither.
func (s *session) updateLastlog() terminalLogin {
	if s.tty == nil {
		return terminalLogin{}
	}
	now := terminalLogin{at: time.Now(), line: strings.TrimPrefix(s.tty.name(), "/dev/"), from: "nowhere"}
	if s.c.id.Client.IsValid() {
		now.from = s.c.id.Client.Addr().String()
	}
	return s.c.server.swapLastLogin(now)
}

// swapLastLogin stores a login, and returns the previous one. Without a lastlog file that it
// may write, it returns the previous login to this agent.
func (s *Server) swapLastLogin(now terminalLogin) (before terminalLogin) {
	s.mu.Lock()
	before, s.lastLogin = s.lastLogin, now
	s.mu.Unlock() // before the file, since a disk may be slow
	if s.Lastlog == "" {
		return before
	}
	logged, err := swapLastlog(s.Lastlog, s.Account.UID, now)
	switch {
	case err == nil && !logged.at.IsZero():
		return logged
	case err == nil: // the first login, or the file is a link to /dev/null
	case !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission):
		s.ClientLog.Warn("updating the lastlog file failed", "file", s.Lastlog, "err", err)
	}
	return before
}

// An entry is glibc's struct lastlog (<lastlog.h>): a time, the terminal and the host, the
// last two padded with zeros.
const (
	lastlogLine = 32
	lastlogHost = 256
)

// lastlogTime is the size of the time, which is 32 bits on amd64.
func lastlogTime() int {
	if runtime.GOARCH == "arm64" {
		return 8
	}
	return 4
}

// swapLastlog writes the entry of a user id, and returns the previous one.
func swapLastlog(path string, uid uint32, now terminalLogin) (before terminalLogin, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return terminalLogin{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	entry := make([]byte, lastlogTime()+lastlogLine+lastlogHost)
	at := int64(uid) * int64(len(entry))
	if _, err := f.ReadAt(entry, at); err == nil {
		before = decodeLastlog(entry)
	} else if err != io.EOF { // io.EOF: the file ends before the entry
		return terminalLogin{}, err
	}
	encodeLastlog(entry, now)
	_, err = f.WriteAt(entry, at)
	return before, err
}

func encodeLastlog(entry []byte, l terminalLogin) {
	clear(entry)
	line := entry[lastlogTime():]
	host := line[lastlogLine:]
	seconds := l.at.Unix()
	if lastlogTime() == 8 {
		binary.NativeEndian.PutUint64(entry, uint64(seconds))
	} else {
		binary.NativeEndian.PutUint32(entry, uint32(seconds))
	}
	copy(line[:lastlogLine-1], l.line)
	copy(host[:lastlogHost-1], l.from)
}

func decodeLastlog(entry []byte) (l terminalLogin) {
	line := entry[lastlogTime():]
	host := line[lastlogLine:]
	var seconds int64
	if lastlogTime() == 8 {
		seconds = int64(binary.NativeEndian.Uint64(entry))
	} else {
		seconds = int64(binary.NativeEndian.Uint32(entry)) // unsigned, which lasts until 2106
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
