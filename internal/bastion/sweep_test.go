package bastion

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func TestAdopt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		first := mustDial(t, newDialer(fake, &Memory{}), nil)

		d := newDialer(fake, &Memory{})
		if err := d.Adopt(t.Context()); err != nil {
			t.Fatal(err)
		}
		if task := mustDial(t, d, func(bool) { t.Error("notified") }); task.ID != first.ID {
			t.Errorf("got %s, want %s", task.ID, first.ID)
		}
		// An adopted bastion is replaced after its end like any other.
		fake.killIf(func(*fakeTask) bool { return true })
		if task := mustDial(t, d, nil); task.Generation != 2 {
			t.Errorf("after its end: generation %d", task.Generation)
		}
		// A listing older than the ledger's entry is ignored.
		if err := mustBastion(t, d, aliceOwner).adopt(t.Context(), OwnedTask{Owner: Owner{"alice", "default"}, Task: first}); err != nil {
			t.Fatal(err)
		}
		if task := mustDial(t, d, nil); task.Generation != 2 {
			t.Errorf("adopted a task from a stale listing")
		}
	})
}

// TestAdoptHangs: if List blocks, Adopt returns an error after adoptTimeout, so that
// the gateway can start. A later Sweep adopts the running tasks.
func TestAdoptHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		first := mustDial(t, newDialer(fake, &Memory{}), nil)
		d := newDialer(fake, &Memory{})
		fake.onList = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		began := time.Now()
		if err := d.Adopt(t.Context()); err == nil {
			t.Error("no error though List timed out")
		}
		if took := time.Since(began); took > adoptTimeout {
			t.Errorf("took %v", took)
		}
		fake.onList = nil
		if err := d.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		if task := mustDial(t, d, nil); task.ID != first.ID {
			t.Errorf("got %s, want %s", task.ID, first.ID)
		}
	})
}

// TestAdoptFails: if Adopt has failed, Dial lists the tasks before it starts a
// bastion. While List fails, Dial fails or waits, because the user may have a
// bastion already; then it connects to that one, of any generation.
func TestAdoptFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		old := newDialer(fake, &Memory{})
		mustDial(t, old, nil)
		fake.killIf(func(*fakeTask) bool { return true })
		second := mustDial(t, old, nil)
		fake.onceGen = false // ECS remembers a generation for an hour

		lost := func(err error) *Dialer {
			fake.onList = func(context.Context) error { return err }
			d := newDialer(fake, &Memory{})
			if got := d.Adopt(t.Context()); !errors.Is(got, err) {
				t.Fatalf("adopted: %v", got)
			}
			return d
		}
		d := lost(fmt.Errorf("no permission: %w", ErrDenied))
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrDenied) {
			t.Errorf("got %v, want ErrDenied", err)
		}
		d = lost(ErrBusy)
		soon := time.Now().Add(time.Minute)
		fake.onList = func(context.Context) error {
			if time.Now().Before(soon) {
				return ErrBusy
			}
			return nil
		}
		if task := mustDial(t, d, nil); task.ID != second.ID {
			t.Errorf("got %s, want %s", task.ID, second.ID)
		}
		id := alice
		id.User = "bob"
		conn, err := d.Dial(t.Context(), id, nil)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if launches, tasks, _ := fake.counts(); launches != 3 || tasks != 3 {
			t.Errorf("%d launches, %d tasks", launches, tasks)
		}
	})
}

// TestSweepSparesSessions: if an owner has two live tasks in spite of the ledger, the
// sweep stops the one without connections, also if its generation is newer.
func TestSweepSparesSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		conn, err := d.Dial(t.Context(), alice, nil)
		if err != nil {
			t.Fatal(err)
		}
		other := *fake.task(0)
		other.ID, other.Generation, other.Addr, other.open = "other", 7, "other:1", 0
		fake.tasks = append(fake.tasks, &other)
		for range 3 {
			if err := d.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := mustBastion(t, d, aliceOwner).alive(t.Context(), conn.Task.ID); err != nil {
				t.Fatalf("the sweep stopped a bastion with a connection: %v", err)
			}
			time.Sleep(10 * time.Minute)
		}
		if task := mustDial(t, d, nil); task.ID != conn.Task.ID {
			t.Errorf("the next Dial connected to %s, want %s", task.ID, conn.Task.ID)
		}
		if _, _, live := fake.counts(); live != 1 {
			t.Errorf("%d live tasks, want 1", live)
		}
		conn.Close()
	})
}

// TestAdoptHalfStarted: if a gateway exits during a start, the next one adopts the
// task and waits for its address, instead of starting another.
func TestAdoptHalfStarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		task, err := fake.launch(Launch{Owner: Owner{"alice", "default"}, Generation: 3})
		if err != nil {
			t.Fatal(err)
		}
		d := newDialer(fake, &Memory{})
		d.Profiles["default"] = Profile{Launcher: noAddress{fake}}
		if err := d.Adopt(t.Context()); err != nil {
			t.Fatal(err)
		}
		d.Profiles["default"] = Profile{Launcher: fake}
		if got := mustDial(t, d, nil); got.ID != task.ID {
			t.Errorf("got %s, want %s", got.ID, task.ID)
		}
	})
}

// noAddress lists tasks as they are before they have an address.
type noAddress struct{ *fakeLauncher }

func (n noAddress) List(ctx context.Context) ([]OwnedTask, error) {
	tasks, err := n.fakeLauncher.List(ctx)
	for i := range tasks {
		tasks[i].Task.Addr = ""
	}
	return tasks, err
}

