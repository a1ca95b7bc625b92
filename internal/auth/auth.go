// Package auth decides who may log in as whom, and what the login may do: by a
// folder of authorized_keys files, one per user, named as the user, in the
// format of sshd(8), AUTHORIZED_KEYS FILE FORMAT; by certificates of authorities
// that are trusted; and by a command or a web server that is asked for a user's
// keys. A list of revoked keys goes before all of them.
//
// What this package does not understand or cannot enforce, it refuses. A line
// with a mistake, an unknown option or one that is not honoured here lets
// nobody in, and harms no other line. [Keys.Check] lists such lines for the
// operator; [Keys] also logs them once for every change of the file.
//
// # Changing keys while the gateway runs
//
// Files are looked at again for every login, so a change counts at once.
// Writers should make a new file and rename it over the old one: a reader then
// sees either the old file or the new one. A file that is rewritten in place is
// safe too: a cut-off line is no key, a file that changes while it is read is
// read again, and one that has just become empty or ends within a line is looked
// at again a moment later before anybody is refused by it.
//
// [Keys.Recheck] says of a login that is going on whether it would still be let
// in.
//
// # Strangers
//
// A key that is only offered costs a look at some files, and the check of a
// signature if it is a certificate of a trusted authority. A command or a web
// server is asked only if the files do not have the key; see lookup.go for how
// often a stranger can cause that.
package auth

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

const (
	maxFile = 1 << 20 // bytes of one user's keys
	maxLine = 8 << 10 // as sshd(8) says
	maxUser = 64      // bytes of a user name
)

var (
	// ErrExpired is why a key or a certificate that was good is so no more.
	ErrExpired = errors.New("expired")
	// ErrUndecided is why a login is refused when what it depends on cannot be
	// read: neither yes nor no is known. It is no reason to end a login that
	// is going on.
	ErrUndecided = errors.New("not known")
)

// undecided makes an error ErrUndecided.
type undecided struct{ error }

func (u undecided) Unwrap() []error { return []error{u.error, ErrUndecided} }

// The settings by which somebody may get in, as grants and messages name them.
const (
	sourceDir     = "authorized_keys_dir"
	sourceCA      = "trusted_user_ca_keys"
	sourceCommand = "authorized_keys_command"
	sourceURL     = "authorized_keys_url"
)

// Keys lets people in. It is safe for concurrent use, must not be copied after
// its first use, and its fields must not be changed then. What sshd_config(5)
// has too means what it means there.
type Keys struct {
	// Dir holds one authorized_keys file per user. Like every file in it, and
	// like all other files that are named here, it must belong to root or to
	// the user the gateway runs as, and be writable by its owner only.
	Dir string

	// TrustedUserCAKeys are the paths of files of public keys, one a line:
	// the authorities whose certificates let in the users that they name as
	// principals. A certificate without principals lets nobody in.
	TrustedUserCAKeys []string
	// AuthorizedPrincipalsDir, if not empty, holds a file for each user with
	// the principals that may log in as her by such a certificate, in the
	// format of AuthorizedPrincipalsFile; the user's own name is not among
	// them unless the file has it.
	AuthorizedPrincipalsDir string
	// RevokedKeys, if not empty, is the path of keys that let nobody in: a
	// list of public keys, one a line, or a key revocation list of
	// ssh-keygen(1). If it cannot be read, everybody is refused.
	RevokedKeys string

	// Command, if not empty, is a program and its arguments that prints the
	// authorized keys of a user, and CommandUser the account it runs as. See
	// command.go for the tokens that it may contain.
	Command     []string
	CommandUser string
	// URL, if not empty, is where to get the authorized keys of a user; %u in
	// it stands for her name. It must begin with https, or name this machine.
	// Only users are asked for who have a file in Dir, if only an empty one:
	// half the world has keys at such places.
	URL string
	// LookupTimeout is how long Command and URL may take; zero means 10 s.
	// LookupCache is how long an answer counts, zero meaning a minute, and
	// LookupStale how long that of URL counts when none can be had any more,
	// zero meaning 10 minutes. A login that came by either ends when there has
	// been no answer for so long.
	LookupTimeout, LookupCache, LookupStale time.Duration

	// Log, if not nil, is told what is wrong with the files: once for every
	// change.
	Log *slog.Logger

	keys       cache[*keyFile]        // by user
	principals cache[[]principalLine] // by user
	cas        cache[map[string]int]  // by path: lines by key
	revoked    cache[*revocations]    // by path
	// revokedBefore is what was revoked before the file changed last.
	revokedBefore atomic.Pointer[document[*revocations]]
	lookups       []*lookup // made once
	once          sync.Once // for lookups
	mu            sync.Mutex
	said          map[[2]string]string // by what and user: what was last logged
	shared        []state              // of the files that are not one user's
	sharedAt      time.Time            // when that was
}

