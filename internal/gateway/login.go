package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/userauth"
)

// serverVersion is the identification of the server. OpenSSH's client sends its
// extensions only to servers whose version begins with "OpenSSH". No release of
// OpenSSH has the number 99, so clients apply no workarounds for old versions, and
// libraries that look for a number assume that Unix sockets can be forwarded.
// docs/adr/0003 lists the checks of clients.
const serverVersion = "SSH-2.0-OpenSSH_99_Sallyport"

// PeerUser is the name with which another gateway logs in to the console. No user can
// have it: in "+gateway" the user's name, before the "+", is empty.
const PeerUser = "+gateway"

const (
	loginGraceDefault = 2 * time.Minute
	// maxAuthTriesDefault is also that of package userauth.
	maxAuthTriesDefault = 6
)

var (
	errTooManyConnections = errors.New("too many connections of this user")
	errGrace              = errors.New("login grace time exceeded")
	errAuthTries          = errors.New("too many authentication failures")
	errLeft               = errors.New("the client left without logging in")
	// errNoSecret refuses a user without a secret if totp is required.
	errNoSecret = errors.New("the user has no secret in totp_dir, and totp is required")
	// errSilent wraps the error of a connection that closed before the client
	// sent anything.
	errSilent = errors.New("closed without a byte")
	errTouch  = errors.New("the FIDO key was not touched")
	errVerify = errors.New("the FIDO key has not verified its user, which verify-required demands")
	errNoKey  = errors.New("a code without a key")
	// errRevoked refuses users whom an administrator has revoked.
	errRevoked = errors.New("login refused")
	// errForcedCommand refuses the console to keys with a forced command.
	errForcedCommand = errors.New("a key with a forced command may not use the console")
)

// authenticate exchanges keys and authenticates the client. For a user with a
// proven key and the right role, it begins to get the bastion or opens the console.
//
// If the error is nil, c.identity and, except for the console, c.dial are set; the
// bastion may still be starting. c.dial may be set with an error, too.
func (c *conn) authenticate(ctx context.Context) error {
	var expired atomic.Bool
	grace := time.AfterFunc(cmp.Or(c.cfg.LoginGraceTime, loginGraceDefault), func() { expired.Store(true); c.ssh.Close() })
	defer grace.Stop()

	c.trace.Phase("key exchange")
	err := c.ssh.Handshake()
	c.clientVersion = c.ssh.PeerVersion()
	if err == nil {
		c.trace.Phase("auth")
		a := &authentication{c: c, keyProven: func() { grace.Stop(); c.slot.release() }}
		a.server = userauth.NewServer(c.ssh, userauth.ServerConfig{MaxAuthTries: c.cfg.MaxAuthTries, Refused: a.refused})
		err = a.run(ctx)
	}
	switch {
	case expired.Load():
		err = errGrace
	case isShortage(err):
	case c.ssh.Received() == 0:
		err = fmt.Errorf("%w: %w", errSilent, err)
	case errors.Is(err, userauth.ErrTooManyTries):
		err = errAuthTries
	case errors.Is(err, io.EOF) && c.attempt.user != "":
		err = cmp.Or(c.attempt.err, errLeft)
	}
	return err
}

// version returns the server's identification string (RFC 4253, section 4.2),
// without CR LF.
func (c *conn) version() string {
	if c.cfg.VersionAddendum == "" {
		return serverVersion
	}
	return serverVersion + " " + c.cfg.VersionAddendum
}

// An authentication is the user authentication of one connection (RFC 4252).
type authentication struct {
	server    *userauth.Server
	c         *conn
	keyProven func()      // ends LoginGraceTime and the connection's startup slot
	needsCode *provenUser // if not nil, a code is needed for this user
	requested bool        // there was a request

	toldName bool // see refuseKey
}

// A provenUser is a user whose key has been proven.
type provenUser struct {
	user, profile string
	key           ssh.PublicKey
	grant         auth.Grant     // zero for a peer
	peer          *identity.Peer // nil, unless a gateway logs in for the user
	operator      bool           // the token of an operator, who is no user
}

// run answers the client's requests until one succeeds or the connection ends.
func (a *authentication) run(ctx context.Context) error {
	for {
		req, err := a.server.Next()
		if err != nil {
			return err
		}
		first := !a.requested
		a.begin(a.server.User())
		var proven *provenUser
		switch req := req.(type) {
		case *userauth.Query:
			err = a.query(req)
		case *userauth.Signed:
			proven, err = a.signed(req)
		case *userauth.KeyboardInteractive:
			proven, err = a.code(ctx)
		default: // "none" asks for the methods (RFC 4252, section 5.2)
			if !first {
				a.count()
			}
			err = a.server.Fail()
		}
		if err != nil {
			return err
		}
		if proven != nil {
			return a.admit(ctx, proven)
		}
	}
}

