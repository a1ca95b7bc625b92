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

// Version is the version of the schema. It is incremented if a field or an event
// changes its meaning or is removed, but not for new fields and events.
const Version = 1

// A Type is the type of an event. docs/audit.md has the fields of each.
type Type string

// The types of events.
const (
	GatewayStarted Type = "gateway-started"
	GatewayStopped Type = "gateway-stopped"
	LogResumed     Type = "log-resumed"

	Connection        Type = "connection"
	ConnectionRefused Type = "connection-refused"
	Login             Type = "login"
	LoginRefused      Type = "login-refused"
	End               Type = "end"

	BastionLaunching Type = "bastion-launching"
	BastionStarted   Type = "bastion-started"
	BastionFailed    Type = "bastion-failed"
	BastionAdopted   Type = "bastion-adopted"
	BastionEnded     Type = "bastion-ended"
	BastionStopped   Type = "bastion-stopped"
	BastionJoined    Type = "bastion-joined"

	Session    Type = "session"
	Shell      Type = "shell"
	Exec       Type = "exec"
	Subsystem  Type = "subsystem"
	SessionEnd Type = "session-end"

	Transfer   Type = "transfer"
	FileChange Type = "file-change"

	Forward    Type = "forward"
	ForwardEnd Type = "forward-end"
	Listen     Type = "listen"
	ListenEnd  Type = "listen-end"

	KeyAdded   Type = "key-added"
	KeyRemoved Type = "key-removed"

	Refused Type = "refused"
)

// An Event is a line of the log. Fields with their zero value are not written.
type Event struct {
	// Log.Write sets these fields.
	Version int       `json:"v"`
	Seq     uint64    `json:"seq"` // number of the line in this process, from 1
	Time    time.Time `json:"time"`
	Gateway string    `json:"gateway"`
	Lost    uint64    `json:"lost,omitempty"` // events before this one that were not written

	Type Type `json:"event"`

	// Conn is the reference of the connection, which is also in the operator's log
	// and in messages to the user.
	Conn    string         `json:"conn,omitempty"`
	User    string         `json:"user,omitempty"`
	Profile string         `json:"profile,omitempty"`
	Client  netip.AddrPort `json:"client,omitzero"`
	Server  netip.AddrPort `json:"server,omitzero"`
	// Via is the ID of the gateway that acts for User on her console, and ViaConn
	// the reference of her connection to it.
	Via     string `json:"via,omitempty"`
	ViaConn string `json:"via_conn,omitempty"`

	ClientVersion string       `json:"client_version,omitempty"`
	Key           string       `json:"key,omitempty"` // SHA-256 fingerprint, as ssh-keygen -l prints it
	Certificate   *Certificate `json:"certificate,omitempty"`
	AuthorizedBy  string       `json:"authorized_by,omitempty"` // the line that granted the login
	Attempts      int          `json:"attempts,omitempty"`      // keys that were refused

	// Times is the number of events that the line summarises, if more than one; the
	// other fields are those of the last. Source is the network of refused
	// connections; empty means several networks.
	Times  int    `json:"times,omitempty"`
	Source string `json:"source,omitempty"` // a network

	Task       string `json:"task,omitempty"`
	Generation int64  `json:"generation,omitempty"`
	Started    bool   `json:"started,omitempty"` // this connection caused the start

	Channel *int   `json:"channel,omitempty"` // number of the channel on the connection
	PTY     *PTY   `json:"pty,omitempty"`
	Command string `json:"command,omitempty"`
	// ForcedCommand is the forced command of the login, which runs instead.
	ForcedCommand string `json:"forced_command,omitempty"`
	Subsystem     string `json:"subsystem,omitempty"`
	// Recording is the path of the session's recording.
	Recording string `json:"recording,omitempty"`
	// RecordingParts is the number of its files, if more than one.
	RecordingParts int `json:"recording_parts,omitempty"`
	// Incomplete is the reason if the recording, or the events of transfers, do not
	// cover the whole session.
	Incomplete string `json:"incomplete,omitempty"`

	// Protocol is sftp or scp, or http for a login by the HTTP API. Direction is upload
	// or download.
	Protocol  string `json:"protocol,omitempty"`
	Direction string `json:"direction,omitempty"`
	Path      string `json:"path,omitempty"`
	// Base is the argument of scp: the file, or a folder that contains Path.
	Base string `json:"base,omitempty"`
	// Bytes were transferred, starting at Offset in the file.
	Bytes  *int64 `json:"bytes,omitempty"`
	Offset int64  `json:"offset,omitempty"`
	// Change is the operation on Path: rename, remove, mkdir, rmdir, symlink, link,
	// copy, mode, owner, truncate. NewValue is the other name, the target, or the
	// mode, owner or size.
	Change   string `json:"change,omitempty"`
	NewValue string `json:"new_value,omitempty"`

	// Kind is the type of a channel or request in the SSH protocol.
	Kind        string `json:"kind,omitempty"`
	Destination string `json:"destination,omitempty"` // host:port, or the path of a socket
	Listener    string `json:"listener,omitempty"`    // the same, in the bastion
	Origin      string `json:"origin,omitempty"`      // address of the originator, as the forwarding side claims

	By     string `json:"by,omitempty"`     // the side that ended or refused it: client, bastion, gateway
	Rule   string `json:"rule,omitempty"`   // the rule that refused it
	Reason string `json:"reason,omitempty"` // for the operator
	// ExitStatus or ExitSignal is the result of a command; neither is set if it is
	// unknown.
	ExitStatus *uint32 `json:"exit_status,omitempty"`
	ExitSignal string  `json:"exit_signal,omitempty"`
	*Totals
	// Took is the duration of a start, in seconds.
	Took float64 `json:"took,omitempty"`

	// Platform is fargate or local, Capacity on-demand or spot. CPU is in units of
	// 1/1024 vCPU, Memory in MiB, EphemeralStorage in GiB.
	Platform         string `json:"platform,omitempty"`
	Capacity         string `json:"capacity,omitempty"`
	Architecture     string `json:"architecture,omitempty"`
	CPU              int    `json:"cpu,omitempty"`
	Memory           int    `json:"memory,omitempty"`
	EphemeralStorage int    `json:"ephemeral_storage,omitempty"`
	// RanFrom and RanUntil are the times between which the platform bills the
	// bastion, by the platform's clock.
	RanFrom  time.Time `json:"ran_from,omitzero"`
	RanUntil time.Time `json:"ran_until,omitzero"`
	// MaxLife is the longest time for which the bastion may run, in seconds.
	MaxLife float64 `json:"max_life,omitempty"`
}

