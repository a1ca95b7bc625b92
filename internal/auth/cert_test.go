package auth

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// signer is the private half of edKey.
func signer(seed byte) ssh.Signer {
	s := make([]byte, ed25519.SeedSize)
	s[0] = seed
	key, err := ssh.NewSignerFromSigner(ed25519.NewKeyFromSeed(s))
	if err != nil {
		panic(err)
	}
	return key
}

// sshKeygen runs the real ssh-keygen in dir.
func sshKeygen(t testing.TB, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("ssh-keygen", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen %v: %v\n%s", args, err, out)
	}
}

func readKey(t testing.TB, path string) ssh.PublicKey {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(data)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func put(t testing.TB, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// allPermits are the default extensions of ssh-keygen.
func allPermits() map[string]string {
	return map[string]string{
		"permit-pty": "", "permit-port-forwarding": "", "permit-agent-forwarding": "", "permit-X11-forwarding": "", "permit-user-rc": "",
	}
}

// sign makes a certificate for key 1 by authority 9, after change has had its way with it.
func sign(t testing.TB, change func(*ssh.Certificate)) *ssh.Certificate {
	t.Helper()
	c := &ssh.Certificate{
		Key: edKey(1), Serial: 7, CertType: ssh.UserCert, KeyId: "alice's laptop", ValidPrincipals: []string{"alice"},
		ValidAfter: uint64(today.Add(-time.Hour).Unix()), ValidBefore: uint64(today.Add(time.Hour).Unix()),
		Permissions: ssh.Permissions{Extensions: allPermits()},
	}
	if change != nil {
		change(c)
	}
	if c.Signature == nil {
		sshtest.SignCert(t, c, signer(9))
	}
	return c
}

// TestCertificate is about certificates of an authority in TrustedUserCAKeys.
func TestCertificate(t *testing.T) {
	t.Parallel()
	dir := keysDir(t, "alice", "", "bob", authorized(edKey(1)))
	k := &Keys{Dir: dir, TrustedUserCAKeys: []string{put(t, filepath.Join(t.TempDir(), "ca.pub"), "# ours\n\n"+authorized(edKey(9))+" ca\n")}}
	all := identity.AllowAll()
	ending := today.Add(time.Hour)
	tests := []struct {
		name    string
		change  func(*ssh.Certificate)
		user    string // empty: alice
		from    string // empty: home
		at      time.Time
		want    identity.Permissions
		wantErr string
	}{
		{name: "good", want: all},
		{name: "second principal", change: func(c *ssh.Certificate) { c.ValidPrincipals = []string{"x", "alice"} }, want: all},
		{name: "for ever", change: func(c *ssh.Certificate) { c.ValidBefore = ssh.CertTimeInfinity }, want: all},
		{name: "at the first moment", at: today.Add(-time.Hour), want: all},
		{name: "before it", at: today.Add(-time.Hour - time.Second), wantErr: "not yet valid"},
		{name: "at the last moment", at: ending.Add(-time.Second), want: all},
		{name: "after it", at: ending, wantErr: "the certificate expired at 2026-06-15T13:00:00Z"},

		{name: "no principals", change: func(c *ssh.Certificate) { c.ValidPrincipals = nil }, wantErr: "names no principals"},
		{name: "another's", user: "bob", wantErr: `none of the certificate's principals, "alice", may log in as bob`},
		{name: "a pattern is a name", change: func(c *ssh.Certificate) { c.ValidPrincipals = []string{"*"} }, wantErr: "none of the certificate's principals"},
		{name: "in other case", change: func(c *ssh.Certificate) { c.ValidPrincipals = []string{"Alice"} }, wantErr: "none of the certificate's principals"},
		{name: "an empty one", change: func(c *ssh.Certificate) { c.ValidPrincipals = []string{""} }, wantErr: "names no principals"},
		{name: "an empty one first", change: func(c *ssh.Certificate) { c.ValidPrincipals = []string{"", "alice"} }, want: all},
		{name: "for hosts", change: func(c *ssh.Certificate) { c.CertType = ssh.HostCert }, wantErr: "not for users"},
		{name: "of no type", change: func(c *ssh.Certificate) { c.CertType = 3 }, wantErr: "not for users"},
		{name: "never valid", change: func(c *ssh.Certificate) { c.ValidAfter = c.ValidBefore }, wantErr: "never valid"},
		{name: "valid after the end of time", change: func(c *ssh.Certificate) { c.ValidAfter = 1 << 63 }, wantErr: "never valid"},
		{name: "until no possible time", change: func(c *ssh.Certificate) { c.ValidBefore = 1<<63 - 1 }, wantErr: "not a possible time"},

		{name: "changed after it was signed", change: func(c *ssh.Certificate) {
			c.SignCert(rand.Reader, signer(9))
			c.KeyId = "INJECTED"
		}, wantErr: "signature is wrong"},
		{name: "signed by another", change: func(c *ssh.Certificate) {
			c.SignCert(rand.Reader, signer(8))
			c.SignatureKey = edKey(9)
		}, wantErr: "signature is wrong"},
		{name: "of an authority nobody trusts", change: func(c *ssh.Certificate) { c.SignCert(rand.Reader, signer(8)) }, wantErr: "nothing trusts the authority"},
		{name: "signed by itself", change: func(c *ssh.Certificate) { c.SignCert(rand.Reader, signer(1)) }, user: "bob", wantErr: "nothing trusts the authority"},

		{name: "permits nothing", change: func(c *ssh.Certificate) { c.Extensions = nil }},
		{name: "permits a terminal", change: func(c *ssh.Certificate) { c.Extensions = map[string]string{"permit-pty": "", "new@example.com": "x"} },
			want: identity.Permissions{PTY: true}},
		{name: "an extension with a value", change: func(c *ssh.Certificate) { c.Extensions["permit-pty"] = "no" }, wantErr: "permit-pty has a value"},
		{name: "forces a command", change: func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"force-command": "uptime"} },
			want: without(func(p *identity.Permissions) { p.ForceCommand = "uptime" })},
		{name: "forces nothing", change: func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"force-command": ""} }, wantErr: "forces an empty command"},
		{name: "from here", change: func(c *ssh.Certificate) {
			c.CriticalOptions = map[string]string{"source-address": "10.0.0.0/8,192.0.2.7/32"}
		}, want: all},
		{name: "from here, by an IPv6 socket", from: "::ffff:192.0.2.7", change: func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"source-address": "192.0.2.0/24"} }, want: all},
		{name: "from elsewhere", change: func(c *ssh.Certificate) {
			c.CriticalOptions = map[string]string{"source-address": "10.0.0.0/8,::1/128"}
		}, wantErr: "may not be used from 192.0.2.7"},
		{name: "from a pattern", change: func(c *ssh.Certificate) {
			c.CriticalOptions = map[string]string{"source-address": "192.0.2.0/24,192.*"}
		}, wantErr: "neither an address nor a network"},
		{name: "from nowhere", change: func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"source-address": ""} }, wantErr: "neither an address"},
		{name: "verify-required", change: func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"verify-required": ""} }, want: all},
		{name: "an unknown option", change: func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"hours@example.com": "9-17"} },
			wantErr: `the unknown critical option "hours@example.com"`},
		{name: "a weak key", change: func(c *ssh.Certificate) {
			c.Key = weakRSA(t)
		}, wantErr: "RSA keys of 1024 bits"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			user, from, at := "alice", home, today
			if tt.user != "" {
				user = tt.user
			}
			if tt.from != "" {
				from = netip.MustParseAddr(tt.from)
			}
			if !tt.at.IsZero() {
				at = tt.at
			}
			cert := sign(t, tt.change)
			g, err := k.Authorize(user, cert, from, at)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Fatalf("error %v, want one with %q", err, tt.wantErr)
				}
				if strings.Contains(err.Error(), "INJECTED") {
					t.Errorf("the key id of an unverified certificate is in the log: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(g.Permissions, tt.want) {
				t.Errorf("permits %+v, want %+v", g.Permissions, tt.want)
			}
			if g.Key != ssh.FingerprintSHA256(edKey(1)) || g.CAKey != ssh.FingerprintSHA256(edKey(9)) || g.CertKeyID != "alice's laptop" || g.CertSerial != 7 ||
				!slices.Equal(g.Principals, cert.ValidPrincipals) || !slices.Equal(g.RolePrincipals, cert.ValidPrincipals) || g.Source != "trusted_user_ca_keys" || g.Line != "trusted_user_ca_keys ca.pub:3" {
				t.Errorf("granted %+v", g)
			}
			if cert.ValidBefore == ssh.CertTimeInfinity != g.Expires.IsZero() || !g.Expires.IsZero() && !g.Expires.Equal(ending) {
				t.Errorf("expires %v", g.Expires)
			}
		})
	}
	if _, err := k.Authorize("alice", sign(t, nil), home, ending); !errors.Is(err, ErrExpired) {
		t.Errorf("expired: %v", err)
	}
	// The key of the authority is not a user's, and the key in a certificate is not without it.
	for _, key := range []ssh.PublicKey{edKey(9), edKey(1)} {
		if _, err := k.Authorize("alice", key, home, today); err == nil {
			t.Error("let in without a certificate")
		}
	}
	// A plain line does not make its key an authority, nor does it grant certificates of its key.
	if _, err := k.Authorize("bob", sign(t, func(c *ssh.Certificate) { c.ValidPrincipals = []string{"x"} }), home, today); err == nil {
		t.Error("a certificate was let in for the key in it")
	}
}

