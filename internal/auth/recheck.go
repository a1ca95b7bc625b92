package auth

import (
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"
)

// A basis is what a grant rests on. As long as it stays, so does the grant.
type basis struct {
	mine   []state // of the user's own files
	shared []state // of everybody's
	// solid says that none of them can change without its state changing too.
	solid bool
	// until is when the answer of a lookup has to be asked for anew; zero for
	// grants without one.
	until time.Time
}

// sharedFor is how long a look at the files that are not one user's counts for
// other users too.
const sharedFor = 500 * time.Millisecond

// look says how all files look that a decision about the user depends on. It
// reads none of them.
func (k *Keys) look(user string) basis {
	var b basis
	b.mine = append(b.mine, glance(filepath.Join(k.Dir, user)))
	if k.AuthorizedPrincipalsDir != "" {
		b.mine = append(b.mine, glance(filepath.Join(k.AuthorizedPrincipalsDir, user)))
	}
	now := time.Now()
	k.mu.Lock()
	if now.Sub(k.sharedAt) >= sharedFor || now.Before(k.sharedAt) {
		paths := append([]string{k.Dir}, k.TrustedUserCAKeys...)
		for _, path := range append(paths, k.AuthorizedPrincipalsDir, k.RevokedKeys) {
			if path != "" {
				b.shared = append(b.shared, glance(path))
			}
		}
		k.shared, k.sharedAt = b.shared, now
	}
	b.shared = k.shared
	since := k.sharedAt
	k.mu.Unlock()

	b.solid = true
	for _, s := range b.mine {
		b.solid = b.solid && s.settledAt(now)
	}
	for _, s := range b.shared {
		b.solid = b.solid && s.settledAt(since)
	}
	return b
}

// Recheck says whether a login that Authorize has granted would be granted
// again. If so it returns the grant to ask about the next time. What the login
// may do stays as it was granted first, but RolePrincipals are those that it
// would get now.
//
// It is meant to be asked every few seconds for every login: unless a file has
// changed or an answer has grown old, it costs a look at two files. It never
// waits for a command or a web server: an answer that is too old is renewed
// meanwhile, and the error until then is [ErrUndecided].
//
// If there is none for LookupStale, the login is refused.
//
// An error that is [ErrUndecided] says nothing about the login. Another one may
// still be due to a file that is being rewritten in place at this moment, so
// only one that stays is a reason to end the login; but for [ErrExpired], which
// is final.
func (k *Keys) Recheck(user string, key ssh.PublicKey, from netip.Addr, now time.Time, granted Grant) (Grant, error) {
	if granted.Expires.IsZero() || !now.After(granted.Expires) {
		b := k.look(user)
		if granted.basis.solid && b.solid && slices.Equal(b.mine, granted.basis.mine) && slices.Equal(b.shared, granted.basis.shared) &&
			(granted.basis.until.IsZero() || now.Before(granted.basis.until)) {
			return granted, nil
		}
	}
	// What came in by a file stays in by one: whether a command or a web server
	// has the key as well would have to be waited for.
	effort := filesOnly
	if !granted.basis.until.IsZero() {
		effort = inBackground
	}
	g, err := k.authorize(&attempt{user: user, key: key, from: from, now: now, after: granted.basis.until}, effort)
	if err != nil {
		return Grant{}, err
	}
	granted.Expires, granted.RolePrincipals, granted.basis = g.Expires, g.RolePrincipals, g.basis
	return granted, nil
}
