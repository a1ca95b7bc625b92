package fargate

import (
	"os"
	"runtime"
	"runtime/debug"
	"testing"
)

func TestMain(m *testing.M) {
	if raceEnabled {
		// The runtime uses the race detector's context of a synctest bubble's
		// timers on two threads at once, without a lock: with thousands of
		// timers, one run in some crashes (Go 1.26.8,
		// runtime.(*timer).maybeRunChan). On one thread, the race detector finds
		// the same races.
		runtime.GOMAXPROCS(1)
	}
	debug.SetGCPercent(400) // a tenth less time for thousands of handshakes
	os.Exit(m.Run())
}