func weakRSA(t *testing.T) ssh.PublicKey {
	fields := strings.Fields(rsaOf(1024))
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(strings.Join(fields, " ")))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestCertAuthorityLine is about certificates of an authority in a user's own
// file, and about certificates that differ from their line.
func TestCertAuthorityLine(t *testing.T) {
	t.Parallel()
	all := identity.AllowAll()
	restricted := map[string]string{"permit-pty": "", "permit-port-forwarding": ""}
	tests := []struct {
		name, line string // line is followed by the authority
		user       string // empty: alice
		change     func(*ssh.Certificate)
		want       identity.Permissions
		wantErr    string
	}{
		{name: "plain", line: "cert-authority", want: all},
		{name: "not an authority", line: "pty", wantErr: "nothing trusts"},
		{name: "for another user", line: "cert-authority", user: "bob", wantErr: "may log in as bob"},
		{name: "no principals", line: "cert-authority", change: func(c *ssh.Certificate) { c.ValidPrincipals = nil }, wantErr: "names no principals"},
		{name: "principals", line: `cert-authority,principals="ops,alice"`, want: all},
		{name: "principals of others", line: `cert-authority,principals="ops"`, wantErr: "none of the certificate's principals"},
		{name: "principals of others with her name", line: `principals="ops",cert-authority`, user: "bob", change: func(c *ssh.Certificate) { c.ValidPrincipals = []string{"bob"} },
			wantErr: "none of the certificate's principals"},
		{name: "principals for another user", line: `cert-authority,principals="alice"`, user: "bob", want: all},
		{name: "line forbids", line: "cert-authority,no-pty,no-agent-forwarding", want: without(func(p *identity.Permissions) { p.PTY, p.AgentForwarding = false, false })},
		{name: "line restricts", line: "restrict,pty,cert-authority", want: identity.Permissions{PTY: true}},
		{name: "certificate restricts", line: "cert-authority", change: func(c *ssh.Certificate) { c.Extensions = restricted }, want: identity.Permissions{PTY: true, PortForwarding: true}},
		{name: "both restrict", line: "cert-authority,restrict,pty,user-rc", change: func(c *ssh.Certificate) { c.Extensions = restricted }, want: identity.Permissions{PTY: true}},
		{name: "command of the line", line: `cert-authority,command="a"`, want: without(func(p *identity.Permissions) { p.ForceCommand = "a" })},
		{name: "command of the certificate", line: `cert-authority`, change: func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"force-command": "b"} },
			want: without(func(p *identity.Permissions) { p.ForceCommand = "b" })},
		{name: "the same command", line: `cert-authority,command="a"`, change: func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"force-command": "a"} },
			want: without(func(p *identity.Permissions) { p.ForceCommand = "a" })},
		{name: "different commands", line: `cert-authority,command="a"`, change: func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"force-command": "b"} },
			wantErr: "force different commands"},
		{name: "from of the line", line: `cert-authority,from="10.0.0.0/8"`, wantErr: "may not be used from"},
		{name: "both from, one fits", line: `cert-authority,from="10.0.0.0/8"`, change: func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"source-address": "192.0.2.0/24"} },
			wantErr: "may not be used from"},
		{name: "both from, both fit", line: `cert-authority,from="192.*"`, change: func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"source-address": "192.0.2.0/24"} }, want: all},
		{name: "line expired", line: `cert-authority,expiry-time="20260101Z"`, wantErr: "expired at"},
		{name: "lists of the line", line: `cert-authority,permitopen="db:1",permitlisten="2",environment="A=b"`,
			want: without(func(p *identity.Permissions) {
				p.PermitOpen, p.PermitListen, p.Environment = []string{"db:1"}, []string{"2"}, []string{"A=b"}
			})},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			user := "alice"
			if tt.user != "" {
				user = tt.user
			}
			k := &Keys{Dir: keysDir(t, user, lines("", tt.line+" "+authorized(edKey(9))))}
			g, err := k.Authorize(user, sign(t, tt.change), home, today)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Fatalf("error %v, want one with %q", err, tt.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(g.Permissions, tt.want) || g.Line != user+":2" || g.Source != "authorized_keys_dir" || g.CAKey == "" {
				t.Errorf("granted %+v, want %+v", g, tt.want)
			}
			// The authority's own key cannot log in.
			if _, err := k.Authorize(user, edKey(9), home, today); tt.line != "pty" && err == nil {
				t.Error("the authority's own key was let in")
			}
		})
	}
	// The earlier end counts.
	k := &Keys{Dir: keysDir(t, "alice", `cert-authority,expiry-time="202606151230Z" `+authorized(edKey(9))+"\n")}
	if g, err := k.Authorize("alice", sign(t, nil), home, today); err != nil || !g.Expires.Equal(today.Add(30*time.Minute)) {
		t.Errorf("expires %v, %v", g.Expires, err)
	}
	// Of two lines for the authority the first that fits counts; and so does the
	// user's file where TrustedUserCAKeys refuses.
	k = &Keys{
		Dir:               keysDir(t, "alice", lines("cert-authority,principals=\"x\" "+authorized(edKey(9)), "cert-authority,no-pty,principals=\"ops\" "+authorized(edKey(9)))),
		TrustedUserCAKeys: []string{put(t, filepath.Join(t.TempDir(), "ca.pub"), authorized(edKey(9)))},
	}
	g, err := k.Authorize("alice", sign(t, func(c *ssh.Certificate) { c.ValidPrincipals = []string{"ops"} }), home, today)
	if err != nil || g.PTY || g.Line != "alice:2" {
		t.Errorf("granted %+v, %v", g, err)
	}
}

