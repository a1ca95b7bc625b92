package daemon

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/ecstask"
)

const (
	// protectInterval is the time after which a first or last connection is noticed.
	protectInterval = 5 * time.Second
	// protectRenewal is the time after which a protection is set again.
	protectRenewal = time.Minute
)

// protectOnECS keeps the task of ECS in which this process runs, if it does, protected
// while it has connections, until ctx ends.
func (d *Daemon) protectOnECS(ctx context.Context) {
	agent := os.Getenv("ECS_AGENT_URI")
	if agent == "" {
		if d.cfg.Load().TaskProtection > 0 {
			d.log.Warn("task_protection has no effect: this is not a container of ECS")
		}
		return
	}
	d.protectTask(ctx, protector{
		connections: func() int { return len(d.server.Connections()) },
		protect:     func(ctx context.Context, t time.Duration) error { return ecstask.Protect(ctx, agent, t) },
	})
}

// A protector is the task that protectTask protects.
type protector struct {
	connections func() int
	protect     func(context.Context, time.Duration) error // see [ecstask.Protect]
}

func (d *Daemon) protectTask(ctx context.Context, task protector) {
	var until time.Time // of the last protection that was set
	var tried time.Time // to set one
	var failed failure
	for {
		wanted := d.cfg.Load().TaskProtection
		if task.connections() == 0 {
			wanted = 0
		}
		now := time.Now()
		if wanted > 0 && now.Sub(tried) >= protectRenewal || wanted == 0 && now.Before(until) {
			err := safely(func() error { return task.protect(ctx, wanted) })
			tried = now
			if err == nil {
				until = now.Add(wanted)
			}
			if wanted == 0 {
				tried = time.Time{} // protect again as soon as there is a connection
			}
			switch changed := failed.changes(err) && ctx.Err() == nil; {
			case !changed || err == nil:
			case errors.Is(err, ecstask.ErrBlocked):
				d.log.Info("the protection of this task is not extended: a deployment waits for protected tasks")
			default:
				d.log.Warn("cannot protect this task from being stopped by its service", "err", err)
			}
		}
		select {
		case <-time.After(protectInterval):
		case <-ctx.Done():
			return
		}
	}
}
