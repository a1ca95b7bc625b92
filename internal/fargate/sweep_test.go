package fargate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// groups returns the security groups that were made.
func (w *world) groups() []string {
	return slices.DeleteFunc(w.cloud.Left(), func(s string) bool { return !strings.HasPrefix(s, "security group") })
}

// launch starts a bastion that nobody logs in to.
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

// TestProfileRemoved: tasks of a profile that there is no more are stopped, and
// those of the others left alone.
func TestProfileRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.dialer(&bastion.Memory{}, func(l *Launcher) { l.Profile = "old"; isolated(l) }).launch(t, "alice")
		g := w.gateway(nil)
		g.mustLogin(t, "bob")
		sweep := func() {
			t.Helper()
			if err := g.launcher.Cloud.Sweep(t.Context(), g.launcher); err != nil {
				t.Error(err)
			}
		}
		sweep() // they might have just started
		if live := w.cloud.Live(); !slices.Equal(live, []string{"alice+old", "bob+default"}) {
			t.Errorf("live %v", live)
		}
		time.Sleep(leftAge)
		sweep()
		w.live("bob")
		sweep()
		time.Sleep(groupIdle)
		sweep()
		if left := w.groups(); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// TestProfileMoved: a task in the cluster of before is left to its owner for as
// long as it may live.
func TestProfileMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.gateway(nil).mustLogin(t, "alice")
		moved := w.dialer(&bastion.Memory{}, func(l *Launcher) { l.Cluster = "new" }).launcher
		other := w.dialer(&bastion.Memory{}, func(l *Launcher) { l.Profile = "other" }).launcher
		w.cloud.AddCluster("new")
		for range 11 {
			time.Sleep(time.Hour)
			if err := moved.Cloud.Sweep(t.Context(), moved, other); err != nil {
				t.Error(err)
			}
			w.live("alice")
		}
		time.Sleep(2 * time.Hour)
		if err := moved.Cloud.Sweep(t.Context(), moved, other); err != nil {
			t.Error(err)
		}
		w.live()
	})
}

// TestIsolateTurnedOff: the groups go all the same, and a gateway that never had
// any needs no permission to look for them.
func TestIsolateTurnedOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.gateway(isolated).mustLogin(t, "alice")
		g := w.gateway(nil)
		for range 2 {
			if err := g.launcher.Cloud.Sweep(t.Context(), g.launcher); err != nil {
				t.Error(err)
			}
			time.Sleep(groupIdle)
		}
		if left := w.groups(); len(left) != 1 {
			t.Errorf("a group in use is gone: %v", left)
		}
		if _, err := g.Stop(t.Context(), alice.Owner, "a test"); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := g.launcher.Cloud.Sweep(t.Context(), g.launcher); err != nil {
				t.Error(err)
			}
			time.Sleep(groupIdle)
		}
		if left := w.groups(); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
		w.cloud.Deny("ec2:DescribeSecurityGroups", true)
		if err := g.launcher.Cloud.Sweep(t.Context(), g.launcher); err != nil {
			t.Error(err)
		}
		isolated(g.launcher)
		w.must(g.launcher.Cloud.Sweep(t.Context(), g.launcher), bastion.ErrDenied)
	})
}

// TestSweepCalls: however many profiles there are, a sweep lists the tasks once.
func TestSweepCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.gateway(nil)
		launchers := []*Launcher{g.launcher}
		for i := range 10 {
			name := fmt.Sprintf("profile%d", i)
			other := w.dialer(g.Ledger, func(l *Launcher) { l.Profile = name }).launcher
			other.Cloud = g.launcher.Cloud
			launchers = append(launchers, other)
			g.Profiles[name] = bastion.Profile{Launcher: other, MaxLife: time.Hour}
		}
		task := g.mustLogin(t, "alice")
		time.Sleep(time.Minute)
		before := len(w.cloud.Calls())
		if err := g.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		if err := g.launcher.Cloud.Sweep(t.Context(), launchers...); err != nil {
			t.Error(err)
		}
		if calls := w.calls(before); calls["ecs:ListTasks"] != 1 || calls["ecs:DescribeTasks"] != 1 || calls["ec2:DescribeSecurityGroups"] != 1 {
			t.Errorf("calls %v", calls)
		}
		// What this process has done itself it sees at once, as far as ECS
		// says so.
		w.cloud.Set(func() { w.cloud.ListLag = 0 })
		if err := g.launcher.Stop(t.Context(), alice.Owner, task.ID); err != nil {
			t.Error(err)
		}
		if found, err := g.launcher.List(t.Context()); err != nil || len(found) != 0 {
			t.Errorf("after a stop: %v, %v", found, err)
		}
	})
}

