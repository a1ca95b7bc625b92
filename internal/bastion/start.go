package bastion

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
	"github.com/sallyport-ssh/sallyport/internal/tracing"
)

const (
	// leaseTime is how long other gateways leave a claimed generation alone. It
	// may be shorter than a launch: a gateway that takes over launches the same
	// generation and gets the same task.
	leaseTime = 30 * time.Second

	// cleanupTimeout limits the ledger and launcher calls after a failure,
	// which must not depend on the caller's ctx.
	cleanupTimeout = 30 * time.Second

	// stopLease is how long other gateways leave a bastion alone that is being
	// stopped. The stop takes cleanupTimeout at most, and the clocks of gateways
	// may differ by half a minute.
	stopLease = cleanupTimeout + 30*time.Second

	// maxLease exceeds each of them, and the difference of usual clocks. A longer
	// lease is that of a gateway with a wrong clock, which may have crashed: the owner
	// would have no bastion, and nobody could stop one, until the lease has ended.
	maxLease = 10 * time.Minute
)

// A bastion is one owner's, with its operations: find, start, dial, retire, stop,
// adopt, sweep. It is made for one operation of a [Dialer], with the settings that
// are in force then, and is not changed afterwards. Its state is in the ledger, at
// the launcher, and in conns and known.
type bastion struct {
	owner     Owner
	profile   Profile
	fleetKeys []ssh.Signer

	ledger  Ledger
	netDial func(ctx context.Context, network, addr string) (net.Conn, error) // may be nil
	onEvent func(Event)                                                       // may be nil
	conns   *connections
	known   *remembered
	present *present
	// alone is [Dialer.Alone]; it may be nil.
	alone func(context.Context) error
	log   *slog.Logger // has the owner

	// adoptProfile adopts all bastions of the profile, once, see
	// [Dialer.adoptProfile].
	adoptProfile func(context.Context) (listing, adopting error)
	// countStart counts a start of the user's, see [Dialer.countStart].
	countStart func(context.Context) error
}

func (b *bastion) startTimeout() time.Duration {
	return cmp.Or(b.profile.StartTimeout, defaultStartTimeout)
}

// find returns the ledger's entry.
func (b *bastion) find(ctx context.Context) (Entry, error) {
	ctx, end := tracing.Start(ctx, "ledger read")
	entry, err := b.ledger.Get(ctx, b.owner)
	end(err)
	return entry, err
}

// findPatiently is find for a ledger that may be out of reach for a while, see
// patiently.
func (b *bastion) findPatiently(ctx context.Context, onFailure func()) (entry Entry, err error) {
	err = patiently(ctx, func(ctx context.Context) (again bool, err error) {
		entry, err = b.find(ctx)
		return true, err
	}, func(err error) {
		b.log.Warn("cannot read the ledger; trying again", "err", err)
		onFailure()
	})
	return entry, err
}

// swap is Ledger.Swap for a network that loses replies, and for a ledger that may be out
// of reach for a while, see patiently: after an error it reads the entry again, to see
// whether the change was made.
func (b *bastion) swap(ctx context.Context, old, new Entry) (made Entry, err error) {
	ctx, end := tracing.Start(ctx, "ledger write")
	defer func() { end(err) }()
	new.Nonce = rand.Text()
	err = patiently(ctx, func(ctx context.Context) (again bool, err error) {
		if made, err = b.ledger.Swap(ctx, b.owner, old, new); err == nil {
			return false, nil
		}
		now, getErr := b.find(ctx)
		switch {
		case getErr == nil && now.Nonce == new.Nonce:
			made = now
			return false, nil
		case errors.Is(err, ErrConflict):
			return false, err
		case getErr == nil && now.Version != old.Version:
			return false, fmt.Errorf("%w: %s is at version %d, not %d", ErrConflict, b.owner, now.Version, old.Version)
		}
		return true, err
	}, func(err error) { b.log.Warn("cannot write the ledger; trying again", "err", err) })
	return made, err
}

// patiently calls f until it succeeds or is not to be called again, for ledgerTimeout; then
// its error wraps ErrLedger. It calls onFailure before it waits for the next call.
func patiently(ctx context.Context, f func(context.Context) (again bool, err error), onFailure func(error)) error {
	bounded, cancel := context.WithTimeout(ctx, ledgerTimeout)
	defer cancel()
	for {
		again, err := f(bounded)
		if err == nil || !again {
			return err
		}
		if bounded.Err() == nil {
			onFailure(err)
			sleep(bounded, time.Second)
		}
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case bounded.Err() != nil:
			return fmt.Errorf("%w: %w", ErrLedger, err)
		}
	}
}

