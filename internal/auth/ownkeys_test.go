package auth

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

// selfService returns Keys with a folder for users' own keys.
func selfService(t *testing.T, files ...string) *Keys {
	t.Helper()
	k := &Keys{Dir: keysDir(t, files...), SelfService: filepath.Join(t.TempDir(), "keys.d")}
	if err := k.MakeOwn(); err != nil {
		t.Fatal(err)
	}
	return k
}

func commit(OwnKey) error { return nil }

func (k *Keys) mustAdd(t *testing.T, with ssh.PublicKey, line string) {
	t.Helper()
	if _, err := k.AddOwn("alice", ssh.FingerprintSHA256(with), line, home, today, commit); err != nil {
		t.Fatalf("adding %s: %v", line, err)
	}
}

// TestOwnKeyHasNoMoreThanItsParent: whatever becomes of the key that a key was
// added with becomes of that, too.
func TestOwnKeyHasNoMoreThanItsParent(t *testing.T) {
	t.Parallel()
	parent, own, other := edKey(1), edKey(2), edKey(3)
	tests := []struct {
		name      string
		operator  string // the operator's file when the key logs in; empty: it is removed
		line      string // before the own key
		revoked   ssh.PublicKey
		wantErr   string
		wantGrant func(Grant) bool
	}{
		{name: "plain", operator: authorized(parent), wantGrant: func(g Grant) bool { return g.PTY && g.PortForwarding && g.Key == ssh.FingerprintSHA256(own) }},
		{name: "the file is gone", wantErr: "the key it was added with"},
		{name: "the parent is gone", operator: authorized(other), wantErr: "the key it was added with"},
		{name: "the parent is an authority now", operator: "cert-authority " + authorized(parent), wantErr: "the key it was added with"},
		{name: "restricted parent", operator: "restrict " + authorized(parent), line: "pty ", wantGrant: func(g Grant) bool { return !g.PTY && !g.PortForwarding }},
		{name: "restricted itself", operator: authorized(parent), line: "no-pty ", wantGrant: func(g Grant) bool { return !g.PTY && g.PortForwarding }},
		{name: "the parent's command", operator: `command="true" ` + authorized(parent), wantGrant: func(g Grant) bool { return g.ForceCommand == "true" }},
		{name: "its own command", operator: authorized(parent), line: `command="date" `, wantGrant: func(g Grant) bool { return g.ForceCommand == "date" }},
		{name: "two commands", operator: `command="true" ` + authorized(parent), line: `command="date" `, wantErr: "force different commands"},
		{name: "the parent's addresses", operator: `from="10.0.0.0/8" ` + authorized(parent), wantErr: "may not be used from"},
		{name: "its own addresses", operator: authorized(parent), line: `from="10.0.0.0/8" `, wantErr: "may not be used from"},
		{name: "the parent has expired", operator: `expiry-time="20260101Z" ` + authorized(parent), wantErr: "expired"},
		{name: "it has expired", operator: authorized(parent), line: `expiry-time="20260101Z" `, wantErr: "expired"},
		{name: "the parent expires first", operator: `expiry-time="20260701Z" ` + authorized(parent), line: `expiry-time="20260801Z" `, wantGrant: func(g Grant) bool {
			return g.Expires.Equal(time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC))
		}},
		{name: "it expires first", operator: `expiry-time="20260801Z" ` + authorized(parent), line: `expiry-time="20260701Z" `, wantGrant: func(g Grant) bool {
			return g.Expires.Equal(time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC))
		}},
		{name: "the parent's destinations", operator: `permitopen="a:1" ` + authorized(parent), wantGrant: func(g Grant) bool { return slices.Equal(g.PermitOpen, []string{"a:1"}) }},
		{name: "its own destinations", operator: authorized(parent), line: `permitopen="a:1" `, wantGrant: func(g Grant) bool { return slices.Equal(g.PermitOpen, []string{"a:1"}) }},
		{name: "both destinations", operator: `permitopen="a:1" ` + authorized(parent), line: `permitopen="b:1" `, wantErr: "both have permitopen"},
		{name: "the parent's environment", operator: `environment="A=b" ` + authorized(parent), wantGrant: func(g Grant) bool { return slices.Equal(g.Environment, []string{"A=b"}) }},
		{name: "the parent needs no touch", operator: "no-touch-required " + authorized(parent), wantGrant: func(g Grant) bool { return !g.NoTouchRequired }},
		{name: "it must verify its user", operator: authorized(parent), line: "verify-required ", wantGrant: func(g Grant) bool { return g.VerifyRequired }},
		{name: "the parent must verify its user", operator: "verify-required " + authorized(parent), wantErr: "verify-required, and it is no FIDO key"},
		{name: "the parent is revoked", operator: authorized(parent), revoked: parent, wantErr: "the key it was added with"},
		{name: "it is revoked", operator: authorized(parent), revoked: own, wantErr: "revoked"},
		{name: "the operator's line decides", operator: lines("restrict "+authorized(own), authorized(parent)), wantGrant: func(g Grant) bool { return !g.PTY && g.Source == sourceDir }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			k := selfService(t, "alice", authorized(parent))
			k.mustAdd(t, parent, tt.line+authorized(own))
			if tt.operator == "" {
				os.Remove(filepath.Join(k.Dir, "alice"))
			} else {
				replace(t, filepath.Join(k.Dir, "alice"), tt.operator)
			}
			if tt.revoked != nil {
				k.RevokedKeys = filepath.Join(t.TempDir(), "revoked")
				replace(t, k.RevokedKeys, authorized(tt.revoked))
			}
			g, err := k.Authorize("alice", own, home, today)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Errorf("granted %+v, error %v, want %q", g, err, tt.wantErr)
				}
				return
			}
			if err != nil || !tt.wantGrant(g) {
				t.Errorf("granted %+v, %v", g, err)
			}
			if _, err := k.Authorize("bob", own, home, today); err == nil {
				t.Error("the key is good for another user")
			}
		})
	}
}

