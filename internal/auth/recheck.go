package auth

import (
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"
)

// dependencies are the inputs of a grant. While they do not change, the grant
// would be made again.
type dependencies struct {
	user   []state // of the user's own files
	shared []state // of the files for all users
	// stable reports that no file can change without a change of its state.
	stable bool
	// refreshAt is when the answer of a lookup must be asked for again; zero for a
	// grant without one.
	refreshAt time.Time
	// keys made the grant; other Keys have other settings.
	keys *Keys
}

// equal reports whether d and e are the same, and neither can have changed
// unseen.
func (d *dependencies) equal(e *dependencies) bool {
	return d.keys == e.keys && d.stable && e.stable && slices.Equal(d.user, e.user) && slices.Equal(d.shared, e.shared)
}

// sharedStatTTL is how long the states of the shared files are kept: every login
// needs the same ones.
const sharedStatTTL = 500 * time.Millisecond

// statAll returns the states of all files that a decision about the user depends
// on. It reads none of them.
func (k *Keys) statAll(user string) dependencies {
	d := dependencies{keys: k}
	for _, dir := range []string{k.Dir, k.AuthorizedPrincipalsDir, k.SelfService} {
		if dir != "" {
			d.user = append(d.user, stat(filepath.Join(dir, user)))
		}
	}
	now := time.Now()
	k.mu.Lock()
	if now.Sub(k.sharedAt) >= sharedStatTTL || now.Before(k.sharedAt) {
		paths := append([]string{k.Dir}, k.TrustedUserCAKeys...)
		for _, path := range append(paths, k.AuthorizedPrincipalsDir, k.RevokedKeys) {
			if path != "" {
				d.shared = append(d.shared, stat(path))
			}
		}
		k.shared, k.sharedAt = d.shared, now
	}
	d.shared = k.shared
	sharedAt := k.sharedAt
	k.mu.Unlock()

	changesUnseenSince := func(at time.Time) func(state) bool {
		return func(s state) bool { return !s.settledAt(at) }
	}
	d.stable = !slices.ContainsFunc(d.user, changesUnseenSince(now)) && !slices.ContainsFunc(d.shared, changesUnseenSince(sharedAt))
	return d
}

// Recheck decides again about a login that Authorize has granted. If it is still
// granted, the result is the grant to pass to the next call: permissions stay as
// they were first granted, RolePrincipals and Expires are the present ones.
//
// Recheck is made to be called every few seconds for every login. Unless a file
// has changed or an answer has become too old, its cost is that of two calls of
// stat(2). It does not wait for a command or a web server: an answer that is too
// old is asked for in the background, and until it arrives the error is
// [ErrUndecided]. If none arrives for LookupStale, the login is refused.
//
// An error that is ErrUndecided is no reason to end the login. [ErrExpired] is
// final. Any other error may be due to a file that is just being rewritten in
// place, so the caller should end the login only if the error persists.
func (k *Keys) Recheck(user string, key ssh.PublicKey, from netip.Addr, now time.Time, granted Grant) (Grant, error) {
	if granted.Expires.IsZero() || !now.After(granted.Expires) {
		deps := k.statAll(user)
		if granted.deps.equal(&deps) && (granted.deps.refreshAt.IsZero() || now.Before(granted.deps.refreshAt)) {
			return granted, nil
		}
	}
	// A login by a file is granted again by files only: to ask the command or the
	// web server for the key, too, would mean to wait.
	mode := lookupNever
	if !granted.deps.refreshAt.IsZero() {
		mode = lookupInBackground
	}
	g, err := k.authorize(&attempt{user: user, key: key, from: from, now: now, answersSince: granted.deps.refreshAt}, mode)
	if err != nil {
		return Grant{}, err
	}
	granted.Expires, granted.RolePrincipals, granted.deps = g.Expires, g.RolePrincipals, g.deps
	return granted, nil
}
