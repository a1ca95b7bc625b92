package console

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// TestRevoke revokes a user at the only gateway.
func TestRevoke(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		for _, tt := range []struct {
			user, line string
			status     int
			out, err   string // substrings
		}{
			{"root", "revoked", 0, "USER  FOR  UNTIL (UTC)  BY  REASON\n", ""},
			{"root", "revoked --json", 0, "[]\n", ""},
			{"alice", "revoke bob --yes", 1, "", "for administrators"},
			{"alice", "permit bob", 1, "", "for administrators"},
			{"alice", "revoked", 1, "", "for administrators"},
			{"root", "revoke bob", 2, "", "add --yes"},
			{"root", "revoke --yes", 2, "", "usage: revoke USER"},
			{"root", "revoke bob+big --yes", 2, "", "cannot be the name of a user"},
			{"root", "revoke ../bob --yes", 2, "", "cannot be the name of a user"},
			{"root", "revoke root --yes", 1, "", "You cannot revoke your own access"},
			{"root", "revoke bob --for --yes", 2, "", "--for needs a duration like"},
			{"root", "revoke bob --for 10s --yes", 2, "", "of at least a minute"},
			{"root", "revoke bob --for 9999d --yes", 2, "", "--for needs a duration like"},
			{"root", "revoke bob --reason --yes", 2, "", "--reason needs a text"},
			{"root", "revoke bob --reason " + strings.Repeat("x", maxReason+1), 2, "", "--reason needs a text"},
			{"root", "stop bob --stop", 2, "", "no option"},
			{"root", "permit bob", 1, "", "The access of bob is not revoked."},
			{"root", "revoke bob --for 1h --reason lost  laptop --yes --json", 0, `{"user":"bob","by":"root","reason":"lost laptop","since":"2000-01-01T00:00:`, ""},
			{"root", "revoked", 0, "  root  lost laptop\n", ""},
			{"root", "revoked carol --json", 0, "[]\n", ""},
			{"root", "revoke bob --for 2d --yes", 0, "Logins of bob are refused until 2000-01-03 00:00:", ""},
			{"root", "revoke bob --yes", 0, "Logins of bob are refused, and her connections end within seconds.\n", ""},
			{"root", "revoked bob --json", 0, `"until":null}]`, ""},
			{"root", "permit bob", 0, "The user bob may log in again, with the keys and roles that she has.\n", ""},
			{"root", "revoked --json", 0, "[]\n", ""},
			{"root", "revoke bob --for 1m --yes", 0, "", ""},
		} {
			out, errs, status := tc.run(tt.user, tt.line)
			if status != tt.status || !strings.Contains(out, tt.out) || !strings.Contains(errs, tt.err) || (errs != "") != (status != 0) {
				t.Errorf("%s: %s: status %d, want %d\nstdout %q\n  want %q\nstderr %q\n  want %q", tt.user, tt.line, status, tt.status, out, tt.out, errs, tt.err)
			}
		}
		// The minute is over.
		time.Sleep(time.Minute)
		if out, _, _ := tc.run("root", "revoked --json"); out != "[]\n" {
			t.Errorf("a minute later: %s", out)
		}
		bob, _ := tc.work("bob")
		bob.Close()
	})
}

// TestRevokeStop: with --stop, the user's bastions end, too; an error of one does not spare the
// others.
func TestRevokeStop(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		one, _ := tc.work("bob")
		two, _ := tc.work("bob+big")
		defer one.Close()
		defer two.Close()
		tc.stopErr = errors.New("arn:aws:ecs")
		if out, errs, status := tc.run("root", "revoke bob --stop --yes"); status != 1 || !strings.Contains(out, "Logins of bob are refused") ||
			errs != "Not all bastions of bob were stopped. Try again with stop in a minute.\n" {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
		tc.stopErr = nil
		if out, errs, status := tc.run("root", "revoke bob --stop --yes"); status != 0 || errs != "" {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
		if got := strings.Join(tc.stopped, ", "); got != "bob+big revoked by root on the console, bob+default revoked by root on the console" {
			t.Errorf("stopped %s", got)
		}
	})
}

// failing is a store that cannot be reached.
type failing struct{}

func (failing) Revoked(context.Context) (map[string]string, error) {
	return nil, errors.New("arn:aws:dynamodb")
}
func (failing) SetRevoked(context.Context, string, string) error {
	return errors.New("arn:aws:dynamodb")
}

// TestRevokeUnstored: without the store, nothing is revoked, and the administrator is told.
func TestRevokeUnstored(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		tc.revokedIn(failing{})
		for line, want := range map[string]string{
			"revoke bob --yes": "so nothing was changed",
			"permit bob":       "so nothing was changed",
			"revoked":          "so this is an earlier one",
		} {
			if out, errs, status := tc.run("root", line); status != 1 || !strings.Contains(errs, want) || strings.Contains(errs, "arn:") {
				t.Errorf("%s: status %d, %q, %q", line, status, out, errs)
			}
		}
		bob, _ := tc.work("bob")
		bob.Close()
	})
}

// TestFleetRevoke: a revocation reaches the other gateways at once. One that does not answer is
// named.
func TestFleetRevoke(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTestFleet(t, "a", "b", "c")
		defer f.end()
		a := f.at["a"]
		revokedAt := func() (ids string) {
			for _, id := range []string{"a", "b", "c"} {
				if f.at[id].server.Revoked("bob", time.Now()) != nil {
					ids += id
				}
			}
			return ids
		}
		if out, errs, status := a.run("root", "revoke bob --yes"); status != 0 || errs != "" || revokedAt() != "abc" {
			t.Errorf("status %d, %q, %q; revoked at %s", status, out, errs, revokedAt())
		}
		if out, _, status := f.at["c"].run("root", "revoked"); status != 0 || !strings.Contains(out, "bob") {
			t.Errorf("c lists %q", out)
		}
		if out, errs, status := f.at["c"].run("root", "permit bob"); status != 0 || errs != "" || revokedAt() != "" {
			t.Errorf("status %d, %q, %q; revoked at %s", status, out, errs, revokedAt())
		}
		f.answer["b"] = stopped
		f.answer["c"] = func(context.Context, string) ([]byte, error) { return []byte("[]"), nil }
		out, errs, status := a.run("root", "revoke bob --yes --json")
		if status != 1 || !strings.Contains(out, `"unanswered":["b","c"]}`) ||
			errs != "Gateway b did not answer: it follows within a minute, if it reaches the table.\nGateway c has not taken this over: it follows within a minute, if it reaches the table.\n" {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
		f.answer["b"], f.answer["c"] = nil, nil
		// A gateway asks for the revoked users only for an administrator.
		if text, err := f.run("b", identity.Peer{Gateway: "a", User: "root", ConnID: "r1"}, "revoked --json"); err == nil {
			t.Errorf("a user's gateway reads %s", text)
		}
		for _, line := range []string{"revoke carol --yes", "permit bob"} {
			if text, err := f.run("b", identity.Peer{Gateway: "a", User: "root", ConnID: "r1", Admin: true}, line); err == nil || !strings.Contains(err.Error(), "Gateways may not run") {
				t.Errorf("%s for a gateway: %s, %v", line, text, err)
			}
		}
	})
}
