package fargate

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// loginAll logs users from..from+n-1 in at once, and returns the number of failed
// logins.
func loginAll(t *testing.T, g gateway, from, n int) int {
	var failed atomic.Int64
	var users sync.WaitGroup
	for i := range n {
		users.Go(func() {
			if _, err := g.login(t.Context(), user(from+i)); err != nil && failed.Add(1) == 1 {
				t.Logf("%s: %v", user(from+i), err)
			}
		})
	}
	users.Wait()
	return int(failed.Load())
}

// TestRoomElsewhere: Spot, or one zone, or two of three, have no capacity. If the
// second attempt of a launch is in a zone with capacity, the login succeeds, also
// with many logins at once.
func TestRoomElsewhere(t *testing.T) {
	many := 100
	if raceEnabled {
		many = 40
	}
	for name, tt := range map[string]struct {
		spot bool
		full func(awsfake.Launch) bool
		why  string
		most int // failures in a hundred, at the first attempt to log in
	}{
		"spot":       {true, func(l awsfake.Launch) bool { return l.Spot }, awsfake.NoCapacity, 0},
		"spot quota": {true, func(l awsfake.Launch) bool { return l.Spot }, awsfake.NoVCPU, 0},
		"zone":       {false, func(l awsfake.Launch) bool { return l.Subnet == awsfake.Subnets[0] }, awsfake.NoCapacity, 0},
		"two zones":  {false, func(l awsfake.Launch) bool { return l.Subnet != awsfake.Subnets[0] }, awsfake.NoCapacity, 45},
	} {
		t.Run(name, func(t *testing.T) {
			forSeeds(t, crowdSeeds(), func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
				g := account.gateway(func(l *Launcher) { l.Spot = tt.spot })
				account.cloud.Set(func() {
					account.cloud.OnLaunch = func(l awsfake.Launch) awsfake.Fate {
						if tt.full(l) {
							return awsfake.Fate{Failure: tt.why}
						}
						return awsfake.Fate{}
					}
				})
				if n := loginAll(t, g, 0, many); n > many*tt.most/100 {
					t.Errorf("together: %d of %d failed", n, many)
				}
				// The next generation is in a zone with capacity.
				if n := loginAll(t, g, 0, many); n > 0 {
					t.Errorf("again: %d of %d failed", n, many)
				}
				failed := 0
				for i := range 30 {
					time.Sleep(2 * time.Minute)
					failed += loginAll(t, g, 100+i, 1)
				}
				if failed > tt.most*30/100 {
					t.Errorf("one every two minutes: %d of 30 failed", failed)
				}
			})
		})
	}
}

// TestTurnedAway: if the reply to RunTask was lost, its generation is kept while the
// breaker is open, and the task is found once the breaker closes. With Spot, an open
// breaker is not logged as an exhausted Spot quota.
func TestTurnedAway(t *testing.T) {
	for name, fate := range map[string]awsfake.Fate{
		"capacity":       {FailIn: "PROVISIONING", Reason: awsfake.NoCapacity},
		"quota":          {FailIn: "PROVISIONING", Reason: awsfake.NoVCPU},
		"quota, at once": {Failure: awsfake.NoVCPU},
	} {
		for _, spot := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, spot %v", name, spot), func(t *testing.T) {
				perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
					g := account.gateway(func(l *Launcher) { l.Spot = spot })
					account.cloud.Set(func() {
						account.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
							return awsfake.Fault{LoseReply: c.Action == "ecs:RunTask"}
						}
					})
					if _, err := g.login(t.Context(), "alice"); err == nil {
						t.Fatal("logged in")
					}
					account.live("alice")
					account.cloud.Set(func() {
						account.cloud.OnCall = nil
						account.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate { return fate }
					})
					loginAll(t, g, 0, 30)
					if err := g.launcher.breaker.admit(g.launcher.Subnets); err == nil {
						t.Fatal("the breaker is not open")
					}
					var log bytes.Buffer
					g.launcher.Cloud.Log = slog.New(slog.NewTextHandler(&log, nil))
					before := account.calls(0)["ecs:RunTask"]
					_, err := g.login(t.Context(), "alice")
					if n := account.calls(0)["ecs:RunTask"] - before; err == nil || n > 0 || strings.Contains(log.String(), "Spot") {
						t.Errorf("%d calls, %v, %s", n, err, log.String())
					}
					account.cloud.Set(func() { account.cloud.OnLaunch = nil })
					time.Sleep(2 * maxPause)
					if task := g.mustLogin(t, "alice"); task.Generation != 1 {
						t.Errorf("generation %d", task.Generation)
					}
					account.live("alice")
				})
			})
		}
	}
}

// TestTryIsThrottled: if the breaker's probe is throttled, or fails for another
// reason than capacity, the launch retries it and succeeds.
func TestTryIsThrottled(t *testing.T) {
	for name, fault := range map[string]awsfake.Fault{"throttled": awsfake.Throttled, "broken": awsfake.Broken, "lost": {LoseReply: true}} {
		t.Run(name, func(t *testing.T) {
			perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
				g := account.gateway(nil)
				account.cloud.Set(func() {
					account.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate { return awsfake.Fate{Failure: awsfake.NoCapacity} }
				})
				loginAll(t, g, 0, 30)
				if err := g.launcher.breaker.admit(g.launcher.Subnets); err == nil {
					t.Fatal("the breaker is not open")
				}
				account.cloud.Set(func() { account.cloud.OnLaunch = nil })
				time.Sleep(2 * maxPause)
				var failed atomic.Int64
				most := 1 + rng.Int64N(8)
				account.cloud.Set(func() {
					account.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
						if c.Action == "ecs:RunTask" && failed.Add(1) <= most {
							return fault
						}
						return awsfake.Fault{}
					}
				})
				g.mustLogin(t, "zoe")
			})
		})
	}
}

// TestSecondAttemptAfterReplays: a restarted gateway first launches generations that
// have ended already, then a new one in a zone without capacity. The second attempt
// uses the next new generation.
func TestSecondAttemptAfterReplays(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		before := int64(1 + rng.IntN(4))
		for generation := range before {
			task := account.dialer(&bastion.Memory{}, nil).mustLogin(t, "alice")
			if task.Generation != generation+1 {
				t.Fatalf("generation %d", task.Generation)
			}
			account.cloud.StopAll("EssentialContainerExited", "Essential container in task exited")
			time.Sleep(time.Minute)
		}
		launches := 0
		account.cloud.Set(func() {
			account.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate {
				if launches++; launches == 1 {
					return awsfake.Fate{Failure: awsfake.NoCapacity}
				}
				return awsfake.Fate{}
			}
		})
		if task := account.gateway(nil).mustLogin(t, "alice"); task.Generation != before+2 {
			t.Errorf("generation %d after %d", task.Generation, before)
		}
		account.live("alice")
	})
}
