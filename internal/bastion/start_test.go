package bastion

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

func TestLaunchFailures(t *testing.T) {
	lost := errors.New("connection reset by peer")
	tests := []struct {
		name string
		// the outcome of the first, second, ... Launch
		launches []func(ctx context.Context, fake *fakeLauncher, l Launch) (bool, error)
		wantErr  error
		// generation of the bastion that a Dial without faults then returns
		wantGeneration int64
	}{
		{"failed", []func(context.Context, *fakeLauncher, Launch) (bool, error){
			func(context.Context, *fakeLauncher, Launch) (bool, error) { return false, lost },
		}, lost, 1},
		{"worked, but the reply was lost", []func(context.Context, *fakeLauncher, Launch) (bool, error){
			func(context.Context, *fakeLauncher, Launch) (bool, error) { return true, lost },
		}, lost, 1},
		{"burnt once", []func(context.Context, *fakeLauncher, Launch) (bool, error){
			func(context.Context, *fakeLauncher, Launch) (bool, error) { return false, ErrGone },
		}, nil, 2},
		{"burnt twice", []func(context.Context, *fakeLauncher, Launch) (bool, error){
			func(context.Context, *fakeLauncher, Launch) (bool, error) { return false, ErrGone },
			func(context.Context, *fakeLauncher, Launch) (bool, error) { return false, ErrGone },
		}, ErrGone, 3},
		{"ends before it listens", []func(context.Context, *fakeLauncher, Launch) (bool, error){
			func(_ context.Context, fake *fakeLauncher, l Launch) (bool, error) {
				time.AfterFunc(2*time.Second, func() { fake.killIf(func(task *fakeTask) bool { return task.Generation == l.Generation }) })
				return true, nil
			},
		}, nil, 2},
		{"no account", []func(context.Context, *fakeLauncher, Launch) (bool, error){
			func(context.Context, *fakeLauncher, Launch) (bool, error) { return false, ErrNoAccount },
		}, ErrNoAccount, 1},
		{"hangs", []func(context.Context, *fakeLauncher, Launch) (bool, error){
			func(ctx context.Context, _ *fakeLauncher, _ Launch) (bool, error) {
				<-ctx.Done()
				return false, ctx.Err()
			},
		}, ErrTimeout, 1},
		{"hangs, but worked", []func(context.Context, *fakeLauncher, Launch) (bool, error){
			func(ctx context.Context, _ *fakeLauncher, _ Launch) (bool, error) {
				<-ctx.Done()
				return true, ctx.Err()
			},
		}, ErrTimeout, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newFakeLauncher(t)
				defer fake.end()
				d := newDialer(fake, &Memory{})
				next := 0
				fake.onLaunch = func(ctx context.Context, l Launch) (bool, error) {
					if next == len(tt.launches) {
						return true, nil
					}
					next++
					return tt.launches[next-1](ctx, fake, l)
				}
				began := time.Now()
				conn, err := d.Dial(t.Context(), alice, nil)
				if !errors.Is(err, tt.wantErr) {
					t.Fatalf("got %v, want %v", err, tt.wantErr)
				}
				if errors.Is(err, ErrTimeout) && time.Since(began) != 5*time.Minute {
					t.Errorf("timed out after %v", time.Since(began))
				}
				if err == nil {
					conn.Close()
				}
				// The next Dial begins a start, and does not join one.
				again := func(starting bool) {
					if !starting {
						t.Error("joined a start that had failed")
					}
				}
				if task := mustDial(t, d, again); task.Generation != tt.wantGeneration {
					t.Errorf("generation %d, want %d", task.Generation, tt.wantGeneration)
				}
				if _, _, live := fake.counts(); live != 1 {
					t.Errorf("%d live tasks", live)
				}
			})
		})
	}
}

// TestNeverReachable: if a start's task runs and Dial cannot log in to it, the task is
// stopped, because otherwise each later Dial would wait for it until its timeout.
func TestNeverReachable(t *testing.T) {
	tests := []struct {
		name    string
		spoil   func(*fakeTask)
		wantErr error
	}{
		{"refuses connections", func(task *fakeTask) { task.listens = time.Now().Add(time.Hour) }, ErrTimeout},
		{"sends nothing", func(task *fakeTask) { task.mute = true }, ErrTimeout},
		{"another host key", func(task *fakeTask) { task.shows = sshtest.NewKey(t) }, ErrHostKey},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newFakeLauncher(t)
				defer fake.end()
				fake.boot = 0
				d := newDialer(fake, &Memory{})
				fake.onDial = func(task *fakeTask) error {
					fake.onDial = nil
					tt.spoil(task)
					return nil
				}
				if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, tt.wantErr) {
					t.Fatalf("got %v, want %v", err, tt.wantErr)
				}
				if fake.stops != 1 || len(fake.task(0).logins) != 0 {
					t.Errorf("stopped %d times, logins %q", fake.stops, fake.task(0).logins)
				}
				if task := mustDial(t, d, nil); task.Generation != 2 {
					t.Errorf("then generation %d", task.Generation)
				}
			})
		})
	}
}

