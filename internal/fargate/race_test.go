//go:build race

package fargate

import (
	"os"
	"runtime"
	"testing"
)

const raceEnabled = true

// TestMain keeps the runtime from using the race detector's context of a synctest
// bubble's timers on two threads at once, which it does not lock: with thousands
// of timers, one run in some crashes (Go 1.26.8, runtime.(*timer).maybeRunChan).
// Which accesses are ordered, the race detector knows on one thread as well.
func TestMain(m *testing.M) {
	runtime.GOMAXPROCS(1)
	os.Exit(m.Run())
}
