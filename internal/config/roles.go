package config

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// maxDestinations limits the total size of the destinations of all roles, in bytes:
// a login may have all of them, and they are written into its certificate.
const maxDestinations = 64 << 10

// roles reads the value of the key roles. profiles must have been read before.
func (v value) roles(profiles map[string]Profile) policy.Roles {
	roles := policy.Roles{} // not nil: users without a role are rejected
	size := 0
	v.entries(func(name string, v value) {
		if !validName(name) {
			v.mistake("%q is not a name for a role; write 1 to 32 letters, digits, - and _, a letter or digit first", name)
		}
		r := &policy.Role{Name: name, Line: v.node.Line, Permit: policy.PermitAll()}
		seen := v.mapping(map[string]func(value){
			"users":      func(v value) { r.Users = v.userPatterns() },
			"principals": func(v value) { r.Principals = v.principals() },
			"from":       func(v value) { r.From = v.networks() },
			"hours":      func(v value) { r.Hours = v.hours() },
			"profiles": func(v value) {
				for _, v := range v.list() {
					name, ok := v.text()
					if _, exists := profiles[name]; ok && !exists {
						v.mistake("there is no profile %q", name)
					}
					r.Profiles = append(r.Profiles, name)
				}
			},
			"permit":       func(v value) { r.Permit = v.permit() },
			"destinations": func(v value) { r.Destinations = v.destinations(&size) },
			"listen":       func(v value) { r.Listen = v.listens() },
			"record":       func(v value) { r.Record = v.record() },
			"require_pty":  func(v value) { r.RequirePTY = v.boolean() },
			"admin":        func(v value) { r.Admin = v.boolean() },

			"max_connections": func(v value) { r.Limits.Connections = v.integerOrNone() },
			"max_sessions":    func(v value) { r.Limits.Sessions = v.integerOrNone() },
			"max_bastions":    func(v value) { r.Limits.Bastions = v.integerOrNone() },
		})
		if !seen["users"] && !seen["principals"] {
			v.mistake(`applies to no user; add users or principals, or write users: "*"`)
		}
		if !r.Permit.PortForwarding && (seen["destinations"] || seen["listen"]) {
			v.mistake("destinations and listen limit port forwarding, which permit does not include")
		}
		if r.RequirePTY && !r.Permit.PTY {
			v.mistake("require_pty rejects all sessions without a terminal, and permit does not include pty; add it")
		}
		roles = append(roles, r)
	})
	if size > maxDestinations {
		v.mistake("the destinations take %d bytes; at most %d fit into a certificate. Write fewer, as networks or patterns", size, maxDestinations)
	}
	return roles
}

var userPattern = regexp.MustCompile(`^[A-Za-z0-9_.*?@-]{1,64}$`)

func (v value) userPatterns() []string {
	var patterns []string
	for _, v := range v.list() {
		s, ok := v.text()
		if ok && !userPattern.MatchString(s) {
			v.mistake("%q is not the name of a user; * and ? stand for others", s)
		}
		patterns = append(patterns, s)
	}
	return patterns
}

// words reads one word or a list of them.
func (v value) words() []string {
	var words []string
	for _, v := range v.list() {
		s, ok := v.text()
		if ok && (s == "" || strings.ContainsAny(s, ", \t\n")) {
			v.mistake("%q is not one word", s)
		}
		words = append(words, s)
	}
	return words
}

func (v value) principals() []string {
	principals := v.words()
	for _, p := range principals {
		if strings.ContainsAny(p, "*?") {
			v.mistake("%q: principals are not patterns; name each", p)
		}
	}
	return principals
}

func (v value) networks() []netip.Prefix {
	var networks []netip.Prefix
	for _, v := range v.list() {
		s, ok := v.text()
		if !ok {
			continue
		}
		addr, addrErr := netip.ParseAddr(s)
		p, err := netip.ParsePrefix(s)
		switch {
		case addrErr == nil && addr.Zone() == "":
			addr = addr.Unmap()
			p = netip.PrefixFrom(addr, addr.BitLen())
		case err != nil || p.Addr().Is4In6():
			v.mistake("%q is neither an address nor a network; write it like 10.0.0.0/8", s)
		case p != p.Masked():
			v.mistake("%q: the network is %s; write that, or a single address", s, p.Masked())
		}
		networks = append(networks, p)
	}
	return networks
}

func (v value) hours() []policy.Hours {
	var hours []policy.Hours
	for _, v := range v.list() {
		s, ok := v.text()
		if !ok {
			continue
		}
		h, err := policy.ParseHours(s)
		if err != nil {
			v.mistake("%v", err)
		}
		hours = append(hours, h)
	}
	return hours
}

func (v value) permit() policy.Permit {
	var p policy.Permit
	words := map[string]*bool{
		"shell": &p.Shell, "exec": &p.Exec, "sftp": &p.SFTP, "pty": &p.PTY,
		"port-forwarding": &p.PortForwarding, "agent-forwarding": &p.AgentForwarding, "X11-forwarding": &p.X11Forwarding,
	}
	if v.is("none") {
		return p
	}
	for _, v := range v.list() {
		s, ok := v.text()
		switch on := words[s]; {
		case !ok:
		case on == nil:
			v.mistake("%q cannot be permitted; there are shell, exec, sftp, pty, port-forwarding, agent-forwarding, X11-forwarding and, alone, none", s)
		default:
			*on = true
		}
	}
	return p
}

// destinations adds the size that they have in a certificate to size.
func (v value) destinations(size *int) []policy.Destination {
	rules := []policy.Destination{} // not nil, which would mean no limit
	if v.is("none") {
		return rules
	}
	for _, v := range v.list() {
		s, ok := v.text()
		if !ok {
			continue
		}
		d, err := policy.ParseDestination(s)
		if err != nil {
			v.mistake("%v", err)
			continue
		}
		d.Line = v.node.Line
		*size += len(d.String()) + 1
		rules = append(rules, d)
	}
	return rules
}

var listenRule = regexp.MustCompile(`^(?:[A-Za-z0-9_.*?-]{1,255}:|\[[0-9A-Fa-f:.*?]{1,45}\]:)?(?:\*|(0|[1-9][0-9]{0,4}))$`)

func (v value) listens() []string {
	rules := []string{}
	if v.is("none") {
		return rules
	}
	for _, v := range v.list() {
		s, ok := v.text()
		m := listenRule.FindStringSubmatch(s)
		if ok && (m == nil || len(m[1]) == 5 && m[1] > "65535") {
			v.mistake("%q is not [HOST:]PORT; write it like 8080, localhost:8080 or localhost:*", s)
		}
		if !slices.Contains(rules, s) {
			rules = append(rules, s)
		}
	}
	return rules
}
