// Package relay joins two SSH connections: whatever one side opens, asks or
// sends goes to the other, unless it may not.
//
// # What passes
//
// The relay is blind to message types. Channels and requests it has never
// heard of pass with their payload untouched, so it is not in the way of what
// clients and servers invent next. The exceptions, each because it belongs to
// one hop and not to the whole way:
//
//   - keepalive@openssh.com is answered here at once, in both directions, as a
//     global and as a channel request: the client must get its answer while its
//     bastion is still starting.
//   - no-more-sessions@openssh.com is enforced here. Passed on it could overtake
//     the session it follows, and sshd then kills the connection.
//   - hostkeys-00@openssh.com and hostkeys-prove-00@openssh.com speak of the
//     host keys of one connection, and their signatures cover its session id
//     (OpenSSH PROTOCOL, section 2.5). The bastion's would only mislead.
//   - tun@openssh.com is refused: a bastion has no tunnel device.
//
// And what the user's [identity.Permissions] do not permit is refused here, as
// it is in the bastion.
//
// # Order
//
// RFC 4254 lets global requests be answered only in order (section 4), and a
// client may rely on a forward it asked for before it opened a channel. So one
// goroutine for each side handles global requests and channel opens in the
// order in which they came. Inside a channel, data, stderr and requests pass
// each in its own order; package ssh does not tell the order between them. All
// of them are delivered before EOF and close are.
package relay

import (
	"errors"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// A Peer is one of the two connections, with all that comes in on it. The relay
// owns it: nobody else may read from Chans or Reqs.
type Peer struct {
	Conn  ssh.Conn
	Chans <-chan ssh.NewChannel
	Reqs  <-chan *ssh.Request
}

// A Relay joins a client's connection to its bastion's. Set the fields, then
// call [Relay.Run], once.
type Relay struct {
	Client      Peer
	Permissions identity.Permissions

	// MaxSessions is how many channels of type session may be open at once,
	// and MaxChannels how many of all types, in both directions together. A
	// channel whose reader has stalled holds up to 2 MiB, the window of
	// package ssh. Zero means 10 and 256.
	MaxSessions, MaxChannels int

	// Lost is written to the standard error of every session that is open
	// when the bastion's connection ends by itself.
	Lost string

	Log *slog.Logger

	noMoreSessions atomic.Bool
	serverGone     chan struct{} // closed when the bastion's connection has ended

	mu       sync.Mutex
	draining bool // no new channels: the connection is about to be closed
	sessions int
	channels int
	ptys     map[*sink]struct{} // the client's ends of sessions with a terminal
	wg       sync.WaitGroup     // everything that serves a channel
}

// What an ssh.Channel's peer is told when the relay itself says no.
const (
	maxSessionsDefault = 10
	maxChannelsDefault = 256
	// backlogMax is how many requests and opens wait for a bastion that is
	// still starting. OpenSSH sends a handful; each -L, -R or -D adds one.
	backlogMax = 256
)

// ErrNoServer is what Run returns when the bastion never came.
var ErrNoServer = errors.New("no bastion")

// Run relays until either side ends, then closes the other. Every goroutine it
// starts has returned when Run returns, and both connections are closed.
//
// The bastion may still be starting: Run takes it from server, and what the
// client asks until then waits. Keepalives are answered meanwhile. If server is
// closed without a value, everything that waits is refused with the text that
// refusal returns, and Run returns ErrNoServer.
//
// If the client leaves before the bastion has come, Run returns at once and has
// taken nothing from server.
//
// The error is the reason of the side that ended first: [io.EOF] if
// it hung up, or what it gave as its reason. byClient tells
// which side that was.
func (r *Relay) Run(server <-chan Peer, refusal func() string) (byClient bool, err error) {
	if r.MaxSessions == 0 {
		r.MaxSessions = maxSessionsDefault
	}
	if r.MaxChannels == 0 {
		r.MaxChannels = maxChannelsDefault
	}
	r.serverGone = make(chan struct{})
	r.ptys = make(map[*sink]struct{})

	backlog, up, gone := r.await(server)
	if up.Conn == nil {
		for _, item := range backlog {
			item.refuse(refusal())
		}
		r.Client.Conn.Close()
		r.discard(r.Client)
		if gone {
			return true, r.Client.Conn.Wait()
		}
		return false, ErrNoServer
	}

	client := &side{r: r, name: "client", Peer: r.Client, far: up.Conn, toServer: true}
	bastion := &side{r: r, name: "bastion", Peer: up, far: r.Client.Conn}
	var ended atomic.Pointer[side]
	var loops sync.WaitGroup
	loops.Go(func() {
		client.serve(backlog)
		ended.CompareAndSwap(nil, client)
		up.Conn.Close()
	})
	loops.Go(func() {
		bastion.serve(nil)
		ended.CompareAndSwap(nil, bastion)
		close(r.serverGone)
		// The sessions say goodbye to the client before its connection ends.
		r.drain()
		r.Client.Conn.Close()
	})
	loops.Wait()
	r.wg.Wait()
	first := ended.Load()
	return first == client, first.Conn.Wait()
}

// await collects what the client asks until the bastion is there. The Peer is
// zero if the client has gone, or no bastion came.
func (r *Relay) await(server <-chan Peer) (backlog []item, up Peer, gone bool) {
	for {
		select {
		case up := <-server: // before anything else that is ready
			return backlog, up, false
		default:
		}
		var next item
		select {
		case up := <-server:
			return backlog, up, false
		case req, open := <-r.Client.Reqs:
			if !open {
				return backlog, Peer{}, true
			}
			if answeredHere(req) {
				continue
			}
			next.req = req
		case nc, open := <-r.Client.Chans:
			if !open {
				return backlog, Peer{}, true
			}
			// Requests that came before this open are already queued in
			// Reqs: package ssh delivers in order.
			for len(r.Client.Reqs) > 0 {
				if req := <-r.Client.Reqs; req != nil && !answeredHere(req) {
					backlog = r.enqueue(backlog, item{req: req})
				}
			}
			next.open = nc
		}
		backlog = r.enqueue(backlog, next)
	}
}

func (r *Relay) enqueue(backlog []item, next item) []item {
	if len(backlog) >= backlogMax {
		next.refuse("too many requests while the bastion is starting")
		return backlog
	}
	return append(backlog, next)
}

// drain waits until all channels have ended and lets no new ones begin.
func (r *Relay) drain() {
	r.mu.Lock()
	r.draining = true
	r.mu.Unlock()
	r.wg.Wait()
}

// discard reads what still comes in on a closed connection, so that its mux can
// end.
func (r *Relay) discard(p Peer) {
	for nc := range p.Chans {
		nc.Reject(ssh.ConnectionFailed, "connection is closing")
	}
	for req := range p.Reqs {
		req.Reply(false, nil)
	}
}

// Tell writes a line to every terminal of the connection. It does not wait for
// terminals that are not being read.
func (r *Relay) Tell(line string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.ptys {
		go s.writeStderr([]byte("\r\n" + line + "\r\n")) // ends with the channel at the latest
	}
}

func (r *Relay) remember(s *sink) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ptys[s] = struct{}{}
}