// TestTakeover: if a gateway crashes during a launch, another waits for the lease to
// expire and launches the same generation, so that it gets the task of the first
// launch if there is one.
func TestTakeover(t *testing.T) {
	for _, started := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			fake := newFakeLauncher(t)
			defer fake.end()
			ledger := &Memory{}
			crashed, heir := newDialer(fake, ledger), newDialer(fake, ledger)
			var launches atomic.Int32
			fake.onLaunch = func(ctx context.Context, l Launch) (bool, error) {
				if launches.Add(1) > 1 {
					return true, nil
				}
				if started {
					fake.launch(l)
				}
				<-ctx.Done()
				return false, ctx.Err()
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			crashed.Dial(ctx, alice, nil)

			began := time.Now()
			var notes []bool
			task := mustDial(t, heir, func(starting bool) { notes = append(notes, starting) })
			if took := time.Since(began); took > leaseTime+fake.boot+3*time.Second {
				t.Errorf("took over after %v", took)
			}
			if _, tasks, _ := fake.counts(); tasks != 1 || task.Generation != 1 || !slices.Equal(notes, []bool{false}) {
				t.Errorf("%d tasks, generation %d, notified %v", tasks, task.Generation, notes)
			}
			// When the first gateway's start times out, it must not stop the task.
			crashed.Wait(t.Context())
			if again := mustDial(t, heir, nil); again.ID != task.ID {
				t.Errorf("the task was replaced")
			}
		})
	}
}

// TestLeaseOfAWrongClock: if a gateway whose clock is a day ahead crashes during a launch,
// another one takes over nevertheless.
func TestLeaseOfAWrongClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		ledger := &Memory{}
		claim := Entry{Generation: 1, State: Starting, Lease: time.Now().Add(24*time.Hour + leaseTime)}
		if _, err := ledger.Swap(t.Context(), aliceOwner, Entry{}, claim); err != nil {
			t.Fatal(err)
		}
		if task := mustDial(t, newDialer(fake, ledger), nil); task.Generation != 1 {
			t.Errorf("generation %d", task.Generation)
		}
	})
}

// TestTwoGateways: if one gateway starts a bastion, the other waits for that start.
func TestTwoGateways(t *testing.T) {
	for _, boot := range []time.Duration{5 * time.Second, 2 * time.Minute} { // shorter and longer than the lease
		synctest.Test(t, func(t *testing.T) {
			fake := newFakeLauncher(t)
			defer fake.end()
			fake.boot = boot
			ledger := &Memory{}
			a, b := newDialer(fake, ledger), newDialer(fake, ledger)
			var wg sync.WaitGroup
			var ids [2]string
			for i, d := range []*Dialer{a, b} {
				wg.Go(func() { ids[i] = mustDial(t, d, nil).ID })
			}
			wg.Wait()
			if _, tasks, _ := fake.counts(); tasks != 1 || ids[0] != ids[1] {
				t.Errorf("%d tasks: %q", tasks, ids)
			}
		})
	}
}

// TestRetry: if a launch fails with ErrCapacity or ErrPlatform, it is retried once.
// After other errors it is not.
func TestRetry(t *testing.T) {
	for _, tt := range []struct {
		err   error
		wants int // launches
	}{
		{fmt.Errorf("%w: %w", ErrGone, ErrCapacity), 2},
		{fmt.Errorf("%w: %w", ErrGone, ErrPlatform), 2},
		{fmt.Errorf("%w: %w", ErrGone, ErrImage), 1},
		{fmt.Errorf("%w: %w", ErrGone, ErrQuota), 1},
		{fmt.Errorf("%w: %w", ErrGone, ErrSecrets), 1},
		{ErrDenied, 1},
		{ErrConfig, 1},
		{ErrBusy, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			fake := newFakeLauncher(t)
			defer fake.end()
			d := newDialer(fake, &Memory{})
			var attempts []int
			fake.onLaunch = func(_ context.Context, l Launch) (bool, error) {
				attempts = append(attempts, l.Attempt)
				return false, tt.err
			}
			if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, tt.err) {
				t.Errorf("%v: got %v", tt.err, err)
			}
			if want := []int{0, 1}[:tt.wants]; !slices.Equal(attempts, want) {
				t.Errorf("%v: attempts %v, want %v", tt.err, attempts, want)
			}
			fake.onLaunch = nil
			mustDial(t, d, nil)
		})
	}
}

