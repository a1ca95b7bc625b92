package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// A Call is a connection with one request to the HTTP API. It is a login to the console in
// another protocol: it has the penalties, limits, roles, rechecks and log entries of one.
//
// A Call is the [net.Conn] of a server of package http, below TLS if there is any. The
// caller verifies a signature or token, and then calls [Call.Login].
type Call struct {
	net.Conn // of the client
	conn     *conn
	ctx      context.Context

	startup  sync.Once
	rejected error // by startup
	received atomic.Bool

	grant auth.Grant // of the login; conn.creds belongs to recheckLogins then

	// The HTTP server may close a Call while its request is served.
	mu       sync.Mutex
	deadline time.Time // of reads, as the HTTP server has set it
	loggedIn bool
	public   bool // nothing was requested that needs a login
	failed   bool // the login was refused, and that is logged
	status   int  // of the answer; 0: none
	endedBy  string
	endedFor error // nil: the call ends with its answer
	ended    bool
}

// errCallRejected is the error of a Call's reads if the client may not send a request.
var errCallRejected = errors.New("the connection was rejected")

// errUnanswered is the reason for the end of a call whose client has left.
var errUnanswered = errors.New("the client left before the answer")

// NewCall makes a Call of an accepted connection. It does not block: the first Read reads a
// PROXY header, and decides whether the client may send a request. The end of ctx ends the
// wait for that header.
func (s *Server) NewCall(ctx context.Context, nc net.Conn) *Call {
	c := s.newConn(nc)
	c.stream, c.isCall = nc, true
	return &Call{Conn: nc, conn: c, ctx: ctx}
}

// Read implements [net.Conn].
func (k *Call) Read(p []byte) (int, error) {
	k.startup.Do(func() { k.rejected = k.start() })
	if k.rejected != nil {
		return 0, k.rejected
	}
	n, err := k.Conn.Read(p)
	if n > 0 {
		k.received.Store(true)
	}
	return n, err
}

// start is the startup of a connection (see [conn.startup]), except that a penalty is told
// in the answer to the request; see [Call.Penalty].
func (k *Call) start() (err error) {
	c := k.conn
	defer func() {
		if p := recover(); p != nil {
			c.crashed(p)
			err = errCallRejected
		}
		if err != nil {
			k.Conn.Close()
		}
	}()
	if !c.resolveClient(k.ctx, k.Conn) {
		return errCallRejected
	}
	if c.slot, err = c.srv.callStartups.take(c.source(), c.cfg.MaxStartups, c.cfg.PerSourceMaxStartups); err != nil {
		c.logRejected(rejectedStartups, slog.LevelWarn, err)
		return err
	}
	if !c.register() {
		c.slot.release()
		return errDraining
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.Conn.SetReadDeadline(k.deadline) // resolveClient has changed it
}

// SetReadDeadline implements [net.Conn].
func (k *Call) SetReadDeadline(t time.Time) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.deadline = t
	return k.Conn.SetReadDeadline(t)
}

// SetDeadline implements [net.Conn].
func (k *Call) SetDeadline(t time.Time) error {
	return errors.Join(k.SetReadDeadline(t), k.SetWriteDeadline(t))
}

// CloseWrite closes the sending side, so that the client reads the answer before a reset.
func (k *Call) CloseWrite() error {
	if half, ok := k.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// Close implements [net.Conn]. It logs the end of the call.
func (k *Call) Close() error {
	err := k.Conn.Close()
	k.startup.Do(func() { k.rejected = errCallRejected })
	if k.rejected == nil {
		k.end()
	}
	return err
}

func (k *Call) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ended {
		return
	}
	k.ended = true
	c := k.conn
	defer c.closeOnPanic(k.Conn)
	defer c.quota.disconnecting.Wait()
	defer close(c.done)
	defer c.unregister()
	defer c.slot.release()
	switch {
	case k.loggedIn && k.endedFor != nil:
		c.logEnd(k.endedBy, k.endedFor)
	case k.loggedIn && k.status == 0:
		c.logEnd("client", errUnanswered)
	case k.loggedIn:
		c.logEnd("gateway", fmt.Errorf("answered with status %d", k.status))
	case k.public, k.failed:
	case !k.received.Load():
		k.refuse(errSilent)
	default:
		k.refuse(errLeft)
	}
}

