package main

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/record"
)

// openAudit opens the log that cfg asks for; nil if it asks for none. Also is told
// of all that goes there. The caller closes it.
func openAudit(cfg *config.Gateway, stdout io.Writer, also func(audit.Event), log *slog.Logger) (*audit.Log, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	to := audit.Config{FailClosed: cfg.Audit.OnError == config.FailClosed, Gateway: host, Also: also, Log: log}
	switch cfg.Audit.To {
	case "none":
		return nil, nil
	case "stdout":
		to.Stdout = stdout
	case "syslog":
		to.Syslog, to.Socket = cfg.Audit.Facility, cfg.Audit.Socket
	default:
		to.File = cfg.Audit.To
	}
	return audit.Open(to)
}

// reopenOnHangup opens the audit log anew at each SIGHUP until ctx ends: whoever
// rotates logs has moved the file. The signal ends nobody, with a log or without.
func reopenOnHangup(ctx context.Context, hangups <-chan os.Signal, events *audit.Log, log *slog.Logger) {
	for {
		select {
		case <-hangups:
			if err := events.Reopen(); err != nil {
				log.Error("the audit log goes on in the old file", "err", err)
			} else {
				log.Info("the audit log was opened anew")
			}
		case <-ctx.Done():
			return
		}
	}
}

// bastionEvent is what the audit log is told of a bastion, whoever uses it.
func bastionEvent(e bastion.Event) audit.Event {
	out := audit.Event{
		Type: audit.Type("bastion-" + e.Kind), User: e.Owner.User, Profile: e.Owner.Profile,
		Task: e.Task.ID, Generation: e.Task.Generation, Reason: e.Reason,
	}
	if e.Took > 0 {
		out.Took = float64(e.Took.Milliseconds()) / 1000
	}
	return out
}

// recordings returns where recordings go, and what is recorded of whose sessions
// by the profile's settings.
func recordings(cfg *config.Gateway) (*record.Store, func(identity.Identity) identity.Record) {
	dir := cfg.Recordings.Dir
	if dir == "" {
		dir = filepath.Join(cfg.StateDir, "recordings")
	}
	return &record.Store{Dir: dir, MaxSize: cfg.Recordings.MaxSize}, func(id identity.Identity) identity.Record {
		return cfg.Profiles[id.Profile].Record
	}
}
