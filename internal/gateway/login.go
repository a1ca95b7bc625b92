package gateway

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/relay"
)

// serverVersion is what clients are told. OpenSSH's client tells a server whose
// version does not begin with "OpenSSH" neither that its output is read no more
// (eow@openssh.com, which ends the command in "ssh host yes | head") nor that it
// will open no more sessions; and some clients refuse to forward Unix sockets
// through one. Without a number it matches none of the old versions that clients
// work around.
const serverVersion = "SSH-2.0-OpenSSH_Sallyport"

const (
	// authPatience is how long a user waits for a bastion inside
	// authentication, where she can be shown progress. Then the login is let
	// through and the wait goes on in the opening of channels: paramiko gives
	// up after 30 s of authentication.
	authPatience = 25 * time.Second
	// progressEvery is how often a waiting user sees a dot. It also keeps the
	// connection alive: during authentication OpenSSH hangs up after
	// ServerAliveInterval × ServerAliveCountMax of silence.
	progressEvery = 4 * time.Second

	loginGraceDefault = 2 * time.Minute
)

var (
	errTooManyConnections = errors.New("too many connections of this user")
	errGrace              = errors.New("login grace time exceeded")
	errTwice              = errors.New("authenticated twice")
	// errForcedCommand keeps a key that may run one command only away from
	// the console.
	errForcedCommand = errors.New("a key with a forced command may not use the console")
	// errNoBastion ends a login whose key was right.
	errNoBastion = errors.New("no bastion")
)

// login does the handshake, and with it finds out who the client is and starts
// getting her a bastion. When it returns without error c.identity and c.dial
// are set; the bastion may still be starting. A connection to the console has no
// dial. c.dial may be set with an error too.
func (c *conn) login(ctx context.Context) (relay.Peer, error) {
	grace := c.LoginGraceTime
	if grace == 0 {
		grace = loginGraceDefault
	}
	var expired atomic.Bool
	timer := time.AfterFunc(grace, func() { expired.Store(true); c.wire.Close() })
	defer timer.Stop()

	version := serverVersion
	if c.VersionAddendum != "" {
		version += " " + c.VersionAddendum
	}
	// Exchanged here and not by package ssh, because the answer decides which
	// ciphers are offered.
	clientVersion, err := c.wire.ExchangeVersions(version)
	c.clientVersion = clientVersion
	if err == nil {
		c.wire.HoldBack()
		var sc *ssh.ServerConn
		var chans <-chan ssh.NewChannel
		var reqs <-chan *ssh.Request
		sc, chans, reqs, err = ssh.NewServerConn(c.wire, c.serverConfig(ctx, clientVersion, version, func() {
			timer.Stop()
			c.admission.release()
		}))
		if err == nil {
			c.wire.Carries(sc)
			// Nothing but the permissions of the authentication that
			// succeeded may say who this is.
			id, ok := sc.Permissions.ExtraData[identityKey{}].(identity.Identity)
			if !ok {
				sc.Close()
				return relay.Peer{}, errors.New("authenticated without an identity")
			}
			c.identity = id
			return relay.Peer{Conn: sc, Chans: chans, Reqs: reqs}, nil
		}
	}
	if expired.Load() {
		err = errGrace
	}
	return relay.Peer{}, err
}

// identityKey is where login finds the identity in the permissions.
type identityKey struct{}

