package auth

import (
	"net/netip"
	"strings"
	"testing"
)

func TestFrom(t *testing.T) {
	t.Parallel()
	tests := []struct {
		list    string
		yes, no string // addresses, separated by blanks
	}{
		{"10.0.0.1", "10.0.0.1 ::ffff:10.0.0.1", "10.0.0.2 10.0.0.10 ::1"},
		{"10.0.0.0/8", "10.0.0.0 10.255.255.255 ::ffff:10.1.2.3", "11.0.0.0 9.255.255.255 ::a00:1"},
		{"10.0.0.1/32", "10.0.0.1", "10.0.0.0"},
		{"0.0.0.0/0", "1.2.3.4", "::1 2001:db8::1"},
		{"::/0", "::1 2001:db8::1 fe80::1%eth0", "1.2.3.4 ::ffff:1.2.3.4"},
		{"::ffff:10.0.0.0/104", "10.1.2.3 ::ffff:10.1.2.3", "11.0.0.1"},
		{"::ffff:10.0.0.1", "10.0.0.1", "10.0.0.2"},
		{"2001:db8::/32", "2001:db8:1::1", "2001:db9::1 10.0.0.1"},
		{"2001:DB8:0:0::1", "2001:db8::1", "2001:db8::2"},
		{"fe80::/10", "fe80::1%eth0 fe80::1", "::1"},
		{"10.0.*", "10.0.0.1 10.0.255.1", "10.1.0.1 110.0.0.1"},
		{"10.0.0.?", "10.0.0.1 10.0.0.9", "10.0.0.10"},
		{"*", "1.2.3.4 ::1 fe80::1%eth0", ""},
		{"2001:DB8:*", "2001:db8::1", "2001:db9::1"},
		{"10.0.0.1,10.0.0.3", "10.0.0.1 10.0.0.3", "10.0.0.2"},
		// A negation that matches wins wherever it stands, and permits nothing by itself.
		{"!10.0.0.1,10.0.0.0/8", "10.0.0.2", "10.0.0.1 ::ffff:10.0.0.1 11.0.0.1"},
		{"10.0.0.0/8,!10.0.0.1", "10.0.0.2", "10.0.0.1"},
		{"!10.0.0.1", "", "10.0.0.1 10.0.0.2"},
		{"!10.0.0.0/8,*", "11.0.0.1 ::1", "10.0.0.1"},
		{"!::ffff:10.0.0.0/104,*", "11.0.0.1", "10.0.0.1"},
		{"!fe80::/10,*", "::1", "fe80::1%eth0"},
		{"!10.1.*,10.*", "10.2.0.1", "10.1.0.1"},
	}
	for _, tt := range tests {
		t.Run(tt.list, func(t *testing.T) {
			ps, err := parsePatterns(tt.list)
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range strings.Fields(tt.yes) {
				if !ps.match(netip.MustParseAddr(a)) {
					t.Errorf("refuses %s", a)
				}
			}
			for _, a := range strings.Fields(tt.no) {
				if ps.match(netip.MustParseAddr(a)) {
					t.Errorf("lets %s in", a)
				}
			}
			if ps.match(netip.Addr{}) {
				t.Error("permits an invalid address")
			}
		})
	}
}

func TestFromMistakes(t *testing.T) {
	t.Parallel()
	tests := []struct{ list, want string }{
		{"", "an address is empty"},
		{"!", "an address is empty"},
		{"10.0.0.1,", "an address is empty"},
		{",10.0.0.1", "an address is empty"},
		{"10.0.0.1/8", `"10.0.0.1/8" has bits set behind its length; the network is 10.0.0.0/8`},
		{"2001:db8::1/32", "the network is 2001:db8::/32"},
		{"10.0.0.0/33", "not a network"},
		{"10.0.0.0/", "not a network"},
		{"10.0.0.0/-1", "not a network"},
		{"10.0.0/8", "not a network"},
		{"host/8", "not a network"},
		{"10.0.0.1, 10.0.0.2", `" 10.0.0.2" is not an address`},
		{"laptop", "names are not looked up here"},
		{"*.example.com", "names are not looked up here"},
		{"!*.dialup.example.com,*", "names are not looked up here"},
		{"!cafe.de,*", "names are not looked up here"},
		{"*.fe", "names are not looked up here"},
		{"!!10.0.0.1", "is not an address"},
		{"!127.1,*", `"127.1" is not an address`},
		{"!127.000.000.001,*", "is not an address"},
		{"!2130706433,*", "is not an address"},
	}
	for _, tt := range tests {
		t.Run(tt.list, func(t *testing.T) {
			if _, err := parsePatterns(tt.list); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}

func FuzzFrom(f *testing.F) {
	for _, s := range []string{"10.0.0.0/8", "!10.0.0.1,*", "::ffff:1.2.3.4/100", "fe80::1%x", "2001:db8:*,?", ",", "!"} {
		f.Add(s, "10.0.0.1")
	}
	f.Fuzz(func(t *testing.T, list, from string) {
		ps, err := parsePatterns(list)
		if err != nil {
			return
		}
		addr, err := netip.ParseAddr(from)
		if err != nil {
			return
		}
		// Forbidding an address forbids it, whatever else is permitted.
		denied, err := parsePatterns(list + ",!" + addr.WithZone("").String())
		if err != nil {
			t.Fatal(err)
		}
		if denied.match(addr) {
			t.Errorf("%q permits %v although it is negated", list, addr)
		}
		if ps.match(addr) != ps.match(addr.Unmap()) {
			t.Errorf("%q tells %v from its IPv4 form", list, addr)
		}
	})
}