// A Grant is what a line of authorized_keys gives to who proves its key, or a
// certificate to who proves the key in it.
type Grant struct {
	identity.Permissions
	// NoTouchRequired waives the touch of a FIDO key. It must reach
	// golang.org/x/crypto/ssh as the extension "no-touch-required" of
	// ssh.Permissions, or that package insists on the touch.
	NoTouchRequired bool
	// Expires is the moment after which the grant is good for nothing; zero
	// means never. Sessions that are open then are the caller's business.
	Expires time.Time

	// Key is the SHA-256 fingerprint of the key, as ssh-keygen -l prints it:
	// for a certificate that of the key in it.
	Key string
	// CertKeyID, CertSerial and Principals are the certificate's, and CAKey
	// is the fingerprint of the key that signed it. They are empty for a
	// plain key.
	CertKeyID  string
	CertSerial uint64
	CAKey      string
	Principals []string
	// RolePrincipals are those of Principals that the operator's roles may go
	// by: all, if the authority is one of TrustedUserCAKeys. One that a line of
	// a user's authorized keys trusts is trusted for that line's principals
	// only, and must not be able to hand out others.
	RolePrincipals []string

	// Source is the setting by which the login came in, such as
	// "authorized_keys_dir", and Line is where in that: "alice:3" for that
	// folder, "trusted_user_ca_keys ca.pub:1" or the like for the others. They
	// are for logs.
	Source, Line string

	basis basis
}

// An attempt is somebody who would like to log in.
type attempt struct {
	user string
	key  ssh.PublicKey    // which may be cert
	cert *ssh.Certificate // nil for a plain key
	from netip.Addr
	now  time.Time
	// after is until when the answer counted by which the attempt was let in
	// before; zero for a login.
	after time.Time

	hasFile bool // the user has one in Dir; see byDir
}

// Authorize says what the owner of key may do as user, when coming from the
// address from at the time now. The first line with that key whose from and
// expiry-time options fit decides, as with sshd.
//
// It has no effect other than filling caches, so it may be asked about keys that
// are offered and not proven. As far as files go, a user who does not exist costs
// the same steps as one who does; how long a command or a web server takes may
// tell the two apart. It may take twice as long as LookupTimeout for each of them.
// The error is for the operator's log, not for the user.
func (k *Keys) Authorize(user string, key ssh.PublicKey, from netip.Addr, now time.Time) (Grant, error) {
	return k.authorize(&attempt{user: user, key: key, from: from, now: now}, waiting)
}

// effort is how far a decision goes.
type effort int

const (
	waiting      effort = iota // ask everybody, and wait for the answers
	inBackground               // take the answers that are there, and ask for others
	filesOnly                  // ask nobody
)

func (k *Keys) authorize(a *attempt, effort effort) (Grant, error) {
	if !validUser(a.user) {
		return Grant{}, errors.New("not a possible user name")
	}
	// Looked at before anything is read, so that what changes meanwhile is
	// seen to have changed.
	basis := k.look(a.user)
	a.cert, _ = a.key.(*ssh.Certificate)
	if err := a.checkForm(); err != nil {
		return Grant{}, err
	}
	if err := k.checkRevoked(a); err != nil {
		return Grant{}, err
	}
	g, err := k.decide(a, effort, &basis)
	if err != nil {
		return Grant{}, err
	}
	g.basis = basis
	g.Key = ssh.FingerprintSHA256(a.plainKey())
	return g, nil
}

// decide asks one source after the other. The first that knows the key, or the
// authority of the certificate, has the last word, but for certificates: those
// of TrustedUserCAKeys may still be let in by the user's own file, as with sshd.
func (k *Keys) decide(a *attempt, effort effort, basis *basis) (Grant, error) {
	var refusal error
	if a.cert != nil {
		g, known, err := k.byTrustedCA(a)
		if known && err == nil {
			return g, nil
		}
		refusal = err
	}
	g, known, err := k.byDir(a)
	switch {
	case known && err == nil:
		return g, nil
	case refusal != nil: // the better reason
		return Grant{}, refusal
	case known || errors.Is(err, ErrUndecided):
		return Grant{}, err
	}
	refusal = err
	if effort == filesOnly {
		return Grant{}, refusal
	}
	for _, l := range k.outside() {
		if l.needsFile && !a.hasFile {
			continue
		}
		file, until, err := l.ask(a.user, a.key, a.from, effort == waiting, a.after)
		if err != nil {
			refusal = err
			continue
		}
		g, known, err := file.match(a)
		if !known {
			continue
		}
		if err != nil {
			return Grant{}, err
		}
		g.Source, g.Line = l.setting, l.setting+" "+g.Line
		basis.until = until
		return g, nil
	}
	return Grant{}, refusal
}

