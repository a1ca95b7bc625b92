package gateway

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/relay"
	"github.com/sallyport-ssh/sallyport/internal/tracing"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// A conn is one user's connection, from accept to close.
type conn struct {
	srv *Server
	cfg *Settings // in force when the connection was accepted
	ref string    // the connection's reference in user messages and logs
	log *slog.Logger

	clientAddr, serverAddr netip.AddrPort // from the PROXY header, if there is one
	healthCheck            bool           // a load balancer's own connection
	began                  time.Time
	slot                   *startupSlot    // set by startup
	stream                 io.Closer       // closes the connection; set by ServeConn or NewCall
	ssh                    *transport.Conn // set by ServeConn; nil for a Call
	isCall                 bool
	clientVersion          string // identification string; set by authenticate

	attempt  attempt
	creds    credentials
	identity identity.Identity // zero until the login has succeeded
	dial     *dial             // nil if there is no bastion to wait for
	notices  chan string       // lines for the console; nil for other connections
	// whyEnded is the reason for the end of the bastion, if it is known.
	whyEnded atomic.Pointer[error]

	audited auditState
	quota   logQuota
	trace   *tracing.Login // nil: none

	keepClient, keepBastion keepalive

	done chan struct{} // closed when the connection has ended

	// Guarded by srv.mu.
	countedAs string // key in Server.users, once a key is proven
	loggedIn  bool
	relay     *relay.Relay // nil for the console
}

// An attempt is the course of a connection's authentication, for logs and
// penalties. Nothing in it is proven.
type attempt struct {
	user     string        // last requested user name, with the profile
	key      ssh.PublicKey // last offered key
	failures int           // as MaxAuthTries counts them
	err      error         // cause of the last failure
}

// credentials are the key, grant and roles against which a login is rechecked. They are
// zero until a user is proven.
type credentials struct {
	proven bool
	key    ssh.PublicKey // nil for a token
	grant  auth.Grant
	roles  []*policy.Role
	// operator says that the login is by an operator's token, and has no roles.
	operator bool
	// settings are those that roles were decided by.
	settings *Settings

	refusedInRow int // by Recheck
	revoked      bool
}

// ServeConn serves one user's connection and returns when it has ended. It owns
// nc. When ctx ends, a connection that waits for its bastion ends; one that has a
// bastion goes on.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) {
	c := s.newConn(nc)
	defer c.quota.disconnecting.Wait()
	defer c.closeOnPanic(nc)
	if !c.startup(ctx, nc) {
		return
	}
	defer c.slot.release()
	c.trace = s.Tracer.Login(c.began, "accept", c.ref, c.clientAddr)
	c.ssh = transport.NewServer(nc, c.transportConfig())
	c.stream = c.ssh
	defer close(c.done)
	defer c.stopKeepalives()
	defer c.ssh.Close()
	if !c.register() {
		return
	}
	defer c.unregister()
	c.serve(ctx)
}

// serve authenticates the client, and relays the connection or serves the console
// until either side ends.
func (c *conn) serve(ctx context.Context) {
	defer c.endTrace()
	defer c.endDial()
	if !c.login(ctx) {
		return
	}
	if c.isConsole() {
		c.trace.End(nil)
		c.logEnd("client", c.serveConsole(ctx))
		return
	}
	byClient, err := c.startRelay().Run(c.dial.deliver(), func() string { return userMessage(c.dial.reason(), c.ref) })
	switch why := c.whyEnded.Load(); {
	case byClient:
		c.logEnd("client", err)
	case why != nil:
		c.logEnd("bastion", fmt.Errorf("%w: %w", err, *why))
	default:
		c.logEnd("bastion", err)
	}
}

// The frames of ServeConn and serve stay on the stack for the life of the
// connection, so code that needs stack space is in the functions below.

func (s *Server) newConn(nc net.Conn) *conn {
	c := &conn{
		srv: s, cfg: s.settings(), ref: newRef(), began: time.Now(), done: make(chan struct{}),
		clientAddr: identity.AddrPort(nc.RemoteAddr()), serverAddr: identity.AddrPort(nc.LocalAddr()),
	}
	c.setLog("remote", nc.RemoteAddr().String())
	c.keepAliveTCP(nc)
	s.counters.accepted.Add(1)
	return c
}

