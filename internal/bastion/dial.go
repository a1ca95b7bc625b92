package bastion

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

const (
	// handshakeTimeout bounds one attempt's TCP connect, and then its SSH
	// handshake and login.
	handshakeTimeout = 10 * time.Second

	// patience is how long a bastion that is said to run may leave connections
	// unanswered. An agent closes its listener before it exits, and ECS says
	// RUNNING for some seconds longer. It is also longer than the 30 seconds for
	// which an agent may leave a connection that it serves without a sign of life.
	patience = 45 * time.Second

	// lease is how long others leave a launch alone. It is shorter than a slow
	// launch takes: whoever takes over launches the same generation and gets
	// the same task, so only the successor of a gateway that died cares.
	lease = 30 * time.Second

	// tidyTimeout bounds what is still written down after a start has failed.
	tidyTimeout = 30 * time.Second

	// adoptTimeout bounds Adopt, for which the start of a gateway waits.
	adoptTimeout = time.Minute

	// maxDeaths is how many bastions may die under one Dial before it gives up.
	maxDeaths = 3

	// orphanAge is how old a task must be to be stopped because it is
	// nobody's: far older than any start under way.
	orphanAge = 10 * time.Minute

	// overtime is how long after its MaxLife a bastion is stopped. The agent
	// ends it by itself, and that may take a while.
	overtime = 15 * time.Minute
)

// A Profile is a named kind of bastion.
type Profile struct {
	Launcher Launcher
	// Idle and MaxLife are the agent's clocks, see [Launch].
	Idle, MaxLife time.Duration
	// StartTimeout bounds a start from the claim to the first login; zero
	// means five minutes.
	StartTimeout time.Duration
}

// A Dialer connects users to their bastions, and starts those that do not run.
// It must not be copied after first use. Methods are safe for concurrent use.
type Dialer struct {
	Ledger Ledger
	// Profiles holds the kinds of bastions by the names users know them by.
	Profiles map[string]Profile
	// FleetKey signs the certificates that log in to bastions.
	FleetKey ssh.Signer
	Log      *slog.Logger
	// StartsPerUser bounds how often one user's bastions may be started.
	StartsPerUser StartRate

	// NetDial, if not nil, connects to bastions in place of a [net.Dialer].
	NetDial func(ctx context.Context, network, addr string) (net.Conn, error)
	// WrapConn, if not nil, goes between each new connection and its SSH.
	WrapConn func(net.Conn) net.Conn
	// Event, if not nil, is told what becomes of bastions. What comes next
	// waits for it.
	Event func(Event)

	mu     sync.Mutex
	boots  map[Owner]*boot        // the starts under way in this process
	starts map[string][]time.Time // of late, by user; see StartsPerUser
	// conns are the connections to each task, by its ID.
	conns     map[string]map[*Conn]struct{}
	adoptions map[string]*adoption // by profile
}

