package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// nonZero returns the counters that are not zero, as text.
func (s Stats) nonZero() map[string]uint64 {
	all := map[string]uint64{}
	for outcome, n := range s.Logins {
		all[outcome.Protocol+" "+outcome.Result] = n
	}
	for reason, n := range s.Rejected {
		all["rejected "+reason] = n
	}
	maps.DeleteFunc(all, func(_ string, n uint64) bool { return n == 0 })
	return all
}

// begunCall returns a call whose client has sent something.
func (gw *testGateway) begunCall(t *testing.T) *Call {
	client, k := gw.call("192.0.2.1")
	if err := readByte(t, client, k); err != nil {
		t.Fatal(err)
	}
	return k
}

// TestLoginResults counts one login of each result.
func TestLoginResults(t *testing.T) {
	undecided := func(string, ssh.PublicKey, netip.Addr, time.Time) (auth.Grant, error) {
		return auth.Grant{}, fmt.Errorf("%w: timeout", auth.ErrUndecided)
	}
	tests := []struct {
		name string
		do   func(t *testing.T, gw *testGateway)
		want string // the counter that is one; empty means that all are zero
	}{
		{"login", func(t *testing.T, gw *testGateway) {
			c, err := gw.connect(t.Context(), "alice", sshtest.NewKey(t), gw.alice)
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		}, "ssh ok"},
		{"wrong key", func(t *testing.T, gw *testGateway) { gw.connect(t.Context(), "alice", gw.bob) }, "ssh refused"},
		{"unknown user", func(t *testing.T, gw *testGateway) { gw.connect(t.Context(), "mallory", gw.bob) }, "ssh refused"},
		{"revoked user", func(t *testing.T, gw *testGateway) {
			gw.srv.Revoked = func(string, time.Time) error { return errors.New("revoked") }
			gw.connect(t.Context(), "alice", gw.alice)
		}, "ssh denied"},
		{"limit", func(t *testing.T, gw *testGateway) {
			gw.srv.MaxConnectionsPerUser = 1
			gw.srv.users = map[string]int{"alice": 1}
			gw.connect(t.Context(), "alice", gw.alice)
		}, "ssh denied"},
		{"no bastion", func(t *testing.T, gw *testGateway) {
			gw.fail = bastion.ErrCapacity
			gw.connect(t.Context(), "alice", gw.alice)
		}, "ssh no_bastion"},
		{"undecided", func(t *testing.T, gw *testGateway) {
			gw.srv.Authorize = undecided
			gw.connect(t.Context(), "alice", gw.alice)
		}, "ssh unavailable"},
		{"audit log closed", func(t *testing.T, gw *testGateway) {
			gw.auditTo(t)()
			gw.connect(t.Context(), "alice", gw.alice)
		}, "ssh unavailable"},
		{"no credential", func(t *testing.T, gw *testGateway) { gw.connect(t.Context(), "alice") }, "ssh incomplete"},
		{"grace time", func(t *testing.T, gw *testGateway) {
			near, served := gw.dialFrom(t.Context(), "192.0.2.1")
			io.WriteString(near, "SSH-2.0-x\r\n")
			go io.Copy(io.Discard, near)
			<-served
		}, "ssh incomplete"},
		{"left while the bastion started", func(t *testing.T, gw *testGateway) {
			gw.boot = time.Hour
			near, served := gw.dialFrom(t.Context(), "192.0.2.1")
			time.AfterFunc(time.Second, func() { near.Close() })
			loginOn(near, "alice", gw.alice)
			<-served
		}, "ssh incomplete"},
		{"health check", func(t *testing.T, gw *testGateway) {
			near, served := gw.dialFrom(t.Context(), "192.0.2.1")
			near.Close()
			<-served
		}, ""},
		{"call", func(t *testing.T, gw *testGateway) {
			k := gw.begunCall(t)
			defer k.Close()
			if _, err := k.Login(t.Context(), Proof{User: "alice", Key: gw.alice.PublicKey(), UserPresent: true, Once: once}); err != nil {
				t.Error(err)
			}
		}, "http ok"},
		{"call with a wrong key", func(t *testing.T, gw *testGateway) {
			k := gw.begunCall(t)
			defer k.Close()
			k.Login(t.Context(), Proof{User: "alice", Key: gw.bob.PublicKey(), UserPresent: true, Once: once})
		}, "http refused"},
		{"call without a code", func(t *testing.T, gw *testGateway) {
			gw.srv.SecondFactor = usedCode{}
			k := gw.begunCall(t)
			defer k.Close()
			k.Login(t.Context(), Proof{User: "alice", Key: gw.alice.PublicKey(), UserPresent: true, Once: once})
		}, "http incomplete"},
		{"call with a wrong code", func(t *testing.T, gw *testGateway) {
			gw.srv.SecondFactor = usedCode{}
			k := gw.begunCall(t)
			defer k.Close()
			k.Login(t.Context(), Proof{User: "alice", Key: gw.alice.PublicKey(), UserPresent: true, Once: once, Code: "123456"})
		}, "http refused"},
		{"call with a bad signature", func(t *testing.T, gw *testGateway) {
			k := gw.begunCall(t)
			defer k.Close()
			k.Refuse("alice", "curl", ErrClock)
		}, "http refused"},
		{"startups", func(t *testing.T, gw *testGateway) {
			gw.srv.MaxStartups = Startups{Start: 1, Rate: 100, Full: 1}
			gw.srv.startups.total = 1
			near, served := gw.dialFrom(t.Context(), "192.0.2.1")
			go io.Copy(io.Discard, near)
			<-served
		}, "rejected max_startups"},
		{"penalty", func(t *testing.T, gw *testGateway) {
			gw.srv.PerSourcePenalties = Penalties{AuthFail: time.Hour, Min: time.Second, Max: time.Hour}
			near, served := gw.dialFrom(t.Context(), "192.0.2.1")
			loginOn(near, "alice", gw.bob)
			<-served
			gw.srv.counters.logins[0][loginRefused].Store(0)
			near, served = gw.dialFrom(t.Context(), "192.0.2.1")
			go io.Copy(io.Discard, near)
			<-served
		}, "rejected penalty"},
		{"no PROXY header", func(t *testing.T, gw *testGateway) {
			gw.srv.ProxyProtocolFrom = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
			near, served := gw.dialFrom(t.Context(), "192.0.2.1")
			io.WriteString(near, "SSH-2.0-x\r\n")
			go io.Copy(io.Discard, near)
			<-served
		}, "rejected proxy_header"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newTestGateway(t)
				gw.srv.Console = plainConsole
				tt.do(t, gw)
				synctest.Wait()
				want := map[string]uint64{tt.want: 1}
				delete(want, "")
				if got := gw.srv.Stats().nonZero(); !maps.Equal(got, want) {
					t.Errorf("counted %v, want %v\n%s", got, want, gw.logged())
				}
			})
		})
	}
}

