package policy

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// A Destination is a rule that permits forwards to some hosts, at some ports.
//
// A rule for addresses matches the address that the host has, under any name. A rule
// for names matches the name that the client asked for.
//
// A DNS server can give any address to a name, and a large block may contain special
// addresses that its author forgot. So a rule for names never permits a forward to
// the bastion itself, at any address of its interfaces, or to a link-scoped address;
// see special.go. A rule for addresses permits it only if it is explicit: a single
// address, or, for loopback and link-local addresses, a block of such addresses only.
// An endpoint of credentials needs a rule for the single address.
type Destination struct {
	// Line is its line in the configuration; 0 means unknown.
	Line int

	name        string       // a pattern in lower case; empty in a rule for addresses
	prefix      netip.Prefix // of a rule for addresses
	first, last uint32       // ports
}

// ParseDestination parses "HOST:PORTS". HOST is a name with the wildcards * and ?, an
// address or a CIDR block; IPv6 is in brackets. PORTS is a port, a range such as
// 8000-8100, or *.
func ParseDestination(s string) (Destination, error) {
	if len(s) > 300 {
		return Destination{}, fmt.Errorf("%.20q... is too long", s)
	}
	host, ports, err := net.SplitHostPort(s)
	if err != nil || host == "" {
		return Destination{}, fmt.Errorf("%q is not HOST:PORTS; write it like db.internal:5432, *.internal:*, 10.0.0.0/8:8000-8100 or [2001:db8::/32]:443", s)
	}
	var d Destination
	if d.first, d.last, err = parsePorts(ports); err != nil {
		return Destination{}, fmt.Errorf("%q: %w", s, err)
	}
	switch prefix, err := parsePrefix(host); {
	case err == nil:
		if prefix != prefix.Masked() {
			return Destination{}, fmt.Errorf("%q: the block is %s; an address in the middle of it is usually a slip", s, prefix.Masked())
		}
		d.prefix = prefix
		return d, nil
	case strings.Trim(host, "0123456789.*?/") == "" && host != "*", strings.ContainsAny(host, ":/[]"):
		return Destination{}, fmt.Errorf("%q: %q is neither a name nor an address; write many addresses as a block, like 10.0.0.0/8", s, host)
	}
	for _, c := range []byte(host) {
		if c <= ' ' || c >= 0x7f || c == ',' {
			return Destination{}, fmt.Errorf("%q: %q is not a name of a host", s, host)
		}
	}
	d.name = canonical(host)
	return d, nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err == nil && p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%q: write an IPv4 block in IPv4 notation", s)
	}
	return p, err
}

func parsePorts(s string) (first, last uint32, err error) {
	if s == "*" {
		return 0, 65535, nil
	}
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		to = from
	}
	a, errA := strconv.ParseUint(from, 10, 16)
	b, errB := strconv.ParseUint(to, 10, 16)
	if errA != nil || errB != nil || a < 1 || a > b {
		return 0, 0, fmt.Errorf("%q are not ports; write 5432, 8000-8100 or *", s)
	}
	return uint32(a), uint32(b), nil
}

// canonical returns the name in the form for comparisons.
func canonical(name string) string { return strings.TrimSuffix(strings.ToLower(name), ".") }

// String returns d in the format of [ParseDestination].
func (d Destination) String() string {
	host := d.name
	if host == "" {
		host = d.prefix.String()
		if d.prefix.IsSingleIP() {
			host = d.prefix.Addr().String()
		}
	}
	ports := "*"
	switch {
	case d.first == d.last:
		ports = strconv.Itoa(int(d.first))
	case d.first != 0 || d.last != 65535:
		ports = fmt.Sprintf("%d-%d", d.first, d.last)
	}
	return net.JoinHostPort(host, ports)
}

func (d Destination) hasPort(port uint32) bool { return d.first <= port && port <= d.last }

// PermitsName reports whether d permits a forward to a host of this name. The
// addresses that no name may lead to are excluded by PermitsAddr.
func (d Destination) PermitsName(host string, port uint32) bool {
	return d.name != "" && d.hasPort(port) && Match(d.name, canonical(host))
}

// PermitsAddr reports whether d permits addr: because it is a rule about that
// address, or because it permits host, the name that was asked for. isOwn reports
// whether an address is one of the bastion's; it is called only if that matters.
func (d Destination) PermitsAddr(host string, addr netip.Addr, port uint32, isOwn func(netip.Addr) bool) bool {
	addr = plain(addr)
	special := func() bool { return isLinkScoped(addr) || isCredentialEndpoint(addr) || isOwn(addr) }
	if d.name == "" {
		return d.hasPort(port) && d.prefix.Contains(addr) && (namesSpecial(d.prefix, addr) || !special())
	}
	return d.PermitsName(host, port) && !special()
}

// MayPermit reports whether d permits host, as far as that is known without the
// addresses of the host and of the bastion. maybe is true if the answer depends on
// the address of the host.
func (d Destination) MayPermit(host string, port uint32) (yes, maybe bool) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return d.PermitsAddr(host, addr, port, func(netip.Addr) bool { return false }), false
	}
	return d.PermitsName(host, port), d.name == "" && d.hasPort(port)
}

