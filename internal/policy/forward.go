package policy

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// A Destination is a rule that permits forwards: some hosts, and some ports of
// them.
//
// A rule about addresses holds for every host that turns out to have one of
// them, by whatever name it was asked for. A rule about names holds for the name
// that was asked for. A name can be made to stand for any address by whoever
// runs the DNS for it, so a rule about names never leads to the bastion itself or
// to its link, where a Fargate task finds its credentials: that takes a rule about
// addresses.
type Destination struct {
	// Line is where it stands in the configuration; 0 is not known.
	Line int

	name        string       // pattern, in lower case; empty if it is about addresses
	prefix      netip.Prefix // else
	first, last uint32       // ports
}

// ParseDestination reads "HOST:PORTS". HOST is a name in which * and ? are
// wildcards, an address or a CIDR block, an IPv6 one in brackets; PORTS is a port,
// a range such as 8000-8100, or *.
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
		return netip.Prefix{}, fmt.Errorf("%q: write IPv4 as IPv4", s)
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

// canonical is the name in the form in which names are compared.
func canonical(name string) string { return strings.TrimSuffix(strings.ToLower(name), ".") }

// String is d as [ParseDestination] reads it.
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

// Names reports whether d permits the name, wherever it leads short of what a
// name may never lead to.
func (d Destination) Names(host string, port uint32) bool {
	return d.name != "" && d.hasPort(port) && Match(d.name, canonical(host))
}

// Holds reports whether d permits addr, by the rules about addresses or because
// host is a name that it permits.
func (d Destination) Holds(host string, addr netip.Addr, port uint32) bool {
	addr = addr.Unmap().WithZone("")
	if d.name == "" {
		return d.hasPort(port) && d.prefix.Contains(addr)
	}
	return d.Names(host, port) && !near(addr)
}

// MayHold reports whether d permits host, as far as that can be said by somebody
// who does not know its address: maybe is true if it depends on that.
func (d Destination) MayHold(host string, port uint32) (yes, maybe bool) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return d.Holds(host, addr, port), false
	}
	return d.Names(host, port), d.name == "" && d.hasPort(port)
}

// near says that an address is the bastion's own or on its link, or that of no
// single host.
func near(a netip.Addr) bool {
	return a.IsLoopback() || a.IsUnspecified() || a.IsLinkLocalUnicast() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) ||
		a == ipv6Metadata
}

// ipv6Metadata is where EC2 instances find their credentials over IPv6. It is a
// unique local address and no link-local one, for all that it is one hop away.
var ipv6Metadata = netip.MustParseAddr("fd00:ec2::254")

// MayOpen returns why p does not permit a forward to host and port, or nil if it
// does as far as that can be said without the host's address. [MayConnect] has to
// be asked about that.
func MayOpen(p identity.Permissions, host string, port uint32) error {
	if !p.PortForwarding {
		return denied(p, "port forwarding")
	}
	if !permitsOpen(p.PermitOpen, host, port) {
		return fmt.Errorf("permitopen of this key does not permit %s", hostPort(host, port))
	}
	if len(p.Destinations) == 0 {
		return nil
	}
	for _, rule := range p.Destinations {
		d, err := ParseDestination(rule)
		if err != nil {
			continue // "none"
		}
		if yes, maybe := d.MayHold(host, port); yes || maybe {
			return nil
		}
	}
	return fmt.Errorf("the destinations of %s do not permit %s", rolesText(p.Roles), hostPort(host, port))
}

// MayConnect returns why p does not permit to connect to addr and port when host
// was asked for, or nil.
func MayConnect(p identity.Permissions, host string, addr netip.Addr, port uint32) error {
	if err := MayOpen(p, host, port); err != nil {
		return err
	}
	if len(p.Destinations) == 0 {
		return nil
	}
	for _, rule := range p.Destinations {
		if d, err := ParseDestination(rule); err == nil && d.Holds(host, addr, port) {
			return nil
		}
	}
	return fmt.Errorf("the destinations of %s do not permit %s, which %s stands for", rolesText(p.Roles), hostPort(addr.String(), port), host)
}

// MayListen returns why p does not permit the client to have a port listened at
// (RFC 4254, section 7.1), or nil. Port 0 is any that is free.
func MayListen(p identity.Permissions, host string, port uint32) error {
	switch {
	case !p.PortForwarding:
		return denied(p, "port forwarding")
	case !permitsListen(p.PermitListen, host, port):
		return fmt.Errorf("permitlisten of this key does not permit %s", hostPort(host, port))
	case !permitsListen(p.Listen, host, port):
		return fmt.Errorf("%s may not listen at %s", rolesText(p.Roles), hostPort(host, port))
	}
	return nil
}

// MayOpenSocket returns why p does not permit a forward to a Unix socket, or nil.
// Neither permitopen nor destinations speak of sockets, so who has one of them
// gets none; MayListenSocket is the same for the other direction.
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

// MayListenSocket: see [MayOpenSocket].
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

// denied says that p does not permit what at all. It may be the key or the role
// that does not; who has a role asks about that first.
func denied(p identity.Permissions, what string) error {
	if len(p.Roles) == 0 {
		return fmt.Errorf("%s is not permitted for this key", what)
	}
	return fmt.Errorf("%s is not permitted for %s with this key", what, rolesText(p.Roles))
}

func rolesText(roles []string) string {
	if len(roles) == 1 {
		return "role " + roles[0]
	}
	return "roles " + strings.Join(roles, ", ")
}

func hostPort(host string, port uint32) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

// permitsOpen says whether "host:port" rules, as in sshd's permitopen, allow a
// connection. Hosts are compared as they are written; "*" stands for any host,
// and for any port. No rules allow everything, and "none" nothing.
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

// permitsListen is permitsOpen for sshd's permitlisten: "[host:]port", in which
// the host is a pattern that does not mind case.
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