// serverConfig decides who may log in. proven is called once the client has
// proven to be somebody.
func (c *conn) serverConfig(ctx context.Context, clientVersion, version string, proven func()) *ssh.ServerConfig {
	var banner ssh.ServerPreAuthConn
	cfg := &ssh.ServerConfig{
		Config:                  c.algorithms(clientVersion),
		ServerVersion:           version,
		MaxAuthTries:            c.MaxAuthTries,
		PublicKeyAuthAlgorithms: publicKeyAlgorithms,
		PreAuthConnCallback: func(p ssh.ServerPreAuthConn) {
			banner = p
			c.wire.Authenticates(p)
		},
		// Of each attempt that is over, also by methods that are not offered.
		AuthLogCallback: func(meta ssh.ConnMetadata, _ string, _ error) {
			c.offered = meta.User()
		},

		// The key is only offered. Nothing may happen here, and nothing may
		// be remembered: the client may go on to prove another key, or
		// another user.
		PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			c.offered, c.offeredKey = meta.User(), key // for the log of refusals only
			user, _ := splitUser(meta.User())
			grant, err := c.Authorize(user, key, c.client.Addr(), time.Now())
			if err != nil {
				c.attempts, c.refusal = c.attempts+1, err
				return nil, err
			}
			p := &ssh.Permissions{}
			if grant.NoTouchRequired {
				p.Extensions = map[string]string{"no-touch-required": ""}
			}
			return p, nil
		},

		// The key is proven, for the user name in this very request. Identity
		// is made here and nowhere else, and money may be spent from here on.
		VerifiedPublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey, _ *ssh.Permissions, _ string) (*ssh.Permissions, error) {
			user, profile := splitUser(meta.User())
			grant, err := c.Authorize(user, key, c.client.Addr(), time.Now())
			if err != nil {
				c.attempts, c.refusal = c.attempts+1, err
				return nil, err
			}
			admit := func() (*ssh.Permissions, error) {
				proven()
				return c.admit(ctx, user, profile, key, grant, banner)
			}
			if c.SecondFactor == nil {
				return admit()
			}
			switch needs, err := c.SecondFactor.Needs(user); {
			case err != nil:
				c.log.Error("cannot tell whether a code is needed", "user", user, "err", err)
				err = fmt.Errorf("whether a code is needed is %w: %w", auth.ErrUndecided, err)
				c.attempts, c.refusal = c.attempts+1, err
				return nil, err
			case !needs:
				return admit()
			}
			return nil, &ssh.PartialSuccessError{Next: ssh.ServerAuthCallbacks{KeyboardInteractiveCallback: c.askCode(user, admit)}}
		},
	}
	if c.Banner != "" {
		cfg.BannerCallback = func(ssh.ConnMetadata) string { return c.Banner }
	}
	for _, k := range c.HostKeys {
		cfg.AddHostKey(k)
	}
	return cfg
}

// admit makes the identity of a user who has proven who she is, and gets her what
// she came for.
func (c *conn) admit(ctx context.Context, user, profile string, key ssh.PublicKey, grant auth.Grant, banner ssh.ServerPreAuthConn) (*ssh.Permissions, error) {
	c.proven, c.refusal = proof(key, grant), nil
	id := identity.Identity{
		User:    user,
		Profile: profile,
		Key:     fingerprint(key),
		ConnID:  c.ref,
		Client:  c.client,
		Server:  c.server,
	}
	c.holding = holding{key: key, grant: grant}
	err := bastion.ErrNoProfile // "alice+" names none, which is not to leave it out
	if profile != "" {
		id.Permissions, c.holding.roles, err = c.Roles.Decide(c.asking(id, grant))
	}
	if err == nil {
		err = c.getBastion(ctx, id, banner)
	} else {
		c.refusal = err
	}
	if err != nil {
		banner.SendAuthBanner(userMessage(err, c.ref) + "\r\n")
		// No methods are left after this one, so package ssh hangs up; any
		// other error would end in "Permission denied", which is not true.
		return nil, &ssh.PartialSuccessError{}
	}
	return &ssh.Permissions{ExtraData: map[any]any{identityKey{}: id}}, nil
}

// askCode asks the client, whose user has proven a key on this connection, for a
// code by keyboard-interactive (RFC 4256), and calls admit if it is right. Package
// ssh does not let the client go on as somebody else.
func (c *conn) askCode(user string, admit func() (*ssh.Permissions, error)) func(ssh.ConnMetadata, ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
	return func(_ ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
		answers, err := ask("", "", []string{"Verification code: "}, []bool{false})
		if err == nil && len(answers) != 1 {
			err = errors.New("not one answer to one question")
		}
		if err == nil {
			err = c.SecondFactor.Check(user, answers[0], time.Now())
		}
		if err != nil {
			c.attempts, c.refusal = c.attempts+1, err
			if text := codeMessage(err); text != "" {
				ask("", text, nil, nil)
			}
			return nil, err
		}
		return admit()
	}
}

// asking is the login of id, for its roles.
func (c *conn) asking(id identity.Identity, grant auth.Grant) policy.Login {
	return policy.Login{
		User: id.User, Profile: id.Profile, Console: c.wantsConsole(id), Principals: grant.RolePrincipals, From: c.client.Addr(),
		Now: time.Now(), Key: grant.Permissions,
	}
}

