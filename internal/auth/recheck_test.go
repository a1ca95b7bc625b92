package auth

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

// aged makes a grant look as if its files had not changed for a long time.
func aged(g Grant) Grant {
	g.deps.stable = true
	return g
}

func TestRecheck(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ca := put(t, filepath.Join(t.TempDir(), "ca.pub"), authorized(edKey(9))+"\n")
		revoked := put(t, filepath.Join(t.TempDir(), "revoked"), "\n")
		dir := keysDir(t, "alice", lines("no-pty "+authorized(edKey(1)), authorized(edKey(2))), "carol", `expiry-time="202606151230Z" `+authorized(edKey(3))+"\n")
		k := &Keys{Dir: dir, TrustedUserCAKeys: []string{ca}, RevokedKeys: revoked}
		path := filepath.Join(dir, "alice")
		cert := sign(t, nil)

		type login struct {
			user  string
			key   ssh.PublicKey
			grant Grant
		}
		var logins []*login
		for _, l := range []*login{{user: "alice", key: edKey(1)}, {user: "alice", key: edKey(2)}, {user: "carol", key: edKey(3)}, {user: "alice", key: cert}} {
			var err error
			if l.grant, err = k.Authorize(l.user, l.key, home, today); err != nil {
				t.Fatal(err)
			}
			logins = append(logins, l)
		}
		const fine, refused, expired, unknown = "fine", "refused", "expired", "unknown"
		expect := func(step string, at time.Time, want ...string) {
			t.Helper()
			time.Sleep(max(sharedStatTTL, unsettledTTL) + 10*time.Millisecond)
			for i, l := range logins {
				g, err := k.Recheck(l.user, l.key, home, at, l.grant)
				got := refused
				switch {
				case err == nil:
					got = fine
				case errors.Is(err, ErrUndecided):
					got = unknown
				case errors.Is(err, ErrExpired):
					got = expired
				}
				if got != want[i] {
					t.Errorf("%s: login %d is %s, want %s (%v)", step, i, got, want[i], err)
				}
				if err == nil {
					// The permissions do not change.
					if !reflect.DeepEqual(g.Permissions, l.grant.Permissions) || g.Line != l.grant.Line {
						t.Errorf("%s: login %d is now %+v", step, i, g)
					}
					l.grant = g
				}
			}
		}
		expect("nothing changed", today, fine, fine, fine, fine)
		for _, l := range logins {
			l.grant = aged(l.grant)
		}
		expect("time passed", today.Add(29*time.Minute), fine, fine, fine, fine)
		expect("a line has expired", today.Add(31*time.Minute), fine, fine, expired, fine)
		expect("and the certificate", today.Add(time.Hour), fine, fine, expired, expired)

		replace(t, path, authorized(edKey(1))+"\n")
		expect("a line is gone, another permits more", today, fine, refused, fine, fine)
		if err := os.Rename(path, path+"~"); err != nil {
			t.Fatal(err)
		}
		expect("the file is gone", today, refused, refused, fine, fine)
		if err := os.Rename(path+"~", path); err != nil {
			t.Fatal(err)
		}
		expect("and back", today, fine, refused, fine, fine)
		os.Chmod(dir, 0o777)
		expect("the folder may not be used", today, unknown, unknown, unknown, fine)
		os.Chmod(dir, 0o755)

		put(t, revoked, authorized(edKey(3)))
		expect("a key is revoked", today, fine, refused, refused, fine)
		put(t, revoked, authorized(edKey(9)))
		expect("the authority is revoked", today, fine, refused, fine, refused)
		put(t, revoked, "garbage")
		expect("nobody knows what is revoked", today, unknown, unknown, unknown, unknown)
		put(t, revoked, "\n")
		os.Remove(ca)
		expect("the authorities are gone", today, fine, refused, fine, unknown)
		put(t, ca, authorized(edKey(8))+"\n")
		expect("others are trusted", today, fine, refused, fine, refused)
	})
}

