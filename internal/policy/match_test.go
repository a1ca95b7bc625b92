package policy

import (
	"strings"
	"testing"
)

func TestMatch(t *testing.T) {
	for _, tt := range []struct {
		pattern, s string
		want       bool
	}{
		{"LC_*", "LC_ALL", true}, {"LC_*", "LC_", true}, {"LC_*", "LANG", false}, {"*", "", true}, {"", "", true}, {"", "x", false},
		{"?", "x", true}, {"?", "", false}, {"a*b*c", "aXbYbZc", true}, {"a*b", "ab ", false}, {"**x", "x", true},
	} {
		if got := Match(tt.pattern, tt.s); got != tt.want {
			t.Errorf("Match(%q, %q) = %v", tt.pattern, tt.s, got)
		}
	}
}

func TestPermits(t *testing.T) {
	for _, tt := range []struct {
		rules  string
		host   string
		port   uint32
		opens  bool
		listen bool
	}{
		{"", "any", 1, true, true},
		{"none", "any", 1, false, false},
		{"a:22", "a", 22, true, true}, {"a:22", "a", 23, false, false}, {"a:22", "A", 22, false, true},
		{"a:*", "a", 9, true, true}, {"*:22", "b", 22, true, true}, {"a*:22", "ab", 22, false, true},
		{"[::1]:80", "::1", 80, true, true}, {"8080", "localhost", 8080, false, true}, {"localhost:8080", "127.0.0.1", 8080, false, false},
		{"x:1,a:22", "a", 22, true, true},
	} {
		var rules []string
		if tt.rules != "" {
			rules = strings.Split(tt.rules, ",")
		}
		if got := permitsOpen(rules, tt.host, tt.port); got != tt.opens {
			t.Errorf("permitopen %q, %s:%d: %v", tt.rules, tt.host, tt.port, got)
		}
		if got := permitsListen(rules, tt.host, tt.port); got != tt.listen {
			t.Errorf("permitlisten %q, %s:%d: %v", tt.rules, tt.host, tt.port, got)
		}
	}
}
