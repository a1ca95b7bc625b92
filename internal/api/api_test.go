package api

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/console"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// withRoles makes root an administrator, and permits alice the default profile only.
func withRoles(ta *testAPI) {
	ta.gateway.Roles = policy.Roles{
		{Name: "users", Users: []string{"alice", "dora"}, Profiles: []string{"default"}, Permit: policy.PermitAll()},
		{Name: "admins", Users: []string{"root"}, Permit: policy.PermitAll(), Admin: true},
	}
}

// TestUsers: users act on their own bastions, and administrators on all, as on the console.
func TestUsers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, withRoles)
		want := func(got answer, status int, text string) {
			t.Helper()
			if got.status != status || !strings.Contains(got.body, text) {
				t.Errorf("got %v; want %d with %q", got, status, text)
			}
		}
		root := func(method, target string) answer { return ta.as("root", ta.root, method, target) }

		want(ta.do("GET", "/v1/whoami"), 200, `"user":"alice"`)
		want(ta.do("GET", "/v1/bastions"), 200, `{"bastions":[]}`)
		want(ta.do("GET", "/v1/bastions/alice"), 404, `"code":"not-running"`)
		want(ta.do("POST", "/v1/bastions/alice"), 200, `"ssh":{"command":"ssh -p 2222 alice@gateway.example"`)
		want(ta.do("POST", "/v1/bastions/alice+default"), 200, `"config":"Host bastion-alice\n  HostName gateway.example\n  Port 2222\n  User alice\n"`)
		want(ta.do("GET", "/v1/bastions/alice"), 200, `"task":"alice"`)
		want(root("GET", "/v1/bastions/alice"), 200, `"task":"arn:aws:ecs:`)
		want(ta.do("GET", "/v1/bastions?state=running&profile=default"), 200, `"profile":"default"`)
		want(ta.do("GET", "/v1/bastions?state=starting"), 200, `{"bastions":[]}`)
		want(ta.do("GET", "/v1/bastions?profile=big"), 200, `{"bastions":[]}`)
		want(ta.do("GET", "/v1/connections"), 200, `"client_version":"test/1"`)
		want(ta.do("GET", "/v1/events?last=1"), 200, `"command":"GET /v1/events?last=1"`)
		want(ta.do("HEAD", "/v1/whoami"), 200, "")
		want(root("POST", "/v1/bastions/dora+big"), 200, `"user":"dora+big"`)
		want(root("GET", "/v1/bastions"), 200, `"user":"dora"`)
		want(root("GET", "/v1/bastions?user=alice"), 200, `{"bastions":[{"user":"alice",`)
		want(root("GET", "/v1/connections?user=root"), 200, `"user":"root"`)

		// Another user's.
		for _, c := range []string{"GET /v1/bastions/dora+big", "POST /v1/bastions/dora", "DELETE /v1/bastions/dora+big", "GET /v1/bastions?user=dora", "GET /v1/connections?user=dora"} {
			method, target, _ := strings.Cut(c, " ")
			want(ta.do(method, target), 403, `"code":"admin-only"`)
		}
		// Not permitted by the role, or unknown, or malformed.
		want(ta.do("POST", "/v1/bastions/alice+big"), 403, `"code":"profile"`)
		want(root("POST", "/v1/bastions/root+huge"), 404, `"code":"no-profile"`)
		want(root("GET", "/v1/bastions/root+huge"), 404, `"code":"no-profile"`)
		want(root("GET", "/v1/bastions/..%2F..%2Fetc"), 400, `"code":"name"`)
		want(root("GET", "/v1/bastions/root+"), 400, `"code":"name"`)
		want(root("GET", "/v1/bastions/r%0Aoot"), 400, `"code":"name"`)
		want(ta.do("GET", "/v1/bastions?colour=red"), 400, `"code":"parameter"`)
		want(ta.do("GET", "/v1/bastions?state=blue"), 400, `"code":"parameter"`)
		want(ta.do("GET", "/v1/bastions?state=running&state=starting"), 400, `"code":"parameter"`)
		want(ta.do("GET", "/v1/bastions?%zz"), 400, `"code":"parameter"`)
		want(ta.do("GET", "/v1/events?last=0"), 400, `"code":"parameter"`)
		want(ta.do("GET", "/v1/nothing"), 404, `"code":"no-path"`)
		want(ta.do("GET", "/v1//whoami"), 404, `"code":"no-path"`)
		got := ta.do("PATCH", "/v1/bastions/alice")
		want(got, 405, `"code":"method"`)
		if allow := got.header.Get("Allow"); allow != "DELETE, GET, HEAD, POST" {
			t.Errorf("Allow: %s", allow)
		}
		got = ta.exchange(newCall("GET", "/v1/openapi.json").request(t, nil))
		want(got, 200, `"openapi": "3.1.0"`)
		if got.header.Get("Cache-Control") != "no-store" || got.header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("headers %v", got.header)
		}

		want(ta.do("DELETE", "/v1/bastions/alice"), 200, `{"user":"alice","profile":"default","connections":0}`)
		want(ta.do("DELETE", "/v1/bastions/alice"), 404, `"code":"not-running"`)
		want(root("DELETE", "/v1/bastions/dora+big"), 200, `"user":"dora"`)
		if want := []bastion.Owner{{User: "alice", Profile: "default"}, {User: "dora", Profile: "big"}}; !slices.Equal(ta.stopped, want) {
			t.Errorf("stopped %v, want %v", ta.stopped, want)
		}
		for _, id := range ta.dials {
			if p := id.Permissions; p.PTY || p.PortForwarding || p.Admin || p.AgentForwarding {
				t.Errorf("a start logs in with the permissions %+v", p)
			}
		}

		calls, refused := map[string]int{}, 0
		for _, e := range ta.events() {
			switch e.Type {
			case audit.Login:
				if e.Protocol != "http" || e.Key == "" || e.ClientVersion != "test/1" || e.AuthorizedBy == "" || e.Profile != "ctl" {
					t.Errorf("event %+v", e)
				}
			case audit.Exec:
				calls[e.User+" "+e.Command]++
			case audit.Refused:
				if e.Rule == "not an administrator" && e.User == "alice" {
					refused++
				}
			}
		}
		if calls["alice DELETE /v1/bastions/alice"] != 2 || calls["root POST /v1/bastions/dora+big"] != 1 || refused != 5 {
			t.Errorf("audited %v, and %d refused calls", calls, refused)
		}
	})
}

