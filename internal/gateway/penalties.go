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
)

// Penalties are PerSourcePenalties of sshd_config(5). A connection that ends without
// a login adds to the penalty time of its source. While that time is at least Min,
// connections from the source are rejected. The zero value disables penalties.
type Penalties struct {
	// AuthFail is added if a key or code was refused, or an offered key was
	// not proven. NoAuth is added if the client did not try, or its keys could
	// not be looked up. GraceExceeded is added at the end of LoginGraceTime,
	// and Crash if the login made the gateway panic. A connection with a
	// proven key adds nothing, even if its role refuses the login, because
	// other users may have the same address.
	AuthFail, NoAuth, GraceExceeded, Crash time.Duration
	// Max is the upper limit of a penalty, and Min the threshold for
	// rejecting. A Max of zero disables penalties.
	Max, Min time.Duration
	// MaxSources4 and MaxSources6 limit the number of sources with a penalty.
	// Beyond it, the penalty that would end first is dropped, or, if DenyAll4
	// or DenyAll6 is set, all connections of the family are rejected.
	MaxSources4, MaxSources6 int
	DenyAll4, DenyAll6       bool
}

// NetBlockSize is PerSourceNetBlockSize of sshd_config(5): the number of leading bits
// of an address that identify a source. The zero value means 32 and 64, because an
// internet customer has a whole IPv6 /64.
type NetBlockSize struct{ IPv4, IPv6 int }

// source returns the source of an address, or the zero Prefix for an invalid address.
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

var errPenaltiesFull = errors.New("the number of sources with penalties is at its limit, so all connections are rejected")

// penalties holds the penalties of all sources, a few hundred bytes for each.
type penalties struct {
	mu     sync.Mutex
	v4, v6 penaltyTable
}

// A penaltyTable holds the penalties of one address family.
type penaltyTable struct {
	of    map[netip.Prefix]*penalty
	queue penaltyQueue
}

// A penalty is the penalty time of one source. It becomes active when it reaches Min.
type penalty struct {
	source netip.Prefix
	until  time.Time
	active bool
	why    string // reason of the last addition
	index  int    // in the queue
}

func (s *penalties) table(source netip.Prefix) *penaltyTable {
	if source.Addr().Is6() {
		return &s.v6
	}
	return &s.v4
}

// check returns an error if connections from source are to be rejected.
func (s *penalties) check(source netip.Prefix, p Penalties) error {
	if p.Max == 0 || !source.IsValid() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	t := s.table(source)
	t.expire(now)
	if limit, denyAll := p.sourceLimit(source); denyAll && len(t.queue) >= limit {
		return errPenaltiesFull
	}
	if p := t.of[source]; p != nil && p.active {
		return &penaltyError{source, p.until.Sub(now), p.why}
	}
	return nil
}

// A penaltyError is the rejection of a source with an active penalty.
type penaltyError struct {
	source netip.Prefix
	left   time.Duration
	why    string // reason of the last addition
}

func (e *penaltyError) Error() string {
	return fmt.Sprintf("%s has a penalty for another %v: %s", e.source, e.left.Round(time.Second), e.why)
}

// add adds d to the penalty of source. If that makes the penalty active, add returns
// its length, otherwise zero.
func (s *penalties) add(source netip.Prefix, p Penalties, d time.Duration, why string) time.Duration {
	if p.Max == 0 || d == 0 || !source.IsValid() {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	t := s.table(source)
	t.expire(now)
	entry := t.of[source]
	if entry == nil {
		limit, denyAll := p.sourceLimit(source)
		if len(t.queue) >= limit {
			if denyAll {
				return 0 // all connections are rejected already
			}
			t.pop()
		}
		if t.of == nil {
			t.of = make(map[netip.Prefix]*penalty)
		}
		entry = &penalty{source: source, until: now}
		t.of[source] = entry
		heap.Push(&t.queue, entry)
	}
	entry.why = why
	entry.until = entry.until.Add(d)
	if latest := now.Add(p.Max); entry.until.After(latest) {
		entry.until = latest
	}
	heap.Fix(&t.queue, entry.index)
	if left := entry.until.Sub(now); !entry.active && left >= p.Min {
		entry.active = true
		return left
	}
	return 0
}

// sourceLimit returns the limit of sources for the address family of source, and
// whether all connections are rejected at the limit.
func (p Penalties) sourceLimit(source netip.Prefix) (limit int, denyAll bool) {
	if source.Addr().Is6() {
		return max(p.MaxSources6, 1), p.DenyAll6
	}
	return max(p.MaxSources4, 1), p.DenyAll4
}

// expire drops the penalties that are over.
func (t *penaltyTable) expire(now time.Time) {
	for len(t.queue) > 0 && !t.queue[0].until.After(now) {
		t.pop()
	}
}

// pop drops the penalty that ends first.
func (t *penaltyTable) pop() { delete(t.of, heap.Pop(&t.queue).(*penalty).source) }

// A penaltyQueue is a heap with the penalty that ends first on top.
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

// penalisable reports whether the source of the connection can have a penalty. Health
// checks of a load balancer cannot, because the address of the balancer is also that of
// clients whose own address is not known.
func (c *conn) penalisable() bool {
	from := c.clientAddr.Addr()
	return !c.healthCheck && !slices.ContainsFunc(c.cfg.PerSourcePenaltyExemptList, func(p netip.Prefix) bool { return p.Contains(from) })
}

// checkPenalty returns an error if the source of the connection has an active penalty.
func (c *conn) checkPenalty() error {
	if !c.penalisable() {
		return nil
	}
	return c.srv.penalties.check(c.source(), c.cfg.PerSourcePenalties)
}

func (c *conn) source() netip.Prefix { return c.cfg.PerSourceNetBlockSize.source(c.clientAddr.Addr()) }

// penalise adds the penalty for a login that failed with err.
func (c *conn) penalise(err error) {
	p := c.cfg.PerSourcePenalties
	switch {
	case isShortage(err): // not caused by the client
	case c.creds.proven: // a role or limit refused a proven user
	case errors.Is(err, errGrace):
		c.addPenalty(p.GraceExceeded, "login grace time exceeded")
	case errors.Is(c.attempt.err, auth.ErrUndecided): // possibly not caused by the client
		c.addPenalty(p.NoAuth, "its keys could not be looked up")
	case c.attempt.failures > 0, c.attempt.key != nil: // offered, but not proven
		c.addPenalty(p.AuthFail, "failed authentication")
	default:
		c.addPenalty(p.NoAuth, "did not authenticate")
	}
}

func (c *conn) addPenalty(d time.Duration, why string) {
	if !c.penalisable() {
		return
	}
	if length := c.srv.penalties.add(c.source(), c.cfg.PerSourcePenalties, d, why); length > 0 {
		c.log.Warn("source has a penalty", "source", c.source().String(), "for", length.Round(time.Second).String(), "why", why)
	}
}
