package relay

import "strings"

// permitsChannel says whether a channel of this type may be opened, by either
// side, and if not why. Types it does not know pass.
func (r *Relay) permitsChannel(kind string) (why string, ok bool) {
	p := r.Permissions
	switch {
	case kind == "tun@openssh.com":
		return "tunnel devices are not available in a bastion", false
	case strings.HasPrefix(kind, "direct-") && !p.PortForwarding,
		strings.HasPrefix(kind, "forwarded-") && !p.PortForwarding:
		return "port forwarding is not permitted for this key", false
	case kind == "x11" && !p.X11Forwarding:
		return "X11 forwarding is not permitted for this key", false
	case (kind == "auth-agent@openssh.com" || kind == "agent-connect") && !p.AgentForwarding:
		return "agent forwarding is not permitted for this key", false
	}
	return "", true
}

// notPermitted says why permitsRequest refuses a request.
func notPermitted(kind string) string {
	what := kind
	switch kind {
	case "tcpip-forward", "streamlocal-forward@openssh.com":
		what = "port forwarding"
	case "pty-req":
		what = "a terminal"
	case "x11-req":
		what = "X11 forwarding"
	case "auth-agent-req@openssh.com", "agent-req":
		what = "agent forwarding"
	}
	return what + " is not permitted for this key"
}

// permitsRequest says whether a global or channel request may pass.
func (r *Relay) permitsRequest(kind string) bool {
	p := r.Permissions
	switch kind {
	case "tcpip-forward", "streamlocal-forward@openssh.com":
		return p.PortForwarding
	case "pty-req":
		return p.PTY
	case "x11-req":
		return p.X11Forwarding
	case "auth-agent-req@openssh.com", "agent-req":
		return p.AgentForwarding
	}
	return true
}
