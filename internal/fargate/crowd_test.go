package fargate

import (
	"errors"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// TestManyUsers: 200 users connect at once, with a quota of 20 launches a second.
func TestManyUsers(t *testing.T) {
	forSeeds(t, crowdSeeds(), func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		account.cloud.Buckets = map[string]awsfake.Bucket{"launch": {Burst: 20, Rate: 20}, "modify": {Burst: 100, Rate: 40}, "read": {Burst: 100, Rate: 20}}
		g := account.gateway(nil)
		var users sync.WaitGroup
		var want []string
		for i := range 200 {
			want = append(want, user(i))
			users.Go(func() {
				if _, err := g.login(t.Context(), user(i)); err != nil {
					t.Error(err)
				}
			})
		}
		users.Wait()
		account.live(want...)
	})
}

// TestFullRegion: if the Region has no capacity, many waiting users cause few calls
// of RunTask, and each login fails with ErrCapacity.
func TestFullRegion(t *testing.T) {
	many := 300
	if raceEnabled {
		many = 100
	}
	forSeeds(t, crowdSeeds(), func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		g := account.gateway(nil)
		account.cloud.Set(func() {
			account.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate { return awsfake.Fate{Failure: awsfake.NoCapacity} }
		})
		began := time.Now()
		var users sync.WaitGroup
		for i := range many {
			users.Go(func() {
				for time.Since(began) < 10*time.Minute { // as a user who retries by hand
					_, err := g.login(t.Context(), user(i))
					if !errors.Is(err, bastion.ErrCapacity) {
						t.Errorf("%s: %v", user(i), err)
					}
					time.Sleep(20 * time.Second)
				}
			})
		}
		users.Wait()
		// The launches of a burst may all have begun before the first failure
		// returns, and each has a second attempt. After that, only the breaker's
		// probes call RunTask.
		if calls := account.calls(0)["ecs:RunTask"]; calls > 2*launchBurst+40 {
			t.Errorf("%d calls of RunTask in ten minutes", calls)
		} else {
			t.Logf("%d calls of RunTask for %d logins in ten minutes", calls, many*30)
		}
		// Once there is capacity again, all logins succeed.
		account.cloud.Set(func() { account.cloud.OnLaunch = nil })
		for i := range many {
			users.Go(func() {
				for range 30 {
					if _, err := g.login(t.Context(), user(i)); err == nil {
						return
					}
					time.Sleep(20 * time.Second)
				}
				t.Errorf("%s did not get in again", user(i))
			})
		}
		users.Wait()
	})
}

// TestMorning: a thousand users connect at once. AWS documents a burst of 100
// launches, refilled at 20 a second, so the last launch cannot start before 45 s. One
// page also documents a burst of 20 calls of RunTask, each of which may launch
// several tasks. With one task per call, the last starts after 49 s.
func TestMorning(t *testing.T) {
	users := 1000
	if raceEnabled {
		users = 300 // the race detector makes handshakes slow
	}
	withCalls := maps.Clone(awsfake.Documented)
	withCalls["run"] = awsfake.DocumentedRunTask
	for name, tt := range map[string]struct {
		buckets map[string]awsfake.Bucket
		burst   int
		refused int                                       // maximum of throttled calls
		most    func(allowed time.Duration) time.Duration // maximum duration
	}{
		"launches": {awsfake.Documented, 100, users / 50, func(allowed time.Duration) time.Duration { return allowed * 11 / 10 }},
		// The first throttled calls halve the rate, which then increases by one
		// per second, each second.
		"calls": {withCalls, 20, launchBurst - 20 + users/50, func(allowed time.Duration) time.Duration { return allowed + 4*time.Second }},
	} {
		t.Run(name, func(t *testing.T) {
			forSeeds(t, 1, func(t *testing.T, account *fakeAccount, _ *rand.Rand) {
				allowed := time.Duration(users-tt.burst) * time.Second / 20
				account.cloud.Buckets = tt.buckets
				fixed := newFakeAccount(t)
				reporting := account.cloud.Times.Reporting // does not delay a login
				account.cloud.Times, account.agents.boot = fixed.cloud.Times, fixed.agents.boot
				account.cloud.Times.Reporting = reporting
				const boot = 20500 * time.Millisecond // as newFakeAccount has it
				g := account.gateway(nil)
				before := len(account.cloud.Calls())
				began := time.Now()
				var logins sync.WaitGroup
				var want []string
				for i := range users {
					want = append(want, user(i))
					logins.Go(func() {
						if _, err := g.login(t.Context(), user(i)); err != nil {
							t.Error(err)
						}
					})
				}
				logins.Wait()
				took := time.Since(began) - boot
				account.live(want...)

				refused := 0
				for _, c := range account.cloud.Calls()[before:] {
					if c.Refused != "" {
						refused++
					}
				}
				calls := account.calls(before)
				t.Logf("%d users: the last in %v after the earliest possible boot; the buckets allow %v (%.2f x); %d calls of RunTask, %d of DescribeTasks, %d refused",
					users, took.Round(time.Millisecond), allowed, took.Seconds()/allowed.Seconds(), calls["ecs:RunTask"], calls["ecs:DescribeTasks"], refused)
				if most := tt.most(allowed); took > most {
					t.Errorf("took %v, want at most %v", took, most)
				}
				if refused > tt.refused {
					t.Errorf("%d calls were throttled", refused)
				}
				if calls["ecs:RunTask"] > users+refused {
					t.Errorf("%d calls of RunTask", calls["ecs:RunTask"])
				}
			})
		})
	}
}
