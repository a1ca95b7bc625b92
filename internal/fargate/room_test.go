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

// loginAll has users from..from+n-1 log in at once, and returns how many could
// not.
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

// TestRoomElsewhere: Spot, or one zone, or two of three, are full. No user who has
// a second attempt where there is room notices, whoever else comes.
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
			forSeeds(t, seeds()/5, func(t *testing.T, w *world, rng *rand.Rand) {
				g := w.gateway(func(l *Launcher) { l.Spot = tt.spot })
				w.cloud.OnLaunch = func(l awsfake.Launch) awsfake.Fate {
					if tt.full(l) {
						return awsfake.Fate{Failure: tt.why}
					}
					return awsfake.Fate{}
				}
				if n := loginAll(t, g, 0, many); n > many*tt.most/100 {
					t.Errorf("together: %d of %d failed", n, many)
				}
				// Whoever failed is in a zone with room the next time.
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

// TestTurnedAway: a bastion of which the gateway knows only that it was asked for
// is not given up because the Region has become full. Nor does a profile that wants
// Spot take that for Spot's quota, of which it has not heard.
func TestTurnedAway(t *testing.T) {
	for name, fate := range map[string]awsfake.Fate{
		"capacity":       {FailIn: "PROVISIONING", Reason: awsfake.NoCapacity},
		"quota":          {FailIn: "PROVISIONING", Reason: awsfake.NoVCPU},
		"quota, at once": {Failure: awsfake.NoVCPU},
	} {
		for _, spot := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, spot %v", name, spot), func(t *testing.T) {
				perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
					g := w.gateway(func(l *Launcher) { l.Spot = spot })
					w.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
						return awsfake.Fault{LoseReply: c.Action == "ecs:RunTask"}
					}
					if _, err := g.login(t.Context(), "alice"); err == nil {
						t.Fatal("logged in")
					}
					w.live("alice")
					w.cloud.Set(func() {
						w.cloud.OnCall = nil
						w.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate { return fate }
					})
					loginAll(t, g, 0, 30)
					if err := g.launcher.breaker.admit(g.launcher.Subnets); err == nil {
						t.Fatal("the breaker is not open")
					}
					var log bytes.Buffer
					g.launcher.Cloud.Log = slog.New(slog.NewTextHandler(&log, nil))
					before := w.calls(0)["ecs:RunTask"]
					_, err := g.login(t.Context(), "alice")
					if n := w.calls(0)["ecs:RunTask"] - before; err == nil || n > 0 || strings.Contains(log.String(), "Spot") {
						t.Errorf("%d calls, %v, %s", n, err, log.String())
					}
					w.cloud.Set(func() { w.cloud.OnLaunch = nil })
					time.Sleep(2 * breakMax)
					if task := g.mustLogin(t, "alice"); task.Generation != 1 {
						t.Errorf("generation %d", task.Generation)
					}
					w.live("alice")
				})
			})
		}
	}
}

// TestTryIsThrottled: the launch that finds out whether there is room again is
// refused for another reason first, and goes on.
func TestTryIsThrottled(t *testing.T) {
	for name, fault := range map[string]awsfake.Fault{"throttled": awsfake.Throttled, "broken": awsfake.Broken, "lost": {LoseReply: true}} {
		t.Run(name, func(t *testing.T) {
			perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
				g := w.gateway(nil)
				w.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate { return awsfake.Fate{Failure: awsfake.NoCapacity} }
				loginAll(t, g, 0, 30)
				if err := g.launcher.breaker.admit(g.launcher.Subnets); err == nil {
					t.Fatal("the breaker is not open")
				}
				w.cloud.Set(func() { w.cloud.OnLaunch = nil })
				time.Sleep(2 * breakMax)
				var failed atomic.Int64
				most := 1 + rng.Int64N(8)
				w.cloud.Set(func() {
					w.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
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

// TestSecondAttemptAfterReplays: a restarted gateway comes upon generations that
// are used up before it meets a zone without room; the second attempt is a
// generation that is not used up.
func TestSecondAttemptAfterReplays(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		before := int64(1 + rng.IntN(4))
		for generation := range before {
			task := w.dialer(&bastion.Memory{}, nil).mustLogin(t, "alice")
			if task.Generation != generation+1 {
				t.Fatalf("generation %d", task.Generation)
			}
			w.cloud.StopAll("EssentialContainerExited", "Essential container in task exited")
			time.Sleep(time.Minute)
		}
		launches := 0
		w.cloud.Set(func() {
			w.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate {
				if launches++; launches == 1 {
					return awsfake.Fate{Failure: awsfake.NoCapacity}
				}
				return awsfake.Fate{}
			}
		})
		if task := w.gateway(nil).mustLogin(t, "alice"); task.Generation != before+2 {
			t.Errorf("generation %d after %d", task.Generation, before)
		}
		w.live("alice")
	})
}