// refuse penalises, counts and logs the refusal of a login. The caller holds k.mu.
func (k *Call) refuse(err error) {
	k.failed = true
	k.conn.countLogin(err)
	k.conn.penalise(err)
	if k.conn.auditLoginRefused(err) {
		k.conn.logLoginRefused(err)
	}
}

// Refuse logs and penalises a request whose credential was refused before [Call.Login]. User
// is the claimed name; empty if there was no credential.
func (k *Call) Refuse(user, software string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c := k.conn
	c.clientVersion = cmp.Or(software, "unknown")
	if user != "" {
		c.attempt = attempt{user: user + "+" + consoleProfile, failures: 1, err: err}
	}
	k.refuse(err)
}

// Ref returns the reference of the call in logs and messages.
func (k *Call) Ref() string { return k.conn.ref }

// Client returns the address of the client.
func (k *Call) Client() netip.AddrPort { return k.conn.clientAddr }

// Log returns the operator's log, with the reference.
func (k *Call) Log() *slog.Logger { return k.conn.log }

// Penalty returns an error if the client's source has an active penalty. The request must
// not be served then.
func (k *Call) Penalty() error {
	err := k.conn.checkPenalty()
	if err != nil {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.failed = true
		k.conn.logRejected(rejectedPenalty, slog.LevelInfo, err)
	}
	return err
}

// Public says that the request needs no login. Then it has no entry in the logs.
func (k *Call) Public() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.public = true
}

// Answered records the status of the answer, for the logs.
func (k *Call) Answered(status int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.status = status
}

// Streams says that the answer is a stream without an end. The operating system then
// buffers little of it, so that a client that does not read is noticed.
func (k *Call) Streams() {
	if nc, ok := k.Conn.(interface{ SetWriteBuffer(int) error }); ok {
		nc.SetWriteBuffer(streamBuffer)
	}
}

// streamBuffer is in bytes.
const streamBuffer = 32 << 10

// StreamEnded records which side has ended a stream, and why, for the logs.
func (k *Call) StreamEnded(by string, reason error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.endedBy, k.endedFor = by, reason
}

// Crashed logs a recovered panic. The deferred function that recovered p calls it.
func (k *Call) Crashed(p any) { k.conn.crashed(p) }

// Notices delivers lines for the user, such as that the gateway drains or that her access
// is revoked. It is nil before the login, and never closed.
func (k *Call) Notices() <-chan string { return k.conn.notices }

// OperatorUser is the user of an operator's token. No user can have this name.
const OperatorUser = "+operator"

// A Proof is a credential that the caller of [Call.Login] has verified.
type Proof struct {
	User string
	// Key has signed the request. UserPresent and UserVerified are the flags of a FIDO
	// key, and true for others.
	Key                       ssh.PublicKey
	UserPresent, UserVerified bool
	// Grant is that of a token; it is ignored if there is a Key. Operator says that the
	// token is an operator's, whose user is OperatorUser.
	Grant    auth.Grant
	Operator bool
	// Once returns an error if the request was received before. It is called when the
	// key is known to be the user's. It is nil for tokens.
	Once func(context.Context) error
	// Code is the verification code that came with the request, if any.
	Code string
	// Software is the client's name for itself.
	Software string
}

