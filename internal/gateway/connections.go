package gateway

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/relay"
)

// consoleProfile is what users ask for to get the console: user+ctl. No profile
// can have this name.
const consoleProfile = "ctl"

// A Connection is what is known of one whose user has logged in.
type Connection struct {
	Identity identity.Identity
	// ClientVersion is the client's identification string, as it came.
	ClientVersion string
	Since         time.Time
	// Console says that this is one to the console: the rest is zero then.
	Console bool
	// Task and Generation name the bastion; zero while it is starting.
	Task       string
	Generation int64
	// FromClient and ToClient are how many bytes of data and stderr were
	// relayed on all channels so far.
	FromClient, ToClient int64
	// Channels are those that are open.
	Channels []relay.Channel
}

// ID names the connection, see [identity.Identity.ConnID].
func (c Connection) ID() string { return c.Identity.ConnID }

// A ConsoleConn is a connection to the console, for [Server.Console].
type ConsoleConn struct {
	*ssh.ServerConn
	Chans <-chan ssh.NewChannel
	Reqs  <-chan *ssh.Request

	Identity identity.Identity
	// Notices are sentences for every terminal of the connection, until the
	// connection has ended.
	Notices <-chan string
}

// Connections returns the connections whose users have logged in, the oldest
// first. A user whose bastion is starting counts as logged in when she has
// waited for so long that her client was let through.
func (s *Server) Connections() []Connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Connection
	for c := range s.conns {
		if c.peer != nil {
			all = append(all, c.describe())
		}
	}
	slices.SortFunc(all, func(a, b Connection) int {
		return cmp.Or(a.Since.Compare(b.Since), strings.Compare(a.ID(), b.ID()))
	})
	return all
}

// Disconnect ends the connections for which end reports true, and returns them.
// Every session is told why first; a client that does not read loses its
// connection after two seconds all the same. It does not wait for that. End may
// be called for all connections, and must not block.
func (s *Server) Disconnect(why string, end func(Connection) bool) []Connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ended []Connection
	for c := range s.conns {
		if c.peer == nil || s.closing {
			continue
		}
		if d := c.describe(); end(d) {
			ended = append(ended, d)
			if c.relay != nil { // at once: the caller may go on to end the bastion
				c.relay.Expect(why)
			}
			s.wg.Go(func() { c.disconnect(why) })
		}
	}
	return ended
}

// describe returns what is known of c. The caller holds Server.mu, and c has
// logged in.
func (c *conn) describe() Connection {
	d := Connection{
		Identity:      c.identity,
		ClientVersion: string(c.peer.ClientVersion()),
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

// bastion returns the connection to the bastion of a user who has logged in; nil
// if there is none yet, or never will be.
func (c *conn) bastion() *bastion.Conn {
	select {
	case <-c.dial.done:
		return c.dial.conn
	default:
		return nil
	}
}

// disconnect ends the connection and says why.
func (c *conn) disconnect(why string) {
	defer c.recover(c.wire)
	c.log.Info("disconnecting", "user", c.identity.User, "why", why)
	c.because("gateway", why)
	// The end of the bastion's connection is how sessions that have no
	// terminal can be told, too: the relay closes them one by one.
	var ended sync.WaitGroup
	if c.relay != nil {
		c.relay.Expect(why)
		select {
		case <-c.dial.done:
			if b := c.dial.conn; b != nil {
				ended.Go(func() {
					defer c.recover(c.wire)
					b.Close()
				})
			}
		default: // it has no session yet
			c.wire.Close()
		}
	} else {
		c.notice(why)
	}
	gone := make(chan struct{})
	ended.Go(func() { c.peer.Wait(); close(gone) })
	select {
	case <-gone:
	case <-time.After(disconnectGrace):
	}
	c.wire.Close()
	ended.Wait()
}

// disconnectGrace is how long a client that is to go may take to read why.
const disconnectGrace = 2 * time.Second

// notice puts a line on the terminals of a console. It does not wait: a console
// that has not read the last eight needs no ninth.
func (c *conn) notice(line string) {
	select {
	case c.notices <- line:
	default:
	}
}

// admitConsole lets the user in to her console, where nothing is started.
func (c *conn) admitConsole(id identity.Identity) error {
	switch {
	case c.isConsole():
		return errTwice
	case id.Permissions.ForceCommand != "":
		c.refusal = errForcedCommand
		return errForcedCommand
	}
	// They are counted apart, under a name that no user has: who has too many
	// connections can still come here and see which.
	if err := c.countUser(id.User+"+"+consoleProfile, c.MaxConnections); err != nil {
		c.refusal = err
		return err
	}
	if err := c.auditLogin(id); err != nil {
		return err
	}
	c.notices = make(chan string, 8)
	return nil
}

// isConsole says whether the connection was let in to the console.
func (c *conn) isConsole() bool { return c.notices != nil }
