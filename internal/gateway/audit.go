package gateway

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/record"
	"github.com/sallyport-ssh/sallyport/internal/relay"
)

// This file tells the audit log what happens on a connection, and has sessions
// recorded. What the events mean is in docs/audit.md.

// errAudit says that something must be written down and cannot be.
var errAudit = errors.New("the audit log cannot be written")

// An account is what a connection remembers for the audit log only.
type account struct {
	clientVersion        string
	offeredKey           ssh.PublicKey // the last one; not proven
	attempts             int           // keys that were refused
	refusal              error         // the last reason for that
	proven               audit.Event   // by what the login was proven
	announced            bool          // there was an event of the connection
	cause                atomic.Pointer[cause]
	fromClient, toClient atomic.Int64 // bytes of data
}

// A cause is why a connection ended, where the relay cannot know it.
type cause struct{ by, reason string }

// because remembers why the connection is about to end. The first who says so
// counts.
func (c *conn) because(by, reason string) {
	c.cause.CompareAndSwap(nil, &cause{by, reason})
}

// audit writes an event of this connection. It returns an error that wraps
// errAudit if what it tells of must not happen.
func (c *conn) audit(id identity.Identity, e audit.Event) error {
	e.Conn, e.Client = c.ref, c.client
	e.User, e.Profile = id.User, id.Profile
	if err := c.Audit.Write(e); err != nil {
		return fmt.Errorf("%w: %w", errAudit, err)
	}
	return nil
}

// auditConnection writes that there is this connection. If that cannot be written
// the login will fail, and can say so. A balancer's own is not worth telling
// before it wants to log in: most of them only see whether the gateway is there.
func (c *conn) auditConnection() {
	if !c.announced {
		c.announced = true
		c.audit(identity.Identity{}, audit.Event{Type: audit.Connection, Server: c.server})
	}
}

// auditLogin writes that id has proven to be who it is.
func (c *conn) auditLogin(id identity.Identity) error {
	c.auditConnection()
	e := c.proven
	e.Type, e.ClientVersion, e.Attempts, e.Key = audit.Login, c.clientVersion, c.attempts, id.Key
	return c.audit(id, e)
}

// proof says by what somebody has proven to be a user.
func proof(key ssh.PublicKey, grant auth.Grant) audit.Event {
	return audit.Event{AuthorizedBy: grant.Line, Certificate: certificate(key)}
}

// certificate is what key says, if it is one.
func certificate(key ssh.PublicKey) *audit.Certificate {
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil
	}
	return &audit.Certificate{
		ID: cert.KeyId, Serial: cert.Serial, CA: ssh.FingerprintSHA256(cert.SignatureKey), Principals: cert.ValidPrincipals,
	}
}

// auditRefusal writes that the client could not log in, if it has tried, and that
// its connection has ended.
func (c *conn) auditRefusal(err error) {
	if c.local && c.offered == "" {
		return
	}
	c.auditConnection()
	if errors.Is(err, errGrace) {
		c.because("gateway", err.Error())
	}
	if c.dial == nil && c.offered != "" {
		e := c.proven
		e.Type, e.ClientVersion, e.Attempts, e.Reason = audit.LoginRefused, c.clientVersion, c.attempts, err.Error()
		key := c.offeredKey
		if c.holding.key != nil {
			key = c.holding.key
		}
		if key != nil {
			e.Key, e.Certificate = fingerprint(key), certificate(key)
		}
		if c.refusal != nil {
			e.Reason = c.refusal.Error()
		}
		user, profile := splitUser(c.offered)
		c.audit(identity.Identity{User: user, Profile: profile}, e)
	}
	c.auditEnd("client", err)
}

// auditEnd writes that the connection has ended. Who is logged in is named, and
// nobody else.
func (c *conn) auditEnd(by string, reason error) {
	e := audit.Event{Type: audit.End, By: by, Reason: reason.Error()}
	if c.dial != nil {
		if err := c.dial.reason(); err != nil {
			c.because("gateway", err.Error())
		}
	}
	if cause := c.cause.Load(); cause != nil {
		e.By, e.Reason = cause.by, cause.reason
	}
	e.Totals = &audit.Totals{FromClient: c.fromClient.Load(), ToClient: c.toClient.Load(), Seconds: seconds(c.began)}
	id := c.identity
	if c.dial != nil {
		id = c.dial.id
	}
	c.audit(id, e)
}

func seconds(since time.Time) float64 {
	return float64(time.Since(since).Milliseconds()) / 1000
}

// AuditFailed ends every connection, because what is done on it can no longer be
// written down. It does not wait for that. New logins are told so as long as the
// log fails.
func (s *Server) AuditFailed() {
	s.Disconnect(auditLostMessage, func(Connection) bool { return true })
}