// Dial connects id to the bastion of its user and profile, and starts one if
// none runs. While one starts, Dial blocks, for as long as the profile's
// StartTimeout; the start belongs to the bastion and goes on if ctx ends, so
// that the user who gives up and comes back finds it further on.
//
// Notify, if not nil, is called at most once, and only if there is something to
// wait for: with true if this call began a start, with false if one was under way
// already, or if the bastion does not answer at once. It is called on the
// goroutine of the caller.
//
// A bastion that does not answer any more, although it is said to run, is stopped
// after three quarters of a minute, and another is started; but not while others
// are connected to it through this Dialer and hear from it.
//
// Errors wrap [ErrNoProfile], [ErrTooMany], a [TooOftenError], one of those that
// say why a bastion cannot start, [ErrHostKey], [ErrNoAnswer], [ErrGone] (three
// bastions in a row died at once), or the context's cause.
func (d *Dialer) Dial(ctx context.Context, id identity.Identity, notify func(starting bool)) (*Conn, error) {
	owner := Owner{User: id.User, Profile: id.Profile}
	profile, ok := d.Profiles[owner.Profile]
	if !ok {
		return nil, fmt.Errorf("finding the bastion of %s: %w", owner, ErrNoProfile)
	}
	wait := func(starting bool) {
		if notify != nil {
			notify(starting)
			notify = nil
		}
	}
	var last error
	started := false
	for range maxDeaths {
		entry, err := d.Ledger.Get(ctx, owner)
		if err != nil {
			return nil, fmt.Errorf("finding the bastion of %s: %w", owner, err)
		}
		if entry.State != Running {
			if err := d.room(ctx, owner, id.Permissions.Limits.Bastions); err != nil {
				return nil, fmt.Errorf("starting a bastion for %s: %w", owner, err)
			}
			b, mine, err := d.join(ctx, owner, profile, entry.leased())
			if err != nil {
				return nil, fmt.Errorf("starting a bastion for %s: %w", owner, err)
			}
			started = mine && !entry.leased()
			wait(started)
			if entry, err = b.wait(ctx); err != nil {
				return nil, fmt.Errorf("starting a bastion for %s: %w", owner, err)
			}
		}

		before := d.heard(entry.Task.ID)
		conn, err := d.reach(ctx, profile.Launcher, owner, entry.Task, id, patience, func() { wait(false) })
		if err == nil && entry.Task.HostKey == nil {
			if _, err = d.record(ctx, owner, entry, conn.Task); err != nil {
				conn.hangUp()
			}
		}
		switch {
		case err == nil:
			conn.Started = started
			d.remember(conn)
			return conn, nil
		case errors.Is(err, ErrConflict):
			last = err // another task has taken this one's place meanwhile
			continue
		case errors.Is(err, ErrHostKey):
			// Whatever it is that answers there, nobody is to be led to it
			// again.
			return nil, fmt.Errorf("connecting to the bastion of %s: %w", owner,
				errors.Join(err, d.abandon(ctx, profile.Launcher, owner, entry, "something else answered in its place")))
		case errors.Is(err, ErrNoAnswer) && !d.heardSince(entry.Task.ID, before) &&
			d.alive(ctx, profile.Launcher, owner, entry.Task.ID) == nil:
			last = err
			d.Log.Warn("stopping a bastion that does not answer", "owner", owner, "task", entry.Task.ID, "err", err)
			if err := d.abandon(ctx, profile.Launcher, owner, entry, "it does not answer"); err != nil {
				return nil, fmt.Errorf("connecting to the bastion of %s: %w; %w", owner, last, err)
			}
			continue
		case !errors.Is(err, ErrGone):
			return nil, fmt.Errorf("connecting to the bastion of %s: %w", owner, err)
		}
		last = err
		d.Log.Info("bastion has ended", "owner", owner, "task", entry.Task.ID)
		_, err = d.swap(ctx, owner, entry, Entry{Generation: entry.Generation, State: Idle})
		if err == nil {
			d.event(Event{Kind: Ended, Owner: owner, Task: entry.Task})
		}
		if err != nil && !errors.Is(err, ErrConflict) {
			return nil, fmt.Errorf("forgetting the dead bastion of %s: %w", owner, err)
		}
	}
	return nil, fmt.Errorf("bastions of %s end as soon as they start: %w", owner, last)
}

// room returns ErrTooMany if owner's user has most bastions already, this one
// aside; zero is no limit. Two that are started in the very same moment may both
// find room.
func (d *Dialer) room(ctx context.Context, owner Owner, most int) error {
	if most == 0 {
		return nil
	}
	all, err := d.Status(ctx, owner.User)
	if err != nil {
		return err
	}
	n := 0
	for _, s := range all {
		d.mu.Lock()
		boots := d.boots[s.Owner] != nil
		d.mu.Unlock()
		switch {
		case s.Owner == owner:
		case boots || s.Entry.leased():
			n++
		case s.Entry.State == Starting:
			// A start that failed, which may have begun a task all the same.
			tasks, err := launched(ctx, d.Profiles[s.Owner.Profile].Launcher, s.Owner, s.Entry.Generation)
			if err != nil || len(tasks) > 0 {
				n++
			}
		case s.Entry.State == Running:
			// The ledger learns of its end only when somebody wants it.
			err := d.Profiles[s.Owner.Profile].Launcher.Alive(ctx, s.Owner, s.Entry.Task.ID)
			if !errors.Is(err, ErrGone) {
				n++
			}
		}
	}
	if n >= most {
		return ErrTooMany
	}
	return nil
}

