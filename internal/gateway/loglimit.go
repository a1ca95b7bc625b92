package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
)

// This file limits the log entries that one user can cause. Without a limit, one user
// could fill the disk, and if the audit log fails closed, all logins would be refused
// then.

// A LogLimit limits the bytes that one user causes in the audit log and the operator's
// log together: a leaky bucket of size Bytes that empties within Per. The zero value is
// no limit.
type LogLimit struct {
	Bytes int64
	Per   time.Duration
}

const (
	// logShare is a divisor: the limit is at most this share of the free
	// space. So it shrinks with the free space, and one user cannot fill it.
	logShare = 8
	// logLeast is the lowest value to which a lack of space reduces the limit,
	// in bytes.
	logLeast = 64 << 10
	// connShare is a divisor: one connection may use this share of its user's
	// limit. So a connection that floods the log ends before the user's others.
	connShare = 2
	// maxBudgets is the number of budgets above which unused ones are dropped.
	maxBudgets = 1024
)

// errLogLimit refuses an action because LogPerUser is reached. Wait is the time until
// the next login is permitted, or zero if that is not known.
type errLogLimit struct{ wait time.Duration }

func (e *errLogLimit) Error() string {
	return "the user has caused more log entries than log_per_user permits"
}

// A budget counts the log bytes of a user or connection in a leaky bucket. The zero
// value is unused.
type budget struct {
	// writing is held while an event of a user is written, so that one user
	// with many channels cannot fill the audit log's queue.
	writing sync.Mutex

	mu   sync.Mutex
	used float64 // bytes in the bucket at the time at
	at   time.Time
	over bool // used has reached the limit, and has not fallen to half of it since
}

// leak updates used and over. Limit bytes leak within l.Per; so if the limit is a share
// of the free space, a user gets no more than that share in that time. The caller holds
// b.mu.
func (b *budget) leak(l LogLimit, limit float64, now time.Time) {
	b.used = max(b.used-now.Sub(b.at).Seconds()*limit/l.Per.Seconds(), 0)
	b.at = now
	if b.used <= limit/2 {
		b.over = false
	}
}

// spend adds n bytes, and reports whether they have reached the limit.
func (b *budget) spend(n int, l LogLimit, limit float64, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.leak(l, limit, now)
	b.used += float64(n)
	if b.over || b.used < limit {
		return false
	}
	b.over = true
	return true
}

// state reports whether the limit was reached, and whether more than half of it is used.
func (b *budget) state(l LogLimit, limit float64, now time.Time) (over, tight bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.leak(l, limit, now)
	return b.over, b.used > limit/2
}

// wait returns the time until used has fallen to half of the limit.
func (b *budget) wait(l LogLimit, limit float64, now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.leak(l, limit, now)
	return time.Duration(max(b.used-limit/2, 0) / limit * float64(l.Per))
}

// budgets holds the budget of each user with a proven key. The zero value is ready
// for use.
type budgets struct {
	mu sync.Mutex
	of map[string]*budget
}

// get returns the budget of a user.
func (b *budgets) get(user string, l LogLimit) *budget {
	b.mu.Lock()
	defer b.mu.Unlock()
	if entry := b.of[user]; entry != nil {
		return entry
	}
	if len(b.of) >= maxBudgets {
		for name, entry := range b.of {
			entry.mu.Lock()
			if time.Since(entry.at) >= l.Per { // empty
				delete(b.of, name)
			}
			entry.mu.Unlock()
		}
	}
	if b.of == nil {
		b.of = make(map[string]*budget)
	}
	entry := &budget{at: time.Now()}
	b.of[user] = entry
	return entry
}

// A logQuota holds the budgets that a connection spends from.
type logQuota struct {
	own           budget
	user          atomic.Pointer[budget] // nil until a key is proven
	dropped       atomic.Int64           // lines of the operator's log that were dropped
	disconnecting sync.WaitGroup         // goroutines of disconnectFlooding
}

// logLimit returns the limit of a user in bytes; zero is no limit.
func (c *conn) logLimit() float64 {
	limit := c.cfg.LogPerUser.Bytes
	if limit == 0 {
		return 0
	}
	if free := c.srv.logSpace(); free >= 0 {
		limit = max(min(limit, free/logShare), min(limit, logLeast))
	}
	return float64(limit)
}

// logSpace returns the free space of the audit log in bytes, or a negative number if
// that is not known.
func (s *Server) logSpace() int64 {
	if s.freeLogSpace != nil {
		return s.freeLogSpace()
	}
	return s.Audit.Free()
}

