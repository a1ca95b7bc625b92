package auth

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// TestRolePrincipals wants an authority to give roles no principals that it is
// not trusted for.
func TestRolePrincipals(t *testing.T) {
	t.Parallel()
	ca := put(t, filepath.Join(t.TempDir(), "ca.pub"), authorized(edKey(9)))
	tests := []struct {
		name, line string // of alice's file, followed by the authority
		trusted    bool   // the authority is in TrustedUserCAKeys too
		principals string // file of alice, if not empty
		cert       string
		want       string
	}{
		{"a line", "cert-authority", false, "", "alice,admins", "alice"},
		{"a line with principals", `cert-authority,principals="vendor"`, false, "", "vendor,admins,alice", "vendor"},
		{"a line with several", `cert-authority,principals="vendor,admins"`, false, "", "x,admins", "admins"},
		{"trusted for all", "no-pty", true, "", "alice,admins", "alice,admins"},
		{"trusted, with her own principals", "no-pty", true, "ops\n", "x,ops,admins", "x,ops,admins"},
		{"trusted, but let in by the line", `cert-authority,principals="vendor"`, true, "", "vendor,admins", "vendor"},
	}
	for _, tt := range tests {
		k := &Keys{Dir: keysDir(t, "alice", tt.line+" "+authorized(edKey(9)))}
		if tt.trusted {
			k.TrustedUserCAKeys = []string{ca}
		}
		if tt.principals != "" {
			k.AuthorizedPrincipalsDir = keysDir(t, "alice", tt.principals)
		}
		cert := sign(t, func(c *ssh.Certificate) { c.ValidPrincipals = strings.Split(tt.cert, ",") })
		g, err := k.Authorize("alice", cert, home, today)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if got := strings.Join(g.RolePrincipals, ","); got != tt.want || strings.Join(g.Principals, ",") != tt.cert {
			t.Errorf("%s: roles may go by %q, want %q; the certificate has %q", tt.name, got, tt.want, g.Principals)
		}
	}

	// The principals of an authority that is no longer trusted for all do not select roles any more.
	k := &Keys{Dir: keysDir(t, "alice", "cert-authority "+authorized(edKey(9))), TrustedUserCAKeys: []string{ca}}
	cert := sign(t, func(c *ssh.Certificate) { c.ValidPrincipals = []string{"alice", "admins"} })
	g, err := k.Authorize("alice", cert, home, today)
	if err != nil || len(g.RolePrincipals) != 2 {
		t.Fatalf("%+v, %v", g, err)
	}
	put(t, ca, authorized(edKey(8)))
	time.Sleep(max(sharedStatTTL, unsettledTTL) + 10*time.Millisecond)
	if g, err = k.Recheck("alice", cert, home, today, g); err != nil || !slices.Equal(g.RolePrincipals, []string{"alice"}) {
		t.Errorf("asked again: %q, %v", g.RolePrincipals, err)
	}
}

func TestPrincipalsDir(t *testing.T) {
	t.Parallel()
	dir := keysDir(t,
		"alice", lines("# who may be alice", "", "ops # the operators", "  \t root-alice", `restrict,command="a b" deploy`, "carol"),
		"carol", "",
		"dora", lines("shiny ops", "ops ops", `command="a#b" ops`, `command="a ops`, "cert-authority ops", `from="192.*" ops`, `from="10.0.0.0/8" ops`),
		"erin", lines(`from="10.0.0.0/8" ops`, "ops"), // the first decides
	)
	k := &Keys{
		Dir:                     keysDir(t),
		TrustedUserCAKeys:       []string{put(t, filepath.Join(t.TempDir(), "ca.pub"), authorized(edKey(9)))},
		AuthorizedPrincipalsDir: dir,
	}
	tests := []struct {
		user, principals string
		line             string // empty: refused
		command          string
	}{
		{"alice", "ops", "alice:3", ""},
		{"alice", "x,root-alice", "alice:4", ""},
		{"alice", "deploy", "alice:5", "a b"},
		{"alice", "deploy,ops", "alice:3", ""}, // the order of the file
		{"alice", "carol", "alice:6", ""},
		{"alice", "alice", "", ""}, // her own name is none of them
		{"alice", "# the operators", "", ""},
		{"bob", "bob", "", ""}, // no file
		{"carol", "carol", "", ""},
		{"dora", "ops", "dora:6", ""},
		{"erin", "ops", "", ""},
		{"dora", "shiny ops", "", ""},
	}
	for _, tt := range tests {
		cert := sign(t, func(c *ssh.Certificate) { c.ValidPrincipals = strings.Split(tt.principals, ",") })
		g, err := k.Authorize(tt.user, cert, home, today)
		if tt.line == "" {
			if err == nil {
				t.Errorf("%+v: granted by %s", tt, g.Line)
			}
			continue
		}
		if err != nil || g.Line != "trusted_user_ca_keys ca.pub:1, principals "+tt.line || g.ForceCommand != tt.command {
			t.Errorf("%+v: %+v, %v", tt, g, err)
		}
	}
	var got []string
	for _, err := range (&Keys{Dir: k.Dir, TrustedUserCAKeys: k.TrustedUserCAKeys, AuthorizedPrincipalsDir: dir}).Check() {
		got = append(got, strings.TrimPrefix(err.Error(), dir+"/"))
	}
	want := []string{
		`dora:1: option "shiny": unknown; the line is refused`,
		`dora:2: option "ops": unknown; the line is refused`,
		`dora:3: a quote in the name of a principal; mind that # begins a comment even between quotes`,
		`dora:4: option "command": its closing quote is missing`,
		`dora:5: option "cert-authority": belongs to keys, not to principals`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	// An account that can write to the folder could grant logins.
	os.Chmod(dir, 0o777)
	cert := sign(t, func(c *ssh.Certificate) { c.ValidPrincipals = []string{"ops"} })
	if _, err := k.Authorize("alice", cert, home, today); !errors.Is(err, ErrUndecided) || !strings.Contains(err.Error(), "lets others write to it") {
		t.Errorf("error %v", err)
	}
}

func FuzzPrincipal(f *testing.F) {
	for _, s := range []string{"", "#", "ops", " ops # x", `restrict,command="a b" ops`, `from="10.0.0.0/8" a`, "a b", "cert-authority a", `command="a`, "\tx\r"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		l, err := parsePrincipal(text, time.UTC)
		if err != nil {
			if l.principal != "" {
				t.Fatal("a principal beside an error")
			}
			return
		}
		if strings.ContainsAny(l.principal, " \t#\x00") || l.authority || !strings.Contains(text, l.principal) {
			t.Fatalf("%q has the principal %q", text, l.principal)
		}
		// A principal alone has no restrictions; options before it are parsed like
		// those before a key.
		if before := strings.TrimSuffix(strings.Trim(strings.SplitN(text, "#", 2)[0], " \t\r"), l.principal); strings.Trim(before, " \t") != "" {
			if o, rest, err := parseOptions(before+"x", time.UTC); err != nil || rest != "x" || !reflect.DeepEqual(o, l.options) {
				t.Fatalf("%q: options %+v, alone %+v, %v", text, l.options, o, err)
			}
		} else if !reflect.DeepEqual(l.options, options{permissions: identity.AllowAll()}) {
			t.Fatalf("%q: restricted to %+v", text, l.options)
		}
	})
}
