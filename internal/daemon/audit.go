package daemon

import (
	"io"
	"log/slog"
	"os"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/config"
)

// openAudit opens the log that cfg asks for; nil if it asks for none. observe is
// called with each event that is written. The caller closes the log.
func openAudit(cfg *config.Gateway, stdout io.Writer, observe func(audit.Event), log *slog.Logger) (*audit.Log, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	to := audit.Config{FailClosed: cfg.Audit.OnError == config.FailClosed, Reserve: cfg.Audit.Reserve, Gateway: host, Observe: observe, Log: log}
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

// bastionEvent returns the event of the audit log for an event of a bastion.
func bastionEvent(e bastion.Event) audit.Event {
	out := audit.Event{
		Type: audit.Type("bastion-" + e.Kind), User: e.Owner.User, Profile: e.Owner.Profile,
		Task: e.Task.ID, Generation: e.Task.Generation, Reason: e.Reason,
	}
	if e.Took > 0 {
		out.Took = float64(e.Took.Milliseconds()) / 1000
	}
	out.MaxLife = e.MaxLife.Seconds()
	u := e.Task.Usage
	out.Platform, out.CPU, out.Memory, out.EphemeralStorage, out.Architecture = u.Platform, u.CPU, u.Memory, u.EphemeralStorage, u.Architecture
	out.RanFrom, out.RanUntil = u.From.UTC(), u.Until.UTC()
	if u.Platform == "fargate" {
		out.Capacity = "on-demand"
		if u.Spot {
			out.Capacity = "spot"
		}
	}
	return out
}
