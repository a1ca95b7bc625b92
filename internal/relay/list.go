package relay

import (
	"cmp"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"
)

// A Channel is what can be seen of one that is open.
type Channel struct {
	Number     int // as in [Opening]
	Kind       string
	FromClient bool
	Since      time.Time
	// Runs is what a session runs: "shell", "exec", or the name of a
	// subsystem; empty while that is not known. Command is what exec was
	// asked for, its beginning if it is very long. Both are the user's words.
	Runs, Command string
	// ToBastion and ToClient count bytes of data and stderr.
	ToBastion, ToClient int64
}

// commandMax is how much of a command is kept for [Relay.Channels].
const commandMax = 256

// Channels returns the channels that are open, in the order they were opened,
// and how many bytes went each way on these and all before them.
func (r *Relay) Channels() (open []Channel, toBastion, toClient int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	toBastion, toClient = r.toBastion, r.toClient
	for up, c := range r.carried {
		c.ToBastion, c.ToClient = up.bytes.Load(), up.reverse.bytes.Load()
		toBastion += c.ToBastion
		toClient += c.ToClient
		open = append(open, *c)
	}
	slices.SortFunc(open, func(a, b Channel) int { return cmp.Compare(a.Number, b.Number) })
	return open, toBastion, toClient
}

// A Direction is what goes one way on all channels of a connection.
type Direction struct {
	// Bytes of data and stderr have been handed over.
	Bytes int64
	// HeldUp says that there may be some that have arrived and have not been
	// handed over: something is being written, or a channel is open of which
	// nothing is read any more.
	HeldUp bool
}

// Progress returns how far the relay is, from the client to the bastion and back.
func (r *Relay) Progress() (toBastion, toClient Direction) {
	r.mu.Lock()
	defer r.mu.Unlock()
	toBastion.Bytes, toClient.Bytes = r.toBastion, r.toClient
	for up := range r.carried {
		toBastion.add(up)
		toClient.add(up.reverse)
	}
	return toBastion, toClient
}

func (d *Direction) add(f *flow) {
	d.Bytes += f.bytes.Load()
	f.queue.mu.Lock()
	defer f.queue.mu.Unlock()
	d.HeldUp = d.HeldUp || f.idle.Load() < 2 || f.queue.busy
}

// enlist makes a channel known to Channels until the function it returns is
// called. Up is the flow to the bastion.
func (r *Relay) enlist(up *flow, kind string, fromClient bool) (delist func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.carried == nil {
		r.carried = make(map[*flow]*Channel)
	}
	r.carried[up] = &Channel{Number: up.number, Kind: kind, FromClient: fromClient, Since: time.Now()}
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.carried, up)
		r.toBastion += up.bytes.Load()
		r.toClient += up.reverse.bytes.Load()
	}
}

// runs takes note of what a session has begun to run.
func (r *Relay) runs(up *flow, req *ssh.Request) {
	var name struct{ Value string } // a command, or a subsystem (RFC 4254, section 6.5)
	switch req.Type {
	case "shell":
	case "exec", "subsystem":
		if ssh.Unmarshal(req.Payload, &name) != nil {
			return
		}
	default:
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.carried[up]
	if c == nil {
		return
	}
	// Copied, since the rest of what it is part of may be long.
	text := string([]byte(name.Value[:min(len(name.Value), commandMax)]))
	c.Runs = req.Type
	switch req.Type {
	case "exec":
		c.Command = text
	case "subsystem":
		c.Runs = text
	}
}

// Expect puts another text in the place of Lost: why the bastion's connection is
// about to end is known.
func (r *Relay) Expect(text string) { r.expected.Store(&text) }

// lostText is what a session is told that has lost its bastion.
func (r *Relay) lostText() string {
	if text := r.expected.Load(); text != nil {
		return *text
	}
	return r.Lost
}
