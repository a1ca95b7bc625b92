package bastion

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/tracing"
)

const (
	// maxDeaths is how many bastions in a row may end at once during one Dial
	// before it returns an error.
	maxDeaths = 3

	// rememberedTimeout limits the attempt to connect to a remembered task. An
	// agent answers within milliseconds; a task that has ended may not answer.
	rememberedTimeout = 500 * time.Millisecond

	// ledgerTimeout is how long a Dial waits for a ledger that cannot be read.
	ledgerTimeout = 30 * time.Second

	// defaultStartTimeout is that of a profile with none.
	defaultStartTimeout = 5 * time.Minute
)

// A Profile is a kind of bastion.
type Profile struct {
	Launcher Launcher
	ProfileOptions
}

// ProfileOptions are the settings of a profile that are plain values. Package
// config reads them from the configuration file.
type ProfileOptions struct {
	// Idle and MaxLife are the agent's, see [Launch].
	Idle, MaxLife time.Duration
	// Forwarding holds the agent's settings of remote forwards.
	Forwarding Forwarding
	// StartTimeout limits a start from the claim to the first login; zero
	// means five minutes.
	StartTimeout time.Duration
}

// A Dialer connects users to their bastions, and starts those that do not run.
// It must not be copied after first use. Methods are safe for concurrent use.
type Dialer struct {
	// Settings are the initial ones; [Dialer.Reload] replaces them.
	Settings
	Ledger Ledger
	// Starts holds the times of each user's starts, for StartsPerUser. If it is
	// nil, they are in memory, and this Dialer counts only its own.
	Starts TextStore
	Log    *slog.Logger

	// NetDial, if not nil, makes the TCP connections to bastions in place of a
	// [net.Dialer].
	NetDial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Alone, if not nil, returns an error if another gateway may be connected to
	// bastions of this ledger. A bastion that does not answer this gateway is not
	// stopped then: the network between the two may be the cause.
	Alone func(ctx context.Context) error
	// Event, if not nil, receives each [Event] before the operation goes on.
	Event func(Event)
	// AfterSweep, if not nil, is called by a Sweep if the listings of all
	// launchers were complete, with the owners of the listed tasks. It deletes
	// resources of other owners, such as security groups.
	AfterSweep func(ctx context.Context, owners map[Owner]bool) error

	conns     connections
	known     remembered
	present   present
	durations startDurations
	recent    recentStarts
	reloaded  atomic.Pointer[Settings]    // nil: Settings is in force
	listed    map[string]map[Owner]string // IDs of tasks by profile, as of the last Sweep; used by Sweep only

	mu        sync.Mutex           // guards the following
	starting  map[Owner]*start     // by this process
	adoptions map[string]*adoption // by profile
}

// Settings are replaced as a whole by [Dialer.Reload]. They must not be changed
// once a Dialer has them.
type Settings struct {
	// Profiles are the kinds of bastions, by name.
	Profiles map[string]Profile
	// FleetKeys sign the certificates that log in to bastions; at least one.
	// They are tried in order, so bastions that trust the first are opened by
	// one attempt. The others open bastions from before a rotation.
	FleetKeys []ssh.Signer
	// StartsPerUser limits how often one user's bastions may be started.
	StartsPerUser StartRate
}

// Reload replaces the settings. An operation that has begun, such as a start, goes
// on with the settings it began with. If a profile is removed, its bastions can no
// longer be reached; [Dialer.Sweep] stops them once they have no connections.
func (d *Dialer) Reload(next Settings) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, profile := range d.settings().Profiles {
		if next.Profiles[name].Launcher != profile.Launcher {
			delete(d.adoptions, name) // the new launcher has not been listed
		}
	}
	d.reloaded.Store(&next)
}

// Launchers returns the launchers of all profiles, by the names of these.
func (d *Dialer) Launchers() map[string]Launcher {
	all := map[string]Launcher{}
	for name, profile := range d.settings().Profiles {
		all[name] = profile.Launcher
	}
	return all
}