func (r *Relay) forget(s *sink) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.ptys, s)
}

// An item is a global request or a channel open, whichever is not nil.
type item struct {
	req  *ssh.Request
	open ssh.NewChannel
}

func (i item) refuse(why string) {
	if i.req != nil {
		i.req.Reply(false, nil)
	}
	if i.open != nil {
		i.open.Reject(ssh.ConnectionFailed, why)
	}
}

// A side handles what comes in from one of the two peers.
type side struct {
	Peer
	r        *Relay
	name     string
	far      ssh.Conn // the other side's
	toServer bool     // this is the client's side
}

// serve handles the backlog and then what comes in, in order, until the
// connection ends.
func (s *side) serve(backlog []item) {
	defer s.recover("connection")
	for _, it := range backlog {
		if it.req != nil {
			s.request(it.req)
		} else {
			s.open(it.open)
		}
	}
	backlog = nil
	reqs, chans := s.Reqs, s.Chans
	for reqs != nil || chans != nil {
		select {
		case req, ok := <-reqs:
			if !ok {
				reqs = nil
				continue
			}
			s.request(req)
		case nc, ok := <-chans:
			if !ok {
				chans = nil
				continue
			}
			// Package ssh queues a request before a later open, so taking
			// the queued requests first restores the order on the wire.
			for n := len(reqs); n > 0; n-- {
				if req := <-reqs; req != nil {
					s.request(req)
				}
			}
			s.open(nc)
		}
	}
}

// request passes a global request on and its reply back.
func (s *side) request(req *ssh.Request) {
	switch {
	case answeredHere(req):
		return
	case req.Type == "no-more-sessions@openssh.com" && s.toServer:
		s.r.noMoreSessions.Store(true)
		req.Reply(true, nil)
		return
	case !s.r.permitsRequest(req.Type):
		req.Reply(false, nil)
		return
	}
	ok, payload, err := s.far.SendRequest(req.Type, req.WantReply, req.Payload)
	req.Reply(ok && err == nil, payload)
}

// answeredHere answers the requests that belong to one hop. OpenSSH's own
// server answers keepalives with failure; any answer will do.
func answeredHere(req *ssh.Request) bool {
	switch req.Type {
	case "keepalive@openssh.com", "hostkeys-00@openssh.com", "hostkeys-prove-00@openssh.com":
		req.Reply(false, nil)
		return true
	}
	return false
}

// open starts a channel to the far side, or refuses it. It returns at once: a
// forward may take long to connect.
func (s *side) open(nc ssh.NewChannel) {
	r, kind := s.r, nc.ChannelType()
	if why, ok := r.permitsChannel(kind); !ok {
		nc.Reject(ssh.Prohibited, why)
		return
	}
	session := kind == "session"
	r.mu.Lock()
	switch {
	case r.draining:
		r.mu.Unlock()
		nc.Reject(ssh.ConnectionFailed, "connection is closing")
		return
	case session && r.noMoreSessions.Load():
		r.mu.Unlock()
		nc.Reject(ssh.Prohibited, "no more sessions were announced")
		return
	case session && r.sessions >= r.MaxSessions:
		r.mu.Unlock()
		nc.Reject(ssh.ResourceShortage, "too many sessions on this connection")
		return
	case r.channels >= r.MaxChannels:
		r.mu.Unlock()
		nc.Reject(ssh.ResourceShortage, "too many channels on this connection")
		return
	}
	r.channels++
	if session {
		r.sessions++
	}
	r.wg.Add(1)
	r.mu.Unlock()
	go func() {
		defer r.wg.Done()
		defer func() {
			r.mu.Lock()
			r.channels--
			if session {
				r.sessions--
			}
			r.mu.Unlock()
		}()
		defer s.recover(kind)
		s.bridge(nc)
	}()
}

// recover keeps a panic from ending the process, and with it everybody else's
// connections: it ends this connection instead.
func (s *side) recover(what string) {
	if p := recover(); p != nil {
		s.r.Log.Error("panic", "in", what, "side", s.name, "panic", p, "stack", string(debug.Stack()))
		s.Conn.Close()
		s.far.Close()
	}
}
