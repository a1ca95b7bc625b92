package fargate

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// launch starts a bastion without a connection to it.
func (g gateway) launch(t testing.TB, user string) bastion.Task {
	t.Helper()
	task, err := g.launcher.Launch(t.Context(), bastion.Launch{
		Owner: bastion.Owner{User: user, Profile: g.launcher.Profile}, Generation: 1, Idle: 15 * time.Minute, MaxLife: 12 * time.Hour,
	})
	if err != nil {
		t.Fatal(err)
	}
	return task
}

// TestProfileRemoved: if a profile is removed from the configuration, its tasks are
// stopped. Tasks of other profiles keep running.
func TestProfileRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		account.dialer(&bastion.Memory{}, func(l *Launcher) { l.Profile = "old"; isolated(l) }).launch(t, "alice")
		g := account.gateway(nil)
		g.mustLogin(t, "bob")
		sweep := func() {
			t.Helper()
			if err := g.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
		}
		sweep() // no stop yet: the tasks may be part of a start
		if live := account.cloud.Live(); !slices.Equal(live, []string{"alice+old", "bob+default"}) {
			t.Errorf("live %v", live)
		}
		time.Sleep(10 * time.Minute)
		sweep()
		account.live("bob")
		sweep()
		time.Sleep(groupIdle)
		sweep()
		if left := account.groups(); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// TestProfileMoved: if a profile's cluster is changed, a task in the old cluster runs
// until its maximum life.
func TestProfileMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		account.gateway(nil).mustLogin(t, "alice")
		moved := account.dialer(&bastion.Memory{}, func(l *Launcher) { l.Cluster = "new" })
		moved.Profiles["other"] = bastion.Profile{Launcher: account.dialer(&bastion.Memory{}, func(l *Launcher) { l.Profile = "other" }).launcher}
		account.cloud.AddCluster("new")
		for range 11 {
			time.Sleep(time.Hour)
			if err := moved.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			account.live("alice")
		}
		time.Sleep(2 * time.Hour)
		if err := moved.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		account.live()
	})
}

// TestSweepCalls: a sweep lists the tasks once for all profiles, not once for each.
func TestSweepCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(nil)
		for i := range 10 {
			name := fmt.Sprintf("profile%d", i)
			other := account.dialer(g.Ledger, func(l *Launcher) { l.Profile = name }).launcher
			other.Cloud = g.launcher.Cloud
			g.Profiles[name] = bastion.Profile{Launcher: other, ProfileOptions: bastion.ProfileOptions{MaxLife: time.Hour}}
		}
		task := g.mustLogin(t, "alice")
		time.Sleep(time.Minute)
		before := len(account.cloud.Calls())
		if err := g.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		if calls := account.calls(before); calls["ecs:ListTasks"] != 1 || calls["ecs:DescribeTasks"] != 1 || calls["ec2:DescribeSecurityGroups"] != 1 {
			t.Errorf("calls %v", calls)
		}
		// A Stop invalidates the listing, so List does not return the task.
		account.cloud.Set(func() { account.cloud.ListLag = 0 })
		if err := g.launcher.Stop(t.Context(), alice.Owner, task.ID); err != nil {
			t.Error(err)
		}
		if found, err := g.launcher.List(t.Context()); err != nil || len(found) != 0 {
			t.Errorf("after a stop: %v, %v", found, err)
		}
	})
}

// TestShorterMaxLife: if MaxLife is shortened, a running bastion with an older,
// longer MaxLife is not stopped: its agent stops it.
func TestShorterMaxLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		task := account.gateway(nil).mustLogin(t, "alice")
		time.Sleep(30 * time.Minute)
		second := account.dialer(&bastion.Memory{}, nil)
		profile := second.Profiles["default"]
		profile.MaxLife = time.Minute
		second.Profiles["default"] = profile
		if err := errors.Join(second.Adopt(t.Context()), second.Sweep(t.Context())); err != nil {
			t.Fatal(err)
		}
		if again := second.mustLogin(t, "alice"); again.ID != task.ID {
			t.Error("the bastion was stopped")
		}
	})
}

// TestSweep stops orphaned bastions, and none in use.
func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(nil)
		g.mustLogin(t, "alice")
		// Bob's task runs, and the ledger has it as ended, as after a
		// gateway was disconnected from AWS.
		lost, err := g.launcher.Launch(t.Context(), bastion.Launch{Owner: bastion.Owner{User: "bob", Profile: "default"}, Generation: 1})
		if err != nil {
			t.Fatal(err)
		}
		owner := bastion.Owner{User: "bob", Profile: "default"}
		if _, err := g.Ledger.Swap(t.Context(), owner, bastion.Entry{}, bastion.Entry{Generation: 2, State: bastion.Idle}); err != nil {
			t.Fatal(err)
		}
		if err := g.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		account.live("alice", "bob")
		time.Sleep(11 * time.Minute)
		if err := g.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		account.live("alice")
		if err := g.launcher.Alive(t.Context(), owner, lost.ID); !errors.Is(err, bastion.ErrGone) {
			t.Errorf("bob's task: %v, want ErrGone", err)
		}
		time.Sleep(12*time.Hour + 10*time.Minute) // these agents do not exit by themselves
		if err := g.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		account.live()
		if task := g.mustLogin(t, "alice"); task.Generation != 2 {
			t.Errorf("generation %d", task.Generation)
		}
	})
}
