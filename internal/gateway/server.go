// Package gateway is the SSH server users connect to: it lets them log in, gets
// each her own bastion, and relays her connection to it.
//
// Read a connection's life from [Server.ServeConn] down.
package gateway

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/record"
	"github.com/sallyport-ssh/sallyport/internal/relay"
	"github.com/sallyport-ssh/sallyport/internal/wire"
)

// A Server serves users' connections. Set the fields, then call [Server.Serve];
// they may not change afterwards. Settings that sshd_config(5) has too mean what
// they mean there.
type Server struct {
	// HostKeys are this gateway's; at least one.
	HostKeys []ssh.Signer
	// Authorize says whether a key is a user's, and what it permits. It must
	// have no effects: it is called for keys that are only offered. What is
	// wrong with a refused key is for the log, not for the client.
	Authorize func(user string, key ssh.PublicKey, from netip.Addr, now time.Time) (auth.Grant, error)
	// Recheck, if not nil, is asked every few seconds for every login whether
	// what was granted still is. A login that is not is ended; one that is
	// auth.ErrUndecided goes on. It returns the grant to ask about the next
	// time. It should not block. See [auth.Keys.Recheck].
	Recheck func(user string, key ssh.PublicKey, from netip.Addr, now time.Time, granted auth.Grant) (auth.Grant, error)
	// Roles say what users may do beside what their keys permit. A login ends
	// when one of its roles does not hold any more. Nil means no roles.
	Roles policy.Roles
	// SecondFactor, if not nil, is asked for after a key has been proven.
	SecondFactor SecondFactor
	// Dial finds or starts the user's bastion and connects to it. It is
	// called only for an identity that has been proven. It calls notify, at
	// most once, if the user will have to wait. See [bastion.Dialer.Dial].
	Dial func(ctx context.Context, id identity.Identity, notify func(starting bool)) (*bastion.Conn, error)

	// Console, if not nil, serves the connections of users who ask for the
	// profile "ctl" and have proven who they are. It returns when the
	// connection has ended, which it must see to when ctx ends. A key with a
	// forced command never gets here.
	Console func(ctx context.Context, c ConsoleConn)

	// ProxyProtocolFrom are the balancers in front of the gateway. A connection
	// from one of them must begin with a header of the PROXY protocol, version
	// 1 or 2, and is its client's from then on; from others it must not. Nil
	// means that there are none.
	ProxyProtocolFrom []netip.Prefix

	// LoginGraceTime is how long a client may take to prove who it is.
	// Waiting for a bastion does not count. Zero means two minutes.
	LoginGraceTime time.Duration
	// MaxStartups bounds connections that have not proven who they are yet,
	// and PerSourceMaxStartups those of one source; zero is no bound.
	MaxStartups          Startups
	PerSourceMaxStartups int
	// PerSourceNetBlockSize says what is one source. PerSourcePenalties are
	// for those that do not log in, except from the networks that are exempt.
	PerSourceNetBlockSize  NetBlockSize
	PerSourcePenalties     Penalties
	PerSourcePenaltyExempt []netip.Prefix
	// MaxAuthTries is how many keys may fail before the client is cut off;
	// zero means six.
	MaxAuthTries int
	// MaxSessions is how many sessions one connection may have open at once,
	// and MaxConnections how many connections one user. Zero means ten, and
	// no bound.
	MaxSessions, MaxConnections int
	// MaxMemory is how many bytes of the heap may be in use before connections
	// are closed whose peers have sent much that the other side does not read.
	// Zero is no bound.
	MaxMemory int64
	// ClientAliveInterval is how often a client is asked whether it is still
	// there, and ClientAliveCountMax how many unanswered questions end the
	// connection. Zero means 15 s and 4. Bastions are asked the same way.
	ClientAliveInterval time.Duration
	ClientAliveCountMax int
	// Drain is how long sessions may go on when Serve's context ends.
	Drain time.Duration
	// Ciphers, MACs and KexAlgorithms are offered to clients; nil means the
	// defaults (see algorithms.go).
	Ciphers, MACs, KexAlgorithms []string
	// VersionAddendum is appended to the version that clients are told.
	VersionAddendum string
	// Banner is shown to everybody before authentication; usually empty.
	Banner string

	// Audit is where it is written down what happens; nil means nowhere.
	Audit *audit.Log
	// Record says what is recorded of a login's sessions in any case, its
	// permissions may ask for more; nil means nothing. Recordings is where
	// they go. A session that cannot be recorded ends, unless
	// RecordingsOptional.
	Record             func(identity.Identity) identity.Record
	Recordings         *record.Store
	RecordingsOptional bool

	Log *slog.Logger

	startups  startups
	headers   startups // connections whose PROXY header is still to come
	penalties penalties
	refusals  refusals

	mu    sync.Mutex
	conns map[*conn]struct{}
	users map[string]int // connections per user
	// draining lets no new ones in, and closing ends no more by themselves:
	// all are being ended.
	draining, closing bool

	wg sync.WaitGroup // connections, and what closes them

	heap   func() int64 // in place of the real one, in tests
	scarce time.Time    // when memory was last so without anybody who held much
}

