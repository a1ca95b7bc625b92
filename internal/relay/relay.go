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
// And what the user's [identity.Permissions] rule out is refused here, as far as
// it can be told without the address of a host; the bastion, which knows that,
// asks the same questions once more. Which command is forced, only the bastion
// enforces.
//
// # Order
//
// RFC 4254 lets global requests be answered only in order (section 4), and a
// client may rely on a forward it asked for before it opened a channel. So one
// goroutine for each side handles global requests and channel opens, requests
// first where package ssh does not tell which came first. Inside a channel, data, stderr and requests pass
// each in its own order; package ssh does not tell the order between them. All
// of them are delivered before EOF and close are.
package relay

import (
	"errors"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/policy"
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
	// package ssh, and some 50 bytes for each packet of that, however small it
	// is. Zero means 10 and 256.
	MaxSessions, MaxChannels int

	// Lost is written to the standard error of every session that is open
	// when the bastion's connection ends by itself. Empty means nothing is.
	Lost string

	// Watch, if not nil, is told what passes and what does not.
	Watch Watcher

	Log *slog.Logger

	loops      sync.WaitGroup // what serves the two connections
	clientLeft atomic.Bool    // before the bastion did
	serverGone chan struct{}  // closed when the bastion's connection has ended

	mu       sync.Mutex
	draining bool // no new channels: the connection is about to be closed
	sessions int
	channels int
	opened   int                // channels that were begun so far
	ptys     map[*sink]struct{} // the client's ends of sessions with a terminal
	carried  map[*flow]*Channel // the channels that are open, by their flow to the bastion
	wg       sync.WaitGroup     // everything that serves a channel

	toBastion, toClient int64 // bytes of the channels that have ended

	expected atomic.Pointer[string] // see Expect
}

const (
	maxSessionsDefault = 10
	maxChannelsDefault = 256
	// backlogMax is how many requests and opens wait for a bastion that is
	// still starting, and backlogBytes how much they may carry. OpenSSH sends
	// a handful; each -R adds one, and so does each keepalive behind it.
	backlogMax   = 1024
	backlogBytes = 1 << 20
	// farewell is how long a client may stay when there is no bastion. It is
	// for the sentence to arrive, and for the client that has not yet opened
	// the channel in which it will be told.
	farewell = 2 * time.Second
)

// ErrNoServer is what Run returns when the bastion never came.
var ErrNoServer = errors.New("no bastion")

// Run relays until either side ends, then closes the other. Every goroutine it
// starts has returned when Run returns, and both connections are closed.
//
// The bastion may still be starting: Run takes it from server, and what the
// client asks until then waits. Keepalives are answered meanwhile. If server is
// closed without a value, everything the client asks is refused with the text
// that refusal returns, for two seconds or until the client leaves, and Run
// returns ErrNoServer.
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

	client := &side{r: r, name: "client", Peer: r.Client, toServer: true}
	backlog, up, gone := client.await(server)
	switch {
	case gone:
		client.dismiss(backlog, refusal, 0)
		return true, r.Client.Conn.Wait()
	case up.Conn == nil:
		client.dismiss(backlog, refusal, farewell)
		return false, ErrNoServer
	}

	bastion, first := r.link(client, up)
	r.loops.Go(func() { bastion.serve(nil) })
	client.serve(backlog)
	r.loops.Wait()
	return first.Load() == client, first.Load().Conn.Wait()
}

// link makes the bastion's side, and says what happens when either side ends.
// The result first tells which one that was.
func (r *Relay) link(client *side, up Peer) (bastion *side, first *atomic.Pointer[side]) {
	first = new(atomic.Pointer[side])
	bastion = &side{r: r, name: "bastion", Peer: up, far: r.Client.Conn}
	client.far = up.Conn
	client.ended = sync.OnceFunc(func() {
		if first.CompareAndSwap(nil, client) {
			r.clientLeft.Store(true)
		}
		up.Conn.Close()
	})
	bastion.ended = sync.OnceFunc(func() {
		first.CompareAndSwap(nil, bastion)
		close(r.serverGone)
		// The sessions say goodbye to the client before its connection ends.
		r.drain()
		r.Client.Conn.Close()
	})
	return bastion, first
}

