package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Version is that of the schema. It grows when a field or an event changes its
// meaning or goes away; new ones may come without that.
const Version = 1

// A Type says what has happened; docs/audit.md says which fields each has.
type Type string

// The types of events.
const (
	GatewayStarted Type = "gateway-started"
	GatewayStopped Type = "gateway-stopped"

	Connection        Type = "connection"
	ConnectionRefused Type = "connection-refused"
	Login             Type = "login"
	LoginRefused      Type = "login-refused"
	End               Type = "end"

	BastionStarted Type = "bastion-started"
	BastionFailed  Type = "bastion-failed"
	BastionAdopted Type = "bastion-adopted"
	BastionEnded   Type = "bastion-ended"
	BastionStopped Type = "bastion-stopped"
	BastionJoined  Type = "bastion-joined"

	Session    Type = "session"
	Shell      Type = "shell"
	Exec       Type = "exec"
	Subsystem  Type = "subsystem"
	SessionEnd Type = "session-end"

	Forward    Type = "forward"
	ForwardEnd Type = "forward-end"
	Listen     Type = "listen"
	ListenEnd  Type = "listen-end"

	Refused Type = "refused"
)

// An Event is something that happened. Fields that do not apply are left at
// zero, and are not written.
type Event struct {
	// These are set by [Log.Write].
	Version int       `json:"v"`
	Seq     uint64    `json:"seq"` // counts the lines of one process, from 1
	Time    time.Time `json:"time"`
	Gateway string    `json:"gateway"`
	Lost    uint64    `json:"lost,omitempty"` // events before this one that could not be written

	Type Type `json:"event"`

	// Conn is the reference of the connection, as in the operator's log and
	// in what its user is told.
	Conn    string         `json:"conn,omitempty"`
	User    string         `json:"user,omitempty"`
	Profile string         `json:"profile,omitempty"`
	Client  netip.AddrPort `json:"client,omitzero"`
	Server  netip.AddrPort `json:"server,omitzero"`

	ClientVersion string       `json:"client_version,omitempty"`
	Key           string       `json:"key,omitempty"` // SHA-256 fingerprint, as ssh-keygen -l prints it
	Certificate   *Certificate `json:"certificate,omitempty"`
	AuthorizedBy  string       `json:"authorized_by,omitempty"` // what let the key in
	Attempts      int          `json:"attempts,omitempty"`      // keys that were offered in vain

	// Times is how many connections of Source it stands for, if more than one;
	// without Source, of many.
	Times  int    `json:"times,omitempty"`
	Source string `json:"source,omitempty"` // a network

	Task       string `json:"task,omitempty"`
	Generation int64  `json:"generation,omitempty"`
	Started    bool   `json:"started,omitempty"` // this connection caused the start

	Channel *int   `json:"channel,omitempty"` // number of the channel on the connection
	PTY     *PTY   `json:"pty,omitempty"`
	Command string `json:"command,omitempty"`
	// ForcedCommand runs in place of it, by the rules of the login.
	ForcedCommand string `json:"forced_command,omitempty"`
	// Subsystem is the name of one.
	Subsystem string `json:"subsystem,omitempty"`
	// Recording is the file that a session is recorded in.
	Recording string `json:"recording,omitempty"`
	// Incomplete says why the recording is not all of the session.
	Incomplete string `json:"incomplete,omitempty"`

	// Kind is the type of a channel or request, in the words of the protocol.
	Kind        string `json:"kind,omitempty"`
	Destination string `json:"destination,omitempty"` // host:port, or the path of a socket
	Listener    string `json:"listener,omitempty"`    // the same, in the bastion
	Origin      string `json:"origin,omitempty"`      // who connected, as the side that forwards says

	By     string `json:"by,omitempty"`     // who ended or refused it: client, bastion, gateway
	Rule   string `json:"rule,omitempty"`   // the rule that refused it
	Reason string `json:"reason,omitempty"` // for the operator
	// ExitStatus and ExitSignal say how a command ended; both are unset if
	// that is not known.
	ExitStatus *uint32 `json:"exit_status,omitempty"`
	ExitSignal string  `json:"exit_signal,omitempty"`
	*Totals
	// Took is how long a start took, in seconds.
	Took float64 `json:"took,omitempty"`
}

