package main

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// A kind is a kind of fault.
type kind struct {
	name string
	// logins and sessions say whether the fault may refuse logins at its gateway, and
	// end sessions there. At other gateways it may do neither.
	logins, sessions bool
	// delay is the time after the beginning of the fault before it may have effects.
	delay time.Duration
	// grace is the time after the end of the fault in which it may still have
	// effects: leases, the retransmissions of TCP, and health checks end within it.
	grace time.Duration
}

// kinds are the faults of a single gateway.
var (
	killed      = &kind{"kill -9", true, true, 0, 15 * time.Second}
	paused      = &kind{"SIGSTOP", true, true, 0, 30 * time.Second}
	drained     = &kind{"SIGTERM", true, true, drainDelay + drain, 15 * time.Second}
	cutTable    = &kind{"cut off from the table", true, false, 0, time.Minute}
	cutAWS      = &kind{"cut off from ECS", true, false, 0, time.Minute}
	cutBastions = &kind{"cut off from the bastions", true, true, 0, 90 * time.Second}
	cutGateways = &kind{"cut off from the other gateways", false, false, 0, 0}
	upgraded    = &kind{"upgrade", true, true, drain, 15 * time.Second}
)

// Faults of AWS, for all gateways. The SDK repeats calls, so that few logins are
// refused.
var (
	slowReplies = &kind{"slow replies of AWS", true, false, 0, 30 * time.Second}
	lostReplies = &kind{"lost replies of AWS", true, false, 0, 30 * time.Second}
)

// A fault is one fault, from its beginning to its end.
type fault struct {
	kind        *kind
	gateway     int // 0: all
	from, until time.Time
	// before, if not zero, says that connections that have begun later are at another
	// process, without the fault.
	before time.Time
}

func (f *fault) String() string {
	where := "all gateways"
	if f.gateway != 0 {
		where = namespaceOf(f.gateway)
	}
	return fmt.Sprintf("%s: %s", where, f.kind.name)
}

// blame knows all faults of a run.
type blame struct {
	mu     sync.Mutex
	faults []*fault
}

// begin enters a fault, until end is called.
func (b *blame) begin(k *kind, gateway int, now time.Time) *fault {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := &fault{kind: k, gateway: gateway, from: now}
	b.faults = append(b.faults, f)
	return f
}

// spare says that the fault does not concern connections from now on. The process may
// accept connections for some time after it was heard that it does not.
func (b *blame) spare(f *fault, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f.before = now.Add(10 * time.Second)
}

func (b *blame) end(f *fault, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f.until = now
}

// count returns the number of faults of each kind.
func (b *blame) count() map[string]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	counts := map[string]int{}
	for _, f := range b.faults {
		counts[f.kind.name]++
	}
	return counts
}

// login returns the last fault that may have refused a login at the gateway, or nil. If no
// gateway got the connection, gateway is zero, and only an overloaded machine explains
// it: at any time, the balancer has a gateway that works.
func (b *blame) login(gateway int, began, ended time.Time) *fault {
	return b.find(gateway, began, began, ended, func(k *kind) bool { return k.logins })
}

// session returns the last fault that may have ended a session at the gateway, or nil.
func (b *blame) session(gateway int, began, ended time.Time) *fault {
	return b.find(gateway, began, ended, ended, func(k *kind) bool { return k.sessions })
}

// find returns the last fault that explains what happened to a connection in the time
// given.
func (b *blame) find(gateway int, began, from, until time.Time, explains func(*kind) bool) *fault {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range slices.Backward(b.faults) {
		overlaps := f.from.Before(until) && (f.until.IsZero() || from.Before(f.until.Add(f.kind.grace)))
		here := f.kind == overloaded || gateway != 0 && (f.gateway == gateway || f.gateway == 0)
		concerns := f.before.IsZero() || began.Before(f.before)
		if here && overlaps && concerns && explains(f.kind) {
			return f
		}
	}
	return nil
}
