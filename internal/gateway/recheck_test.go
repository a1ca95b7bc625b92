package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// TestRecheck: only logins that are no longer permitted end.
func TestRecheck(t *testing.T) {
	gone := errors.New("alice:1 is gone")
	unknown := fmt.Errorf("the folder cannot be read: %w", auth.ErrUndecided)
	expired := fmt.Errorf("the key %w", auth.ErrExpired)
	tests := []struct {
		name    string
		answers []error // of Recheck in turn; the last one repeats
		ends    time.Duration
		says    string
	}{
		{name: "good", answers: []error{nil}},
		{name: "gone", answers: []error{nil, gone}, ends: 8 * time.Second, says: "The key you logged in with is no longer accepted, so this connection ends."},
		{name: "gone for a moment", answers: []error{gone, gone, nil, gone, gone, nil}},
		{name: "not known", answers: []error{nil, unknown}},
		{name: "not known for a moment", answers: []error{gone, unknown, gone, unknown, gone}, ends: 10 * time.Second, says: "is no longer accepted"},
		{name: "expired", answers: []error{nil, nil, expired}, ends: 6 * time.Second, says: "The key or certificate you logged in with has expired"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newTestGateway(t)
				asked := 0
				gw.srv.Recheck = func(user string, key ssh.PublicKey, _ netip.Addr, _ time.Time, g auth.Grant) (auth.Grant, error) {
					if user == "bob" {
						return g, nil
					}
					if user != "alice" || string(key.Marshal()) != string(gw.alice.PublicKey().Marshal()) {
						t.Errorf("Recheck for %s", user)
					}
					err := tt.answers[min(asked, len(tt.answers)-1)]
					asked++
					return g, err
				}
				ctx, cancel := context.WithCancel(t.Context())
				var loop sync.WaitGroup
				loop.Go(func() { gw.srv.recheckLogins(ctx) })
				defer loop.Wait()
				defer cancel()

				began := time.Now()
				c, err := gw.connect(t.Context(), "alice", gw.alice)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				bob, err := gw.connect(t.Context(), "bob", gw.bob)
				if err != nil {
					t.Fatal(err)
				}
				defer bob.Close()
				told := startShell(t, c)
				quiet := startShell(t, bob)

				ended := make(chan time.Duration, 1)
				go func() { c.Wait(); ended <- time.Since(began) }()
				time.Sleep(time.Minute)
				synctest.Wait()
				select {
				case after := <-ended:
					if tt.ends == 0 || after < tt.ends || after > tt.ends+time.Second {
						t.Errorf("it ended after %v, want %v", after, tt.ends)
					}
				default:
					if tt.ends != 0 {
						t.Error("it goes on")
					}
				}
				if got := told(); !strings.Contains(got, tt.says) || tt.says == "" && got != "" {
					t.Errorf("told %q, want %q", got, tt.says)
				}
				if out, err := bob.run("who"); err != nil || out != "I am bob" || quiet() != "" {
					t.Errorf("bob's login: %q, %v, told %q", out, err, quiet())
				}
				cause := tt.answers[len(tt.answers)-1]
				gw.mu.Lock()
				defer gw.mu.Unlock()
				if logged := strings.Contains(gw.log.String(), "login is no longer permitted"); logged != (tt.ends != 0) || logged && !strings.Contains(gw.log.String(), cause.Error()) {
					t.Errorf("logged\n%s", gw.log.String())
				}
			})
		})
	}
}

// TestReload: logins that the new settings permit go on with their old settings, the others
// end, and new logins have the new settings.
func TestReload(t *testing.T) {
	all := policy.PermitAll()
	noForwards := all
	noForwards.PortForwarding = false
	role := func(permit policy.Permit, users ...string) policy.Roles {
		return policy.Roles{{Name: "staff", Users: users, Permit: permit}}
	}
	tests := []struct {
		name          string
		before, after policy.Roles
		ends          bool
		because       string
	}{
		{name: "the same", before: role(all, "alice", "bob"), after: role(all, "alice", "bob")},
		{name: "no roles any more", before: role(noForwards, "alice", "bob")},
		{name: "wider", before: role(noForwards, "alice", "bob"), after: role(all, "alice", "bob")},
		{name: "removed from the role", before: role(all, "alice", "bob"), after: role(all, "bob"), ends: true, because: policy.ErrNoRole.Error()},
		{name: "the first roles", after: role(all, "bob"), ends: true, because: policy.ErrNoRole.Error()},
		{name: "narrower", before: role(all, "alice", "bob"), after: append(role(noForwards, "alice"), role(all, "bob")...), ends: true, because: policy.ErrNarrowed.Error()},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newTestGateway(t)
				gw.srv.Roles = tt.before
				ctx, cancel := context.WithCancel(t.Context())
				var loop sync.WaitGroup
				loop.Go(func() { gw.srv.recheckLogins(ctx) })
				defer loop.Wait()
				defer cancel()
				c, err := gw.connect(t.Context(), "alice", gw.alice)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				told := startShell(t, c)
				time.Sleep(10 * time.Second)

				next := gw.srv.Settings
				next.Roles, next.Banner = tt.after, "new"
				gw.srv.Reload(next)
				ended := make(chan struct{})
				go func() { c.Wait(); close(ended) }()
				time.Sleep(10 * time.Second)
				synctest.Wait()
				select {
				case <-ended:
					if !tt.ends {
						t.Error("it has ended")
					}
				default:
					if tt.ends {
						t.Error("it goes on")
					}
				}
				if got := told(); tt.ends != strings.Contains(got, roleEndedMessage) {
					t.Errorf("told %q", got)
				}
				gw.mu.Lock()
				if log := gw.log.String(); !strings.Contains(log, tt.because) {
					t.Errorf("logged\n%s", log)
				}
				gw.mu.Unlock()
				bob, err := gw.connect(t.Context(), "bob", gw.bob)
				if err != nil {
					t.Fatal(err)
				}
				defer bob.Close()
				if got := bob.shown(); got != "new" {
					t.Errorf("bob's banner is %q", got)
				}
			})
		})
	}
}
