package daemon

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"time"
)

// sweep stops orphaned bastions and deletes AWS resources of ended ones, about
// every ten minutes until ctx ends. The first sweep is soon: a listing of ECS may
// be late, and a task that Adopt has missed is adopted then.
func (d *Daemon) sweep(ctx context.Context) {
	for wait := 10 * time.Second; ; wait = 9*time.Minute + rand.N(2*time.Minute) {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		err := safely(func() error { return d.dialer.Sweep(ctx) })
		if err != nil && ctx.Err() == nil {
			d.log.Error("cannot stop all orphaned bastions; trying again in ten minutes", "err", err)
		}
	}
}

// safely calls task and returns a panic in it as an error, so that a periodic task
// cannot end the process.
func safely(task func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return task()
}

// returnMemory returns memory to the system every minute until ctx ends. After a
// burst the runtime keeps about as much as it used then, and each collection halves
// the stacks that key exchanges have grown. A shorter interval would cost an idle
// gateway with thousands of connections more than everything else it does.
func returnMemory(ctx context.Context) {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			debug.FreeOSMemory()
		case <-ctx.Done():
			return
		}
	}
}
