package policy

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// Some addresses are special: a forward to them needs an explicit rule.

// linkScoped are the blocks of loopback, unspecified, link-local, multicast and
// broadcast addresses. They lead to the bastion itself or to its link.
var linkScoped = []netip.Prefix{
	netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("0.0.0.0/32"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("::/128"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// credentialEndpoints are the addresses of the services on AWS that give credentials
// to tasks, instances and pods: the instance metadata service (IPv4 and IPv6), ECS,
// and EKS Pod Identity (IPv4 and IPv6).
var credentialEndpoints = []netip.Addr{
	netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("fd00:ec2::254"),
	netip.MustParseAddr("169.254.170.2"),
	netip.MustParseAddr("169.254.170.23"), netip.MustParseAddr("fd00:ec2::23"),
}

// plain returns an address in the form for comparisons.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

func isLinkScoped(a netip.Addr) bool {
	return slices.ContainsFunc(linkScoped, func(p netip.Prefix) bool { return p.Contains(a) })
}

func isCredentialEndpoint(a netip.Addr) bool { return slices.Contains(credentialEndpoints, a) }

// namesSpecial reports whether block is an explicit rule for the special address a: it
// is a single address, or lies within one of the link-scoped blocks. For an endpoint
// of credentials, only the single address is explicit.
func namesSpecial(block netip.Prefix, a netip.Addr) bool {
	return block.IsSingleIP() || !isCredentialEndpoint(a) &&
		slices.ContainsFunc(linkScoped, func(p netip.Prefix) bool { return p.Bits() <= block.Bits() && p.Contains(block.Addr()) })
}

// mayReachCredentials returns why p does not permit a connection to a, if that is an
// endpoint of credentials, or nil. permitopen of the key and destinations of the
// roles must each name it if they exist, and at least one of them must exist.
func mayReachCredentials(p identity.Permissions, a netip.Addr, port uint32) error {
	if a = plain(a); !isCredentialEndpoint(a) {
		return nil
	}
	inKey := slices.ContainsFunc(p.PermitOpen, func(rule string) bool {
		host, ports, ok := splitRule(rule)
		named, err := netip.ParseAddr(host)
		return ok && err == nil && plain(named) == a && matchPort(ports, port)
	})
	inRoles := slices.ContainsFunc(p.Destinations, func(rule string) bool {
		d, err := ParseDestination(rule)
		return err == nil && d.hasPort(port) && d.name == "" && d.prefix.IsSingleIP() && d.prefix.Addr() == a
	})
	if (len(p.PermitOpen) == 0 || inKey) && (len(p.Destinations) == 0 || inRoles) && (inKey || inRoles) {
		return nil
	}
	return fmt.Errorf("%s is an endpoint of credentials, and no rule names it", sshmsg.HostPort(a.String(), port))
}
