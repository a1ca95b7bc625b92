package agent

import (
	"net"
	"strconv"
	"strings"
)

// match says whether s fits a pattern with * and ?, as OpenSSH's match_pattern
// does. It takes at most len(pattern)*len(s) steps.
func match(pattern, s string) bool {
	p, i := 0, 0
	star, mark := -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0: // let the last * take one more
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

func matchAny(patterns []string, s string) bool {
	for _, p := range patterns {
		if match(p, s) {
			return true
		}
	}
	return false
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
		if match(strings.ToLower(h), strings.ToLower(host)) && matchPort(p, port) {
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
