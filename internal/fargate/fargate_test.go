package fargate

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// TestStart counts what a start and a login to what runs cost.
func TestStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.gateway(nil)
		before := len(w.cloud.Calls())
		began := time.Now()
		task := g.mustLogin(t, "alice")
		// The agent listens at 20.5 s.
		if took := time.Since(began); took > 20800*time.Millisecond {
			t.Errorf("took %v", took)
		}
		calls := w.calls(before)
		if calls["ecs:RunTask"] != 1 || calls["ecs:DescribeTasks"] > 22 || len(calls) != 2 {
			t.Errorf("calls %v", calls)
		}
		if task.HostKey == nil || task.Generation != 1 {
			t.Errorf("task %+v", task)
		}
		before = len(w.cloud.Calls())
		if again := g.mustLogin(t, "alice"); again.ID != task.ID {
			t.Errorf("then %s", again.ID)
		}
		if calls := w.calls(before); len(calls) != 0 {
			t.Errorf("a login to a bastion that runs made calls: %v", calls)
		}
		w.live("alice")
	})
}

// TestStopAtOnce: a task that was started a moment ago, and that ECS does not know
// yet, is stopped when Stop returns.
func TestStopAtOnce(t *testing.T) {
	for _, unknown := range []time.Duration{0, time.Second, 3 * time.Second, 20 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.end()
			w.cloud.MissingFor = unknown
			g := w.gateway(nil)
			in, admitted := g.launcher.request(alice, ""), false
			task, err := g.launcher.runTask(t.Context(), in, &admitted)
			if err != nil {
				t.Fatal(err)
			}
			if err := g.launcher.Stop(t.Context(), alice.Owner, aws.ToString(task.TaskArn)); err != nil {
				t.Error(err)
			}
			w.live()
		})
	}
}

// TestStopLater: a task that ECS has forgotten is known to have ended within
// seconds, and one answer that it is missing does not count for long.
func TestStopLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.gateway(nil)
		task := g.mustLogin(t, "alice")
		w.cloud.StopAll("EssentialContainerExited", "")
		time.Sleep(2 * time.Hour)
		began := time.Now()
		if err := g.launcher.Stop(t.Context(), alice.Owner, task.ID); err != nil {
			t.Error(err)
		}
		if err := g.launcher.Alive(t.Context(), alice.Owner, task.ID); !errors.Is(err, bastion.ErrGone) {
			t.Error(err)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("took %v", took)
		}
		time.Sleep(time.Hour)
		for range 2 {
			if _, err := g.launcher.describe(t.Context(), task.ID); !errors.Is(err, errMissing) || errors.Is(err, bastion.ErrGone) {
				t.Errorf("after one answer: %v", err)
			}
			time.Sleep(90 * time.Second)
		}
	})
}

// TestNoAnswer: a call that is never answered is made again.
func TestNoAnswer(t *testing.T) {
	for _, action := range []string{"ecs:ListTasks", "ecs:RunTask", "ecs:DescribeTasks", "ecs:StopTask",
		"ec2:DescribeSubnets", "ec2:DescribeSecurityGroups", "ec2:CreateSecurityGroup", "ec2:RevokeSecurityGroupEgress"} {
		t.Run(action, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.end()
				w.cloud.OnCall = onCall(action, 2, awsfake.Fault{Delay: 24 * time.Hour})
				began := time.Now()
				g := w.gateway(isolated)
				task := g.mustLogin(t, "alice")
				if _, err := g.Stop(t.Context(), alice.Owner, "a test"); err != nil {
					t.Errorf("stopping %s: %v", task.ID, err)
				}
				w.live()
				if took := time.Since(began); took > time.Minute {
					t.Errorf("took %v", took)
				}
			})
		})
	}
}