// TestManyGroups: there are more than one answer has room for.
func TestManyGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.gateway(isolated)
		const many = groupsMax + 50
		for i := range many {
			if _, err := g.launcher.makeGroup(t.Context(), bastion.Owner{User: user(i), Profile: "default"}); err != nil {
				t.Fatal(err)
			}
		}
		// Those that are not ours stay.
		api := g.launcher.Cloud.ec2
		for _, tags := range [][]ec2types.Tag{
			nil,
			{{Key: aws.String("sallyport:deployment"), Value: aws.String("prod")}},
			{{Key: aws.String("sallyport:deployment"), Value: aws.String("test")}, {Key: aws.String("sallyport:user"), Value: aws.String("alice")}, {Key: aws.String("sallyport:profile"), Value: aws.String("default")}},
		} {
			in := &ec2.CreateSecurityGroupInput{GroupName: aws.String(fmt.Sprint("other", len(tags))), Description: aws.String("other"), VpcId: aws.String(awsfake.VPC)}
			if tags != nil {
				in.TagSpecifications = []ec2types.TagSpecification{{ResourceType: ec2types.ResourceTypeSecurityGroup, Tags: tags}}
			}
			made, err := api.CreateSecurityGroup(t.Context(), in)
			if err != nil {
				t.Fatal(err)
			}
			defer api.DeleteSecurityGroup(context.Background(), &ec2.DeleteSecurityGroupInput{GroupId: made.GroupId})
		}
		for range 2 {
			if err := g.launcher.Cloud.Sweep(t.Context(), g.launcher); err != nil {
				t.Error(err)
			}
			time.Sleep(groupIdle)
		}
		if left := w.groups(); len(left) != 3 {
			t.Errorf("left %d: %v", len(left), left)
		}
	})
}

// TestDeleteWhileLaunching: a group is not deleted between being looked up and the
// RunTask that names it.
func TestDeleteWhileLaunching(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.gateway(isolated)
		if _, err := g.launcher.makeGroup(t.Context(), alice.Owner); err != nil {
			t.Fatal(err)
		}
		if err := g.launcher.Cloud.Sweep(t.Context(), g.launcher); err != nil {
			t.Error(err)
		}
		time.Sleep(groupIdle)
		w.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
			if c.Action == "ecs:RunTask" {
				return awsfake.Fault{Delay: 5 * time.Second}
			}
			return awsfake.Fault{}
		}
		launched := make(chan error)
		go func() { _, err := g.launcher.Launch(t.Context(), alice); launched <- err }()
		time.Sleep(time.Second)
		if err := g.launcher.Cloud.Sweep(t.Context(), g.launcher); err != nil {
			t.Error(err)
		}
		if n := w.calls(0)["ec2:DeleteSecurityGroup"]; n != 0 {
			t.Error("deleted under a launch")
		}
		if err := <-launched; err != nil {
			t.Error(err)
		}
	})
}

// TestShorterMaxLife: whoever is in a bastion that was told it may live longer
// than its profile says by now is left there; its agent says when it ends.
func TestShorterMaxLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		task := w.gateway(nil).mustLogin(t, "alice")
		time.Sleep(30 * time.Minute)
		second := w.dialer(&bastion.Memory{}, nil)
		profile := second.Profiles["default"]
		profile.MaxLife = time.Minute
		second.Profiles["default"] = profile
		if err := errors.Join(second.Adopt(t.Context()), second.Sweep(t.Context())); err != nil {
			t.Fatal(err)
		}
		if again := second.mustLogin(t, "alice"); again.ID != task.ID {
			t.Error("it was stopped")
		}
	})
}
