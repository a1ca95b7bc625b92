package policy

import (
	"errors"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// MayOpenChannel returns why p does not permit a channel of this type, opened by
// either side with this payload, or nil. Types that it does not know pass, and
// so does what is malformed, as far as no limit is needed to judge it.
func MayOpenChannel(p identity.Permissions, kind string, payload []byte) error {
	switch {
	case kind == "tun@openssh.com":
		return errors.New("tunnel devices are not available in a bastion")
	case kind == "direct-tcpip":
		var to struct {
			Host string
			Port uint32
			Rest []byte `ssh:"rest"`
		}
		if ssh.Unmarshal(payload, &to) != nil { // who has any limit fails it
			to.Host, to.Port = "malformed request", 0
		}
		return MayOpen(p, to.Host, to.Port)
	case strings.HasPrefix(kind, "direct-streamlocal"):
		return MayOpenSocket(p)
	case strings.HasPrefix(kind, "direct-") && !p.PortForwarding, strings.HasPrefix(kind, "forwarded-") && !p.PortForwarding:
		return denied(p, "port forwarding")
	case strings.HasPrefix(kind, "direct-") && len(p.Destinations) > 0:
		// Whatever it is, nobody can say where it leads.
		return denied(p, kind)
	case kind == "x11" && !p.X11Forwarding:
		return denied(p, "X11 forwarding")
	case (kind == "auth-agent@openssh.com" || kind == "agent-connect") && !p.AgentForwarding:
		return denied(p, "agent forwarding")
	}
	return nil
}

// MayRequest returns why p does not permit a global or channel request, or nil.
// Types that it does not know pass.
func MayRequest(p identity.Permissions, kind string, payload []byte) error {
	switch kind {
	case "tcpip-forward":
		var at struct {
			Host string
			Port uint32
		}
		if ssh.Unmarshal(payload, &at) != nil {
			at.Host, at.Port = "malformed request", 0
		}
		return MayListen(p, at.Host, at.Port)
	case "streamlocal-forward@openssh.com":
		return MayListenSocket(p)
	case "pty-req":
		return unless(p.PTY, p, "a terminal")
	case "x11-req":
		return unless(p.X11Forwarding, p, "X11 forwarding")
	case "auth-agent-req@openssh.com", "agent-req":
		return unless(p.AgentForwarding, p, "agent forwarding")
	case "shell":
		return unless(!p.NoShell, p, "a shell")
	case "exec", "subsystem":
		var what struct{ Name string }
		switch err := ssh.Unmarshal(payload, &what); {
		case err != nil:
		case kind == "subsystem" && what.Name == "sftp":
			return unless(!p.NoSFTP, p, "sftp")
		case kind == "exec" && what.Name == "": // which sshd takes for a shell
			return unless(!p.NoShell, p, "a shell")
		}
		return unless(!p.NoExec, p, "running commands")
	}
	return nil
}

// MayRunWithoutPTY returns why p does not permit a request on a session that has
// no terminal, or nil. It is asked beside [MayRequest]. What sftp does is for that
// alone to say.
func MayRunWithoutPTY(p identity.Permissions, kind string, payload []byte) error {
	if !p.RequirePTY {
		return nil
	}
	switch kind {
	case "shell", "exec":
	case "subsystem":
		var what struct{ Name string }
		if ssh.Unmarshal(payload, &what) == nil && what.Name == "sftp" {
			return nil
		}
	default:
		return nil
	}
	return denied(p, "a session without a terminal")
}

func unless(permitted bool, p identity.Permissions, what string) error {
	if permitted {
		return nil
	}
	return denied(p, what)
}
