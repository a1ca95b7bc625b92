package bastion

import "time"

// An Event is a change in the life of a bastion, for [Dialer.Event].
type Event struct {
	Kind  EventKind
	Owner Owner
	// Task may be incomplete if the bastion did not start.
	Task Task
	// Took is the duration of a start; zero for other events.
	Took time.Duration
	// MaxLife is the longest time for which a started or adopted bastion may run;
	// zero means no limit.
	MaxLife time.Duration
	// Reason is for the operator; empty if nothing is wrong.
	Reason string
	// Err is the error of a Failed start, with Reason as its text; nil for other events.
	Err error
}

// An EventKind is the kind of an [Event].
type EventKind string

const (
	Launching EventKind = "launching" // its generation is claimed, and is about to be launched
	Started   EventKind = "started"   // it runs and accepts logins
	Failed    EventKind = "failed"    // it did not start
	Adopted   EventKind = "adopted"   // an earlier gateway started it, and it was entered in the ledger
	Ended     EventKind = "ended"     // it was found to have ended by itself, some time ago
	Stopped   EventKind = "stopped"   // a gateway stopped it
)

// event sends e, with the owner, to the Dialer's Event.
func (b *bastion) event(e Event) {
	e.Owner = b.owner
	b.present.observe(e)
	if b.onEvent != nil {
		b.onEvent(e)
	}
}
