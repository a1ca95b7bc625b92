package fargate

import (
	"bytes"
	"context"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// TestLostReply: RunTask launches a task, and its replies are lost.
func TestLostReply(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		account.cloud.OnCall = onCall("ecs:RunTask", 1+rng.IntN(8), awsfake.Fault{LoseReply: true})
		account.gateway(nil).mustLogin(t, "alice")
		account.live("alice")
	})
}

// TestStorms: for up to a minute, nine of ten calls of AWS fail.
func TestStorms(t *testing.T) {
	for name, fault := range map[string]awsfake.Fault{"throttled": awsfake.Throttled, "throttled inside": awsfake.ThrottledInside, "unavailable": awsfake.Unavailable, "broken": awsfake.Broken} {
		t.Run(name, func(t *testing.T) {
			perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
				g := account.gateway(nil)
				began, most := time.Now(), time.Duration(rng.Int64N(int64(time.Minute)))
				account.cloud.Set(func() {
					account.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
						if time.Since(began) < most && rng.IntN(10) > 0 {
							return fault
						}
						return awsfake.Fault{}
					}
				})
				g.mustLogin(t, "alice")
				account.live("alice")
				if calls := account.calls(0); calls["ecs:RunTask"] > 60 {
					t.Errorf("%d calls of RunTask in a minute", calls["ecs:RunTask"])
				}
			})
		})
	}
}

// TestReportedRetry: if RunTask fails again and again, the log has one record of it, also
// before the start is given up. A few failures are not logged.
func TestReportedRetry(t *testing.T) {
	for failures, want := range map[int]int{2: 0, 20: 1} {
		synctest.Test(t, func(t *testing.T) {
			account := newFakeAccount(t)
			defer account.end()
			g := account.gateway(nil)
			var log bytes.Buffer
			g.launcher.Cloud.Log = slog.New(slog.NewTextHandler(&log, nil))
			account.cloud.Set(func() { account.cloud.OnCall = onCall("ecs:RunTask", failures, awsfake.Broken) })
			g.mustLogin(t, "alice")
			if got := strings.Count(log.String(), "trying again"); got != want {
				t.Errorf("%d failures: %d records, want %d: %s", failures, got, want, log.String())
			}
			if want > 0 && !(strings.Contains(log.String(), "owner=alice+default") && strings.Contains(log.String(), "ServerException")) {
				t.Error(log.String())
			}
		})
	}
}

// TestDiesInEachState: a failed launch is retried once, with another generation in
// another zone, unless its error would only repeat, such as ErrImage.
func TestDiesInEachState(t *testing.T) {
	for _, tt := range []struct {
		fate  awsfake.Fate
		want  error
		tries int
	}{
		{awsfake.Fate{Failure: awsfake.NoCapacity}, bastion.ErrCapacity, 2},
		{awsfake.Fate{Failure: awsfake.NoVCPU}, bastion.ErrQuota, 1},
		{awsfake.Fate{FailIn: "PROVISIONING", Reason: awsfake.NoENI}, bastion.ErrPlatform, 2},
		{awsfake.Fate{FailIn: "PENDING", Reason: awsfake.NoImage}, bastion.ErrImage, 1},
		{awsfake.Fate{FailIn: "PENDING", Reason: awsfake.NoSecrets}, bastion.ErrSecrets, 1},
		{awsfake.Fate{FailIn: "PENDING", Reason: awsfake.NoRoute}, bastion.ErrImage, 1},
		{awsfake.Fate{Failure: awsfake.NoTasks}, bastion.ErrQuota, 1},
		{awsfake.Fate{FailIn: "PENDING", Reason: awsfake.NoLogGroup}, bastion.ErrConfig, 1},
		{awsfake.Fate{FailIn: "ACTIVATING", Reason: "CannotStartContainerError: something"}, bastion.ErrGone, 2},
		{awsfake.Fate{FailIn: "RUNNING", Reason: "Essential container in task exited"}, bastion.ErrGone, 2},
	} {
		t.Run(tt.fate.Failure+tt.fate.FailIn+tt.fate.Reason, func(t *testing.T) {
			perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
				account.agents.set(func() { account.agents.boot = func() time.Duration { return time.Minute } }) // later than the failure
				g := account.gateway(nil)
				var subnets []string
				account.cloud.Set(func() {
					account.cloud.OnLaunch = func(l awsfake.Launch) awsfake.Fate {
						subnets = append(subnets, l.Subnet)
						return tt.fate
					}
				})
				_, err := g.login(t.Context(), "alice")
				account.must(err, tt.want)
				if len(subnets) != tt.tries {
					t.Fatalf("launched in %v, want %d launches", subnets, tt.tries)
				}
				if tt.tries > 1 && subnets[0] == subnets[1] {
					t.Errorf("both attempts in %s", subnets[0])
				}
				account.live()
				// Without the fault, the next login starts a bastion.
				account.cloud.Set(func() { account.cloud.OnLaunch = nil })
				account.agents.set(func() { account.agents.boot = func() time.Duration { return time.Second } })
				if task := g.mustLogin(t, "alice"); task.Generation != int64(tt.tries)+1 {
					t.Errorf("generation %d", task.Generation)
				}
				account.live("alice")
			})
		})
	}
}