// TestOwnKeyVerifies: a key with verify-required adds FIDO keys only, which have to
// verify their user as well.
func TestOwnKeyVerifies(t *testing.T) {
	t.Parallel()
	parent, own := fidoKey(t, 1), fidoKey(t, 2)
	k := selfService(t, "alice", "verify-required "+authorized(parent))
	_, err := k.AddOwn("alice", ssh.FingerprintSHA256(parent), authorized(edKey(3)), home, today, commit)
	if keyErr := KeyError(""); !errors.As(err, &keyErr) || !strings.Contains(err.Error(), "only FIDO keys can be added") {
		t.Errorf("adding a plain key: %v", err)
	}
	k.mustAdd(t, parent, authorized(own))
	if g, err := k.Authorize("alice", own, home, today); err != nil || !g.VerifyRequired {
		t.Errorf("granted %+v, %v", g, err)
	}
}

func TestAddOwn(t *testing.T) {
	t.Parallel()
	parent, own, restricted, another := edKey(1), edKey(2), edKey(3), edKey(4)
	k := selfService(t, "alice", lines(authorized(parent), "cert-authority "+authorized(another)))
	k.mustAdd(t, parent, authorized(own)+" my laptop")
	k.mustAdd(t, parent, "restrict "+authorized(restricted))
	failed := errors.New("cannot be written down")
	for _, tt := range []struct {
		name, user string
		with       ssh.PublicKey
		line       string
		commit     error
		want       string
	}{
		{"with a key of her own", "alice", own, authorized(edKey(10)), nil, ""},
		{"again", "alice", parent, authorized(own), nil, "yours already"},
		{"the operator's", "alice", own, authorized(parent), nil, "in your administrator's file"},
		{"with a restricted key", "alice", restricted, authorized(edKey(11)), nil, "has restrictions"},
		{"with a key from elsewhere", "alice", edKey(12), authorized(edKey(11)), nil, "not in your administrator's file"},
		{"with an authority", "alice", another, authorized(edKey(11)), nil, "not in your administrator's file"},
		{"of nobody", "bob", parent, authorized(edKey(11)), nil, "not in your administrator's file"},
		{"an authority", "alice", parent, "cert-authority " + authorized(edKey(11)), nil, "certificate authorities"},
		{"environment", "alice", parent, `environment="LD_PRELOAD=x" ` + authorized(edKey(11)), nil, "environment is for"},
		{"no touch", "alice", parent, "no-touch-required " + authorized(edKey(11)), nil, "no-touch-required is for"},
		{"unknown option", "alice", parent, "shiny " + authorized(edKey(11)), nil, "unknown"},
		{"two lines", "alice", parent, authorized(edKey(11)) + "\n" + authorized(edKey(13)), nil, "unprintable"},
		{"an escape", "alice", parent, authorized(edKey(11)) + " \x1b[2J", nil, "unprintable"},
		{"nothing", "alice", parent, "", nil, "no key"},
		{"a comment", "alice", parent, "# x", nil, "no key"},
		{"too long", "alice", parent, authorized(edKey(11)) + strings.Repeat("x", maxLine), nil, "longer than"},
		{"the audit log fails", "alice", parent, authorized(edKey(11)), failed, failed.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before, _ := os.ReadFile(filepath.Join(k.SelfService, tt.user))
			_, err := k.AddOwn(tt.user, ssh.FingerprintSHA256(tt.with), tt.line, home, today, func(OwnKey) error { return tt.commit })
			if tt.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			var refused KeyError
			if err == nil || !strings.Contains(err.Error(), tt.want) || errors.As(err, &refused) != (tt.commit == nil) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if after, _ := os.ReadFile(filepath.Join(k.SelfService, tt.user)); string(after) != string(before) {
				t.Errorf("the file was changed: %s", after)
			}
		})
	}

	all, err := k.ListOwn("alice")
	if err != nil || len(all) != 4 || !all[0].Added.IsZero() || all[1].Comment != "my laptop" || all[1].From != home || all[1].With != ssh.FingerprintSHA256(parent) {
		t.Errorf("%+v, %v", all, err)
	}
	for _, tt := range []struct{ fingerprint, want string }{
		{"SHA256:", "this prefix"},
		{ssh.FingerprintSHA256(parent), "only your administrator"},
		{ssh.FingerprintSHA256(edKey(99)), "this prefix"},
		{ssh.FingerprintSHA256(own)[:16], ""},
	} {
		_, err := k.RemoveOwn("alice", tt.fingerprint, commit)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("removing %s: %v, want %q", tt.fingerprint, err, tt.want)
		}
	}
	if _, err := k.Authorize("alice", own, home, today); err == nil {
		t.Error("a removed key is good")
	}
	if problems := k.Check(); len(problems) > 0 {
		t.Error(problems)
	}
	if text, err := os.ReadFile(filepath.Join(k.Dir, "alice")); err != nil || string(text) != lines(authorized(parent), "cert-authority "+authorized(another)) {
		t.Errorf("the operator's file is %q, %v", text, err)
	}
}