// Login decides whether a call is the user's, by her key, her code and her roles, as a login
// over SSH to the console does. After an error, which [Call.Explain] explains, the call must
// not do anything. It may be called once.
func (k *Call) Login(ctx context.Context, p Proof) (identity.Identity, error) {
	c := k.conn
	c.clientVersion = cmp.Or(p.Software, "unknown")
	c.attempt.user, c.attempt.key = p.User+"+"+consoleProfile, p.Key
	id, err := k.login(ctx, p)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ended {
		c.unregister()
		return identity.Identity{}, errDraining
	}
	if err != nil {
		if c.attempt.err == nil {
			c.attempt.err = err
		}
		k.refuse(err)
		return identity.Identity{}, err
	}
	k.grant = c.creds.grant
	c.identity = id
	k.loggedIn = true
	c.countLogin(nil)
	c.log.Info("login", "user", id.User, "profile", id.Profile, "key", id.Key, "client", c.clientVersion, "protocol", callProtocol)
	c.srv.mu.Lock()
	c.loggedIn = true
	c.srv.mu.Unlock()
	return id, nil
}

// callProtocol is the protocol of a login by a Call, in the logs.
const callProtocol = "http"

func (k *Call) login(ctx context.Context, p Proof) (identity.Identity, error) {
	c := k.conn
	proven := &provenUser{user: p.User, profile: consoleProfile, key: p.Key, grant: p.Grant, operator: p.Operator}
	if p.Key != nil {
		var err error
		if proven.grant, err = c.authorize(p.User, p.Key, p.UserPresent, p.UserVerified); err != nil {
			c.attempt.failures++
			return identity.Identity{}, fmt.Errorf("%w: %w", ErrUnproven, err)
		}
		if err := p.Once(ctx); err != nil {
			c.attempt.failures++
			if rate := (*RateError)(nil); errors.As(err, &rate) { // no penalty: the request is new
				c.setProven(proven)
			}
			return identity.Identity{}, err
		}
	}
	c.slot.release()
	c.setProven(proven)
	if err := k.checkCode(ctx, p); err != nil {
		return identity.Identity{}, err
	}
	id, err := c.identify(proven)
	if err == nil {
		err = c.openConsole(id)
	}
	return id, err
}

// checkCode checks the verification code, if the user needs one.
func (k *Call) checkCode(ctx context.Context, p Proof) error {
	if p.Operator {
		return nil
	}
	c := k.conn
	needs, err := c.needsCode(p.User)
	switch {
	case err != nil || !needs:
		return err
	case p.Code == "":
		return ErrCodeNeeded
	}
	if err := c.cfg.SecondFactor.Check(ctx, p.User, p.Code, time.Now()); err != nil {
		c.creds.proven = false // a wrong code has a penalty, like a wrong key
		c.attempt.failures++
		return err
	}
	return nil
}

// MayUse returns the permissions of the call's user in a profile, by her key and her roles.
func (k *Call) MayUse(profile string) (identity.Permissions, error) {
	c := k.conn
	permissions, _, err := c.cfg.Roles.Decide(policy.Login{
		User: c.identity.User, Profile: profile, Principals: k.grant.RolePrincipals, From: c.clientAddr.Addr(), Now: time.Now(), Key: k.grant.Permissions,
	})
	return permissions, err
}

// Audit writes an event of the call. If it returns an error, the audited action must not
// happen.
func (k *Call) Audit(e audit.Event) error {
	if e.Type == audit.Refused {
		k.conn.auditRefused(k.conn.identity, e)
		return nil
	}
	return k.conn.audit(k.conn.identity, e)
}

// Reasons to refuse a call.
var (
	// ErrUnproven wraps each reason for which a user is not proven.
	ErrUnproven = errors.New("not proven")
	// ErrMisnamed refuses a signature for a host that this gateway is not, ErrClock one
	// with a time of another clock, and ErrReplayed one that was received before.
	ErrMisnamed = errors.New("signed for another host")
	ErrClock    = errors.New("signed at another time")
	ErrReplayed = errors.New("received before")
	// ErrCodeNeeded refuses a user who needs a verification code, and sent none.
	ErrCodeNeeded = errors.New("the user needs a verification code")
)

// A RateError refuses a call because its user has sent too many.
type RateError struct{ Wait time.Duration }

func (e *RateError) Error() string {
	return fmt.Sprintf("too many requests; the next may be in %v", e.Wait.Round(time.Second))
}

