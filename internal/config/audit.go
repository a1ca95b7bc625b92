package config

import (
	"log/syslog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// Audit says where it is written down who did what.
type Audit struct {
	// To is "none", "stdout", "syslog", or the path of a file, which holds a
	// slash. Default none.
	To string
	// OnError is what happens when it cannot be written. Default FailClosed.
	OnError OnError
	// Facility is that of syslog: auth, authpriv, daemon, user, or local0 to
	// local7. Default authpriv.
	Facility syslog.Priority
	// Socket is the path of the syslog daemon's. Empty, written "none", means
	// the usual ones; that is the default.
	Socket string
}

// Recordings says where recordings of sessions are kept.
type Recordings struct {
	// Dir need not exist yet. Empty, the default, means the folder
	// "recordings" in StateDir.
	Dir string
	// MaxSize bounds each recording, in bytes; in the file it may end in K, M
	// or G. At least 64K; default 100M.
	MaxSize int64
	// OnError is what happens to a session that is to be recorded and cannot
	// be. Default FailClosed.
	OnError OnError
}

// OnError is what happens when something cannot be written down.
type OnError string

const (
	// FailClosed ends what would go on unseen, and lets nothing of it begin.
	FailClosed OnError = "fail_closed"
	// Continue lets it go on.
	Continue OnError = "continue"
)

func defaultAudit() Audit {
	return Audit{To: "none", OnError: FailClosed, Facility: syslog.LOG_AUTHPRIV}
}

func defaultRecordings() Recordings {
	return Recordings{MaxSize: 100 << 20, OnError: FailClosed}
}

// audit reads what is under the key audit.
func (v value) audit(a *Audit) {
	v.mapping(map[string]func(value){
		"to":       func(v value) { a.To = v.auditTo() },
		"on_error": func(v value) { a.OnError = v.onError() },
		"facility": func(v value) { a.Facility = v.facility() },
		"socket": func(v value) {
			if a.Socket = ""; !v.is("none") {
				a.Socket = v.path()
			}
		},
	})
}

// recordings reads what is under the key recordings.
func (v value) recordings(r *Recordings) {
	v.mapping(map[string]func(value){
		"dir":      func(v value) { r.Dir = v.path() },
		"max_size": func(v value) { r.MaxSize = v.size(64<<10, 1<<40) },
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

// record reads what is recorded of sessions.
func (v value) record() identity.Record {
	s, ok := v.text()
	switch {
	case !ok, s == "none":
	case s == "output":
		return identity.RecordOutput
	case s == "input":
		return identity.RecordInput
	default:
		v.mistake("%q is not none, output, or input (which records output too)", s)
	}
	return identity.RecordNone
}

// sizeOrAuto reads a size, or "auto", which is 0.
func (v value) sizeOrAuto(least, most int64) int64 {
	if v.is("auto") {
		return 0
	}
	return v.size(least, most)
}

// size reads a number of bytes, with a suffix as sshd's RekeyLimit has it.
func (v value) size(least, most int64) int64 {
	s, ok := v.text()
	if !ok {
		return 0
	}
	digits, unit := s, int64(1)
	if s != "" {
		if i := strings.IndexByte("KMG", s[len(s)-1]&^0x20); i >= 0 {
			digits, unit = s[:len(s)-1], 1<<(10*(i+1))
		}
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	if bytes := int64(n) * unit; err == nil && bytes >= least && bytes <= most {
		return bytes
	}
	v.mistake("%q is not a size from %d to %d bytes; write it like 100M", s, least, most)
	return 0
}
