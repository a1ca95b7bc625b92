package agent

import (
	"fmt"
	"net"
	"os"
	"sync"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

const (
	// firstDisplay is sshd's X11DisplayOffset. Like sshd, the agent tries maxDisplays
	// from there.
	firstDisplay = 10
	maxDisplays  = 1000
	// x11Port is the TCP port of display 0.
	x11Port = 6000
)

// An x11 is a session's forwarded display. The client has invented its cookie, and replaces
// it with the real one in forwarded connections.
type x11 struct {
	listener         *listener
	number           int
	screen           uint32
	protocol, cookie string
}

// requestX11 answers x11-req (RFC 4254 section 6.3.1).
func (s *session) requestX11(payload []byte) bool {
	if s.x11 != nil || !s.c.id.Permissions.X11Forwarding {
		return false
	}
	r, err := parseX11Request(payload)
	if err != nil {
		return false
	}
	if _, err := os.Stat(xauthPath); err != nil {
		return false // as in sshd: programs could not find the cookie
	}
	for n := firstDisplay; n < firstDisplay+maxDisplays; n++ {
		l, _, err := s.c.login.Account.listen(bindAddresses("no", "localhost"), uint32(x11Port+n))
		if err != nil {
			continue
		}
		s.x11 = &x11{listener: l, number: n, screen: r.Screen, protocol: r.Protocol, cookie: r.Cookie}
		var one sync.Once
		s.c.serve(l, func(nc net.Conn) (string, []byte) {
			first := false
			one.Do(func() { first = true })
			if r.Single && !first {
				return "", nil // accepted before the listener was closed
			}
			if r.Single {
				l.close()
			}
			origin := identity.AddrPort(nc.RemoteAddr())
			return "x11", sshmsg.X11{OriginHost: origin.Addr().String(), OriginPort: uint32(origin.Port())}.Append(nil)
		})
		return true
	}
	return false
}

func (x *x11) close() { x.listener.close() }

func (x *x11) display() string { return fmt.Sprintf("localhost:%d.%d", x.number, x.screen) }

// xauthCommands returns xauth's commands for storing the cookie. parseX11Request has checked
// the client's protocol and cookie.
func (x *x11) xauthCommands() string {
	name := fmt.Sprintf("unix:%d.%d", x.number, x.screen)
	return fmt.Sprintf("remove %s\nadd %s %s %s\n", name, name, x.protocol, x.cookie)
}
