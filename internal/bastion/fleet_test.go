package bastion

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// FuzzFleet runs three gateways on one ledger and one launcher, for two users and
// forty minutes, while gateways are killed between any two calls, cut off from the
// ledger, the launcher or the bastions, and paused; requests and
// replies are lost, listings are late, launches are slow, and the clocks of the
// gateways differ by up to half a minute. It fails if
//
//   - an owner has two live tasks (the fakeLauncher sees that),
//   - a gateway stops a task that has a connection,
//   - a user cannot get in when all faults have ended, or
//   - a task is left when its users are gone, its idle time is over, and each
//     gateway has swept.
//
// The code of the gateways is the real Dialer.
func FuzzFleet(f *testing.F) {
	for seed := range uint64(10) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		synctest.Test(t, func(t *testing.T) { newFleet(t, seed).run() })
	})
}

const fleetIdle = 5 * time.Minute

// A fleet is the gateways, and the world that they share.
type fleet struct {
	t      *testing.T
	fate   *fate
	fake   *fakeLauncher
	ledger Memory
	log    syncBuffer // shown if the run fails

	mu       sync.Mutex
	gateways []*fleetGateway                   // those that run, and those that were killed
	sessions map[string]map[*fleetGateway]bool // by task
}

// A fleetGateway is one process.
type fleetGateway struct {
	fleet  *fleet
	dialer *Dialer
	skew   time.Duration // of its clock

	mu     sync.Mutex
	killed time.Time // zero while it runs
	paused time.Time // until then, none of its calls begins
	cut    map[string]time.Time
}

var (
	errKilled = errors.New("the gateway was killed")
	errCut    = errors.New("no route")
	errLost   = errors.New("the reply was lost")
)

func newFleet(t *testing.T, seed uint64) *fleet {
	fl := &fleet{t: t, fate: &fate{rng: rand.New(rand.NewPCG(seed, 1))}, fake: newFakeLauncher(t), sessions: map[string]map[*fleetGateway]bool{}}
	fl.fake.boot = fl.fate.upTo(time.Minute)
	fl.fake.noKey = fl.fate.chance(50)
	for range 3 {
		fl.start()
	}
	return fl
}

// start adds a gateway.
func (fl *fleet) start() *fleetGateway {
	g := &fleetGateway{fleet: fl, skew: fl.fate.upTo(30*time.Second) - 15*time.Second, cut: map[string]time.Time{}}
	g.dialer = newDialer(fl.fake, g)
	profile := g.dialer.Profiles["default"]
	profile.Launcher = (*fleetLauncher)(g)
	g.dialer.Profiles["default"] = profile
	g.dialer.Alone = g.alone
	g.dialer.Log = slog.New(slog.NewTextHandler(&fl.log, nil)).With("gateway", len(fl.gateways))
	dial := g.dialer.NetDial
	g.dialer.NetDial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if err := g.call(ctx, "bastions"); err != nil {
			return nil, err
		}
		return dial(ctx, network, addr)
	}
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.gateways = append(fl.gateways, g)
	return g
}

// running returns a gateway that runs.
func (fl *fleet) running() *fleetGateway {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	for {
		if g := fl.gateways[fl.fate.n(len(fl.gateways))]; g.runs() {
			return g
		}
	}
}

func (g *fleetGateway) runs() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.killed.IsZero()
}

// kill ends the process at this moment: what it has begun is not finished, and its
// connections end.
func (g *fleetGateway) kill() {
	g.mu.Lock()
	g.killed = time.Now()
	g.mu.Unlock()
	g.dialer.conns.mu.Lock()
	var open []*Conn
	for _, conns := range g.dialer.conns.byTask {
		for c := range conns {
			open = append(open, c)
		}
	}
	g.dialer.conns.mu.Unlock()
	for _, c := range open {
		c.Conn.Close()
	}
}

// call is before each call of a gateway to the world: it returns an error if the
// gateway was killed or is cut off from it.
func (g *fleetGateway) call(ctx context.Context, to string) error {
	g.mu.Lock()
	pause := time.Until(g.paused)
	g.mu.Unlock()
	if pause > 0 {
		time.Sleep(pause)
	}
	g.fleet.fate.pause(ctx, 100*time.Millisecond)
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case !g.killed.IsZero():
		return errKilled
	case time.Now().Before(g.cut[to]):
		return errCut
	}
	return ctx.Err()
}

