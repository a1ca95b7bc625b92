// Package gateway is the SSH server that users connect to. It authenticates them,
// gets each user a bastion, and relays the connection to it.
//
// The life of a connection reads top-down from [Server.ServeConn].
package gateway

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/tracing"
)

// A Server serves users' connections. Its fields must be set before [Server.Serve]
// or [Server.ServeConn] is called, and must not change afterwards.
// [Server.Reload] replaces the Settings.
type Server struct {
	// Settings are in force until the first Reload.
	Settings

	// Dial finds or starts the user's bastion and connects to it. It is only
	// called after a signature has been verified. It calls notify at most
	// once, if the user has to wait. See [bastion.Dialer.Dial].
	Dial func(ctx context.Context, id identity.Identity, notify func(starting bool)) (*bastion.Conn, error)
	// UsualStart returns how long bastions of a profile usually take to
	// start, or zero if that is not known. It may be nil. See
	// [bastion.Dialer.UsualStart].
	UsualStart func(profile string) time.Duration

	// WhyEnded returns why the task of a lost bastion has ended, or nil if
	// that is not known when ctx ends. It may be nil. See
	// [bastion.Dialer.WhyEnded].
	WhyEnded func(ctx context.Context, owner bastion.Owner, taskID string) error

	// Console serves an authenticated connection to the profile "ctl". It
	// returns when the connection has ended, with the reason. If Console is
	// nil, there is no such profile. A key with a forced command cannot open
	// the console.
	Console func(ctx context.Context, c ConsoleConn) error

	// Revoked returns an error for users that may not log in for the time being,
	// whatever keys they have. Their connections end at the next recheck. It must not
	// block. It may be nil. See [revoked.List.Check].
	Revoked func(user string, now time.Time) error

	// Audit is the audit log; nil disables auditing.
	Audit *audit.Log

	// Tracer traces logins over SSH; nil means none.
	Tracer *tracing.Tracer

	Log *slog.Logger

	reloaded atomic.Pointer[Settings] // nil before the first Reload

	startups     startups     // connections that have not logged in
	callStartups startups     // the same of the HTTP API, which must not shut out logins over SSH
	proxyHeaders startups     // connections whose PROXY header is still to come
	rejecting    atomic.Int32 // rejected connections whose clients still read
	penalties    penalties

	// Log entries that are rate-limited: rejected connections by source; and,
	// beyond LogPerUser, refused logins by user or, before a key is proven, by
	// source.
	suppressedConns  suppressedLog[netip.Prefix]
	suppressedUsers  suppressedLog[string]
	suppressedUnauth suppressedLog[netip.Prefix]

	budgets       budgets
	unauthBudget  budget       // of all connections without a proven key together
	unauthDropped atomic.Int64 // lines of such connections that were dropped

	counters counters

	accepting atomic.Pointer[[]acceptLoop] // of Serve; nil before
	// accepted counts the connections of Serve that have not ended.
	accepted atomic.Int64
	// handedOver: another process accepts from the same sockets.
	handedOver atomic.Bool

	mu    sync.Mutex
	conns map[*conn]struct{}
	users map[string]int // connections per user
	// Bytes that ended connections have relayed.
	endedFromClients, endedToClients int64
	// draining: no new connections are accepted. closing: all connections are
	// being closed.
	draining, closing bool

	wg sync.WaitGroup // connections, and goroutines that close them

	freeLogSpace func() int64 // replaces Audit.Free in tests
}

// A SecondFactor checks verification codes. See [auth.TOTP].
type SecondFactor interface {
	// Needs reports whether the user must give a code beside a key.
	Needs(user string) (bool, error)
	// Check returns nil if the code is right. See [auth.ErrCodeUsed] and
	// [auth.ErrCodeLater] for errors that the user is told.
	Check(ctx context.Context, user, code string, now time.Time) error
}

// Reload replaces the settings. Connections that were accepted before keep
// theirs. It may be called at any time.
func (s *Server) Reload(next Settings) { s.reloaded.Store(&next) }

// DrainTime returns how long connections may go on after the end of Serve's
// context.
func (s *Server) DrainTime() time.Duration {
	settings := s.settings()
	return settings.DrainDelay + settings.Drain
}

// settings returns the settings in force.
func (s *Server) settings() *Settings {
	if next := s.reloaded.Load(); next != nil {
		return next
	}
	return &s.Settings
}

// HandOver declares that another process accepts from the sockets of Serve's listeners,
// whose caller closes them next. In the drain that follows, connections that have not
// logged in may go on like the others.
func (s *Server) HandOver() { s.handedOver.Store(true) }

