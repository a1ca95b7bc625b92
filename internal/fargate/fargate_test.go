package fargate

import (
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

// TestStart counts the calls of a start, and of a login to a running bastion.
func TestStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(nil)
		before := len(account.cloud.Calls())
		began := time.Now()
		task := g.mustLogin(t, "alice")
		// The agent listens at 20.5 s.
		if took := time.Since(began); took > 20800*time.Millisecond {
			t.Errorf("took %v", took)
		}
		calls := account.calls(before)
		if calls["ecs:RunTask"] != 1 || calls["ecs:DescribeTasks"] > 22 || len(calls) != 2 {
			t.Errorf("calls %v", calls)
		}
		if task.HostKey == nil || task.Generation != 1 {
			t.Errorf("task %+v", task)
		}
		before = len(account.cloud.Calls())
		if again := g.mustLogin(t, "alice"); again.ID != task.ID {
			t.Errorf("then %s", again.ID)
		}
		if calls := account.calls(before); len(calls) != 0 {
			t.Errorf("a login to a bastion that runs made calls: %v", calls)
		}
		account.live("alice")
	})
}

// TestStopAtOnce: if a task was launched so recently that ECS reports it as missing,
// Stop returns only once it is stopped.
func TestStopAtOnce(t *testing.T) {
	for _, unknown := range []time.Duration{0, time.Second, 3 * time.Second, 20 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			account := newFakeAccount(t)
			defer account.end()
			account.cloud.MissingFor = unknown
			g := account.gateway(nil)
			in, admitted := g.launcher.request(alice, ""), false
			task, err := g.launcher.runTask(t.Context(), "alice", in, &admitted)
			if err != nil {
				t.Fatal(err)
			}
			if err := g.launcher.Stop(t.Context(), alice.Owner, aws.ToString(task.TaskArn)); err != nil {
				t.Error(err)
			}
			account.live()
		})
	}
}

// TestStopLater: if ECS has forgotten an ended task, Stop and Alive find that within
// seconds. A single response that it is missing is not enough, and expires.
func TestStopLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(nil)
		task := g.mustLogin(t, "alice")
		account.cloud.StopAll("EssentialContainerExited", "")
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

// TestNoAnswer: a call without a response is retried after a timeout.
func TestNoAnswer(t *testing.T) {
	for _, action := range []string{"ecs:ListTasks", "ecs:RunTask", "ecs:DescribeTasks", "ecs:StopTask",
		"ec2:DescribeSubnets", "ec2:DescribeSecurityGroups", "ec2:CreateSecurityGroup", "ec2:RevokeSecurityGroupEgress"} {
		t.Run(action, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				account := newFakeAccount(t)
				defer account.end()
				account.cloud.OnCall = onCall(action, 2, awsfake.Fault{Delay: 24 * time.Hour})
				began := time.Now()
				g := account.gateway(isolated)
				task := g.mustLogin(t, "alice")
				if _, err := g.Stop(t.Context(), alice.Owner, "a test"); err != nil {
					t.Errorf("stopping %s: %v", task.ID, err)
				}
				account.live()
				if took := time.Since(began); took > time.Minute {
					t.Errorf("took %v", took)
				}
			})
		})
	}
}

// TestOtherCluster: if the ledger has tasks of a cluster or a Region of an earlier
// configuration, they count as ended, and do not delay the logins of other users.
func TestOtherCluster(t *testing.T) {
	for _, arn := range []string{
		"arn:aws:ecs:eu-west-1:123456789012:task/old/0123456789abcdef0123456789abcdef",
		"arn:aws:ecs:eu-north-1:123456789012:task/sallyport/0123456789abcdef0123456789abcdef",
	} {
		synctest.Test(t, func(t *testing.T) {
			account := newFakeAccount(t)
			defer account.end()
			ledger := &bastion.Memory{}
			g := account.dialer(ledger, nil)
			for i := range 5 {
				old := bastion.Task{ID: fmt.Sprintf("%s%d", arn[:len(arn)-1], i), Generation: 1, Addr: "10.0.9.9:2022"}
				if _, err := ledger.Swap(t.Context(), bastion.Owner{User: user(i), Profile: "default"}, bastion.Entry{}, bastion.Entry{Generation: 1, State: bastion.Running, Task: old}); err != nil {
					t.Fatal(err)
				}
			}
			if n := loginAll(t, g, 0, 20); n > 0 {
				t.Errorf("%d of 20 failed", n)
			}
			if calls := account.calls(0)["ecs:DescribeTasks"]; calls > 60 {
				t.Errorf("%d calls of DescribeTasks", calls)
			}
		})
	}
}

// TestStopInOtherCluster: Stop stops a task in the cluster of its ARN, not in the
// configured one. If that cluster does not exist, Stop succeeds.
func TestStopInOtherCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		task := account.gateway(nil).mustLogin(t, "alice")
		other := account.dialer(&bastion.Memory{}, func(l *Launcher) { l.Cluster = "new" }).launcher
		if err := other.Stop(t.Context(), alice.Owner, task.ID); err != nil {
			t.Error(err)
		}
		account.live()
		if err := other.Stop(t.Context(), alice.Owner, strings.Replace(task.ID, "task/sallyport/", "task/deleted/", 1)); err != nil {
			t.Error(err)
		}
	})
}

// TestMissingInARow: a response with the task resets the count of responses without
// it.
func TestMissingInARow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(nil)
		task := g.mustLogin(t, "alice")
		time.Sleep(2 * missingFor)
		defer account.cloud.Set(func() { account.cloud.MissingFor = 0 })
		for range 3 {
			account.cloud.Set(func() { account.cloud.MissingFor = time.Hour })
			for i := range missingAnswers - 1 {
				if _, err := g.launcher.describe(t.Context(), task.ID); !errors.Is(err, errMissing) || errors.Is(err, bastion.ErrGone) {
					t.Errorf("answer %d: %v", i+1, err)
				}
			}
			account.cloud.Set(func() { account.cloud.MissingFor = 0 })
			if _, err := g.launcher.describe(t.Context(), task.ID); err != nil {
				t.Error(err)
			}
		}
		account.cloud.Set(func() { account.cloud.MissingFor = time.Hour })
		if _, err := g.launcher.find(t.Context(), task.ID); !errors.Is(err, bastion.ErrGone) {
			t.Errorf("got %v, want ErrGone", err)
		}
	})
}

// TestTokenOfAnother: if RunTask fails because the client token is in use, the task
// named in the error is returned only if its environment has this owner's principal.
func TestTokenOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(nil)
		in := g.launcher.request(alice, "")
		in.Overrides.ContainerOverrides[0].Environment = in.Overrides.ContainerOverrides[0].Environment[:1] // the owner
		in.Tags = nil
		if _, err := g.launcher.Cloud.run.RunTask(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		task, err := g.launcher.Launch(t.Context(), alice)
		account.must(err, bastion.ErrConfig)
		if task.ID != "" || task.Addr != "" {
			t.Errorf("got %+v", task)
		}
	})
}
