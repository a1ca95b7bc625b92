package agent

import (
	"cmp"
	"errors"
	"log/slog"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/account"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/mux"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

const (
	// maxListeners limits the remote forwards of one connection. sshd has no limit; this
	// is the gateway's.
	maxListeners = 1000
	// defaultMaxSessions is sshd's. sshd has no limit for channels.
	defaultMaxSessions = 10
	defaultMaxChannels = 1000
	// maxNumbers is the size of mux's table of channel numbers. It is far above
	// MaxChannels, because a channel keeps its number until both sides have closed it.
	maxNumbers = 1 << 16

	// keepaliveEvery and keepaliveMax are ClientAliveInterval and ClientAliveCountMax.
	// The connection of a gateway that has vanished keeps the bastion up for their
	// product.
	keepaliveEvery = 15 * time.Second
	keepaliveMax   = 4
)

// A conn is one connection from a gateway, for one login of the user.
type conn struct {
	server *Server
	ssh    *transport.Conn
	mux    *mux.Conn
	id     identity.Identity
	// login is the account that everything on the connection runs as. If denied is not
	// empty, the account may not log in: sessions show denied and end with sshd's exit
	// status for that, and all other requests fail.
	login  Login
	denied string
	log    *slog.Logger

	// wg counts the goroutines that serve the connection.
	wg sync.WaitGroup
	// channels counts the channels open or being opened, by either side.
	channels atomic.Int32
	// full is set when a channel has been rejected because there were too many.
	full atomic.Bool

	// noMoreSessions is used by run's goroutine only.
	noMoreSessions bool

	keepalive struct {
		timer    *time.Timer
		waiting  atomic.Bool   // a request has no answer yet
		missed   atomic.Int32  // ticks since data was received
		received atomic.Uint64 // bytes received at the last tick
	}

	mu sync.Mutex
	// closed is set when no new session or listener may start.
	closed   bool
	sessions map[*session]struct{}
	// listeners are the remote forwards.
	listeners map[listenKey]*listener
	// agent is the socket of the forwarded ssh-agent; nil until a session requests it.
	agent *listener
}

func newConn(s *Server, t *transport.Conn, id identity.Identity) *conn {
	if !id.Client.IsValid() || !id.Server.IsValid() {
		id.Client, id.Server = identity.AddrPort(t.RemoteAddr()), identity.AddrPort(t.LocalAddr())
	}
	return &conn{
		server:    s,
		ssh:       t,
		mux:       mux.New(t, maxNumbers),
		id:        id,
		log:       s.ClientLog.With("conn", id.ConnID, "user", id.User, "remote", t.RemoteAddr().String()),
		sessions:  make(map[*session]struct{}),
		listeners: make(map[listenKey]*listener),
	}
}

// run serves the connection until it ends, and then waits for its goroutines. Processes of
// its sessions may continue.
func (c *conn) run() {
	client := ""
	if c.id.Client.IsValid() {
		client = c.id.Client.String()
	}
	c.log.Info("connection open", "client", client)
	start := time.Now()
	// Start the timer after the field has been set, because tick uses the field.
	c.keepalive.timer = time.AfterFunc(math.MaxInt64, c.tick)
	c.keepalive.timer.Reset(keepaliveEvery)

	c.lookupLogin()
	c.dispatch()

	c.keepalive.timer.Stop()
	c.ssh.Close()
	c.server.leave(c)
	c.closeListeners()
	c.wg.Wait() // sessions and forwards end because their channels have
	c.log.Info("connection closed", "seconds", int(time.Since(start).Seconds()))
}

// lookupLogin looks up the account, and sets c.login and c.denied.
func (c *conn) lookupLogin() {
	defer c.recover("login")
	c.login.Account, c.denied = c.server.Account, "Your account cannot be looked up at the moment. Please contact your system administrator.\n"
	if c.server.LookupLogin == nil {
		c.denied = ""
		return
	}
	login, err := c.server.LookupLogin()
	if err != nil {
		if denied := (*account.DeniedError)(nil); errors.As(err, &denied) {
			c.denied = denied.Text
		}
		c.log.Warn("login of the account denied", "account", c.server.Account.Name, "err", err)
		return
	}
	c.login, c.denied = login, ""
}

// dispatch handles global requests and channel opens in order until the connection ends.
func (c *conn) dispatch() {
	defer c.recover("connection")
	c.mux.Serve(c.global, c.open)
}

// spawn runs f in a goroutine of the connection. A panic in it closes this connection only.
func (c *conn) spawn(name string, f func()) {
	c.wg.Go(func() {
		defer c.recover(name)
		f()
	})
}

func (c *conn) recover(name string) {
	if r := recover(); r != nil {
		oplog.Panic(c.log, name, r)
		c.ssh.Close()
	}
}

// global answers one global request (RFC 4254 section 4, OpenSSH PROTOCOL
// section 2).
func (c *conn) global(req *mux.Request) {
	var ok bool
	var payload []byte
	if req.Type == "stop-if-unused@sallyport" {
		// Sent by a gateway whose ledger does not have this bastion.
		req.Reply(c.server.stopIfUnused(), nil)
		return
	}
	if c.denied != "" {
		req.Reply(false, nil)
		return
	}
	switch req.Type {
	case "tcpip-forward":
		ok, payload = c.listenTCP(req.Payload)
	case "cancel-tcpip-forward":
		ok = c.cancelTCP(req.Payload)
	case "streamlocal-forward@openssh.com":
		ok = c.listenUnix(req.Payload)
	case "cancel-streamlocal-forward@openssh.com":
		ok = c.cancelUnix(req.Payload)
	case "no-more-sessions@openssh.com":
		c.noMoreSessions, ok = true, true
	}
	// As in sshd, the answer to keepalive@openssh.com is a failure. Any answer proves
	// that the agent is alive.
	req.Reply(ok, payload)
}

// open handles one channel open. Opens that may block are served in a goroutine.
func (c *conn) open(nc *mux.NewChannel) {
	if !c.takeSlot() {
		nc.Reject(sshmsg.ResourceShortage, "open failed")
		return
	}
	var serve func(*mux.NewChannel)
	switch nc.Type {
	case "session":
		serve = c.session
		if c.noMoreSessions {
			serve = nil
		}
	case "direct-tcpip":
		serve = c.directTCP
	case "direct-streamlocal@openssh.com":
		serve = c.directStreamlocal
	case "tun@openssh.com":
	default:
		c.freeSlot()
		nc.Reject(sshmsg.UnknownChannelType, "open failed")
		return
	}
	if serve != nil && c.denied != "" && nc.Type != "session" {
		c.freeSlot()
		nc.Reject(sshmsg.Prohibited, strings.TrimSpace(c.denied))
		return
	}
	if serve == nil {
		c.freeSlot()
		nc.Reject(sshmsg.Prohibited, "open failed")
		return
	}
	c.spawn(nc.Type, func() {
		defer c.freeSlot()
		serve(nc)
	})
}

// takeSlot counts one more channel, or returns false if there are MaxChannels. The first
// failure is logged.
func (c *conn) takeSlot() bool {
	limit := cmp.Or(c.server.MaxChannels, defaultMaxChannels)
	if int(c.channels.Add(1)) <= limit {
		return true
	}
	c.channels.Add(-1)
	if !c.full.Swap(true) {
		c.log.Warn("too many channels on this connection", "max_channels", limit)
	}
	return false
}

func (c *conn) freeSlot() { c.channels.Add(-1) }

// tick sends a keepalive if nothing was received since the last tick, and closes the
// connection if nothing was received for keepaliveMax ticks. It runs in the goroutine of
// the timer and blocks until the answer comes; later ticks meanwhile only count.
func (c *conn) tick() {
	defer c.recover("keepalive")
	c.keepalive.timer.Reset(keepaliveEvery)
	if now := c.ssh.Received(); c.keepalive.received.Swap(now) != now {
		c.keepalive.missed.Store(0)
		return
	}
	if c.keepalive.waiting.Swap(true) {
		if c.keepalive.missed.Add(1) >= keepaliveMax {
			c.log.Warn("gateway does not answer")
			c.ssh.Close()
		}
		return
	}
	_, _, err := c.mux.SendRequest("keepalive@openssh.com", true, nil)
	if err != nil {
		c.keepalive.timer.Stop()
	}
	c.keepalive.missed.Store(0)
	c.keepalive.waiting.Store(false)
}

// add adds a session, or returns false if there are too many or the connection is closing.
func (c *conn) add(s *session) bool {
	limit := c.server.MaxSessions
	if limit == 0 {
		limit = defaultMaxSessions
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || len(c.sessions) >= limit {
		return false
	}
	c.sessions[s] = struct{}{}
	return true
}

func (c *conn) remove(s *session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.sessions, s)
}

// notify shows a line on the terminals of the connection.
func (c *conn) notify(line string) {
	for _, s := range c.openSessions() {
		s.notify(line)
	}
}

func (c *conn) openSessions() []*session {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []*session
	for s := range c.sessions {
		all = append(all, s)
	}
	return all
}

// closeListeners closes all listeners of the connection. No session or listener can be
// added after that.
func (c *conn) closeListeners() {
	c.mu.Lock()
	c.closed = true
	var all []*listener
	for _, l := range c.listeners {
		all = append(all, l)
	}
	if c.agent != nil {
		all = append(all, c.agent)
	}
	clear(c.listeners)
	c.agent = nil
	c.mu.Unlock()

	for _, l := range all {
		l.close()
	}
}

// shutdown terminates the sessions, and closes the connection when they have reported their
// exit statuses, or at the deadline.
func (c *conn) shutdown(deadline time.Time) {
	defer c.ssh.Close()
	c.closeListeners()
	timeout := time.NewTimer(time.Until(deadline))
	defer timeout.Stop()
	sessions := c.openSessions()
	for _, s := range sessions {
		s.terminate()
	}
	for _, s := range sessions {
		select {
		case <-s.done:
		case <-timeout.C:
			return
		}
	}
}
