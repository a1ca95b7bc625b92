package console

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
)

const (
	// recentUsers is of how many users events are kept; who had none for the
	// longest time is forgotten.
	recentUsers = 512
	// recentEvents and recentRefusals are how many are kept of each. Logins
	// that were refused are counted apart, so that a stranger cannot push out
	// the others.
	recentEvents, recentRefusals = 64, 16
	// recentText is how many bytes of a text are kept. Clients may make a
	// command 256 KiB long.
	recentText = 128
)

// Recent keeps the last events of each user in memory. The zero value is ready
// for use; methods are safe for concurrent use.
type Recent struct {
	mu    sync.Mutex
	users map[string]*past
}

// A past is the last events of one user.
type past struct {
	events, refusals []event // the oldest first
	latest           time.Time
}

// An event is what a user may see of an [audit.Event]. Reasons are not among
// it: they are for the operator, and may name accounts and roles.
type event struct {
	Time        time.Time  `json:"time"`
	Event       audit.Type `json:"event"`
	Conn        string     `json:"conn,omitempty"`
	Profile     string     `json:"profile,omitempty"`
	Client      string     `json:"client,omitempty"`
	Key         string     `json:"key,omitempty"`
	Command     string     `json:"command,omitempty"`
	Subsystem   string     `json:"subsystem,omitempty"`
	Kind        string     `json:"kind,omitempty"`
	Destination string     `json:"destination,omitempty"`
	Listener    string     `json:"listener,omitempty"`
	Rule        string     `json:"rule,omitempty"`
	By          string     `json:"by,omitempty"`
	ExitStatus  *uint32    `json:"exit_status,omitempty"`
	ExitSignal  string     `json:"exit_signal,omitempty"`
	Task        string     `json:"task,omitempty"`
	Generation  int64      `json:"generation,omitempty"`
	// Times counts refused logins from one address, the last of which this is.
	Times int `json:"times,omitempty"`

	from netip.Addr
}

// Add keeps an event, if it is one of a user who has logged in here before or
// does so by it. It does not block: it is made for [audit.Config.Also].
func (r *Recent) Add(e audit.Event) {
	if e.User == "" {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.users[e.User]
	if p == nil {
		if e.Type != audit.Login {
			return // a stranger may name anybody
		}
		p = &past{}
		r.insert(strings.Clone(e.User), p)
	}
	kept := visible(e)
	if e.Type == audit.LoginRefused {
		p.refuse(kept)
		return
	}
	p.latest = e.Time
	p.events = push(p.events, kept, recentEvents)
}

// refuse keeps a refused login, together with others from the same address.
func (p *past) refuse(e event) {
	e.Times = 1
	same := slices.IndexFunc(p.refusals, func(old event) bool { return old.from == e.from })
	if same >= 0 {
		e.Times += p.refusals[same].Times
		p.refusals = slices.Delete(p.refusals, same, same+1)
	}
	p.refusals = push(p.refusals, e, recentRefusals)
}

// push appends e, in the place of the first if there are max.
func push(events []event, e event, max int) []event {
	if len(events) >= max {
		events = slices.Delete(events, 0, len(events)-max+1)
	}
	return append(events, e)
}

func (r *Recent) insert(user string, p *past) {
	if r.users == nil {
		r.users = make(map[string]*past)
	}
	if len(r.users) >= recentUsers {
		oldest := ""
		for name, other := range r.users {
			if oldest == "" || other.latest.Before(r.users[oldest].latest) {
				oldest = name
			}
		}
		delete(r.users, oldest)
	}
	r.users[user] = p
}

// of returns the events of a user, the newest last.
func (r *Recent) of(user string) []event {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.users[user]
	if p == nil {
		return nil
	}
	all := slices.Concat(p.events, p.refusals)
	slices.SortStableFunc(all, func(a, b event) int { return a.Time.Compare(b.Time) })
	return all
}

// visible returns what the user may see, and no more of it than may be kept.
func visible(e audit.Event) event {
	clip := func(text string) string {
		// Cloned, since the rest of what it is part of may be long.
		return strings.Clone(text[:min(len(text), recentText)])
	}
	out := event{
		Time: e.Time, Event: e.Type, Conn: clip(e.Conn), Profile: clip(e.Profile), Key: clip(e.Key),
		Command: clip(e.Command), Subsystem: clip(e.Subsystem), Kind: clip(e.Kind), Destination: clip(e.Destination),
		Listener: clip(e.Listener), Rule: clip(e.Rule), By: clip(e.By), ExitStatus: e.ExitStatus, ExitSignal: clip(e.ExitSignal),
		Task: clip(lastPart(e.Task)), Generation: e.Generation, from: e.Client.Addr(),
	}
	if e.Client.IsValid() {
		out.Client = e.Client.String()
	}
	return out
}