// TestStart: a start goes on while its client is away, is joined by later requests, and its
// failure is told.
func TestStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, func(ta *testAPI) { ta.boot = time.Minute })
		began := time.Now()
		got := ta.do("POST", "/v1/bastions/alice")
		if got.status != 202 || got.header.Get("Location") != "/v1/bastions/alice+default" || got.header.Get("Retry-After") != "4" || !strings.Contains(got.body, `"state":"starting"`) || !strings.Contains(got.body, `"usual_start_seconds":40`) || strings.Contains(got.body, "ssh") {
			t.Errorf("%v %v", got, got.header)
		}
		if took := time.Since(began); took != startWait {
			t.Errorf("answered after %v", took)
		}
		if got := ta.do("GET", "/v1/bastions/alice"); got.status != 200 || !strings.Contains(got.body, `"state":"starting"`) {
			t.Errorf("%v", got)
		}
		wait := newCall("POST", "/v1/bastions/alice")
		wait.header.Set("Prefer", "respond-async, wait=600")
		if got = ta.send(wait, ta.alice); got.status != 200 || got.header.Get("Preference-Applied") != "wait" || time.Since(began) != time.Minute {
			t.Errorf("%v after %v", got, time.Since(began))
		}
		if len(ta.dials) != 1 {
			t.Errorf("%d dials", len(ta.dials))
		}
		wait = newCall("POST", "/v1/bastions/alice")
		wait.header.Set("Prefer", "wait=soon")
		if got = ta.send(wait, ta.alice); got.status != 400 {
			t.Errorf("%v", got)
		}

		// A client that leaves.
		nc, err := ta.ln.Dial()
		if err != nil {
			t.Fatal(err)
		}
		leaves := newCall("POST", "/v1/bastions/alice+big")
		leaves.header.Set("Prefer", "wait=600")
		if err := leaves.request(t, ta.alice).Write(nc); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		nc.Close()
		time.Sleep(time.Minute)
		if got = ta.do("GET", "/v1/bastions/alice+big"); got.status != 200 || !strings.Contains(got.body, `"state":"running"`) {
			t.Errorf("%v", got)
		}

		// A start that fails.
		ta.do("DELETE", "/v1/bastions/alice")
		ta.mu.Lock()
		ta.fail = errors.Join(bastion.ErrCapacity, errors.New("arn:secret"))
		ta.mu.Unlock()
		if got = ta.do("POST", "/v1/bastions/alice"); got.status != 202 {
			t.Errorf("%v", got)
		}
		time.Sleep(2 * time.Minute)
		got = ta.do("GET", "/v1/bastions/alice")
		if got.status != 404 || !strings.Contains(got.detail(), "The last start has failed: AWS has no capacity") || strings.Contains(got.body, "arn:") {
			t.Errorf("%v", got)
		}
		wait = newCall("POST", "/v1/bastions/alice")
		wait.header.Set("Prefer", "wait=100")
		if got = ta.send(wait, ta.alice); got.status != 503 || got.code() != "capacity" || !strings.Contains(got.detail(), "(Reference: ") {
			t.Errorf("%v", got)
		}
		time.Sleep(failureLife + time.Second)
		if got = ta.do("GET", "/v1/bastions/alice"); got.status != 404 || strings.Contains(got.detail(), "failed") {
			t.Errorf("%v", got)
		}
		if !strings.Contains(ta.logged(), `msg="no bastion for user"`) || !strings.Contains(ta.logged(), "arn:secret") {
			t.Error("the operator's log has no reason")
		}
	})
}

