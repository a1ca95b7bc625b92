package bastion

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Stop ends the owner's bastion and all connections to it; the next Dial starts
// another. It returns the entry of the stopped bastion when that is certain to
// end. It goes on if ctx ends, for at most half a minute. Reason is for the
// operator.
//
// Errors wrap [ErrNoProfile], [ErrGone] if no bastion runs, or [ErrStarting] if it
// is being started or stopped.
func (d *Dialer) Stop(ctx context.Context, owner Owner, reason string) (Entry, error) {
	stopped, err := d.stop(ctx, owner, reason)
	if err != nil {
		return Entry{}, fmt.Errorf("stopping the bastion of %s: %w", owner, err)
	}
	d.Log.Info("bastion stopped", "owner", owner, "task", stopped.Task.ID, "generation", stopped.Generation, "why", reason)
	return stopped, nil
}

func (d *Dialer) stop(ctx context.Context, owner Owner, reason string) (Entry, error) {
	b, err := d.bastion(owner)
	if err != nil {
		return Entry{}, err
	}
	if d.isStarting(owner) {
		return Entry{}, ErrStarting
	}
	return b.stop(ctx, reason)
}

// stop stops the bastion that the ledger has. If the entry is Starting without a
// lease, it stops all tasks which the failed start may have launched.
func (b *bastion) stop(ctx context.Context, reason string) (Entry, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	entry, err := b.find(ctx)
	if err != nil {
		return Entry{}, err
	}
	tasks := []Task{entry.Task}
	switch {
	case entry.leased():
		return Entry{}, ErrStarting
	case entry.State == Starting:
		if tasks, err = b.tasks(ctx, entry.Generation); err != nil {
			return Entry{}, err
		}
		if len(tasks) == 0 {
			return Entry{}, ErrGone
		}
	case entry.State == Idle:
		return Entry{}, ErrGone
	}
	if err := b.stopTasks(ctx, entry, tasks, reason, nil); errors.Is(err, ErrConflict) {
		return Entry{}, fmt.Errorf("%w: %w", ErrStarting, err)
	} else if err != nil {
		return Entry{}, err
	}
	entry.Task = tasks[0]
	return entry, nil
}

// retire takes the task of an entry to which dialAndPin failed with err out of the
// ledger, so that the next one can be started. If the task must not be replaced, as
// when another gateway is connected to it, retire returns the error of Dial. Before
// is the number of bytes received before the dial.
func (b *bastion) retire(ctx context.Context, entry Entry, err error, before map[*Conn]uint64) error {
	failed := func(err error) error { return fmt.Errorf("connecting to the bastion of %s: %w", b.owner, err) }
	task := entry.Task
	switch {
	case errors.Is(err, ErrConflict):
		return nil // another task has replaced it
	case errors.Is(err, ErrHostKey):
		// Nobody must be led to that server again.
		return failed(errors.Join(err, b.stopIfCurrent(ctx, entry, "another server answered at its address", nil)))
	case errors.Is(err, ErrNoAnswer) && !errors.Is(err, errAgentClosed) && !b.conns.receivedSince(task.ID, before) &&
		b.alive(ctx, task.ID) == nil:
		// The network between this gateway and the bastion may be the cause.
		noAnswer := err
		unanswered := func(ctx context.Context) error {
			refusal := b.conns.refuse(task.ID)
			err := b.checkAlone(ctx)
			if b.conns.receivedSince(task.ID, before) {
				err = errInUse // it has answered another Dial meanwhile
			}
			if err != nil {
				b.conns.accept(task.ID, refusal)
				return err
			}
			b.log.Warn("stopping a bastion that does not answer", "task", task.ID, "err", noAnswer)
			return nil
		}
		if stopErr := b.stopIfCurrent(ctx, entry, "it does not answer", unanswered); stopErr != nil {
			return failed(fmt.Errorf("%w; %w", err, stopErr))
		}
		return nil
	case !errors.Is(err, ErrGone):
		return failed(err)
	}
	return b.setEnded(ctx, entry, err)
}