// settings returns the settings in force.
func (d *Dialer) settings() *Settings {
	if next := d.reloaded.Load(); next != nil {
		return next
	}
	return &d.Settings
}

// bastion returns the owner's bastion, under the settings in force, or
// ErrNoProfile.
func (d *Dialer) bastion(owner Owner) (*bastion, error) {
	settings := d.settings()
	profile, ok := settings.Profiles[owner.Profile]
	if !ok {
		return nil, ErrNoProfile
	}
	return d.bastionOf(owner, profile, settings), nil
}

// bastionOf returns the owner's bastion under the profile and the settings given.
func (d *Dialer) bastionOf(owner Owner, profile Profile, settings *Settings) *bastion {
	return &bastion{
		owner:     owner,
		profile:   profile,
		fleetKeys: settings.FleetKeys,
		ledger:    d.Ledger,
		netDial:   d.NetDial,
		onEvent:   d.Event,
		conns:     &d.conns,
		known:     &d.known,
		present:   &d.present,
		alone:     d.Alone,
		log:       d.Log.With("owner", owner),
		adoptProfile: func(ctx context.Context) (listing, adopting error) {
			return d.adoptProfile(ctx, owner.Profile, profile, settings)
		},
		countStart: func(ctx context.Context) error { return d.countStart(ctx, owner.User) },
	}
}

// Dial connects id to the bastion of its user and profile, and starts one if
// none runs. During a start, Dial blocks, for at most the profile's StartTimeout.
// If ctx ends, the start goes on, so that a later Dial of the same user joins it.
//
// Notify, if not nil, is called at most once, before Dial returns, and only if there
// is something to wait for: with true if this call began a start, with false if one
// was under way already, or if the bastion does not answer. A connection that is
// accepted and then silent is noticed after 5 seconds.
//
// If a bastion is alive according to its launcher and does not answer for 45
// seconds, Dial stops it and starts another. Dial does not stop it if anything was
// received on another connection of this Dialer to the bastion meanwhile, nor if the
// agent accepted a connection and closed it, because an attacker with access to an
// agent's port could overload the agent to have its bastion stopped.
//
// Errors wrap [ErrNoProfile], [ErrTooMany], a [TooOftenError], a reason why a
// bastion cannot start, [ErrHostKey], [ErrNoAnswer], [ErrGone] (three bastions in a
// row ended at once), or the context's cause.
func (d *Dialer) Dial(ctx context.Context, id identity.Identity, notify func(starting bool)) (*Conn, error) {
	owner := Owner{User: id.User, Profile: id.Profile}
	b, err := d.bastion(owner)
	if err != nil {
		return nil, fmt.Errorf("finding the bastion of %s: %w", owner, err)
	}
	waiting := func(starting bool) {
		if notify != nil {
			notify(starting)
			notify = nil
		}
	}
	conn, tried := d.dialRemembered(ctx, b, id)
	if conn != nil {
		return conn, nil
	}
	var last error
	started := false
	for range maxDeaths {
		refusal := d.conns.lastRefusal()
		entry, err := b.findPatiently(ctx, func() { waiting(false) })
		if err != nil {
			return nil, fmt.Errorf("finding the bastion of %s: %w", owner, err)
		}
		d.known.forget(owner, tried) // the ledger decides now
		if entry.State == Running {
			d.conns.accept(entry.Task.ID, refusal)
		}
		if entry.State != Running {
			elsewhere := entry.leased() // starts or stops it
			var s *start
			var mine bool
			if s, mine, err = d.join(ctx, b, entry, elsewhere, id.Permissions.Limits.Bastions); err == nil {
				started = mine && !elsewhere
				waiting(started)
				entry, err = s.wait(ctx)
			}
			if err != nil {
				return nil, fmt.Errorf("starting a bastion for %s: %w", owner, err)
			}
		}

		before := d.conns.received(entry.Task.ID)
		conn, err := b.dialAndPin(ctx, entry, id, func() { waiting(false) })
		if err == nil {
			conn.Started = started
			d.known.put(owner, conn.Task)
			d.present.put(owner, conn.Task.ID)
			return conn, nil
		}
		last = err
		if err := b.retire(ctx, entry, err, before); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("bastions of %s end as soon as they start: %w", owner, last)
}

// remembered are the tasks that this gateway has entered last, one for each owner.
// The zero value is empty.
type remembered struct {
	mu    sync.Mutex
	tasks map[Owner]Task
}

func (r *remembered) put(owner Owner, task Task) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tasks == nil {
		r.tasks = make(map[Owner]Task)
	}
	r.tasks[owner] = task
}

