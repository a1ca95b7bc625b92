package bastion

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Status is what is known of one owner's bastion.
type Status struct {
	Owner Owner
	// Entry is what the ledger says. A bastion that it says is Running may
	// have ended a moment ago: nobody has looked.
	Entry Entry
	// Idle and MaxLife are the clocks of its profile.
	Idle, MaxLife time.Duration
}

// Status returns what the ledger knows of a user's bastions, one for each
// profile, in the order of their names. Those she never had are there, too, with
// a zero Entry.
func (d *Dialer) Status(ctx context.Context, user string) ([]Status, error) {
	var all []Status
	for _, name := range slices.Sorted(maps.Keys(d.Profiles)) {
		owner := Owner{User: user, Profile: name}
		entry, err := d.Ledger.Get(ctx, owner)
		if err != nil {
			return nil, fmt.Errorf("looking for the bastion of %s: %w", owner, err)
		}
		all = append(all, Status{Owner: owner, Entry: entry, Idle: d.Profiles[name].Idle, MaxLife: d.Profiles[name].MaxLife})
	}
	return all, nil
}

// List returns all bastions of the deployment that run or are being started, in
// the order of their owners. It asks the launchers, who may be some seconds
// late, since a ledger answers for one owner only; so Entry has no more than
// what launchers know, and Since is when the task was launched. What was found
// is returned with an error, too.
func (d *Dialer) List(ctx context.Context) ([]Status, error) {
	var all []Status
	err := d.survey(ctx, func(_ context.Context, p Profile, found OwnedTask) error {
		entry := Entry{Generation: found.Task.Generation, State: Running, Since: found.Started, Task: found.Task}
		if found.Task.Addr == "" {
			entry.State = Starting
		}
		all = append(all, Status{Owner: found.Owner, Entry: entry, Idle: p.Idle, MaxLife: p.MaxLife})
		return nil
	})
	slices.SortFunc(all, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Owner.User, b.Owner.User), cmp.Compare(a.Owner.Profile, b.Owner.Profile),
			cmp.Compare(a.Entry.Generation, b.Entry.Generation))
	})
	// ECS may say the same twice.
	all = slices.CompactFunc(all, func(a, b Status) bool { return a.Owner == b.Owner && a.Entry.Task.ID == b.Entry.Task.ID })
	return all, err
}

// Stop ends the owner's bastion, and every connection to it; the next Dial
// starts another. It returns the entry of what was stopped when that is certain
// to end. It goes on if ctx ends, for half a minute at most. Why is for the
// operator.
//
// Errors wrap [ErrNoProfile], [ErrGone] if none runs, or [ErrStarting] if one is
// being started or stopped at this moment.
func (d *Dialer) Stop(ctx context.Context, owner Owner, why string) (Entry, error) {
	stopped, err := d.end(ctx, owner, why)
	if err != nil {
		return Entry{}, fmt.Errorf("stopping the bastion of %s: %w", owner, err)
	}
	d.Log.Info("bastion stopped", "owner", owner, "task", stopped.Task.ID, "generation", stopped.Generation, "why", why)
	return stopped, nil
}

func (d *Dialer) end(ctx context.Context, owner Owner, why string) (Entry, error) {
	profile, ok := d.Profiles[owner.Profile]
	if !ok {
		return Entry{}, ErrNoProfile
	}
	d.mu.Lock()
	starting := d.boots[owner] != nil
	d.mu.Unlock()
	if starting {
		return Entry{}, ErrStarting
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyTimeout)
	defer cancel()
	entry, err := d.Ledger.Get(ctx, owner)
	if err != nil {
		return Entry{}, err
	}
	tasks := []Task{entry.Task}
	switch {
	case entry.leased():
		return Entry{}, ErrStarting
	case entry.State == Starting:
		// A start that was given up while a task may have been launched.
		if tasks, err = launched(ctx, profile.Launcher, owner, entry.Generation); err != nil {
			return Entry{}, err
		}
		if len(tasks) == 0 {
			return Entry{}, ErrGone
		}
	case entry.State == Idle:
		return Entry{}, ErrGone
	}

	if err := d.halt(ctx, profile.Launcher, owner, entry, tasks, why); errors.Is(err, ErrConflict) {
		return Entry{}, fmt.Errorf("%w: %w", ErrStarting, err)
	} else if err != nil {
		return Entry{}, err
	}
	entry.Task = tasks[0]
	return entry, nil
}

// halt stops tasks, which are those of entry, and forgets them. If the ledger has
// gone on from entry it does nothing, and the error wraps ErrConflict.
func (d *Dialer) halt(ctx context.Context, launcher Launcher, owner Owner, entry Entry, tasks []Task, why string) error {
	// Whoever comes now must neither be led to it nor start another beside it:
	// to others this looks like a start under way. If this process dies here,
	// the lease runs out, and the same generation is launched again: that is
	// this task, if it still runs.
	hold := Entry{Generation: entry.Generation, State: Starting, Since: time.Now(), Lease: time.Now().Add(tidyTimeout)}
	held, err := d.swap(ctx, owner, entry, hold)
	if err != nil {
		return err
	}
	for _, task := range tasks {
		if err := d.stop(ctx, launcher, owner, task, why); err != nil {
			if _, backErr := d.swap(ctx, owner, held, entry); backErr != nil {
				d.Log.Warn("cannot write down that a bastion was not stopped", "owner", owner, "err", backErr)
			}
			return err
		}
	}
	if err := d.forget(ctx, owner, held, tasks); err != nil {
		// The lease runs out by itself.
		d.Log.Warn("cannot write down that a bastion was stopped", "owner", owner, "err", err)
	}
	return nil
}

// launched returns the owner's tasks of a generation, or a later one, that run.
func launched(ctx context.Context, launcher Launcher, owner Owner, generation int64) ([]Task, error) {
	all, err := launcher.List(ctx)
	if err != nil {
		return nil, err
	}
	var tasks []Task
	for _, found := range all {
		if found.Owner == owner && found.Task.Generation >= generation {
			tasks = append(tasks, found.Task)
		}
	}
	return tasks, nil
}

// forget takes the entry to Idle, also if somebody who had just logged in to the
// task has recorded it meanwhile as running.
func (d *Dialer) forget(ctx context.Context, owner Owner, entry Entry, tasks []Task) error {
	for {
		_, err := d.swap(ctx, owner, entry, Entry{Generation: entry.Generation, State: Idle})
		if !errors.Is(err, ErrConflict) {
			return err
		}
		if entry, err = d.Ledger.Get(ctx, owner); err != nil {
			return err
		}
		if entry.State != Running || !slices.ContainsFunc(tasks, func(t Task) bool { return t.ID == entry.Task.ID }) {
			return nil // somebody has gone on
		}
	}
}
