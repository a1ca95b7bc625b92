// Package policy decides what a login may do.
//
//   - [Roles.Decide] selects the roles of a login, and combines their permissions with
//     those of the key.
//   - [MayOpen] and [MayConnect] decide whether a forward to a host and port is
//     permitted, [MayListen] whether a remote forward is. Unix sockets have
//     [MayOpenSocket] and [MayListenSocket].
//   - [MayOpenChannel] and [MayRequest] decide about channels and requests by their
//     type, and call the functions above for forwards.
//
// Gateway and agent both use this package. The gateway decides at the login and for
// each channel and request that it relays. The agent decides again, on the
// permissions in the certificate with which the gateway logs in to the bastion. Only
// the agent resolves names, so only the agent calls MayConnect.
package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// Roles are all roles of a gateway. Nil means that roles are not used: a login has
// all permissions of its key. Otherwise a login without a role is refused.
type Roles []*Role

// A Role is a set of permissions, with conditions. A login has every role whose
// conditions it meets.
type Role struct {
	Name string
	// Line is its line in the configuration; 0 means unknown.
	Line int

	// Users are patterns of user names, with * and ?. Principals are principals of
	// certificates. A match of either is sufficient.
	Users, Principals []string
	// From are the networks of clients, Hours the times of the week. Empty means
	// all addresses, and all times.
	From  []netip.Prefix
	Hours []Hours
	// Profiles are the profiles of bastions; empty means all. The console is
	// available with every role.
	Profiles []string

	// Permit are the permissions. Those that no role grants are denied.
	Permit Permit
	// Destinations are the permitted destinations of -L, -D and -J. Listen are the
	// permitted listeners of -R, as in permitlisten of sshd(8). Nil means no
	// limit; an empty list permits nothing. A limit excludes Unix sockets.
	Destinations []Destination
	Listen       []string
	// The Limits of a login are the maxima over its roles; its Record is the union.
	Limits identity.Limits
	Record identity.Record
	// RequirePTY refuses shells and commands without a terminal. It applies if any
	// role of the login has it.
	RequirePTY bool
	// Admin permits the administrator's commands of the console.
	Admin bool
}

// Permit are the permissions of a role.
type Permit struct {
	Shell, Exec, SFTP, PTY, PortForwarding, AgentForwarding, X11Forwarding bool
}

// PermitAll is the default of a role without a permit list.
func PermitAll() Permit {
	return Permit{Shell: true, Exec: true, SFTP: true, PTY: true, PortForwarding: true, AgentForwarding: true, X11Forwarding: true}
}

// A Login is an authenticated login.
type Login struct {
	User string
	// Profile is the profile of the bastion.
	Profile string
	// Console is set for a login to the console; Profile is ignored then.
	Console bool
	// Principals are those of the certificate for which its authority is trusted.
	Principals []string
	From       netip.Addr
	Now        time.Time
	// Key has the permissions of the key or certificate.
	Key identity.Permissions
}

// The reasons if no role applies, one for each condition of a role. The error of
// [Roles.Decide] wraps the one of the role with the most conditions met: if a role
// applies at another time, the error is ErrHours.
var (
	ErrNoRole  = errors.New("no role is for this user")
	ErrProfile = errors.New("no role is for this profile")
	ErrFrom    = errors.New("no role may be used from this address")
	ErrHours   = errors.New("no role may be used at this time")
)

// Decide returns the permissions of l: those of at least one of its roles, and of its
// key. It also returns the roles.
func (r Roles) Decide(l Login) (identity.Permissions, []*Role, error) {
	if r == nil {
		return l.Key, nil, nil
	}
	var mine []*Role
	met, names := 0, []string(nil) // the most conditions met, and the roles with that many
	for _, role := range r {
		unmet := role.firstUnmet(l)
		switch {
		case unmet == len(conditions):
			mine = append(mine, role)
		case unmet > met:
			met, names = unmet, []string{role.String()}
		case unmet == met && unmet > 0:
			names = append(names, role.String())
		}
	}
	if mine == nil {
		err := conditions[met]
		if names != nil {
			err = fmt.Errorf("%w: %s", err, strings.Join(names, ", "))
		}
		return identity.Permissions{}, nil, err
	}
	return combine(l.Key, mine), mine, nil
}

