package api

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hiddeco/sshsig"
	"github.com/pquerna/otp/totp"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// certificate returns a signer for a user certificate, changed by change.
func certificate(t testing.TB, ca, key ssh.Signer, change func(*ssh.Certificate)) ssh.Signer {
	t.Helper()
	cert := &ssh.Certificate{
		Key: key.PublicKey(), CertType: ssh.UserCert, KeyId: "test", ValidPrincipals: []string{"carol"},
		ValidAfter: uint64(time.Now().Add(-time.Minute).Unix()), ValidBefore: uint64(time.Now().Add(time.Hour).Unix()),
	}
	change(cert)
	sshtest.SignCert(t, cert, ca)
	s, err := ssh.NewCertSigner(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func rsaSigner(t testing.TB, bits int) ssh.Signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A sha1Signer signs with SHA-1.
type sha1Signer struct{ ssh.Signer }

func (s sha1Signer) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	return s.Signer.(ssh.AlgorithmSigner).SignWithAlgorithm(rand, data, ssh.KeyAlgoRSA)
}

func (s sha1Signer) SignWithAlgorithm(rand io.Reader, data []byte, _ string) (*ssh.Signature, error) {
	return s.Sign(rand, data)
}

// An untouched key is a FIDO key that nobody has touched.
type untouched struct{ private ed25519.PrivateKey }

func (k untouched) PublicKey() ssh.PublicKey {
	key, err := ssh.ParsePublicKey(ssh.Marshal(struct {
		Type        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, k.private.Public().(ed25519.PublicKey), "ssh:"}))
	if err != nil {
		panic(err)
	}
	return key
}

func (k untouched) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	application, message := sha256.Sum256([]byte("ssh:")), sha256.Sum256(data)
	rest := []byte{0, 0, 0, 0, 1}
	signed := append(append(application[:], rest...), message[:]...)
	return &ssh.Signature{Format: ssh.KeyAlgoSKED25519, Blob: ed25519.Sign(k.private, signed), Rest: rest}, nil
}

// signedAs returns a function that signs a request for another statement, or in another
// namespace, than the request has.
func signedAs(t testing.TB, key ssh.Signer, s Statement, namespace string) func(*http.Request) {
	return func(r *http.Request) {
		sig, err := sshsig.Sign(strings.NewReader(s.Text()), key, sshsig.HashSHA512, namespace)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", fmt.Sprintf(`SSHSIG user="%s", time="%d", nonce="%s", signature="%s"`,
			s.User, s.Time.Unix(), s.Nonce, base64.StdEncoding.EncodeToString(sig.Marshal())))
	}
}

