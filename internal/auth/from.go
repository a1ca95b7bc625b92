package auth

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// patterns is the value of a from option; see PATTERNS in ssh_config(5). It matches
// addresses only. Host names are not looked up, because the owner of an address's
// reverse zone would then decide which name it has.
type patterns []pattern

// A pattern is either a network or text with wildcards.
type pattern struct {
	negated bool
	network netip.Prefix
	text    string
}

func parsePatterns(list string) (patterns, error) {
	var ps patterns
	for s := range strings.SplitSeq(list, ",") {
		var p pattern
		s, p.negated = strings.CutPrefix(s, "!")
		if s == "" {
			return nil, errors.New("an address is empty")
		}
		var err error
		if p.network, err = parseNetwork(s); err != nil {
			return nil, err
		}
		if !p.network.IsValid() {
			p.text = strings.ToLower(s)
			// A name never matches, nor does an unusual form of an address, such
			// as 127.1. That is harmless in a pattern that permits, but not in a
			// negated one, so both are mistakes.
			if !couldBeAddress(p.text) || !strings.ContainsAny(s, "*?") {
				return nil, fmt.Errorf("%s is not an address, a network or a pattern of addresses; names are not looked up here", quote(s))
			}
		}
		ps = append(ps, p)
	}
	return ps, nil
}

// parseNetwork parses an address or a network. It returns the zero Prefix if s is
// neither, and an error if it is a network with host bits, such as 10.0.0.1/8.
func parseNetwork(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil {
		addr = addr.Unmap().WithZone("")
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	if !strings.Contains(s, "/") {
		return netip.Prefix{}, nil
	}
	network, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%s is not a network", quote(s))
	}
	// An IPv4 client may be connected to an IPv6 socket.
	if a := network.Addr(); a.Is4In6() && network.Bits() >= 96 {
		network = netip.PrefixFrom(a.Unmap(), network.Bits()-96)
	}
	if network != network.Masked() {
		return netip.Prefix{}, fmt.Errorf("%s has bits set behind its length; the network is %v", quote(s), network.Masked())
	}
	return network, nil
}

// couldBeAddress reports whether the text matches the string of some [netip.Addr].
func couldBeAddress(text string) bool {
	dot, letter := false, false
	for _, c := range text {
		switch {
		case '0' <= c && c <= '9', c == ':', c == '*', c == '?':
		case c == '.':
			dot = true
		case 'a' <= c && c <= 'f':
			letter = true
		default:
			return false
		}
	}
	return !dot || !letter
}

// match reports whether addr matches at least one pattern, and no negated one. An
// invalid address does not match.
func (ps patterns) match(addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	if !addr.IsValid() {
		return false
	}
	text := addr.String()
	permitted := false
	for _, p := range ps {
		hit := p.network.IsValid() && p.network.Contains(addr) || p.text != "" && policy.Match(p.text, text)
		if hit && p.negated {
			return false
		}
		permitted = permitted || hit
	}
	return permitted
}
