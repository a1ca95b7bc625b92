package fargate

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

// TestMorning: a thousand users connect at nine o'clock. AWS documents 100 launches
// at once, and 20 a second after that, so the last cannot start before 45 s.
func TestMorning(t *testing.T) {
	users := 1000
	if raceEnabled {
		users = 300 // the race detector makes handshakes slow
	}
	allowed := time.Duration(users-100) * time.Second / 20
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.cloud.Buckets = awsfake.Documented
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
		if took > allowed*11/10 {
			t.Errorf("took %v, want at most 1.1 x %v", took, allowed)
		}
		if refused > users/50 {
			t.Errorf("%d calls were throttled", refused)
		}
		if calls["ecs:RunTask"] > users+refused {
			t.Errorf("%d calls of RunTask", calls["ecs:RunTask"])
		}
	})
}
