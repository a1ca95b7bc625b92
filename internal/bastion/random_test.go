package bastion

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// FuzzInterleavings lets two gateways, one ledger and some users loose on
// each other, with everything failing now and then: launches fail, or work and
// the reply is lost, or take longer than the lease; the ledger loses replies;
// tasks die, or are stopped; stopping fails; users leave. The world fails the test when an owner ever has two
// live tasks. When the faults stop, everybody must get in. It is a fuzz target
// for the sake of seeds beyond the few that go test runs.
func FuzzInterleavings(f *testing.F) {
	for seed := range uint64(10) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		synctest.Test(t, func(t *testing.T) { randomRun(t, seed) })
	})
}

func randomRun(t *testing.T, seed uint64) {
	fate := &fate{rng: rand.New(rand.NewPCG(seed, 0))}
	w := newWorld(t)
	defer w.end()
	w.boot = fate.upTo(time.Minute)
	w.noKey = fate.chance(50)
	lost := errors.New("the reply was lost")
	w.onLaunch = func(ctx context.Context, l Launch) (bool, error) {
		fate.pause(ctx, 2*time.Second)
		switch {
		case fate.chance(10):
			return false, errors.New("throttled")
		case fate.chance(10):
			return true, lost
		case fate.chance(5): // stalls until the lease is over
			fate.pause(ctx, 2*time.Minute)
		}
		return true, nil
	}
	w.onAlive = func() error {
		if fate.chance(10) {
			return errors.New("throttled")
		}
		return nil
	}
	w.onStop = func() error {
		fate.pause(t.Context(), 40*time.Second) // others may take over meanwhile
		if fate.chance(20) {
			return lost
		}
		return nil
	}
	w.onDial = func(task *fakeTask) error {
		if fate.chance(2) {
			w.killIf(func(t *fakeTask) bool { return t == task })
		}
		return nil
	}

	ledger := &faultyLedger{fate: fate, lost: lost}
	gateways := []*Dialer{newDialer(w, ledger), newDialer(w, ledger)}
	dial := func(ctx context.Context, user string) error {
		id := identity.Identity{User: user, Profile: "default", ConnID: "c"}
		conn, err := gateways[fate.n(2)].Dial(ctx, id, nil)
		if err == nil {
			time.Sleep(fate.upTo(time.Minute))
			conn.hangUp()
		}
		return err
	}

	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			ctx := t.Context()
			time.Sleep(fate.upTo(10 * time.Minute))
			if fate.chance(30) {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, fate.upTo(time.Minute))
				defer cancel()
			}
			dial(ctx, []string{"alice", "bob"}[i%2]) // may fail
		})
	}
	wg.Go(func() {
		for range 3 {
			time.Sleep(fate.upTo(4 * time.Minute))
			gateways[fate.n(2)].Stop(t.Context(), Owner{"alice", "default"}, "by a test") // may fail
		}
	})
	wg.Go(func() {
		for range 5 {
			time.Sleep(fate.upTo(3 * time.Minute))
			w.killIf(func(*fakeTask) bool { return fate.chance(50) })
		}
	})
	wg.Wait()

	// Starts that began among faults may yet fail.
	fate.stop()
	for _, d := range gateways {
		if err := d.Wait(t.Context()); err != nil {
			t.Error(err)
		}
	}
	for _, user := range []string{"alice", "bob", "alice"} {
		if err := dial(t.Context(), user); err != nil {
			t.Errorf("with no faults any more, %s: %v", user, err)
		}
	}
}

// faultyLedger is slow, and loses requests and replies.
type faultyLedger struct {
	Memory
	fate *fate
	lost error
}

func (f *faultyLedger) Get(ctx context.Context, o Owner) (Entry, error) {
	f.fate.pause(ctx, 100*time.Millisecond)
	if f.fate.chance(1) {
		return Entry{}, f.lost
	}
	return f.Memory.Get(ctx, o)
}

func (f *faultyLedger) Swap(ctx context.Context, o Owner, old, new Entry) (Entry, error) {
	f.fate.pause(ctx, 100*time.Millisecond)
	if f.fate.chance(5) {
		return Entry{}, errors.New("throttled")
	}
	made, err := f.Memory.Swap(ctx, o, old, new)
	if err == nil && f.fate.chance(10) {
		if f.fate.chance(50) {
			return Entry{}, f.lost
		}
		return Entry{}, ErrConflict // the client repeated the request by itself
	}
	return made, err
}

// fate decides, by a seed; once stopped, nothing bad happens.
type fate struct {
	mu      sync.Mutex
	rng     *rand.Rand
	stopped bool
}

func (f *fate) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stopped = true
}

func (f *fate) n(n int) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.rng.IntN(n)
}

func (f *fate) chance(percent int) bool {
	hit := f.n(100) < percent
	f.mu.Lock()
	defer f.mu.Unlock()
	return hit && !f.stopped
}

func (f *fate) upTo(d time.Duration) time.Duration { return time.Duration(f.n(int(d))) }

func (f *fate) pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(f.upTo(d)):
	case <-ctx.Done():
	}
}
