package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/console"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// A lockedBuffer is a log that several goroutines write.
type lockedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// newTestFleet returns the fleet as the gateway id sees it, without a table.
func newTestFleet(id string, cfg *config.Gateway, log *lockedBuffer) *fleet {
	d := &Daemon{id: id, log: slog.New(slog.NewTextHandler(log, nil))}
	d.cfg.Store(cfg)
	return newFleet(d)
}

// serveGateway serves a gateway with a console on the loopback interface, until the test
// ends, and returns its address.
func serveGateway(t *testing.T, f *fleet) string {
	t.Helper()
	srv := &gateway.Server{
		Settings: gateway.Settings{
			Options: f.d.cfg.Load().Options,
			Peer:    f.verify,
			Authorize: func(string, ssh.PublicKey, netip.Addr, time.Time) (auth.Grant, error) {
				return auth.Grant{}, errors.New("nobody's key")
			},
		},
		Log: f.d.log,
	}
	users := &console.Console{
		Gateway: srv, Log: f.d.log,
		Roles: func(id identity.Identity) ([]string, bool) { return nil, id.Permissions.Admin },
	}
	srv.Console = users.Serve
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, ln) }()
	t.Cleanup(func() { cancel(); <-served })
	return ln.Addr().String()
}

// TestRun logs in to another gateway's console, while keys are rotated, and through the PROXY
// protocol.
func TestRun(t *testing.T) {
	host, next, fleetKey, nextFleet := sshtest.NewKey(t), sshtest.NewKey(t), sshtest.NewKey(t), sshtest.NewKey(t)
	cfg := func(hosts, fleets []ssh.Signer, change ...func(*config.Gateway)) *config.Gateway {
		c := config.Defaults()
		c.HostKeys, c.FleetKeys, c.PerSourcePenalties = hosts, fleets, gateway.Penalties{}
		for _, f := range change {
			f(c)
		}
		return c
	}
	proxied := func(c *config.Gateway) { c.ProxyProtocolFrom = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} }
	one := func(k ssh.Signer) []ssh.Signer { return []ssh.Signer{k} }
	admin := identity.Identity{User: "root", ConnID: "r1", Permissions: identity.Permissions{Admin: true}}
	for _, tt := range []struct {
		name     string
		from, to *config.Gateway
		as       identity.Identity
		toID     string
		line     string
		want     string // of the answer
		err      string // of the error, or of the other gateway's log
	}{
		{name: "an administrator", from: cfg(one(host), one(fleetKey)), to: cfg(one(host), one(fleetKey)), as: admin, line: "users --json", want: "[]\n"},
		{name: "a user", from: cfg(one(host), one(fleetKey)), to: cfg(one(host), one(fleetKey)), as: identity.Identity{User: "alice", ConnID: "a1"}, line: "users --json", err: "users is for administrators."},
		{name: "a new fleet key here", from: cfg(one(host), []ssh.Signer{nextFleet, fleetKey}), to: cfg(one(host), one(fleetKey)), as: admin, line: "users --json", want: "[]\n"},
		{name: "a new fleet key there", from: cfg(one(host), one(fleetKey)), to: cfg(one(host), []ssh.Signer{nextFleet, fleetKey}), as: admin, line: "users --json", want: "[]\n"},
		{name: "another fleet key", from: cfg(one(host), one(nextFleet)), to: cfg(one(host), one(fleetKey)), as: admin, line: "users --json", err: "unable to authenticate"},
		{name: "a new host key here", from: cfg([]ssh.Signer{next, host}, one(fleetKey)), to: cfg(one(host), one(fleetKey)), as: admin, line: "users --json", want: "[]\n"},
		{name: "another host key", from: cfg(one(next), one(fleetKey)), to: cfg(one(host), one(fleetKey)), as: admin, line: "users --json", err: errForeignKey.Error()},
		{name: "another gateway at the address", from: cfg(one(host), one(fleetKey)), to: cfg(one(host), one(fleetKey)), as: admin, toID: "c", line: "users --json", err: "unable to authenticate"},
		{name: "behind balancers", from: cfg(one(host), one(fleetKey), proxied), to: cfg(one(host), one(fleetKey), proxied), as: admin, line: "users --json", want: "[]\n"},
		{name: "a command with a mistake", from: cfg(one(host), one(fleetKey)), to: cfg(one(host), one(fleetKey)), as: admin, line: "nonsense", err: `there is no command \"nonsense\"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			log := &lockedBuffer{}
			a, b := newTestFleet("a", tt.from, log), newTestFleet("b", tt.to, log)
			to := console.FleetGateway{ID: "b", Address: serveGateway(t, b)}
			if tt.toID != "" {
				to.ID = tt.toID
			}
			text, err := a.Run(t.Context(), to, tt.as, tt.line)
			if tt.err == "" && (err != nil || string(text) != tt.want) {
				t.Errorf("got %q, %v; want %q\n%s", text, err, tt.want, log)
			}
			if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("got %q, %v; want an error with %q", text, err, tt.err)
			}
			if foreign := errors.Is(err, errForeignKey); foreign != strings.Contains(log.String(), "WRONG HOST KEY") {
				t.Errorf("%v, and the log has\n%s", err, log)
			}
		})
	}
}

// TestRunSilent: a gateway that accepts connections and does nothing, as after SIGSTOP, holds
// Run until its context ends, and no longer.
func TestRunSilent(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cfg := config.Defaults()
	cfg.HostKeys, cfg.FleetKeys = []ssh.Signer{sshtest.NewKey(t)}, []ssh.Signer{sshtest.NewKey(t)}
	f := newTestFleet("a", cfg, &lockedBuffer{})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if text, err := f.Run(ctx, console.FleetGateway{ID: "b", Address: ln.Addr().String()}, identity.Identity{User: "root"}, "users"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %q, %v", text, err)
	}
	// Users that ask in vain do not keep administrators from asking.
	for range askedByUsers {
		if err := f.users.Acquire(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Run(ctx, console.FleetGateway{}, identity.Identity{User: "alice"}, "sessions"); err == nil || !strings.Contains(err.Error(), "waiting for other logins") {
		t.Errorf("beyond the limit: %v", err)
	}
	if !f.admins.TryAcquire(1) {
		t.Error("an administrator waits for users")
	}
}

func TestLimitedBuffer(t *testing.T) {
	b := &limitedBuffer{max: 5}
	for _, tt := range []struct {
		text string
		ok   bool
	}{{"abc", true}, {"de", true}, {"f", false}} {
		if _, err := b.Write([]byte(tt.text)); (err == nil) != tt.ok {
			t.Errorf("%q: %v", tt.text, err)
		}
	}
	if b.String() != "abcde" {
		t.Errorf("kept %q", b)
	}
}

// TestReachable: a listener at one address is reached there, one at all addresses at an
// address of this host that others can use.
func TestReachable(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "0.0.0.0:0", ":0"} {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		port := ln.Addr().(*net.TCPAddr).AddrPort().Port()
		got := reachable(ln.Addr())
		if addr == "127.0.0.1:0" {
			if got != ln.Addr().String() {
				t.Errorf("%s is reached at %s", ln.Addr(), got)
			}
			continue
		}
		if got == "" { // a host without a route
			continue
		}
		at, err := netip.ParseAddrPort(got)
		if err != nil || at.Port() != port || !at.Addr().IsGlobalUnicast() {
			t.Errorf("%s is reached at %s, %v", ln.Addr(), got, err)
		}
	}
	if got := reachable(&net.UnixAddr{Name: "/x", Net: "unix"}); got != "" {
		t.Errorf("a Unix socket is reached at %q", got)
	}
}