// alone knows the other gateways by their heartbeats: one that was killed may still
// be alive behind a broken network, until it has had none for ten minutes.
func (g *fleetGateway) alone(ctx context.Context) error {
	if err := g.call(ctx, "ledger"); err != nil {
		return err
	}
	g.fleet.mu.Lock()
	defer g.fleet.mu.Unlock()
	for _, other := range g.fleet.gateways {
		other.mu.Lock()
		killed := other.killed
		other.mu.Unlock()
		if other != g && (killed.IsZero() || time.Since(killed) < 10*time.Minute) {
			return errors.New("there is another gateway")
		}
	}
	return nil
}

// Get implements Ledger, on a clock of its own.
func (g *fleetGateway) Get(ctx context.Context, o Owner) (Entry, error) {
	if err := g.call(ctx, "ledger"); err != nil {
		return Entry{}, err
	}
	e, err := g.fleet.ledger.Get(ctx, o)
	if !e.Lease.IsZero() {
		e.Lease = e.Lease.Add(-g.skew)
	}
	if g.fleet.fate.chance(2) {
		return Entry{}, errLost
	}
	return e, err
}

// Swap implements Ledger.
func (g *fleetGateway) Swap(ctx context.Context, o Owner, old, new Entry) (Entry, error) {
	if err := g.call(ctx, "ledger"); err != nil {
		return Entry{}, err
	}
	if !new.Lease.IsZero() {
		new.Lease = new.Lease.Add(g.skew)
	}
	made, err := g.fleet.ledger.Swap(ctx, o, old, new)
	if err != nil {
		return made, err
	}
	if err := g.call(ctx, ""); err != nil { // killed before the reply
		return Entry{}, err
	}
	if g.fleet.fate.chance(5) {
		return Entry{}, errLost
	}
	if !made.Lease.IsZero() {
		made.Lease = made.Lease.Add(-g.skew)
	}
	return made, nil
}

// A fleetLauncher is the launcher as one gateway sees it.
type fleetLauncher fleetGateway

func (l *fleetLauncher) call(ctx context.Context) error {
	return (*fleetGateway)(l).call(ctx, "launcher")
}

func (l *fleetLauncher) Launch(ctx context.Context, launch Launch) (Task, error) {
	if err := l.call(ctx); err != nil {
		return Task{}, err
	}
	if l.fleet.fate.chance(5) {
		l.fleet.fate.pause(ctx, 2*time.Minute) // until the lease has ended
		if err := l.call(ctx); err != nil {
			return Task{}, err
		}
	}
	task, err := l.fleet.fake.Launch(ctx, launch)
	if err != nil {
		return task, err
	}
	if err := l.call(ctx); err != nil {
		return Task{}, err
	}
	if l.fleet.fate.chance(10) {
		return Task{}, errLost
	}
	return task, nil
}

func (l *fleetLauncher) Alive(ctx context.Context, owner Owner, id string) error {
	if err := l.call(ctx); err != nil {
		return err
	}
	return l.fleet.fake.Alive(ctx, owner, id)
}

func (l *fleetLauncher) Stop(ctx context.Context, owner Owner, id string) error {
	if err := l.call(ctx); err != nil {
		return err
	}
	l.fleet.fate.pause(ctx, 20*time.Second)
	l.fleet.mu.Lock()
	l.dialer.Log.Info("stop", "task", id)
	for g := range l.fleet.sessions[id] {
		// The stopping gateway may end sessions of its own that have been silent
		// for as long as the bastion has not answered.
		if g != (*fleetGateway)(l) || !g.wasStuck() {
			l.fleet.t.Errorf("a gateway stops task %s, which has a session", id)
		}
	}
	l.fleet.mu.Unlock()
	if err := l.fleet.fake.Stop(ctx, owner, id); err != nil {
		return err
	}
	return l.call(ctx)
}

// List is late: it does not have the newest tasks.
func (l *fleetLauncher) List(ctx context.Context) ([]OwnedTask, error) {
	if err := l.call(ctx); err != nil {
		return nil, err
	}
	all, err := l.fleet.fake.List(ctx)
	late := l.fleet.fate.upTo(10 * time.Second)
	var seen []OwnedTask
	for _, task := range all {
		if time.Since(task.Started) >= late {
			seen = append(seen, task)
		}
	}
	return seen, err
}

