package bastion

import (
	"context"
	"time"
)

// An Event is something that became of a bastion, for [Dialer.Event].
type Event struct {
	Kind  EventKind
	Owner Owner
	// Task is as far as it is known.
	Task Task
	// Took is how long a start took; zero for other events.
	Took time.Duration
	// Reason is for the operator; empty if all is well.
	Reason string
}

// An EventKind says what became of a bastion.
type EventKind string

const (
	Started EventKind = "started" // it runs and can be logged in to
	Failed  EventKind = "failed"  // it could not be started
	Adopted EventKind = "adopted" // it was found running, started by an earlier gateway
	Ended   EventKind = "ended"   // it was found to have ended by itself, some time ago
	Stopped EventKind = "stopped" // a gateway has stopped it
)

func (d *Dialer) event(e Event) {
	if d.Event != nil {
		d.Event(e)
	}
}

// stop stops a task, and tells of it if that has worked.
func (d *Dialer) stop(ctx context.Context, launcher Launcher, owner Owner, task Task, why string) error {
	err := launcher.Stop(ctx, owner, task.ID)
	if err == nil {
		d.event(Event{Kind: Stopped, Owner: owner, Task: task, Reason: why})
	}
	return err
}
