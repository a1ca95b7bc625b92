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

// FuzzInterleavings runs concurrent Dials and Stops of two gateways with one
// ledger, and injects faults: launches fail, lose their reply, or take longer than
// the lease; the ledger loses replies; tasks end; Stop fails; contexts end. If an
// owner ever has two live tasks, the fakeLauncher fails the test. Once the faults
// stop, every Dial must succeed. It is a fuzz target so that it can run with more
// seeds than go test does.
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
	fake := newFakeLauncher(t)
	defer fake.end()
	fake.boot = fate.upTo(time.Minute)
	fake.noKey = fate.chance(50)
	lost := errors.New("the reply was lost")
	fake.onLaunch = func(ctx context.Context, l Launch) (bool, error) {
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
	fake.onAlive = func() error {
		if fate.chance(10) {
			return errors.New("throttled")
		}
		return nil
	}
	fake.onStop = func() error {
		fate.pause(t.Context(), 40*time.Second) // others may take over meanwhile
		if fate.chance(20) {
			return lost
		}
		return nil
	}
	fake.onDial = func(task *fakeTask) error {
		if fate.chance(2) {
			fake.killIf(func(t *fakeTask) bool { return t == task })
		}
		return nil
	}

	ledger := &faultyLedger{fate: fate, lost: lost}
	gateways := []*Dialer{newDialer(fake, ledger), newDialer(fake, ledger)}
	dial := func(ctx context.Context, user string) error {
		id := identity.Identity{User: user, Profile: "default", ConnID: "c"}
		conn, err := gateways[fate.n(2)].Dial(ctx, id, nil)
		if err == nil {
			time.Sleep(fate.upTo(time.Minute))
			conn.Close()
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
			fake.killIf(func(*fakeTask) bool { return fate.chance(50) })
		}
	})
	wg.Wait()

	// Starts that began during the faults may still fail.
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
		return Entry{}, ErrConflict // as if the client had retried the request
	}
	return made, err
}

// fate injects faults at random, by a seed, until it is stopped.
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
