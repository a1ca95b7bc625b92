package fargate

import (
	"testing"
	"testing/synctest"
	"time"
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