// A SecondFactor knows which users must give a code beside their key, and which
// codes are right. See [auth.TOTP].
type SecondFactor interface {
	Needs(user string) (bool, error)
	Check(user, code string, now time.Time) error
}

// A conn is one user's connection.
type conn struct {
	*Server
	wire *wire.Conn
	ref  string // names the connection for people and in logs
	log  *slog.Logger

	client, server netip.AddrPort // the two ends, those beyond a balancer
	local          bool           // it is a balancer's own
	began          time.Time
	admission      *admission

	// What login leaves behind.
	offered  string // the user name last asked for, proven or not
	account         // for the audit log
	identity identity.Identity
	dial     *dial
	counted  string // the user it counts for, once proven; under Server.mu

	holding holding     // by what it is logged in
	notices chan string // not nil if it is one to the console; set by login

	keepClient, keepBastion keepalive

	// For guardMemory; unread is the sum of the others.
	fromClientHeld, fromBastionHeld held
	unread                          int64

	// Set when it has logged in; under Server.mu.
	peer  ssh.Conn
	relay *relay.Relay // nil if it is one to the console
}

// Serve accepts and serves connections until ctx ends or a listener fails. Then
// it stops accepting, closes the connections that have not logged in, tells every
// terminal, waits up to s.Drain for the others to end by themselves, and closes
// the rest. Bastions stay up. Every connection has ended when Serve returns: nil
// if it was ctx that ended. It closes the listeners, and may be called once.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	// A connection does not end because accepting does.
	connCtx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)

	accepting, acceptCtx := errgroup.WithContext(ctx)
	for _, ln := range listeners {
		defer context.AfterFunc(acceptCtx, func() { ln.Close() })()
		accepting.Go(func() error { return s.accept(connCtx, ln) })
	}
	tasksCtx, stopTasks := context.WithCancel(context.WithoutCancel(ctx)) // also while it drains
	defer stopTasks()
	var tasks sync.WaitGroup
	tasks.Go(func() { s.recheckLogins(tasksCtx) })
	tasks.Go(func() { s.tellRefusals(tasksCtx) })
	tasks.Go(func() { s.guardMemory(tasksCtx) })
	err := accepting.Wait()
	if ctx.Err() != nil {
		err = nil
	}
	cancel(errDraining) // nobody waits for a bastion any more
	s.drain()
	stopTasks()
	tasks.Wait()
	s.closeAll()
	s.wg.Wait()
	s.tellRefused(time.Now(), true)
	return err
}

var errDraining = errors.New("draining")

