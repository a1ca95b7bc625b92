package gateway

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/relay"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// consoleProfile is the profile of the console, as in user+ctl. Package config
// rejects it as the name of another profile.
const consoleProfile = "ctl"

// A Connection describes a connection whose user has logged in.
type Connection struct {
	Identity identity.Identity
	// ClientVersion is the client's identification string, unchecked.
	ClientVersion string
	Since         time.Time // when it was accepted
	// Console is true for a connection to the console. The fields below are
	// zero then.
	Console bool
	// Task and Generation name the bastion. They are zero while it starts.
	Task       string
	Generation int64
	// FromClient and ToClient are the bytes of data and stderr that were
	// relayed so far, on all channels.
	FromClient, ToClient int64
	// Channels are the open channels.
	Channels []relay.Channel
}

// ID returns the connection's reference; see [identity.Identity.ConnID].
func (c Connection) ID() string { return c.Identity.ConnID }

// A ConsoleConn is a connection to the console, for [Server.Console].
type ConsoleConn struct {
	// Conn is authenticated. The console owns it, and closes it at the end.
	Conn *transport.Conn

	Identity identity.Identity
	// MaxSessions is the limit of sessions that are open at once; zero means
	// ten.
	MaxSessions int
	// Notices delivers lines for every terminal of the connection. It is
	// never closed.
	Notices <-chan string
	// Audit writes an event of the connection. If it returns an error, the
	// audited action must not happen, and the error's text is for the user.
	Audit func(audit.Event) error
}

// Connections returns the connections whose users have logged in, the oldest
// first. A connection that still waits for its bastion during authentication is
// not among them.
func (s *Server) Connections() []Connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Connection
	for c := range s.conns {
		if c.loggedIn {
			all = append(all, c.describe())
		}
	}
	slices.SortFunc(all, func(a, b Connection) int {
		return cmp.Or(a.Since.Compare(b.Since), strings.Compare(a.ID(), b.ID()))
	})
	return all
}

// Disconnect ends the connections for which match returns true, and returns them.
// It first writes why to every session; a client that does not read is closed after
// two seconds. Disconnect does not wait for the end of the connections. Match is
// called with a lock held, and must not block.
func (s *Server) Disconnect(why string, match func(Connection) bool) []Connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ended []Connection
	for c := range s.conns {
		if !c.loggedIn || s.closing {
			continue
		}
		if d := c.describe(); match(d) {
			ended = append(ended, d)
			c.disconnectSoon(why)
		}
	}
	return ended
}

// disconnectSoon calls disconnect in a goroutine. The caller holds srv.mu, and c has
// logged in.
func (c *conn) disconnectSoon(why string) {
	if c.relay != nil { // at once, because the caller may stop the bastion next
		c.relay.Expect(why)
	}
	c.srv.wg.Go(func() { c.disconnect(why) })
}

// describe returns the Connection of c. The caller holds srv.mu, and c has logged
// in.
func (c *conn) describe() Connection {
	d := Connection{
		Identity:      c.identity,
		ClientVersion: c.clientVersion,
		Since:         c.began,
		Console:       c.relay == nil,
	}
	if c.relay == nil {
		return d
	}
	d.Channels, d.FromClient, d.ToClient = c.relay.Channels()
	if b := c.bastion(); b != nil {
		d.Task, d.Generation = b.Task.ID, b.Task.Generation
	}
	return d
}

// bastion returns the connection to the bastion, or nil if the dial has not ended or
// has failed. C has a dial.
func (c *conn) bastion() *bastion.Conn {
	select {
	case <-c.dial.done:
		return c.dial.conn
	default:
		return nil
	}
}

// disconnect writes why to every session, and ends the connection within
// disconnectGrace.
func (c *conn) disconnect(why string) {
	defer c.closeOnPanic(c.stream)
	c.log.Info("disconnecting", "user", c.identity.User, "why", why)
	c.setCause("gateway", why)
	// When the bastion's connection ends, the relay ends each session with
	// the message, including those without a terminal.
	if c.relay != nil {
		c.relay.Expect(why)
		select {
		case <-c.dial.done:
			if b := c.dial.conn; b != nil {
				b.Close()
			}
		default: // the relay ends the sessions that wait for the bastion
			c.dial.cancel()
		}
	} else {
		c.notifyConsole(why)
	}
	select {
	case <-c.done:
	case <-time.After(disconnectGrace):
	}
	c.stream.Close()
}

// disconnectGrace bounds the time in which a disconnected client may read why.
const disconnectGrace = 2 * time.Second

// notifyConsole writes a line to the terminals of a console. If eight lines are
// unread, it drops the line instead of blocking.
func (c *conn) notifyConsole(line string) {
	select {
	case c.notices <- line:
	default:
	}
}

// openConsole prepares the connection for the console, which needs no bastion.
func (c *conn) openConsole(id identity.Identity) error {
	if id.Permissions.ForceCommand != "" {
		c.attempt.err = errForcedCommand
		return errForcedCommand
	}
	// Consoles are counted apart, under a name that no user can have, so that
	// a user at the limit of connections can still list and end them. Gateways
	// have no limit: the one that logs in has limited its users.
	name, limit := id.User+"+"+consoleProfile, c.cfg.MaxConnectionsPerUser
	if id.Via != "" {
		name, limit = PeerUser, 0
	}
	if err := c.countUser(name, limit); err != nil {
		c.attempt.err = err
		return err
	}
	if err := c.auditLogin(id); err != nil {
		return err
	}
	c.notices = make(chan string, 8)
	return nil
}

// isConsole reports whether openConsole has succeeded.
func (c *conn) isConsole() bool { return c.notices != nil }
