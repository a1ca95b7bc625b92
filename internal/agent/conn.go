package agent

import (
	"log/slog"
	"math"
	"net"
	"net/netip"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/wire"
)

const (
	// maxChannels is how many channels one connection may have, whoever
	// opened them, and maxListeners how many remote forwards.
	maxChannels  = 256
	maxListeners = 128
	// defaultMaxSessions is sshd's MaxSessions.
	defaultMaxSessions = 10

	// keepaliveEvery and keepaliveMax are ClientAliveInterval and
	// ClientAliveCountMax: a gateway that vanished does not count as use of
	// the bastion for longer than their product.
	keepaliveEvery = 15 * time.Second
	keepaliveMax   = 4
)

// A conn is one gateway's connection: that is, one user's.
type conn struct {
	server *Server
	stream *wire.Conn // under ssh
	ssh    *ssh.ServerConn
	id     identity.Identity
	log    *slog.Logger
	chans  <-chan ssh.NewChannel
	reqs   <-chan *ssh.Request

	// wg counts the goroutines that serve the connection.
	wg sync.WaitGroup
	// channels counts the channels open or being opened, by either side.
	channels atomic.Int32

	// noMoreSessions is used by run's goroutine only.
	noMoreSessions bool

	keepalive struct {
		timer   *time.Timer
		waiting atomic.Bool   // for an answer
		missed  atomic.Int32  // ticks since anything has come
		heard   atomic.Uint64 // what stream had heard at the last tick
	}

	mu sync.Mutex
	// closed is set when no new session or listener may start.
	closed   bool
	sessions map[*session]struct{}
	// listeners are the remote forwards.
	listeners map[listenKey]*listener
	// agent is the forwarded ssh-agent's socket, once a session asked for it.
	agent *listener
}

func newConn(s *Server, stream *wire.Conn, sc *ssh.ServerConn, chans <-chan ssh.NewChannel, reqs <-chan *ssh.Request) *conn {
	id := sc.Permissions.ExtraData[identityKey{}].(identity.Identity)
	if !id.Client.IsValid() || !id.Server.IsValid() {
		id.Client, id.Server = addrPort(sc.RemoteAddr()), addrPort(sc.LocalAddr())
	}
	return &conn{
		server:    s,
		stream:    stream,
		ssh:       sc,
		id:        id,
		log:       s.Log.With("conn", id.ConnID, "user", id.User, "remote", sc.RemoteAddr().String()),
		chans:     chans,
		reqs:      reqs,
		sessions:  make(map[*session]struct{}),
		listeners: make(map[listenKey]*listener),
	}
}

func addrPort(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// run serves the connection until it ends, and then waits for everything that
// was started for it, except processes that made themselves independent.
func (c *conn) run() {
	c.log.Info("connection open", "client", c.id.Client.String())
	start := time.Now()
	// Created first and started second: tick uses the field.
	c.keepalive.timer = time.AfterFunc(math.MaxInt64, c.tick)
	c.keepalive.timer.Reset(keepaliveEvery)

	c.dispatch()

	c.keepalive.timer.Stop()
	c.ssh.Close()
	c.server.leave(c)
	c.stopStarting()
	c.wg.Wait() // sessions and forwards end because their channels have
	c.log.Info("connection closed", "seconds", int(time.Since(start).Seconds()))
}

// dispatch handles global requests and channel opens in the order they came.
// Package ssh delivers them on two Go channels, but puts a request into its
// channel before it reads the open that followed it from the wire. So all
// requests that are there are handled before an open is.
func (c *conn) dispatch() {
	defer c.recover("connection")
	reqs, chans := c.reqs, c.chans
	for reqs != nil || chans != nil {
		select {
		case req, ok := <-reqs:
			if !ok {
				reqs = nil
				break
			}
			c.global(req)
		case nc, ok := <-chans:
			if !ok {
				chans = nil
				break
			}
			for more := true; more; {
				select {
				case req, ok := <-reqs:
					if ok {
						c.global(req)
					} else {
						reqs = nil
					}
				default:
					more = false
				}
			}
			c.open(nc)
		}
	}
}

// spawn runs f in a goroutine of the connection. A panic in it ends the
// connection and harms no other.
func (c *conn) spawn(what string, f func()) {
	c.wg.Go(func() {
		defer c.recover(what)
		f()
	})
}

func (c *conn) recover(what string) {
	if r := recover(); r != nil {
		c.log.Error("panic", "in", what, "panic", r, "stack", string(debug.Stack()))
		c.ssh.Close()
	}
}

// global answers one global request (RFC 4254 section 4, OpenSSH PROTOCOL
// section 2).
func (c *conn) global(req *ssh.Request) {
	var ok bool
	var payload []byte
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
	// keepalive@openssh.com is answered with failure, as sshd does: any
	// answer tells what it asks.
	req.Reply(ok, payload)
}

// open handles one channel open. The ones that take time go on in a goroutine.
func (c *conn) open(nc ssh.NewChannel) {
	if !c.takeSlot() {
		c.log.Warn("too many channels", "type", nc.ChannelType())
		nc.Reject(ssh.ResourceShortage, "open failed")
		return
	}
	var serve func(ssh.NewChannel)
	switch nc.ChannelType() {
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
		nc.Reject(ssh.UnknownChannelType, "open failed")
		return
	}
	if serve == nil {
		c.freeSlot()
		nc.Reject(ssh.Prohibited, "open failed")
		return
	}
	c.spawn(nc.ChannelType(), func() {
		defer c.freeSlot()
		serve(nc)
	})
}

// takeSlot counts one more channel, unless there are too many.
func (c *conn) takeSlot() bool {
	if c.channels.Add(1) > maxChannels {
		c.channels.Add(-1)
		return false
	}
	return true
}

func (c *conn) freeSlot() { c.channels.Add(-1) }

// tick asks a gateway that has been silent whether it is still there, and hangs
// up when nothing has come from it for too long. It runs in a goroutine of the
// timer's, which waits here for the answer while later ticks only count.
func (c *conn) tick() {
	defer c.recover("keepalive")
	c.keepalive.timer.Reset(keepaliveEvery)
	if now := c.stream.Heard(); c.keepalive.heard.Swap(now) != now {
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
	_, _, err := c.ssh.SendRequest("keepalive@openssh.com", true, nil)
	if err != nil {
		c.keepalive.timer.Stop()
	}
	c.keepalive.missed.Store(0)
	c.keepalive.waiting.Store(false)
}

// add counts a session of the connection, unless there are too many or the
// connection is ending.
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

// tell shows a line on the terminals of the connection.
func (c *conn) tell(line string) {
	for _, s := range c.openSessions() {
		s.tell(line)
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

// stopStarting stops listening for the client. No session, listener or
// connection of one starts afterwards.
func (c *conn) stopStarting() {
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

// shutdown hangs up the sessions, lets them tell the client how they ended,
// though not beyond the deadline, and closes the connection.
func (c *conn) shutdown(deadline time.Time) {
	defer c.ssh.Close()
	c.stopStarting()
	timeout := time.NewTimer(time.Until(deadline))
	defer timeout.Stop()
	sessions := c.openSessions()
	for _, s := range sessions {
		s.hangUp()
	}
	for _, s := range sessions {
		select {
		case <-s.done:
		case <-timeout.C:
			return
		}
	}
}