// TestStartAndDrain: a drain ends the wait for a bastion, and no client is left without an
// answer.
func TestStartAndDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, func(ta *testAPI) { ta.boot = time.Hour })
		got := make(chan answer)
		go func() {
			wait := newCall("POST", "/v1/bastions/alice")
			wait.header.Set("Prefer", "wait=600")
			got <- ta.send(wait, ta.alice)
		}()
		time.Sleep(time.Second)
		began := time.Now()
		done := make(chan struct{})
		go func() { ta.events(); close(done) }() // ends the server
		if got := <-got; got.status != 202 || time.Since(began) > time.Second {
			t.Errorf("%v after %v", got, time.Since(began))
		}
		<-done
		if _, err := ta.ln.Dial(); err == nil {
			t.Error("the listener is open")
		}
	})
}

// TestNames: a signature is accepted for the names of the gateway only.
func TestNames(t *testing.T) {
	with := func(names ...string) *Options { return &Options{Names: names} }
	tls := &Options{Certificate: testCertificate(t, "gateway.example", "*.apps.example", "192.0.2.7")}
	for _, tt := range []struct {
		options *Options
		host    string
		want    bool
	}{
		{with("gateway.example"), "gateway.example", true},
		{with("gateway.example"), "Gateway.Example:8443", true},
		{with("gateway.example"), "evil.example", false},
		{with("gateway.example"), "127.0.0.1", false},
		{with("2001:db8::1"), "[2001:db8::1]:8443", true},
		{with(), "127.0.0.1:80", true},
		{with(), "[::1]:80", true},
		{with(), "[::1]", true},
		{with(), "localhost", true},
		{with(), "gateway.example", false},
		{with(), "", false},
		{tls, "gateway.example:8443", true},
		{tls, "a.apps.example", true},
		{tls, "192.0.2.7:1", true},
		{tls, "192.0.2.8:1", false},
		{tls, "localhost", false},
		{tls, "evil.example", false},
		{tls, "", false},
	} {
		if got := tt.options.named(tt.host); got != tt.want {
			t.Errorf("%v, %q: %t", tt.options.Names, tt.host, got)
		}
	}
}

// TestSSHAddress: users are told the configured address, or the host that they know.
func TestSSHAddress(t *testing.T) {
	for _, tt := range []struct{ configured, request, host, port string }{
		{":2222", "gateway.example:8443", "gateway.example", "2222"},
		{":22", "gateway.example", "gateway.example", "22"},
		{":22", "[2001:db8::1]:8443", "2001:db8::1", "22"},
		{"ssh.example:22", "gateway.example:8443", "ssh.example", "22"},
	} {
		host, port, err := (&Options{SSHAddress: tt.configured}).sshAddress(tt.request)
		if err != nil || host != tt.host || port != tt.port {
			t.Errorf("%v: %s %s %v", tt, host, port, err)
		}
	}
}

