// Package revoked keeps the users whose access an administrator has revoked for the time
// being, whatever keys they have. It decides from a copy in memory, so a login makes no
// call. The store is a table that gateways share, or a folder.
package revoked

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// An Entry is a revoked user.
type Entry struct {
	User string `json:"-"`
	// By is the administrator, and Reason her text for other administrators; it may
	// be empty.
	By     string `json:"by"`
	Reason string `json:"reason,omitempty"`
	// Since is when it began. Until is when it ends by itself; zero means never.
	Since time.Time `json:"since"`
	Until time.Time `json:"until,omitzero"`
}

// ended reports whether the entry is over.
func (e Entry) ended(now time.Time) bool { return !e.Until.IsZero() && !now.Before(e.Until) }

// String describes the entry for logs.
func (e Entry) String() string {
	text := fmt.Sprintf("revoked by %s at %s", e.By, e.Since.UTC().Format(time.RFC3339))
	if !e.Until.IsZero() {
		text += " until " + e.Until.UTC().Format(time.RFC3339)
	}
	if e.Reason != "" {
		text += ": " + e.Reason
	}
	return text
}

// A Store keeps a text for each revoked user. A write that has returned nil is seen by
// every later read, also of other gateways.
type Store interface {
	// Revoked returns the texts of all users.
	Revoked(ctx context.Context) (map[string]string, error)
	// SetRevoked replaces the text of a user. An empty text removes it.
	SetRevoked(ctx context.Context, user, text string) error
}

// A List is the revoked users. Its fields must be set before its first use. It is safe for
// concurrent use.
type List struct {
	Store Store
	Log   *slog.Logger

	// changing is locked while the store is read or written, so that an older
	// reading does not replace a newer one.
	changing sync.Mutex
	entries  atomic.Pointer[map[string]Entry] // the copy; nil before the first Refresh
}

// Refresh reads the store. After an error the last copy holds.
func (l *List) Refresh(ctx context.Context) error {
	l.changing.Lock()
	defer l.changing.Unlock()
	return l.read(ctx)
}

// read replaces the copy. The caller holds l.changing.
func (l *List) read(ctx context.Context) error {
	texts, err := l.Store.Revoked(ctx)
	if err != nil {
		return fmt.Errorf("reading the revoked users: %w", err)
	}
	entries := make(map[string]Entry)
	for user, text := range texts {
		entries[user] = l.parse(user, text)
	}
	l.entries.Store(&entries)
	return nil
}

// parse reads the text of an entry. One that is malformed revokes, too.
func (l *List) parse(user, text string) Entry {
	e := Entry{}
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		if before, ok := l.get(user); !ok || before.Reason != malformed {
			l.Log.Error("the entry of a revoked user is malformed; the user stays revoked", "user", user, "err", err)
		}
		e = Entry{By: "unknown", Reason: malformed}
	}
	e.User = user
	return e
}

const malformed = "the entry is malformed"

func (l *List) get(user string) (Entry, bool) {
	entries := l.entries.Load()
	if entries == nil {
		return Entry{}, false
	}
	e, ok := (*entries)[user]
	return e, ok
}

// Check returns an error if the user is revoked. It makes no call.
func (l *List) Check(user string, now time.Time) error {
	if e, ok := l.get(user); ok && !e.ended(now) {
		return fmt.Errorf("the user is %s", e)
	}
	return nil
}

// Entries returns the entries that have not ended, in the order of their users. It makes no
// call.
func (l *List) Entries(now time.Time) []Entry {
	entries := l.entries.Load()
	if entries == nil {
		return nil
	}
	all := slices.DeleteFunc(slices.Collect(maps.Values(*entries)), func(e Entry) bool { return e.ended(now) })
	slices.SortFunc(all, func(a, b Entry) int { return strings.Compare(a.User, b.User) })
	return all
}

// Revoke stores an entry, in place of an earlier one of the user. With an error, it is not
// known whether it is stored, and nothing else has changed.
func (l *List) Revoke(ctx context.Context, e Entry) error {
	text, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return l.set(ctx, e.User, string(text), func(entries map[string]Entry) { entries[e.User] = e })
}

// Permit removes the entry of a user, if there is one, as Revoke stores it.
func (l *List) Permit(ctx context.Context, user string) error {
	return l.set(ctx, user, "", func(entries map[string]Entry) { delete(entries, user) })
}

// set writes to the store, and applies the change to the copy, too.
func (l *List) set(ctx context.Context, user, text string, change func(map[string]Entry)) error {
	l.changing.Lock()
	defer l.changing.Unlock()
	if err := l.Store.SetRevoked(ctx, user, text); err != nil {
		return fmt.Errorf("storing the revoked user %s: %w", user, err)
	}
	next := make(map[string]Entry)
	if now := l.entries.Load(); now != nil {
		next = maps.Clone(*now)
	}
	change(next)
	l.entries.Store(&next)
	return nil
}