// A Problem is the description of a failed call for its client.
type Problem struct {
	Status int    // of HTTP
	Code   string // for programs
	Detail string // for people
	// Wait is the time after which another attempt may succeed; zero if that is not
	// known.
	Wait time.Duration
}

// Explain returns the problem for an error of a call.
func (k *Call) Explain(err error) Problem { return explain(err, k.conn.ref) }

// explain returns the problem for err. It has the sentence of the console, or of a login
// over SSH, if there is one.
func explain(err error, ref string) Problem {
	penalty, rate := (*penaltyError)(nil), (*RateError)(nil)
	tooOften, logLimit := (*bastion.TooOftenError)(nil), (*errLogLimit)(nil)
	p := Problem{Detail: userMessage(err, ref)}
	switch {
	case errors.As(err, &penalty):
		p.Detail, p.Wait = penaltyMessage(err), penalty.left
	case errors.Is(err, errPenaltiesFull):
		p.Detail = penaltyMessage(err)
	case errors.As(err, &rate):
		p.Wait = rate.Wait
	case errors.As(err, &tooOften):
		p.Wait = tooOften.Wait
	case errors.As(err, &logLimit):
		p.Wait = logLimit.wait
	}
	for _, row := range problems {
		if row.is(err) {
			p.Status, p.Code = row.status, row.code
			return p
		}
	}
	p.Status, p.Code = 500, "failed"
	return p
}

// problems has the status and the code for each reason of a failure. The first row that
// fits counts. docs/api.md lists the codes.
var problems = []struct {
	is     func(error) bool
	status int
	code   string
}{
	{is[*penaltyError](), 429, "penalty"},
	{wraps(errPenaltiesFull), 429, "penalty"},
	{isShortage, 503, "shortage"},
	{is[*RateError](), 429, "too-many-requests"},
	{wraps(ErrMisnamed), 401, "other-host"},
	{wraps(ErrClock), 401, "clock"},
	{wraps(ErrReplayed), 401, "replayed"},
	{wraps(ErrUnproven), 401, "not-proven"},
	{wraps(auth.ErrUndecided), 503, "undecided"},
	{wraps(ErrCodeNeeded), 401, "code-needed"},
	{wraps(auth.ErrCode), 401, "code-wrong"},
	{wraps(auth.ErrCodeUsed), 401, "code-used"},
	{wraps(auth.ErrCodeLater), 429, "code-later"},
	{is[*bastion.TooOftenError](), 429, "too-many-starts"},
	{wraps(errTooManyConnections), 429, "too-many-connections"},
	{is[*errLogLimit](), 429, "log-limit"},
	{wraps(errRevoked), 403, "revoked"},
	{wraps(errNoSecret), 403, "no-secret"},
	{wraps(errForcedCommand), 403, "forced-command"},
	{wraps(policy.ErrNoRole), 403, "no-role"},
	{wraps(policy.ErrProfile), 403, "profile"},
	{wraps(policy.ErrFrom), 403, "address"},
	{wraps(policy.ErrHours), 403, "hours"},
	{wraps(bastion.ErrNoAccount), 403, "no-account"},
	{wraps(bastion.ErrNoProfile), 404, "no-profile"},
	{wraps(bastion.ErrTooMany), 409, "too-many-bastions"},
	{wraps(errAudit), 503, "audit"},
	{wraps(bastion.ErrCapacity), 503, "capacity"},
	{wraps(bastion.ErrQuota), 503, "quota"},
	{wraps(bastion.ErrBusy), 503, "throttled"},
	{wraps(bastion.ErrLedger), 503, "ledger"},
	{wraps(errDraining), 503, "draining"},
	{wraps(bastion.ErrTimeout), 504, "timeout"},
	{wraps(bastion.ErrNoAnswer), 504, "no-answer"},
}

func wraps(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

func is[E error]() func(error) bool {
	return func(err error) bool { return errors.As(err, new(E)) }
}