// lossyLedger carries out each Swap, and returns errors for the first ones.
type lossyLedger struct {
	Memory
	losses []error
}

func (l *lossyLedger) Swap(ctx context.Context, o Owner, old, new Entry) (Entry, error) {
	made, err := l.Memory.Swap(ctx, o, old, new)
	if err == nil && len(l.losses) > 0 {
		err = l.losses[0]
		l.losses = l.losses[1:]
	}
	return made, err
}

// TestSwapReplyLost: if the reply to a Swap is lost, the gateway recognises its own
// lease instead of waiting for it to expire. If the ledger's client retries a write
// that succeeded, it reports ErrConflict.
func TestSwapReplyLost(t *testing.T) {
	for _, loss := range []error{ErrConflict, errors.New("connection reset by peer")} {
		synctest.Test(t, func(t *testing.T) {
			fake := newFakeLauncher(t)
			defer fake.end()
			ledger := &lossyLedger{losses: []error{loss, loss}} // to claim, and to record
			began := time.Now()
			mustDial(t, newDialer(fake, ledger), nil)
			if took := time.Since(began); took > fake.boot+time.Second {
				t.Errorf("%v: took %v", loss, took)
			}
			if launches, _, _ := fake.counts(); launches != 1 || len(ledger.losses) != 0 {
				t.Errorf("%v: %d launches, %d replies not lost", loss, launches, len(ledger.losses))
			}
		})
	}
}

// unwritableLedger rejects each Swap until a time.
type unwritableLedger struct {
	Memory
	until time.Time
}

func (l *unwritableLedger) Swap(ctx context.Context, o Owner, old, new Entry) (Entry, error) {
	if time.Now().Before(l.until) {
		return Entry{}, errors.New("no answer")
	}
	return l.Memory.Swap(ctx, o, old, new)
}

// TestUnwritableLedger: a start waits for a ledger that cannot be written for a while, to
// claim a generation as well as to enter the task. Beyond 30 s it fails, and launches
// nothing.
func TestUnwritableLedger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		ledger := &unwritableLedger{until: time.Now().Add(20 * time.Second)}
		fake.onLaunch = func(context.Context, Launch) (bool, error) {
			ledger.until = time.Now().Add(fake.boot + 20*time.Second)
			return true, nil
		}
		d := newDialer(fake, ledger)
		task := mustDial(t, d, nil)
		if entry, err := ledger.Get(t.Context(), aliceOwner); err != nil || entry.State != Running || entry.Task.ID != task.ID {
			t.Errorf("the ledger has %+v, %v", entry, err)
		}

		fake.killIf(func(*fakeTask) bool { return true })
		ledger.until = time.Now().Add(24 * time.Hour)
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrLedger) {
			t.Errorf("a ledger that cannot be written: %v", err)
		}
		if launches, _, _ := fake.counts(); launches != 1 {
			t.Errorf("%d launches", launches)
		}
	})
}

// overtakenLedger has another gateway change the entry before the first Swap, and cannot be
// read for 20 s after that.
type overtakenLedger struct {
	Memory
	until time.Time
}

func (l *overtakenLedger) Swap(ctx context.Context, o Owner, old, new Entry) (Entry, error) {
	if l.until.IsZero() {
		l.until = time.Now().Add(20 * time.Second)
		if _, err := l.Memory.Swap(ctx, o, old, Entry{Generation: 1, State: Idle}); err != nil {
			return Entry{}, err
		}
	}
	return l.Memory.Swap(ctx, o, old, new)
}

func (l *overtakenLedger) Get(ctx context.Context, o Owner) (Entry, error) {
	if time.Now().Before(l.until) {
		return Entry{}, errors.New("no answer")
	}
	return l.Memory.Get(ctx, o)
}

// TestUnreadableLedger: a start that has been overtaken waits for a ledger that cannot be
// read for a while.
func TestUnreadableLedger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		if task := mustDial(t, newDialer(fake, &overtakenLedger{}), nil); task.Generation != 2 {
			t.Errorf("generation %d", task.Generation)
		}
	})
}