// TestAttacks sends requests that prove nobody, or somebody else. None may reach a bastion,
// and each is a refused login in the audit log.
func TestAttacks(t *testing.T) {
	small, large := rsaSigner(t, 1024), rsaSigner(t, 2048)
	_, fido, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		ca, carol := sshtest.NewKey(t), sshtest.NewKey(t)
		revoked, elsewhere, expired, forced, stranger := sshtest.NewKey(t), sshtest.NewKey(t), sshtest.NewKey(t), sshtest.NewKey(t), sshtest.NewKey(t)
		ta := newTestAPI(t, func(ta *testAPI) {
			withRoles(ta)
			ta.gateway.Roles = append(ta.gateway.Roles, &policy.Role{Name: "carol", Users: []string{"carol"}})
			for _, key := range []ssh.Signer{small, large, revoked} {
				ta.authorize("alice", "", key.PublicKey())
			}
			ta.authorize("alice", `from="10.0.0.0/8"`, elsewhere.PublicKey())
			ta.authorize("alice", `expiry-time="19991231"`, expired.PublicKey())
			ta.authorize("alice", `command="date"`, forced.PublicKey())
			ta.authorize("alice", "", untouched{fido}.PublicKey())
			ta.authorize("carol", `cert-authority`, ca.PublicKey())
			ta.authorize("nobody", "", stranger.PublicKey()) // has no role
			ta.keys.RevokedKeys = filepath.Join(ta.dir, "revoked")
			if err := os.WriteFile(ta.keys.RevokedKeys, ssh.MarshalAuthorizedKey(revoked.PublicKey()), 0o600); err != nil {
				t.Fatal(err)
			}
		})
		plain := func(change func(*call)) *call {
			c := newCall("POST", "/v1/bastions/alice")
			if change != nil {
				change(c)
			}
			return c
		}
		// The request is not the signed one.
		altered := func(change func(*Statement)) *call {
			c := plain(nil)
			s := c.Statement
			change(&s)
			c.forge = signedAs(t, ta.alice, s, Namespace)
			return c
		}
		header := func(text string) *call {
			return plain(func(c *call) { c.forge = func(r *http.Request) { r.Header.Set("Authorization", text) } })
		}
		valid := plain(nil).request(t, ta.alice).Header.Get("Authorization")
		asCarol := func(c *call) { c.User, c.Target = "carol", "/v1/bastions/carol" }
		cert := func(change func(*ssh.Certificate)) ssh.Signer { return certificate(t, ca, carol, change) }

		for _, tt := range []struct {
			name   string
			call   *call
			key    ssh.Signer
			status int
			code   string
		}{
			{"no credential", plain(nil), nil, 401, "not-proven"},
			{"another scheme", header("Basic YWxpY2U6c2VjcmV0"), nil, 401, "not-proven"},
			{"a bearer", header("Bearer " + strings.Repeat("x", 40)), nil, 401, "not-proven"},
			{"no parameters", header("SSHSIG"), nil, 401, "not-proven"},
			{"no signature", header(valid[:strings.Index(valid, ", signature")]), nil, 401, "not-proven"},
			{"a parameter twice", header(valid + `, user="root"`), nil, 401, "not-proven"},
			{"a line break in the name", header(strings.Replace(valid, "alice", "al\tice", 1)), nil, 401, "not-proven"},
			{"a short nonce", plain(func(c *call) { c.Nonce = "short" }), ta.alice, 401, "not-proven"},
			{"a truncated signature", header(valid[:len(valid)-9] + `"`), nil, 401, "not-proven"},
			{"another namespace", plain(nil), ta.alice, 401, "not-proven"}, // forged below
			{"another method", altered(func(s *Statement) { s.Method = "GET" }), nil, 401, "not-proven"},
			{"another path", altered(func(s *Statement) { s.Target = "/v1/bastions/alice+big" }), nil, 401, "not-proven"},
			{"another host", altered(func(s *Statement) { s.Host = "evil.example" }), nil, 401, "not-proven"},
			{"another gateway's request", plain(func(c *call) { c.Host = "evil.example" }), ta.alice, 401, "other-host"},
			{"the clock is behind", plain(func(c *call) { c.Time = time.Now().Add(-maxSkew - 2*time.Second) }), ta.alice, 401, "clock"},
			{"the clock is ahead", plain(func(c *call) { c.Time = time.Now().Add(maxSkew + 2*time.Second) }), ta.alice, 401, "clock"},
			{"before the start of the gateway", plain(func(c *call) { c.Time = time.Now().Add(-time.Minute) }), ta.alice, 401, "clock"},
			{"another's key", plain(nil), ta.root, 401, "not-proven"},
			{"an unknown user", plain(func(c *call) { c.User = "mallory" }), ta.alice, 401, "not-proven"},
			{"an impossible user", plain(func(c *call) { c.User = "../alice" }), ta.alice, 401, "not-proven"},
			{"a profile in the name", plain(func(c *call) { c.User = "alice+big" }), ta.alice, 401, "not-proven"},
			{"another gateway", plain(func(c *call) { c.User = "+gateway" }), ta.alice, 401, "not-proven"},
			{"a revoked key", plain(nil), revoked, 401, "not-proven"},
			{"a key for other networks", plain(nil), elsewhere, 401, "not-proven"},
			{"an expired key", plain(nil), expired, 401, "not-proven"},
			{"a weak key", plain(nil), small, 401, "not-proven"},
			{"SHA-1", plain(nil), sha1Signer{large}, 401, "not-proven"},
			{"an untouched FIDO key", plain(nil), untouched{fido}, 401, "not-proven"},
			{"a forced command", plain(nil), forced, 403, "forced-command"},
			{"no role", plain(func(c *call) { c.User, c.Target = "nobody", "/v1/bastions/nobody" }), stranger, 403, "no-role"},
			{"a certificate for another user", plain(nil), cert(func(*ssh.Certificate) {}), 401, "not-proven"},
			{"an expired certificate", plain(asCarol), cert(func(c *ssh.Certificate) { c.ValidBefore = uint64(time.Now().Add(-time.Second).Unix()) }), 401, "not-proven"},
			{"a future certificate", plain(asCarol), cert(func(c *ssh.Certificate) { c.ValidAfter = uint64(time.Now().Add(time.Minute).Unix()) }), 401, "not-proven"},
			{"a certificate for other networks", plain(asCarol), cert(func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"source-address": "10.0.0.0/8"} }), 401, "not-proven"},
			{"a certificate with an unknown option", plain(asCarol), cert(func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"x": ""} }), 401, "not-proven"},
			{"a host's certificate", plain(asCarol), cert(func(c *ssh.Certificate) { c.CertType = ssh.HostCert }), 401, "not-proven"},
			{"a certificate without principals", plain(asCarol), cert(func(c *ssh.Certificate) { c.ValidPrincipals = nil }), 401, "not-proven"},
			{"a certificate of another authority", plain(asCarol), certificate(t, ta.alice, carol, func(*ssh.Certificate) {}), 401, "not-proven"},
			{"the key of a certificate", plain(asCarol), carol, 401, "not-proven"},
		} {
			if tt.name == "another namespace" {
				tt.call.forge = signedAs(t, ta.alice, tt.call.Statement, "file")
			}
			got := ta.send(tt.call, tt.key)
			if got.status != tt.status || got.code() != tt.code {
				t.Errorf("%s: %v, want %d %s", tt.name, got, tt.status, tt.code)
			}
			if challenge := got.header.Get("WWW-Authenticate"); (challenge != "") != (got.status == 401) {
				t.Errorf("%s: WWW-Authenticate: %s", tt.name, challenge)
			}
			// A stranger does not learn which users there are.
			if tt.code == "not-proven" && !strings.HasPrefix(got.detail(), "This request needs a signature by an SSH key of the user whom it names, or a valid token.") {
				t.Errorf("%s: %s", tt.name, got.detail())
			}
		}
		if len(ta.dials) != 0 {
			t.Errorf("bastions were dialled: %v", ta.dials)
		}
		// And these are accepted.
		for name, c := range map[string]struct {
			call *call
			key  ssh.Signer
		}{
			"RSA":           {plain(nil), large},
			"a certificate": {plain(asCarol), cert(func(*ssh.Certificate) {})},
			"a certificate for this network": {plain(asCarol), cert(func(c *ssh.Certificate) {
				c.CriticalOptions = map[string]string{"source-address": "192.0.2.0/24"}
			})},
			"a clock that is ahead": {plain(func(c *call) { c.Time = time.Now().Add(maxSkew - time.Second) }), ta.alice},
		} {
			if got := ta.send(c.call, c.key); got.status != 200 {
				t.Errorf("%s: %v", name, got)
			}
		}
		refused := 0
		for _, e := range ta.events() {
			if e.Type == audit.LoginRefused {
				refused++
				if e.Protocol != "http" || e.Reason == "" {
					t.Errorf("event %+v", e)
				}
			}
		}
		if want := 37; refused != want { // all but the two without a credential
			t.Errorf("%d refused logins in the audit log, want %d", refused, want)
		}
	})
}

