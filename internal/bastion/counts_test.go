package bastion

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// calls returns the number of calls of the launcher.
func (fake *fakeLauncher) calls() int {
	fake.mu.Lock()
	defer fake.mu.Unlock()
	return fake.launches + fake.lookups + fake.stops
}

// TestCounts counts bastions through their lives, without a call of the launcher.
func TestCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		check := func(d *Dialer, when string, starting, running int) {
			t.Helper()
			before := fake.calls()
			if got, want := d.Counts()["default"], (Counts{starting, running}); got != want {
				t.Errorf("%s: %+v, want %+v", when, got, want)
			}
			if fake.calls() != before {
				t.Errorf("%s: the launcher was called", when)
			}
		}
		check(d, "at first", 0, 0)
		go d.Dial(t.Context(), alice, nil)
		time.Sleep(time.Second)
		check(d, "during the start", 1, 0)
		if err := d.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		check(d, "after the start", 0, 1)

		other := newDialer(fake, d.Ledger) // of another gateway
		check(other, "before its sweep", 0, 0)
		if err := other.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		check(other, "after its sweep", 0, 1)

		if _, err := d.Stop(t.Context(), aliceOwner, "test"); err != nil {
			t.Fatal(err)
		}
		check(d, "after the stop", 0, 0)
		time.Sleep(10 * time.Minute)
		if err := other.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		check(other, "after the next sweep", 0, 0)

		mustDial(t, d, nil)
		check(d, "after the second start", 0, 1)
		fake.killIf(func(*fakeTask) bool { return true })
		time.Sleep(10 * time.Minute)
		if err := d.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		check(d, "after it has ended by itself", 0, 0)
	})
}

// TestFailedEventError: the event of a start that failed has the error for errors.Is.
func TestFailedEventError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		fake.onLaunch = func(context.Context, Launch) (bool, error) { return false, fmt.Errorf("%w: subnet-a", ErrCapacity) }
		d := newDialer(fake, &Memory{})
		var events []Event
		d.Event = func(e Event) { events = append(events, e) }
		d.Dial(t.Context(), alice, nil)
		if len(events) != 2 || events[1].Kind != Failed || !errors.Is(events[1].Err, ErrCapacity) || events[1].Reason != events[1].Err.Error() {
			t.Errorf("events: %+v", events)
		}
	})
}
