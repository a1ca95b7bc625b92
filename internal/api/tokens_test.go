package api

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/coreos/go-oidc/v3/oidc/oidctest"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// withToken sends a request with a token.
func (ta *testAPI) withToken(token, method, target string) answer {
	ta.t.Helper()
	c := newCall(method, target)
	c.header.Set("Authorization", "Bearer "+token)
	return ta.send(c, nil)
}

// TestOperatorToken: the token of the file is an administrator, and no user.
func TestOperatorToken(t *testing.T) {
	token := strings.Repeat("0123456789abcdef", 2)
	ta := newTestAPI(t, func(ta *testAPI) {
		withRoles(ta)
		ta.server.OperatorToken = HashToken(token)
	})
	if got := ta.withToken(token, "GET", "/v1/whoami"); got.status != 200 || !strings.Contains(got.body, `"user":"+operator"`) || !strings.Contains(got.body, `"admin":true`) {
		t.Errorf("%v", got)
	}
	if got := ta.withToken(token, "POST", "/v1/bastions/alice"); got.status != 200 {
		t.Errorf("%v", got)
	}
	if got := ta.withToken(token, "GET", "/v1/bastions"); got.status != 200 || !strings.Contains(got.body, `"user":"alice"`) {
		t.Errorf("%v", got)
	}
	if got := ta.withToken(token, "POST", "/v1/bastions/+operator"); got.status != 400 {
		t.Errorf("%v", got)
	}
	for _, wrong := range []string{"", token[1:], token + "0", strings.ToUpper(token), strings.Repeat("x", maxToken+1)} {
		if got := ta.withToken(wrong, "GET", "/v1/whoami"); got.status != 401 && got.status != 431 || strings.Contains(got.body, "operator") {
			t.Errorf("%.40q: %v", wrong, got)
		}
	}
	next := ta.server.Settings
	next.OperatorToken = HashToken("another")
	ta.server.Reload(next)
	if got := ta.withToken(token, "GET", "/v1/whoami"); got.status != 401 {
		t.Errorf("after a reload: %v", got)
	}
	if strings.Contains(ta.logged(), token) {
		t.Error("the token is in the log")
	}
	for _, e := range ta.events() {
		if e.Type == audit.Login && (e.User != "+operator" || e.AuthorizedBy != "api.operator_token" || e.Key != "") {
			t.Errorf("event %+v", e)
		}
		if text, _ := json.Marshal(e); strings.Contains(string(text), token) {
			t.Errorf("the token is in an event: %s", text)
		}
	}
}

// TestOIDC: a token of the provider is its user's, by the configured claims, and her roles
// apply. Other tokens are nobody's.
func TestOIDC(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int32
	issuer := &oidctest.Server{PublicKeys: []oidctest.PublicKey{{PublicKey: key.Public(), KeyID: "k", Algorithm: oidc.RS256}}}
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		issuer.ServeHTTP(w, r)
	}))
	defer web.Close()
	issuer.SetIssuer(web.URL)
	ta := newTestAPI(t, func(ta *testAPI) {
		ta.server.OIDC = OIDC{Issuer: web.URL, Audience: "sallyport", UserClaim: "email", UserSuffix: "@corp.example", PrincipalsClaim: "groups"}
		ta.gateway.Roles = policy.Roles{
			{Name: "developers", Principals: []string{"dev"}, Profiles: []string{"default"}, Permit: policy.PermitAll()},
			{Name: "admins", Principals: []string{"ops"}, Permit: policy.PermitAll(), Admin: true},
		}
	})
	token := func(change map[string]any) string {
		claims := map[string]any{
			"iss": web.URL, "aud": "sallyport", "sub": "4711", "exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(),
			"email": "alice@corp.example", "email_verified": true, "groups": []string{"dev"},
		}
		maps.Copy(claims, change)
		text, err := json.Marshal(claims)
		if err != nil {
			t.Fatal(err)
		}
		return oidctest.SignIDToken(key, "k", oidc.RS256, string(text))
	}
	good := token(nil)
	if got := ta.withToken(good, "POST", "/v1/bastions/alice"); got.status != 200 {
		t.Errorf("%v", got)
	}
	if got := ta.withToken(good, "POST", "/v1/bastions/alice+big"); got.status != 403 || got.code() != "profile" {
		t.Errorf("another profile: %v", got)
	}
	if got := ta.withToken(good, "DELETE", "/v1/bastions/dora"); got.status != 403 || got.code() != "admin-only" {
		t.Errorf("another user: %v", got)
	}
	if got := ta.withToken(token(map[string]any{"groups": "ops"}), "GET", "/v1/bastions?user=dora"); got.status != 200 {
		t.Errorf("an administrator: %v", got)
	}
	if got := ta.withToken(token(map[string]any{"groups": nil}), "GET", "/v1/whoami"); got.status != 403 || got.code() != "no-role" {
		t.Errorf("without groups: %v", got)
	}
	header, rest, _ := strings.Cut(good, ".")
	payload, _, _ := strings.Cut(rest, ".")
	for name, bad := range map[string]string{
		"another audience":      token(map[string]any{"aud": "other"}),
		"another issuer":        token(map[string]any{"iss": "https://evil.example"}),
		"expired":               token(map[string]any{"exp": time.Now().Add(-time.Minute).Unix()}),
		"an unverified address": token(map[string]any{"email_verified": false}),
		"another domain":        token(map[string]any{"email": "alice@evil.example"}),
		"no address":            token(map[string]any{"email": nil}),
		"an impossible name":    token(map[string]any{"email": "../alice@corp.example"}),
		"a profile in the name": token(map[string]any{"email": "alice+ctl@corp.example"}),
		"no signature":          header + "." + payload + ".",
		"another key":           oidctest.SignIDToken(foreign, "k", oidc.RS256, fmt.Sprintf(`{"iss":%q,"aud":"sallyport","exp":%d,"email":"alice@corp.example","email_verified":true}`, web.URL, time.Now().Add(time.Hour).Unix())),
		"no token":              "a.b.c",
	} {
		if got := ta.withToken(bad, "GET", "/v1/whoami"); got.status != 401 || got.code() != "not-proven" {
			t.Errorf("%s: %v", name, got)
		}
	}
	// Tokens of strangers cause a limited number of requests to the provider.
	before := asked.Load()
	for i := range 50 {
		ta.withToken(oidctest.SignIDToken(foreign, fmt.Sprint("key", i), oidc.RS256, fmt.Sprintf(`{"iss":%q,"aud":"sallyport","exp":%d}`, web.URL, time.Now().Add(time.Hour).Unix())), "GET", "/v1/whoami")
	}
	if n := asked.Load() - before; n > providerBurst+10 {
		t.Errorf("50 tokens caused %d requests", n)
	}
	if strings.Contains(ta.logged(), good) {
		t.Error("the token is in the log")
	}
	for _, e := range ta.events() {
		if e.Type == audit.Login && !strings.HasPrefix(e.AuthorizedBy, "api.oidc "+web.URL+" 4711") {
			t.Errorf("event %+v", e)
		}
	}
}