// start takes the entry to Running: it claims a generation, launches it, and
// proves by a login that it works. If another gateway is doing that, it waits for
// the outcome. The Entry that comes with an error has the generation and the task
// that did not start, as far as known.
//
// A generation is given up for the next one only if its task is known to have
// ended. After any other failure of a launch, a task may be running; the entry
// then stays Starting, and the next start launches the same generation again and
// gets that task.
//
// Entry is one that the caller has read. It may be old, since each claim is a swap: if
// the entry was changed meanwhile, it is read again.
//
// Counted says that the start has been counted against StartsPerUser. If not, because
// another gateway held the entry, it is counted if it turns out to claim a new
// generation.
func (b *bastion) start(ctx context.Context, entry Entry, counted bool) (Entry, error) {
	failedGenerations, adopted := 0, false
	for first := true; ; first = false {
		var err error
		if !first {
			if entry, err = b.findPatiently(ctx, func() {}); err != nil {
				return Entry{}, err
			}
		}
		if entry.State == Running {
			return entry, nil
		}
		if entry.Version == 0 && !adopted {
			// Either the owner never had a bastion, or the ledger was lost and
			// Adopt has not succeeded yet. If it enters one now, the claim fails.
			if adopted, err = b.adoptBeforeStart(ctx); err != nil {
				return Entry{}, err
			}
			if !adopted {
				continue
			}
		}
		if entry.leased() {
			if err := sleep(ctx, time.Second); err != nil {
				return Entry{}, fmt.Errorf("waiting for another gateway to start it: %w", err)
			}
			continue
		}

		claim := Entry{Generation: entry.Generation, State: Starting, Since: time.Now(), Lease: time.Now().Add(leaseTime)}
		if entry.State == Idle {
			if !counted {
				if err := b.countStart(ctx); err != nil {
					return Entry{}, err
				}
				counted = true
			}
			claim.Generation++
		}
		if entry, err = b.swap(ctx, entry, claim); errors.Is(err, ErrConflict) {
			continue
		} else if err != nil {
			return Entry{}, fmt.Errorf("claiming generation %d: %w", claim.Generation, err)
		}

		b.event(Event{Kind: Launching, Task: Task{Generation: entry.Generation}})
		launched, err := b.launch(ctx, entry, failedGenerations)
		switch {
		case err == nil:
			return launched, nil
		case errors.Is(err, ErrConflict):
			continue // another gateway took over, and was faster
		case errors.Is(err, ErrGone) && failedGenerations == 0 && retryable(err):
			failedGenerations++
			b.log.Warn("bastion ended while it started; trying once more", "generation", entry.Generation, "err", err)
			continue
		}
		return launched, err
	}
}

// adoptBeforeStart adopts the bastions of the profile. It returns false, after a
// pause, if the listing failed and should be repeated, and an error if repeating
// does not help.
func (b *bastion) adoptBeforeStart(ctx context.Context) (listed bool, err error) {
	listing, adopting := b.adoptProfile(ctx)
	if listing != nil && (!retryable(listing) || sleep(ctx, time.Second) != nil) {
		return false, listing
	}
	if err := errors.Join(listing, adopting); err != nil {
		b.log.Warn("cannot tell what an earlier gateway has left running", "err", err)
	}
	return listing == nil, nil
}

// retryable reports whether the same request can have another outcome soon.
func retryable(err error) bool {
	for _, lasting := range []error{ErrQuota, ErrImage, ErrSecrets, ErrDenied, ErrConfig} {
		if errors.Is(err, lasting) {
			return false
		}
	}
	return true
}

// launch takes the claimed entry to Running. If it fails, it leaves the entry as
// the next start needs it, and returns one with the generation and the task that
// failed, as far as known. After an error that wraps ErrGone, the next generation
// can be started; after ErrConflict, another gateway has taken over.
func (b *bastion) launch(ctx context.Context, entry Entry, failedGenerations int) (Entry, error) {
	launching, launched := tracing.Start(ctx, "launch")
	task, err := b.profile.Launcher.Launch(launching, Launch{
		Owner: b.owner, Generation: entry.Generation, Attempt: failedGenerations,
		Idle: b.profile.Idle, MaxLife: b.profile.MaxLife, Forwarding: b.profile.Forwarding,
	})
	launched(err)
	var conn *Conn
	if err == nil {
		// A TCP connection proves little: balancers and half-started servers
		// accept it, too. The login has no permissions.
		nobody := identity.Identity{User: b.owner.User, Profile: b.owner.Profile, ConnID: "start"}
		conn, err = b.dial(ctx, task, nobody, b.startTimeout(), func() {})
	}
	if err != nil {
		failed := Entry{Generation: max(entry.Generation, task.Generation), Task: task}
		return failed, b.cleanUp(ctx, entry, failed, err)
	}
	conn.Close()
	running, err := b.setRunning(ctx, entry, conn.Task)
	if err == nil && running.Task.ID == task.ID {
		running.Task.Usage = task.Usage // the ledger may not return it
	}
	return running, err
}

