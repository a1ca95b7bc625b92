package config

import (
	"log/syslog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// Audit are the settings of the audit log.
type Audit struct {
	// To is "none", "stdout", "syslog", or the path of a file, which holds a
	// slash. Default none.
	To string
	// OnError applies when it cannot be written. Default FailClosed.
	OnError OnError
	// Reserve is the number of bytes of the file system that are reserved for the
	// log's file, at least 64K; zero, written "none", means none. Default 16M.
	Reserve int64
	// Facility is the syslog facility: auth, authpriv, daemon, user, or local0 to
	// local7. Default authpriv.
	Facility syslog.Priority
	// Socket is the path of the syslog daemon's socket. Empty, written "none", means
	// /dev/log and the like. Default none.
	Socket string
}

// Recordings are the settings of recordings of sessions.
type Recordings struct {
	// Dir need not exist yet. Empty, the default, means the folder
	// "recordings" in StateDir.
	Dir string
	// MaxSize limits each file, in bytes; a longer recording has several files. In
	// the configuration it may end in K, M or G. At least 64K; default 100M.
	MaxSize int64
	// MaxPerUser limits the recordings of one user, in bytes; zero, written
	// "none", means none. Default 10G.
	MaxPerUser int64
	// OnError applies to a session that must be recorded and cannot be. Default
	// FailClosed.
	OnError OnError
}

// OnError is the reaction to an audit log or recording that cannot be written.
type OnError string

const (
	// FailClosed ends connections or sessions that would continue unlogged, and
	// rejects new ones.
	FailClosed OnError = "fail_closed"
	// Continue permits them.
	Continue OnError = "continue"
)

func defaultAudit() Audit {
	return Audit{To: "none", OnError: FailClosed, Reserve: 16 << 20, Facility: syslog.LOG_AUTHPRIV}
}

func defaultRecordings() Recordings {
	return Recordings{MaxSize: 100 << 20, MaxPerUser: 10 << 30, OnError: FailClosed}
}

// audit reads the value of the key audit.
func (v value) audit(a *Audit) {
	v.mapping(map[string]func(value){
		"to":       func(v value) { a.To = v.auditTo() },
		"on_error": func(v value) { a.OnError = v.onError() },
		"reserve": func(v value) {
			if a.Reserve = 0; !v.is("none") {
				a.Reserve = v.size(64<<10, 1<<40)
			}
		},
		"facility": func(v value) { a.Facility = v.facility() },
		"socket": func(v value) {
			if a.Socket = ""; !v.is("none") {
				a.Socket = v.path()
			}
		},
	})
}

// recordings reads the value of the key recordings.
func (v value) recordings(r *Recordings) {
	v.mapping(map[string]func(value){
		"dir":      func(v value) { r.Dir = v.path() },
		"max_size": func(v value) { r.MaxSize = v.size(64<<10, 1<<40) },
		"max_per_user": func(v value) {
			if r.MaxPerUser = 0; !v.is("none") {
				r.MaxPerUser = v.size(1<<20, 1<<50)
			}
		},
		"on_error": func(v value) { r.OnError = v.onError() },
	})
}

func (v value) auditTo() string {
	s, ok := v.text()
	switch {
	case !ok:
		return ""
	case s == "none" || s == "stdout" || s == "syslog":
		return s
	case !strings.Contains(s, "/"):
		v.mistake("%q is not none, stdout, syslog, or a path; for a file of that name write ./%s", s, s)
		return ""
	}
	p := v.path()
	if p == "" {
		return ""
	}
	switch info, err := os.Stat(filepath.Dir(p)); {
	case err != nil:
		v.mistake("%s: %v", filepath.Dir(p), reason(err))
	case !info.IsDir():
		v.mistake("%s is not a folder", filepath.Dir(p))
	}
	return p
}

func (v value) onError() OnError {
	s, ok := v.text()
	if ok && s != string(FailClosed) && s != string(Continue) {
		v.mistake("%q is not fail_closed or continue", s)
	}
	return OnError(s)
}

var facilities = map[string]syslog.Priority{
	"auth": syslog.LOG_AUTH, "authpriv": syslog.LOG_AUTHPRIV, "daemon": syslog.LOG_DAEMON, "user": syslog.LOG_USER,
	"local0": syslog.LOG_LOCAL0, "local1": syslog.LOG_LOCAL1, "local2": syslog.LOG_LOCAL2, "local3": syslog.LOG_LOCAL3,
	"local4": syslog.LOG_LOCAL4, "local5": syslog.LOG_LOCAL5, "local6": syslog.LOG_LOCAL6, "local7": syslog.LOG_LOCAL7,
}

func (v value) facility() syslog.Priority {
	s, ok := v.text()
	facility, known := facilities[strings.ToLower(s)]
	if ok && !known {
		v.mistake("%q is not a facility of syslog; write auth, authpriv, daemon, user, or local0 to local7", s)
	}
	return facility
}

// record reads "none", or one or several of the words for parts of sessions.
func (v value) record() identity.Record {
	if v.is("none") {
		return identity.RecordNone
	}
	words := map[string]identity.Record{
		"output": identity.RecordOutput, "input": identity.RecordInput, "exec": identity.RecordExec, "transfers": identity.RecordTransfers,
	}
	var r identity.Record
	for _, v := range v.list() {
		s, ok := v.text()
		word, known := words[s]
		if ok && !known {
			v.mistake("%q is not output, input (which records output too), exec (sessions without a terminal, too), transfers or, alone, none", s)
		}
		r |= word
	}
	return r
}

// size reads a number of bytes, with a suffix as in RekeyLimit of sshd_config(5).
func (v value) size(least, most int64) int64 {
	s, ok := v.text()
	if !ok {
		return 0
	}
	if bytes, ok := parseSize(s); ok && bytes >= least && bytes <= most {
		return bytes
	}
	v.mistake("%q is not a size from %d to %d bytes; write it like 100M", s, least, most)
	return 0
}

func parseSize(s string) (bytes int64, ok bool) {
	digits, unit := s, int64(1)
	if s != "" {
		if i := strings.IndexByte("KMG", s[len(s)-1]&^0x20); i >= 0 {
			digits, unit = s[:len(s)-1], 1<<(10*(i+1))
		}
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	return int64(n) * unit, err == nil
}

// logLimit reads bytes/duration.
func (v value) logLimit() gateway.LogLimit {
	if v.is("none") {
		return gateway.LogLimit{}
	}
	s, ok := v.text()
	if !ok {
		return gateway.LogLimit{}
	}
	size, per, _ := strings.Cut(s, "/")
	bytes, sizeOK := parseSize(size)
	d, err := parseDuration(per)
	if !sizeOK || err != nil || bytes < 1<<20 || bytes > 1<<40 || d < time.Minute || d > 7*24*time.Hour {
		v.mistake("%q is not a size in a time; write it like 250M/1h, with at least 1M in at least a minute and at most a week", s)
		return gateway.LogLimit{}
	}
	return gateway.LogLimit{Bytes: bytes, Per: d}
}
