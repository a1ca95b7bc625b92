package auth

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// This file manages the keys that users have added themselves. They are in a folder
// of their own; the operator's files are never written to.
//
// Each such key has a parent: the key in the operator's file that its owner was
// logged in with when she added it. The key grants no more than its parent grants at
// the moment of the login. For that, the parent is authorized as if it logged in
// itself, with its options, its expiry and revoked_keys. So if the operator removes a
// user's file, her own keys grant nothing any more, and if the operator removes a key
// from the file, nor do the keys that were added with it.

// maxOwn is the maximum number of keys that a user may add.
const maxOwn = 50

// A KeyError is the reason if a key cannot be added or removed. It is a message for
// the user.
type KeyError string

func (e KeyError) Error() string { return string(e) }

// An OwnKey is a key of a user, as the console displays it to her.
type OwnKey struct {
	Fingerprint string // SHA-256, as ssh-keygen -l prints it
	Type        string
	Comment     string
	// Added is the time at which the user added the key, From the address of her
	// connection. They are zero for keys in the operator's file.
	Added time.Time
	From  netip.Addr
	// With is the fingerprint of the parent.
	With string
}

// ownLine is a line of a user's file.
type ownLine struct {
	Line  string     `json:"line"` // as in authorized_keys
	With  string     `json:"with"` // the parent, in the same format
	Added time.Time  `json:"added"`
	From  netip.Addr `json:"from,omitzero"`
}

// An ownEntry is a parsed line.
type ownEntry struct {
	entry
	ownLine
	parent ssh.PublicKey
}

// parseOwn parses a user's file.
func parseOwn(path string, data []byte) ([]ownEntry, []error, error) {
	var all []ownEntry
	var problems []error
	n := 0
	for text := range bytes.SplitSeq(data, []byte("\n")) {
		n++
		if len(text) == 0 {
			continue
		}
		e, err := parseOwnLine(text)
		if err != nil {
			problems = append(problems, fmt.Errorf("%s:%d: %w", path, n, err))
			continue
		}
		e.entry.line = n
		all = append(all, e)
	}
	return all, problems, nil
}

func parseOwnLine(text []byte) (ownEntry, error) {
	var e ownEntry
	if err := json.Unmarshal(text, &e.ownLine); err != nil {
		return ownEntry{}, err
	}
	parent, err := parseLine(e.With, time.UTC)
	if err != nil {
		return ownEntry{}, fmt.Errorf("with: %w", err)
	}
	if e.entry, err = parseOwnKey(e.Line); err != nil {
		return ownEntry{}, err
	}
	if e.parent = parent.key; e.parent == nil {
		return ownEntry{}, errors.New("with: no key")
	}
	return e, nil
}

// parseOwnKey parses a line of authorized_keys from a user. Its options may only
// restrict. The errors are for the user.
func parseOwnKey(line string) (entry, error) {
	if strings.ContainsFunc(line, func(r rune) bool { return r == unicode.ReplacementChar || r != '\t' && !unicode.IsPrint(r) }) {
		return entry{}, errors.New("it has unprintable characters")
	}
	e, err := parseLine(line, time.UTC)
	switch {
	case err != nil:
		return entry{}, err
	case e.key == nil:
		return entry{}, errors.New("there is no key in it")
	case e.authority, e.principals != nil:
		return entry{}, errors.New("certificate authorities are for your administrator to trust")
	case len(e.permissions.Environment) > 0:
		return entry{}, errors.New("the option environment is for your administrator to give")
	case e.noTouch:
		return entry{}, errors.New("the option no-touch-required is for your administrator to give")
	}
	return e, nil
}

// ownFile returns the keys that the user has added, as they are on disk.
func (k *Keys) ownFile(user string) ([]ownEntry, error) {
	d, err := userFile(k, &k.own, k.SelfService, kindOwn, user, parseOwn)
	if err != nil || d == nil {
		return nil, err
	}
	return d.content, nil
}

// byOwn asks the user's file in SelfService.
func (k *Keys) byOwn(a *attempt) (Grant, bool, error) {
	if k.SelfService == "" || a.cert != nil {
		return Grant{}, false, a.errUnknownKey()
	}
	entries, err := k.ownFile(a.user)
	if err != nil {
		return Grant{}, false, err
	}
	i := slices.IndexFunc(entries, func(e ownEntry) bool { return bytes.Equal(e.key.Marshal(), a.key.Marshal()) })
	if i < 0 {
		return Grant{}, false, a.errUnknownKey()
	}
	e := &entries[i]
	at := fmt.Sprintf("%s %s:%d", sourceOwn, a.user, e.entry.line)
	parent := *a
	parent.key = e.parent
	if err := k.checkRevoked(&parent); err != nil {
		return Grant{}, true, fmt.Errorf("%s: the key it was added with: %w", at, err)
	}
	g, _, err := k.byDir(&parent)
	if err != nil {
		return Grant{}, true, fmt.Errorf("%s: the key it was added with: %w", at, err)
	}
	own, err := e.grant(a)
	if err != nil {
		return Grant{}, true, fmt.Errorf("%s: %w", at, err)
	}
	if g.VerifyRequired && !isFIDO(e.key) {
		return Grant{}, true, fmt.Errorf("%s: the key it was added with has verify-required, and it is no FIDO key", at)
	}
	if err := g.intersect(own); err != nil {
		return Grant{}, true, fmt.Errorf("%s: it and the key it was added with %w", at, err)
	}
	g.Source, g.Line = sourceOwn, fmt.Sprintf("%s, by %s", at, g.Line)
	return g, true, nil
}