// setEnded takes a Running entry to Idle, whose task has ended with gone. Of several
// gateways that find the end, the one whose swap succeeds sends the event.
func (b *bastion) setEnded(ctx context.Context, entry Entry, gone error) error {
	task := entry.Task
	reason, usage := whyGone(gone)
	task.Usage = usage
	b.log.Info("bastion has ended", "task", task.ID, "why", reason)
	_, err := b.swap(ctx, entry, Entry{Generation: entry.Generation, State: Idle})
	switch {
	case err == nil:
		b.event(Event{Kind: Ended, Task: task, Reason: reason})
	case !errors.Is(err, ErrConflict):
		return fmt.Errorf("removing the dead bastion of %s from the ledger: %w", b.owner, err)
	}
	return nil
}

// stopIfCurrent stops the task of entry, unless the ledger has changed since, or
// permitted, which may be nil, returns an error. It goes on if ctx ends.
func (b *bastion) stopIfCurrent(ctx context.Context, entry Entry, reason string, permitted func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	err := b.stopTasks(ctx, entry, []Task{entry.Task}, reason, permitted)
	if err != nil && !errors.Is(err, ErrConflict) {
		return fmt.Errorf("stopping it: %w", err)
	}
	return nil
}

// stopTasks stops tasks, which are those of entry, and takes the entry to Idle. If
// the ledger has changed since entry was read, it does nothing, and the error wraps
// ErrConflict. Permitted, if not nil, is called when no gateway that reads the
// ledger connects to the tasks any more; its error leaves them running.
func (b *bastion) stopTasks(ctx context.Context, entry Entry, tasks []Task, reason string, permitted func(context.Context) error) error {
	// With a lease, the entry looks like a start to others: they neither
	// connect to the task nor start another beside it. If this process dies
	// here, the lease ends, and the next start launches the same generation:
	// that is this task, if it still runs.
	hold := Entry{Generation: entry.Generation, State: Starting, Since: time.Now(), Lease: time.Now().Add(stopLease)}
	held, err := b.swap(ctx, entry, hold)
	if err != nil {
		return err
	}
	if permitted != nil {
		err = permitted(ctx)
	}
	for _, task := range tasks {
		if err == nil {
			b.known.forget(b.owner, task.ID)
			err = b.stopTask(ctx, task, reason)
		}
	}
	if err != nil {
		if _, swapErr := b.swap(ctx, held, entry); swapErr != nil {
			b.log.Warn("cannot enter in the ledger that a bastion was not stopped", "err", swapErr)
		}
		return err
	}
	if err := b.forget(ctx, held, tasks); err != nil {
		// The lease ends by itself.
		b.log.Warn("cannot enter in the ledger that a bastion was stopped", "err", err)
	}
	return nil
}

// stopTask is Launcher.Stop, with an event if it succeeds.
func (b *bastion) stopTask(ctx context.Context, task Task, reason string) error {
	err := b.profile.Launcher.Stop(ctx, b.owner, task.ID)
	if err == nil {
		b.event(Event{Kind: Stopped, Task: task, Reason: reason})
	}
	return err
}

// forget takes the entry to Idle, also if a gateway that had just logged in to one
// of the tasks has meanwhile entered it as Running.
func (b *bastion) forget(ctx context.Context, entry Entry, tasks []Task) error {
	for {
		_, err := b.swap(ctx, entry, Entry{Generation: entry.Generation, State: Idle})
		if !errors.Is(err, ErrConflict) {
			return err
		}
		if entry, err = b.find(ctx); err != nil {
			return err
		}
		if entry.State != Running || !slices.ContainsFunc(tasks, func(t Task) bool { return t.ID == entry.Task.ID }) {
			return nil // the ledger has another task by now
		}
	}
}
