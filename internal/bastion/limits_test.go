package bastion

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// TestStartsPerUser ends bastions and starts others until StartsPerUser rejects a
// start.
func TestStartsPerUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		d.StartsPerUser = StartRate{Starts: 3, Per: time.Hour}
		d.Profiles["big"] = d.Profiles["default"]
		bob, big := alice, alice
		bob.User, big.Profile = "bob", "big"
		dial := func(id identity.Identity) error {
			conn, err := d.Dial(t.Context(), id, nil)
			if err == nil {
				conn.Close()
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
		die := func() { fake.killIf(func(*fakeTask) bool { return true }); time.Sleep(10 * time.Minute) }

		must(alice) // 0:00
		die()
		must(big)   // 0:10
		must(alice) // the third
		for range 10 {
			must(alice) // connecting to a running bastion is not a start
			must(big)
		}
		die() // 0:20
		refused(alice, 40*time.Minute)
		refused(big, 40*time.Minute)
		must(bob)
		if launches, _, _ := fake.counts(); launches != 4 {
			t.Errorf("%d launches, want 4", launches)
		}
		time.Sleep(39 * time.Minute)
		refused(alice, time.Minute)
		time.Sleep(time.Minute)
		must(alice) // 1:00, when the first start has expired
		refused(big, 10*time.Minute)
		time.Sleep(10 * time.Minute)
		must(big)
	})
}

// TestStartsThatAreShared: many Dials join one start, at the gateway that runs it and
// at another. The start is counted once, by the gateway that runs it.
func TestStartsThatAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		ledger := &Memory{}
		one, two := newDialer(fake, ledger), newDialer(fake, ledger)
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
				conn.Close()
			})
		}
		all.Wait()
		if times, _ := parseStarts(one.recent.byUser["alice"]); len(times) != 1 || len(two.recent.byUser) != 0 {
			t.Errorf("counted %v and %v", one.recent.byUser["alice"], two.recent.byUser)
		}
	})
}

// TestStartsAfterStop: a login during a stop waits for it, and its start counts.
func TestStartsAfterStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		d.StartsPerUser = StartRate{Starts: 2, Per: time.Hour}
		stopAndDial := func() error {
			fake.onStop = func() error { time.Sleep(5 * time.Second); return nil }
			stopped := make(chan error)
			go func() {
				_, err := d.Stop(context.Background(), aliceOwner, "by a test")
				stopped <- err
			}()
			time.Sleep(time.Second)
			conn, err := d.Dial(t.Context(), alice, nil)
			if err == nil {
				conn.Close()
			}
			if err := <-stopped; err != nil {
				t.Errorf("the stop: %v", err)
			}
			return err
		}
		mustDial(t, d, nil)
		if err := stopAndDial(); err != nil {
			t.Fatalf("the second start: %v", err)
		}
		var often *TooOftenError
		if err := stopAndDial(); !errors.As(err, &often) {
			t.Errorf("the third start: %v", err)
		}
	})
}

// TestRecentStartsExpire limits the memory for users without recent starts.
func TestRecentStartsExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &Dialer{Settings: Settings{StartsPerUser: StartRate{Starts: 5, Per: time.Minute}}}
		for i := range 10_000 {
			if err := d.countStart(t.Context(), fmt.Sprint("user", i)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if n := len(d.recent.byUser); n > 61 {
			t.Errorf("%d users are stored", n)
		}
		for range 1000 {
			d.countStart(t.Context(), "alice")
			time.Sleep(7 * time.Second)
		}
		if times, err := parseStarts(d.recent.byUser["alice"]); err != nil || len(times) > 5 {
			t.Errorf("%d starts of one user are stored; %v", len(times), err)
		}
		d.StartsPerUser = StartRate{}
		for range 100 {
			if err := d.countStart(t.Context(), "alice"); err != nil {
				t.Fatalf("without a limit: %v", err)
			}
		}
	})
}

// TestSharedStarts: two gateways that share a TextStore count starts together. If
// the store cannot be reached, nothing is started.
func TestSharedStarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		settings := Settings{StartsPerUser: StartRate{Starts: 3, Per: time.Hour}}
		var store recentStarts
		log := slog.New(slog.DiscardHandler)
		one, two := &Dialer{Settings: settings, Starts: &store, Log: log}, &Dialer{Settings: settings, Starts: &store, Log: log}
		for _, d := range []*Dialer{one, two, one} {
			if err := d.countStart(t.Context(), "alice"); err != nil {
				t.Error(err)
			}
			time.Sleep(time.Minute)
		}
		var often *TooOftenError
		if err := two.countStart(t.Context(), "alice"); !errors.As(err, &often) || often.Wait != 57*time.Minute {
			t.Errorf("the fourth: %v", err)
		}
		if err := two.countStart(t.Context(), "bob"); err != nil {
			t.Error(err)
		}
		one.Starts = noStore{}
		if err := one.countStart(t.Context(), "bob"); !errors.Is(err, ErrLedger) || errors.As(err, &often) {
			t.Errorf("without the store: %v", err)
		}
		// A start whose reply is lost is counted again, and as one.
		one.Starts = &lossyStore{&store, 2}
		for range 2 {
			if err := one.countStart(t.Context(), "bob"); err != nil {
				t.Error(err)
			}
		}
		if err := one.countStart(t.Context(), "bob"); !errors.As(err, &often) {
			t.Errorf("bob's fourth: %v", err)
		}
	})
}

// lossyStore carries out each Update, and returns errors for the first ones.
type lossyStore struct {
	TextStore
	losses int
}

func (s *lossyStore) Update(ctx context.Context, user, name string, change func(string) (string, error)) error {
	err := s.TextStore.Update(ctx, user, name, change)
	if err == nil && s.losses > 0 {
		s.losses--
		err = errors.New("connection reset by peer")
	}
	return err
}

type noStore struct{}

func (noStore) Update(context.Context, string, string, func(string) (string, error)) error {
	return errors.New("no table")
}

func TestUsualStart(t *testing.T) {
	var d Dialer
	if got := d.UsualStart("default"); got != 0 {
		t.Errorf("%v before the first start", got)
	}
	for _, took := range []int{100, 100, 100, 100, 100, 30, 31, 32, 33, 300, 34, 35, 1, 36} { // the last nine count
		d.durations.add("default", time.Duration(took)*time.Second)
	}
	d.durations.add("other", time.Second)
	if got, want := d.UsualStart("default"), 33*time.Second; got != want {
		t.Errorf("usually %v, want %v", got, want)
	}
	if got := d.UsualStart("other"); got != time.Second {
		t.Errorf("usually %v in the other profile", got)
	}
}
