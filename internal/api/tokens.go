package api

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// This file has the tokens of requests, as in Authorization: Bearer TOKEN (RFC 6750).

const (
	bearer = "Bearer"

	maxToken = 16 << 10 // bytes

	// providerTimeout limits a request to the OpenID provider, and maxProviderAnswer its
	// answer, in bytes.
	providerTimeout   = 10 * time.Second
	maxProviderAnswer = 1 << 20
	// providerInterval and providerBurst limit the requests to the provider: a token
	// with an unknown key causes one, and strangers can make such tokens.
	providerInterval, providerBurst = 5 * time.Second, 5
)

// OIDC says which ID tokens of an OpenID provider are accepted, and for whom.
type OIDC struct {
	// Issuer is the URL of the provider; empty means that no token is accepted.
	// Audience must be in the token.
	Issuer, Audience string
	// UserClaim is the claim with the user's name, in which UserSuffix must be at the
	// end, and is removed. The claim email is accepted only if it is verified.
	UserClaim, UserSuffix string
	// PrincipalsClaim is the claim with the principals that select roles; empty means
	// none.
	PrincipalsClaim string
}

// HashToken returns the hash of an operator's token, for [Options].
func HashToken(token string) *[sha256.Size]byte {
	sum := sha256.Sum256([]byte(token))
	return &sum
}

// bearerProof verifies a token.
func (q *request) bearerProof(token string) (gateway.Proof, error) {
	claimed := gateway.Proof{User: "?"}
	if token == "" || len(token) > maxToken {
		return claimed, fmt.Errorf("%w: a token of %d bytes", gateway.ErrUnproven, len(token))
	}
	if want := q.settings.OperatorToken; want != nil && subtle.ConstantTimeCompare(HashToken(token)[:], want[:]) == 1 {
		return gateway.Proof{User: gateway.OperatorUser, Operator: true, Grant: auth.Grant{Line: "api.operator_token"}}, nil
	}
	if q.settings.OIDC.Issuer == "" {
		return claimed, fmt.Errorf("%w: an unknown token", gateway.ErrUnproven)
	}
	proof, err := q.server.provider.verify(q.Context(), q.settings.OIDC, token)
	if err != nil {
		return claimed, fmt.Errorf("%w: %w", gateway.ErrUnproven, err)
	}
	return proof, nil
}

// A provider is an OpenID provider, as far as it is known. The zero value is ready for use.
type provider struct {
	mu       sync.Mutex
	settings OIDC // of verifier
	verifier *oidc.IDTokenVerifier
	client   *http.Client

	discovery singleflight.Group
}

// verify returns the proof of a token.
func (p *provider) verify(ctx context.Context, o OIDC, token string) (gateway.Proof, error) {
	verifier, err := p.find(o)
	if err != nil {
		return gateway.Proof{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, providerTimeout)
	defer cancel()
	verified, err := verifier.Verify(ctx, token)
	if err != nil {
		return gateway.Proof{}, err
	}
	var claims map[string]any
	if err := verified.Claims(&claims); err != nil {
		return gateway.Proof{}, fmt.Errorf("the claims of the token: %w", err)
	}
	user, err := o.user(claims)
	if err != nil {
		return gateway.Proof{}, err
	}
	return gateway.Proof{User: user, Grant: auth.Grant{
		Permissions: identity.AllowAll(), Expires: verified.Expiry, RolePrincipals: o.principals(claims),
		Source: "api.oidc", Line: "api.oidc " + verified.Issuer + " " + verified.Subject,
	}}, nil
}

// find returns the verifier, and discovers the provider first if that has not succeeded yet
// (OpenID Connect Discovery 1.0, section 4). Requests that arrive meanwhile share the result:
// if they waited for their turns, tokens would keep all places for requests while the provider
// does not answer.
func (p *provider) find(o OIDC) (*oidc.IDTokenVerifier, error) {
	p.mu.Lock()
	verifier, known := p.verifier, p.settings == o
	if p.client == nil {
		p.client = &http.Client{Timeout: providerTimeout, Transport: &limitedTransport{rate.NewLimiter(rate.Every(providerInterval), providerBurst)}}
	}
	client := p.client
	p.mu.Unlock()
	if verifier != nil && known {
		return verifier, nil
	}
	found, err, _ := p.discovery.Do(fmt.Sprintf("%q", o), func() (any, error) {
		// The provider uses the client of this context for later requests, too.
		found, err := oidc.NewProvider(oidc.ClientContext(context.Background(), client), o.Issuer)
		if err != nil {
			return nil, fmt.Errorf("finding the OpenID provider: %w", err)
		}
		verifier := found.Verifier(&oidc.Config{ClientID: o.Audience})
		p.mu.Lock()
		defer p.mu.Unlock()
		p.verifier, p.settings = verifier, o
		return verifier, nil
	})
	if err != nil {
		return nil, err
	}
	return found.(*oidc.IDTokenVerifier), nil
}

// user returns the user that verified claims name.
func (o *OIDC) user(claims map[string]any) (string, error) {
	name, ok := claims[o.UserClaim].(string)
	if !ok {
		return "", fmt.Errorf("the token has no claim %s with a text", o.UserClaim)
	}
	if verified, _ := claims["email_verified"].(bool); o.UserClaim == "email" && !verified {
		return "", errors.New("the address in the claim email is not verified")
	}
	user, ok := strings.CutSuffix(name, o.UserSuffix)
	if !ok {
		return "", fmt.Errorf("the claim %s does not end in %s", o.UserClaim, o.UserSuffix)
	}
	if err := auth.CheckUser(user); err != nil {
		return "", fmt.Errorf("the claim %s: %w", o.UserClaim, err)
	}
	return user, nil
}

// principals returns the principals that verified claims have: a text, or a list of texts.
func (o *OIDC) principals(claims map[string]any) (principals []string) {
	switch value := claims[o.PrincipalsClaim].(type) {
	case string:
		return []string{value}
	case []any:
		for _, v := range value {
			if text, ok := v.(string); ok {
				principals = append(principals, text)
			}
		}
	}
	return principals
}

// A limitedTransport limits the requests to the provider, and the length of its answers.
type limitedTransport struct{ limit *rate.Limiter }

// RoundTrip implements [http.RoundTripper].
func (t *limitedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if !t.limit.Allow() {
		return nil, errors.New("too many requests to the OpenID provider")
	}
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, maxProviderAnswer), resp.Body}
	return resp, nil
}