// ListOwn returns the keys in the user's file in Dir, and those that she has added.
func (k *Keys) ListOwn(user string) ([]OwnKey, error) {
	var all []OwnKey
	d, err := k.file(user)
	if err != nil {
		return nil, err
	}
	if d != nil {
		for _, lines := range d.content.entries {
			for _, e := range lines {
				if !e.authority {
					all = append(all, OwnKey{Fingerprint: ssh.FingerprintSHA256(e.key), Type: e.key.Type()})
				}
			}
		}
	}
	slices.SortFunc(all, func(a, b OwnKey) int { return strings.Compare(a.Fingerprint, b.Fingerprint) })
	entries, err := k.ownFile(user)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		all = append(all, e.ownKey())
	}
	return all, nil
}

func (e *ownEntry) ownKey() OwnKey {
	return OwnKey{
		Fingerprint: ssh.FingerprintSHA256(e.key), Type: e.key.Type(), Comment: comment(e.Line),
		Added: e.Added, From: e.ownLine.From, With: ssh.FingerprintSHA256(e.parent),
	}
}

// comment returns the comment of a valid line.
func comment(line string) string {
	line = strings.Trim(line, " \t\r")
	if typ, _ := cutField(line); !isKeyType(typ) {
		_, line, _ = parseOptions(line, time.UTC)
	}
	_, line = cutField(line)
	_, line = cutField(line)
	return line
}

// AddOwn adds a line of authorized_keys to the keys of a user who has logged in from
// the address from with the key that has the fingerprint with. Before the line is
// written, AddOwn calls commit with the new key; if commit returns an error, the line
// is not written. The error is a KeyError if it is for the user.
func (k *Keys) AddOwn(user, with, line string, from netip.Addr, now time.Time, commit func(OwnKey) error) (OwnKey, error) {
	e, err := parseOwnKey(line)
	if err != nil {
		return OwnKey{}, KeyError(err.Error())
	}
	var added OwnKey
	err = k.changeOwn(user, func(entries []ownEntry) ([]ownEntry, error) {
		parent, err := k.parent(user, with, entries)
		if err != nil {
			return nil, err
		}
		blob := string(e.key.Marshal())
		if d, err := k.file(user); err != nil {
			return nil, err
		} else if d != nil && len(d.content.entries[blob]) > 0 {
			return nil, KeyError("this key is yours already: it is in your administrator's file")
		}
		if slices.ContainsFunc(entries, func(o ownEntry) bool { return string(o.key.Marshal()) == blob }) {
			return nil, KeyError("this key is yours already")
		}
		if g, _, err := k.byDir(&attempt{user: user, key: parent, from: from, now: now}); err == nil && g.VerifyRequired && !isFIDO(e.key) {
			return nil, KeyError("your administrator's file has verify-required for your key; only FIDO keys can be added with it")
		}
		if len(entries) >= maxOwn {
			return nil, KeyError(fmt.Sprintf("you have added %d keys, the maximum; remove one first", len(entries)))
		}
		if err := k.checkRevoked(&attempt{user: user, key: e.key, from: from, now: now}); errors.Is(err, ErrUndecided) {
			return nil, err
		} else if err != nil {
			return nil, KeyError("this key is revoked")
		}
		next := ownEntry{entry: e, parent: parent, ownLine: ownLine{
			Line: strings.Trim(line, " \t\r"), With: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(parent))), Added: now.UTC().Truncate(time.Second), From: from,
		}}
		added = next.ownKey()
		return append(slices.Clone(entries), next), commit(added)
	})
	return added, err
}

// parent returns the parent of a key that the user adds: the key with the fingerprint
// with, or the parent of that if it is one of entries.
func (k *Keys) parent(user, with string, entries []ownEntry) (ssh.PublicKey, error) {
	d, err := k.file(user)
	if err != nil {
		return nil, err
	}
	if d != nil {
		for _, lines := range d.content.entries {
			if key := lines[0].key; !lines[0].authority && ssh.FingerprintSHA256(key) == with {
				return key, nil
			}
		}
	}
	for _, e := range entries {
		if ssh.FingerprintSHA256(e.key) != with {
			continue
		}
		// Its options restrict its owner, but the new key would not have them.
		if plain := (options{permissions: identity.AllowAll()}); !e.options.equal(&plain) {
			return nil, KeyError("the key that you logged in with has restrictions; log in with one that has none to add keys")
		}
		return e.parent, nil
	}
	return nil, KeyError("you logged in with a certificate, or with a key that is not in your administrator's file; only keys in that file can add others")
}

