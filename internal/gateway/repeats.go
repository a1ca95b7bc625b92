package gateway

import (
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
)

// maxRepeatKeys limits the keys that a connection counts apart. Beyond it, all counted
// events are written.
const maxRepeatKeys = 64

// A repeatKey holds the fields in which events must be equal to count as repetitions.
type repeatKey struct {
	typ                                            audit.Type
	kind, by, rule, reason, command, subsystem, to string
}

// repeatKeyOf returns the key of an event. A loose key leaves out destination, command
// and reason.
func repeatKeyOf(e audit.Event, loose bool) repeatKey {
	k := repeatKey{typ: e.Type, kind: e.Kind, by: e.By}
	if !loose {
		k.rule, k.reason, k.command, k.subsystem, k.to = e.Rule, e.Reason, e.Command, e.Subsystem, e.Destination+" "+e.Listener
	}
	return k
}

// repeats folds repeated events of a connection. The first is written at once; those
// that follow within suppressInterval become one event, the last of them, with their
// number in Times. The zero value is ready for use.
type repeats struct {
	mu sync.Mutex
	of map[repeatKey]*repeat
}

// A repeat holds the events of one key.
type repeat struct {
	written time.Time // of the last event that was written
	count   int       // events since
	last    audit.Event
	totals  audit.Totals // sum over the counted events that have Totals
}

// entry returns the repeat of a key, and makes it if there is none. The caller holds
// r.mu.
func (r *repeats) entry(k repeatKey, now time.Time) (entry *repeat, existed bool) {
	if entry := r.of[k]; entry != nil {
		return entry, true
	}
	if r.of == nil {
		r.of = make(map[repeatKey]*repeat)
	}
	entry = &repeat{written: now}
	r.of[k] = entry
	return entry, false
}

// add counts an event, and reports whether the caller has to write it now. If countOnly
// is set, it never has. The caller has to write the events in due before.
func (r *repeats) add(k repeatKey, e audit.Event, countOnly bool, now time.Time) (first bool, due []audit.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of[k] == nil && len(r.of) >= maxRepeatKeys {
		due = r.take(now, true)
		clear(r.of)
	}
	entry, existed := r.entry(k, now)
	if !existed && !countOnly {
		return true, due
	}
	entry.count++
	entry.last = e
	return false, due
}

// written reports whether an event of the key was written within suppressInterval.
// If not, the caller has to write this one.
func (r *repeats) written(k repeatKey, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of[k] == nil && len(r.of) >= maxRepeatKeys {
		return false
	}
	_, existed := r.entry(k, now)
	return existed
}

// addTotals counts the end of an action whose beginning was not written.
func (r *repeats) addTotals(k repeatKey, e audit.Event, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	entry, _ := r.entry(k, now)
	entry.count++
	entry.totals.FromClient += e.FromClient
	entry.totals.ToClient += e.ToClient
	entry.totals.Seconds += e.Seconds
	entry.last = e
}

// flush returns the events that were counted for suppressInterval, or all, for the
// caller to write.
func (r *repeats) flush(now time.Time, all bool) []audit.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.take(now, all)
}

// take is flush for callers that hold r.mu.
func (r *repeats) take(now time.Time, all bool) (due []audit.Event) {
	for k, entry := range r.of {
		if !all && now.Sub(entry.written) < suppressInterval {
			continue
		}
		if entry.count == 0 {
			delete(r.of, k)
			continue
		}
		e := entry.last
		if entry.count > 1 {
			e.Times = entry.count
		}
		if e.Totals != nil {
			totals := entry.totals
			e.Totals = &totals
		}
		due = append(due, e)
		r.of[k] = &repeat{written: now}
	}
	return due
}
