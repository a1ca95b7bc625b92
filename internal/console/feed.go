package console

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

const (
	// maxFeeds limits the open feeds. Their users' histories are not dropped, so it is
	// below recentUsers. maxFeedsPerUser limits those of one user.
	maxFeeds, maxFeedsPerUser = 256, 4
)

// The errors of [Caller.Follow].
var (
	ErrNoEvents     = errors.New("there is no audit log, so no events are kept")
	ErrTooManyFeeds = errors.New("too many feeds of events are open")
)

// A Feed delivers the events of one user as they happen. It has no buffer: it reads from
// the history that [Recent] keeps, so a reader that is late for more than that misses
// events, and is told so. Its methods are for one goroutine, which calls [Feed.Close].
type Feed struct {
	recent  *Recent
	history *userHistory
	woken   chan struct{} // has a value if there may be events
	read    uint64        // the number of the last event that was read
	// dropped is the number up to which dropped events are not missed.
	dropped uint64
	// foreign says that the reader came with an ID of another history.
	foreign bool
}

// Follow returns a feed of the caller's events at this gateway. If after is the ID of an
// event, it begins with the next one, and otherwise with the last n. An ID that this
// gateway does not know, such as that of another gateway, stands for an event before all.
func (c Caller) Follow(after string, n int) (*Feed, error) {
	if c.s.console.Recent == nil {
		return nil, ErrNoEvents
	}
	return c.s.console.Recent.follow(c.s.identity.User, after, n)
}

func (r *Recent) follow(user, after string, n int) (*Feed, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.users[user]
	if p == nil { // many users have logged in since the caller has
		p = newHistory()
		r.insert(strings.Clone(user), p)
	}
	if r.feeds >= maxFeeds || len(p.feeds) >= maxFeedsPerUser {
		return nil, ErrTooManyFeeds
	}
	f := &Feed{recent: r, history: p, woken: make(chan struct{}, 1)}
	epoch, number, _ := strings.Cut(after, "-")
	read, err := strconv.ParseUint(number, 10, 64)
	switch {
	case after == "":
		all := p.since(0)
		f.dropped = p.dropped
		if n < len(all) {
			f.read = all[len(all)-n-1].number
		}
	case epoch == p.epoch && err == nil && read <= p.latestNumber:
		f.read = read
	default:
		f.foreign = true
	}
	r.feeds++
	p.feeds = append(p.feeds, f)
	f.woken <- struct{}{}
	return f, nil
}

// Woken receives a value when there may be new events.
func (f *Feed) Woken() <-chan struct{} { return f.woken }

// Next returns the events since the last call, the oldest first. It does not block. Missed
// says that there were others before them, which are not kept any more.
func (f *Feed) Next() (events []Event, missed bool) {
	f.recent.mu.Lock()
	defer f.recent.mu.Unlock()
	p := f.history
	missed = f.foreign || p.dropped > max(f.read, f.dropped)
	events = p.since(f.read)
	f.read, f.dropped, f.foreign = p.latestNumber, p.dropped, false
	return events, missed
}

// ID returns the ID of an event of this feed, for [Caller.Follow].
func (f *Feed) ID(e Event) string { return fmt.Sprintf("%s-%d", f.history.epoch, e.number) }

// Close ends the feed.
func (f *Feed) Close() {
	f.recent.mu.Lock()
	defer f.recent.mu.Unlock()
	p := f.history
	if i := slices.Index(p.feeds, f); i >= 0 {
		p.feeds = slices.Delete(p.feeds, i, i+1)
		f.recent.feeds--
	}
}

func newHistory() *userHistory { return &userHistory{epoch: rand.Text()[:12]} }

// wake wakes the feeds of the user.
func (p *userHistory) wake() {
	for _, f := range p.feeds {
		select {
		case f.woken <- struct{}{}:
		default:
		}
	}
}

// since returns the kept events with a higher number, in their order.
func (p *userHistory) since(number uint64) []Event {
	all := slices.Concat(p.events, p.refusals)
	all = slices.DeleteFunc(all, func(e Event) bool { return e.number <= number })
	slices.SortFunc(all, func(a, b Event) int { return cmp.Compare(a.number, b.number) })
	return all
}