// TestStats counts connections, channels and bytes, also those of a connection that has
// ended. A stranger's and a client's words do not become keys.
func TestStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.Console = plainConsole
		silent, _ := gw.dialFrom(t.Context(), "192.0.2.1")
		go io.Copy(io.Discard, silent)
		console, err := gw.connect(t.Context(), "alice+ctl", gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		defer console.Close()
		c, err := gw.connect(t.Context(), "alice", gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		startShell(t, c)
		if _, _, err := c.OpenChannel("direct-tcpip", ssh.Marshal(struct {
			Host       string
			Port       uint32
			Origin     string
			OriginPort uint32
		}{"db", 5432, "127.0.0.1", 1})); err != nil {
			t.Fatal(err)
		}
		if _, _, err := c.OpenChannel("strange@example.com", nil); err != nil {
			t.Fatal(err)
		}
		if _, err := c.run("who"); err != nil {
			t.Fatal(err)
		}
		gw.connect(t.Context(), strings.Repeat("x", 100), gw.bob)
		synctest.Wait()
		want := "map[api:0 authenticating:1 console:1 relayed:1 starting:0] " +
			"map[auth-agent@openssh.com:0 direct-streamlocal@openssh.com:0 direct-tcpip:1 forwarded-streamlocal@openssh.com:0 forwarded-tcpip:0 other:1 session:1 x11:0] " +
			"0 10 4"
		got := func() string {
			s := gw.srv.Stats()
			return fmt.Sprint(s.Connections, s.Channels, s.FromClients, s.ToClients, s.Accepted)
		}
		if got := strings.ReplaceAll(got(), "]map", "] map"); got != want {
			t.Errorf("counted\n%s, want\n%s", got, want)
		}
		c.Close()
		synctest.Wait()
		if s := gw.srv.Stats(); s.ToClients != 10 || s.Channels["session"] != 0 || s.Connections["relayed"] != 0 {
			t.Errorf("after the end: %+v", s)
		}

		gw.boot = time.Hour
		near, _ := gw.dialFrom(context.Background(), "192.0.2.2")
		go loginOn(near, "bob", gw.bob)
		time.Sleep(time.Second)
		if n := gw.srv.Stats().Connections["starting"]; n != 1 {
			t.Errorf("%d connections wait for a bastion, want 1", n)
		}
		near.Close()
		silent.Close()
		synctest.Wait()
	})
}