// Serve accepts and serves connections until DrainDelay after ctx's end, or until a
// listener fails or is closed. Then it drains: it stops accepting, closes the
// connections that have not logged in, notifies every terminal, waits up to Drain for
// the other connections to end, and closes the rest. Logins that wait for a bastion go
// on during that time. Bastions keep running.
//
// Every connection has ended when Serve returns. The error is nil if ctx has ended,
// or after HandOver. Serve closes the listeners, and may be called once.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	// The end of ctx stops accepting; it does not end connections.
	connCtx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)

	acceptCtx, stopAccepting := context.WithCancel(context.WithoutCancel(ctx))
	defer stopAccepting()
	accepting, acceptCtx := errgroup.WithContext(acceptCtx)
	defer context.AfterFunc(ctx, func() {
		if delay := s.settings().DrainDelay; delay > 0 && !s.handedOver.Load() {
			s.Log.Info("leaving service, and still accepting", "drain_delay", delay.String())
			select {
			case <-time.After(delay):
			case <-acceptCtx.Done():
			}
		}
		stopAccepting()
	})()
	loops := make([]acceptLoop, len(listeners))
	s.accepting.Store(&loops)
	for i, ln := range listeners {
		defer context.AfterFunc(acceptCtx, func() { ln.Close() })()
		accepting.Go(func() error { return s.accept(connCtx, ln, &loops[i]) })
	}
	// The periodic tasks run on during the drain.
	tasksCtx, stopTasks := context.WithCancel(context.WithoutCancel(ctx))
	defer stopTasks()
	var tasks sync.WaitGroup
	tasks.Go(func() { s.recheckLogins(tasksCtx) })
	tasks.Go(func() { s.flushPeriodically(tasksCtx) })
	err := accepting.Wait()
	if ctx.Err() != nil || s.handedOver.Load() {
		err = nil
	}
	if !s.handedOver.Load() {
		s.closeUnauthenticated()
	}
	s.drain()
	s.closeUnauthenticated()
	cancel(errDraining) // ends the remaining waits for a bastion
	s.awaitRefusals()
	stopTasks()
	tasks.Wait()
	s.closeAll()
	s.wg.Wait()
	s.flushSuppressed(time.Now(), true)
	return err
}

var errDraining = errors.New("draining")

const (
	// acceptInterval is the interval at which an accept loop turns if no client
	// connects.
	acceptInterval = 5 * time.Second
	// stuckAfter is the time without a turn after which an accept loop counts as
	// stuck.
	stuckAfter = 30 * time.Second
)

// An acceptLoop has the time of a loop's last turn; nil if the loop does not run, or if its
// listener has no deadlines.
type acceptLoop struct{ turned atomic.Pointer[time.Time] }

// AcceptStuck reports whether an accept loop of Serve has not turned for stuckAfter. A loop
// that has ended is not stuck.
func (s *Server) AcceptStuck() bool {
	loops := s.accepting.Load()
	if loops == nil {
		return false
	}
	for i := range *loops {
		if turned := (*loops)[i].turned.Load(); turned != nil && time.Since(*turned) > stuckAfter {
			return true
		}
	}
	return false
}

func (s *Server) accept(ctx context.Context, ln net.Listener, loop *acceptLoop) error {
	var spare spareFile
	defer spare.close()
	defer loop.turned.Store(nil)
	timed, hasDeadline := ln.(interface{ SetDeadline(time.Time) error })
	var logged time.Time // the last line about a shortage
	for pause := time.Duration(0); ; {
		spare.open()
		if hasDeadline {
			now := time.Now()
			loop.turned.Store(&now)
			timed.SetDeadline(now.Add(acceptInterval))
		}
		nc, err := ln.Accept()
		if err == nil {
			pause = 0
			s.accepted.Add(1)
			s.wg.Go(func() {
				defer s.accepted.Add(-1)
				s.ServeConn(ctx, nc)
			})
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if isShortage(err) && s.rejectOne(ln, &spare) {
			if time.Since(logged) >= shortageInterval {
				logged = time.Now()
				s.Log.Error("the gateway is short of resources and rejects connections", "err", err)
			}
			continue
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		s.Log.Error("accept", "err", err, "retry", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// drain notifies every terminal and waits until no user is connected, for Drain at
// most; after HandOver, until no connection is left. Connections to the console do not
// delay the end.
func (s *Server) drain() {
	drain := s.settings().Drain
	s.notifyAll(drainMessage(drain))
	s.Log.Info("draining", "connections", s.userConns(), "drain", drain.String())
	left := s.userConns
	if s.handedOver.Load() {
		left = func() int { return int(s.accepted.Load()) - s.consoles() }
	}
	deadline := time.Now().Add(drain)
	for time.Now().Before(deadline) && left() > 0 {
		time.Sleep(50 * time.Millisecond)
	}
}

// closeUnauthenticated closes the connections without a proven key, and has new
// ones rejected.
func (s *Server) closeUnauthenticated() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = true
	for c := range s.conns {
		if c.countedAs == "" {
			c.setCause("gateway", errDraining.Error())
			s.wg.Go(func() { c.stream.Close() }) // may take a second each
		}
	}
}

// userConns returns the number of connections that have a bastion or wait for one.
func (s *Server) userConns() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for c := range s.conns {
		if c.countedAs != "" && (!c.loggedIn || c.relay != nil) {
			n++
		}
	}
	return n
}

// consoles returns the number of connections to the console.
func (s *Server) consoles() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for c := range s.conns {
		if c.loggedIn && c.relay == nil {
			n++
		}
	}
	return n
}

// notifyAll writes a line to every terminal. It returns the number of connections.
func (s *Server) notifyAll(line string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		switch {
		case c.relay != nil:
			c.relay.Tell(line)
		case c.loggedIn:
			c.notifyConsole(line)
		}
	}
	return len(s.conns)
}

// awaitRefusals waits, for a second at most, until the logins whose wait for a bastion has
// just ended have been told so.
func (s *Server) awaitRefusals() {
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline) && s.waiting() > 0; {
		time.Sleep(10 * time.Millisecond)
	}
}

// waiting returns the number of connections with a proven key whose login has not
// succeeded.
func (s *Server) waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for c := range s.conns {
		if c.countedAs != "" && !c.loggedIn {
			n++
		}
	}
	return n
}

func (s *Server) closeAll() {
	if s.notifyAll(goodbyeMessage) > 0 {
		time.Sleep(100 * time.Millisecond) // for the message to be sent
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	for c := range s.conns {
		c.setCause("gateway", errDraining.Error())
		s.wg.Go(func() { c.stream.Close() }) // may take a second each
	}
}