// fidoKey is edKey as a key in a security key.
func fidoKey(t *testing.T, seed byte) ssh.PublicKey {
	t.Helper()
	pub := edKey(seed).(ssh.CryptoPublicKey).CryptoPublicKey().(ed25519.PublicKey)
	sk, _, _, _, err := ssh.ParseAuthorizedKey([]byte(wire(ssh.KeyAlgoSKED25519, string(pub), "ssh:")))
	if err != nil {
		t.Fatal(err)
	}
	return sk
}

// TestTouch is about certificates for FIDO keys that waive the touch.
func TestTouch(t *testing.T) {
	t.Parallel()
	sk := fidoKey(t, 1)
	ca := put(t, filepath.Join(t.TempDir(), "ca.pub"), authorized(edKey(9)))
	trusted := &Keys{Dir: keysDir(t), TrustedUserCAKeys: []string{ca}}
	line := func(options string) *Keys {
		return &Keys{Dir: keysDir(t, "alice", options+" "+authorized(edKey(9)))}
	}
	principals := func(text string) *Keys {
		return &Keys{Dir: keysDir(t), TrustedUserCAKeys: []string{ca}, AuthorizedPrincipalsDir: keysDir(t, "alice", text)}
	}
	tests := []struct {
		name   string
		keys   *Keys
		waived bool // by the certificate
		want   bool
	}{
		{"trusted", trusted, false, false},
		{"trusted, waived", trusted, true, true},
		{"line", line("cert-authority"), false, false},
		{"line waives alone", line("cert-authority,no-touch-required"), false, false},
		{"both waive", line("cert-authority,no-touch-required"), true, true},
		// As with sshd, the touch is required unless both waive it.
		{"certificate waives alone", line("cert-authority"), true, false},
		{"principals", principals("alice\n"), true, false},
		{"principals waive too", principals("no-touch-required alice\n"), true, true},
	}
	for _, tt := range tests {
		cert := sign(t, func(c *ssh.Certificate) {
			c.Key = sk
			if tt.waived {
				c.Extensions["no-touch-required"] = ""
			}
		})
		g, err := tt.keys.Authorize("alice", cert, home, today)
		if err != nil || g.NoTouchRequired != tt.want {
			t.Errorf("%s: %+v, %v", tt.name, g, err)
		}
	}
	// To a key of another kind it does not matter.
	cert := sign(t, func(c *ssh.Certificate) { c.Extensions["no-touch-required"] = "" })
	if _, err := line("cert-authority").Authorize("alice", cert, home, today); err != nil {
		t.Error(err)
	}
}

