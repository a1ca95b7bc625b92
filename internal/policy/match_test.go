package policy

import (
	"regexp"
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

// TestMatchIsNotExponential would not end if Match tried all lengths for each *.
func TestMatchIsNotExponential(t *testing.T) {
	if Match(strings.Repeat("*a", 2000)+"b", strings.Repeat("a", 4000)) {
		t.Error("matched")
	}
}

// FuzzMatch compares Match with a regular expression.
func FuzzMatch(f *testing.F) {
	for _, s := range [][2]string{
		{"", ""}, {"*", ""}, {"?", "a"}, {"a*b", "ab"}, {"a*b?c*", "axxbyc"}, {"*a*a*", "aaa"}, {"**", "x"}, {"10.*.1", "10.0.0.1"}, {"*?", ""},
	} {
		f.Add(s[0], s[1])
	}
	isASCII := func(s string) bool { return !strings.ContainsFunc(s, func(r rune) bool { return r >= 0x80 }) }
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if !isASCII(pattern) || !isASCII(s) {
			return // regexp matches runes, Match bytes
		}
		quoted := strings.NewReplacer(`\*`, ".*", `\?`, ".").Replace(regexp.QuoteMeta(pattern))
		if got, want := Match(pattern, s), regexp.MustCompile("^(?s:"+quoted+")$").MatchString(s); got != want {
			t.Errorf("Match(%q, %q) = %v, want %v", pattern, s, got, want)
		}
	})
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