// TestFailedEvent: the event of a failed start has the generation, and the task if
// one was launched.
func TestFailedEvent(t *testing.T) {
	for _, tt := range []struct {
		name string
		with func(fake *fakeLauncher)
		task bool
	}{
		{"no task", func(fake *fakeLauncher) {
			fake.onLaunch = func(context.Context, Launch) (bool, error) { return false, ErrCapacity }
		}, false},
		{"login fails", func(fake *fakeLauncher) { fake.onDial = func(task *fakeTask) error { task.mute = true; return nil } }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newFakeLauncher(t)
				defer fake.end()
				tt.with(fake)
				d := newDialer(fake, &Memory{})
				var events []Event
				d.Event = func(e Event) { events = append(events, e) }
				if _, err := d.Dial(t.Context(), alice, func(bool) {}); err == nil {
					t.Fatal("Dial succeeded")
				}
				if first := events[0]; first.Kind != Launching || first.Task.Generation != 1 {
					t.Errorf("the first event is %+v", first)
				}
				i := slices.IndexFunc(events, func(e Event) bool { return e.Kind == Failed })
				if i < 0 {
					t.Fatalf("no such event among %+v", events)
				}
				if e := events[i]; e.Task.Generation != 1 || (e.Task.ID != "") != tt.task || e.Reason == "" {
					t.Errorf("the event is %+v", e)
				}
			})
		})
	}
}

// TestStartFromOldEntry: another gateway starts the bastion after this one has read the
// ledger and before it claims a generation.
func TestStartFromOldEntry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake, ledger := newFakeLauncher(t), &Memory{}
		defer fake.end()
		var theirs Task
		d := newDialer(fake, ledger)
		d.StartsPerUser = StartRate{Starts: 1, Per: time.Hour}
		d.Starts = updateFunc(func() { theirs = mustDial(t, newDialer(fake, ledger), nil) })
		if task := mustDial(t, d, nil); task.ID != theirs.ID {
			t.Errorf("connected to %s, not to %s", task.ID, theirs.ID)
		}
		if launches, _, _ := fake.counts(); launches != 1 {
			t.Errorf("%d launches", launches)
		}
	})
}

// An updateFunc is a TextStore that calls it at each Update.
type updateFunc func()

func (f updateFunc) Update(_ context.Context, _, _ string, change func(string) (string, error)) error {
	f()
	_, err := change("")
	return err
}

// countedCalls counts the calls of a shared ledger: each Get and each Swap is one call of
// a table, and each Update of a TextStore is one of both.
type countedCalls struct {
	Memory
	recentStarts
	reads, writes int
}

func (c *countedCalls) Get(ctx context.Context, owner Owner) (Entry, error) {
	c.reads++
	return c.Memory.Get(ctx, owner)
}

func (c *countedCalls) Swap(ctx context.Context, owner Owner, old, new Entry) (Entry, error) {
	c.writes++
	return c.Memory.Swap(ctx, owner, old, new)
}

func (c *countedCalls) Update(ctx context.Context, user, name string, change func(string) (string, error)) error {
	c.reads++
	c.writes++
	return c.recentStarts.Update(ctx, user, name, change)
}

// TestLedgerCalls counts the calls of a shared ledger, with which docs/cost.md
// calculates.
func TestLedgerCalls(t *testing.T) {
	const startReads, startWrites = 3, 4 // of a start, and of the end of the bastion before
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		calls := &countedCalls{}
		d := newDialer(fake, calls)
		d.Starts, d.StartsPerUser = calls, StartRate{Starts: 30, Per: time.Hour}
		dial := func(reads, writes int) {
			t.Helper()
			calls.reads, calls.writes = 0, 0
			mustDial(t, d, nil)
			if calls.reads != reads || calls.writes != writes {
				t.Errorf("%d reads, %d writes; want %d, %d", calls.reads, calls.writes, reads, writes)
			}
		}
		dial(2, 3) // the first start
		dial(0, 0)
		fake.killIf(func(*fakeTask) bool { return true })
		dial(startReads, startWrites)

		// If the sweep finds the end, it makes the calls that the dial then saves.
		calls.reads, calls.writes = 0, 0
		fake.killIf(func(*fakeTask) bool { return true })
		fake.usage = Usage{Until: time.Now()}
		if err := d.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		if calls.reads != 1 || calls.writes != 1 {
			t.Errorf("sweep: %d reads, %d writes", calls.reads, calls.writes)
		}
		dial(startReads-1, startWrites-1)
		calls.reads, calls.writes = 0, 0
		if err := d.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		if calls.reads != 1 || calls.writes != 0 {
			t.Errorf("sweep of a running bastion: %d reads, %d writes", calls.reads, calls.writes)
		}
	})
}
