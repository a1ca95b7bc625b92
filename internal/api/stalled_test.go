package api

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

// TestStalledBodies: if the announced body of a request does not arrive, the connection is
// closed after any answer, because it is one of max_startups.
func TestStalledBodies(t *testing.T) {
	for name, request := range map[string]string{
		"a path":                 "POST /v1/bastions/alice HTTP/1.1",
		"no path":                "POST /v2 HTTP/1.1",
		"a public path":          "GET /v1/openapi.json HTTP/1.1",
		"all paths":              "OPTIONS * HTTP/1.1",
		"a chunked body":         "OPTIONS * HTTP/1.1\r\nTransfer-Encoding: chunked",
		"a body on confirmation": "POST /v1/bastions/alice HTTP/1.1\r\nExpect: 100-continue",
	} {
		if !strings.Contains(request, "chunked") {
			request += "\r\nContent-Length: 5"
		}
		for _, penalised := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, penalty %v", name, penalised), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					ta := newTestAPI(t, func(ta *testAPI) {
						ta.gateway.PerSourcePenalties = gateway.Penalties{AuthFail: time.Hour, Max: time.Hour, Min: time.Second, MaxSources4: 10, MaxSources6: 10}
					})
					if penalised {
						ta.as("alice", ta.root, "GET", "/v1/whoami")
					}
					nc, err := ta.ln.Dial()
					if err != nil {
						t.Fatal(err)
					}
					defer nc.Close()
					began := time.Now()
					nc.SetReadDeadline(began.Add(time.Hour))
					io.WriteString(nc, request+"\r\nHost: gateway.example\r\n\r\n")
					if _, err := io.Copy(io.Discard, nc); err != nil {
						t.Error(err)
					}
					if took := time.Since(began); took > headerTimeout {
						t.Errorf("the connection was closed after %v", took)
					}
				})
			})
		}
	}
}