// A Certificate is what a user logged in with.
type Certificate struct {
	ID         string   `json:"id"`
	Serial     uint64   `json:"serial"`
	CA         string   `json:"ca"` // SHA-256 fingerprint of its key
	Principals []string `json:"principals,omitempty"`
}

// A PTY is the terminal of a session.
type PTY struct {
	Term    string `json:"term"`
	Columns uint32 `json:"columns"`
	Rows    uint32 `json:"rows"`
}

// Totals come at the end of something.
type Totals struct {
	FromClient int64   `json:"bytes_from_client"`
	ToClient   int64   `json:"bytes_to_client"`
	Seconds    float64 `json:"seconds"`
}

const (
	// maxLine bounds a line, in bytes. What carries syslog is made for 8 KiB.
	maxLine = 8000
	// maxValue bounds a value before escaping. Clients may make commands and
	// host names 256 KiB long.
	maxValue = 2048
	// maxPrincipals bounds a certificate's. Package ssh has them as strangers
	// wrote them.
	maxPrincipals = 32
)

// line returns e as JSON with a newline, never longer than maxLine. Whatever is
// in it, it is one line of printable characters.
func (e Event) line() ([]byte, error) {
	for limit := maxValue; ; limit /= 2 {
		var buf bytes.Buffer
		enc := json.NewEncoder(&buf)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(e.clip(limit)); err != nil {
			return nil, fmt.Errorf("encoding a %s event: %w", e.Type, err)
		}
		if line := printable(buf.Bytes()); len(line) <= maxLine {
			return line, nil
		} else if limit == 0 {
			return nil, fmt.Errorf("a %s event of %d bytes", e.Type, len(line))
		}
	}
}

// clip shortens every value that strangers decide.
func (e Event) clip(limit int) Event {
	for _, s := range []*string{
		&e.User, &e.Profile, &e.ClientVersion, &e.Command, &e.Subsystem, &e.Kind, &e.Destination, &e.Listener,
		&e.Origin, &e.Rule, &e.Reason, &e.ExitSignal, &e.AuthorizedBy, &e.Key, &e.Recording, &e.Incomplete, &e.Task,
		&e.ForcedCommand, &e.Source,
	} {
		*s = clip(*s, limit)
	}
	if e.PTY != nil {
		pty := *e.PTY
		pty.Term = clip(pty.Term, min(limit, 64))
		e.PTY = &pty
	}
	if e.Certificate != nil {
		cert := *e.Certificate
		cert.ID = clip(cert.ID, min(limit, 256))
		var names []string
		for i, name := range cert.Principals {
			if i == maxPrincipals || i > limit {
				names = append(names, fmt.Sprintf("... (%d more)", len(cert.Principals)-i))
				break
			}
			names = append(names, clip(name, min(limit, 64)))
		}
		cert.Principals = names
		e.Certificate = &cert
	}
	return e
}

// clip cuts s to limit bytes and says how much is missing.
func clip(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	cut := limit
	for back := 0; back < utf8.UTFMax-1 && cut > 0 && !utf8.RuneStart(s[cut]); back++ {
		cut--
	}
	return fmt.Sprintf("%s... (%d bytes more)", s[:cut], len(s)-cut)
}

// printable escapes what a terminal would act on and encoding/json lets pass:
// DEL, the C1 controls, marks that turn the direction of text. Outside of
// strings JSON has none of it.
func printable(line []byte) []byte {
	text := strings.TrimSuffix(string(line), "\n")
	var b strings.Builder
	b.Grow(len(text) + 1)
	for _, r := range text {
		switch {
		case unicode.IsPrint(r):
			b.WriteRune(r)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	b.WriteByte('\n')
	return []byte(b.String())
}
