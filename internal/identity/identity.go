// Package identity holds what a login proved. It is plain data: every package
// may import it, and it imports nothing of the project.
package identity

import "net/netip"

// An Identity is made in one place only, when a signature has been verified
// (see package gateway), and is never changed afterwards.
type Identity struct {
	// User is the name before the "@", without the profile.
	User string
	// Profile is the named kind of bastion; "default" if the user named none.
	Profile string
	// Key is the SHA-256 fingerprint of the proven key, as ssh-keygen -l
	// prints it. Bastions are not told.
	Key string
	// ConnID names this connection in the user's error texts, the operator's
	// log and the bastion's log. It is no secret.
	ConnID string
	// Client and Server are the two ends of the user's TCP connection, as
	// they appear in SSH_CONNECTION. Either may be invalid when the
	// connection did not come over TCP.
	Client, Server netip.AddrPort
	// Permissions is what this login may do.
	Permissions Permissions
}

// Permissions says what a connection may do, in the terms of sshd(8),
// AUTHORIZED_KEYS FILE FORMAT. The zero value permits commands without a
// terminal and nothing else; use [AllowAll] for a key without options.
type Permissions struct {
	PTY, PortForwarding, AgentForwarding, X11Forwarding, UserRC bool

	// ForceCommand, if not empty, runs in place of whatever was asked for;
	// that is then in SSH_ORIGINAL_COMMAND.
	ForceCommand string
	// PermitOpen limits direct-tcpip to these "host:port" (port may be "*");
	// empty means no limit, a single "none" permits nothing.
	PermitOpen []string
	// PermitListen limits tcpip-forward to these "[host:]port"; as PermitOpen.
	PermitListen []string
	// Environment is added to the session's, as NAME=value.
	Environment []string

	// Record says what is recorded of sessions; the profile may ask for more.
	Record Record

	// What follows comes from the user's roles, see package policy.

	// Roles are their names.
	Roles []string
	// NoShell, NoExec and NoSFTP refuse what their names say. A login shell
	// with a terminal or without is one, every other subsystem than sftp a
	// command.
	NoShell, NoExec, NoSFTP bool
	// RequirePTY refuses shells and commands without a terminal, which no
	// recording would show.
	RequirePTY bool
	// Destinations limits direct-tcpip to these, in the form that
	// policy.ParseDestination reads; empty means no limit, a single "none"
	// permits nothing. PermitOpen holds beside it.
	Destinations []string
	// Listen is a second PermitListen, which holds beside it.
	Listen []string
	// Limits are upper bounds for the user.
	Limits Limits
	// Admin opens the administrator's part of the console.
	Admin bool
}

// Limits are upper bounds; zero means none.
type Limits struct {
	// Connections is how many connections of the user there may be at one
	// gateway, Sessions how many sessions on one connection, and Bastions how
	// many bastions the user may have running.
	Connections, Sessions, Bastions int
}

// A Record says what is recorded of sessions with a terminal. Each value
// includes those before it, so of two the greater is the stricter.
type Record int

const (
	RecordNone   Record = iota
	RecordOutput        // what the user is shown
	RecordInput         // what she types, passwords too
)

// AllowAll is what a key without options may do.
func AllowAll() Permissions {
	return Permissions{PTY: true, PortForwarding: true, AgentForwarding: true, X11Forwarding: true, UserRC: true}
}
