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

// This file rate-limits the log entries of rejected connections and refused logins: the
// first of each source is logged at once, the rest is summarised every
// suppressInterval. A client can make thousands of connections a second at no cost, and
// a line for each would fill the disk; if the audit log fails closed, all logins would
// be refused then.

const (
	suppressInterval = 5 * time.Minute
	// suppressSources limits the sources that are counted apart, and with it
	// memory and the lines in each suppressInterval. All other sources are
	// summarised together.
	suppressSources = 256
)

// A suppressedLog counts log entries by source: a network, or a user. The zero value is
// ready for use.
type suppressedLog[K comparable] struct {
	mu sync.Mutex
	of map[K]*suppressed // the zero K for sources beyond suppressSources
}

// suppressed holds the entries of one source.
type suppressed struct {
	logged time.Time // time of the last entry that was logged
	count  int       // entries since
	last   audit.Event
	level  slog.Level
}

// add counts an entry, and reports whether the caller has to log it now.
func (s *suppressedLog[K]) add(source K, e audit.Event, level slog.Level, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	entry := s.of[source]
	if entry == nil && len(s.of) >= suppressSources {
		source = *new(K)
		entry = s.of[source]
	}
	if entry == nil {
		if s.of == nil {
			s.of = make(map[K]*suppressed)
		}
		s.of[source] = &suppressed{logged: now}
		return true
	}
	entry.count++
	entry.last, entry.level = e, level
	return false
}

// flush returns the entries that were counted for suppressInterval, or all, for the
// caller to log. Sources without entries are dropped.
func (s *suppressedLog[K]) flush(now time.Time, all bool) map[K]suppressed {
	s.mu.Lock()
	defer s.mu.Unlock()
	due := make(map[K]suppressed)
	for source, entry := range s.of {
		if !all && now.Sub(entry.logged) < suppressInterval {
			continue
		}
		if entry.count == 0 {
			delete(s.of, source)
			continue
		}
		due[source] = *entry
		s.of[source] = &suppressed{logged: now}
	}
	return due
}

// logRejected counts, logs and audits the rejection of the connection, because of err,
// before the key exchange.
func (c *conn) logRejected(reason rejection, level slog.Level, err error) {
	c.srv.counters.rejected[reason].Add(1)
	e := audit.Event{Type: audit.ConnectionRefused, Conn: c.ref, Client: c.clientAddr, Server: c.serverAddr, Rule: err.Error()}
	if c.srv.suppressedConns.add(c.source(), e, level, time.Now()) {
		c.unmetered().Log(context.Background(), level, "connection refused", "err", err)
		c.auditUnlimited(identity.Identity{}, e)
	}
}

// suppressRefusal counts a login that failed with err instead of logging it, if LogPerUser
// is reached; otherwise it returns false, and the caller logs it. The first of each user,
// or of each source before a key is proven, is logged nevertheless.
func (c *conn) suppressRefusal(err error) bool {
	user := c.quota.user.Load()
	if over, _ := c.overLogLimit(); !over {
		return false
	}
	e := audit.Event{Type: audit.ConnectionRefused, Rule: err.Error()}
	if c.attempt.user != "" {
		e = c.loginRefusedEvent(err)
		e.User, e.Profile = splitUser(c.attempt.user)
	}
	e.Conn, e.Client, e.Server = c.ref, c.clientAddr, c.serverAddr
	if e.Type == audit.LoginRefused {
		e.Server = netip.AddrPort{}
	}
	e = e.Clip()
	first := false
	if user != nil {
		first = c.srv.suppressedUsers.add(e.User, e, slog.LevelInfo, time.Now())
	} else {
		first = c.srv.suppressedUnauth.add(c.source(), e, slog.LevelInfo, time.Now())
	}
	if first {
		c.srv.logSuppressed("", suppressed{count: 1, last: e, level: slog.LevelInfo})
	}
	return true
}

// flushPeriodically writes suppressed and repeated entries when they are due, until ctx
// ends.
func (s *Server) flushPeriodically(ctx context.Context) {
	tick := time.NewTicker(suppressInterval / 10)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			s.flushSuppressed(now, false)
			for _, c := range s.loggedInConns() {
				c.flushRepeats(now, false)
			}
		case <-ctx.Done():
			return
		}
	}
}

// flushSuppressed writes the suppressed entries that are due, or all.
func (s *Server) flushSuppressed(now time.Time, all bool) {
	for _, of := range []*suppressedLog[netip.Prefix]{&s.suppressedConns, &s.suppressedUnauth} {
		for source, entries := range of.flush(now, all) {
			text := ""
			if source.IsValid() {
				text = source.String()
			}
			s.logSuppressed(text, entries)
		}
	}
	for _, entries := range s.suppressedUsers.flush(now, all) {
		s.logSuppressed("", entries)
	}
	if n := s.unauthDropped.Swap(0); n > 0 {
		s.Log.Warn("lines about clients that have not logged in were dropped", "not_logged", n)
	}
}

// logSuppressed writes the entries of one source as one line and one event. Source may
// be empty.
func (s *Server) logSuppressed(source string, entries suppressed) {
	e := entries.last
	attrs := []any{"conn", e.Conn, "remote", e.Client.String()}
	message := "connection refused"
	if e.Type == audit.LoginRefused {
		message = "login refused"
		attrs = append(attrs, "user", e.User, "err", e.Reason)
	} else {
		attrs = append(attrs, "err", e.Rule)
	}
	if entries.count > 1 {
		e.Times, e.Source = entries.count, source
		attrs = append(attrs, "source", e.Source, "times", e.Times)
	}
	s.Log.Log(context.Background(), entries.level, message, attrs...)
	s.Audit.Write(e)
}
