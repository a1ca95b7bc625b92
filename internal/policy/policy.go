// Package policy decides what a login may do: which roles it has, what they and
// its key permit together, and whether a forward it asks for is among that.
//
// It decides in two places, which share this code: the gateway when somebody
// logs in and in its relay, and the agent in the bastion, from the certificate
// with which the gateway logs in there. Only the agent knows which address a
// name stands for, so only it can tell whether that may be connected to.
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

// Roles is all roles of a gateway. Nil means that there are none to speak of:
// everybody has all that the key permits. A gateway that has roles lets in only
// who has one.
type Roles []*Role

// A Role says what some users may do under some conditions. A login has every
// role whose conditions hold for it.
type Role struct {
	Name string
	// Line is where it stands in the configuration; 0 is not known.
	Line int

	// Users are patterns of user names, with * and ?; Principals names that a
	// certificate may carry. One of either is enough.
	Users, Principals []string
	// From is the networks it may be used from, and Hours the times of the week.
	// Empty means everywhere and always.
	From  []netip.Prefix
	Hours []Hours
	// Profiles are the kinds of bastion it is for; empty means all. The console
	// can be reached with every role.
	Profiles []string

	// Permit is what may be done. What is nobody's role is not permitted.
	Permit Permit
	// Destinations are what -L, -D and -J may lead to, and Listen what -R may
	// listen at, as in permitlisten of sshd(8). Nil means no limit, empty none
	// at all. A limit rules out Unix sockets.
	Destinations []Destination
	Listen       []string
	// Limits of a login are the largest of its roles'; Record is the strictest.
	Limits identity.Limits
	Record identity.Record
	// RequirePTY refuses shells and commands without a terminal. It holds if it
	// is set in any of a login's roles.
	RequirePTY bool
	// Admin opens the administrator's part of the console.
	Admin bool
}

// Permit says what a role permits.
type Permit struct {
	Shell, Exec, SFTP, PTY, PortForwarding, AgentForwarding, X11Forwarding bool
}

// PermitAll is what a role permits that does not say what.
func PermitAll() Permit {
	return Permit{Shell: true, Exec: true, SFTP: true, PTY: true, PortForwarding: true, AgentForwarding: true, X11Forwarding: true}
}

// A Login is somebody who has proven to be User.
type Login struct {
	User string
	// Profile is the kind of bastion.
	Profile string
	// Console says that it is about the console and no bastion; Profile does
	// not count then.
	Console bool
	// Principals are those of the certificate that its authority is trusted
	// for.
	Principals []string
	From       netip.Addr
	Now        time.Time
	// Key is what the key permits.
	Key identity.Permissions
}

// Why somebody is let in by no role. The errors that [Roles.Decide] returns wrap
// the one that comes nearest: a role that would do at another hour says so.
var (
	ErrNoRole  = errors.New("no role is for this user")
	ErrProfile = errors.New("no role is for this profile")
	ErrFrom    = errors.New("no role may be used from this address")
	ErrHours   = errors.New("no role may be used at this time")
)

// Decide returns what l may do: what at least one of its roles permits, as far as
// the key permits it too. The roles are returned as well.
func (r Roles) Decide(l Login) (identity.Permissions, []*Role, error) {
	if r == nil {
		return l.Key, nil, nil
	}
	var mine []*Role
	nearest, names := 0, []string(nil)
	for _, role := range r {
		step := role.misses(l)
		switch {
		case step == len(misses):
			mine = append(mine, role)
		case step > nearest:
			nearest, names = step, []string{role.String()}
		case step == nearest && step > 0:
			names = append(names, role.String())
		}
	}
	if mine == nil {
		err := misses[nearest]
		if names != nil {
			err = fmt.Errorf("%w: %s", err, strings.Join(names, ", "))
		}
		return identity.Permissions{}, nil, err
	}
	return combine(l.Key, mine), mine, nil
}

// misses are the conditions in the order in which they are looked at: that of a
// user whom the role is not for is of no interest to anybody.
var misses = []error{ErrNoRole, ErrProfile, ErrFrom, ErrHours}

// misses returns which condition does not hold, as an index of misses, or its
// length.
func (r *Role) misses(l Login) int {
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
	return len(misses)
}

// Holds reports whether the conditions of all these roles still hold for l. A
// login that has lost one of its roles is to begin anew, with what is left.
func Holds(roles []*Role, l Login) error {
	for _, r := range roles {
		if step := r.misses(l); step < len(misses) {
			return fmt.Errorf("%w: %s", misses[step], r)
		}
	}
	return nil
}

// String is the role's name and where to find it.
func (r *Role) String() string {
	if r.Line == 0 {
		return r.Name
	}
	return fmt.Sprintf("%s (line %d)", r.Name, r.Line)
}

// combine returns what key permits and at least one of the roles.
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
		if r.Permit.PortForwarding { // the limits of a role that forwards nothing widen nothing
			anywhere = anywhere || r.Destinations == nil
			for _, d := range r.Destinations {
				destinations = append(destinations, d.String())
			}
			anyListen = anyListen || r.Listen == nil
			listen = append(listen, r.Listen...)
		}
		p.Limits = widest(p.Limits, r.Limits, i == 0)
		p.Record = max(p.Record, r.Record)
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
	if p.NoShell && p.NoExec { // who may only copy files must not leave one that is run
		p.UserRC = false
	}
	p.Destinations, p.Listen = orNone(destinations, anywhere), orNone(listen, anyListen)
	return p
}

// none stands for a list that permits nothing, as in permitopen.
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

// widest returns the larger of each limit; zero is no limit, and the largest.
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
