package gateway

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// once is the Once of a proof that is no replay.
func once(context.Context) error { return nil }

// call makes a call from an address, and returns the client's end.
func (gw *testGateway) call(ip string) (net.Conn, *Call) {
	near, far := sshtest.Pipe()
	return near, gw.srv.NewCall(context.Background(), addressed{far, &net.TCPAddr{IP: net.ParseIP(ip), Port: 4711}})
}

// readByte has the call read one byte that the client sends.
func readByte(t *testing.T, client io.Writer, k *Call) error {
	t.Helper()
	if _, err := client.Write([]byte("G")); err != nil {
		t.Fatal(err)
	}
	_, err := k.Read(make([]byte, 1))
	return err
}

// TestCallOfBalancer: a call has the client's address of a PROXY header, and the deadline that
// the HTTP server has set survives the reading of the header. Without a header it is rejected,
// without a text of SSH.
func TestCallOfBalancer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.ProxyProtocolFrom = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		client, k := gw.call("10.0.0.1")
		if err := k.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Write([]byte("PROXY TCP4 192.0.2.7 10.0.0.9 4711 443\r\n")); err != nil {
			t.Fatal(err)
		}
		if err := readByte(t, client, k); err != nil || k.Client() != netip.MustParseAddrPort("192.0.2.7:4711") {
			t.Errorf("%v, %v", k.Client(), err)
		}
		began := time.Now()
		if _, err := k.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != 20*time.Second {
			t.Errorf("read: %v after %v", err, time.Since(began))
		}
		k.Close()

		client, k = gw.call("10.0.0.1")
		if _, err := client.Write([]byte("GET / HTTP/1.1\r\n")); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Read(make([]byte, 1)); err == nil {
			t.Error("a balancer's connection without a header is served")
		}
		if text, _ := io.ReadAll(client); len(text) > 0 {
			t.Errorf("it is sent %q", text)
		}
		k.Close()
	})
}

// TestCallStartups: calls without a login are limited apart from connections over SSH, and a
// login ends that.
func TestCallStartups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.Console = plainConsole
		gw.srv.PerSourceMaxStartups = 2
		var open []*Call
		for i := range 4 {
			client, k := gw.call("192.0.2.1")
			if err := readByte(t, client, k); (err != nil) != (i >= 2) {
				t.Errorf("call %d: %v", i, err)
			}
			open = append(open, k)
		}
		near, _ := gw.dialFrom(t.Context(), "192.0.2.1")
		if c, err := loginOn(near, "alice", gw.alice); err != nil {
			t.Errorf("a login over SSH: %v", err)
		} else {
			c.Close()
		}
		proof := Proof{User: "alice", Key: gw.alice.PublicKey(), UserPresent: true, UserVerified: true, Once: once}
		if _, err := open[0].Login(t.Context(), proof); err != nil {
			t.Error(err)
		}
		client, k := gw.call("192.0.2.1")
		if err := readByte(t, client, k); err != nil {
			t.Errorf("after a login: %v", err)
		}
		for _, k := range append(open, k) {
			k.Close()
		}
	})
}

// TestCallClosed: a call that is closed before, during or after its login leaves nothing
// counted, and does not log in.
func TestCallClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.Console = plainConsole
		events := gw.auditTo(t)
		proof := Proof{User: "alice", Key: gw.alice.PublicKey(), UserPresent: true, UserVerified: true, Once: once}
		begin := func() *Call {
			client, k := gw.call("192.0.2.1")
			if err := readByte(t, client, k); err != nil {
				t.Fatal(err)
			}
			return k
		}
		k := begin()
		k.Close()
		if _, err := k.Login(t.Context(), proof); err == nil {
			t.Error("a closed call has logged in")
		}
		k = begin()
		during := proof
		during.Once = func(context.Context) error { k.Close(); return nil }
		if _, err := k.Login(t.Context(), during); err == nil {
			t.Error("a call that was closed during its login has logged in")
		}
		k = begin()
		if _, err := k.Login(t.Context(), proof); err != nil {
			t.Error(err)
		}
		k.Close()
		k.Close()
		// Never read.
		_, k = gw.call("192.0.2.1")
		k.Close()
		if _, err := k.Read(make([]byte, 1)); err == nil {
			t.Error("a closed call reads")
		}
		gw.srv.mu.Lock()
		defer gw.srv.mu.Unlock()
		if len(gw.srv.users) != 0 || len(gw.srv.conns) != 0 || gw.srv.callStartups.total != 0 {
			t.Errorf("left: users %v, %d connections, %d startups", gw.srv.users, len(gw.srv.conns), gw.srv.callStartups.total)
		}
		ends := 0
		for _, e := range events() {
			if e.Type == audit.End && e.User == "alice" {
				ends++
				if e.By != "client" || e.Reason != errUnanswered.Error() {
					t.Errorf("event %+v", e)
				}
			}
		}
		if ends != 1 {
			t.Errorf("%d ends of logins", ends)
		}
	})
}

// TestExplain: each reason of a failure has a code that docs/api.md lists, and the sentence of
// a login over SSH.
func TestExplain(t *testing.T) {
	page, err := os.ReadFile("../../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range problems {
		if !strings.Contains(string(page), "`"+row.code+"`") {
			t.Errorf("docs/api.md does not list %s", row.code)
		}
	}
	unknown := explain(errors.New("unknown"), "ref")
	if unknown.Status != 500 || unknown.Code != "failed" {
		t.Errorf("an unknown error: %+v", unknown)
	}
	for _, tt := range []struct {
		err    error
		status int
		code   string
		wait   time.Duration
	}{
		{&penaltyError{left: time.Minute}, 429, "penalty", time.Minute},
		{errPenaltiesFull, 429, "penalty", 0},
		{&RateError{time.Second}, 429, "too-many-requests", time.Second},
		{&bastion.TooOftenError{Wait: time.Hour}, 429, "too-many-starts", time.Hour},
		{&errLogLimit{time.Minute}, 429, "log-limit", time.Minute},
		{errTooManyConnections, 429, "too-many-connections", 0},
		// Nobody learns why a key is not accepted, nor that it cannot be looked up.
		{errors.Join(ErrUnproven, auth.ErrExpired), 401, "not-proven", 0},
		{errors.Join(ErrUnproven, auth.ErrUndecided), 401, "not-proven", 0},
		{auth.ErrUndecided, 503, "undecided", 0},
		{ErrReplayed, 401, "replayed", 0},
		{auth.ErrCode, 401, "code-wrong", 0},
		{auth.ErrCodeUsed, 401, "code-used", 0},
		{policy.ErrHours, 403, "hours", 0},
		{bastion.ErrNoProfile, 404, "no-profile", 0},
		{bastion.ErrTooMany, 409, "too-many-bastions", 0},
		{errAudit, 503, "audit", 0},
		{errDraining, 503, "draining", 0},
		{bastion.ErrTimeout, 504, "timeout", 0},
	} {
		p := explain(tt.err, "ref")
		if p.Status != tt.status || p.Code != tt.code || p.Wait != tt.wait {
			t.Errorf("%v: %+v", tt.err, p)
		}
		if p.Detail == unknown.Detail || p.Detail == "" {
			t.Errorf("%v has no sentence of its own", tt.err)
		}
	}
}