// abandon stops the task of entry and forgets it, unless somebody has gone on
// already.
func (d *Dialer) abandon(ctx context.Context, launcher Launcher, owner Owner, entry Entry, why string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyTimeout)
	defer cancel()
	err := d.halt(ctx, launcher, owner, entry, []Task{entry.Task}, why)
	if errors.Is(err, ErrConflict) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stopping it: %w", err)
	}
	return nil
}

// A boot is the start of one bastion, for all who wait for it in this process.
type boot struct {
	done  chan struct{} // closed when entry and err are set
	entry Entry
	err   error
}

// wait returns the outcome of the boot, or the cause of ctx's end.
func (b *boot) wait(ctx context.Context) (Entry, error) {
	select {
	case <-b.done:
		return b.entry, b.err
	case <-ctx.Done():
		return Entry{}, context.Cause(ctx)
	}
}

// join returns the boot under way for owner; mine says that it was begun for
// this call. Its user must not have had too many, unless it is elsewhere that it
// was begun.
func (d *Dialer) join(ctx context.Context, owner Owner, profile Profile, elsewhere bool) (b *boot, mine bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if b := d.boots[owner]; b != nil {
		return b, false, nil
	}
	if !elsewhere {
		if err := d.countStart(owner.User); err != nil {
			return nil, false, err
		}
	}
	b = &boot{done: make(chan struct{})}
	if d.boots == nil {
		d.boots = map[Owner]*boot{}
	}
	d.boots[owner] = b
	// The boot outlives the connection that asked for it: the user who gives
	// up and connects again joins it instead of paying twice. Wait waits for
	// it.
	go d.run(context.WithoutCancel(ctx), owner, profile, b)
	return b, true, nil
}

// run carries out b, within the profile's StartTimeout.
func (d *Dialer) run(ctx context.Context, owner Owner, profile Profile, b *boot) {
	if profile.StartTimeout == 0 {
		profile.StartTimeout = 5 * time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, profile.StartTimeout)
	defer cancel()
	began := time.Now()
	log := d.Log.With("owner", owner)

	b.err = errors.New("starting it failed") // should start panic
	defer func() {
		if p := recover(); p != nil {
			log.Error("panic", "in", "boot", "panic", p, "stack", string(debug.Stack()))
		}
		d.mu.Lock()
		delete(d.boots, owner)
		d.mu.Unlock()
		close(b.done)
	}()
	b.entry, b.err = d.start(ctx, owner, profile)
	if b.err != nil && ctx.Err() != nil {
		b.err = fmt.Errorf("%w (%v): %w", ErrTimeout, profile.StartTimeout, b.err)
	}
	// Those who asked for it may be gone, so success and failure are logged
	// here too.
	if b.err != nil {
		task := b.entry.Task // as far as it got
		task.Generation = b.entry.Generation
		log.Error("bastion did not start", "ms", time.Since(began).Milliseconds(), "task", task.ID, "generation", task.Generation, "err", b.err)
		d.event(Event{Kind: Failed, Owner: owner, Task: task, Took: time.Since(began), Reason: b.err.Error()})
	} else {
		log.Info("bastion runs", "ms", time.Since(began).Milliseconds(), "task", b.entry.Task.ID, "addr", b.entry.Task.Addr)
		d.event(Event{Kind: Started, Owner: owner, Task: b.entry.Task, Took: time.Since(began)})
	}
}