// TestReplays: a request is accepted once, also with another signature, until it has become
// too old; and a user has a limited number of requests.
func TestReplays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, nil)
		time.Sleep(time.Hour)
		c := newCall("GET", "/v1/whoami")
		c.Time = time.Now().Add(maxSkew - time.Second)
		if got := ta.send(c, ta.alice); got.status != 200 {
			t.Fatalf("%v", got)
		}
		for _, wait := range []time.Duration{0, time.Minute, maxSkew, maxSkew - time.Minute - 2*time.Second} {
			time.Sleep(wait)
			if got := ta.send(c, ta.alice); got.status != 401 || got.code() != "replayed" {
				t.Errorf("a replay: %v", got)
			}
		}
		time.Sleep(10 * time.Second)
		if got := ta.send(c, ta.alice); got.code() != "clock" {
			t.Errorf("an old request: %v", got)
		}
		// The same nonce of another user is another one.
		c.Time, c.User = time.Now(), "root"
		if got := ta.send(c, ta.root); got.status != 200 {
			t.Errorf("another user's: %v", got)
		}

		for i := range maxNonces {
			if got := ta.do("GET", "/v1/whoami"); got.status != 200 {
				t.Fatalf("request %d: %v", i, got)
			}
		}
		got := ta.do("GET", "/v1/whoami")
		if got.status != 429 || got.code() != "too-many-requests" || got.header.Get("Retry-After") != "240" {
			t.Errorf("one request too many: %v %v", got, got.header)
		}
		if got := ta.as("root", ta.root, "GET", "/v1/whoami"); got.status != 200 {
			t.Errorf("another user's: %v", got)
		}
		time.Sleep(nonceLife + time.Second)
		if got := ta.do("GET", "/v1/whoami"); got.status != 200 {
			t.Errorf("later: %v", got)
		}
	})
}

