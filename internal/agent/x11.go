package agent

import (
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/crypto/ssh"
)

const (
	// firstDisplay is sshd's X11DisplayOffset, and maxDisplays how many it
	// tries from there.
	firstDisplay = 10
	maxDisplays  = 1000
	// x11Port is where display 0 listens.
	x11Port = 6000
)

// An x11 is a session's forwarded display. Its cookie is one the client made
// up; the client puts the real one in its place.
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
		return false // as sshd: without it no program would find the cookie
	}
	for n := firstDisplay; n < firstDisplay+maxDisplays; n++ {
		l, _, err := s.c.server.Account.listenLoopback("localhost", uint32(x11Port+n))
		if err != nil {
			continue
		}
		s.x11 = &x11{listener: l, number: n, screen: r.Screen, protocol: r.Protocol, cookie: r.Cookie}
		var one sync.Once
		s.c.serve(l, func(nc net.Conn) (string, []byte) {
			first := false
			one.Do(func() { first = true })
			if r.SingleConnection && !first {
				return "", nil // it had been accepted before the listener was closed
			}
			if r.SingleConnection {
				l.close()
			}
			origin := addrPort(nc.RemoteAddr())
			return "x11", ssh.Marshal(tcpAddr{origin.Addr().String(), uint32(origin.Port())})
		})
		return true
	}
	return false
}

func (x *x11) close() { x.listener.close() }

func (x *x11) display() string { return fmt.Sprintf("localhost:%d.%d", x.number, x.screen) }

// xauthCommands are what tells the account's programs the cookie. The parts
// come from outside and were checked when they were parsed.
func (x *x11) xauthCommands() string {
	name := fmt.Sprintf("unix:%d.%d", x.number, x.screen)
	return fmt.Sprintf("remove %s\nadd %s %s %s\n", name, name, x.protocol, x.cookie)
}
