package gateway

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// This file writes the events of a connection to the audit log; watch.go and
// session.go write those of its channels. docs/audit.md describes the events.

// errAudit says that an event could not be written, so the audited action must not
// happen.
var errAudit = errors.New("the audit log cannot be written")

// An auditState is the state of a connection that only the audit log needs.
type auditState struct {
	announced            bool // the connection event is written
	cause                atomic.Pointer[endCause]
	fromClient, toClient atomic.Int64 // bytes of data
	repeats              repeats
}

// An endCause says which side ended a connection and why, if the relay cannot know.
type endCause struct{ by, reason string }

// setCause sets the reason for the end of the connection. The first call counts.
func (c *conn) setCause(by, reason string) {
	c.audited.cause.CompareAndSwap(nil, &endCause{by, reason})
}

// audit writes an event of this connection, within LogPerUser. If the error is not
// nil, the audited action must not happen; it wraps errAudit or is an errLogLimit.
func (c *conn) audit(id identity.Identity, e audit.Event) error {
	if c.srv.Audit == nil {
		return nil
	}
	if over, _ := c.overLogLimit(); over && !endsAction(e.Type) {
		return &errLogLimit{}
	}
	return c.auditUnlimited(id, e)
}

// auditUnlimited is audit for events that are written even if LogPerUser is reached.
func (c *conn) auditUnlimited(id identity.Identity, e audit.Event) error {
	n, err := c.appendEvent(id, e)
	switch {
	case beginsAction(e.Type):
		c.spend(2 * n)
	case !endsAction(e.Type):
		c.spend(n)
	}
	return err
}

// auditPaid is auditUnlimited for an event whose bytes were spent before.
func (c *conn) auditPaid(id identity.Identity, e audit.Event) error {
	_, err := c.appendEvent(id, e)
	return err
}

// appendEvent writes an event, and returns its size in bytes. The error wraps
// errAudit.
func (c *conn) appendEvent(id identity.Identity, e audit.Event) (int, error) {
	e.Conn, e.Client = c.ref, c.clientAddr
	e.User, e.Profile = id.User, id.Profile
	e.Via, e.ViaConn = id.Via, id.ViaConn
	if user := c.quota.user.Load(); user != nil {
		user.writing.Lock()
		defer user.writing.Unlock()
	}
	n, err := c.srv.Audit.Append(e)
	if err != nil {
		err = fmt.Errorf("%w: %w", errAudit, err)
	}
	return n, err
}

// auditRefused writes that a request or channel was refused. Repetitions are counted
// and written later.
func (c *conn) auditRefused(id identity.Identity, e audit.Event) {
	if c.srv.Audit == nil {
		return
	}
	over, _ := c.overLogLimit()
	e = e.Clip()
	first, due := c.audited.repeats.add(repeatKeyOf(e, over), e, over, time.Now())
	for _, e := range due {
		c.auditUnlimited(id, e)
	}
	if first {
		c.auditUnlimited(id, e)
	}
}

// flushRepeats writes the repetitions that are due, or all.
func (c *conn) flushRepeats(now time.Time, all bool) {
	for _, e := range c.audited.repeats.flush(now, all) {
		c.auditUnlimited(c.identity, e)
	}
}

// auditConsole is [ConsoleConn.Audit].
func (c *conn) auditConsole(e audit.Event) error {
	if e.Type == audit.Refused {
		c.auditRefused(c.identity, e)
		return nil
	}
	return c.userError(c.audit(c.identity, e))
}

// userError returns an error whose text is the message for err to the user, or nil.
func (c *conn) userError(err error) error {
	if err == nil {
		return nil
	}
	return errors.New(userMessage(err, c.ref))
}

// auditConnection writes the connection event, which comes before every other event
// of a connection.
func (c *conn) auditConnection() {
	if !c.audited.announced {
		c.audited.announced = true
		c.auditUnlimited(identity.Identity{}, audit.Event{Type: audit.Connection, Server: c.serverAddr})
	}
}

