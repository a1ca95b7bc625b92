// Package identity holds the result of a login: user, profile, key and permissions. It
// is plain data: every package may import it, and it imports none of the project.
package identity

import (
	"net"
	"net/netip"
)

// An Identity is a user who has logged in. Package gateway makes it, in one place, after
// it has verified a signature; it is not changed afterwards.
type Identity struct {
	// User is the name before the "@", without the profile.
	User string
	// Profile is the named kind of bastion; "default" if the user named none.
	Profile string
	// Key is the SHA-256 fingerprint of the proven key, as ssh-keygen -l
	// prints it. It is not sent to bastions.
	Key string
	// ConnID identifies the connection in the user's error texts, the operator's
	// log and the bastion's log. It is not secret.
	ConnID string
	// Client and Server are the two ends of the user's TCP connection, as
	// they appear in SSH_CONNECTION. Either may be invalid when the
	// connection did not come over TCP.
	Client, Server netip.AddrPort
	// Via is empty, unless another gateway has logged in to the console for the
	// user. Then it is the ID of that gateway, and ViaConn identifies the user's
	// connection to it.
	Via, ViaConn string
	// Permissions are those of this login.
	Permissions Permissions
}

// A Peer is a gateway that logs in to the console of another one for a user.
type Peer struct {
	// Gateway is the ID of the gateway that logs in.
	Gateway string
	// User is the user that it acts for, ConnID her connection to it.
	User, ConnID string
	// Admin says that it acts for an administrator.
	Admin bool
}

// AddrPort returns the address of a TCP connection's end, or the zero value for other
// networks. An IPv4 address in IPv6 becomes an IPv4 address.
func AddrPort(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Permissions are those of a connection, in the terms of sshd(8), AUTHORIZED_KEYS FILE
// FORMAT. The zero value permits only commands without a terminal; use [AllowAll]
// for a key without options.
type Permissions struct {
	PTY, PortForwarding, AgentForwarding, X11Forwarding, UserRC bool

	// ForceCommand, if not empty, replaces each requested command, which is then in
	// SSH_ORIGINAL_COMMAND.
	ForceCommand string
	// PermitOpen limits direct-tcpip to these "host:port" (port may be "*");
	// empty means no limit, a single "none" permits nothing.
	PermitOpen []string
	// PermitListen limits tcpip-forward to these "[host:]port"; as PermitOpen.
	PermitListen []string
	// Environment is added to the session's, as NAME=value.
	Environment []string

	// Record is the set of recordings of a session; the profile may add some.
	Record Record

	// The following fields come from the user's roles, see package policy.

	// Roles are the roles' names.
	Roles []string
	// NoShell forbids login shells, with a terminal or without; NoExec forbids
	// commands, and subsystems other than sftp; NoSFTP forbids the subsystem sftp.
	NoShell, NoExec, NoSFTP bool
	// RequirePTY forbids shells and commands without a terminal, which are not in
	// a recording of output.
	RequirePTY bool
	// Destinations limits direct-tcpip to these, in the form that
	// policy.ParseDestination reads; empty means no limit, a single "none"
	// permits nothing. PermitOpen holds beside it.
	Destinations []string
	// Listen is a second PermitListen, which holds beside it.
	Listen []string
	// Limits are the user's.
	Limits Limits
	// Admin opens the administrator's part of the console.
	Admin bool
}

// Limits of a user; zero means no limit.
type Limits struct {
	// Connections limits the user's connections to one gateway, Sessions the
	// sessions of one connection, and Bastions the user's running bastions.
	Connections, Sessions, Bastions int
}

// A Record is a set of recordings of a session. The union of two is the stricter.
type Record uint8

const (
	RecordNone Record = 0
	// RecordOutput is the output of sessions with a terminal, and RecordInput also
	// their input, including passwords.
	RecordOutput Record = 1
	RecordInput         = RecordOutput | 2
	// RecordExec extends either to shells and commands without a terminal.
	RecordExec = RecordOutput | 4
	// RecordTransfers ends sessions of sftp and scp whose transfers cannot be
	// written to the audit log.
	RecordTransfers Record = 8
)

// Includes reports whether all of other is in r.
func (r Record) Includes(other Record) bool { return r&other == other }

// AllowAll returns the permissions of a key without options.
func AllowAll() Permissions {
	return Permissions{PTY: true, PortForwarding: true, AgentForwarding: true, X11Forwarding: true, UserRC: true}
}