// setLog makes the connection's log, whose lines have its reference and attrs.
func (c *conn) setLog(attrs ...any) {
	log := c.srv.Log.With("conn", c.ref).With(attrs...)
	c.log = slog.New(meteredLog{log.Handler(), c})
}

// startup decides whether the client may try to log in, by the source's penalties
// and by MaxStartups (sshd_config(5)). If not, it rejects the connection and
// returns false.
func (c *conn) startup(ctx context.Context, nc net.Conn) bool {
	if !c.resolveClient(ctx, nc) {
		return false
	}
	if err := c.checkPenalty(); err != nil {
		c.logRejected(rejectedPenalty, slog.LevelInfo, err) // the penalty was logged as a warning
		c.reject(nc, transport.ReasonHostNotAllowed, penaltyMessage(err))
		return false
	}
	var err error
	c.slot, err = c.srv.startups.take(c.source(), c.cfg.MaxStartups, c.cfg.PerSourceMaxStartups)
	if err != nil {
		c.logRejected(rejectedStartups, slog.LevelWarn, err)
		c.reject(nc, transport.ReasonTooManyConnections, startupsMessage(err))
		return false
	}
	return true
}

// login authenticates the client, and logs the result.
func (c *conn) login(ctx context.Context) bool {
	err := c.authenticate(ctx)
	c.countLogin(err)
	if err != nil {
		c.traceRefused(err)
		c.penalise(err)
		if c.auditLoginRefused(err) {
			c.logLoginRefused(err)
		}
		return false
	}
	attrs := []any{"user", c.identity.User, "profile", c.identity.Profile, "key", c.identity.Key,
		"client", c.clientVersion, "ms", time.Since(c.began).Milliseconds()}
	if c.identity.Via != "" {
		attrs = append(attrs, "via", c.identity.Via, "via_conn", c.identity.ViaConn)
	}
	c.log.Info("login", attrs...)
	c.keepClient.start(c, "client", c.ssh, c.cfg.ClientAliveInterval, cmp.Or(c.cfg.ClientAliveCountMax, clientAliveCountMax))
	return true
}

// logEnd writes to both logs which side ended the connection, and why.
func (c *conn) logEnd(by string, reason error) {
	c.auditEnd(by, reason)
	c.unmetered().Info("end", "user", c.identity.User, "by", by, "reason", reason.Error(), "seconds", int(time.Since(c.began).Seconds()))
}

// traceRefused ends the trace of a refused login. A client that has sent no word of SSH, and
// the health check of a load balancer, have none.
func (c *conn) traceRefused(err error) {
	if c.clientVersion != "" && (!c.healthCheck || c.attempt.user != "") {
		c.trace.Refused(err, c.creds.proven)
	}
}

// endTrace ends the trace of a login that has got no byte of its bastion. The dial has ended.
func (c *conn) endTrace() {
	if c.dial != nil {
		c.trace.End(c.dial.err)
	}
}

// startRelay makes the relay. From then on, the server can notify and disconnect
// the connection.
func (c *conn) startRelay() *relay.Relay {
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	c.relay = &relay.Relay{
		Client:        c.ssh,
		ProveHostKeys: c.hostKeyProver(),
		Permissions:   c.identity.Permissions,
		MaxSessions:   least(c.cfg.MaxSessions, c.identity.Permissions.Limits.Sessions),
		MaxChannels:   c.cfg.MaxChannels,
		Lost:          sync.OnceValue(c.lostText),
		NotGranted:    notGrantedMessage(c.ref),
		Interrupted:   interruptedMessage,
		Waiting:       c.stillStarting,
		Watch:         c.watcher(),
		Log:           c.log,
	}
	if c.trace != nil {
		c.relay.FirstData = c.trace.FirstByte
	}
	c.loggedIn = true
	return c.relay
}

