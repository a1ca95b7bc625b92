package bastion

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

var aliceOwner = Owner{"alice", "default"}

// TestStop stops a bastion with an open connection, during a concurrent Dial.
func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		if _, err := d.Stop(t.Context(), aliceOwner, "by a test"); !errors.Is(err, ErrGone) {
			t.Errorf("stopping none: %v", err)
		}
		if _, err := d.Stop(t.Context(), Owner{"alice", "big"}, "by a test"); !errors.Is(err, ErrNoProfile) {
			t.Errorf("stopping that of another profile: %v", err)
		}
		inside, err := d.Dial(t.Context(), alice, nil)
		if err != nil {
			t.Fatal(err)
		}

		// Stop takes a while; a concurrent Dial waits for it and gets another task.
		came := make(chan Task, 2)
		fake.onStop = func() error {
			go func() {
				conn, err := d.Dial(t.Context(), alice, nil)
				if err != nil {
					t.Error(err)
					close(came)
					return
				}
				conn.Close()
				came <- conn.Task
			}()
			time.Sleep(5 * time.Second)
			return nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // Stop goes on if ctx ends
		stopped, err := d.Stop(ctx, aliceOwner, "by a test")
		if err != nil || stopped.Task.ID != fake.task(0).ID || stopped.Generation != 1 {
			t.Errorf("stopped %+v: %v", stopped, err)
		}
		if ping(inside) == nil {
			t.Error("the connection into it lives")
		}
		inside.Close()
		if next := <-came; next.Generation != 2 {
			t.Errorf("who came meanwhile is in generation %d", next.Generation)
		}
		if launches, tasks, live := fake.counts(); launches != 2 || tasks != 2 || live != 1 {
			t.Errorf("%d launches, %d tasks, %d live", launches, tasks, live)
		}
	})
}

// TestStopFails: after a failed Stop, the bastion is used as before.
func TestStopFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		mustDial(t, d, nil)
		failing := &unstoppable{fakeLauncher: fake}
		d.Profiles["default"] = Profile{Launcher: failing}
		if _, err := d.Stop(t.Context(), aliceOwner, "by a test"); !errors.Is(err, errNotToday) {
			t.Errorf("stop: %v", err)
		}
		if task := mustDial(t, d, func(bool) { t.Error("it is started anew") }); task.Generation != 1 {
			t.Errorf("generation %d", task.Generation)
		}
	})
}

var errNotToday = errors.New("not today")

// unstoppable is a launcher whose Stop always fails.
type unstoppable struct{ *fakeLauncher }

func (*unstoppable) Stop(context.Context, Owner, string) error { return errNotToday }

// TestStopWhileStarting: Stop returns ErrStarting during a start, by any gateway. If
// the start has failed with its outcome unknown, Stop stops its task.
func TestStopWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		ledger := &Memory{}
		d, other := newDialer(fake, ledger), newDialer(fake, ledger)
		fake.boot = 10 * time.Second
		dialled := make(chan error, 1)
		go func() {
			conn, err := d.Dial(t.Context(), alice, nil)
			if err == nil {
				conn.Close()
			}
			dialled <- err
		}()
		time.Sleep(time.Second)
		for _, gateway := range []*Dialer{d, other} {
			if _, err := gateway.Stop(t.Context(), aliceOwner, "by a test"); !errors.Is(err, ErrStarting) {
				t.Errorf("stopping it while it starts: %v", err)
			}
		}
		if err := <-dialled; err != nil {
			t.Fatal(err)
		}
		if _, err := other.Stop(t.Context(), aliceOwner, "by a test"); err != nil {
			t.Errorf("stopping it by another gateway: %v", err)
		}

		// The reply to this launch is lost, and no Dial retries it.
		fake.onLaunch = func(context.Context, Launch) (bool, error) { return true, errors.New("lost") }
		if _, err := d.Dial(t.Context(), alice, nil); err == nil {
			t.Fatal("Dial succeeded though the reply was lost")
		}
		if _, _, live := fake.counts(); live != 1 {
			t.Fatalf("%d live", live)
		}
		stopped, err := d.Stop(t.Context(), aliceOwner, "by a test")
		if err != nil || stopped.Task.ID != fake.task(1).ID {
			t.Errorf("stopped %+v: %v", stopped, err)
		}
		if _, _, live := fake.counts(); live != 0 {
			t.Errorf("%d live", live)
		}
		fake.onLaunch = nil
		if task := mustDial(t, d, nil); task.Generation != 3 {
			t.Errorf("generation %d", task.Generation)
		}
	})
}

func TestStatusAndList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		d.Profiles["big"] = Profile{Launcher: fake, ProfileOptions: ProfileOptions{Idle: time.Hour, MaxLife: 2 * time.Hour}}
		began := time.Now()
		mustDial(t, d, nil)
		running := time.Now()
		time.Sleep(time.Hour)
		mustDial(t, d, nil)

		all, err := d.Status(t.Context(), "alice")
		if err != nil || len(all) != 2 {
			t.Fatal(all, err)
		}
		if s := all[0]; s.Owner.Profile != "big" || s.Entry.State != Idle || s.Idle != time.Hour || s.MaxLife != 2*time.Hour {
			t.Errorf("that of profile big is %+v", s)
		}
		if s := all[1]; s.Owner != aliceOwner || s.Entry.State != Running || !s.Entry.Since.Equal(running) || s.Entry.Task.ID != fake.task(0).ID {
			t.Errorf("that of profile default is %+v, and runs since %v", s, running)
		}

		listed, err := d.List(t.Context())
		if err != nil || len(listed) != 1 {
			t.Fatal(listed, err)
		}
		if s := listed[0]; s.Owner != aliceOwner || s.Entry.State != Running || !s.Entry.Since.Equal(began) || s.MaxLife != time.Hour {
			t.Errorf("listed %+v", s)
		}
	})
}

// TestStatusOfEnded: Status does not report an ended bastion as running.
func TestStatusOfEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		state := func() State {
			all, err := d.Status(t.Context(), "alice")
			if err != nil || len(all) != 1 {
				t.Fatalf("%+v: %v", all, err)
			}
			return all[0].Entry.State
		}
		conn, err := d.Dial(t.Context(), alice, nil)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if got := state(); got != Running {
			t.Errorf("state %v while it runs", got)
		}
		fake.killIf(func(*fakeTask) bool { return true })
		if got := state(); got != Idle {
			t.Errorf("state %v after its end", got)
		}
	})
}