// TestSpotQuota: the Spot quota is exhausted, which ECS reports in one of three ways.
// The bastion is started on demand, unless that quota is exhausted, too.
func TestSpotQuota(t *testing.T) {
	for name, fate := range map[string]awsfake.Fate{
		"failure": {Failure: awsfake.NoVCPU},
		"stopped": {FailIn: "PROVISIONING", Reason: awsfake.NoVCPU},
		"error":   {},
	} {
		t.Run(name, func(t *testing.T) {
			perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
				g := account.gateway(func(l *Launcher) { l.Spot = true })
				both := false
				var spot []bool
				account.cloud.Set(func() {
					account.cloud.OnLaunch = func(l awsfake.Launch) awsfake.Fate {
						spot = append(spot, l.Spot)
						if l.Spot || both {
							return fate
						}
						return awsfake.Fate{}
					}
				})
				account.cloud.Set(func() {
					account.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
						if name == "error" && c.Action == "ecs:RunTask" && (c.N == 1 || both) {
							return awsfake.Fault{Status: 400, Code: "ClientException", Message: awsfake.NoVCPU}
						}
						return awsfake.Fault{}
					}
				})
				g.mustLogin(t, "alice")
				account.live("alice")
				if n := len(spot); spot[n-1] || n > 2 || account.calls(0)["ecs:RunTask"] != 2 {
					t.Errorf("launched with Spot %v, in %d calls", spot, account.calls(0)["ecs:RunTask"])
				}
				account.cloud.Set(func() { both, spot = true, nil })
				_, err := g.login(t.Context(), "bob")
				account.must(err, bastion.ErrQuota)
				if n := account.calls(0)["ecs:RunTask"]; n != 4 {
					t.Errorf("%d calls, want two for each of the two", n)
				}
				account.live("alice")
			})
		})
	}
}

// TestStoppedFromOutside: if AWS stops a bastion's task, as for a Spot interruption,
// the next login starts another.
func TestStoppedFromOutside(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		g := account.gateway(nil)
		g.mustLogin(t, "alice")
		time.Sleep(time.Duration(rng.Int64N(int64(3 * time.Hour))))
		account.cloud.StopAll("SpotInterruption", "Your Spot Task was interrupted.")
		time.Sleep(time.Duration(rng.Int64N(int64(3 * time.Hour)))) // long after, ECS has forgotten it
		if task := g.mustLogin(t, "alice"); task.Generation != 2 {
			t.Errorf("generation %d", task.Generation)
		}
		account.live("alice")
	})
}

// TestNoAddress: if a task never has an address, the start times out and its task is
// stopped.
func TestNoAddress(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		g := account.gateway(nil)
		account.cloud.Set(func() {
			account.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate { return awsfake.Fate{NoAddress: true} }
		})
		began := time.Now()
		_, err := g.login(t.Context(), "alice")
		account.must(err, bastion.ErrTimeout)
		if took := time.Since(began); took > 6*time.Minute {
			t.Errorf("gave up after %v", took)
		}
		account.live()
		account.cloud.Set(func() { account.cloud.OnLaunch = nil })
		g.mustLogin(t, "alice")
		account.live("alice")
	})
}

// TestNobodyListens: if a task has an address but its agent does not listen, the start
// times out and its task is stopped.
func TestNobodyListens(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		g := account.gateway(nil)
		account.agents.set(func() { account.agents.boot = func() time.Duration { return time.Hour } })
		_, err := g.login(t.Context(), "alice")
		account.must(err, bastion.ErrTimeout)
		account.live()
	})
}

// TestWrongHostKey: if another host key is presented at the bastion's address, the
// login fails and the task is stopped.
func TestWrongHostKey(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		g := account.gateway(nil)
		g.mustLogin(t, "alice")
		other := sshtest.NewKey(t)
		account.agents.set(func() { account.agents.shows = func(string) ssh.Signer { return other } })
		_, err := g.login(t.Context(), "alice")
		account.must(err, bastion.ErrHostKey)
		account.live()
		account.agents.set(func() { account.agents.shows = nil })
		if task := g.mustLogin(t, "alice"); task.Generation != 2 {
			t.Errorf("generation %d", task.Generation)
		}
	})
}