// TestPenalties: failed requests give their source a penalty, as failed logins do. Requests of
// proven users do not.
func TestPenalties(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, func(ta *testAPI) {
			ta.gateway.PerSourcePenalties = gateway.Penalties{AuthFail: 5 * time.Second, NoAuth: time.Second, Max: time.Minute, Min: 15 * time.Second, MaxSources4: 10, MaxSources6: 10}
			ta.gateway.Roles = policy.Roles{{Name: "users", Users: []string{"root"}}}
		})
		for range 20 {
			if got := ta.do("GET", "/v1/whoami"); got.status != 403 {
				t.Fatalf("without a role: %v", got)
			}
		}
		for range 3 {
			if got := ta.as("alice", ta.root, "GET", "/v1/whoami"); got.status != 401 {
				t.Fatalf("%v", got)
			}
		}
		got := ta.as("root", ta.root, "GET", "/v1/whoami")
		if got.status != 429 || got.code() != "penalty" || !strings.HasPrefix(got.detail(), "Not allowed at this time: too many logins from your address have failed.") || got.header.Get("Retry-After") != "15" {
			t.Errorf("with a penalty: %v %v", got, got.header)
		}
		if got := ta.exchange(newCall("GET", "/v1/openapi.json").request(t, nil)); got.status != 429 {
			t.Errorf("with a penalty, without a login: %v", got)
		}
		ta.ln.from("192.0.2.2")
		if got := ta.as("root", ta.root, "GET", "/v1/whoami"); got.status != 200 {
			t.Errorf("from elsewhere: %v", got)
		}
		ta.ln.from("192.0.2.1")
		time.Sleep(16 * time.Second)
		if got := ta.as("root", ta.root, "GET", "/v1/whoami"); got.status != 200 {
			t.Errorf("later: %v", got)
		}
	})
}

// TestCodes: a user who needs a code over SSH needs one here.
func TestCodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		codes := &auth.TOTP{Dir: t.TempDir()}
		if err := os.Chmod(codes.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		secret := "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"
		if err := os.WriteFile(filepath.Join(codes.Dir, "alice"), []byte(secret+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		ta := newTestAPI(t, func(ta *testAPI) { ta.gateway.SecondFactor, ta.gateway.SecondFactorRequired = codes, true })
		with := func(code string) answer {
			c := newCall("POST", "/v1/bastions/alice")
			if code != "" {
				c.header.Set(codeHeader, code)
			}
			return ta.send(c, ta.alice)
		}
		right := totpCode(t, secret, time.Now())
		if got := with(""); got.status != 401 || got.code() != "code-needed" || !strings.Contains(got.detail(), "Sallyport-Code") {
			t.Errorf("no code: %v", got)
		}
		if got := with("000000"); got.status != 401 || got.code() != "code-wrong" {
			t.Errorf("a wrong code: %v", got)
		}
		if len(ta.dials) != 0 {
			t.Error("a bastion was dialled")
		}
		if got := with(right); got.status != 200 {
			t.Errorf("the right code: %v", got)
		}
		if got := with(right); got.status != 401 || got.code() != "code-used" {
			t.Errorf("a used code: %v", got)
		}
		for range 6 {
			with("111111")
		}
		if got := with(totpCode(t, secret, time.Now().Add(30*time.Second))); got.status != 429 || got.code() != "code-later" {
			t.Errorf("after many wrong codes: %v", got)
		}
		if got := ta.as("root", ta.root, "GET", "/v1/whoami"); got.status != 403 || got.code() != "no-secret" {
			t.Errorf("a user without a secret: %v", got)
		}
		if strings.Contains(ta.logged(), right) {
			t.Error("the code is in the log")
		}
		for _, e := range ta.events() {
			if strings.Contains(fmt.Sprint(e), right) {
				t.Errorf("the code is in an event: %+v", e)
			}
		}
	})
}

func totpCode(t testing.TB, secret string, at time.Time) string {
	t.Helper()
	code, err := totp.GenerateCode(secret, at)
	if err != nil {
		t.Fatal(err)
	}
	return code
}

// FuzzParseSigned parses headers. A parsed one has only values that can stand in a signed
// text and a log.
func FuzzParseSigned(f *testing.F) {
	key := sshtest.NewKey(f)
	for _, s := range []ssh.Signer{key, certificate(f, key, sshtest.NewKey(f), func(*ssh.Certificate) {}), untouched{ed25519.NewKeyFromSeed(make([]byte, 32))}} {
		header, err := Sign(Statement{Method: "GET", Host: "h", Target: "/", User: "alice", Time: time.Unix(1764547200, 0), Nonce: strings.Repeat("n", 16)}, s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(strings.TrimPrefix(header, scheme+" "))
	}
	f.Add(`user="a",time="1",nonce="0123456789abcdef",signature=""`)
	f.Fuzz(func(t *testing.T, params string) {
		r, err := parseSigned(params)
		if err != nil {
			return
		}
		if r.user == "" || len(r.user) > maxName || strings.ContainsFunc(r.user+r.nonce, unquotable) || r.signature == nil || r.signature.PublicKey == nil {
			t.Errorf("%+v", r)
		}
		// Nobody has signed an empty statement.
		if _, err := r.verify(Statement{}, r.time); err == nil {
			t.Error("a request is proven")
		}
	})
}
