package relay

import (
	"errors"
	"slices"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// A bastion opens a channel to its client when a program in it connects to a
// forwarded port, display or agent. A bastion may be compromised, so a channel passes
// only if the client has asked for its listener, as with OpenSSH's client.
//
// A listener, which a tcpip-forward or streamlocal-forward asks for, begins with the
// request: the bastion may open channels before its reply has come, of port 0 from
// any port. It ends when the bastion confirms its cancellation, so that channels
// pass that were opened before. A display is a session's: it ends with the session,
// or with its first channel if the client asked for a single connection. An agent is
// the connection's, as is sshd's socket for it: sessions share it, and it outlives
// the one that asked.

// listenersMax is how many listeners one connection may have.
const listenersMax = 1000

// nameMax bounds a listener's name, in bytes: a host's is at most 255 long (RFC 1035,
// section 2.3.4), and a socket's path at most 108 (unix(7)).
const nameMax = 1024

var (
	errNotAsked         = errors.New("the client has not asked for this")
	errLongName         = errors.New("the name of the listener is too long")
	errTooManyListeners = errors.New("too many remote forwards on this connection")
)

// listeners are those in the bastion that the client has asked for: sockets, displays and
// the agent. The zero value is empty.
type listeners struct {
	sockets  []*listener
	displays map[int]bool // of the sessions by number; true is one for a single connection
	agent    bool
}

type listener struct {
	kind string // of the channels
	name string // the host that was asked for, or the path of a socket
	port uint32 // 0 is any, until the bastion has chosen one
}

// parseListener parses a tcpip-forward, a streamlocal-forward or the cancellation of
// one: RFC 4254, section 7.1; OpenSSH PROTOCOL, section 2.4.
func parseListener(kind string, payload []byte) (l listener, cancel, ok bool) {
	cancel = kind == sshmsg.CancelListenTCPIP || kind == sshmsg.CancelListenStreamlocal
	switch kind {
	case sshmsg.ListenTCPIP, sshmsg.CancelListenTCPIP:
		m, err := sshmsg.ParseListen(payload)
		return listener{sshmsg.TypeForwardedTCPIP, m.Host, m.Port}, cancel, err == nil
	case sshmsg.ListenStreamlocal, sshmsg.CancelListenStreamlocal:
		path, err := sshmsg.ParseListenStreamlocal(payload)
		return listener{sshmsg.TypeForwardedStreamlocal, path, 0}, cancel, err == nil
	}
	return listener{}, false, false
}

// listen adds a socket that the client asks for. Settle must be called with the reply.
func (ls *listeners) listen(l listener) (settle func(ok bool, reply []byte), err error) {
	if len(ls.sockets) >= listenersMax {
		return nil, errTooManyListeners
	}
	at := &l
	ls.sockets = append(ls.sockets, at)
	return func(ok bool, reply []byte) {
		chosen, err := at.port, error(nil)
		if at.kind == sshmsg.TypeForwardedTCPIP && at.port == 0 {
			chosen, err = sshmsg.ParseListenReply(reply)
		}
		at.port = chosen
		if !ok || err != nil || at.kind == sshmsg.TypeForwardedTCPIP && chosen == 0 { // the port is not known
			ls.remove(at)
		}
	}, nil
}

// cancelled removes a socket whose end the bastion has confirmed.
func (ls *listeners) cancelled(l listener) {
	for _, has := range ls.sockets {
		if *has == l {
			ls.remove(has)
			return
		}
	}
}

func (ls *listeners) remove(l *listener) {
	ls.sockets = slices.DeleteFunc(ls.sockets, func(has *listener) bool { return has == l })
}

// session adds the display or agent that a request of a session asks for. It is called
// before the request passes. Undo, if not nil, must be called if the bastion refuses it.
func (ls *listeners) session(number int, kind string, payload []byte) (undo func()) {
	switch kind {
	case sshmsg.RequestAgent, "agent-req":
		if !ls.agent {
			ls.agent = true
			return func() { ls.agent = false }
		}
	case sshmsg.RequestX11:
		m, err := sshmsg.ParseX11Request(payload)
		if _, twice := ls.displays[number]; twice || err != nil {
			return nil
		}
		if ls.displays == nil {
			ls.displays = make(map[int]bool)
		}
		ls.displays[number] = m.Single
		return func() { ls.sessionEnded(number) }
	}
	return nil
}

func (ls *listeners) sessionEnded(number int) { delete(ls.displays, number) }

// mayOpen returns why the bastion may not open a channel, or nil.
func (ls *listeners) mayOpen(kind string, payload []byte) error {
	ok := true
	switch kind {
	case sshmsg.TypeForwardedTCPIP:
		m, err := sshmsg.ParseTCPIP(payload)
		ok = err == nil && ls.listens(listener{kind, m.Host, m.Port})
	case sshmsg.TypeForwardedStreamlocal:
		path, err := sshmsg.ParseStreamlocal(payload)
		ok = err == nil && ls.listens(listener{kind, path, 0})
	case sshmsg.TypeAgent, "agent-connect":
		ok = ls.agent
	case sshmsg.TypeX11:
		ok = ls.useDisplay()
	}
	if !ok {
		return errNotAsked
	}
	return nil
}

// listens reports whether there is such a listener. As in OpenSSH's client, the host
// must be the one that was asked for, as it was written, and the port must be the
// one that was asked for or chosen.
func (ls *listeners) listens(want listener) bool {
	return slices.ContainsFunc(ls.sockets, func(l *listener) bool {
		return l.kind == want.kind && l.name == want.name && (l.port == want.port || l.port == 0)
	})
}

// useDisplay reports whether a session has a display, and uses up one that is for a
// single connection if there is no other.
func (ls *listeners) useDisplay() bool {
	single := -1
	for number, one := range ls.displays {
		if !one {
			return true
		}
		single = number
	}
	delete(ls.displays, single)
	return single >= 0
}
