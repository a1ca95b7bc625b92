package gateway

import (
	"errors"
	"sync/atomic"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// Stats are numbers of a [Server]. The keys of each map are constants of this package, and
// always the same, so that clients cannot add to them. Counters begin at zero with the
// Server, and never fall.
type Stats struct {
	// Connections are open, by state: "authenticating", "starting" (a bastion, for a
	// proven user), "relayed", "console", "api".
	Connections map[string]int
	// Channels are open, by type; "other" are those of unknown types.
	Channels map[string]int
	// FromClients and ToClients are the bytes of data and stderr that were relayed, on
	// open channels, too.
	FromClients, ToClients int64
	// Accepted counts connections, and Rejected those that were rejected before a
	// login, by reason: "penalty", "max_startups", "proxy_header", "shortage".
	Accepted uint64
	Rejected map[string]uint64
	// Logins counts logins, by protocol and result.
	Logins map[LoginOutcome]uint64
}

// A LoginOutcome has the labels of a login.
type LoginOutcome struct {
	Protocol string // "ssh" or "http"
	// Result is "ok"; "refused": no credential was accepted; "denied": a rule or limit
	// refused a proven user; "no_bastion": it could not be reached or started;
	// "unavailable": the gateway could not decide, or not write the audit log;
	// "incomplete": the client left before a result.
	Result string
}

type loginResult int

const (
	loginOK loginResult = iota
	loginRefused
	loginDenied
	loginNoBastion
	loginUnavailable
	loginIncomplete
)

var loginResults = [...]string{"ok", "refused", "denied", "no_bastion", "unavailable", "incomplete"}

type rejection int

const (
	rejectedPenalty rejection = iota
	rejectedStartups
	rejectedProxyHeader
	rejectedShortage
)

var rejections = [...]string{"penalty", "max_startups", "proxy_header", "shortage"}

// counters are those of Stats.
type counters struct {
	accepted atomic.Uint64
	rejected [len(rejections)]atomic.Uint64
	logins   [2][len(loginResults)]atomic.Uint64 // over SSH, and over HTTP
}

// countLogin counts a login that has ended with err. Connections on which nobody has tried
// to log in, such as health checks, are not counted.
func (c *conn) countLogin(err error) {
	if c.isSilent(err) {
		return
	}
	protocol := 0
	if c.isCall {
		protocol = 1
	}
	c.srv.counters.logins[protocol][c.loginResult(err)].Add(1)
}

// isSilent reports whether the client has not tried to log in, so that the end of its
// connection with err is neither audited nor counted.
func (c *conn) isSilent(err error) bool {
	return c.healthCheck && c.attempt.user == "" || errors.Is(err, errSilent)
}

func (c *conn) loginResult(err error) loginResult {
	switch {
	case err == nil:
		return loginOK
	case isShortage(err), errors.Is(err, errAudit), errors.Is(err, errDraining), errors.Is(c.attempt.err, auth.ErrUndecided):
		return loginUnavailable
	case c.dial != nil && c.dial.reason() != nil:
		return loginNoBastion
	case errors.Is(err, ErrCodeNeeded), c.dial != nil: // the client may repeat the request with a code
		return loginIncomplete
	case c.creds.proven && c.attempt.err != nil:
		return loginDenied
	case !c.creds.proven && c.attempt.failures > 0:
		return loginRefused
	}
	return loginIncomplete
}

// Stats returns the present numbers.
func (s *Server) Stats() Stats {
	n := &s.counters
	all := Stats{
		Connections: map[string]int{"authenticating": 0, "starting": 0, "relayed": 0, "console": 0, "api": 0},
		Channels:    map[string]int{"other": 0},
		Accepted:    n.accepted.Load(),
		Rejected:    map[string]uint64{},
		Logins:      map[LoginOutcome]uint64{},
	}
	for i, reason := range rejections {
		all.Rejected[reason] = n.rejected[i].Load()
	}
	for i, protocol := range []string{"ssh", callProtocol} {
		for j, result := range loginResults {
			all.Logins[LoginOutcome{protocol, result}] = n.logins[i][j].Load()
		}
	}
	for _, kind := range channelTypes {
		all.Channels[kind] = 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	all.FromClients, all.ToClients = s.endedFromClients, s.endedToClients
	for c := range s.conns {
		all.Connections[c.state()]++
		if c.relay == nil {
			continue
		}
		open, fromClient, toClient := c.relay.Channels()
		all.FromClients += fromClient
		all.ToClients += toClient
		for _, channel := range open {
			if _, known := all.Channels[channel.Kind]; !known {
				channel.Kind = "other"
			}
			all.Channels[channel.Kind]++
		}
	}
	return all
}

// channelTypes are those of RFC 4254 and of OpenSSH.
var channelTypes = [...]string{
	"session", sshmsg.TypeDirectTCPIP, sshmsg.TypeForwardedTCPIP, sshmsg.TypeDirectStreamlocal, sshmsg.TypeForwardedStreamlocal,
	sshmsg.TypeX11, sshmsg.TypeAgent,
}

// state returns the connection's key in Stats.Connections. The caller holds srv.mu.
func (c *conn) state() string {
	switch {
	case c.isCall:
		return "api"
	case c.relay != nil:
		return "relayed"
	case c.loggedIn:
		return "console"
	case c.countedAs != "":
		return "starting"
	}
	return "authenticating"
}