func (s *Server) accept(ctx context.Context, ln net.Listener) error {
	for pause := time.Duration(0); ; {
		nc, err := ln.Accept()
		if err == nil {
			pause = 0
			s.wg.Go(func() { s.ServeConn(ctx, nc) })
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		// Out of file descriptors, most likely. It passes as others leave.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		s.Log.Error("accept", "err", err, "retry", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ServeConn serves one user's connection and returns when it has ended. It owns
// nc. Ending ctx ends the wait for a bastion, not a connection that has one.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) {
	c := s.newConn(nc)
	defer c.recover(nc)
	if !c.startup(ctx, nc) {
		return
	}
	defer c.admission.release()
	c.wire = wire.New(nc)
	defer c.stopKeepalives()
	defer c.wire.Close()
	if !c.enter() {
		return
	}
	defer c.leave()
	c.serve(ctx)
}

// serve has the client log in, and relays or serves its console until either
// side ends.
func (c *conn) serve(ctx context.Context) {
	defer c.endDial()
	client, ok := c.letIn(ctx)
	if !ok {
		return
	}
	if c.isConsole() {
		c.serveConsole(ctx, client)
		c.ended("client", client.Conn.Wait())
		return
	}
	byClient, err := c.startRelay(client).Run(c.dial.deliver(), func() string { return userMessage(c.dial.reason(), c.ref) })
	if byClient {
		c.ended("client", err)
	} else {
		c.ended("bastion", err)
	}
}

// What needs space on the stack is kept out of ServeConn and serve, which hold
// what they take for as long as the connection lasts.

func (s *Server) newConn(nc net.Conn) *conn {
	c := &conn{Server: s, ref: newRef(), began: time.Now(), client: addrPort(nc.RemoteAddr()), server: addrPort(nc.LocalAddr())}
	c.log = s.Log.With("conn", c.ref, "remote", nc.RemoteAddr().String())
	return c
}

// startup lets a connection that has not logged in try to, or turns it away
// (sshd_config(5), MaxStartups and PerSourcePenalties).
func (c *conn) startup(ctx context.Context, nc net.Conn) bool {
	if !c.admitProxied(ctx, nc) {
		return false
	}
	if err := c.checkPenalty(); err != nil {
		c.turnedAway(slog.LevelInfo, err) // the penalty itself was a warning
		refuse(nc, notAllowed)
		return false
	}
	var err error
	c.admission, err = c.startups.admit(c.source(), c.MaxStartups, c.PerSourceMaxStartups)
	if err != nil {
		c.turnedAway(slog.LevelWarn, err)
		refuse(nc, "Exceeded MaxStartups\r\n")
		return false
	}
	return true
}

// letIn has the client log in, and writes down what came of it.
func (c *conn) letIn(ctx context.Context) (relay.Peer, bool) {
	if !c.local {
		c.auditConnection()
	}
	client, err := c.login(ctx)
	if err != nil {
		c.penalise(err)
		c.auditRefusal(err)
		c.logRefusal(err)
		return relay.Peer{}, false
	}
	c.log.Info("login", "user", c.identity.User, "profile", c.identity.Profile, "key", c.identity.Key,
		"client", string(client.Conn.ClientVersion()), "ms", time.Since(c.began).Milliseconds())
	c.keepClient.start(c, client.Conn, "client", c.wire)
	return client, true
}

// ended writes down who ended the connection, and why.
func (c *conn) ended(by string, reason error) {
	c.auditEnd(by, reason)
	c.log.Info("end", "user", c.identity.User, "by", by, "reason", reason.Error(), "seconds", int(time.Since(c.began).Seconds()))
}

// startRelay makes the relay, and makes it known to those who close the
// gateway.
func (c *conn) startRelay(client relay.Peer) *relay.Relay {
	c.Server.mu.Lock()
	defer c.Server.mu.Unlock()
	c.relay = &relay.Relay{
		Client:      client,
		Permissions: c.identity.Permissions,
		MaxSessions: least(c.MaxSessions, c.identity.Permissions.Limits.Sessions),
		Lost:        lostMessage(c.ref),
		Watch:       c.watcher(),
		Log:         c.log,
	}
	c.peer = client.Conn
	return c.relay
}

// serveConsole serves a connection to the console until it has ended.
func (c *conn) serveConsole(ctx context.Context, client relay.Peer) {
	c.Server.mu.Lock()
	c.peer = client.Conn
	c.Server.mu.Unlock()
	defer client.Conn.Close()
	// That the gateway drains is no reason to end it yet.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { client.Conn.Close() })()
	c.Console(ctx, ConsoleConn{
		ServerConn: client.Conn.(*ssh.ServerConn),
		Chans:      client.Chans,
		Reqs:       client.Reqs,
		Identity:   c.identity,
		Notices:    c.notices,
	})
}

// enter counts the connection in, so that it is told and closed when the
// gateway goes down. It reports false if that has happened.
func (c *conn) enter() bool {
	c.Server.mu.Lock()
	defer c.Server.mu.Unlock()
	if c.draining {
		return false
	}
	if c.conns == nil {
		c.conns = make(map[*conn]struct{})
	}
	c.conns[c] = struct{}{}
	return true
}

// leave counts it out.
func (c *conn) leave() {
	c.Server.mu.Lock()
	defer c.Server.mu.Unlock()
	delete(c.conns, c)
	if user := c.counted; user != "" {
		if c.users[user]--; c.users[user] == 0 {
			delete(c.users, user)
		}
	}
}

// countUser counts the connection among its user's, or refuses it if there are
// most of them.
func (c *conn) countUser(user string, most int) error {
	c.Server.mu.Lock()
	defer c.Server.mu.Unlock()
	if most > 0 && c.users[user] >= most {
		return errTooManyConnections
	}
	if c.users == nil {
		c.users = make(map[string]int)
	}
	c.users[user]++
	c.counted = user
	return nil
}

// least returns the smaller of two limits; zero is none.
func least(a, b int) int {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// logRefusal says why a client did not get in. Errors of clients that were
// never one are for debugging only: the internet is full of them.
func (c *conn) logRefusal(err error) {
	switch {
	case c.dial != nil: // proven; the cause has been logged where it was known
		c.log.Info("login ended without a bastion", "user", c.dial.user)
	case c.local && c.offered == "":
		c.log.Debug("a balancer looked whether the gateway is there", "err", err.Error())
	case c.holding.key != nil && c.refusal != nil: // proven, and the cause is ours
		c.log.Warn("login refused", "user", c.offered, "key", fingerprint(c.holding.key), "err", c.refusal)
	default:
		c.log.Info("login refused", "user", c.offered, "err", err.Error())
	}
}

// drain tells every terminal that the gateway goes down and gives connections
// the time to end. Strangers get none, and who watches in the console holds up
// nobody.
func (s *Server) drain() {
	s.closeStrangers()
	s.tell(drainMessage(s.Drain))
	s.Log.Info("draining", "connections", s.inUse(), "drain", s.Drain.String())
	deadline := time.Now().Add(s.Drain)
	for time.Now().Before(deadline) && s.inUse() > 0 {
		time.Sleep(50 * time.Millisecond)
	}
}

// closeStrangers closes the connections of those who have not proven who they
// are, and lets no more in.
func (s *Server) closeStrangers() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = true
	for c := range s.conns {
		if c.counted == "" {
			c.because("gateway", errDraining.Error())
			s.wg.Go(func() { c.wire.Close() }) // may take a second each
		}
	}
}

// inUse returns how many connections users have or wait for, those to the
// console aside.
func (s *Server) inUse() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for c := range s.conns {
		if c.counted != "" && (c.peer == nil || c.relay != nil) {
			n++
		}
	}
	return n
}

// tell writes a line to every terminal and returns how many connections there
// are.
func (s *Server) tell(line string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		switch {
		case c.relay != nil:
			c.relay.Tell(line)
		case c.peer != nil:
			c.notice(line)
		}
	}
	return len(s.conns)
}