// TestVerifyRequired wants verify-required of the line, of the certificate, or of
// both to count.
func TestVerifyRequired(t *testing.T) {
	t.Parallel()
	ca := put(t, filepath.Join(t.TempDir(), "ca.pub"), authorized(edKey(9)))
	certified := func(verify bool) ssh.PublicKey {
		return sign(t, func(c *ssh.Certificate) {
			c.Key = fidoKey(t, 1)
			if verify {
				c.CriticalOptions = map[string]string{"verify-required": ""}
			}
		})
	}
	line := func(text string, key ssh.PublicKey) *Keys {
		return &Keys{Dir: keysDir(t, "alice", text+" "+authorized(key))}
	}
	tests := []struct {
		name string
		keys *Keys
		key  ssh.PublicKey
		want bool
	}{
		{"line", line("verify-required", fidoKey(t, 1)), fidoKey(t, 1), true},
		{"line that waives it", line("verify-required,no-verify-required", fidoKey(t, 1)), fidoKey(t, 1), false},
		{"certificate", &Keys{Dir: keysDir(t), TrustedUserCAKeys: []string{ca}}, certified(true), true},
		{"certificate without", &Keys{Dir: keysDir(t), TrustedUserCAKeys: []string{ca}}, certified(false), false},
		{"certificate only", line("cert-authority", edKey(9)), certified(true), true},
		{"authority's line only", line("cert-authority,verify-required", edKey(9)), certified(false), true},
		{"neither", line("cert-authority", edKey(9)), certified(false), false},
		// A line cannot waive the certificate's demand.
		{"waived by the line", line("cert-authority,no-verify-required", edKey(9)), certified(true), true},
		{"principals", &Keys{Dir: keysDir(t), TrustedUserCAKeys: []string{ca}, AuthorizedPrincipalsDir: keysDir(t, "alice", "verify-required alice\n")}, certified(false), true},
	}
	for _, tt := range tests {
		if g, err := tt.keys.Authorize("alice", tt.key, home, today); err != nil || g.VerifyRequired != tt.want {
			t.Errorf("%s: granted %+v, %v", tt.name, g, err)
		}
	}
}

func TestCAKeysFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := put(t, filepath.Join(dir, "ca.pub"), lines("cert-authority "+authorized(edKey(9)), "junk", authorized(edKey(8))))
	k := &Keys{Dir: keysDir(t, "alice", authorized(edKey(1))), TrustedUserCAKeys: []string{filepath.Join(dir, "nowhere"), path}}
	var got []string
	for _, err := range k.Check() {
		got = append(got, strings.ReplaceAll(err.Error(), dir+"/", ""))
	}
	want := []string{
		"open nowhere: no such file or directory",
		"ca.pub:1: options are not for this file; write cert-authority and the key into a user's authorized keys",
		`ca.pub:2: option "junk": unknown; the line is refused`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	by := func(ca byte) error {
		_, err := k.Authorize("alice", sign(t, func(c *ssh.Certificate) { c.SignCert(rand.Reader, signer(ca)) }), home, today)
		return err
	}
	if err := by(8); err != nil {
		t.Errorf("one file is missing, and the other has the authority: %v", err)
	}
	// It may be in the file that cannot be read.
	if err := by(9); !errors.Is(err, ErrUndecided) {
		t.Errorf("error %v", err)
	}
	if _, err := k.Authorize("alice", edKey(1), home, today); err != nil {
		t.Errorf("a plain key needs no authority: %v", err)
	}
	os.Chmod(path, 0o666)
	if err := by(8); err == nil {
		t.Error("let in by a file that everybody can write")
	}
}

