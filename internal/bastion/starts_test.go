package bastion

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// TestStartsPerUser lets bastions die and be started again.
func TestStartsPerUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		d.StartsPerUser = StartRate{Starts: 3, Per: time.Hour}
		d.Profiles["big"] = d.Profiles["default"]
		bob, big := alice, alice
		bob.User, big.Profile = "bob", "big"
		dial := func(id identity.Identity) error {
			conn, err := d.Dial(t.Context(), id, nil)
			if err == nil {
				conn.hangUp()
			}
			return err
		}
		must := func(id identity.Identity) {
			t.Helper()
			if err := dial(id); err != nil {
				t.Fatal(err)
			}
		}
		refused := func(id identity.Identity, wait time.Duration) {
			t.Helper()
			tooOften := (*TooOftenError)(nil)
			if err := dial(id); !errors.As(err, &tooOften) || tooOften.Wait.Round(time.Minute) != wait {
				t.Errorf("got %v, want to be told to wait for %v", err, wait)
			}
		}
		die := func() { w.killIf(func(*fakeTask) bool { return true }); time.Sleep(10 * time.Minute) }

		must(alice) // 0:00
		die()
		must(big)   // 0:10
		must(alice) // the third
		for range 10 {
			must(alice) // joining what runs is no start
			must(big)
		}
		die() // 0:20
		refused(alice, 40*time.Minute)
		refused(big, 40*time.Minute)
		must(bob)
		if launches, _, _ := w.counts(); launches != 4 {
			t.Errorf("%d launches, want 4", launches)
		}
		time.Sleep(39 * time.Minute)
		refused(alice, time.Minute)
		time.Sleep(time.Minute)
		must(alice) // 1:00, when the first does not count any more
		refused(big, 10*time.Minute)
		time.Sleep(10 * time.Minute)
		must(big)
	})
}

// TestStartsThatAreShared has many connections wait for one start, and another
// gateway start one: the user pays once, and not at all.
func TestStartsThatAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		ledger := &Memory{}
		one, two := newDialer(w, ledger), newDialer(w, ledger)
		one.StartsPerUser = StartRate{Starts: 1, Per: time.Hour}
		two.StartsPerUser = one.StartsPerUser
		var all sync.WaitGroup
		for i := range 20 {
			d := []*Dialer{one, two}[i/10]
			all.Go(func() {
				time.Sleep(time.Duration(i) * 100 * time.Millisecond)
				conn, err := d.Dial(t.Context(), alice, nil)
				if err != nil {
					t.Error(err)
					return
				}
				conn.hangUp()
			})
		}
		all.Wait()
		if len(one.starts["alice"]) != 1 || len(two.starts) != 0 {
			t.Errorf("counted %v and %v", one.starts, two.starts)
		}
	})
}

// TestStartsForgotten bounds what is remembered of users who do not come back.
func TestStartsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &Dialer{StartsPerUser: StartRate{Starts: 5, Per: time.Minute}}
		for i := range 10_000 {
			if err := d.countStart(fmt.Sprint("user", i)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if len(d.starts) > 60 {
			t.Errorf("%d users are remembered", len(d.starts))
		}
		for range 10_000 {
			d.countStart("alice")
			time.Sleep(7 * time.Second)
		}
		if times := d.starts["alice"]; len(times) > 5 || cap(times) > 64 {
			t.Errorf("%d starts of one user are remembered, in room for %d", len(times), cap(times))
		}
		d.StartsPerUser = StartRate{}
		for range 100 {
			if err := d.countStart("alice"); err != nil {
				t.Fatalf("without a limit: %v", err)
			}
		}
	})
}
