package bastion

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

var aliceOwner = Owner{"alice", "default"}

// TestStop stops a bastion with somebody in it, while somebody else comes.
func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
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

		// ECS takes a while; who comes meanwhile waits for it and gets another.
		came := make(chan Task, 2)
		w.onStop = func() error {
			go func() {
				conn, err := d.Dial(t.Context(), alice, nil)
				if err != nil {
					t.Error(err)
					close(came)
					return
				}
				conn.hangUp()
				came <- conn.Task
			}()
			time.Sleep(5 * time.Second)
			return nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // who asks for it may leave
		stopped, err := d.Stop(ctx, aliceOwner, "by a test")
		if err != nil || stopped.Task.ID != w.task(0).ID || stopped.Generation != 1 {
			t.Errorf("stopped %+v: %v", stopped, err)
		}
		inside.hangUp()
		if inside.Wait() == nil {
			t.Error("the connection into it lives")
		}
		if next := <-came; next.Generation != 2 {
			t.Errorf("who came meanwhile is in generation %d", next.Generation)
		}
		if launches, tasks, live := w.counts(); launches != 2 || tasks != 2 || live != 1 {
			t.Errorf("%d launches, %d tasks, %d live", launches, tasks, live)
		}
	})
}

// TestStopFails leaves what cannot be stopped as it was.
func TestStopFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		mustDial(t, d, nil)
		failing := &unstoppable{world: w}
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

// unstoppable is a launcher that cannot stop anything.
type unstoppable struct{ *world }

func (*unstoppable) Stop(context.Context, Owner, string) error { return errNotToday }

// TestStopWhileStarting leaves starts alone, but not those that were given up.
func TestStopWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		ledger := &Memory{}
		d, other := newDialer(w, ledger), newDialer(w, ledger)
		w.boot = 10 * time.Second
		dialled := make(chan error, 1)
		go func() {
			conn, err := d.Dial(t.Context(), alice, nil)
			if err == nil {
				conn.hangUp()
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

		// The reply to this launch is lost, and nobody tries again.
		w.onLaunch = func(context.Context, Launch) (bool, error) { return true, errors.New("lost") }
		if _, err := d.Dial(t.Context(), alice, nil); err == nil {
			t.Fatal("in")
		}
		if _, _, live := w.counts(); live != 1 {
			t.Fatalf("%d live", live)
		}
		stopped, err := d.Stop(t.Context(), aliceOwner, "by a test")
		if err != nil || stopped.Task.ID != w.task(1).ID {
			t.Errorf("stopped %+v: %v", stopped, err)
		}
		if _, _, live := w.counts(); live != 0 {
			t.Errorf("%d live", live)
		}
		w.onLaunch = nil
		if task := mustDial(t, d, nil); task.Generation != 3 {
			t.Errorf("generation %d", task.Generation)
		}
	})
}

func TestStatusAndList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		d.Profiles["big"] = Profile{Launcher: w, Idle: time.Hour, MaxLife: 2 * time.Hour}
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
		if s := all[1]; s.Owner != aliceOwner || s.Entry.State != Running || !s.Entry.Since.Equal(running) || s.Entry.Task.ID != w.task(0).ID {
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