// cleanUp leaves the claimed entry as the next start needs it, after err has ended
// the launch of failed. It returns the error of the start.
func (b *bastion) cleanUp(ctx context.Context, entry, failed Entry, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	next := Entry{Generation: failed.Generation, State: Idle}
	switch {
	case errors.Is(err, ErrGone):
	case failed.Task.ID == "" || errors.Is(err, errLoginDenied):
		// A task may run. Without a lease, the next start may try at once.
		next.State = Starting
	default:
		// The task runs, and nobody can log in to it, so it has no sessions.
		// The swap before the stop makes sure that no other gateway has taken
		// over.
		stopping := Entry{Generation: failed.Generation, State: Starting, Lease: time.Now().Add(stopLease)}
		held, swapErr := b.swap(ctx, entry, stopping)
		if swapErr != nil {
			return err
		}
		entry = held
		if stopErr := b.stopTask(ctx, failed.Task, "nobody can log in to it"); stopErr != nil {
			err = fmt.Errorf("%w; stopping it: %w", err, stopErr)
			next.State = Starting
		}
	}
	_, swapErr := b.swap(ctx, entry, next)
	if errors.Is(swapErr, ErrConflict) && errors.Is(err, ErrGone) {
		// Another gateway took over and went on to the next generation; this
		// is no failure of that one.
		return swapErr
	}
	if swapErr != nil && !errors.Is(swapErr, ErrConflict) {
		// The lease ends by itself.
		b.log.Warn("cannot enter in the ledger that a bastion did not start", "err", swapErr)
	}
	return err
}

// setRunning enters in the ledger that task runs, with the host key that it has
// shown: it takes a Starting entry to Running, and pins the key in an entry that
// has none. The error wraps ErrConflict if the ledger has another task by now, and
// ErrHostKey if another key has been pinned.
func (b *bastion) setRunning(ctx context.Context, entry Entry, task Task) (Entry, error) {
	generation := entry.Generation
	for {
		same := entry.State == Running && entry.Task.ID == task.ID
		if same && entry.Task.HostKey != nil {
			if !equal(entry.Task.HostKey, task.HostKey) {
				return Entry{}, fmt.Errorf("%w: task %s has shown %s before, and now %s", ErrHostKey, task.ID,
					ssh.FingerprintSHA256(entry.Task.HostKey), ssh.FingerprintSHA256(task.HostKey))
			}
			return entry, nil
		}
		if !same && (entry.State != Starting || entry.Generation != generation) {
			return Entry{}, fmt.Errorf("%w: %s is past task %s", ErrConflict, b.owner, task.ID)
		}
		running := Entry{Generation: max(generation, task.Generation), State: Running, Since: time.Now(), Task: task}
		if same {
			running.Since = entry.Since
		}
		next, err := b.swap(ctx, entry, running)
		if err == nil {
			return next, nil
		}
		if !errors.Is(err, ErrConflict) {
			return Entry{}, fmt.Errorf("entering task %s in the ledger: %w", task.ID, err)
		}
		// Another gateway has taken over this generation, or was faster.
		if entry, err = b.findPatiently(ctx, func() {}); err != nil {
			return Entry{}, fmt.Errorf("entering task %s in the ledger: %w", task.ID, err)
		}
	}
}

// mayRun reports whether the bastion runs or is being started, as far as the
// ledger and the launcher know; if either does not know, it reports true.
func (b *bastion) mayRun(ctx context.Context, entry Entry) bool {
	switch {
	case entry.leased():
		return true
	case entry.State == Starting:
		// A failed start may have launched a task all the same.
		tasks, err := b.tasks(ctx, entry.Generation)
		return err != nil || len(tasks) > 0
	case entry.State == Running:
		// The ledger learns of an end only at the next Dial.
		return !b.hasEnded(ctx, entry.Task.ID)
	}
	return false
}

// alive is Launcher.Alive. A panic in it is logged and returned as an error that
// does not wrap ErrGone.
func (b *bastion) alive(ctx context.Context, taskID string) error {
	return catchPanic(b.log, "alive", func() error { return b.profile.Launcher.Alive(ctx, b.owner, taskID) })
}

// tasks returns the owner's tasks of a generation, or a later one, that run.
func (b *bastion) tasks(ctx context.Context, generation int64) ([]Task, error) {
	all, err := b.profile.Launcher.List(ctx)
	if err != nil {
		return nil, err
	}
	var tasks []Task
	for _, found := range all {
		if found.Owner == b.owner && found.Task.Generation >= generation {
			tasks = append(tasks, found.Task)
		}
	}
	return tasks, nil
}

// catchPanic calls f. A panic in it is logged and returned as an error.
func catchPanic(log *slog.Logger, in string, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			oplog.Panic(log, in, p)
			err = fmt.Errorf("panic in %s", in)
		}
	}()
	return f()
}

// sleep waits for the duration, more or less a quarter so that gateways do not act
// in step, or returns the cause of ctx's end.
func sleep(ctx context.Context, about time.Duration) error {
	select {
	case <-time.After(about*3/4 + mathrand.N(about/2)):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
