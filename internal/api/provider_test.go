package api

import (
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestSilentProvider: requests with tokens do not wait one after the other for an OpenID
// provider that does not answer, because they keep the slots of others' requests. If they
// waited for a mutex, this test would not end, because its clock would stand still.
func TestSilentProvider(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, func(ta *testAPI) {
			ta.server.OIDC = OIDC{Issuer: "https://issuer.example", Audience: "sallyport", UserClaim: "sub"}
			ta.server.provider.client = &http.Client{Timeout: providerTimeout, Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
				<-r.Context().Done()
				return nil, r.Context().Err()
			})}
		})
		began := time.Now()
		var asking sync.WaitGroup
		for range 5 {
			asking.Go(func() {
				if got := ta.withToken("a.b.c", "GET", "/v1/whoami"); got.status != 401 {
					t.Errorf("%v", got)
				}
			})
		}
		asking.Wait()
		if took := time.Since(began); took > providerTimeout+time.Second {
			t.Errorf("the last request was answered after %v", took)
		}
	})
}
