package revoked

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// A memory is a store that can fail.
type memory struct {
	mu    sync.Mutex
	texts map[string]string
	err   error
	reads int
}

func (m *memory) Revoked(context.Context) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads++
	out := map[string]string{}
	for user, text := range m.texts {
		out[user] = text
	}
	return out, m.err
}

func (m *memory) SetRevoked(_ context.Context, user, text string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	if m.texts == nil {
		m.texts = map[string]string{}
	}
	if m.texts[user] = text; text == "" {
		delete(m.texts, user)
	}
	return nil
}

func newList(s Store) (*List, *strings.Builder) {
	log := &strings.Builder{}
	return &List{Store: s, Log: slog.New(slog.NewTextHandler(log, nil))}, log
}

func revokedUsers(l *List, now time.Time) string {
	var names []string
	for _, e := range l.Entries(now) {
		if l.Check(e.User, now) == nil {
			names = append(names, "not "+e.User)
			continue
		}
		names = append(names, e.User)
	}
	return strings.Join(names, " ")
}

func TestList(t *testing.T) {
	for _, tt := range []struct {
		name  string
		store Store
	}{{"memory", &memory{}}, {"folder", Folder(filepath.Join(t.TempDir(), "state", "revoked"))}} {
		t.Run(tt.name, func(t *testing.T) {
			now := time.Now()
			one, _ := newList(tt.store)
			two, _ := newList(tt.store)
			for _, l := range []*List{one, two} {
				if err := l.Refresh(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			for _, e := range []Entry{
				{User: "bob", By: "root", Since: now},
				{User: "alice", By: "root", Reason: "lost <laptop> \"x\"\n", Since: now, Until: now.Add(time.Hour)},
			} {
				if err := one.Revoke(t.Context(), e); err != nil {
					t.Fatal(err)
				}
			}
			if got := revokedUsers(one, now); got != "alice bob" {
				t.Errorf("revoked: %q", got)
			}
			if got := revokedUsers(two, now); got != "" {
				t.Errorf("the other list has %q before it has read them", got)
			}
			if err := two.Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			a, b := one.Entries(now), two.Entries(now)
			for i := range b {
				if !a[i].Since.Equal(b[i].Since) || !a[i].Until.Equal(b[i].Until) || a[i].Reason != b[i].Reason || a[i].By != b[i].By {
					t.Errorf("stored %+v, read %+v", a[i], b[i])
				}
			}
			// The end of the hour is the end of the revocation.
			if got := revokedUsers(two, now.Add(time.Hour)); got != "bob" {
				t.Errorf("an hour later: %q", got)
			}
			if err := two.Check("alice", now); err == nil || !strings.Contains(err.Error(), "revoked by root at ") || !strings.Contains(err.Error(), "lost <laptop>") {
				t.Errorf("the error for alice: %v", err)
			}
			if err := two.Check("carol", now); err != nil {
				t.Error(err)
			}
			for range 2 { // the second time, there is none
				if err := two.Permit(t.Context(), "bob"); err != nil {
					t.Fatal(err)
				}
			}
			if err := one.Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := revokedUsers(one, now) + "," + revokedUsers(two, now); got != "alice,alice" {
				t.Errorf("after a permit: %q", got)
			}
		})
	}
}

// TestUnreachable: while the store fails, the last copy holds, and nothing is revoked that
// is not stored.
func TestUnreachable(t *testing.T) {
	store := &memory{}
	l, _ := newList(store)
	if err := l.Revoke(t.Context(), Entry{User: "alice", By: "root"}); err != nil {
		t.Fatal(err)
	}
	store.err = errors.New("unreachable")
	reads := store.reads
	if l.Refresh(t.Context()) == nil || l.Revoke(t.Context(), Entry{User: "bob"}) == nil || l.Permit(t.Context(), "alice") == nil {
		t.Error("no error")
	}
	if got := revokedUsers(l, time.Now()); got != "alice" {
		t.Errorf("revoked: %q", got)
	}
	if store.reads != reads+1 {
		t.Errorf("%d reads", store.reads-reads)
	}
}

// TestMalformed: an entry that cannot be read revokes the user, and is logged once.
func TestMalformed(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"alice": "", "bob": "{", "carol": `{"until":"soon"}`, "dave": "[]", "erin": `{"by":"root","since":"2026-01-02T03:04:05Z","new":1}`,
		"frank.new": "{}", ".hidden": "{}",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	l, log := newList(Folder(dir))
	for range 3 {
		if err := l.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := revokedUsers(l, time.Now()); got != "alice bob carol dave erin" {
		t.Errorf("revoked: %q", got)
	}
	if n := strings.Count(log.String(), "malformed"); n != 4 {
		t.Errorf("logged %d times:\n%s", n, log)
	}
}

func TestFolderNames(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"", ".", "..", "../x", "a/b", ".x", "x.new", "a\x00"} {
		if err := Folder(dir).SetRevoked(t.Context(), name, "{}"); err == nil {
			t.Errorf("%q was stored", name)
		}
		if name != "" {
			if err := Folder(dir).SetRevoked(t.Context(), name, ""); err == nil {
				t.Errorf("%q was removed", name)
			}
		}
	}
}

// TestOlderReading: a reading that began before a revocation does not undo it.
func TestOlderReading(t *testing.T) {
	store := &memory{}
	l, _ := newList(store)
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() {
			if err := l.Revoke(t.Context(), Entry{User: fmt.Sprint("user", i)}); err != nil {
				t.Error(err)
			}
			if l.Check(fmt.Sprint("user", i), time.Now()) == nil {
				t.Errorf("user%d is not revoked", i)
			}
		})
		all.Go(func() { l.Refresh(t.Context()) })
	}
	all.Wait()
	if n := len(l.Entries(time.Now())); n != 50 {
		t.Errorf("%d are revoked", n)
	}
}