// conditions of a role, as the errors for those that are not met, in the order of
// their check. The user is first: the hours of a role for others explain nothing.
var conditions = []error{ErrNoRole, ErrProfile, ErrFrom, ErrHours}

// firstUnmet returns the index in conditions of the first condition that l does not
// meet, or len(conditions) if it meets all.
func (r *Role) firstUnmet(l Login) int {
	switch {
	case !matchAny(r.Users, l.User) && !slices.ContainsFunc(r.Principals, func(p string) bool { return slices.Contains(l.Principals, p) }):
		return 0
	case !l.Console && len(r.Profiles) > 0 && !slices.Contains(r.Profiles, l.Profile):
		return 1
	case len(r.From) > 0 && !slices.ContainsFunc(r.From, func(p netip.Prefix) bool { return p.Contains(l.From.Unmap().WithZone("")) }):
		return 2
	case len(r.Hours) > 0 && !slices.ContainsFunc(r.Hours, func(h Hours) bool { return h.Contain(l.Now) }):
		return 3
	}
	return len(conditions)
}

// CheckConditions returns which condition of the roles l does not meet any more, or
// nil. A login that has lost one of its roles has to end: a new one gets the rest.
func CheckConditions(roles []*Role, l Login) error {
	for _, r := range roles {
		if unmet := r.firstUnmet(l); unmet < len(conditions) {
			return fmt.Errorf("%w: %s", conditions[unmet], r)
		}
	}
	return nil
}

// String is the role's name and line.
func (r *Role) String() string {
	if r.Line == 0 {
		return r.Name
	}
	return fmt.Sprintf("%s (line %d)", r.Name, r.Line)
}

// combine returns the permissions of key and of at least one of the roles.
func combine(key identity.Permissions, roles []*Role) identity.Permissions {
	var all Permit
	var destinations, listen []string
	anywhere, anyListen := false, false
	p := key
	p.Limits = identity.Limits{}
	for i, r := range roles {
		p.Roles = append(p.Roles, r.Name)
		all.Shell = all.Shell || r.Permit.Shell
		all.Exec = all.Exec || r.Permit.Exec
		all.SFTP = all.SFTP || r.Permit.SFTP
		all.PTY = all.PTY || r.Permit.PTY
		all.PortForwarding = all.PortForwarding || r.Permit.PortForwarding
		all.AgentForwarding = all.AgentForwarding || r.Permit.AgentForwarding
		all.X11Forwarding = all.X11Forwarding || r.Permit.X11Forwarding
		if r.Permit.PortForwarding { // else its lists must not extend those of other roles
			anywhere = anywhere || r.Destinations == nil
			for _, d := range r.Destinations {
				destinations = append(destinations, d.String())
			}
			anyListen = anyListen || r.Listen == nil
			listen = append(listen, r.Listen...)
		}
		p.Limits = widest(p.Limits, r.Limits, i == 0)
		p.Record |= r.Record
		p.RequirePTY = p.RequirePTY || r.RequirePTY
		p.Admin = p.Admin || r.Admin
	}
	p.PTY = p.PTY && all.PTY
	p.PortForwarding = p.PortForwarding && all.PortForwarding
	p.AgentForwarding = p.AgentForwarding && all.AgentForwarding
	p.X11Forwarding = p.X11Forwarding && all.X11Forwarding
	p.NoShell = p.NoShell || !all.Shell
	p.NoExec = p.NoExec || !all.Exec
	p.NoSFTP = p.NoSFTP || !all.SFTP
	if FilesOnly(p) {
		p.UserRC = false
	}
	p.Destinations, p.Listen = orNone(destinations, anywhere), orNone(listen, anyListen)
	return p
}

// none is the entry of a list that permits nothing, as in permitopen.
const none = "none"

func orNone(list []string, unlimited bool) []string {
	switch {
	case unlimited:
		return nil
	case list == nil:
		return []string{none}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// widest returns the maximum of each limit; zero means no limit. If first is set, a is
// ignored.
func widest(a, b identity.Limits, first bool) identity.Limits {
	if first {
		return b
	}
	larger := func(a, b int) int {
		if a == 0 || b == 0 {
			return 0
		}
		return max(a, b)
	}
	return identity.Limits{
		Connections: larger(a.Connections, b.Connections),
		Sessions:    larger(a.Sessions, b.Sessions),
		Bastions:    larger(a.Bastions, b.Bastions),
	}
}