// TestOpenAPI compares openapi.json with the routes, and its schemas with the structs.
func TestOpenAPI(t *testing.T) {
	var doc struct {
		Paths map[string]map[string]struct {
			OperationID string `json:"operationId"`
			Parameters  []struct{ Name, In string }
		}
		Components struct {
			Schemas map[string]struct {
				Properties map[string]any
				Required   []string
			}
		}
	}
	// The parameters of a path are a list, and not a method.
	var raw map[string]any
	if err := json.Unmarshal(openAPI, &raw); err != nil {
		t.Fatal(err)
	}
	for _, path := range raw["paths"].(map[string]any) {
		delete(path.(map[string]any), "parameters")
	}
	text, _ := json.Marshal(raw)
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	described := 0
	for _, methods := range doc.Paths {
		described += len(methods)
	}
	if described != len(routes) {
		t.Errorf("%d operations, and %d routes", described, len(routes))
	}
	for _, route := range routes {
		method, path, _ := strings.Cut(route.pattern, " ")
		operation, ok := doc.Paths[path][strings.ToLower(method)]
		if !ok {
			t.Errorf("%s is not described", route.pattern)
		}
		var params []string
		for _, p := range operation.Parameters {
			if p.In == "query" {
				params = append(params, p.Name)
			}
		}
		if !slices.Equal(params, route.params) {
			t.Errorf("%s: parameters %v, want %v", route.pattern, params, route.params)
		}
	}
	for name, value := range map[string]any{
		"Problem": problemJSON{}, "Login": console.Login{}, "Bastion": Bastion{}, "SSH": SSH{}, "HostKey": HostKey{},
		"Stopped": console.Stopped{}, "Connection": connection{}, "Channel": console.Channel{}, "Event": console.Event{},
	} {
		schema := doc.Components.Schemas[name]
		fields, optional := jsonFields(reflect.TypeOf(value))
		for _, field := range fields {
			if schema.Properties[field] == nil {
				t.Errorf("%s.%s is not described", name, field)
			}
		}
		for field := range schema.Properties {
			if !slices.Contains(fields, field) {
				t.Errorf("%s.%s does not exist", name, field)
			}
		}
		for _, field := range schema.Required {
			if slices.Contains(optional, field) {
				t.Errorf("%s.%s may be absent", name, field)
			}
		}
	}
}

// jsonFields returns the names of a struct's fields in JSON, and those that may be absent.
func jsonFields(of reflect.Type) (names, optional []string) {
	for field := range of.Fields() {
		if field.Anonymous {
			more, absent := jsonFields(field.Type)
			names, optional = append(names, more...), append(optional, absent...)
			continue
		}
		name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
		if name == "-" || name == "" {
			continue
		}
		names = append(names, name)
		if options != "" {
			optional = append(optional, name)
		}
	}
	return names, optional
}

// TestSlowClients: a client that does not send its header is disconnected, and one source
// cannot have many such connections.
func TestSlowClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, func(ta *testAPI) { ta.gateway.PerSourceMaxStartups = 3 })
		var open []net.Conn
		for range 5 {
			nc, err := ta.ln.Dial()
			if err != nil {
				t.Fatal(err)
			}
			nc.Write([]byte("GET /v1/whoami HTTP/1.1\r\nHost: x\r\n")) // it may be closed
			open = append(open, nc)
		}
		synctest.Wait()
		ended := 0
		for _, nc := range open {
			nc.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := nc.Read(make([]byte, 1)); err != nil && !isTimeout(err) {
				ended++
			}
		}
		if ended != 2 {
			t.Errorf("%d of 5 connections were rejected, want 2", ended)
		}
		began := time.Now()
		for _, nc := range open {
			nc.SetReadDeadline(time.Time{})
			for {
				if _, err := nc.Read(make([]byte, 100)); err != nil {
					break
				}
			}
		}
		if took := time.Since(began); took > headerTimeout {
			t.Errorf("the connections were closed after %v", took)
		}
		synctest.Wait()
		if got := ta.do("GET", "/v1/whoami"); got.status != 200 {
			t.Errorf("afterwards: %v", got)
		}
	})
}

func isTimeout(err error) bool {
	timeout := net.Error(nil)
	return errors.As(err, &timeout) && timeout.Timeout()
}