// TestDenied: if a permission is missing, the login fails with ErrDenied at once, and
// the error names the action.
func TestDenied(t *testing.T) {
	for _, action := range []string{"ecs:RunTask", "iam:PassRole", "ecs:TagResource", "ecs:DescribeTasks"} {
		synctest.Test(t, func(t *testing.T) {
			account := newFakeAccount(t)
			defer account.end()
			g := account.gateway(nil)
			account.cloud.Deny(action, true)
			began := time.Now()
			_, err := g.login(t.Context(), "alice")
			account.must(err, bastion.ErrDenied)
			if !strings.Contains(err.Error(), action) {
				t.Errorf("%s: not named in the error: %v", action, err)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("%s: took %v", action, took)
			}
			account.live()
			account.cloud.Deny(action, false)
			g.mustLogin(t, "alice")
		})
	}
}

// TestWrongConfiguration: if a resource of the profile does not exist, a login fails
// with ErrConfig and is not retried.
func TestWrongConfiguration(t *testing.T) {
	for name, change := range map[string]func(*Launcher){
		"task definition": func(l *Launcher) { l.TaskDefinition = "other:1" },
		"subnet":          func(l *Launcher) { l.Subnets = []string{"subnet-12345678"} },
		"security group":  func(l *Launcher) { l.SecurityGroups = []string{"sg-12345678"} },
		"container":       func(l *Launcher) { l.Container = "other" },
	} {
		synctest.Test(t, func(t *testing.T) {
			account := newFakeAccount(t)
			defer account.end()
			before := 0
			g := account.gateway(change)
			before = len(account.cloud.Calls())
			_, err := g.login(t.Context(), "alice")
			account.must(err, bastion.ErrConfig)
			if calls := account.calls(before); calls["ecs:RunTask"] != 1 {
				t.Errorf("%s: %v", name, calls)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.dialer(&bastion.Memory{}, func(l *Launcher) { l.Cluster = "other" })
		account.must(g.Adopt(t.Context()), bastion.ErrConfig)
		_, err := g.login(t.Context(), "alice")
		account.must(err, bastion.ErrConfig)
	})
}

// TestWhyEnded: the event of an ended bastion has the reason from ECS.
func TestWhyEnded(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(account *fakeAccount, arn string)
		want error
		text string
	}{
		{"memory", func(account *fakeAccount, arn string) { account.cloud.OutOfMemory(arn) }, bastion.ErrMemory, "container bastion exited with 137"},
		{"Spot", func(account *fakeAccount, arn string) {
			account.cloud.Stop(arn, "TerminationNotice", awsfake.SpotTaken)
		}, bastion.ErrInterrupted, awsfake.SpotTaken},
		{"maintenance", func(account *fakeAccount, arn string) { account.cloud.Stop(arn, "TerminationNotice", awsfake.Retired) }, bastion.ErrMaintenance, awsfake.Retired},
		{"a person", func(account *fakeAccount, arn string) {
			account.cloud.Stop(arn, "UserInitiated", "Task stopped by carol")
		}, bastion.ErrStopped, "carol"},
		{"by itself", func(account *fakeAccount, arn string) { account.agents.idle() }, bastion.ErrGone, "container bastion exited with 0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				account := newFakeAccount(t)
				defer account.end()
				g := account.gateway(nil)
				var events []bastion.Event
				g.Event = func(e bastion.Event) { events = append(events, e) }
				task := g.mustLogin(t, "alice")
				time.Sleep(time.Minute)
				owner := bastion.Owner{User: "alice", Profile: "default"}
				short, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				if why := g.WhyEnded(short, owner, task.ID); why != nil {
					t.Errorf("while it runs: %v", why)
				}
				tt.end(account, task.ID)
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				why := g.WhyEnded(ctx, owner, task.ID)
				account.must(why, tt.want)
				account.must(why, bastion.ErrGone)
				time.Sleep(time.Minute)
				account.agents.set(func() { account.agents.over = false })
				g.mustLogin(t, "alice")
				i := slices.IndexFunc(events, func(e bastion.Event) bool { return e.Kind == bastion.Ended })
				if i < 0 || !strings.Contains(events[i].Reason, tt.text) {
					t.Errorf("events %+v, want a reason with %q", events, tt.text)
				}
			})
		})
	}
}