// drain waits until all channels have ended and lets no new ones begin.
func (r *Relay) drain() {
	r.mu.Lock()
	r.draining = true
	r.mu.Unlock()
	r.wg.Wait()
}

// Tell writes a line to every terminal of the connection. It does not wait for
// terminals that are not being read.
func (r *Relay) Tell(line string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.ptys {
		// It ends with the channel at the latest.
		r.wg.Go(func() { s.writeStderr([]byte("\r\n" + line + "\r\n")) })
	}
}

func (r *Relay) remember(s *sink) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ptys == nil {
		r.ptys = make(map[*sink]struct{})
	}
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
	late bool // the open came after no-more-sessions
}

func (i item) size() int {
	if i.req != nil {
		return len(i.req.Payload)
	}
	return len(i.open.ExtraData())
}

func (i item) refuse(why string) {
	if i.req != nil {
		i.req.Reply(false, nil)
	} else {
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
	ended    func()   // to be called when Conn has ended; may be called again

	watching  bool // a goroutine waits for the end of Conn
	opens     int  // received so far
	announced bool // that no more sessions come
	lastOpen  int  // the number of the last that may be a session, if announced
}

// next waits for what comes in next. If server delivers first, no items are
// returned and up is set to what it delivered; both may be nil.
//
// Package ssh queues requests and opens apart, each in order, and queues what
// came first first. So when an open has been taken, all requests that came
// before it are queued, and are returned before it.
func (s *side) next(server <-chan Peer, up *Peer) (items []item, ended bool) {
	select {
	case *up = <-server:
		return nil, false
	case req, ok := <-s.Reqs:
		if !ok {
			return nil, true
		}
		s.note(req)
		return []item{{req: req}}, false
	case nc, ok := <-s.Chans:
		if !ok {
			return nil, true
		}
		return s.withEarlier(nc), false
	}
}

// withEarlier returns the requests that came before an open, and the open.
func (s *side) withEarlier(nc ssh.NewChannel) (items []item) {
	s.opens++
	late := s.announced && s.opens > s.lastOpen
	for n := len(s.Reqs); n > 0; n-- {
		if req := <-s.Reqs; req != nil {
			s.note(req)
			items = append(items, item{req: req})
		}
	}
	return append(items, item{open: nc, late: late})
}

// note takes note of no-more-sessions. OpenSSH sends it right behind the open
// of its only session, and that may still be queued: so what is queued counts
// as having come before.
func (s *side) note(req *ssh.Request) {
	if req.Type == noMoreSessions && s.toServer && !s.announced {
		s.announced, s.lastOpen = true, s.opens+len(s.Chans)
	}
}

const (
	keepalive      = "keepalive@openssh.com"
	noMoreSessions = "no-more-sessions@openssh.com"
	endOfWrite     = "eow@openssh.com"
)

// await collects what the client asks until server delivers or is closed, or
// the client is gone.
func (s *side) await(server <-chan Peer) (backlog []item, up Peer, gone bool) {
	size, unanswered := 0, false
	for {
		items, gone := s.next(server, &up)
		if items == nil {
			return backlog, up, gone
		}
		for _, it := range items {
			switch {
			case it.req != nil && (!unanswered || !it.req.WantReply) && answeredHere(it.req):
				continue
			case len(backlog) < backlogMax && size+it.size() <= backlogBytes:
			case it.open != nil:
				s.reject(it.open, ssh.ConnectionFailed, "too many channels while the bastion is starting")
				continue
			default:
				// It cannot be refused before those that wait are.
				s.r.Log.Warn("too many requests while the bastion is starting")
				return backlog, Peer{}, true
			}
			if it.req != nil && it.req.Type == keepalive {
				// Replies carry no id, so this one has to wait too: the client
				// would take it for the one to its tcpip-forward. Anything that
				// comes from us tells it that we are alive.
				s.Conn.SendRequest(keepalive, false, nil)
			}
			unanswered = unanswered || it.req != nil && it.req.WantReply
			size += it.size()
			backlog = append(backlog, it)
		}
	}
}

// dismiss refuses what has waited and whatever else comes in, and closes the
// connection after a while.
func (s *side) dismiss(backlog []item, refusal func() string, after time.Duration) {
	timer := time.AfterFunc(after, func() { s.Conn.Close() })
	defer timer.Stop()
	defer s.Conn.Close()
	for items, ended := backlog, false; !ended; items, ended = s.next(nil, nil) {
		for _, it := range items {
			it.refuse(refusal())
		}
	}
}

// serve handles the backlog and then what comes in, in order, until the
// connection has ended.
func (s *side) serve(backlog []item) {
	defer s.ended()
	defer s.recover("connection")
	for items, ended := backlog, false; !ended; items, ended = s.next(nil, nil) {
		s.handle(items)
	}
}

func (s *side) handle(items []item) {
	for _, it := range items {
		if it.open != nil {
			s.open(it)
		} else {
			s.aside(func() { s.request(it.req) })
		}
	}
}

// aside runs what on a stack of its own, and waits. The goroutine that waits for
// the next request does so for hours, on a stack that never shrinks below what
// it has once needed.
func (s *side) aside(what func()) {
	var wg sync.WaitGroup
	wg.Go(func() {
		defer s.recover("request")
		what()
	})
	wg.Wait()
}

// request passes a global request on and its reply back.
func (s *side) request(req *ssh.Request) {
	switch {
	case answeredHere(req):
		return
	case req.Type == noMoreSessions && s.toServer: // see note
		req.Reply(true, nil)
		return
	}
	if why := policy.MayRequest(s.r.Permissions, req.Type, req.Payload); why != nil {
		s.r.refused(Refusal{Kind: req.Type, FromClient: s.toServer, Payload: req.Payload, Channel: -1, Global: true, Code: ssh.Prohibited, Why: why.Error()})
		req.Reply(false, nil)
		return
	}
	if req.WantReply && !s.watching {
		// While a reply is awaited from the far side, the end of this
		// connection would go unnoticed. Most connections never forward such a
		// request, and need no goroutine for it.
		s.watching = true
		s.r.loops.Go(func() {
			s.Conn.Wait()
			s.ended()
		})
	}
	ok, payload, err := s.far.SendRequest(req.Type, req.WantReply, req.Payload)
	ok = ok && err == nil
	if s.r.Watch != nil {
		if ok || !req.WantReply {
			ok = s.r.Watch.Granted(req.Type, s.toServer, req.Payload, payload) == nil && ok
		} else {
			s.r.refused(Refusal{Kind: req.Type, FromClient: s.toServer, Payload: req.Payload, Channel: -1, Global: true, Code: ssh.Prohibited, ByFar: true})
		}
	}
	req.Reply(ok, payload)
}

// answeredHere answers the requests that belong to one hop. OpenSSH's own
// server answers keepalives with failure; any answer will do.
func answeredHere(req *ssh.Request) bool {
	switch req.Type {
	case keepalive, "hostkeys-00@openssh.com", "hostkeys-prove-00@openssh.com":
		req.Reply(false, nil)
		return true
	}
	return false
}

// open starts a channel to the far side, or refuses it. It returns at once: a
// forward may take long to connect.
func (s *side) open(it item) {
	r, nc, kind := s.r, it.open, it.open.ChannelType()
	if why := policy.MayOpenChannel(r.Permissions, kind, nc.ExtraData()); why != nil {
		s.reject(nc, ssh.Prohibited, why.Error())
		return
	}
	session := kind == "session"
	r.mu.Lock()
	switch {
	case r.draining:
		r.mu.Unlock()
		s.reject(nc, ssh.ConnectionFailed, "connection is closing")
		return
	case session && it.late:
		r.mu.Unlock()
		s.reject(nc, ssh.Prohibited, "no more sessions were announced")
		return
	case session && r.sessions >= r.MaxSessions:
		r.mu.Unlock()
		s.reject(nc, ssh.ResourceShortage, "too many sessions on this connection")
		return
	case r.channels >= r.MaxChannels:
		r.mu.Unlock()
		s.reject(nc, ssh.ResourceShortage, "too many channels on this connection")
		return
	}
	r.channels++
	number := r.opened
	r.opened++
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
		s.bridge(nc, number)
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
