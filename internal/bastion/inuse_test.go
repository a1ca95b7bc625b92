package bastion

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// TestSweepAsksTheAgent: a task that is not in the ledger is not stopped while
// another gateway has a connection to it, or may have one.
func TestSweepAsksTheAgent(t *testing.T) {
	errOthers := errors.New("there is another gateway")
	tests := map[string]struct {
		mute   bool // the agent does not answer
		alone  func(context.Context) error
		spared bool
	}{
		"the agent refuses":      {spared: true},
		"no answer, one gateway": {mute: true},
		"no answer, several":     {mute: true, spared: true, alone: func(context.Context) error { return errOthers }},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newFakeLauncher(t)
				defer fake.end()
				one, two := newDialer(fake, &Memory{}), newDialer(fake, &Memory{})
				two.Alone = tt.alone
				conn, err := one.Dial(t.Context(), alice, nil)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				fake.task(0).mute = tt.mute
				// The ledger of the other gateway is past this task.
				if _, err := two.Ledger.Swap(t.Context(), aliceOwner, Entry{}, Entry{Generation: 7, State: Idle}); err != nil {
					t.Fatal(err)
				}
				time.Sleep(orphanAge + time.Minute)
				if err := two.Sweep(t.Context()); (err != nil) != (tt.mute && tt.spared) {
					t.Errorf("the sweep: %v", err)
				}
				if spared := ping(conn) == nil; spared != tt.spared {
					t.Errorf("spared: %v, want %v", spared, tt.spared)
				}
				if tt.spared {
					if n := len(two.conns.refused); n != 0 {
						t.Error("the gateway would stop the spared task if its next start got it")
					}
					conn.Close()
					fake.task(0).mute = false
					time.Sleep(time.Second)
					if err := two.Sweep(t.Context()); err != nil {
						t.Error(err)
					}
					if _, _, live := fake.counts(); live != 0 {
						t.Error("a task without connections is not stopped")
					}
				}
			})
		})
	}
}

// TestNoAnswerBesideOthers: a gateway that a bastion does not answer does not stop
// it while there are other gateways.
func TestNoAnswerBesideOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		mustDial(t, d, nil)
		fake.task(0).mute = true
		d.Alone = func(context.Context) error { return errors.New("there is another gateway") }
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrNoAnswer) {
			t.Errorf("got %v", err)
		}
		if fake.stops != 0 || len(d.conns.refused) != 0 {
			t.Errorf("%d stops; %d tasks refused", fake.stops, len(d.conns.refused))
		}
		d.Alone = func(context.Context) error { return nil }
		if task := mustDial(t, d, nil); task.Generation != 2 {
			t.Errorf("then generation %d", task.Generation)
		}
	})
}

// unreachable is a ledger that cannot be reached while err is not nil.
type unreachable struct {
	Memory
	mu  sync.Mutex
	err error
}

func (u *unreachable) set(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.err = err
}

func (u *unreachable) get() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.err
}

func (u *unreachable) Get(ctx context.Context, o Owner) (Entry, error) {
	if err := u.get(); err != nil {
		return Entry{}, err
	}
	return u.Memory.Get(ctx, o)
}

func (u *unreachable) Swap(ctx context.Context, o Owner, old, new Entry) (Entry, error) {
	if err := u.get(); err != nil {
		return Entry{}, err
	}
	return u.Memory.Swap(ctx, o, old, new)
}

// TestLedgerUnreachable: while the ledger cannot be reached, users enter bastions
// that have let this gateway in before. Starts wait for it, and then fail.
func TestLedgerUnreachable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		ledger := &unreachable{}
		d := newDialer(fake, ledger)
		mustDial(t, d, nil)

		down := errors.New("no route to the table")
		ledger.set(down)
		mustDial(t, d, nil)
		bob := identity.Identity{User: "bob", Profile: "default", ConnID: "b"}
		waited := false
		began := time.Now()
		if _, err := d.Dial(t.Context(), bob, func(starting bool) { waited = !starting }); !errors.Is(err, ErrLedger) || !errors.Is(err, down) {
			t.Errorf("a start: %v", err)
		}
		if took := time.Since(began); !waited || took < ledgerTimeout || took > 2*ledgerTimeout {
			t.Errorf("a start failed after %v; waited: %v", took, waited)
		}
		// The bastion that has ended meanwhile cannot be replaced.
		fake.killIf(func(*fakeTask) bool { return true })
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrLedger) {
			t.Errorf("after the end of the bastion: %v", err)
		}

		go func() { time.Sleep(10 * time.Second); ledger.set(nil) }()
		conn, err := d.Dial(t.Context(), bob, nil)
		if err != nil {
			t.Fatalf("when the ledger is back: %v", err)
		}
		conn.Close()
		if task := mustDial(t, d, nil); task.Generation != 2 {
			t.Errorf("alice's generation is %d", task.Generation)
		}
	})
}

// TestRememberedTask: the task of another owner or of an older generation is never
// taken for the present one.
func TestRememberedTask(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		ledger := &Memory{}
		one, two := newDialer(fake, ledger), newDialer(fake, ledger)
		mustDial(t, one, nil)
		mustDial(t, two, nil)
		if _, err := two.Stop(t.Context(), aliceOwner, "by a test"); err != nil {
			t.Fatal(err)
		}
		if task := mustDial(t, two, nil); task.Generation != 2 {
			t.Errorf("the gateway that has stopped it enters generation %d", task.Generation)
		}
		if task := mustDial(t, one, nil); task.Generation != 2 {
			t.Errorf("the other gateway enters generation %d", task.Generation)
		}

		// Another task at the address of a dead one shows another host key.
		fake.task(1).shows = sshtest.NewKey(t)
		if _, err := one.Dial(t.Context(), alice, nil); !errors.Is(err, ErrHostKey) {
			t.Errorf("a wrong host key: %v", err)
		}
	})
}

// TestRememberedSlow: a bastion that has been slow once can still be entered while
// the ledger cannot be reached.
func TestRememberedSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		ledger := &unreachable{}
		d := newDialer(fake, ledger)
		mustDial(t, d, nil)

		ledger.set(errors.New("no route to the table"))
		fake.task(0).mute = true
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrLedger) {
			t.Errorf("while the bastion is slow: %v", err)
		}
		fake.task(0).mute = false
		mustDial(t, d, nil)
	})
}