// start brings owner's entry to Running: it claims a generation, launches it,
// and proves by a login that it works; or it waits for whoever is doing that. With
// an error comes as much of the entry as is known of what did not start.
//
// A generation is given up for the next one only when its task is known to have
// ended. When a launch fails in any other way, a task may run without our
// knowing; the entry then stays at Starting, and the next one to come launches
// the same generation again and is given that task.
func (d *Dialer) start(ctx context.Context, owner Owner, profile Profile) (Entry, error) {
	burnt, adopted := 0, false
	for {
		entry, err := d.Ledger.Get(ctx, owner)
		if err != nil {
			return Entry{}, err
		}
		if entry.State == Running {
			return entry, nil
		}
		if entry.Version == 0 && !adopted {
			// She never had one, or the ledger has been lost, and what it held
			// could not be adopted when this gateway began.
			listing, adopting := d.adoptProfile(ctx, owner.Profile, profile)
			switch {
			case listing == nil:
				adopted = true
			case !mayHelp(listing):
				return Entry{}, listing
			case sleep(ctx, time.Second) != nil:
				return Entry{}, listing
			}
			if err := errors.Join(listing, adopting); err != nil {
				d.Log.Warn("cannot tell what an earlier gateway has left running", "err", err)
			}
			continue
		}
		if entry.leased() {
			if err := sleep(ctx, time.Second); err != nil {
				return Entry{}, fmt.Errorf("waiting for another gateway to start it: %w", err)
			}
			continue
		}

		claim := Entry{Generation: entry.Generation, State: Starting, Since: time.Now(), Lease: time.Now().Add(lease)}
		if entry.State == Idle {
			claim.Generation++
		}
		if entry, err = d.swap(ctx, owner, entry, claim); errors.Is(err, ErrConflict) {
			continue
		} else if err != nil {
			return Entry{}, fmt.Errorf("claiming generation %d: %w", claim.Generation, err)
		}

		launched, err := d.launch(ctx, owner, profile, entry, burnt)
		switch {
		case err == nil:
			return launched, nil
		case errors.Is(err, ErrConflict):
			continue // another gateway took over, and was faster
		case errors.Is(err, ErrGone) && burnt == 0 && mayHelp(err):
			burnt++
			d.Log.Warn("bastion ended while it started; trying once more", "owner", owner, "generation", entry.Generation, "err", err)
			continue
		}
		return launched, err
	}
}

// mayHelp reports whether trying again at once can have another outcome.
func mayHelp(err error) bool {
	for _, lasting := range []error{ErrQuota, ErrImage, ErrSecrets, ErrDenied, ErrConfig} {
		if errors.Is(err, lasting) {
			return false
		}
	}
	return true
}