func (fl *fleet) run() {
	defer fl.fake.end()
	defer func() {
		if fl.t.Failed() {
			fl.t.Log(fl.log.String())
		}
	}()
	ctx, cancel := context.WithCancel(fl.t.Context())
	var world sync.WaitGroup
	world.Go(func() { fl.idle(ctx) })
	world.Go(func() { fl.trouble(ctx) })
	for range 3 {
		world.Go(func() { fl.sweep(ctx) })
	}
	var users sync.WaitGroup
	for i := range 16 {
		users.Go(func() {
			time.Sleep(fl.fate.upTo(40 * time.Minute))
			fl.session([]string{"alice", "bob"}[i%2]) // may fail
		})
	}
	users.Wait()
	cancel()
	world.Wait()

	fl.fate.stop()
	for _, g := range fl.gateways {
		g.mu.Lock()
		g.paused, g.cut = time.Time{}, map[string]time.Time{}
		g.mu.Unlock()
	}
	time.Sleep(11 * time.Minute) // killed gateways are given up
	ctx, cancel = context.WithCancel(fl.t.Context())
	world.Go(func() { fl.idle(ctx) })
	for _, user := range []string{"alice", "bob", "alice"} {
		if err := fl.session(user); err != nil {
			fl.t.Errorf("with no faults any more, %s: %v", user, err)
		}
	}
	time.Sleep(fleetIdle + orphanAge)
	for _, g := range fl.gateways {
		if g.runs() {
			if err := g.dialer.Sweep(fl.t.Context()); err != nil {
				fl.t.Error(err)
			}
		}
	}
	if _, _, live := fl.fake.counts(); live != 0 {
		fl.t.Errorf("%d tasks are left", live)
	}
	cancel()
	world.Wait()
}

// session logs in through any gateway, and stays for up to three minutes.
func (fl *fleet) session(user string) error {
	g := fl.running()
	conn, err := g.dialer.Dial(fl.t.Context(), identity.Identity{User: user, Profile: "default", ConnID: "c"}, nil)
	if err != nil {
		return fmt.Errorf("by the gateway %p: %w", g, err)
	}
	defer conn.Close()
	g.dialer.Log.Info("session", "task", conn.Task.ID)
	defer g.dialer.Log.Info("session ends", "task", conn.Task.ID)
	fl.begin(g, conn.Task.ID)
	defer fl.end(g, conn.Task.ID)
	for until := time.Now().Add(fl.fate.upTo(3 * time.Minute)); time.Now().Before(until); {
		time.Sleep(20 * time.Second)
		if g.call(fl.t.Context(), "bastions") == nil {
			ping(conn) // as agents do; it fails if the bastion has ended
		}
	}
	return nil
}

func (fl *fleet) begin(g *fleetGateway, taskID string) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if fl.sessions[taskID] == nil {
		fl.sessions[taskID] = map[*fleetGateway]bool{}
	}
	fl.sessions[taskID][g] = true
}

func (fl *fleet) end(g *fleetGateway, taskID string) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	delete(fl.sessions[taskID], g)
}

// wasStuck reports whether the gateway was paused or cut off from the bastions
// during the last minute and a half.
func (g *fleetGateway) wasStuck() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	since := time.Now().Add(-90 * time.Second)
	return g.paused.After(since) || g.cut["bastions"].After(since)
}

// idle ends tasks without connections after fleetIdle, as their agents do, and some
// at any time.
func (fl *fleet) idle(ctx context.Context) {
	since := map[*fakeTask]time.Time{}
	for ctx.Err() == nil {
		fl.fake.killIf(func(task *fakeTask) bool {
			if task.open > 0 || time.Now().Before(task.listens) {
				delete(since, task)
				return fl.fate.chance(1) && fl.fate.chance(20)
			}
			if _, ok := since[task]; !ok {
				since[task] = time.Now()
			}
			return time.Since(since[task]) > fleetIdle
		})
		fl.fate.pauseExactly(ctx, 5*time.Second)
	}
}

// trouble kills, pauses and cuts off gateways.
func (fl *fleet) trouble(ctx context.Context) {
	for ctx.Err() == nil {
		fl.fate.pause(ctx, 3*time.Minute)
		g := fl.running()
		until := time.Now().Add(fl.fate.upTo(2 * time.Minute))
		switch fl.fate.n(6) {
		case 0:
			g.kill()
			next := fl.start()
			next.dialer.Adopt(ctx) // may fail
		case 1:
			g.mu.Lock()
			g.paused = until
			g.mu.Unlock()
		default:
			to := []string{"ledger", "launcher", "bastions"}[fl.fate.n(3)]
			g.mu.Lock()
			g.cut[to] = until
			g.mu.Unlock()
		}
	}
}

// sweep lets any gateway sweep now and then.
func (fl *fleet) sweep(ctx context.Context) {
	for ctx.Err() == nil {
		fl.fate.pause(ctx, 10*time.Minute)
		fl.running().dialer.Sweep(ctx) // may fail
	}
}

func (f *fate) pauseExactly(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// A syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