// overLogLimit returns over if the limit is reached, so that no audited action may begin,
// and tight if more than half of it is used, so that repeated events are folded.
func (c *conn) overLogLimit() (over, tight bool) {
	limit := c.logLimit()
	if limit == 0 {
		return false, false
	}
	now := time.Now()
	user := c.quota.user.Load()
	if user == nil {
		return c.srv.unauthBudget.state(c.cfg.LogPerUser, limit, now)
	}
	over, tight = c.quota.own.state(c.cfg.LogPerUser, limit/connShare, now)
	userOver, userTight := user.state(c.cfg.LogPerUser, limit, now)
	return over || userOver, tight || userTight
}

// logLimitError returns the error that refuses a login, or nil if the user's limit is not
// reached.
func (c *conn) logLimitError() error {
	limit := c.logLimit()
	user := c.quota.user.Load()
	if limit == 0 || user == nil {
		return nil
	}
	now := time.Now()
	if over, _ := user.state(c.cfg.LogPerUser, limit, now); !over {
		return nil
	}
	return &errLogLimit{user.wait(c.cfg.LogPerUser, limit, now)}
}

// spend counts n bytes that this connection has logged. At the limit of the connection or
// of the user, it disconnects the connection or all of the user. All connections without
// a proven key share one budget; at its limit, their refused logins are only counted.
func (c *conn) spend(n int) {
	limit := c.logLimit()
	if limit == 0 || n == 0 {
		return
	}
	now := time.Now()
	user := c.quota.user.Load()
	if user == nil {
		if c.srv.unauthBudget.spend(n, c.cfg.LogPerUser, limit, now) {
			c.srv.Log.Warn("too many refused logins: they are only counted from now on", "bytes", int64(limit))
		}
		return
	}
	if user.spend(n, c.cfg.LogPerUser, limit, now) {
		c.quota.disconnecting.Go(func() { c.disconnectFlooding(limit, "") })
	}
	if c.quota.own.spend(n, c.cfg.LogPerUser, limit/connShare, now) {
		c.quota.disconnecting.Go(func() { c.disconnectFlooding(limit/connShare, c.ref) })
	}
}

// disconnectFlooding disconnects all connections of c's user, or only the one with the
// reference ref if that is not empty.
func (c *conn) disconnectFlooding(limit float64, ref string) {
	defer c.closeOnPanic(c.stream)
	scope, configured := "user", float64(c.cfg.LogPerUser.Bytes)
	if ref != "" {
		scope, configured = "connection", configured/connShare
	}
	why := fmt.Sprintf("the %s has caused more log entries than the %d bytes that log_per_user permits", scope, int64(limit))
	if limit < configured {
		why += ", at most an eighth of the free space of the audit log's file system"
	}
	c.srv.Log.Warn("disconnecting connections that fill the logs", "user", c.identity.User, "conn", c.ref, "err", why)
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	for other := range c.srv.conns {
		if !other.loggedIn || c.srv.closing || other.identity.User != c.identity.User || ref != "" && other.ref != ref {
			continue
		}
		other.setCause("gateway", why)
		other.disconnectSoon(logLimitMessage(other.ref))
	}
}

// beginsAction reports whether an event begins an action whose end is an event, too. Its
// bytes are spent twice, so that those of the end are spent in advance.
func beginsAction(t audit.Type) bool {
	switch t {
	case audit.Session, audit.Forward, audit.Login, audit.LoginRefused:
		return true
	}
	return false
}

// endsAction reports whether an event ends an action. It is always written, because the
// begin was.
func endsAction(t audit.Type) bool {
	switch t {
	case audit.SessionEnd, audit.ForwardEnd, audit.End:
		return true
	}
	return false
}

// A meteredLog is the handler of a connection's log. It spends the bytes of each line,
// and drops lines beyond the limit, except errors.
type meteredLog struct {
	slog.Handler
	c *conn
}

func (m meteredLog) Handle(ctx context.Context, r slog.Record) error {
	if over, _ := m.c.overLogLimit(); over && r.Level < slog.LevelError {
		if m.c.quota.user.Load() == nil {
			m.c.srv.unauthDropped.Add(1)
		} else {
			m.c.quota.dropped.Add(1)
		}
		return nil
	}
	m.c.spend(oplog.Size(r))
	return m.Handler.Handle(ctx, r)
}

func (m meteredLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	return meteredLog{m.Handler.WithAttrs(attrs), m.c}
}

func (m meteredLog) WithGroup(name string) slog.Handler {
	return meteredLog{m.Handler.WithGroup(name), m.c}
}

// unmetered returns the connection's log without the limit. Its next line has the number
// of dropped lines.
func (c *conn) unmetered() *slog.Logger {
	log := c.log
	if m, ok := log.Handler().(meteredLog); ok {
		log = slog.New(m.Handler)
	}
	if n := c.quota.dropped.Swap(0); n > 0 {
		log = log.With("not_logged", n)
	}
	return log
}