func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		profile := d.Profiles["default"]
		profile.MaxLife = 12 * time.Hour
		d.Profiles["default"] = profile
		sweep := func(wantLive int) {
			t.Helper()
			if err := d.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			if _, _, live := fake.counts(); live != wantLive {
				t.Errorf("%d live tasks, want %d", live, wantLive)
			}
		}
		current := mustDial(t, d, nil)
		// An orphan of an earlier generation, and a task of an owner without
		// a ledger entry.
		orphan := &fakeTask{owner: Owner{"alice", "default"}, Task: Task{ID: "orphan", Generation: 0, Addr: "task:1"}, listens: time.Now(), fleet: fake.fleet.PublicKey()}
		fake.tasks = append(fake.tasks, orphan)
		unknown, err := fake.launch(Launch{Owner: Owner{"bob", "default"}, Generation: 7})
		if err != nil {
			t.Fatal(err)
		}
		sweep(3) // the orphan is young: it may be part of a start
		if entry, _ := d.Ledger.Get(t.Context(), unknown.owner); entry.Generation != 7 || entry.Task.ID != unknown.ID {
			t.Errorf("the unknown bastion was not adopted: %+v", entry)
		}
		time.Sleep(11 * time.Minute)
		sweep(2)
		if !orphan.dead {
			t.Error("the orphan was not stopped")
		}
		time.Sleep(12 * time.Hour)
		sweep(2) // the agents may be about to end by themselves
		time.Sleep(10 * time.Minute)
		sweep(0)
		if task := mustDial(t, d, nil); task.Generation != current.Generation+1 {
			t.Errorf("after its maximum life: generation %d", task.Generation)
		}
	})
}

// TestSweepRemovedProfile removes a profile while a user is connected to a bastion of
// it: the sweep stops the bastion once there is no connection, and reports the
// owners of all tasks when it is done.
func TestSweepRemovedProfile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		conn, err := d.Dial(t.Context(), alice, nil)
		if err != nil {
			t.Fatal(err)
		}
		var owners []map[Owner]bool
		d.AfterSweep = func(_ context.Context, all map[Owner]bool) error {
			owners = append(owners, all)
			return nil
		}
		d.Reload(Settings{Profiles: map[string]Profile{"other": d.Profiles["default"]}, FleetKeys: d.FleetKeys})
		sweep := func(wantLive int) {
			t.Helper()
			if err := d.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			if _, _, live := fake.counts(); live != wantLive {
				t.Errorf("%d live tasks, want %d", live, wantLive)
			}
		}
		time.Sleep(orphanAge + time.Minute)
		sweep(1)
		conn.Close()
		sweep(0)
		fake.onList = func(context.Context) error { return ErrBusy }
		if err := d.Sweep(t.Context()); !errors.Is(err, ErrBusy) {
			t.Errorf("got %v, want ErrBusy", err)
		}
		if len(owners) != 2 || !owners[0][aliceOwner] {
			t.Errorf("owners of tasks %v, want alice's twice", owners)
		}
	})
}

// TestSweepRemovesEnded: a bastion that has ended since the last sweep is removed
// from the ledger, with one event of all gateways, that has the launcher's usage.
func TestSweepRemovesEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		ledger := &Memory{}
		var ends []Event
		gateway := func() *Dialer {
			d := newDialer(fake, ledger)
			d.Event = func(e Event) {
				if e.Kind == Ended {
					ends = append(ends, e)
				}
			}
			return d
		}
		one, two := gateway(), gateway()
		sweep := func(wantEnds int, wantState State) {
			t.Helper()
			if err := errors.Join(one.Sweep(t.Context()), two.Sweep(t.Context())); err != nil {
				t.Error(err)
			}
			entry, err := ledger.Get(t.Context(), aliceOwner)
			if err != nil || entry.State != wantState || len(ends) != wantEnds {
				t.Errorf("state %v, %d events: %v; want %v, %d (%v)", entry.State, len(ends), ends, wantState, wantEnds, err)
			}
		}

		// The first gateway has entered it, the second has seen it in a listing.
		task := mustDial(t, one, nil)
		sweep(0, Running)
		time.Sleep(10 * time.Minute)
		fake.killIf(func(*fakeTask) bool { return true })
		// The launcher does not know yet when, and then it does.
		fake.usage = Usage{Platform: "fargate", CPU: 256}
		sweep(0, Running)
		fake.usage.Until = time.Now()
		sweep(1, Idle)
		if e := ends[0]; e.Owner != aliceOwner || e.Task.ID != task.ID || e.Task.Usage != fake.usage {
			t.Errorf("event %+v", e)
		}
		sweep(1, Idle)
		if next := mustDial(t, two, nil); next.Generation != 2 {
			t.Errorf("then generation %d", next.Generation)
		}

		// A bastion that ends between two sweeps has been in no listing.
		fake.killIf(func(*fakeTask) bool { return true })
		sweep(2, Idle)
	})
}

// TestSweepLeavesUnknown: a task that is not listed stays in the ledger if its
// launcher cannot tell its end: it may run in a cluster of an earlier configuration.
func TestSweepLeavesUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		d.Event = func(e Event) {
			if e.Kind == Ended {
				t.Errorf("event %+v", e)
			}
		}
		mustDial(t, d, nil)
		fake.killIf(func(*fakeTask) bool { return true })
		for range 2 {
			if err := d.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
		}
		fake.usage.Until = time.Now()
		fake.onAlive = func() error { return errors.New("no answer") }
		if err := d.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		if entry, _ := d.Ledger.Get(t.Context(), aliceOwner); entry.State != Running {
			t.Errorf("state %v", entry.State)
		}
	})
}
