package bastion

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"
)

// Adopt records the bastions that run, or are being started, and the ledger does
// not know: those an earlier gateway left behind. A gateway with a [Memory]
// ledger calls it once, before its first Dial; what cannot be adopted is in the
// error, and does not keep the rest from it. It takes a minute at most. Sweep adopts
// what it has missed, and so does the first start for an owner that the ledger
// does not know.
func (d *Dialer) Adopt(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, adoptTimeout)
	defer cancel()
	var errs []error
	for name, profile := range d.Profiles {
		listing, adopting := d.adoptProfile(ctx, name, profile)
		errs = append(errs, listing, adopting)
	}
	return errors.Join(errs...)
}

// An adoption is whether the bastions of a profile that an earlier gateway left
// behind are known.
type adoption struct {
	turn   chan struct{} // of size one: full while somebody lists them
	listed bool
}

// adoptProfile adopts the bastions of a profile, once all of them could be listed
// for the first time.
func (d *Dialer) adoptProfile(ctx context.Context, name string, profile Profile) (listing, adopting error) {
	d.mu.Lock()
	if d.adoptions == nil {
		d.adoptions = map[string]*adoption{}
	}
	a := d.adoptions[name]
	if a == nil {
		a = &adoption{turn: make(chan struct{}, 1)}
		d.adoptions[name] = a
	}
	d.mu.Unlock()
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return context.Cause(ctx), nil
	}
	if a.listed {
		return nil, nil
	}
	listing, adopting = d.surveyProfile(ctx, name, profile, d.adopt)
	a.listed = listing == nil
	return listing, adopting
}

// Sweep stops what nobody can use any more: tasks that are not, or no longer,
// their owner's present one, and those that have outlived their profile's MaxLife.
// Nothing that may be part of a start under way is touched. A bastion that the
// ledger does not know is adopted, as by [Dialer.Adopt]. To be called every ten
// minutes or so; what fails is in the error, and left for the next time.
func (d *Dialer) Sweep(ctx context.Context) error { return d.survey(ctx, d.sweep) }

// survey calls f for each task of each profile.
func (d *Dialer) survey(ctx context.Context, f func(context.Context, Profile, OwnedTask) error) error {
	var errs []error
	for name, profile := range d.Profiles {
		listing, each := d.surveyProfile(ctx, name, profile, f)
		errs = append(errs, listing, each)
	}
	return errors.Join(errs...)
}

// surveyProfile calls f for each task of a profile. The first error says that
// there may be others.
func (d *Dialer) surveyProfile(ctx context.Context, name string, profile Profile, f func(context.Context, Profile, OwnedTask) error) (listing, each error) {
	tasks, err := profile.Launcher.List(ctx)
	if err != nil {
		listing = fmt.Errorf("listing the bastions of profile %s: %w", name, err)
	}
	var errs []error
	for _, task := range tasks {
		if task.Owner.Profile != name {
			continue // profiles may share a launcher
		}
		if err := f(ctx, profile, task); err != nil {
			errs = append(errs, fmt.Errorf("the bastion %s of %s: %w", task.Task.ID, task.Owner, err))
		}
	}
	return listing, errors.Join(errs...)
}

func (d *Dialer) adopt(ctx context.Context, _ Profile, found OwnedTask) error {
	owner, task := found.Owner, found.Task
	entry, err := d.Ledger.Get(ctx, owner)
	if err != nil {
		return err
	}
	// A ledger that has got this far knows better than a listing, which may
	// be late; a Launch of the same generation would find the task anyway.
	if entry.Generation >= task.Generation || entry.leased() {
		return nil
	}
	known := Entry{Generation: task.Generation, State: Running, Task: task, Since: found.Started}
	if task.Addr == "" {
		// Its gateway died while it started it. Whoever asks for it next
		// launches the same generation, and is given this task.
		known = Entry{Generation: task.Generation, State: Starting, Since: found.Started}
	}
	_, err = d.swap(ctx, owner, entry, known)
	if errors.Is(err, ErrConflict) {
		return nil // somebody is at it
	}
	if err == nil {
		d.Log.Info("bastion adopted", "owner", owner, "task", task.ID, "addr", task.Addr)
		d.event(Event{Kind: Adopted, Owner: owner, Task: task})
	}
	return err
}

func (d *Dialer) sweep(ctx context.Context, profile Profile, found OwnedTask) error {
	owner, task := found.Owner, found.Task
	entry, err := d.Ledger.Get(ctx, owner)
	if err != nil {
		return err
	}
	age, life := time.Since(found.Started), cmp.Or(found.MaxLife, profile.MaxLife)
	current := entry.Generation == task.Generation &&
		(entry.State == Starting || entry.State == Running && entry.Task.ID == task.ID)
	var why string
	switch {
	case found.Started.IsZero():
		return nil // its launcher ends it by other means
	case life > 0 && age > life+overtime:
		why = "it has outlived its maximum life"
	case current:
		return nil
	case len(d.heard(task.ID)) > 0: // somebody is in it, whoever's it is
		return nil
	case entry.Generation < task.Generation && len(d.heard(entry.Task.ID)) == 0:
		return d.adopt(ctx, profile, found)
	case age > orphanAge:
		why = "it is nobody's"
	default:
		return nil
	}
	d.Log.Warn("stopping a bastion", "owner", owner, "task", task.ID, "generation", task.Generation,
		"current", entry.Generation, "age", age.Round(time.Second).String(), "why", why)
	if current && entry.State == Running {
		return d.abandon(ctx, profile.Launcher, owner, entry, why)
	}
	return d.stop(ctx, profile.Launcher, owner, task, why)
}