// TestLimits: a body, a large header, too many requests of a user at once.
func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, func(ta *testAPI) { ta.boot = time.Hour; ta.gateway.MaxConnectionsPerUser = 2 })
		body := newCall("POST", "/v1/bastions/alice")
		body.body = strings.NewReader("{}")
		if got := ta.send(body, ta.alice); got.status != 413 || got.code() != "body" {
			t.Errorf("a body: %v", got)
		}
		body = newCall("POST", "/v1/bastions/alice")
		body.forge = func(r *http.Request) {
			r.TransferEncoding, r.ContentLength = []string{"chunked"}, -1
			r.Body = http.NoBody
		}
		body.body = struct{ *strings.Reader }{strings.NewReader("{}")}
		if got := ta.send(body, ta.alice); got.status != 413 {
			t.Errorf("a body of unknown length: %v", got)
		}
		large := newCall("GET", "/v1/whoami")
		large.header.Set("X", strings.Repeat("x", 2*maxHeader))
		if got := ta.send(large, ta.alice); got.status != 431 {
			t.Errorf("a large header: %v", got)
		}
		// A body that never ends is not read.
		nc, err := ta.ln.Dial()
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		nc.Write([]byte("POST /v1/bastions/alice HTTP/1.1\r\nHost: gateway.example\r\nContent-Length: 1000000\r\n\r\nx"))
		for {
			if _, err := nc.Read(make([]byte, 1024)); err != nil {
				break
			}
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("a body that does not arrive holds the connection for %v", took)
		}
		if len(ta.dials) != 0 {
			t.Error("a bastion was dialled")
		}
		// One request on each connection.
		if nc, err = ta.ln.Dial(); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			newCall("GET", "/v1/whoami").request(t, ta.alice).Write(nc) // it may be closed
		}
		if text, _ := io.ReadAll(nc); strings.Count(string(text), "HTTP/1.1 200 OK") != 1 || !strings.Contains(string(text), "Connection: close") {
			t.Errorf("two requests on one connection: %q", text)
		}

		time.Sleep(time.Second) // the server closes answered connections after half a second
		for range 2 {
			go func() {
				wait := newCall("POST", "/v1/bastions/alice")
				wait.header.Set("Prefer", "wait=60")
				if got := ta.send(wait, ta.alice); got.status != 202 {
					t.Errorf("a request that waits: %v", got)
				}
			}()
		}
		synctest.Wait()
		if got := ta.do("GET", "/v1/whoami"); got.status != 429 || got.code() != "too-many-connections" {
			t.Errorf("a third request: %v", got)
		}
		if got := ta.as("root", ta.root, "GET", "/v1/whoami"); got.status != 200 {
			t.Errorf("another user's: %v", got)
		}
		time.Sleep(2 * time.Minute)
		if got := ta.do("GET", "/v1/whoami"); got.status != 200 {
			t.Errorf("afterwards: %v", got)
		}
	})
}

// TestPanic: a panic ends one request, which is answered.
func TestPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, func(ta *testAPI) { ta.server.Bastions = nil })
		if got := ta.do("GET", "/v1/bastions"); got.status != 500 || got.code() != "failed" || !strings.Contains(got.detail(), "The request has failed.") {
			t.Errorf("%v", got)
		}
		if got := ta.do("POST", "/v1/bastions/alice"); got.status != 500 {
			t.Errorf("%v", got)
		}
		if got := ta.do("GET", "/v1/whoami"); got.status != 200 {
			t.Errorf("%v", got)
		}
		if n := strings.Count(ta.logged(), "msg=panic"); n < 2 {
			t.Errorf("%d panics in the log", n)
		}
	})
}

// TestRevoked: if the key of a request is removed, the request ends.
func TestRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, func(ta *testAPI) { ta.boot = time.Hour })
		got := make(chan answer)
		go func() {
			wait := newCall("POST", "/v1/bastions/alice")
			wait.header.Set("Prefer", "wait=600")
			got <- ta.send(wait, ta.alice)
		}()
		time.Sleep(time.Second)
		removeKeys(t, ta, "alice")
		began := time.Now()
		if got := <-got; got.status != 0 || time.Since(began) > 20*time.Second {
			t.Errorf("%v after %v", got, time.Since(began))
		}
		if got := ta.do("GET", "/v1/whoami"); got.status != 401 {
			t.Errorf("%v", got)
		}
	})
}

// TestTLS answers requests over TLS, with the certificate of the last reload.
func TestTLS(t *testing.T) {
	first, second := testCertificate(t, "gateway.example"), testCertificate(t, "gateway.example")
	ta := newTestAPI(t, func(ta *testAPI) { ta.server.Names, ta.server.Certificate = nil, first })
	get := func() (answer, []byte) {
		t.Helper()
		return ta.overTLS(newCall("GET", "/v1/whoami").request(t, ta.alice))
	}
	if got, shown := get(); got.status != 200 || !slices.Equal(shown, first.Certificate[0]) {
		t.Errorf("%v", got)
	}
	next := ta.server.Settings
	next.Certificate = second
	ta.server.Reload(next)
	if got, shown := get(); got.status != 200 || !slices.Equal(shown, second.Certificate[0]) {
		t.Errorf("after a reload: %v", got)
	}
	// Without TLS there is no answer with data.
	if got := ta.do("GET", "/v1/whoami"); got.status == 200 {
		t.Errorf("without TLS: %v", got)
	}
	sshtest.Eventually(t, "the end of both logins", func() bool { return strings.Count(ta.logged(), "answered with status 200") == 2 })
}