// MayOpen returns why p does not permit a forward to host and port, or nil if it does
// as far as that is known without the host's address. [MayConnect] decides about the
// address.
func MayOpen(p identity.Permissions, host string, port uint32) error {
	if !p.PortForwarding {
		return denied(p, "port forwarding")
	}
	if !permitsOpen(p.PermitOpen, host, port) {
		return fmt.Errorf("permitopen of this key does not permit %s", sshmsg.HostPort(host, port))
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if err := mayReachCredentials(p, addr, port); err != nil {
			return err
		}
	}
	if len(p.Destinations) == 0 {
		return nil
	}
	for _, rule := range p.Destinations {
		d, err := ParseDestination(rule)
		if err != nil {
			continue // the entry is none
		}
		if yes, maybe := d.MayPermit(host, port); yes || maybe {
			return nil
		}
	}
	return fmt.Errorf("the destinations of %s do not permit %s", rolesText(p.Roles), sshmsg.HostPort(host, port))
}

// MayConnect returns why p does not permit a connection to addr and port for a
// forward that asked for host, or nil. isOwn reports whether an address is one of
// the bastion's; it is called only if that matters.
func MayConnect(p identity.Permissions, host string, addr netip.Addr, port uint32, isOwn func(netip.Addr) bool) error {
	if err := MayOpen(p, host, port); err != nil {
		return err
	}
	if err := mayReachCredentials(p, addr, port); err != nil {
		return err
	}
	if len(p.Destinations) == 0 {
		return nil
	}
	for _, rule := range p.Destinations {
		if d, err := ParseDestination(rule); err == nil && d.PermitsAddr(host, addr, port, isOwn) {
			return nil
		}
	}
	return fmt.Errorf("the destinations of %s do not permit %s, which %s stands for", rolesText(p.Roles), sshmsg.HostPort(addr.String(), port), host)
}

// MayListen returns why p does not permit a remote forward with a listener at host and
// port (RFC 4254 section 7.1), or nil. Port 0 is any free port.
func MayListen(p identity.Permissions, host string, port uint32) error {
	switch {
	case !p.PortForwarding:
		return denied(p, "port forwarding")
	case !permitsListen(p.PermitListen, host, port):
		return fmt.Errorf("permitlisten of this key does not permit %s", sshmsg.HostPort(host, port))
	case !permitsListen(p.Listen, host, port):
		return fmt.Errorf("%s may not listen at %s", rolesText(p.Roles), sshmsg.HostPort(host, port))
	}
	return nil
}

// MayOpenSocket returns why p does not permit a forward to a Unix socket, or nil.
// permitopen and destinations cannot name sockets, so either excludes all of them.
func MayOpenSocket(p identity.Permissions) error {
	switch {
	case !p.PortForwarding:
		return denied(p, "port forwarding")
	case len(p.PermitOpen) > 0:
		return fmt.Errorf("permitopen of this key does not permit Unix sockets")
	case len(p.Destinations) > 0:
		return fmt.Errorf("the destinations of %s do not permit Unix sockets", rolesText(p.Roles))
	}
	return nil
}

// MayListenSocket is [MayOpenSocket] for remote forwards.
func MayListenSocket(p identity.Permissions) error {
	switch {
	case !p.PortForwarding:
		return denied(p, "port forwarding")
	case len(p.PermitListen) > 0:
		return fmt.Errorf("permitlisten of this key does not permit Unix sockets")
	case len(p.Listen) > 0:
		return fmt.Errorf("%s may not listen at Unix sockets", rolesText(p.Roles))
	}
	return nil
}

// denied returns the error that p does not permit a feature. Either the key or the
// roles may be the reason.
func denied(p identity.Permissions, feature string) error {
	if len(p.Roles) == 0 {
		return fmt.Errorf("%s is not permitted for this key", feature)
	}
	return fmt.Errorf("%s is not permitted for %s with this key", feature, rolesText(p.Roles))
}

func rolesText(roles []string) string {
	if len(roles) == 1 {
		return "role " + roles[0]
	}
	return "roles " + strings.Join(roles, ", ")
}

// permitsOpen reports whether rules of sshd's permitopen, "host:port", permit a
// connection. Hosts are compared literally; "*" is any host, or any port. No rules
// permit every connection, "none" permits no connection.
func permitsOpen(rules []string, host string, port uint32) bool {
	if len(rules) == 0 {
		return true
	}
	for _, rule := range rules {
		h, p, ok := splitRule(rule)
		if ok && (h == "*" || h == host) && matchPort(p, port) {
			return true
		}
	}
	return false
}

// permitsListen is permitsOpen for sshd's permitlisten: "[host:]port". The host is a
// pattern without regard to case.
func permitsListen(rules []string, host string, port uint32) bool {
	if len(rules) == 0 {
		return true
	}
	for _, rule := range rules {
		h, p, ok := splitRule(rule)
		if !ok {
			h, p = "*", rule
		}
		if Match(strings.ToLower(h), strings.ToLower(host)) && matchPort(p, port) {
			return true
		}
	}
	return false
}

func splitRule(rule string) (host, port string, ok bool) {
	host, port, err := net.SplitHostPort(rule)
	return host, port, err == nil
}

func matchPort(rule string, port uint32) bool {
	return rule == "*" || rule == strconv.Itoa(int(port))
}