// auditJoined writes which bastion the connection has got.
func (c *conn) auditJoined(id identity.Identity, b *bastion.Conn) error {
	return c.audit(id, audit.Event{Type: audit.BastionJoined, Task: b.Task.ID, Generation: b.Task.Generation, Started: b.Started})
}

// watcher returns what the relay is to tell; nil if nobody wants to know.
func (c *conn) watcher() relay.Watcher {
	mode := c.identity.Permissions.Record
	if c.Record != nil {
		mode = max(mode, c.Record(c.identity))
	}
	if c.Audit == nil && mode == identity.RecordNone {
		return nil
	}
	return &watcher{conn: c, mode: mode}
}

// A watcher implements [relay.Watcher].
type watcher struct {
	*conn
	mode identity.Record
}

func (w *watcher) write(e audit.Event) error { return w.audit(w.identity, e) }

// tell is for the user.
func (w *watcher) tell(err error) error {
	if err == nil {
		return nil
	}
	return errors.New(userMessage(err, w.ref))
}

// Open implements [relay.Watcher].
func (w *watcher) Open(o relay.Opening) (relay.ChannelWatcher, error) {
	ch := channelWatcher{watcher: w, number: o.Number, began: time.Now()}
	if o.Kind == "session" {
		if err := w.write(audit.Event{Type: audit.Session, Channel: &o.Number}); err != nil {
			return nil, w.tell(err)
		}
		return &sessionWatcher{channelWatcher: ch}, nil
	}
	e := channelEvent(o.Kind, o.Payload)
	e.Type, e.Channel = audit.Forward, &o.Number
	if err := w.write(e); err != nil {
		return nil, w.tell(err)
	}
	return &forwardWatcher{channelWatcher: ch, event: e}, nil
}

// Granted implements [relay.Watcher].
func (w *watcher) Granted(kind string, fromClient bool, payload, reply []byte) error {
	if !fromClient {
		return nil
	}
	e, known := listenerEvent(kind, payload, reply)
	if !known {
		return nil
	}
	return w.write(e)
}

// Refused implements [relay.Watcher].
func (w *watcher) Refused(r relay.Refusal) {
	var e audit.Event
	switch {
	case r.Channel >= 0:
		if !worthTelling(r.Kind) {
			return
		}
		e = requestEvent(r.Kind, r.Payload)
		e.Channel = &r.Channel
	case r.Global:
		var known bool
		if e, known = listenerEvent(r.Kind, r.Payload, nil); !known {
			return
		}
	default:
		e = channelEvent(r.Kind, r.Payload)
	}
	e.Type, e.By = audit.Refused, "gateway"
	if r.ByFar {
		e.By = "bastion"
		if !r.FromClient {
			e.By = "client"
		}
	}
	// What is forbidden has a rule; what has failed has a reason.
	if r.ByFar && r.Code != ssh.Prohibited {
		e.Reason = r.Why
	} else {
		e.Rule = r.Why
	}
	w.write(e)
}

// worthTelling says whether the refusal of a channel request is an event. Clients
// ask for a lot that no server grants, such as most variables.
func worthTelling(kind string) bool {
	switch kind {
	case "pty-req", "shell", "exec", "subsystem", "x11-req", "auth-agent-req@openssh.com":
		return true
	}
	return false
}

// channelEvent describes a channel: RFC 4254, sections 6.3.2 and 7.2, and OpenSSH
// PROTOCOL, section 2.4.
func channelEvent(kind string, payload []byte) audit.Event {
	e := audit.Event{Kind: kind}
	switch kind {
	case "direct-tcpip", "forwarded-tcpip":
		var m struct {
			Host       string
			Port       uint32
			OriginHost string
			OriginPort uint32
		}
		if ssh.Unmarshal(payload, &m) != nil {
			return e
		}
		if kind == "direct-tcpip" {
			e.Destination = hostPort(m.Host, m.Port)
		} else {
			e.Listener = hostPort(m.Host, m.Port)
		}
		e.Origin = hostPort(m.OriginHost, m.OriginPort)
	case "direct-streamlocal@openssh.com", "forwarded-streamlocal@openssh.com":
		var m struct {
			Path string
			Rest []byte `ssh:"rest"`
		}
		if ssh.Unmarshal(payload, &m) != nil {
			return e
		}
		if kind == "direct-streamlocal@openssh.com" {
			e.Destination = m.Path
		} else {
			e.Listener = m.Path
		}
	case "x11":
		var m struct {
			OriginHost string
			OriginPort uint32
		}
		if ssh.Unmarshal(payload, &m) == nil {
			e.Origin = hostPort(m.OriginHost, m.OriginPort)
		}
	}
	return e
}