// A Certificate is the certificate of a login.
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

// Totals are fields of events that end a connection, session or forward.
type Totals struct {
	FromClient int64   `json:"bytes_from_client"`
	ToClient   int64   `json:"bytes_to_client"`
	Seconds    float64 `json:"seconds"`
}

const (
	// maxLine limits a line, in bytes. Syslog daemons accept 8 KiB.
	maxLine = 8000
	// maxValue limits a value before escaping. Clients may send commands and host
	// names of 256 KiB.
	maxValue = 2048
	// maxName limits host names, paths of sockets and types of channels: DNS names
	// have at most 255 bytes, paths of sockets on Linux 108. maxReason limits
	// reasons, which may contain such a name.
	maxName   = 300
	maxReason = 600
	// maxPrincipals limits the principals of a certificate.
	maxPrincipals = 32
)

// line returns e as one line of JSON with printable characters only, of at most
// maxLine bytes.
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

// Clip returns e with the values from clients truncated to the length that is written
// at most.
func (e Event) Clip() Event { return e.clip(maxValue) }

// clip truncates every value from clients.
func (e Event) clip(limit int) Event {
	for _, s := range []*string{
		&e.User, &e.Profile, &e.ClientVersion, &e.Command, &e.Subsystem, &e.AuthorizedBy, &e.Key, &e.Recording,
		&e.Incomplete, &e.Task, &e.ForcedCommand, &e.Source, &e.Path, &e.Base, &e.NewValue, &e.Via, &e.ViaConn,
	} {
		*s = clip(*s, limit)
	}
	for _, s := range []*string{&e.Kind, &e.Destination, &e.Listener, &e.Origin, &e.ExitSignal} {
		*s = clip(*s, min(limit, maxName))
	}
	for _, s := range []*string{&e.Rule, &e.Reason} {
		*s = clip(*s, min(limit, maxReason))
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

// printable escapes the characters with an effect on terminals that encoding/json does
// not escape: DEL, C1 controls, and marks that change the direction of text. They can
// only be in strings.
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
