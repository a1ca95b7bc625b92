package auth

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// The cases of this file are those of OpenSSH's tests of its own parser of options
// (regress/unittests/authopt): the permissions of a line, of a certificate, and of
// both together.

// flags are the options that permit something, by their names in a line and in a
// certificate.
var flags = []struct {
	line, cert string
	of         func(*identity.Permissions) *bool
}{
	{"port-forwarding", "permit-port-forwarding", func(p *identity.Permissions) *bool { return &p.PortForwarding }},
	{"agent-forwarding", "permit-agent-forwarding", func(p *identity.Permissions) *bool { return &p.AgentForwarding }},
	{"x11-forwarding", "permit-X11-forwarding", func(p *identity.Permissions) *bool { return &p.X11Forwarding }},
	{"pty", "permit-pty", func(p *identity.Permissions) *bool { return &p.PTY }},
	{"user-rc", "permit-user-rc", func(p *identity.Permissions) *bool { return &p.UserRC }},
}

func TestAuthoptParse(t *testing.T) {
	t.Parallel()
	all, none := identity.AllowAll(), identity.Permissions{}
	type result struct {
		options
		wantErr bool
	}
	cases := map[string]result{
		"restrict":  {options: options{permissions: none}},
		"restrict ": {options: options{permissions: none}},
		"restrict,": {wantErr: true}, ",": {wantErr: true}, "BLAH": {wantErr: true}, "BLAH,": {wantErr: true}, "BLAH ": {wantErr: true},
		"no-cert-authority": {wantErr: true}, "command=oops": {wantErr: true}, "principals=estragon": {wantErr: true}, "from=127.0.0.1": {wantErr: true},
		`environment=",=bah"`: {wantErr: true}, `permitopen="foo:bar"`: {wantErr: true}, `permitopen="foo:"`: {wantErr: true},
		`permitopen="foo"`: {wantErr: true}, `permitopen="[:"`: {wantErr: true}, "foo:bar": {wantErr: true}, "[:": {wantErr: true},
		// OpenSSH takes the first two; here there is no tunnel.
		`tunnel="1"`: {wantErr: true}, `tunnel="any"`: {wantErr: true}, `tunnel="blah"`: {wantErr: true},
		"cert-authority":          {options: options{permissions: all, authority: true}},
		"restrict,cert-authority": {options: options{permissions: none, authority: true}},
	}
	for _, f := range flags {
		on, off, only := all, all, none
		*f.of(&off), *f.of(&only) = false, true
		cases[f.line] = result{options: options{permissions: on}}
		cases["no-"+f.line] = result{options: options{permissions: off}}
		cases["restrict,"+f.line] = result{options: options{permissions: only}}
		cases["restrict,no-"+f.line] = result{options: options{permissions: none}}
	}
	from, err := parsePatterns("127.0.0.0/8")
	if err != nil {
		t.Fatal(err)
	}
	for value, set := range map[string]func(*options){
		`command="/bin/true"`:                           func(o *options) { o.permissions.ForceCommand = "/bin/true" },
		`cert-authority,principals="gregor,josef,K"`:    func(o *options) { o.authority, o.principals = true, []string{"gregor", "josef", "K"} },
		`from="127.0.0.0/8"`:                            func(o *options) { o.from = from },
		`environment="foo=1",environment="bar=2"`:       func(o *options) { o.permissions.Environment = []string{"foo=1", "bar=2"} },
		`environment="foo=1",environment="foo=2"`:       func(o *options) { o.permissions.Environment = []string{"foo=1"} },
		`permitopen="foo:123",permitopen="bar:*"`:       func(o *options) { o.permissions.PermitOpen = []string{"foo:123", "bar:*"} },
		`permitlisten="foo:123",permitlisten="[bar]:*"`: func(o *options) { o.permissions.PermitListen = []string{"foo:123", "bar:*"} },
	} {
		free, restricted := options{permissions: all}, options{permissions: none}
		set(&free)
		set(&restricted)
		cases[value] = result{options: free}
		cases["restrict,"+value+",restrict"] = result{options: restricted}
	}
	for _, text := range slices.Sorted(maps.Keys(cases)) {
		want := cases[text]
		got, _, err := parseOptions(text, time.UTC)
		if (err != nil) != want.wantErr || err == nil && !reflect.DeepEqual(got, want.options) {
			t.Errorf("%s: %+v, %v, want %+v", text, got, err, want)
		}
	}
}

// TestAuthoptMerge combines each of the flags, on, off and restricted away in the
// line, with certificates that have all flags, none, only that one, and all but
// that.
func TestAuthoptMerge(t *testing.T) {
	t.Parallel()
	for _, f := range flags {
		without := allPermits()
		delete(without, f.cert)
		certs := map[string]map[string]string{
			"all": allPermits(), "none": nil, "only": {f.cert: ""}, "all but": without,
		}
		for name, extensions := range certs {
			for _, line := range []string{f.line, "restrict," + f.line, "no-" + f.line, "restrict,no-" + f.line} {
				restricted, on := strings.HasPrefix(line, "restrict"), !strings.Contains(line, "no-")
				// A flag that both permit is permitted.
				var want identity.Permissions
				for _, g := range flags {
					_, inCert := extensions[g.cert]
					inLine := !restricted
					if g.line == f.line {
						inLine = on
					}
					*g.of(&want) = inCert && inLine
				}
				k := &Keys{Dir: keysDir(t, "alice", fmt.Sprintf("cert-authority,%s %s\n", line, authorized(edKey(9))))}
				g, err := k.Authorize("alice", sign(t, func(c *ssh.Certificate) { c.Extensions = extensions }), home, today)
				if err != nil || !reflect.DeepEqual(g.Permissions, want) {
					t.Errorf("certificate with %s, line with %s: %+v, %v, want %+v", name, line, g.Permissions, err, want)
				}
			}
		}
	}
}

// TestKeyOptions has the cases of regress/key-options.sh for options that refuse a
// login.
func TestKeyOptions(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]bool{
		"":                       true,
		`from="127.0.0.1"`:       false,
		`from="127.0.0.0/8"`:     false,
		`from="192.0.2.7"`:       true,
		`from="192.0.2.0/24"`:    true,
		`expiry-time="INVALID"`:  false,
		`expiry-time="19990101"`: false,
		`expiry-time="20380101"`: true,
	} {
		k := &Keys{Dir: keysDir(t, "alice", strings.TrimSpace(line+" "+plain)+"\n")}
		if _, err := k.Authorize("alice", edKey(1), home, today); (err == nil) != want {
			t.Errorf("%s: %v", line, err)
		}
	}
}
