package auth

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// patterns is the value of a from option: see PATTERNS in ssh_config(5).
// Addresses only: names are not looked up, because whoever runs the reverse
// zone of an address would decide who gets in.
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
			// A name never matches, nor does an address that is written
			// otherwise than in its usual form, such as 127.1. That is harmless
			// where it permits, but not where it forbids, so say it either way.
			if !couldBeAddress(p.text) || !strings.ContainsAny(s, "*?") {
				return nil, fmt.Errorf("%s is not an address, a network or a pattern of addresses; names are not looked up here", quote(s))
			}
		}
		ps = append(ps, p)
	}
	return ps, nil
}

// parseNetwork returns the zero Prefix if s is neither an address nor a network,
// and an error if it is a network that cannot be meant, such as 10.0.0.1/8.
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
	// An IPv4 client is one whichever kind of socket it came in by.
	if a := network.Addr(); a.Is4In6() && network.Bits() >= 96 {
		network = netip.PrefixFrom(a.Unmap(), network.Bits()-96)
	}
	if network != network.Masked() {
		return netip.Prefix{}, fmt.Errorf("%s has bits set behind its length; the network is %v", quote(s), network.Masked())
	}
	return network, nil
}

// couldBeAddress says whether some address, written as netip.Addr.String does,
// may match text.
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

// match says whether addr is permitted: by at least one pattern, and forbidden
// by none. An invalid address is not.
func (ps patterns) match(addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	if !addr.IsValid() {
		return false
	}
	text := addr.String()
	permitted := false
	for _, p := range ps {
		hit := p.network.IsValid() && p.network.Contains(addr) || p.text != "" && wildcard(p.text, text)
		if hit && p.negated {
			return false
		}
		permitted = permitted || hit
	}
	return permitted
}

// wildcard matches s against a pattern in which * stands for any text and ? for
// any one byte, in time proportional to len(pattern)*len(s) at worst: a star
// that has matched never has to be tried again once the next star is reached.
func wildcard(pattern, s string) bool {
	p, i := 0, 0
	star, from := -1, 0 // the last star, and where in s it stops matching
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, from = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			from++
			p, i = star+1, from
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}