// equal reports whether two lines have the same options.
func (o *options) equal(p *options) bool {
	a, b := &o.permissions, &p.permissions
	return a.PTY == b.PTY && a.PortForwarding == b.PortForwarding && a.AgentForwarding == b.AgentForwarding &&
		a.X11Forwarding == b.X11Forwarding && a.UserRC == b.UserRC && a.ForceCommand == b.ForceCommand &&
		slices.Equal(a.PermitOpen, b.PermitOpen) && slices.Equal(a.PermitListen, b.PermitListen) && slices.Equal(a.Environment, b.Environment) &&
		o.verify == p.verify && o.expires.Equal(p.expires) && (o.from == nil) == (p.from == nil)
}

// RemoveOwn removes a key that the user has added. fingerprint may be a prefix that
// only one of these keys has. commit and the error are as for AddOwn. Recheck then
// refuses the logins that the key has granted.
func (k *Keys) RemoveOwn(user, fingerprint string, commit func(OwnKey) error) (OwnKey, error) {
	var removed OwnKey
	err := k.changeOwn(user, func(entries []ownEntry) ([]ownEntry, error) {
		i, err := findOwn(entries, fingerprint)
		if err == nil && i < 0 {
			all, listErr := k.ListOwn(user)
			if listErr != nil {
				return nil, listErr
			}
			if slices.ContainsFunc(all, func(o OwnKey) bool { return o.Added.IsZero() && hasPrefix(o.Fingerprint, fingerprint) }) {
				return nil, KeyError("that key is in your administrator's file; only your administrator can remove it")
			}
			err = KeyError("none of the keys that you have added has a fingerprint with this prefix; keys list shows them")
		}
		if err != nil {
			return nil, err
		}
		removed = entries[i].ownKey()
		return slices.Delete(slices.Clone(entries), i, i+1), commit(removed)
	})
	return removed, err
}

// hasPrefix reports whether typed is a prefix of a fingerprint, with at least four
// characters of the hash.
func hasPrefix(fingerprint, typed string) bool {
	return len(typed) >= len("SHA256:")+4 && strings.HasPrefix(fingerprint, typed)
}

// findOwn returns the index of the only key whose fingerprint has the prefix; -1 if
// there is none.
func findOwn(entries []ownEntry, fingerprint string) (int, error) {
	found := -1
	for i := range entries {
		full := ssh.FingerprintSHA256(entries[i].key)
		if full == fingerprint {
			return i, nil
		}
		if hasPrefix(full, fingerprint) {
			if found >= 0 {
				return -1, KeyError("several of your keys have a fingerprint with this prefix")
			}
			found = i
		}
	}
	return found, nil
}

// changeOwn replaces the content of a user's file by the result of change. When
// changeOwn returns, the change is on disk. Changes by other processes wait.
func (k *Keys) changeOwn(user string, change func([]ownEntry) ([]ownEntry, error)) error {
	if err := checkName(user); err != nil {
		return err
	}
	if k.SelfService == "" {
		return errors.New("SelfService is not set")
	}
	unlock, err := k.lockOwn()
	if err != nil {
		return err
	}
	defer unlock()
	before, err := k.ownFile(user)
	if err != nil {
		return err
	}
	after, err := change(before)
	if err != nil {
		return err
	}
	var text bytes.Buffer
	for _, e := range after {
		if err := json.NewEncoder(&text).Encode(e.ownLine); err != nil {
			return err
		}
	}
	if text.Len() > maxFile {
		return KeyError("your keys take up too much space; remove one first")
	}
	return replaceFile(filepath.Join(k.SelfService, user), text.Bytes())
}

// lockOwn locks SelfService. It waits at most ten seconds for another process.
func (k *Keys) lockOwn() (unlock func(), err error) {
	lock, err := os.OpenFile(filepath.Join(k.SelfService, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() {
				// Close alone would leave the lock to a child that has been forked
				// and has not yet called exec.
				unix.Flock(int(lock.Fd()), unix.LOCK_UN)
				lock.Close()
			}, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR || ctx.Err() != nil {
			lock.Close()
			return nil, fmt.Errorf("locking %s: %w", lock.Name(), err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// writeTemp writes a temporary file in dir, for a rename or a link in the same file
// system. The caller removes it.
func writeTemp(dir string, data []byte) (path string, err error) {
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// replaceFile replaces a file atomically. When it returns, the new file is on disk.
func replaceFile(path string, data []byte) error {
	temp, err := writeTemp(filepath.Dir(path), data)
	if err != nil {
		return err
	}
	defer os.Remove(temp) // fails after the rename
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// MakeOwn creates SelfService if it does not exist.
func (k *Keys) MakeOwn() error {
	if k.SelfService == "" {
		return nil
	}
	return os.MkdirAll(k.SelfService, 0o700)
}