// TestRecheckIsCheap wants nothing to be read as long as nothing has changed.
func TestRecheckIsCheap(t *testing.T) {
	t.Parallel()
	now := time.Now()
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(now.Round(0))) // the files have the real time
		k := &Keys{Dir: keysDir(t, "alice", authorized(edKey(1))+"\n")}
		g, err := k.Authorize("alice", edKey(1), home, today)
		if err != nil {
			t.Fatal(err)
		}
		if g.deps.stable {
			t.Error("a file that has just changed is taken for settled")
		}
		time.Sleep(settleTime + sharedStatTTL + time.Second)
		if g, err = k.Recheck("alice", edKey(1), home, today, g); err != nil || !g.deps.stable {
			t.Fatalf("a file that has settled: %+v, %v", g, err)
		}
		k.keys = cache[*keyFile]{}
		if again, err := k.Recheck("alice", edKey(1), home, today, g); err != nil || !reflect.DeepEqual(again, g) {
			t.Errorf("%+v, %v", again, err)
		}
		if len(k.keys.files) != 0 {
			t.Error("the file was read")
		}
	})
}

// TestRecheckOfLookups is about logins by a command or a web server. The clock
// stands still while the command runs.
func TestRecheckOfLookups(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		keys := put(t, filepath.Join(t.TempDir(), "keys"), authorized(edKey(1))+"\n")
		k := &Keys{Dir: keysDir(t), Command: []string{script(t, "cat $2"), "%u", keys}, CommandUser: me(t), LookupCache: 300 * time.Millisecond}
		g, err := k.Authorize("alice", edKey(1), home, today)
		if err != nil {
			t.Fatal(err)
		}
		// eventually asks until there is an answer.
		eventually := func() error {
			for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
				again, err := k.Recheck("alice", edKey(1), home, today, g)
				if err == nil {
					g = again
				}
				if !errors.Is(err, ErrUndecided) {
					return err
				}
			}
			return errors.New("no answer")
		}
		if err := eventually(); err != nil {
			t.Error(err)
		}
		// An answer that is too old for a login when it is looked at is still one.
		time.Sleep(400 * time.Millisecond)
		if _, err := k.Recheck("alice", edKey(1), home, today, g); !errors.Is(err, ErrUndecided) {
			t.Errorf("the answer is too old, and yet %v", err)
		}
		time.Sleep(500 * time.Millisecond)
		if g, err = k.Recheck("alice", edKey(1), home, today, g); err != nil {
			t.Error(err)
		}
		put(t, keys, "")
		time.Sleep(400 * time.Millisecond)
		if err := eventually(); err == nil || errors.Is(err, ErrUndecided) {
			t.Errorf("without the key: %v", err)
		}

		// A command that fails has not said no.
		put(t, keys, authorized(edKey(2))+"\n")
		if g, err = k.Authorize("bob", edKey(2), home, today); err != nil {
			t.Fatal(err)
		}
		os.Remove(keys)
		time.Sleep(400 * time.Millisecond)
		for range 10 {
			if _, err := k.Recheck("bob", edKey(2), home, today, g); !errors.Is(err, ErrUndecided) {
				t.Errorf("of a command that fails: %v", err)
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
}

func BenchmarkRecheck(b *testing.B) {
	dir := b.TempDir()
	os.Chmod(dir, 0o755)
	replace(b, filepath.Join(dir, "alice"), authorized(edKey(1))+"\n")
	k := &Keys{Dir: dir}
	g, err := k.Authorize("alice", edKey(1), home, today)
	if err != nil {
		b.Fatal(err)
	}
	time.Sleep(settleTime + sharedStatTTL)
	g.deps = k.statAll("alice")
	key := edKey(1)
	for b.Loop() {
		if _, err := k.Recheck("alice", key, home, today, g); err != nil {
			b.Fatal(err)
		}
	}
}