// checkForm refuses keys of a kind that nobody may use.
func (a *attempt) checkForm() error {
	if a.cert == nil {
		return nil // only keys that are in a file get in, and those were checked
	}
	if a.cert.CertType != ssh.UserCert {
		return errors.New("a certificate that is not for users")
	}
	if err := checkKey(a.cert.Key); err != nil {
		return err
	}
	// Of every certificate, before it is looked for whom it lets in: how long
	// the check takes would tell whether there is such a user. And until then it
	// may say whatever its bearer likes, which is not for our log.
	if err := checkKey(a.cert.SignatureKey); err != nil {
		return fmt.Errorf("the certificate's authority: %w", err)
	}
	return a.signed()
}

// plainKey is the key, without a certificate around it.
func (a *attempt) plainKey() ssh.PublicKey {
	if a.cert != nil {
		return a.cert.Key
	}
	return a.key
}

// byDir asks the user's file in Dir.
func (k *Keys) byDir(a *attempt) (Grant, bool, error) {
	for tries := 0; ; tries++ {
		d, err := k.file(a.user)
		if err != nil {
			return Grant{}, false, err
		}
		if a.hasFile = d != nil; !a.hasFile {
			return Grant{}, false, a.unknown()
		}
		g, known, err := d.text.match(a)
		if err == nil {
			g.Source = sourceDir
			return g, true, nil
		}
		// Whoever writes the file in place will have done so in a moment.
		if !d.halfWritten() || tries == 3 {
			return g, known, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// file returns the user's keys as they are on disk at this moment, or nil.
func (k *Keys) file(user string) (*document[*keyFile], error) {
	return userFile(k, &k.keys, k.Dir, "authorized keys", user, parseFile)
}

// unknown is what nobody says to an attempt.
func (a *attempt) unknown() error {
	if a.cert != nil {
		return fmt.Errorf("nothing trusts the authority of this certificate for %s", a.user)
	}
	return fmt.Errorf("no line of %s's authorized keys has this key", a.user)
}

// validUser says whether name may become part of a path. It is what
// useradd(8) and mail addresses need, and nothing that a file system, a shell
// or the "user+profile" of a login gives a meaning to.
func validUser(name string) bool {
	if name == "" || len(name) > maxUser || name[0] == '-' || name[0] == '.' || strings.Contains(name, "..") {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == '.', c == '_', c == '@', c == '-':
		default:
			return false
		}
	}
	return true
}

// A keyFile is the lines of one user's keys.
type keyFile struct {
	name    string             // for logs
	entries map[string][]entry // by the key's wire format, in the order of the file
}

// parseFile parses every line, and keeps those without a mistake.
func parseFile(path string, data []byte) (*keyFile, []error, error) {
	return parseKeys(path, data, nil)
}

// parseKeys is parseFile, which may also refuse lines by their options.
func parseKeys(path string, data []byte, refuse func(options) error) (*keyFile, []error, error) {
	f := &keyFile{name: filepath.Base(path), entries: make(map[string][]entry)}
	var problems []error
	n := 0
	for line := range bytes.SplitSeq(data, []byte("\n")) {
		n++
		e, err := parseLine(string(line), time.Local)
		if err == nil && e.key != nil && refuse != nil {
			err = refuse(e.options)
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("%s:%d: %w", path, n, err))
			continue
		}
		if e.key == nil {
			continue
		}
		e.line = n
		blob := string(e.key.Marshal())
		f.entries[blob] = append(f.entries[blob], e)
	}
	return f, problems, nil
}

// match finds the first line that lets the attempt in. known says whether there
// is one for its key, or for the authority of its certificate, at all.
func (f *keyFile) match(a *attempt) (g Grant, known bool, err error) {
	key := a.key
	if a.cert != nil {
		key = a.cert.SignatureKey
	}
	err = a.unknown()
	for _, e := range f.entries[string(key.Marshal())] {
		if e.authority != (a.cert != nil) {
			continue
		}
		at := fmt.Sprintf("%s:%d", f.name, e.line)
		known = true
		if a.cert != nil {
			g, err = a.byCertificate(&e.options, e.principals)
		} else {
			g, err = e.grant(a)
		}
		if err == nil {
			g.Line = at
			return g, true, nil
		}
		err = fmt.Errorf("%s: %w", at, err)
	}
	return Grant{}, known, err
}

// check says whether the options let the attempt in at all.
func (o *options) check(a *attempt) error {
	switch {
	case o.from != nil && !o.from.match(a.from):
		return fmt.Errorf("the key may not be used from %v", a.from)
	case !o.expires.IsZero() && a.now.After(o.expires):
		return fmt.Errorf("the key %w at %s", ErrExpired, o.expires.Format(time.RFC3339))
	}
	return nil
}

// grant is what the options give to who proves the key, for the caller to keep
// and change.
func (o *options) grant(a *attempt) (Grant, error) {
	if err := o.check(a); err != nil {
		return Grant{}, err
	}
	p := o.permissions
	p.PermitOpen = slices.Clone(p.PermitOpen)
	p.PermitListen = slices.Clone(p.PermitListen)
	p.Environment = slices.Clone(p.Environment)
	return Grant{Permissions: p, NoTouchRequired: o.noTouch, Expires: o.expires}, nil
}

// report logs what is wrong with the file of that name, a user or a path, or
// with the folder if name is empty, unless that was the last thing said about it.
func (k *Keys) report(what, name string, problems []error) {
	if k.Log == nil {
		return
	}
	all := ""
	if len(problems) > 0 {
		all = errors.Join(problems...).Error()
	}
	id := [2]string{what, name}
	k.mu.Lock()
	news := k.said[id] != all
	switch {
	case all == "":
		delete(k.said, id)
	case news:
		if k.said == nil || len(k.said) >= maxCached {
			k.said = make(map[[2]string]string)
		}
		k.said[id] = all
	}
	k.mu.Unlock()
	if !news {
		return
	}
	level := slog.LevelWarn
	if what == whatRevoked {
		level = slog.LevelError // nobody gets in
	}
	user := slog.String("user", name)
	if !validUser(name) {
		user = slog.Attr{} // the errors have the path
	}
	// A file may hold thousands of mistakes; Check lists all.
	for i, err := range problems {
		if i == 20 {
			k.Log.LogAttrs(context.Background(), level, "more lines of "+what+" refused", user, slog.Int("count", len(problems)-i))
			break
		}
		k.Log.LogAttrs(context.Background(), level, what+" refused", user, slog.Any("err", err))
	}
}

// Check returns all that is wrong with the files that k's fields name: first
// that of the authorized keys as the function [Check] does, then the rest.
// Nothing is run and nobody is asked.
func (k *Keys) Check() []error {
	problems := Check(k.Dir)
	add := func(more []error, err error) {
		problems = append(problems, more...)
		if err != nil {
			problems = append(problems, err)
		}
	}
	for _, path := range k.TrustedUserCAKeys {
		d, err := readFile(path, maxFile, nil, parseCAKeys)
		if err == nil {
			add(d.problems, nil)
		} else {
			add(nil, err)
		}
	}
	if k.AuthorizedPrincipalsDir != "" {
		add(checkDir(k.AuthorizedPrincipalsDir, "authorized principals", parsePrincipals), nil)
	}
	if k.RevokedKeys != "" {
		_, err := readFile(k.RevokedKeys, maxRevoked, nil, parseRevocations)
		add(nil, err)
	}
	if len(k.Command) > 0 {
		_, err := k.command()
		add(nil, err)
	}
	if k.URL != "" {
		_, err := expandURL(k.URL, "user")
		add(nil, err)
	}
	return problems
}

// Check returns all that is wrong with the authorized keys in dir, in the order
// of the files' names, each as "path:line: reason" or "path: reason". Files
// whose name starts with a dot are nobody's keys and are passed over.
func Check(dir string) []error { return checkDir(dir, "authorized keys", parseFile) }

func checkDir[T any](dir, what string, parse parser[T]) []error {
	root, err := openDir(dir, what)
	if err != nil {
		return []error{err}
	}
	defer root.Close()
	files, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return []error{fmt.Errorf("listing the %s: %w", what, err)}
	}
	var problems []error
	for _, f := range files {
		name := f.Name()
		if name[0] == '.' {
			continue
		}
		if !validUser(name) {
			problems = append(problems, fmt.Errorf("%s: the file's name is not a possible user name, so nobody gets in by it", filepath.Join(dir, name)))
			continue
		}
		d, err := readIn(root, name, maxFile, nil, parse)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		problems = append(problems, d.problems...)
	}
	return problems
}
