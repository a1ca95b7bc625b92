package gateway

import (
	"context"
	"errors"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/policy"
)

const (
	// recheckEvery is how often every login that is going on is asked about,
	// and refusalsToEnd how often in a row it must be refused to be ended: a
	// file that is rewritten in place has no keys in it for a moment. Together
	// they keep the promise that a key that is taken away ends its connections
	// within 10 s.
	recheckEvery  = 2 * time.Second
	refusalsToEnd = 3
)

// holding is by what a connection holds on to its login.
type holding struct {
	key   ssh.PublicKey
	grant auth.Grant
	roles []*policy.Role

	refusals int // in a row
	ended    bool
}

// recheckLogins ends connections whose users would not be let in again, until
// ctx ends.
func (s *Server) recheckLogins(ctx context.Context) {
	if s.Recheck == nil && s.Roles == nil {
		return
	}
	tick := time.NewTicker(recheckEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		for _, c := range s.loggedIn() {
			c.recheck()
		}
	}
}

func (s *Server) loggedIn() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*conn
	for c := range s.conns {
		if c.peer != nil {
			all = append(all, c)
		}
	}
	return all
}

// recheck ends the connection if its user would not be let in again. Nobody but
// the goroutine of recheckLogins touches c.holding once c has logged in.
func (c *conn) recheck() {
	defer c.recover(c.wire)
	h := &c.holding
	if h.ended {
		return
	}
	if err := policy.Holds(h.roles, c.asking(c.identity, h.grant)); err != nil {
		c.endLogin(err, roleEndedMessage)
		return
	}
	if c.Recheck == nil {
		return
	}
	g, err := c.Recheck(c.identity.User, h.key, c.client.Addr(), time.Now(), h.grant)
	expired := errors.Is(err, auth.ErrExpired)
	switch {
	case err == nil:
		h.grant, h.refusals = g, 0
		return
	case errors.Is(err, auth.ErrUndecided):
		return
	case expired:
	default:
		if h.refusals++; h.refusals < refusalsToEnd {
			return
		}
	}
	why := revokedMessage(c.ref)
	if expired {
		why = expiredMessage
	}
	c.endLogin(err, why)
}

// endLogin ends a connection whose user would not be let in again, because of
// err. It is told why.
func (c *conn) endLogin(err error, why string) {
	c.holding.ended = true
	c.log.Warn("login is no longer permitted", "user", c.identity.User, "key", c.identity.Key, "err", err)
	c.because("gateway", err.Error())
	c.Server.mu.Lock()
	defer c.Server.mu.Unlock()
	if !c.closing {
		c.Server.wg.Go(func() { c.disconnect(why) })
	}
}

// fingerprint is that of the key, as ssh-keygen -l prints it: that of the key in
// a certificate.
func fingerprint(key ssh.PublicKey) string {
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	return ssh.FingerprintSHA256(key)
}
