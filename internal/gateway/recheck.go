package gateway

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/policy"
)

const (
	// recheckInterval is the interval between rechecks of a login. If its key has
	// expired or a role has ended, it is revoked at once. If its key is refused,
	// it is revoked after refusalsToRevoke refusals in a row, because a file that
	// is rewritten in place is empty for a moment. So a removed key ends its
	// connections within 10 s, which docs/configuration.md promises.
	recheckInterval  = 2 * time.Second
	refusalsToRevoke = 3
)

// recheckLogins disconnects logins whose credentials are no longer valid, until ctx
// ends.
func (s *Server) recheckLogins(ctx context.Context) {
	tick := time.NewTicker(recheckInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		for _, c := range s.loggedInConns() {
			c.recheck()
		}
	}
}

func (s *Server) loggedInConns() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*conn
	for c := range s.conns {
		if c.loggedIn {
			all = append(all, c)
		}
	}
	return all
}

// recheck disconnects the connection if its credentials are no longer valid. Once c has
// logged in, only the goroutine of recheckLogins uses c.creds.
func (c *conn) recheck() {
	defer c.closeOnPanic(c.stream)
	creds := &c.creds
	if creds.revoked {
		return
	}
	if err := c.srv.checkRevoked(c.identity.User); err != nil {
		c.revoke(err, userRevokedMessage(c.ref))
		return
	}
	now := c.srv.settings()
	if c.identity.Via != "" {
		c.recheckPeer(now)
		return
	}
	if creds.operator {
		return
	}
	if err := c.recheckRoles(now); err != nil {
		c.revoke(err, roleEndedMessage)
		return
	}
	if creds.key == nil { // a token
		if !creds.grant.Expires.IsZero() && time.Now().After(creds.grant.Expires) {
			c.revoke(auth.ErrExpired, expiredMessage)
		}
		return
	}
	if now.Recheck == nil {
		return
	}
	g, err := now.Recheck(c.identity.User, creds.key, c.clientAddr.Addr(), time.Now(), creds.grant)
	expired := errors.Is(err, auth.ErrExpired)
	switch {
	case err == nil:
		creds.grant, creds.refusedInRow = g, 0
		return
	case errors.Is(err, auth.ErrUndecided):
		return
	case expired:
	default:
		if creds.refusedInRow++; creds.refusedInRow < refusalsToRevoke {
			return
		}
	}
	text := revokedMessage(c.ref)
	if expired {
		text = expiredMessage
	}
	c.revoke(err, text)
}

// checkRevoked returns an error, which wraps errRevoked, if the user is revoked.
func (s *Server) checkRevoked(user string) error {
	if s.Revoked == nil {
		return nil
	}
	if err := s.Revoked(user, time.Now()); err != nil {
		return fmt.Errorf("%w: %w", errRevoked, err)
	}
	return nil
}

// recheckPeer disconnects another gateway whose certificate has expired, or whose fleet key
// is gone after a reload. Gateways log in for each command, so a certificate of two minutes
// outlasts its use.
func (c *conn) recheckPeer(now *Settings) {
	err := errNoPeers
	if now.Peer != nil {
		_, err = now.Peer(c.creds.key)
	}
	if err != nil {
		c.revoke(err, revokedMessage(c.ref))
	}
}

var errNoPeers = errors.New("this gateway has no other gateways any more")

// recheckRoles returns an error if the roles of now no longer permit the login, or
// permit less than at the login. The bastion's certificate fixes the permissions of a
// login, so a login that a reload has narrowed must end. Wider permissions take effect
// at the next login.
func (c *conn) recheckRoles(now *Settings) error {
	creds := &c.creds
	login := c.policyLogin(c.identity, creds.grant)
	if creds.settings == now {
		return policy.CheckConditions(creds.roles, login)
	}
	permissions, roles, err := now.Roles.Decide(login)
	if err == nil {
		err = policy.Narrowed(c.identity.Permissions, permissions)
	}
	if err == nil {
		creds.roles, creds.settings = roles, now
	}
	return err
}

// revoke disconnects a login that is no longer permitted, because of err. Text is the
// message for its sessions.
func (c *conn) revoke(err error, text string) {
	c.creds.revoked = true
	c.log.Warn("login is no longer permitted", "user", c.identity.User, "key", c.identity.Key, "err", err)
	c.setCause("gateway", err.Error())
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	if !c.srv.closing {
		c.srv.wg.Go(func() { c.disconnect(text) })
	}
}