// begin records the user name of a request. Before the answer to the first
// request, it sends the banner (RFC 4252, section 5.4).
func (a *authentication) begin(user string) {
	if !a.requested && a.c.cfg.Banner != "" {
		a.server.Banner(a.c.cfg.Banner)
	}
	a.requested = true
	a.c.attempt.user = user
}

// refused is called for each request that package userauth has refused itself.
func (a *authentication) refused(user, method string, key ssh.PublicKey, err error) {
	a.begin(user)
	if key != nil {
		a.c.attempt.key = key
	}
	a.c.attempt.err = err
	a.count()
	a.c.log.Debug("authentication request refused", "user", user, "method", method, "err", err)
}

// fail answers a request with FAILURE. Cause is for the logs. If cause is a lack of
// resources, which clients would report as "Permission denied", fail sends
// busyMessage and ends the login instead.
func (a *authentication) fail(cause error) error {
	a.c.attempt.err = cause
	if isShortage(cause) {
		a.server.Banner(busyMessage + "\r\n")
		return cause
	}
	a.count()
	return a.server.Fail()
}

// count counts a failed attempt. After the last one that MaxAuthTries permits, it
// tells the user so.
func (a *authentication) count() {
	if a.c.attempt.failures++; a.c.attempt.failures >= cmp.Or(a.c.cfg.MaxAuthTries, maxAuthTriesDefault) {
		a.server.Banner(tooManyTriesMessage)
	}
}

// refuseKey refuses a key. If the user name has a form that no user here can have,
// the client is told so, once; that reveals nothing about the users there are.
func (a *authentication) refuseKey(cause error) error {
	if errors.Is(cause, auth.ErrName) && !a.toldName {
		a.toldName = true
		a.server.Banner(nameMessage)
	}
	return a.fail(cause)
}

// query answers whether a signature by the key would be accepted. The key is not
// proven and the client may go on with another, so query changes no state except
// for the logs.
func (a *authentication) query(req *userauth.Query) error {
	c := a.c
	c.attempt.key = req.Key
	if c.isPeerName(req.User) {
		if _, err := c.cfg.Peer(req.Key); err != nil {
			return a.fail(err)
		}
		return a.server.Accept(req)
	}
	user, _ := splitUser(req.User)
	if _, err := c.cfg.Authorize(user, req.Key, c.clientAddr.Addr(), time.Now()); err != nil {
		return a.refuseKey(err)
	}
	return a.server.Accept(req)
}

// signed decides on a proven key for the user name in the same request. It returns
// nil if the client has to go on: the key was refused, or a code is needed.
func (a *authentication) signed(req *userauth.Signed) (*provenUser, error) {
	c := a.c
	c.attempt.key = req.Key
	if c.isPeerName(req.User) {
		peer, err := c.cfg.Peer(req.Key)
		if err != nil {
			return nil, a.fail(err)
		}
		return &provenUser{user: peer.User, profile: consoleProfile, key: req.Key, peer: &peer}, nil
	}
	user, profile := splitUser(req.User)
	grant, err := c.authorize(user, req.Key, req.UserPresent, req.UserVerified)
	if err != nil {
		return nil, a.refuseKey(err)
	}
	proven := &provenUser{user: user, profile: profile, key: req.Key, grant: grant}
	switch needs, err := c.needsCode(user); {
	case errors.Is(err, errNoSecret):
		a.keyProven()
		c.attempt.err = err
		c.setProven(proven)
		a.server.Banner(userMessage(err, c.ref) + "\r\n")
		return nil, err
	case err != nil:
		return nil, a.fail(err)
	case needs:
		a.needsCode = proven
		return nil, a.server.Partial(userauth.MethodKeyboardInteractive)
	}
	return proven, nil
}

// authorize returns the grant of a user's key that has signed. Present and verified are
// the flags of a FIDO key.
func (c *conn) authorize(user string, key ssh.PublicKey, present, verified bool) (auth.Grant, error) {
	grant, err := c.cfg.Authorize(user, key, c.clientAddr.Addr(), time.Now())
	switch {
	case err != nil:
		return auth.Grant{}, err
	case !present && !grant.NoTouchRequired:
		return auth.Grant{}, errTouch
	case !verified && grant.VerifyRequired:
		return auth.Grant{}, errVerify
	}
	return grant, nil
}

// needsCode reports whether a user must give a code beside a key. The error is errNoSecret
// if she has none and codes are required.
func (c *conn) needsCode(user string) (bool, error) {
	if c.cfg.SecondFactor == nil {
		return false, nil
	}
	needs, err := c.cfg.SecondFactor.Needs(user)
	switch {
	case err != nil:
		c.log.Error("cannot tell whether a code is needed", "user", user, "err", err)
		return false, fmt.Errorf("whether a code is needed is %w: %w", auth.ErrUndecided, err)
	case !needs && c.cfg.SecondFactorRequired:
		return false, errNoSecret
	}
	return needs, nil
}

