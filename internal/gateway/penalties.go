package gateway

import (
	"container/heap"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// Penalties are for sources whose connections end without a login, as
// PerSourcePenalties of sshd_config(5): each end adds some time, and once Min has
// gathered, the source is refused until the time is over. The zero value means no
// penalties.
type Penalties struct {
	// AuthFail is for a client that has left after a key or a code was
	// refused, or after it offered a key of which no login came; NoAuth for
	// one that has not tried, or whose keys could not be looked up;
	// GraceExceeded for one that was not logged in when LoginGraceTime was
	// over. RefuseConnection is for a user who has proven
	// to be one, but whose roles do not permit the address. Crash is for a
	// client whose login made the gateway panic.
	AuthFail, NoAuth, GraceExceeded, RefuseConnection, Crash time.Duration
	// Max is the most that can gather, and Min the least that counts. A Max of
	// zero means no penalties.
	Max, Min time.Duration
	// MaxSources4 and MaxSources6 are how many sources are remembered at once.
	// When there are more, those whose time is over first are forgotten; but
	// if DenyAll4 or DenyAll6 is set, everybody is refused until there is room.
	MaxSources4, MaxSources6 int
	DenyAll4, DenyAll6       bool
}

// NetBlockSize is how many leading bits of an address make a source, as
// PerSourceNetBlockSize of sshd_config(5). The zero value means 32 and 64: a
// customer of a provider has all addresses of an IPv6 /64.
type NetBlockSize struct{ IPv4, IPv6 int }

// source returns what counts as one source; the zero Prefix for what is not TCP.
func (n NetBlockSize) source(a netip.Addr) netip.Prefix {
	if n == (NetBlockSize{}) {
		n = NetBlockSize{32, 64}
	}
	bits := n.IPv4
	if a.Is6() {
		bits = n.IPv6
	}
	p, err := a.WithZone("").Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

// notAllowed is what a penalised source is told. The words are OpenSSH's; tests
// and scanners know them.
const notAllowed = "Not allowed at this time\r\n"

var errPenaltiesFull = errors.New("as many sources have penalties as are remembered, so everybody is refused")

// penalties remembers which sources have some. Its memory is bounded by the
// number of sources, a few hundred bytes for each.
type penalties struct {
	mu     sync.Mutex
	v4, v6 penaltyTable
}

// A penaltyTable is the penalties of one family of addresses.
type penaltyTable struct {
	of    map[netip.Prefix]*penalty
	queue penaltyQueue
}

// A penalty is in force if it is active; one that is not has yet to reach Min.
type penalty struct {
	source netip.Prefix
	until  time.Time
	active bool
	why    string // the last offence
	index  int    // in the queue
}

func (s *penalties) table(source netip.Prefix) *penaltyTable {
	if source.Addr().Is6() {
		return &s.v6
	}
	return &s.v4
}

// check returns why source is refused, if it is.
func (s *penalties) check(source netip.Prefix, p Penalties) error {
	if p.Max == 0 || !source.IsValid() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	t := s.table(source)
	t.expire(now)
	if most, denyAll := p.room(source); denyAll && len(t.queue) >= most {
		return errPenaltiesFull
	}
	if has := t.of[source]; has != nil && has.active {
		return fmt.Errorf("%s has a penalty for another %v: %s", source, has.until.Sub(now).Round(time.Second), has.why)
	}
	return nil
}

// add adds d to the penalty of source. It returns how long the penalty is if it
// has come into force by this, and zero if not.
func (s *penalties) add(source netip.Prefix, p Penalties, d time.Duration, why string) time.Duration {
	if p.Max == 0 || d == 0 || !source.IsValid() {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	t := s.table(source)
	t.expire(now)
	has := t.of[source]
	if has == nil {
		most, denyAll := p.room(source)
		if len(t.queue) >= most {
			if denyAll {
				return 0 // nobody comes in as it is
			}
			t.pop()
		}
		if t.of == nil {
			t.of = make(map[netip.Prefix]*penalty)
		}
		has = &penalty{source: source, until: now}
		t.of[source] = has
		heap.Push(&t.queue, has)
	}
	has.why = why
	has.until = has.until.Add(d)
	if most := now.Add(p.Max); has.until.After(most) {
		has.until = most
	}
	heap.Fix(&t.queue, has.index)
	if left := has.until.Sub(now); !has.active && left >= p.Min {
		has.active = true
		return left
	}
	return 0
}

// room returns how many sources of the family are remembered, and whether all
// are refused when there are so many.
func (p Penalties) room(source netip.Prefix) (most int, denyAll bool) {
	if source.Addr().Is6() {
		return max(p.MaxSources6, 1), p.DenyAll6
	}
	return max(p.MaxSources4, 1), p.DenyAll4
}

// expire forgets the penalties that are over.
func (t *penaltyTable) expire(now time.Time) {
	for len(t.queue) > 0 && !t.queue[0].until.After(now) {
		t.pop()
	}
}

// pop forgets the penalty that is over first.
func (t *penaltyTable) pop() { delete(t.of, heap.Pop(&t.queue).(*penalty).source) }

// A penaltyQueue is a heap, the penalty that is over first on top.
type penaltyQueue []*penalty

func (q penaltyQueue) Len() int           { return len(q) }
func (q penaltyQueue) Less(i, j int) bool { return q[i].until.Before(q[j].until) }
func (q penaltyQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}
func (q *penaltyQueue) Push(x any) {
	p := x.(*penalty)
	p.index = len(*q)
	*q = append(*q, p)
}
func (q *penaltyQueue) Pop() any {
	last := len(*q) - 1
	p := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	return p
}

// penalised says whether penalties are for this connection's source. A
// balancer's own connections are like those of everybody behind it who cannot be
// told apart, so it gets none for them.
func (c *conn) penalised() bool {
	from := c.client.Addr()
	return !c.local && !slices.ContainsFunc(c.PerSourcePenaltyExempt, func(p netip.Prefix) bool { return p.Contains(from) })
}

// checkPenalty returns why the connection is refused for what others of its
// source have done before, if it is.
func (c *conn) checkPenalty() error {
	if !c.penalised() {
		return nil
	}
	return c.penalties.check(c.source(), c.PerSourcePenalties)
}

func (c *conn) source() netip.Prefix { return c.PerSourceNetBlockSize.source(c.client.Addr()) }

// penalise adds a penalty for how the login has ended, if it deserves one.
func (c *conn) penalise(err error) {
	p := c.PerSourcePenalties
	proven := c.holding.key != nil
	switch {
	case proven && errors.Is(c.refusal, policy.ErrFrom):
		c.addPenalty(p.RefuseConnection, "a user's roles do not permit it")
	case proven: // whatever it was, it was no stranger
	case errors.Is(err, errGrace):
		c.addPenalty(p.GraceExceeded, "login grace time exceeded")
	case errors.Is(c.refusal, auth.ErrUndecided): // which may not be the client's fault
		c.addPenalty(p.NoAuth, "its keys could not be looked up")
	case c.attempts > 0, c.offeredKey != nil: // offered, and not proven or with a wrong signature
		c.addPenalty(p.AuthFail, "failed authentication")
	default:
		c.addPenalty(p.NoAuth, "did not authenticate")
	}
}

func (c *conn) addPenalty(d time.Duration, why string) {
	if !c.penalised() {
		return
	}
	if length := c.penalties.add(c.source(), c.PerSourcePenalties, d, why); length > 0 {
		c.log.Warn("source refused for a while", "source", c.source().String(), "for", length.Round(time.Second).String(), "why", why)
	}
}