// TestDeletionHangs: while the deletion of a group is not answered, its owner does
// not wait for longer than she has time.
func TestDeletionHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.gateway(isolated)
		g.mustLogin(t, "alice")
		if _, err := g.Stop(t.Context(), alice.Owner, "a test"); err != nil {
			t.Fatal(err)
		}
		if err := g.launcher.Cloud.Sweep(t.Context(), g.launcher); err != nil {
			t.Fatal(err)
		}
		time.Sleep(groupIdle + time.Minute)
		w.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
			if c.Action == "ec2:DeleteSecurityGroup" {
				return awsfake.Fault{Delay: 24 * time.Hour}
			}
			return awsfake.Fault{}
		}
		swept := make(chan error)
		go func() { swept <- g.launcher.Cloud.Sweep(t.Context(), g.launcher) }()
		time.Sleep(time.Second)
		short, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		began := time.Now()
		if _, err := g.launcher.Launch(short, bastion.Launch{Owner: alice.Owner, Generation: 2}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with five seconds: %v", err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("with five seconds: took %v", took)
		}
		g.mustLogin(t, "alice")
		if took := time.Since(began); took > 2*time.Minute {
			t.Errorf("took %v", took)
		}
		if err := <-swept; err == nil {
			t.Error("the sweep has not noticed")
		}
	})
}

// TestOtherCluster: the ledger knows tasks of a cluster, or a Region, that the
// configuration named before. They are gone, and nobody else is kept waiting.
func TestOtherCluster(t *testing.T) {
	for _, arn := range []string{
		"arn:aws:ecs:eu-west-1:123456789012:task/old/0123456789abcdef0123456789abcdef",
		"arn:aws:ecs:eu-north-1:123456789012:task/sallyport/0123456789abcdef0123456789abcdef",
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.end()
			ledger := &bastion.Memory{}
			g := w.dialer(ledger, nil)
			for i := range 5 {
				old := bastion.Task{ID: fmt.Sprintf("%s%d", arn[:len(arn)-1], i), Generation: 1, Addr: "10.0.9.9:2022"}
				if _, err := ledger.Swap(t.Context(), bastion.Owner{User: user(i), Profile: "default"}, bastion.Entry{}, bastion.Entry{Generation: 1, State: bastion.Running, Task: old}); err != nil {
					t.Fatal(err)
				}
			}
			if n := loginAll(t, g, 0, 20); n > 0 {
				t.Errorf("%d of 20 failed", n)
			}
			if calls := w.calls(0)["ecs:DescribeTasks"]; calls > 60 {
				t.Errorf("%d calls of DescribeTasks", calls)
			}
		})
	}
}

// TestStopInOtherCluster: what runs in the cluster of before is stopped there; if
// there is no such cluster, nothing runs.
func TestStopInOtherCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		task := w.gateway(nil).mustLogin(t, "alice")
		other := w.dialer(&bastion.Memory{}, func(l *Launcher) { l.Cluster = "new" }).launcher
		if err := other.Stop(t.Context(), alice.Owner, task.ID); err != nil {
			t.Error(err)
		}
		w.live()
		if err := other.Stop(t.Context(), alice.Owner, strings.Replace(task.ID, "task/sallyport/", "task/deleted/", 1)); err != nil {
			t.Error(err)
		}
	})
}

// TestMissingInARow: answers that a task is missing count only until one says that
// it is there.
func TestMissingInARow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.gateway(nil)
		task := g.mustLogin(t, "alice")
		time.Sleep(2 * missingFor)
		defer w.cloud.Set(func() { w.cloud.MissingFor = 0 })
		for range 3 {
			w.cloud.Set(func() { w.cloud.MissingFor = time.Hour })
			for i := range missingAnswers - 1 {
				if _, err := g.launcher.describe(t.Context(), task.ID); !errors.Is(err, errMissing) || errors.Is(err, bastion.ErrGone) {
					t.Errorf("answer %d: %v", i+1, err)
				}
			}
			w.cloud.Set(func() { w.cloud.MissingFor = 0 })
			if _, err := g.launcher.describe(t.Context(), task.ID); err != nil {
				t.Error(err)
			}
		}
		w.cloud.Set(func() { w.cloud.MissingFor = time.Hour })
		if _, err := g.launcher.find(t.Context(), task.ID); !errors.Is(err, bastion.ErrGone) {
			t.Errorf("in the end: %v", err)
		}
	})
}

// TestTokenOfAnother: the task that a conflict names is taken only if its agent was
// given this owner's principal.
func TestTokenOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.gateway(nil)
		in := g.launcher.request(alice, "")
		in.Overrides.ContainerOverrides[0].Environment = in.Overrides.ContainerOverrides[0].Environment[:1] // the owner
		in.Tags = nil
		if _, err := g.launcher.Cloud.run.RunTask(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		task, err := g.launcher.Launch(t.Context(), alice)
		w.must(err, bastion.ErrConfig)
		if task.ID != "" || task.Addr != "" {
			t.Errorf("got %+v", task)
		}
	})
}