func (r *remembered) get(owner Owner) (task Task, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	task, ok = r.tasks[owner]
	return task, ok
}

// of returns the IDs of the tasks of a profile.
func (r *remembered) of(profile string) map[Owner]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	ids := map[Owner]string{}
	for owner, task := range r.tasks {
		if owner.Profile == profile {
			ids[owner] = task.ID
		}
	}
	return ids
}

// forget removes a task, if it is the owner's.
func (r *remembered) forget(owner Owner, taskID string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tasks[owner].ID == taskID {
		delete(r.tasks, owner)
	}
}

// dialRemembered makes one attempt to connect to the task that this gateway has
// entered before, and returns a nil Conn if there is none or the attempt fails, with
// the ID of the task that was tried. It reads no ledger: the host key, which is
// pinned, proves that the task is the owner's, and an agent that is being stopped
// accepts no connection. So a login to a running bastion costs no call to a shared
// ledger, and works while that cannot be reached.
//
// A failed attempt may be a slow one, so the task is remembered until the ledger has
// been read.
func (d *Dialer) dialRemembered(ctx context.Context, b *bastion, id identity.Identity) (conn *Conn, tried string) {
	task, ok := d.known.get(b.owner)
	if !ok {
		return nil, ""
	}
	attempt, cancel := context.WithTimeout(ctx, rememberedTimeout)
	defer cancel()
	attempt, end := tracing.Start(attempt, "handshake", "task", task.ID)
	conn, err := b.login(attempt, task, id)
	end(err)
	if err != nil {
		return nil, task.ID
	}
	return conn, task.ID
}

// A start is the state of a bastion's start in this process, shared by all calls of
// Dial that wait for it.
type start struct {
	done  chan struct{} // closed when entry and err are set
	entry Entry
	err   error
}

// wait returns the outcome of the start, or the cause of ctx's end.
func (s *start) wait(ctx context.Context) (_ Entry, err error) {
	_, end := tracing.Start(ctx, "wait for start")
	defer func() { end(err) }()
	select {
	case <-s.done:
		return s.entry, s.err
	case <-ctx.Done():
		return Entry{}, context.Cause(ctx)
	}
}

// join returns the start of b that is under way in this process, or begins one;
// mine says which. Entry is the ledger's. It counts a start that it begins against the
// user's limits, unless another gateway starts or stops the bastion: see [bastion.start].
func (d *Dialer) join(ctx context.Context, b *bastion, entry Entry, elsewhere bool, maxBastions int) (s *start, mine bool, err error) {
	if err := d.checkLimit(ctx, b.owner, maxBastions); err != nil {
		return nil, false, err
	}
	d.mu.Lock()
	if s := d.starting[b.owner]; s != nil {
		d.mu.Unlock()
		return s, false, nil
	}
	s = &start{done: make(chan struct{})}
	if d.starting == nil {
		d.starting = map[Owner]*start{}
	}
	d.starting[b.owner] = s
	d.mu.Unlock()
	// The start outlives the connection that asked for it: if the user gives up
	// and connects again, that joins it instead of starting another. Wait waits
	// for it.
	ctx = context.WithoutCancel(ctx)
	if !elsewhere {
		if s.err = catchPanic(b.log, "start", func() error { return b.countStart(ctx) }); s.err != nil {
			d.ended(b.owner, s)
			return nil, false, s.err
		}
	}
	go d.run(ctx, b, entry, s, !elsewhere)
	return s, true, nil
}

