package fargate

import (
	"maps"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

// TestMorning: a thousand users connect at nine o'clock. AWS documents 100 launches
// at once, and 20 a second after that, so the last cannot start before 45 s. In one
// place it also documents 20 calls of RunTask at once, so that the hundred could be
// had only by calls that start several; then it is 49 s.
func TestMorning(t *testing.T) {
	users, seeds := 1000, uint64(2)
	if raceEnabled {
		users, seeds = 300, 1 // the race detector makes handshakes slow
	}
	withCalls := maps.Clone(awsfake.Documented)
	withCalls["run"] = awsfake.DocumentedRunTask
	for name, tt := range map[string]struct {
		buckets map[string]awsfake.Bucket
		burst   int
		refused int                                       // calls at most
		most    func(allowed time.Duration) time.Duration // that it may take
	}{
		"launches": {awsfake.Documented, 100, users / 50, func(allowed time.Duration) time.Duration { return allowed * 11 / 10 }},
		// The first refusals halve the pace, which grows again by one a second.
		"calls": {withCalls, 20, launchBurst - 20 + users/50, func(allowed time.Duration) time.Duration { return allowed + 4*time.Second }},
	} {
		t.Run(name, func(t *testing.T) {
			forSeeds(t, seeds, func(t *testing.T, w *world, rng *rand.Rand) {
				allowed := time.Duration(users-tt.burst) * time.Second / 20
				w.cloud.Buckets = tt.buckets
				fixed := newWorld(t)
				reporting := w.cloud.Times.Reporting // nobody waits for it
				w.cloud.Times, w.agents.boot = fixed.cloud.Times, fixed.agents.boot
				w.cloud.Times.Reporting = reporting
				const boot = 20500 * time.Millisecond // as newWorld has it
				g := w.gateway(nil)
				before := len(w.cloud.Calls())
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
				w.live(want...)

				refused := 0
				for _, c := range w.cloud.Calls()[before:] {
					if c.Refused != "" {
						refused++
					}
				}
				calls := w.calls(before)
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
