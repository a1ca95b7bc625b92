package gateway

import (
	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// This file makes audit events from channels and requests.

// auditsRefusal reports whether the refusal of a channel request is audited. Refusals of
// others are not, because clients request much that servers do not grant, such as
// environment variables.
func auditsRefusal(kind string) bool {
	switch kind {
	case "pty-req", "shell", "exec", "subsystem", "x11-req", "auth-agent-req@openssh.com":
		return true
	}
	return false
}

// channelEvent describes a channel (RFC 4254, sections 6.3.2 and 7.2; OpenSSH PROTOCOL,
// section 2.4).
func channelEvent(kind string, payload []byte) audit.Event {
	e := audit.Event{Kind: kind}
	switch kind {
	case "direct-tcpip", "forwarded-tcpip":
		m, err := sshmsg.ParseTCPIP(payload)
		if err != nil {
			return e
		}
		if kind == "direct-tcpip" {
			e.Destination = sshmsg.HostPort(m.Host, m.Port)
		} else {
			e.Listener = sshmsg.HostPort(m.Host, m.Port)
		}
		e.Origin = sshmsg.HostPort(m.OriginHost, m.OriginPort)
	case "direct-streamlocal@openssh.com", "forwarded-streamlocal@openssh.com":
		path, err := sshmsg.ParseStreamlocal(payload)
		if err != nil {
			return e
		}
		if kind == sshmsg.TypeDirectStreamlocal {
			e.Destination = path
		} else {
			e.Listener = path
		}
	case "x11":
		if m, err := sshmsg.ParseX11(payload); err == nil {
			e.Origin = sshmsg.HostPort(m.OriginHost, m.OriginPort)
		}
	}
	return e
}

// listenerEvent describes a request to open or close a listener in the bastion (RFC
// 4254, section 7.1; OpenSSH PROTOCOL, section 2.4). Known is false for other requests.
func listenerEvent(kind string, payload, reply []byte) (e audit.Event, known bool) {
	e = audit.Event{Type: audit.Listen, Kind: kind}
	switch kind {
	case "cancel-tcpip-forward", "cancel-streamlocal-forward@openssh.com":
		e.Type = audit.ListenEnd
	}
	switch kind {
	case "tcpip-forward", "cancel-tcpip-forward":
		m, err := sshmsg.ParseListen(payload)
		if err != nil {
			return e, true
		}
		if chosen, err := sshmsg.ParseListenReply(reply); err == nil && m.Port == 0 {
			m.Port = chosen
		}
		e.Listener = sshmsg.HostPort(m.Host, m.Port)
		return e, true
	case "streamlocal-forward@openssh.com", "cancel-streamlocal-forward@openssh.com":
		if path, err := sshmsg.ParseListenStreamlocal(payload); err == nil {
			e.Listener = path
		}
		return e, true
	}
	return e, false
}

// requestEvent describes a request on a session (RFC 4254, section 6.5).
func requestEvent(kind string, payload []byte) audit.Event {
	e := audit.Event{Kind: kind}
	text, err := sshmsg.ParseString(payload)
	switch {
	case err != nil:
	case kind == sshmsg.RequestExec:
		e.Command = text
	case kind == sshmsg.RequestSubsystem:
		e.Subsystem = text
	}
	return e
}