// ended removes s from d.starting and wakes the calls that wait for it.
func (d *Dialer) ended(owner Owner, s *start) {
	d.mu.Lock()
	delete(d.starting, owner)
	d.mu.Unlock()
	close(s.done)
}

// run carries out s, from the entry on, within the profile's StartTimeout. Its callers may
// be gone, so success and failure are logged here.
func (d *Dialer) run(ctx context.Context, b *bastion, entry Entry, s *start, counted bool) {
	defer d.ended(b.owner, s)
	ctx, cancel := context.WithTimeout(ctx, b.startTimeout())
	defer cancel()
	began := time.Now()
	ctx, end := tracing.Start(ctx, "start")
	s.err = catchPanic(b.log, "start", func() (err error) {
		s.entry, err = b.start(ctx, entry, counted)
		return err
	})
	if s.err != nil && ctx.Err() != nil {
		s.err = fmt.Errorf("%w (%v): %w", ErrTimeout, b.startTimeout(), s.err)
	}
	end(s.err)
	took := time.Since(began)
	if s.err == nil {
		d.durations.add(b.owner.Profile, took)
	}
	catchPanic(b.log, "event", func() error { b.reportStart(s.entry, s.err, took); return nil })
}

// reportStart logs the outcome of a start and sends its event. With an error, the
// entry has the generation and the task that did not start, as far as known.
func (b *bastion) reportStart(entry Entry, err error, took time.Duration) {
	if err == nil {
		b.log.Info("bastion runs", "ms", took.Milliseconds(), "task", entry.Task.ID, "addr", entry.Task.Addr)
		b.event(Event{Kind: Started, Task: entry.Task, Took: took, MaxLife: b.profile.MaxLife})
		return
	}
	task := entry.Task
	task.Generation = entry.Generation
	if _, usage := whyGone(err); usage != (Usage{}) {
		task.Usage = usage
	}
	b.log.Error("bastion did not start", "ms", took.Milliseconds(), "task", task.ID, "generation", task.Generation, "err", err)
	b.event(Event{Kind: Failed, Task: task, Took: took, Reason: err.Error(), Err: err})
}

// isStarting reports whether this process is starting the owner's bastion.
func (d *Dialer) isStarting(owner Owner) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.starting[owner] != nil
}

// checkLimit returns ErrTooMany if the owner's user has limit bastions already,
// not counting this one; zero means no limit. Two starts at the same moment may
// both pass.
func (d *Dialer) checkLimit(ctx context.Context, owner Owner, limit int) error {
	if limit == 0 {
		return nil
	}
	n := 0
	settings := d.settings()
	for name, profile := range settings.Profiles {
		if name == owner.Profile {
			continue
		}
		other := d.bastionOf(Owner{User: owner.User, Profile: name}, profile, settings)
		entry, err := other.findPatiently(ctx, func() {})
		if err != nil {
			return fmt.Errorf("looking for the bastion of %s: %w", other.owner, err)
		}
		if d.isStarting(other.owner) || other.mayRun(ctx, entry) {
			n++
		}
	}
	if n >= limit {
		return ErrTooMany
	}
	return nil
}

// WhyEnded returns the reason for the end of a bastion to which this Dialer had a
// connection: an error that wraps ErrGone, and a GoneError if the launcher knows
// more. A platform may take some seconds to notice an end; WhyEnded asks until
// ctx ends, and then returns nil.
func (d *Dialer) WhyEnded(ctx context.Context, owner Owner, taskID string) error {
	b, err := d.bastion(owner)
	if err != nil {
		return nil
	}
	for {
		if err := b.alive(ctx, taskID); errors.Is(err, ErrGone) {
			return err
		}
		if sleep(ctx, time.Second) != nil {
			return nil
		}
	}
}

// Wait returns when no start is under way in this process, or with the cause of
// ctx's end. If the process ends during a start, the next Dial for that owner, on
// any gateway, continues it.
func (d *Dialer) Wait(ctx context.Context) error {
	for {
		var s *start
		d.mu.Lock()
		for _, s = range d.starting {
			break
		}
		d.mu.Unlock()
		if s == nil {
			return nil
		}
		select {
		case <-s.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
