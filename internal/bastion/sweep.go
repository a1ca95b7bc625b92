package bastion

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// adoptTimeout limits Adopt, for which the start of a gateway waits.
	adoptTimeout = time.Minute

	// orphanAge is the age at which a task that no ledger entry names is
	// stopped. It exceeds the duration of any start.
	orphanAge = 10 * time.Minute

	// maxLifeGrace is the time from the end of a bastion's MaxLife until it is
	// stopped. The agent exits by itself, which may take some minutes.
	maxLifeGrace = 15 * time.Minute
)

// Adopt enters in the ledger the bastions that run, or are being started, and that
// it does not have: those of an earlier gateway whose ledger was lost. A gateway
// calls it once, before its first Dial. It takes a minute at most. Bastions that
// it cannot adopt are in the error, and do not keep it from the others. Sweep
// adopts those that it missed, and so does the first start for an owner who is not
// in the ledger.
func (d *Dialer) Adopt(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, adoptTimeout)
	defer cancel()
	var errs []error
	settings := d.settings()
	for name, profile := range settings.Profiles {
		listing, adopting := d.adoptProfile(ctx, name, profile, settings)
		errs = append(errs, listing, adopting)
	}
	return errors.Join(errs...)
}

// An adoption is the state of a profile's adoption by this process.
type adoption struct {
	running chan struct{} // of size one: full while a call lists the tasks
	listed  bool          // all tasks have been listed; guarded by running
}

// adoptProfile adopts the bastions of a profile, until its tasks have been listed
// completely once. Listing is the error of the list; adopting is that of entering
// tasks in the ledger.
func (d *Dialer) adoptProfile(ctx context.Context, name string, profile Profile, settings *Settings) (listing, adopting error) {
	d.mu.Lock()
	if d.adoptions == nil {
		d.adoptions = map[string]*adoption{}
	}
	a := d.adoptions[name]
	if a == nil {
		a = &adoption{running: make(chan struct{}, 1)}
		d.adoptions[name] = a
	}
	d.mu.Unlock()
	select {
	case a.running <- struct{}{}:
		defer func() { <-a.running }()
	case <-ctx.Done():
		return context.Cause(ctx), nil
	}
	if a.listed {
		return nil, nil
	}
	listing, adopting = d.forEachTaskOf(ctx, name, profile, settings, (*bastion).adopt)
	a.listed = listing == nil
	return listing, adopting
}

// Sweep stops the bastions that have no more use, of all profiles: tasks that are
// not, or no longer, their owner's present one, those of profiles that are no longer
// configured, and those that have outlived MaxLife. It does not touch tasks that may
// be part of a start, nor, before the end of MaxLife, those that have connections,
// of this gateway or another. It adopts bastions that the ledger does not have, as [Dialer.Adopt]
// does, and removes those from the ledger that have ended since the last call. It
// should be called every ten minutes or so, by one goroutine; failures are in the
// error, and left for the next call.
func (d *Dialer) Sweep(ctx context.Context) error {
	settings := d.settings()
	var errs []error
	owners := map[Owner]bool{} // of all tasks
	known := map[string]bool{} // tasks that the launcher of their profile lists
	strays := map[string]stray{}
	complete := true
	for name, profile := range settings.Profiles {
		began := time.Now()
		tasks, err := profile.Launcher.List(ctx)
		if err != nil {
			complete = false
			errs = append(errs, fmt.Errorf("listing the bastions of profile %s: %w", name, err))
		} else {
			d.present.replace(name, tasks, began)
			errs = append(errs, d.removeEnded(ctx, name, profile, settings, tasks))
		}
		for _, found := range tasks {
			owners[found.Owner] = true
			if found.Owner.Profile != name {
				strays[found.Task.ID] = stray{found, profile.Launcher}
				continue
			}
			known[found.Task.ID] = true
			b := d.bastionOf(found.Owner, profile, settings)
			errs = append(errs, taskError(found, b.sweep(ctx, found)))
		}
	}
	for id, s := range strays {
		if known[id] {
			continue
		}
		_, configured := settings.Profiles[s.task.Owner.Profile]
		b := d.bastionOf(s.task.Owner, Profile{Launcher: s.launcher}, settings)
		errs = append(errs, taskError(s.task, b.sweepStray(ctx, s.task, configured)))
	}
	if complete && d.AfterSweep != nil {
		errs = append(errs, d.AfterSweep(ctx, owners))
	}
	return errors.Join(errs...)
}