// listenerEvent describes a request for a listener in the bastion, or for its
// end: RFC 4254, section 7.1, and OpenSSH PROTOCOL, section 2.4. known is false
// for all else.
func listenerEvent(kind string, payload, reply []byte) (e audit.Event, known bool) {
	e = audit.Event{Type: audit.Listen, Kind: kind}
	switch kind {
	case "cancel-tcpip-forward", "cancel-streamlocal-forward@openssh.com":
		e.Type = audit.ListenEnd
	}
	switch kind {
	case "tcpip-forward", "cancel-tcpip-forward":
		var m struct {
			Host string
			Port uint32
		}
		if ssh.Unmarshal(payload, &m) != nil {
			return e, true
		}
		var chosen struct{ Port uint32 }
		if m.Port == 0 && ssh.Unmarshal(reply, &chosen) == nil {
			m.Port = chosen.Port
		}
		e.Listener = hostPort(m.Host, m.Port)
		return e, true
	case "streamlocal-forward@openssh.com", "cancel-streamlocal-forward@openssh.com":
		var m struct{ Path string }
		if ssh.Unmarshal(payload, &m) == nil {
			e.Listener = m.Path
		}
		return e, true
	}
	return e, false
}

// requestEvent describes a request on a session: RFC 4254, section 6.5.
func requestEvent(kind string, payload []byte) audit.Event {
	e := audit.Event{Kind: kind}
	var m struct{ Text string }
	if (kind == "exec" || kind == "subsystem") && ssh.Unmarshal(payload, &m) == nil {
		if kind == "exec" {
			e.Command = m.Text
		} else {
			e.Subsystem = m.Text
		}
	}
	return e
}

func hostPort(host string, port uint32) string {
	return net.JoinHostPort(host, strconv.FormatUint(uint64(port), 10))
}

// A channelWatcher is what the two kinds of channels have in common.
type channelWatcher struct {
	*watcher
	number int
	began  time.Time
}

// end completes the event at the end of the channel, and writes it.
func (w *channelWatcher) end(e audit.Event, toBastion, toClient int64, lost bool) {
	w.fromClient.Add(toBastion)
	w.toClient.Add(toClient)
	e.Channel = &w.number
	e.Totals = &audit.Totals{FromClient: toBastion, ToClient: toClient, Seconds: seconds(w.began)}
	if lost {
		e.By, e.Reason = "bastion", "the bastion has gone"
		if cause := w.cause.Load(); cause != nil { // it was made to
			e.By, e.Reason = cause.by, cause.reason
		}
	}
	w.write(e)
}

// A forwardWatcher is one of a channel that is no session.
type forwardWatcher struct {
	channelWatcher
	event audit.Event
}

func (w *forwardWatcher) Request(string, bool, []byte) (*relay.Taps, error) { return nil, nil }
func (w *forwardWatcher) Answered(string, bool, []byte, bool)               {}

func (w *forwardWatcher) End(toBastion, toClient int64, lost bool) {
	w.event.Type = audit.ForwardEnd
	w.end(w.event, toBastion, toClient, lost)
}

// A sessionWatcher is one of a session.
type sessionWatcher struct {
	channelWatcher

	mu         sync.Mutex
	pty        *audit.PTY
	asked      bool              // the last pty-req was the one for pty
	recording  *record.Recording // nil: none
	incomplete string            // why the recording, or its absence, is not all
	exitStatus *uint32
	exitSignal string
}

// Request implements [relay.ChannelWatcher]; see RFC 4254, section 6.
func (w *sessionWatcher) Request(kind string, fromClient bool, payload []byte) (*relay.Taps, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case fromClient && kind == "pty-req":
		var m struct {
			Term          string
			Columns, Rows uint32
			Rest          []byte `ssh:"rest"`
		}
		// A second one is refused by the bastion, and the first still stands.
		if w.asked = w.pty == nil && ssh.Unmarshal(payload, &m) == nil; w.asked {
			w.pty = &audit.PTY{Term: m.Term, Columns: m.Columns, Rows: m.Rows}
		}
	case fromClient && kind == "window-change":
		var m struct {
			Columns, Rows uint32
			Rest          []byte `ssh:"rest"`
		}
		if w.pty == nil || ssh.Unmarshal(payload, &m) != nil {
			break
		}
		w.pty = &audit.PTY{Term: w.pty.Term, Columns: m.Columns, Rows: m.Rows}
		if w.recording != nil {
			return nil, w.recorded(w.recording.Resize(side(m.Columns), side(m.Rows)))
		}
	case fromClient && (kind == "shell" || kind == "exec" || kind == "subsystem"):
		return w.command(requestEvent(kind, payload))
	case !fromClient && kind == "exit-status":
		var m struct{ Status uint32 }
		if ssh.Unmarshal(payload, &m) == nil {
			w.exitStatus = &m.Status
		}
	case !fromClient && kind == "exit-signal":
		var m struct {
			Name string
			Rest []byte `ssh:"rest"`
		}
		if ssh.Unmarshal(payload, &m) == nil {
			w.exitSignal = m.Name
		}
	}
	return nil, nil
}

