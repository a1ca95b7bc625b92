package gateway

import (
	"errors"
	"fmt"
	"sync"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/record"
	"github.com/sallyport-ssh/sallyport/internal/relay"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/transfer"
)

// A sessionWatcher watches a session channel. It audits the commands and file
// transfers of the session, and records it.
type sessionWatcher struct {
	conn    *conn
	mode    identity.Record
	channel channelInfo

	mu            sync.Mutex
	pty           *audit.PTY
	ptyFromLast   bool              // pty is from the last pty-req
	recording     *record.Recording // nil if the session is not recorded
	incomplete    string            // why the recording or the list of transfers has gaps
	started       bool              // a shell, command or subsystem was requested
	startedTwice  bool              // another one was requested after it
	early         []byte            // data that the client sent before that request
	earlyLost     bool              // there was more than maxEarly
	follower      follower          // follows file transfers, if not nil
	transfersOnly bool              // the session runs nothing but a server for transfers
	exitStatus    *uint32
	exitSignal    string
}

// Request implements [relay.ChannelWatcher]; see RFC 4254, section 6.
func (w *sessionWatcher) Request(kind string, fromClient bool, payload []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case fromClient && kind == "pty-req":
		m, err := sshmsg.ParsePTY(payload)
		// The bastion refuses a second pty-req, and the first stays in force.
		if w.ptyFromLast = w.pty == nil && err == nil; w.ptyFromLast {
			w.pty = &audit.PTY{Term: m.Term, Columns: m.Columns, Rows: m.Rows}
		}
	case fromClient && kind == "window-change":
		m, err := sshmsg.ParseWindowChange(payload)
		if w.pty == nil || err != nil {
			break
		}
		w.pty = &audit.PTY{Term: w.pty.Term, Columns: m.Columns, Rows: m.Rows}
		if w.recording != nil {
			return w.recorded(w.recording.Resize(dimension(m.Columns), dimension(m.Rows)))
		}
	case fromClient && isCommand(kind):
		return w.command(requestEvent(kind, payload))
	case !fromClient && kind == "exit-status":
		if status, err := sshmsg.ParseExitStatus(payload); err == nil {
			w.exitStatus = &status
		}
	case !fromClient && kind == "exit-signal":
		if m, err := sshmsg.ParseExitSignal(payload); err == nil {
			w.exitSignal = m.Name
		}
	}
	return nil
}

// isCommand reports whether a request starts a program (RFC 4254, section 6.5).
func isCommand(kind string) bool { return kind == "shell" || kind == "exec" || kind == "subsystem" }

// dimension converts a terminal's width or height, and limits it, so that
// calculations with it cannot overflow.
func dimension(n uint32) int { return int(min(n, 1<<16)) }

// command begins the recording, if the session has to be recorded, and writes the event
// of the shell, command or subsystem before it runs. The caller holds w.mu.
func (w *sessionWatcher) command(e audit.Event) error {
	e.Type, e.Kind = audit.Type(e.Kind), ""
	e.Channel, e.PTY, e.ForcedCommand = &w.channel.number, w.pty, w.conn.identity.Permissions.ForceCommand
	if w.startedTwice = w.started; !w.startedTwice { // the bastion refuses a second one
		w.follow(e)
		if err := w.beginRecording(e); err != nil {
			return err
		}
	}
	if w.recording != nil {
		e.Recording = w.recording.Path
	}
	e.Incomplete = w.incomplete
	if err := w.conn.audit(w.conn.identity, e); err != nil {
		return w.conn.userError(err)
	}
	if w.startedTwice {
		return nil
	}
	w.started = true
	early := w.early
	w.early = nil
	if !w.earlyLost {
		return w.fromClient(early, false)
	}
	if w.follower != nil {
		w.follower = nil
		return w.followed(fmt.Errorf("%w: %s", transfer.ErrLost, tooEarly))
	}
	if w.recording != nil && w.mode.Includes(identity.RecordInput) && w.incomplete == "" {
		w.incomplete = tooEarly
	}
	return nil
}

// tooEarly is the reason for a gap at the beginning of a client's data.
const tooEarly = "the client sent too much data before its request for a shell, command or subsystem"

// beginRecording begins the recording, if the session has to be recorded. If it returns
// an error, the session must end; the error's text is for the user.
func (w *sessionWatcher) beginRecording(e audit.Event) error {
	if w.recording != nil || !w.hasToBeRecorded() {
		return nil
	}
	err := w.createRecording(e)
	if err == nil {
		return nil
	}
	w.conn.log.Error("a session cannot be recorded", "user", w.conn.identity.User, "err", err)
	if w.conn.cfg.RecordingsOptional {
		w.incomplete = err.Error()
		return nil
	}
	e.Type, e.Kind, e.By, e.Rule, e.Reason = audit.Refused, string(e.Type), "gateway", "sessions of this user are recorded", err.Error()
	w.conn.auditRefused(w.conn.identity, e)
	return errors.New(recordingMessage(w.conn.ref))
}

