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
	// recentUsers is the number of users with events. Beyond it, the user
	// whose last event is the oldest is dropped; users with feeds are not.
	recentUsers = 512
	// recentEvents and recentRefusals are the events kept for each user.
	// Refused logins are kept apart, because anyone can cause them and could
	// evict the other events.
	recentEvents, recentRefusals = 64, 16
	// recentText is the number of bytes kept of a text. A client's command
	// may have 256 KiB.
	recentText = 128
)

// Recent keeps the last events of each user in memory. The zero value is ready
// for use; methods are safe for concurrent use.
type Recent struct {
	mu    sync.Mutex
	users map[string]*userHistory
	feeds int // that are open
}

// A userHistory holds the last events of one user.
type userHistory struct {
	events, refusals []Event // the oldest first
	latest           time.Time

	// The events are numbered from 1. Epoch tells the numbers from those of other
	// histories. dropped is the highest number of an event that was removed; refused
	// logins that were folded into a later one do not count.
	epoch                 string
	latestNumber, dropped uint64
	feeds                 []*Feed
}

// An Event is the part of an [audit.Event] that its user may see. Reasons are left out,
// because they are for the operator, and may name AWS accounts and roles.
type Event struct {
	Time        time.Time  `json:"time"`
	Type        audit.Type `json:"event"`
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
	// Times is the number of refused logins from this address; the event is
	// the last of them.
	Times int `json:"times,omitempty"`

	from   netip.Addr
	number uint64
}

// Add keeps an event of a user who has logged in before, or logs in with this event. It
// does not block, so it may be [audit.Config.Observe].
func (r *Recent) Add(e audit.Event) {
	if e.User == "" || e.Type == audit.Transfer || e.Type == audit.FileChange { // many transfers would evict all else
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.users[e.User]
	if p == nil {
		if e.Type != audit.Login {
			return // anyone can try any user name
		}
		p = newHistory()
		r.insert(strings.Clone(e.User), p)
	}
	kept := Visible(e)
	p.latestNumber++
	kept.number = p.latestNumber
	defer p.wake()
	if e.Type == audit.LoginRefused {
		p.addRefused(kept)
		return
	}
	p.latest = e.Time
	p.events = p.push(p.events, kept, recentEvents)
}

// addRefused keeps a refused login, folded with others from the same address.
func (p *userHistory) addRefused(e Event) {
	e.Times = 1
	same := slices.IndexFunc(p.refusals, func(old Event) bool { return old.from == e.from })
	if same >= 0 {
		e.Times += p.refusals[same].Times
		p.refusals = slices.Delete(p.refusals, same, same+1)
	}
	p.refusals = p.push(p.refusals, e, recentRefusals)
}

// push appends e, and removes the first event if there are max.
func (p *userHistory) push(events []Event, e Event, limit int) []Event {
	if len(events) >= limit {
		p.dropped = max(p.dropped, events[0].number)
		events = slices.Delete(events, 0, 1)
	}
	return append(events, e)
}

func (r *Recent) insert(user string, p *userHistory) {
	if r.users == nil {
		r.users = make(map[string]*userHistory)
	}
	if len(r.users) >= recentUsers {
		oldest := ""
		for name, other := range r.users {
			if len(other.feeds) > 0 {
				continue
			}
			if oldest == "" || other.latest.Before(r.users[oldest].latest) {
				oldest = name
			}
		}
		delete(r.users, oldest)
	}
	r.users[user] = p
}

// of returns the events of a user, the oldest first.
func (r *Recent) of(user string) []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.users[user]
	if p == nil {
		return nil
	}
	all := slices.Concat(p.events, p.refusals)
	slices.SortStableFunc(all, func(a, b Event) int { return a.Time.Compare(b.Time) })
	return all
}

// Visible returns the part of an event that the user may see, with clipped texts.
func Visible(e audit.Event) Event {
	clip := func(text string) string {
		// Cloned, so that the rest of the text can be freed.
		return strings.Clone(text[:min(len(text), recentText)])
	}
	out := Event{
		Time: e.Time, Type: e.Type, Conn: clip(e.Conn), Profile: clip(e.Profile), Key: clip(e.Key),
		Command: clip(e.Command), Subsystem: clip(e.Subsystem), Kind: clip(e.Kind), Destination: clip(e.Destination),
		Listener: clip(e.Listener), Rule: clip(e.Rule), By: clip(e.By), ExitStatus: e.ExitStatus, ExitSignal: clip(e.ExitSignal),
		Task: clip(shortTaskID(e.Task)), Generation: e.Generation, from: e.Client.Addr(),
	}
	if e.Client.IsValid() {
		out.Client = e.Client.String()
	}
	return out
}
