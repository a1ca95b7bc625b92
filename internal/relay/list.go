package relay

import (
	"cmp"
	"slices"
	"time"
)

// A Channel describes an open channel for the console.
type Channel struct {
	Number     int // as in [Opening]
	Kind       string
	FromClient bool
	Since      time.Time
	// Runs is "shell", "exec" or the name of a session's subsystem, and empty
	// before the request. Command is the command of exec, cut to 256 bytes. Both
	// are the user's text and may hold any bytes.
	Runs, Command string
	// ToBastion and ToClient count bytes of data and stderr.
	ToBastion, ToClient int64
}

// commandMax limits, in bytes, the part of a command that is kept for [Relay.Channels].
const commandMax = 256

// Channels returns the open channels in the order of their opens, and the bytes in each
// direction on these and all earlier ones. It does not wait for a [Watcher].
func (r *Relay) Channels() (open []Channel, toBastion, toClient int64) {
	r.view.Lock()
	defer r.view.Unlock()
	toBastion, toClient = r.toBastion, r.toClient
	for _, c := range r.channels {
		if c == nil || c.state == opening && !c.confirmed {
			continue
		}
		up, down := c.client.bytes.Load(), c.bastion.bytes.Load()
		toBastion += up
		toClient += down
		open = append(open, Channel{
			Number: c.serial, Kind: c.kind, FromClient: c.fromClient, Since: c.since,
			Runs: c.runs, Command: c.command, ToBastion: up, ToClient: down,
		})
	}
	slices.SortFunc(open, func(a, b Channel) int { return cmp.Compare(a.Number, b.Number) })
	return open, toBastion, toClient
}
