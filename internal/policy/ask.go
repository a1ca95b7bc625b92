package policy

import (
	"errors"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// MayOpenChannel returns why p does not permit either side to open a channel of the
// type kind with this payload, or nil. Channels of unknown types are permitted, and
// so are malformed payloads unless p limits destinations.
func MayOpenChannel(p identity.Permissions, kind string, payload []byte) error {
	switch {
	case kind == "tun@openssh.com":
		return errors.New("tunnel devices are not available in a bastion")
	case kind == "direct-tcpip":
		to, err := sshmsg.ParseTCPIP(payload)
		if err != nil { // any limit refuses this host
			to.Host, to.Port = "malformed request", 0
		}
		return MayOpen(p, to.Host, to.Port)
	case strings.HasPrefix(kind, "direct-streamlocal"):
		return MayOpenSocket(p)
	case strings.HasPrefix(kind, "direct-") && !p.PortForwarding, strings.HasPrefix(kind, "forwarded-") && !p.PortForwarding:
		return denied(p, "port forwarding")
	case strings.HasPrefix(kind, "direct-") && len(p.Destinations) > 0:
		// The destination of an unknown type of forward is unknown.
		return denied(p, kind)
	case kind == "x11" && !p.X11Forwarding:
		return denied(p, "X11 forwarding")
	case (kind == "auth-agent@openssh.com" || kind == "agent-connect") && !p.AgentForwarding:
		return denied(p, "agent forwarding")
	}
	return nil
}

// ForcedSFTP reports whether the forced command of p is internal-sftp of sshd. The
// arguments are options of sftp-server(8). As in sshd, they are separated by white
// space and cannot be quoted.
func ForcedSFTP(p identity.Permissions) (args []string, ok bool) {
	words := strings.Fields(p.ForceCommand)
	if len(words) == 0 || words[0] != "internal-sftp" {
		return nil, false
	}
	return words[1:], true
}

// FilesOnly reports whether p permits neither a shell nor a command, so that the login
// cannot run the files that it copies.
func FilesOnly(p identity.Permissions) bool {
	_, sftp := ForcedSFTP(p)
	return sftp || p.NoShell && p.NoExec
}

// MayRequest returns why p does not permit a global or channel request of the type
// kind, or nil. Requests of unknown types are permitted. If p has a forced command,
// that command is judged in place of the requested shell, command or subsystem.
func MayRequest(p identity.Permissions, kind string, payload []byte) error {
	if p.ForceCommand != "" && (kind == "shell" || kind == "exec" || kind == "subsystem") {
		if _, sftp := ForcedSFTP(p); sftp {
			return permit(!p.NoSFTP, p, "sftp")
		}
		return permit(!p.NoExec, p, "running commands")
	}
	switch kind {
	case "tcpip-forward":
		at, err := sshmsg.ParseListen(payload)
		if err != nil {
			at.Host, at.Port = "malformed request", 0
		}
		return MayListen(p, at.Host, at.Port)
	case "streamlocal-forward@openssh.com":
		return MayListenSocket(p)
	case "pty-req":
		return permit(p.PTY, p, "a terminal")
	case "x11-req":
		return permit(p.X11Forwarding, p, "X11 forwarding")
	case "auth-agent-req@openssh.com", "agent-req":
		return permit(p.AgentForwarding, p, "agent forwarding")
	case "shell":
		return permit(!p.NoShell, p, "a shell")
	case "exec", "subsystem":
		switch name, err := sshmsg.ParseString(payload); {
		case err != nil:
		case kind == "subsystem" && name == "sftp":
			return permit(!p.NoSFTP, p, "sftp")
		case kind == "exec" && name == "": // for sshd, this is a shell
			return permit(!p.NoShell, p, "a shell")
		}
		return permit(!p.NoExec, p, "running commands")
	}
	return nil
}

// MayRunWithoutPTY returns why p does not permit a request on a session without a
// terminal, or nil. It is called in addition to [MayRequest]. sftp needs no terminal.
// A forced command is judged in place of the request.
func MayRunWithoutPTY(p identity.Permissions, kind string, payload []byte) error {
	if !p.RequirePTY {
		return nil
	}
	_, forcedSFTP := ForcedSFTP(p)
	switch kind {
	case "shell", "exec", "subsystem":
		if forcedSFTP {
			return nil
		}
		if p.ForceCommand != "" {
			return denied(p, "a session without a terminal")
		}
	}
	switch kind {
	case "shell", "exec":
	case "subsystem":
		if name, err := sshmsg.ParseString(payload); err == nil && name == "sftp" {
			return nil
		}
	default:
		return nil
	}
	return denied(p, "a session without a terminal")
}

// permit returns nil if permitted is set, and else the error of denied.
func permit(permitted bool, p identity.Permissions, feature string) error {
	if permitted {
		return nil
	}
	return denied(p, feature)
}
