package gateway

import (
	"errors"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/transfer"
)

// This file audits the files that sftp and scp sessions transfer.

// A follower finds file transfers in the data of a session. It is a [transfer.SFTP] or a
// [transfer.SCP].
type follower interface {
	FromClient(p []byte) error
	FromServer(p []byte) error
	End() error
}

// transferSize is the approximate size of a transfer's event without the paths, in
// bytes. It is spent when the file is opened.
const transferSize = 400

// maxThrottle bounds the delay of one transfer by payForTransfer.
const maxThrottle = 2 * time.Second

// follow sets the follower if the shell, command or subsystem of e serves file
// transfers. The caller holds w.mu.
func (w *sessionWatcher) follow(e audit.Event) {
	c := transfer.ParseCommand(e.Command)
	switch {
	case e.ForcedCommand != "":
		c = transfer.ParseCommand(e.ForcedCommand)
	case e.Subsystem == "sftp":
		c = transfer.Command{SFTP: true, Plain: true}
	}
	w.transfersOnly = c.Plain && (c.SFTP || c.SCP)
	switch {
	case w.pty != nil:
	case c.SFTP:
		w.follower = transfer.NewSFTP(func(e transfer.Event) error { return w.transferred("sftp", e) })
	case c.SCP:
		w.follower = transfer.NewSCP(c, func(e transfer.Event) error { return w.transferred("scp", e) })
	}
}

// followed handles the result of the follower. If it returns an error, the session must
// end; the error's text is for the user. The caller holds w.mu.
func (w *sessionWatcher) followed(err error) error {
	if !errors.Is(err, transfer.ErrLost) {
		return w.conn.userError(err)
	}
	if w.incomplete == "" {
		w.incomplete = err.Error()
	}
	if !w.mode.Includes(identity.RecordTransfers) && !(w.mode.Includes(identity.RecordExec) && w.transfersOnly) {
		return nil
	}
	w.conn.log.Warn("ending a session whose file transfers cannot be followed", "user", w.conn.identity.User, "channel", w.channel.number, "err", err)
	return errors.New(transfersLostMessage(w.conn.ref))
}

// transferred audits an event of the follower.
func (w *sessionWatcher) transferred(protocol string, t transfer.Event) error {
	if t.Kind == transfer.Opened {
		return w.payForTransfer(transferSize + len(t.Path) + len(t.Base))
	}
	e := audit.Event{Channel: &w.channel.number, Protocol: protocol, Path: t.Path, Base: t.Base, Reason: t.Failure}
	if t.Kind == transfer.Change {
		e.Type, e.Change, e.NewValue = audit.FileChange, t.Op, t.To
		if err := w.payForTransfer(0); err != nil {
			return err
		}
		return w.conn.audit(w.conn.identity, e)
	}
	e.Type, e.Direction, e.Bytes, e.Offset = audit.Transfer, "download", &t.Bytes, t.Offset
	if t.Upload {
		e.Direction = "upload"
	}
	if t.Failure != "" && t.Bytes == 0 { // the file was not opened, so nothing is paid
		if err := w.payForTransfer(0); err != nil {
			return err
		}
		return w.conn.audit(w.conn.identity, e)
	}
	return w.conn.auditPaid(w.conn.identity, e)
}

// payForTransfer spends n bytes of the connection's budgets. If more than half of a
// budget is used, it throttles: it waits until as many bytes have leaked, so that a copy
// of very many small files becomes slow and does not end the connection.
func (w *sessionWatcher) payForTransfer(n int) error {
	over, tight := w.conn.overLogLimit()
	if over {
		return &errLogLimit{}
	}
	w.conn.spend(n)
	if tight {
		wait := float64(max(n, transferSize)) / (w.conn.logLimit() / connShare) * float64(w.conn.cfg.LogPerUser.Per)
		time.Sleep(min(time.Duration(wait), maxThrottle))
	}
	return nil
}