// auditLogin writes the login of id. If it returns an error, the login must not
// succeed.
func (c *conn) auditLogin(id identity.Identity) error {
	if err := c.logLimitError(); err != nil {
		c.attempt.err = err
		return err
	}
	c.auditConnection()
	e := c.proofEvent()
	e.Type, e.ClientVersion, e.Attempts, e.Key = audit.Login, c.clientVersion, c.attempt.failures, id.Key
	e.Protocol = c.protocol()
	return c.audit(id, e)
}

// protocol is the protocol of a login that is not over SSH.
func (c *conn) protocol() string {
	if c.isCall {
		return callProtocol
	}
	return ""
}

// proofEvent returns an event with the fields that say how the proven key, if there is
// one, was authorized.
func (c *conn) proofEvent() audit.Event {
	return audit.Event{AuthorizedBy: c.creds.grant.Line, Certificate: certificateOf(c.creds.key)}
}

// certificateOf describes key if it is a certificate, and returns nil otherwise.
func certificateOf(key ssh.PublicKey) *audit.Certificate {
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil
	}
	return &audit.Certificate{
		ID: cert.KeyId, Serial: cert.Serial, CA: ssh.FingerprintSHA256(cert.SignatureKey), Principals: cert.ValidPrincipals,
	}
}

// auditLoginRefused writes the end of a connection without a login and, if the client
// tried to log in, the refused login. It returns false if LogPerUser is reached and
// the refusal was only counted.
func (c *conn) auditLoginRefused(err error) bool {
	// Health checks of load balancers would fill the log.
	if c.isSilent(err) {
		return true
	}
	if c.dial == nil && c.suppressRefusal(err) {
		return false
	}
	c.auditConnection()
	if errors.Is(err, errGrace) {
		c.setCause("gateway", err.Error())
	}
	if c.dial == nil && c.attempt.user != "" {
		user, profile := splitUser(c.attempt.user)
		c.auditUnlimited(identity.Identity{User: user, Profile: profile}, c.loginRefusedEvent(err))
	}
	c.auditEnd("client", err)
	return true
}

// loginRefusedEvent is the event of a login that failed with err.
func (c *conn) loginRefusedEvent(err error) audit.Event {
	e := c.proofEvent()
	e.Type, e.ClientVersion, e.Attempts, e.Reason = audit.LoginRefused, c.clientVersion, c.attempt.failures, err.Error()
	e.Protocol = c.protocol()
	key := c.attempt.key
	if c.creds.proven {
		key = c.creds.key
	}
	if key != nil {
		e.Key, e.Certificate = auth.Fingerprint(key), certificateOf(key)
	}
	if c.attempt.err != nil {
		e.Reason = c.attempt.err.Error()
	}
	return e
}

// auditEnd writes the end of the connection. It names the user only if the key was
// proven.
func (c *conn) auditEnd(by string, reason error) {
	c.flushRepeats(time.Now(), true)
	e := audit.Event{Type: audit.End, By: by, Reason: reason.Error()}
	if c.dial != nil {
		if err := c.dial.reason(); err != nil {
			c.setCause("gateway", err.Error())
		}
	}
	if cause := c.audited.cause.Load(); cause != nil {
		e.By, e.Reason = cause.by, cause.reason
	}
	e.Totals = &audit.Totals{FromClient: c.audited.fromClient.Load(), ToClient: c.audited.toClient.Load(), Seconds: secondsSince(c.began)}
	id := c.identity
	if c.dial != nil {
		id = c.dial.id
	}
	c.audit(id, e)
}

// secondsSince returns the seconds since t, in whole milliseconds.
func secondsSince(t time.Time) float64 {
	return float64(time.Since(t).Milliseconds()) / 1000
}

// AuditFailed disconnects all connections, because their actions can no longer be
// audited. It does not wait for that. New logins are refused while the log fails.
func (s *Server) AuditFailed() {
	s.Disconnect(auditLostMessage, func(Connection) bool { return true })
}

// auditJoined writes to which bastion the connection was joined.
func (c *conn) auditJoined(id identity.Identity, b *bastion.Conn) error {
	return c.audit(id, audit.Event{Type: audit.BastionJoined, Task: b.Task.ID, Generation: b.Task.Generation, Started: b.Started})
}