// launch takes the claimed entry to Running. If it fails, the entry is left as
// the next attempt needs it, and the one that is returned says which generation
// failed and with which task, if there is one; an error that wraps ErrGone means that the next
// attempt should be another generation.
func (d *Dialer) launch(ctx context.Context, owner Owner, profile Profile, entry Entry, burnt int) (Entry, error) {
	task, err := profile.Launcher.Launch(ctx, Launch{
		Owner: owner, Generation: entry.Generation, Attempt: burnt, Idle: profile.Idle, MaxLife: profile.MaxLife,
	})
	generation := max(entry.Generation, task.Generation)
	failed := Entry{Generation: generation, Task: task}
	var conn *Conn
	if err == nil {
		// A TCP connect proves little: balancers and half-started servers
		// accept, too. The login is as nobody, with no permissions.
		nobody := identity.Identity{User: owner.User, Profile: owner.Profile, ConnID: "start"}
		conn, err = d.reach(ctx, profile.Launcher, owner, task, nobody, profile.StartTimeout, func() {})
	}
	if err == nil {
		conn.hangUp()
		return d.record(ctx, owner, entry, conn.Task)
	}

	// ctx may be the reason, and has to be outlived by the tidying.
	tidy, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyTimeout)
	defer cancel()
	var next Entry
	switch {
	case errors.Is(err, ErrGone):
		next = Entry{Generation: generation, State: Idle}
	case task.ID == "" || errors.Is(err, errRefused):
		next = Entry{Generation: generation, State: Starting} // with no lease: whoever comes next may try at once
	default:
		// It runs, and nobody can log in to it. Nobody is in it either, so it
		// may be stopped, if no other gateway has taken over:
		// that is what the Swap before it is for.
		stopping := Entry{Generation: generation, State: Starting, Lease: time.Now().Add(tidyTimeout)}
		held, swapErr := d.swap(tidy, owner, entry, stopping)
		if swapErr != nil {
			return failed, err
		}
		entry = held
		next = Entry{Generation: generation, State: Idle}
		if stopErr := d.stop(tidy, profile.Launcher, owner, task, "nobody can log in to it"); stopErr != nil {
			err = fmt.Errorf("%w; stopping it: %w", err, stopErr)
			next = Entry{Generation: generation, State: Starting}
		}
	}
	_, swapErr := d.swap(tidy, owner, entry, next)
	if errors.Is(swapErr, ErrConflict) && errors.Is(err, ErrGone) {
		// The task is dead because another gateway took over and got
		// further: that is no fault of the next generation.
		return Entry{}, swapErr
	}
	if swapErr != nil && !errors.Is(swapErr, ErrConflict) {
		// The lease runs out by itself.
		d.Log.Warn("cannot write down that a bastion did not start", "owner", owner, "err", swapErr)
	}
	return failed, err
}

// record writes down that task runs and has shown its host key: it takes an
// entry that is Starting to Running, and pins the key of one that has none. The
// error wraps ErrConflict if the ledger has gone on to another task, and
// ErrHostKey if another key was pinned meanwhile.
func (d *Dialer) record(ctx context.Context, owner Owner, entry Entry, task Task) (Entry, error) {
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
			return Entry{}, fmt.Errorf("%w: %s is past task %s", ErrConflict, owner, task.ID)
		}
		running := Entry{Generation: max(generation, task.Generation), State: Running, Since: time.Now(), Task: task}
		if same {
			running.Since = entry.Since
		}
		next, err := d.swap(ctx, owner, entry, running)
		if err == nil {
			return next, nil
		}
		if !errors.Is(err, ErrConflict) {
			return Entry{}, fmt.Errorf("recording task %s: %w", task.ID, err)
		}
		// Another gateway has taken over this generation, or was faster.
		if entry, err = d.Ledger.Get(ctx, owner); err != nil {
			return Entry{}, fmt.Errorf("recording task %s: %w", task.ID, err)
		}
	}
}

// swap is Ledger.Swap for a network that loses replies: when told of a failure
// it looks whether the change was made after all.
func (d *Dialer) swap(ctx context.Context, owner Owner, old, new Entry) (Entry, error) {
	new.Nonce = rand.Text()
	made, err := d.Ledger.Swap(ctx, owner, old, new)
	if err == nil {
		return made, nil
	}
	if now, getErr := d.Ledger.Get(ctx, owner); getErr == nil && now.Nonce == new.Nonce {
		return now, nil
	}
	return Entry{}, err
}

// Wait returns when no start is under way in this process, or with the cause of
// ctx's end. A start that is cut off by the end of the process is finished by
// the next gateway that is asked for that bastion.
func (d *Dialer) Wait(ctx context.Context) error {
	for {
		var b *boot
		d.mu.Lock()
		for _, b = range d.boots {
			break
		}
		d.mu.Unlock()
		if b == nil {
			return nil
		}
		select {
		case <-b.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// leased reports whether somebody is starting the bastion, as far as is known.
func (e Entry) leased() bool { return e.State == Starting && time.Now().Before(e.Lease) }

// sleep waits for about the time given, or returns the cause of ctx's end.
// Gateways that wait for the same thing must not go on in step.
func sleep(ctx context.Context, about time.Duration) error {
	select {
	case <-time.After(about*3/4 + mathrand.N(about/2)):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