func (s *Server) closeAll() {
	if s.tell(goodbyeMessage) > 0 {
		time.Sleep(100 * time.Millisecond) // for the goodbye to leave
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	for c := range s.conns {
		c.because("gateway", errDraining.Error())
		s.wg.Go(func() { c.wire.Close() }) // may take a second each
	}
}

// A keepalive asks a peer that has been silent for ClientAliveInterval whether it
// is still there, and closes the connection when nothing at all has come from it
// for ClientAliveCountMax intervals since.
//
// It is a timer, not a goroutine, since a goroutine per connection would be
// asleep nearly always; two exist while a question is out.
type keepalive struct {
	conn *conn
	peer ssh.Conn
	name string     // of the peer
	wire *wire.Conn // the stream under it; nil if there is another
	last uint64     // what had been heard when it was last looked

	mu     sync.Mutex
	timer  *time.Timer // nil before start and after stop
	asking sync.WaitGroup
}

// start has peer asked from now on, until stop is called. nc is the stream under
// it.
func (k *keepalive) start(c *conn, peer ssh.Conn, name string, nc net.Conn) {
	k.conn, k.peer, k.name = c, peer, name
	k.wire, _ = nc.(*wire.Conn)
	k.last = k.heard()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.timer = time.AfterFunc(k.untilNext(), k.tick)
}

func (c *conn) stopKeepalives() {
	c.keepClient.stop()
	c.keepBastion.stop()
}

// stop waits for a question that is out: the peer must have been closed.
func (k *keepalive) stop() {
	k.mu.Lock()
	if k.timer != nil {
		k.timer.Stop()
		k.timer = nil
	}
	k.mu.Unlock()
	k.asking.Wait()
}

func (k *keepalive) interval() time.Duration {
	return cmp.Or(k.conn.ClientAliveInterval, 15*time.Second)
}

func (k *keepalive) heard() uint64 {
	if k.wire == nil {
		return 0
	}
	return k.wire.Heard()
}

// tick runs in a goroutine of the timer's.
func (k *keepalive) tick() {
	k.mu.Lock()
	if k.timer == nil {
		k.mu.Unlock()
		return
	}
	k.asking.Add(1)
	k.mu.Unlock()
	defer k.asking.Done()
	defer k.conn.recover(k.conn.wire)
	if k.heard() == k.last && !k.ask() {
		return
	}
	k.last = k.heard()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.timer != nil {
		k.timer.Reset(k.untilNext())
	}
}

// untilNext is an interval, give or take a thirtieth: as many connections as
// possible are looked at in the same moment. To wake up for each of some
// thousands by itself would cost more than the questions do.
func (k *keepalive) untilNext() time.Duration {
	now := time.Now()
	return now.Add(k.interval()).Round(k.interval() / 15).Sub(now)
}

// ask reports whether the peer is still there.
func (k *keepalive) ask() bool {
	answered := make(chan bool, 1)
	k.asking.Go(func() { // ends with the connection, at the latest
		ok := false
		defer func() { answered <- ok }()
		defer k.conn.recover(k.conn.wire)
		_, _, err := k.peer.SendRequest("keepalive@openssh.com", true, nil)
		ok = err == nil
	})
	patience := k.interval() * time.Duration(cmp.Or(k.conn.ClientAliveCountMax, 4))
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		select {
		case ok := <-answered:
			return ok
		case <-timer.C:
			// The answer may be far behind in what a slow link still has
			// to carry; whoever sends anything is alive.
			if now := k.heard(); now != k.last {
				k.last = now
				timer.Reset(patience)
				continue
			}
			k.conn.log.Info("no answer to keepalives", "from", k.name, "for", patience.String())
			k.conn.because(k.name, "no answer to keepalives for "+patience.String())
			k.peer.Close()
			return false
		}
	}
}

// recover keeps a panic from ending the process, and with it everybody else's
// connections: it ends this connection instead, whose stream is nc.
func (c *conn) recover(nc net.Conn) {
	if p := recover(); p != nil {
		logPanic(c.log, p)
		if c.holding.key == nil {
			c.addPenalty(c.PerSourcePenalties.Crash, "caused a panic")
		}
		nc.Close()
	}
}

// logPanic is to be called where p was recovered.
func logPanic(log *slog.Logger, p any) {
	log.Error("panic", "panic", p, "stack", string(debug.Stack()))
}

// refuse says something before the identification string, as RFC 4253, section
// 4.2, allows, and closes the connection.
func refuse(nc net.Conn, text string) {
	nc.SetDeadline(time.Now().Add(time.Second))
	nc.Write([]byte(text))
	nc.Close()
}

// newRef returns a short name for a connection, easily read out on the phone.
func newRef() string {
	var b [5]byte
	rand.Read(b[:])
	return strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))
}

func addrPort(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