// TestKeygenCertificates authorizes certificates of the real ssh-keygen.
func TestKeygenCertificates(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, typ := range []string{"ed25519", "ecdsa", "rsa"} {
		args := []string{"-q", "-t", typ, "-N", ""}
		if typ == "rsa" {
			args = append(args, "-b", "2048") // the least, which takes the least time
		}
		sshKeygen(t, dir, append(args, "-f", "user_"+typ)...)
		sshKeygen(t, dir, append(args, "-f", "ca_"+typ)...)
	}
	os.Chmod(dir, 0o755)
	tests := []struct {
		args    []string
		want    identity.Permissions
		wantErr string
	}{
		{args: []string{"-n", "alice"}, want: identity.AllowAll()},
		{args: []string{"-n", "bob"}, wantErr: `none of the certificate's principals`},
		{args: nil, wantErr: "names no principals"},
		{args: []string{"-n", "alice", "-V", "-2h:-1h"}, wantErr: "the certificate expired"},
		{args: []string{"-n", "alice", "-V", "+1h:+2h"}, wantErr: "not yet valid"},
		{args: []string{"-n", "alice", "-O", "clear"}},
		{args: []string{"-n", "alice", "-O", "clear", "-O", "permit-agent-forwarding"}, want: identity.Permissions{AgentForwarding: true}},
		{args: []string{"-n", "alice", "-O", "no-x11-forwarding", "-O", "no-user-rc"}, want: without(func(p *identity.Permissions) { p.X11Forwarding, p.UserRC = false, false })},
		{args: []string{"-n", "alice", "-O", "force-command=echo hi"}, want: without(func(p *identity.Permissions) { p.ForceCommand = "echo hi" })},
		{args: []string{"-n", "alice", "-O", "source-address=192.0.2.0/24"}, want: identity.AllowAll()},
		{args: []string{"-n", "alice", "-O", "source-address=10.0.0.0/8"}, wantErr: "may not be used from"},
		{args: []string{"-n", "alice", "-O", "verify-required"}, want: identity.AllowAll()},
		{args: []string{"-n", "alice", "-O", "critical:x@example.com=y"}, wantErr: "unknown critical option"},
		{args: []string{"-n", "alice", "-O", "extension:x@example.com=y"}, want: identity.AllowAll()},
		{args: []string{"-h", "-n", "alice"}, wantErr: "not for users"},
	}
	for i, tt := range tests {
		typ := []string{"ed25519", "ecdsa", "rsa"}[i%3]
		k := &Keys{Dir: keysDir(t), TrustedUserCAKeys: []string{filepath.Join(dir, "ca_"+typ+".pub")}}
		sshKeygen(t, dir, slices.Concat([]string{"-q", "-s", "ca_" + typ, "-I", "id", "-z", fmt.Sprint(i + 1)}, tt.args, []string{"user_" + typ + ".pub"})...)
		cert := readKey(t, filepath.Join(dir, "user_"+typ+"-cert.pub"))
		g, err := k.Authorize("alice", cert, home, time.Now())
		if tt.wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
				t.Errorf("%v: error %v, want one with %q", tt.args, err, tt.wantErr)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(g.Permissions, tt.want) || g.CertSerial != uint64(i+1) || g.CertKeyID != "id" {
			t.Errorf("%v: %+v, %v", tt.args, g, err)
		}
	}
	// RSA with SHA-1 is no signature any more.
	sshKeygen(t, dir, "-q", "-s", "ca_rsa", "-t", "ssh-rsa", "-I", "id", "-n", "alice", "user_ed25519.pub")
	k := &Keys{Dir: keysDir(t), TrustedUserCAKeys: []string{filepath.Join(dir, "ca_rsa.pub")}}
	if _, err := k.Authorize("alice", readKey(t, filepath.Join(dir, "user_ed25519-cert.pub")), home, time.Now()); err == nil || !strings.Contains(err.Error(), "an algorithm that is not accepted") {
		t.Errorf("signed with SHA-1: %v", err)
	}
}