// hasToBeRecorded reports whether the session has to be recorded. Sessions of sftp and
// scp are not recorded, because the audit log has their transfers. The caller holds
// w.mu.
func (w *sessionWatcher) hasToBeRecorded() bool {
	if w.pty != nil {
		return w.mode.Includes(identity.RecordOutput)
	}
	return w.mode.Includes(identity.RecordExec) && !w.transfersOnly
}

func (w *sessionWatcher) createRecording(e audit.Event) error {
	command := e.Command
	if e.Subsystem != "" {
		command = e.Subsystem
	}
	if e.ForcedCommand != "" {
		command = e.ForcedCommand
	}
	id := w.conn.identity
	header := record.Header{
		Width: 80, Height: 24, NoTerminal: true, Command: command,
		Title: fmt.Sprintf("%s+%s %s", id.User, id.Profile, w.conn.ref),
		User:  id.User, Profile: id.Profile, Conn: w.conn.ref, Channel: w.channel.number,
	}
	if w.pty != nil {
		header.Width, header.Height, header.NoTerminal = dimension(w.pty.Columns), dimension(w.pty.Rows), false
		header.Env = map[string]string{"TERM": w.pty.Term}
	}
	recording, err := w.conn.cfg.Recordings.Create(header)
	if err == nil {
		w.recording = recording
	}
	return err
}

// maxEarly limits the data, in bytes, that is kept until the request for a shell,
// command or subsystem. Clients usually send none before the answer to that request.
const maxEarly = 64 << 10

// Taps implements [relay.ChannelWatcher].
func (w *sessionWatcher) Taps() *relay.Taps {
	return &relay.Taps{
		ToClient: func(p []byte, stderr bool) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.toClient(p, stderr)
		},
		ToBastion: func(p []byte, stderr bool) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.fromClient(p, stderr)
		},
	}
}

// toClient follows and records data for the client. The caller holds w.mu.
func (w *sessionWatcher) toClient(p []byte, stderr bool) error {
	if w.follower != nil && !stderr {
		if err := w.followed(w.follower.FromServer(p)); err != nil {
			return err
		}
	}
	if w.recording == nil {
		return nil
	}
	return w.recorded(w.recording.Output(p, stderr))
}

// fromClient follows and records data from the client. The caller holds w.mu.
func (w *sessionWatcher) fromClient(p []byte, stderr bool) error {
	if !w.started {
		if w.earlyLost = w.earlyLost || len(w.early)+len(p) > maxEarly; !w.earlyLost {
			w.early = append(w.early, p...)
		}
		return nil
	}
	if w.follower != nil && !stderr {
		if err := w.followed(w.follower.FromClient(p)); err != nil {
			return err
		}
	}
	if w.recording == nil || !w.mode.Includes(identity.RecordInput) {
		return nil
	}
	return w.recorded(w.recording.Input(p))
}

// recorded handles the result of a write to the recording. If it returns an error, the
// session must end; the error's text is for the user.
func (w *sessionWatcher) recorded(err error) error {
	if err == nil {
		return nil
	}
	if w.incomplete == "" {
		w.incomplete = err.Error()
		w.conn.log.Error("recording a session failed", "user", w.conn.identity.User, "file", w.recording.Path, "err", err)
	}
	if w.conn.cfg.RecordingsOptional {
		return nil
	}
	return errors.New(recordingLostMessage(w.conn.ref))
}

// Answered implements [relay.ChannelWatcher].
func (w *sessionWatcher) Answered(kind string, fromClient bool, payload []byte, ok bool) {
	if ok || !fromClient || !auditsRefusal(kind) {
		return
	}
	w.mu.Lock()
	switch {
	case kind == "pty-req" && w.ptyFromLast:
		w.pty = nil
	case isCommand(kind) && !w.startedTwice: // the client may request another one
		w.started, w.follower, w.transfersOnly = false, nil, false
	}
	w.mu.Unlock()
	w.conn.auditRelayRefusal(relay.Refusal{Kind: kind, FromClient: true, Payload: payload, Channel: w.channel.number, ByFar: true, Code: sshmsg.Prohibited})
}

// End implements [relay.ChannelWatcher].
func (w *sessionWatcher) End(toBastion, toClient int64, lost bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := audit.Event{Type: audit.SessionEnd, ExitStatus: w.exitStatus, ExitSignal: w.exitSignal}
	if w.follower != nil {
		w.follower.End()
	}
	if w.recording != nil {
		if parts := w.recording.Parts(); parts > 1 {
			e.RecordingParts = parts
		}
		w.recorded(w.recording.Close())
		e.Recording = w.recording.Path
	}
	e.Incomplete = w.incomplete
	w.conn.audit(w.conn.identity, w.conn.channelEnd(w.channel, e, toBastion, toClient, lost))
}