// TestOwnKeysBound: there are so many and no more, also if they are added at the
// same time by two gateways, and none is lost.
func TestOwnKeysBound(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		parent := edKey(1)
		k := selfService(t, "alice", authorized(parent))
		successor := &Keys{Dir: k.Dir, SelfService: k.SelfService}
		var mu sync.Mutex
		var wg sync.WaitGroup
		added := 0
		for i := range maxOwn + 10 {
			wg.Go(func() {
				_, err := []*Keys{k, successor}[i%2].AddOwn("alice", ssh.FingerprintSHA256(parent), authorized(edKey(byte(i+2))), home, today, commit)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					added++
				} else if !strings.Contains(err.Error(), "the maximum") {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		all, err := k.ListOwn("alice")
		if err != nil || added != maxOwn || len(all) != maxOwn+1 {
			t.Errorf("%d added, %d listed, %v", added, len(all), err)
		}
	})
}

// TestRecheckOwn: a login by an own key ends when it, or its parent, is removed.
func TestRecheckOwn(t *testing.T) {
	t.Parallel()
	parent, own := edKey(1), edKey(2)
	for name, remove := range map[string]func(k *Keys) error{
		"removed": func(k *Keys) error {
			_, err := k.RemoveOwn("alice", ssh.FingerprintSHA256(own), commit)
			return err
		},
		"parent removed": func(k *Keys) error { return os.Remove(filepath.Join(k.Dir, "alice")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := selfService(t, "alice", authorized(parent))
			k.mustAdd(t, parent, authorized(own))
			g, err := k.Authorize("alice", own, home, today)
			if err != nil {
				t.Fatal(err)
			}
			if g, err = k.Recheck("alice", own, home, today, g); err != nil {
				t.Fatal(err)
			}
			if err := remove(k); err != nil {
				t.Fatal(err)
			}
			if _, err := k.Recheck("alice", own, home, today, g); err == nil || errors.Is(err, ErrUndecided) {
				t.Errorf("it goes on: %v", err)
			}
		})
	}
}

func FuzzParseOwn(f *testing.F) {
	key := authorized(edKey(1))
	f.Add(fmt.Appendf(nil, "{\"line\":\"restrict %s x\",\"with\":%q,\"added\":\"2026-06-15T12:00:00Z\",\"from\":\"192.0.2.7\"}\n", key, key))
	f.Add([]byte("{}\n[]\nnull\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, _, err := parseOwn("alice", data)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.key == nil || e.parent == nil || e.authority || len(e.permissions.Environment) > 0 {
				t.Errorf("accepted %+v", e)
			}
			e.ownKey()
		}
	})
}