// lostText finds out why the bastion has ended, and returns the message for its
// sessions. It may be called once.
func (c *conn) lostText() string {
	var why error
	if b := c.dial.conn; c.srv.WhyEnded != nil && b != nil {
		ctx, cancel := context.WithTimeout(context.Background(), whyEndedTimeout)
		defer cancel()
		if why = c.srv.WhyEnded(ctx, b.Owner, b.Task.ID); why != nil {
			c.whyEnded.Store(&why)
			c.log.Info("bastion has ended", "task", b.Task.ID, "why", why)
		}
	}
	return lostMessage(why, c.ref)
}

// whyEndedTimeout bounds the wait for the reason of a bastion's end. ECS has it
// after a few seconds.
const whyEndedTimeout = 5 * time.Second

// serveConsole serves a connection to the console until it has ended, and returns
// the reason for the end.
func (c *conn) serveConsole(ctx context.Context) error {
	c.srv.mu.Lock()
	c.loggedIn = true
	c.srv.mu.Unlock()
	// The console stays open while the gateway drains.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { c.ssh.Close() })()
	return c.srv.Console(ctx, ConsoleConn{
		Conn:        c.ssh,
		Identity:    c.identity,
		MaxSessions: c.cfg.MaxSessions,
		Notices:     c.notices,
		Audit:       c.auditConsole,
	})
}

// register adds the connection to those that are notified and closed at the end
// of the gateway. It reports false if the gateway already drains.
func (c *conn) register() bool {
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	if c.srv.draining {
		return false
	}
	if c.srv.conns == nil {
		c.srv.conns = make(map[*conn]struct{})
	}
	c.srv.conns[c] = struct{}{}
	return true
}

// unregister undoes register and countUser.
func (c *conn) unregister() {
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	if _, registered := c.srv.conns[c]; registered && c.relay != nil {
		_, fromClient, toClient := c.relay.Channels()
		c.srv.endedFromClients += fromClient
		c.srv.endedToClients += toClient
	}
	delete(c.srv.conns, c)
	if user := c.countedAs; user != "" {
		if c.srv.users[user]--; c.srv.users[user] == 0 {
			delete(c.srv.users, user)
		}
		c.countedAs = ""
	}
}

// countUser counts the connection for its user, or returns errTooManyConnections
// if there are limit already; zero is no limit.
func (c *conn) countUser(user string, limit int) error {
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	if limit > 0 && c.srv.users[user] >= limit {
		return errTooManyConnections
	}
	if c.srv.users == nil {
		c.srv.users = make(map[string]int)
	}
	c.srv.users[user]++
	c.countedAs = user
	return nil
}

// least returns the lower of two limits; zero is no limit.
func least(a, b int) int {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// logLoginRefused logs why a login failed. Connections without any data are logged
// at level debug, because port scanners and health checks make many.
func (c *conn) logLoginRefused(err error) {
	switch {
	case isShortage(err):
		c.log.Error("login refused, because the gateway is short of resources", "user", c.attempt.user, "err", err.Error())
	case errors.Is(err, errSilent):
		c.log.Debug("connection closed without a byte")
	case c.dial != nil: // the key was right; the dial has logged the cause
		c.log.Info("login ended without a bastion", "user", c.dial.id.User)
	case c.healthCheck && c.attempt.user == "":
		c.log.Debug("health check of a load balancer", "err", err.Error())
	case c.creds.proven && c.attempt.err != nil: // the key was right; a rule of the gateway refused the login
		c.log.Warn("login refused", "user", c.attempt.user, "key", fingerprint(c.creds.key), "err", c.attempt.err)
	default:
		c.log.Info("login refused", "user", c.attempt.user, "err", err.Error())
	}
}

// closeOnPanic is deferred. It turns a panic into the end of this connection,
// whose stream is nc, so that the other connections of the process go on.
func (c *conn) closeOnPanic(nc io.Closer) {
	if p := recover(); p != nil {
		c.crashed(p)
		nc.Close()
	}
}

// crashed logs a recovered panic. The deferred function that recovered p calls it.
func (c *conn) crashed(p any) {
	oplog.Panic(c.log, "connection", p)
	if !c.creds.proven {
		c.addPenalty(c.cfg.PerSourcePenalties.Crash, "caused a panic")
	}
}

// newRef returns a short reference for a connection, easily read out on the phone.
func newRef() string {
	var b [5]byte
	rand.Read(b[:])
	return strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))
}