// side makes a number of the protocol one that no arithmetic overflows with.
func side(n uint32) int { return int(min(n, 1<<16)) }

// command begins the recording, if there is to be one, and writes what is about
// to run.
func (w *sessionWatcher) command(e audit.Event) (*relay.Taps, error) {
	e.Type, e.Kind = audit.Type(e.Kind), ""
	e.Channel, e.PTY, e.ForcedCommand = &w.number, w.pty, w.identity.Permissions.ForceCommand
	var taps *relay.Taps
	if w.pty != nil && w.mode != identity.RecordNone && w.recording == nil {
		var err error
		if taps, err = w.record(e); err != nil {
			w.log.Error("a session cannot be recorded", "user", w.identity.User, "err", err)
			if !w.RecordingsOptional {
				e.Type, e.Kind, e.By, e.Rule, e.Reason = audit.Refused, string(e.Type), "gateway", "sessions of this user are recorded", err.Error()
				w.write(e)
				return nil, errors.New(recordingMessage(w.ref))
			}
			w.incomplete = err.Error()
		}
	}
	if w.recording != nil {
		e.Recording = w.recording.Path
	}
	e.Incomplete = w.incomplete
	return taps, w.tell(w.write(e))
}

// record begins a recording.
func (w *sessionWatcher) record(e audit.Event) (*relay.Taps, error) {
	command := e.Command
	if e.Subsystem != "" {
		command = e.Subsystem
	}
	if e.ForcedCommand != "" {
		command = e.ForcedCommand
	}
	id := w.identity
	recording, err := w.Recordings.Create(record.Header{
		Width: side(w.pty.Columns), Height: side(w.pty.Rows), Command: command,
		Title: fmt.Sprintf("%s+%s %s", id.User, id.Profile, w.ref),
		Env:   map[string]string{"TERM": w.pty.Term},
		User:  id.User, Profile: id.Profile, Conn: w.ref, Channel: w.number,
	})
	if err != nil {
		return nil, err
	}
	w.recording = recording
	taps := &relay.Taps{ToClient: func(p []byte, stderr bool) error {
		return w.tapped(recording.Output(p, stderr))
	}}
	if w.mode >= identity.RecordInput {
		taps.ToBastion = func(p []byte, _ bool) error { return w.tapped(recording.Input(p)) }
	}
	return taps, nil
}

// tapped is recorded, for one who does not hold w.mu.
func (w *sessionWatcher) tapped(err error) error {
	if err == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.recorded(err)
}

// recorded decides what follows from the failure of the recording, if it has
// failed.
func (w *sessionWatcher) recorded(err error) error {
	first := err != nil && w.incomplete == ""
	if first {
		w.incomplete = err.Error()
	}
	switch {
	case err == nil, errors.Is(err, record.ErrFull):
		return nil
	case first:
		w.log.Error("recording a session failed", "user", w.identity.User, "file", w.recording.Path, "err", err)
	}
	if w.RecordingsOptional {
		return nil
	}
	return errors.New(recordingLostMessage(w.ref))
}

// Answered implements [relay.ChannelWatcher].
func (w *sessionWatcher) Answered(kind string, fromClient bool, payload []byte, ok bool) {
	if ok || !fromClient || !worthTelling(kind) {
		return
	}
	if kind == "pty-req" {
		w.mu.Lock()
		if w.asked {
			w.pty = nil
		}
		w.mu.Unlock()
	}
	w.Refused(relay.Refusal{Kind: kind, FromClient: true, Payload: payload, Channel: w.number, ByFar: true, Code: ssh.Prohibited})
}

// End implements [relay.ChannelWatcher].
func (w *sessionWatcher) End(toBastion, toClient int64, lost bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := audit.Event{Type: audit.SessionEnd, ExitStatus: w.exitStatus, ExitSignal: w.exitSignal}
	if w.recording != nil {
		w.recorded(w.recording.Close())
		e.Recording = w.recording.Path
	}
	e.Incomplete = w.incomplete
	w.end(e, toBastion, toClient, lost)
}
