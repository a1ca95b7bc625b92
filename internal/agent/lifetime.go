package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	// maxLifeWarning is how long before MaxLife terminals are warned.
	maxLifeWarning = 5 * time.Minute
	// lastWarning is how long before the end of the StopTimeout terminals are warned
	// a second time.
	lastWarning = 20 * time.Second
	// hangupGrace is the time between SIGHUP and SIGKILL.
	hangupGrace = 5 * time.Second
	// stopGrace is the time in which connections can report the exit statuses of their
	// sessions when the agent stops. It must be longer than hangupGrace.
	stopGrace = 8 * time.Second
	// stopMargin is the part of StopTimeout that the shutdown takes.
	stopMargin = 2*stopGrace + 4*time.Second
)

// Causes of the end of Serve's context.
var (
	errIdle    = errors.New("no connection for the idle time")
	errUnused  = errors.New("a gateway has asked it to stop, because it is unused")
	errMaxLife = errors.New("the bastion has reached its maximum life")
)

// giveNotice stops accepting connections, and shows on all terminals when the bastion ends.
// It returns when all connections have closed, or when the notice is over.
func (s *Server) giveNotice(notice time.Duration) {
	s.mu.Lock()
	s.closing = true
	noConns := make(chan struct{})
	s.noConns = noConns
	open := len(s.conns) + s.reserved
	s.mu.Unlock()
	if notice <= 0 || open == 0 {
		return
	}
	s.Log.Info("agent is told to stop", "connections", open, "notice", notice.String())
	s.notify(fmt.Sprintf("This bastion ends in %d seconds: it is being stopped from outside. Please finish your work. If you connect again, you get a new bastion.", int(notice.Seconds())))
	last := time.AfterFunc(notice-lastWarning, func() {
		if notice > 2*lastWarning {
			s.notify(fmt.Sprintf("This bastion ends in %d seconds.", int(lastWarning.Seconds())))
		}
	})
	defer last.Stop()
	timer := time.NewTimer(notice)
	defer timer.Stop()
	select {
	case <-noConns:
	case <-timer.C:
	}
}

var errStopping = errors.New("the bastion is stopping")

// reserve keeps the bastion up for a gateway that has authenticated, and returns false if
// the bastion is ending. It is called before the gateway is told of its success, because
// the bastion must not end after that. enter, or leave(nil), must follow.
func (s *Server) reserve() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.reserved++
	if s.idle != nil {
		s.idle.Stop()
	}
	return true
}

// enter turns a reservation into a connection, and returns false if the bastion is ending.
// If it returns true, leave(c) must follow.
func (s *Server) enter(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.reserved--
	s.conns[c] = struct{}{}
	return true
}

// leave removes c, or a reservation if c is nil. The last one starts the idle timer, or
// ends the bastion if stopIfUnused has agreed to that.
func (s *Server) leave(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c == nil {
		s.reserved--
	}
	delete(s.conns, c)
	if len(s.conns)+s.reserved > 0 {
		return
	}
	if s.noConns != nil {
		close(s.noConns)
		s.noConns = nil
	}
	switch {
	case s.closing:
		s.stop(errUnused) // no effect if the bastion is ending for another reason
	case s.idle != nil:
		s.idle.Reset(s.Idle)
	}
}

// stopIfUnused reports whether the caller's connection is the only one. If so, the
// bastion accepts no other, and ends after it.
func (s *Server) stopIfUnused() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns)+s.reserved > 1 {
		return false
	}
	s.closing = true
	return true
}

// idleExpired is called when the idle timer fires. If a gateway has authenticated at the
// same moment, nothing happens: leave starts the timer again.
func (s *Server) idleExpired(stop context.CancelCauseFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns)+s.reserved == 0 {
		s.closing = true
		stop(errIdle)
	}
}

// connections returns the authenticated connections.
func (s *Server) connections() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*conn
	for c := range s.conns {
		all = append(all, c)
	}
	return all
}

// notify shows a line on every terminal. It does not block on a terminal whose output is
// stopped.
func (s *Server) notify(line string) {
	for _, c := range s.connections() {
		c.notify(line)
	}
}

// shutdown stops accepting connections and terminates every process, including those whose
// client has disconnected. It closes the connections when all sessions have reported their
// exit status, or after stopGrace.
func (s *Server) shutdown() {
	s.mu.Lock()
	s.closing = true
	running := slices.Collect(maps.Keys(s.processes))
	s.mu.Unlock()
	for _, p := range running {
		p.terminate()
	}

	var ended sync.WaitGroup
	deadline := time.Now().Add(stopGrace)
	for _, c := range s.connections() {
		ended.Go(func() { c.shutdown(deadline) })
	}
	ended.Wait()
}

// start starts a command as the account of the connection. The server owns the process and
// waits for it ([process.ended]); the process continues after its client has disconnected.
func (c *conn) start(cmd command) (*process, error) {
	s := c.server
	p, err := c.login.start(cmd)
	if err != nil {
		return nil, err
	}
	p.grace = cmp.Or(s.hangupGrace, hangupGrace)
	s.mu.Lock()
	s.processes[p] = struct{}{}
	closing := s.closing
	s.mu.Unlock()
	if closing { // shutdown may not have seen it
		p.terminate()
	}
	s.reaping.Go(func() {
		p.status = p.wait()
		s.mu.Lock()
		delete(s.processes, p)
		s.mu.Unlock()
		close(p.ended)
	})
	return p, nil
}