// endedAtOnce is how many ended tasks a sweep asks the launcher about at the same
// time. The launcher may combine these calls.
const endedAtOnce = 100

// removeEnded removes the tasks of a profile from the ledger that have ended: those
// that the last listing had, or that this gateway has entered, and the present one,
// tasks, does not have. The next Dial would do the same, but it may be days later,
// when the launcher does not know the time of the end any more.
func (d *Dialer) removeEnded(ctx context.Context, name string, profile Profile, settings *Settings, tasks []OwnedTask) error {
	candidates := d.known.of(name)
	maps.Copy(candidates, d.listed[name])
	now := map[Owner]string{}
	for _, found := range tasks {
		if found.Owner.Profile == name {
			now[found.Owner] = found.Task.ID
		}
	}
	var mu sync.Mutex
	var errs []error
	unsure := map[Owner]string{} // to be asked about again
	var asking errgroup.Group
	asking.SetLimit(endedAtOnce)
	for owner, id := range candidates {
		if now[owner] == id {
			continue
		}
		asking.Go(func() error {
			b := d.bastionOf(owner, profile, settings)
			again, err := b.removeIfEnded(ctx, id)
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, taskError(OwnedTask{Owner: owner, Task: Task{ID: id}}, err))
			if again {
				unsure[owner] = id
			}
			return nil
		})
	}
	asking.Wait()
	for owner, id := range unsure {
		if _, other := now[owner]; !other {
			now[owner] = id
		}
	}
	if d.listed == nil {
		d.listed = map[string]map[Owner]string{}
	}
	d.listed[name] = now
	return errors.Join(errs...)
}

// removeIfEnded takes the entry of a task that is no longer listed to Idle, if the
// launcher knows when the task ended. If it does not know, the task may be in a
// cluster that it does not list, so nothing is done. Again says that the launcher
// may know more later.
func (b *bastion) removeIfEnded(ctx context.Context, taskID string) (again bool, err error) {
	entry, err := b.find(ctx)
	if err != nil || entry.State != Running || entry.Task.ID != taskID {
		return err != nil, err
	}
	gone := b.alive(ctx, taskID)
	if !errors.Is(gone, ErrGone) {
		return true, nil // listings may be late
	}
	if _, usage := whyGone(gone); usage == (Usage{}) {
		return false, nil
	} else if usage.Until.IsZero() {
		return true, nil // it is ending, perhaps with sessions
	}
	b.known.forget(b.owner, taskID)
	return false, b.setEnded(ctx, entry, gone)
}

// A stray is a task that the launcher of its profile does not list, with a launcher
// that does. The profile was removed, or has another launcher or cluster now.
type stray struct {
	task     OwnedTask
	launcher Launcher
}

// taskError adds the task to err, which may be nil.
func taskError(found OwnedTask, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("the bastion %s of %s: %w", found.Task.ID, found.Owner, err)
}

// forEachTask calls f for each task of each profile.
func (d *Dialer) forEachTask(ctx context.Context, f func(*bastion, context.Context, OwnedTask) error) error {
	var errs []error
	settings := d.settings()
	for name, profile := range settings.Profiles {
		listing, each := d.forEachTaskOf(ctx, name, profile, settings, f)
		errs = append(errs, listing, each)
	}
	return errors.Join(errs...)
}

// forEachTaskOf calls f for each task of a profile. Listing, if not nil, says that
// there may be others; each joins the errors of f.
func (d *Dialer) forEachTaskOf(ctx context.Context, name string, profile Profile, settings *Settings, f func(*bastion, context.Context, OwnedTask) error) (listing, each error) {
	tasks, err := profile.Launcher.List(ctx)
	if err != nil {
		listing = fmt.Errorf("listing the bastions of profile %s: %w", name, err)
	}
	var errs []error
	for _, found := range tasks {
		if found.Owner.Profile != name {
			continue // profiles may share a launcher
		}
		errs = append(errs, taskError(found, f(d.bastionOf(found.Owner, profile, settings), ctx, found)))
	}
	return listing, errors.Join(errs...)
}