// wantsConsole says whether id asks for the console and no bastion.
func (c *conn) wantsConsole(id identity.Identity) bool {
	return c.Console != nil && id.Profile == consoleProfile
}

// splitUser takes "alice+prod" apart. The profile of plain "alice" is "default".
func splitUser(name string) (user, profile string) {
	user, profile, ok := strings.Cut(name, "+")
	if !ok {
		profile = "default"
	}
	return user, profile
}

// getBastion starts dialling the user's bastion and waits for a while, showing
// progress. It returns nil when the bastion is there or is still starting, or
// when the user wants her console instead.
func (c *conn) getBastion(ctx context.Context, id identity.Identity, banner ssh.ServerPreAuthConn) error {
	if c.dial != nil {
		return errTwice
	}
	if c.wantsConsole(id) {
		return c.admitConsole(id)
	}
	if err := c.countUser(id.User, least(c.MaxConnections, id.Permissions.Limits.Connections)); err != nil {
		c.refusal = err
		return err
	}
	if err := c.auditLogin(id); err != nil {
		return err
	}
	c.dial = c.startDial(ctx, id)

	patience := time.NewTimer(authPatience)
	defer patience.Stop()
	var dots <-chan time.Time
	for starting := c.dial.starting; ; {
		var err error
		select {
		case <-c.dial.done:
			if dots != nil {
				banner.SendAuthBanner("\r\n")
			}
			return c.dial.err
		case <-starting:
			starting = nil
			tick := time.NewTicker(progressEvery)
			defer tick.Stop()
			dots = tick.C
			err = banner.SendAuthBanner(startingMessage)
		case <-dots:
			err = banner.SendAuthBanner(".")
		case <-patience.C:
			banner.SendAuthBanner("\r\n")
			return nil
		}
		if err != nil {
			return fmt.Errorf("client left while its bastion was starting: %w", err)
		}
	}
}

// A dial is the wish for a bastion, under way. It belongs to one connection;
// the boot that it may have caused does not, and goes on without it.
type dial struct {
	user     string
	id       identity.Identity
	cancel   context.CancelFunc
	starting chan struct{} // closed if the user has to wait
	done     chan struct{} // closed when conn or err is set
	conn     *bastion.Conn
	err      error
}

func (c *conn) startDial(ctx context.Context, id identity.Identity) *dial {
	ctx, cancel := context.WithCancel(ctx)
	d := &dial{user: id.User, id: id, cancel: cancel, starting: make(chan struct{}), done: make(chan struct{}), err: errNoBastion}
	go func() { // endDial waits for it
		defer close(d.done)
		defer c.recover(c.wire)
		d.conn, d.err = c.Dial(ctx, id, func(bool) { close(d.starting) })
		if d.err == nil {
			d.err = c.auditJoined(id, d.conn)
		}
		switch {
		case d.err == nil:
			c.log.Info("connected", "user", id.User, "task", d.conn.Task.ID, "generation", d.conn.Task.Generation)
			c.keepBastion.start(c, d.conn, "bastion", d.conn.Net)
		case ctx.Err() != nil: // the client has left, or the gateway is going down
			d.err = context.Cause(ctx)
		default:
			c.log.Error("no bastion for user", "user", id.User, "profile", id.Profile, "err", d.err)
		}
	}()
	return d
}

// reason says why there is no bastion; nil while that is not known.
func (d *dial) reason() error {
	select {
	case <-d.done:
		return d.err
	default:
		return nil
	}
}

// deliver returns where the bastion's connection arrives; nothing does if there
// is none.
func (d *dial) deliver() <-chan relay.Peer {
	server := make(chan relay.Peer, 1)
	go func() { // ends with the dial
		defer close(server)
		if <-d.done; d.err == nil {
			server <- relay.Peer{Conn: d.conn, Chans: d.conn.Chans, Reqs: d.conn.Reqs}
		}
	}()
	return server
}

// endDial cancels the dial and closes what it brought, in case the relay has not.
func (c *conn) endDial() {
	if c.dial == nil {
		return
	}
	c.dial.cancel()
	if <-c.dial.done; c.dial.conn != nil {
		c.dial.conn.Close()
	}
}
