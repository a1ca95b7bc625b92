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

// statusTimeout limits the question whether one bastion still runs, because a
// user waits for the answer.
const statusTimeout = 5 * time.Second

// Status describes one owner's bastion.
type Status struct {
	Owner Owner
	// Entry is the ledger's. A bastion that is Running there may have ended a
	// moment ago.
	Entry Entry
	// Idle and MaxLife are those of its profile.
	Idle, MaxLife time.Duration
}

// Status returns the state of a user's bastions, one for each profile, sorted by
// profile. The ledger learns of a bastion's end at the owner's next login, so the
// launcher is asked about each one that is Running in it, for at most
// statusTimeout. If the launcher says that it has ended, or if there never was
// one, its Entry is zero.
func (d *Dialer) Status(ctx context.Context, user string) ([]Status, error) {
	var all []Status
	settings := d.settings()
	for _, name := range slices.Sorted(maps.Keys(settings.Profiles)) {
		b := d.bastionOf(Owner{User: user, Profile: name}, settings.Profiles[name], settings)
		entry, err := b.find(ctx)
		if err != nil {
			return nil, fmt.Errorf("looking for the bastion of %s: %w", b.owner, err)
		}
		if entry.State == Running && b.hasEnded(ctx, entry.Task.ID) {
			entry = Entry{}
		}
		all = append(all, Status{Owner: b.owner, Entry: entry, Idle: b.profile.Idle, MaxLife: b.profile.MaxLife})
	}
	return all, nil
}

// hasEnded reports whether the launcher says, within statusTimeout, that a task has
// ended.
func (b *bastion) hasEnded(ctx context.Context, taskID string) bool {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	return errors.Is(b.alive(ctx, taskID), ErrGone)
}

// List returns all bastions that run or are being started, ordered by owner. It
// asks the launchers, which may be some seconds late, since a ledger answers for
// one owner only. So Entry has only the launcher's information, and Since is the
// time of the launch. With an error, the list is incomplete.
func (d *Dialer) List(ctx context.Context) ([]Status, error) {
	var all []Status
	err := d.forEachTask(ctx, func(b *bastion, _ context.Context, found OwnedTask) error {
		entry := Entry{Generation: found.Task.Generation, State: Running, Since: found.Started, Task: found.Task}
		if found.Task.Addr == "" {
			entry.State = Starting
		}
		all = append(all, Status{Owner: b.owner, Entry: entry, Idle: b.profile.Idle, MaxLife: b.profile.MaxLife})
		return nil
	})
	slices.SortFunc(all, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Owner.User, b.Owner.User), cmp.Compare(a.Owner.Profile, b.Owner.Profile),
			cmp.Compare(a.Entry.Generation, b.Entry.Generation))
	})
	// A launcher may list a task twice.
	all = slices.CompactFunc(all, func(a, b Status) bool { return a.Owner == b.Owner && a.Entry.Task.ID == b.Entry.Task.ID })
	return all, err
}