// setProven records the credentials of a proven user, against which the login is
// rechecked.
func (c *conn) setProven(proven *provenUser) {
	c.creds = credentials{proven: true, key: proven.key, grant: proven.grant, operator: proven.operator, settings: c.cfg}
}

// code asks for a verification code by keyboard-interactive (RFC 4256). Package
// userauth offers the method only after a key is proven, and does not let the
// client change the user name, so the code is for the user of that key.
func (a *authentication) code(ctx context.Context) (*provenUser, error) {
	if a.needsCode == nil {
		return nil, a.fail(errNoKey)
	}
	answers, err := a.server.Ask("", "", userauth.Prompt{Text: "Verification code: "})
	switch {
	case errors.Is(err, userauth.ErrAbandoned):
		return nil, nil
	case err != nil:
		return nil, err
	}
	if err := a.c.cfg.SecondFactor.Check(ctx, a.needsCode.user, answers[0], time.Now()); err != nil {
		if text := codeMessage(err); text != "" {
			if _, err := a.server.Ask("", text); err != nil && !errors.Is(err, userauth.ErrAbandoned) {
				return nil, err
			}
		}
		return nil, a.fail(err)
	}
	return a.needsCode, nil
}

// admit gets the bastion of a proven user or opens the console, if a role permits the
// login. From here on a login may cost money.
func (a *authentication) admit(ctx context.Context, proven *provenUser) error {
	a.keyProven()
	c := a.c
	id, err := c.identify(proven)
	if err == nil {
		ctx = c.trace.Proven(ctx, id.User, id.Profile)
	}
	switch {
	case err != nil:
	case c.wantsConsole(id):
		err = c.openConsole(id)
	default:
		err = c.getBastion(ctx, id, a.server)
	}
	if err != nil {
		// No FAILURE, which clients show as "Permission denied".
		a.server.Banner(userMessage(err, c.ref) + "\r\n")
		return err
	}
	c.identity = id
	if err := a.server.Succeed(); err != nil {
		return err
	}
	if !c.isConsole() {
		c.announceHostKeys()
	}
	return nil
}

// identify makes the identity of a proven user, if a role permits the login. No other
// function makes an identity.
func (c *conn) identify(proven *provenUser) (identity.Identity, error) {
	c.attempt.err = nil
	c.quota.user.Store(c.srv.budgets.get(proven.user, c.cfg.LogPerUser))
	c.setProven(proven)
	id := identity.Identity{
		User:    proven.user,
		Profile: proven.profile,
		Key:     fingerprint(proven.key),
		ConnID:  c.ref,
		Client:  c.clientAddr,
		Server:  c.serverAddr,
	}
	err := bastion.ErrNoProfile // for "alice+", which is not the same as "alice"
	switch revoked := c.srv.checkRevoked(id.User); {
	case revoked != nil:
		err = revoked
	case proven.peer != nil: // the other gateway has applied the roles
		id.Via, id.ViaConn = proven.peer.Gateway, proven.peer.ConnID
		id.Permissions, err = identity.Permissions{Admin: proven.peer.Admin}, nil
	case proven.operator:
		id.Permissions = identity.AllowAll()
		id.Permissions.Admin, err = true, nil
	case proven.profile != "":
		id.Permissions, c.creds.roles, err = c.cfg.Roles.Decide(c.policyLogin(id, proven.grant))
	}
	if err != nil {
		c.attempt.err = err
	}
	return id, err
}

// fingerprint returns the fingerprint of a key; empty without one.
func fingerprint(key ssh.PublicKey) string {
	if key == nil {
		return ""
	}
	return auth.Fingerprint(key)
}

// policyLogin describes the login of id for package policy.
func (c *conn) policyLogin(id identity.Identity, grant auth.Grant) policy.Login {
	return policy.Login{
		User: id.User, Profile: id.Profile, Console: c.wantsConsole(id), Principals: grant.RolePrincipals, From: c.clientAddr.Addr(),
		Now: time.Now(), Key: grant.Permissions,
	}
}

// wantsConsole reports whether id is a login to the console.
func (c *conn) wantsConsole(id identity.Identity) bool {
	return c.srv.Console != nil && id.Profile == consoleProfile
}

// isPeerName reports whether name is that of other gateways, which log in with a
// certificate for [Settings.Peer] and nothing else.
func (c *conn) isPeerName(name string) bool {
	return name == PeerUser && c.cfg.Peer != nil && c.srv.Console != nil
}

// splitUser splits "alice+prod" into user and profile. The profile of "alice" is
// "default".
func splitUser(name string) (user, profile string) {
	user, profile, ok := strings.Cut(name, "+")
	if !ok {
		profile = "default"
	}
	return user, profile
}
