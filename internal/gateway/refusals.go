package gateway

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// This file tells of connections that are turned away before they can log in. It
// costs a stranger next to nothing to make thousands of them a second, and a line
// for each would fill the disk; where the audit log fails closed, nobody could
// work any more then. So of each source the first is told of at once, and the
// others from time to time, as a number.
const (
	refusalsEvery = 5 * time.Minute
	// refusalSources is how many sources are told of apart. It bounds both the
	// memory and the log: to 256 lines in every five minutes, and one for all
	// other sources together.
	refusalSources = 256
)

// refusals remembers which sources were told of. The zero value is ready for use.
type refusals struct {
	mu sync.Mutex
	of map[netip.Prefix]*refusal // the zero Prefix for all sources that have no place
}

// A refusal is the connections of one source.
type refusal struct {
	told  time.Time   // when the last event was
	more  int         // connections since
	last  audit.Event // of the last of these
	level slog.Level
}

// add counts a connection, and says whether it is to be told of at once.
func (r *refusals) add(source netip.Prefix, e audit.Event, level slog.Level, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	has := r.of[source]
	if has == nil && len(r.of) >= refusalSources {
		source = netip.Prefix{}
		has = r.of[source]
	}
	if has == nil {
		if r.of == nil {
			r.of = make(map[netip.Prefix]*refusal)
		}
		r.of[source] = &refusal{told: now}
		return true
	}
	has.more++
	has.last, has.level = e, level
	return false
}

// due returns what is to be told now, or all that has not been told. A source of
// which there is nothing to tell is forgotten.
func (r *refusals) due(now time.Time, all bool) map[netip.Prefix]refusal {
	r.mu.Lock()
	defer r.mu.Unlock()
	due := make(map[netip.Prefix]refusal)
	for source, has := range r.of {
		if !all && now.Sub(has.told) < refusalsEvery {
			continue
		}
		if has.more == 0 {
			delete(r.of, source)
			continue
		}
		due[source] = *has
		r.of[source] = &refusal{told: now}
	}
	return due
}

// turnedAway tells that the connection is refused, because of err, before it can
// log in.
func (c *conn) turnedAway(level slog.Level, err error) {
	e := audit.Event{Type: audit.ConnectionRefused, Conn: c.ref, Client: c.client, Server: c.server, Rule: err.Error()}
	if c.refusals.add(c.source(), e, level, time.Now()) {
		c.log.Log(context.Background(), level, "connection refused", "err", err)
		c.audit(identity.Identity{}, e)
	}
}

// tellRefusals tells of the connections that were only counted, until ctx ends.
func (s *Server) tellRefusals(ctx context.Context) {
	tick := time.NewTicker(refusalsEvery / 10)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			s.tellRefused(now, false)
		case <-ctx.Done():
			return
		}
	}
}

func (s *Server) tellRefused(now time.Time, all bool) {
	for source, r := range s.refusals.due(now, all) {
		e := r.last
		attrs := []any{"conn", e.Conn, "remote", e.Client.String(), "err", e.Rule}
		if r.more > 1 {
			e.Times = r.more
			if source.IsValid() {
				e.Source = source.String()
			}
			attrs = append(attrs, "source", e.Source, "times", e.Times)
		}
		s.Log.Log(context.Background(), r.level, "connection refused", attrs...)
		s.Audit.Write(e)
	}
}