// adopt enters a listed task in the ledger, if the ledger does not have its
// generation or a later one.
func (b *bastion) adopt(ctx context.Context, found OwnedTask) error {
	task := found.Task
	entry, err := b.find(ctx)
	if err != nil {
		return err
	}
	// A listing may be late. If it is right about the same generation, the next
	// Launch of that returns the task anyway.
	if entry.Generation >= task.Generation || entry.leased() {
		return nil
	}
	adopted := Entry{Generation: task.Generation, State: Running, Task: task, Since: found.Started}
	if task.Addr == "" {
		// Its gateway was killed during the start. The next start launches the
		// same generation, and gets this task.
		adopted = Entry{Generation: task.Generation, State: Starting, Since: found.Started}
	}
	_, err = b.swap(ctx, entry, adopted)
	if errors.Is(err, ErrConflict) {
		return nil // a start or another gateway was first
	}
	if err == nil {
		b.log.Info("bastion adopted", "task", task.ID, "addr", task.Addr)
		if task.Usage.From.IsZero() {
			task.Usage.From = found.Started
		}
		b.event(Event{Kind: Adopted, Task: task, MaxLife: cmp.Or(found.MaxLife, b.profile.MaxLife)})
	}
	return err
}

// sweep stops or adopts a listed task, or leaves it alone, see [Dialer.Sweep].
func (b *bastion) sweep(ctx context.Context, found OwnedTask) error {
	task := found.Task
	entry, err := b.find(ctx)
	if err != nil {
		return err
	}
	age, maxLife := time.Since(found.Started), cmp.Or(found.MaxLife, b.profile.MaxLife)
	current := entry.Generation == task.Generation &&
		(entry.State == Starting || entry.State == Running && entry.Task.ID == task.ID)
	var reason string
	switch {
	case found.Started.IsZero():
		return nil // its launcher does not know its age, and ends it by other means
	case maxLife > 0 && age > maxLife+maxLifeGrace:
		reason = "it has outlived its maximum life"
	case current, b.conns.exist(task.ID):
		return nil
	case entry.Generation < task.Generation && !b.conns.exist(entry.Task.ID):
		return b.adopt(ctx, found)
	case age > orphanAge:
		if err := b.free(ctx, task); errors.Is(err, errInUse) {
			return nil
		} else if err != nil {
			return err
		}
		reason = "it is not its owner's present one"
	default:
		return nil
	}
	b.log.Warn("stopping a bastion", "task", task.ID, "generation", task.Generation,
		"current", entry.Generation, "age", age.Round(time.Second).String(), "why", reason)
	if current && entry.State == Running {
		return b.stopIfCurrent(ctx, entry, reason, nil)
	}
	return b.stopTask(ctx, task, reason)
}

// sweepStray stops a stray, or leaves it alone. If its profile is configured, its
// owner may have connections to it, and keeps it until the end of MaxLife.
func (b *bastion) sweepStray(ctx context.Context, found OwnedTask, configured bool) error {
	age := time.Since(found.Started)
	var reason string
	switch {
	case found.Started.IsZero():
		return nil // as in sweep
	case found.MaxLife > 0 && age > found.MaxLife+maxLifeGrace:
		reason = "it has outlived its maximum life, and its profile is elsewhere"
	case configured, b.conns.exist(found.Task.ID), age <= orphanAge:
		return nil
	default:
		if err := b.free(ctx, found.Task); errors.Is(err, errInUse) {
			return nil
		} else if err != nil {
			return err
		}
		reason = "its profile is no longer configured"
	}
	b.log.Warn("stopping a bastion", "task", found.Task.ID, "generation", found.Task.Generation,
		"age", age.Round(time.Second).String(), "why", reason)
	return b.stopTask(ctx, found.Task, reason)
}
