// Package auth decides who may log in as which user, and with which permissions.
//
// [Keys.Authorize] is the decision. It takes a user name, a public key or
// certificate, and the client's address, and refuses the login unless one of these
// sources grants it. They are asked in this order, and the first that knows the key
// decides:
//
//  1. RevokedKeys refuses a key, or a certificate, or all certificates of an
//     authority (revoked.go).
//  2. TrustedUserCAKeys grants a certificate that names the user as a principal
//     (cert.go).
//  3. Dir, a folder with a file of authorized keys for each user, grants the keys in
//     the user's file, and certificates of the authorities in it (keyfile.go). The
//     format is that of sshd(8), AUTHORIZED_KEYS FILE FORMAT.
//  4. SelfService grants the keys that users have added themselves, as far as Dir
//     grants the keys that they were added with (ownkeys.go).
//  5. Command and URL grant the keys that a program or a web server returns for the
//     user (command.go, url.go, lookup.go).
//
// The result is a [Grant]: the permissions, the expiry, and the line that decided. A
// verification code may be required as well; see [TOTP]. Roles may restrict the
// permissions further; see package policy.
//
// A line with a mistake, or with an option that is unknown or not supported, is
// refused: it grants nothing, and does not affect other lines. [Keys.Check] lists
// such lines for the operator, and [Keys] logs them once per change of the file.
//
// # Changing keys while the gateway runs
//
// Each login checks whether the files have changed, so a change takes effect at
// once. Writers should create a new file and rename it over the old one: a reader
// then sees either the old file or the new one. A file that is rewritten in place is
// safe, too. A truncated line is no key, a file that changes while it is read is read
// again, and a file that has just become empty or ends within a line is read again a
// moment later before it refuses a login.
//
// [Keys.Recheck] decides again about a login that has been granted.
//
// # The cost of an unknown key
//
// A key that is only offered costs some calls of stat(2), and the verification of a
// signature if it is a certificate. A command or a web server is asked only if the
// files do not have the key; lookup.go has the limits.
package auth

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

const (
	maxFile = 1 << 20 // bytes of one user's keys
	maxLine = 8 << 10 // bytes, as in sshd(8)
	maxUser = 64      // bytes of a user name
)

var (
	// ErrExpired is the reason if a key or a certificate was valid in the past.
	ErrExpired = errors.New("expired")
	// ErrUndecided is the reason if the decision depends on something that cannot
	// be read. The login is refused, but a login that was granted before should
	// not end because of it.
	ErrUndecided = errors.New("not known")
)

// undecided makes an error ErrUndecided.
type undecided struct{ error }

func (u undecided) Unwrap() []error { return []error{u.error, ErrUndecided} }

// The settings that grant logins, as in [Grant.Source] and in messages.
const (
	sourceDir     = "authorized_keys_dir"
	sourceCA      = "trusted_user_ca_keys"
	sourceOwn     = "self_service_keys"
	sourceCommand = "authorized_keys_command"
	sourceURL     = "authorized_keys_url"
)

// Keys grants logins by public keys. It is safe for concurrent use. It must not be
// copied, nor its fields be changed, after the first use. Fields that sshd_config(5)
// has, too, have the same meaning.
type Keys struct {
	// Dir has one authorized_keys file per user, named like the user. Dir, the
	// files in it and all other files named here must belong to root or to the
	// user of this process, and must be writable by their owner only or be on a
	// read-only mount. Files in Dir may be symbolic links; see folder.open. Files
	// with names that no user can have are ignored; see checkName.
	Dir string

	// TrustedUserCAKeys are the paths of files of public keys, one per line: the
	// authorities whose certificates grant logins to the users they name as
	// principals. A certificate without principals grants nothing.
	TrustedUserCAKeys []string
	// AuthorizedPrincipalsDir, if not empty, has a file per user with the
	// principals that grant a login as her, in the format of
	// AuthorizedPrincipalsFile. Then the user's own name is a principal only if
	// the file has it.
	AuthorizedPrincipalsDir string
	// RevokedKeys, if not empty, is the path of a list of public keys, one per
	// line, or of a key revocation list of ssh-keygen(1). If it cannot be read,
	// every login is refused.
	RevokedKeys string

	// Command, if not empty, is a program and its arguments. It prints the
	// authorized keys of a user, and runs as the account CommandUser. See
	// command.go for the tokens in the arguments.
	Command     []string
	CommandUser string
	// URL, if not empty, is the address of a user's authorized keys, in which %u
	// stands for her name. Its scheme is https, except for this machine. It is
	// asked only for users who have a file in Dir, which may be empty: most
	// accounts at such a server are no users of this gateway.
	URL string
	// LookupTimeout limits Command and URL; zero means 10 s. LookupCache is how
	// long an answer is cached; zero means a minute. LookupStale is how long an
	// answer of URL is used while URL fails, and how long a login that was granted
	// by Command or URL survives failures; zero means 10 minutes.
	LookupTimeout, LookupCache, LookupStale time.Duration

	// SelfService, if not empty, is the folder of the keys that users have added
	// themselves; see ownkeys.go. MakeOwn creates it.
	SelfService string

	// Log, if not nil, receives the mistakes in the files, once per change.
	Log *slog.Logger

	keys       cache[*keyFile]        // by user
	own        cache[[]ownEntry]      // by user
	principals cache[[]principalLine] // by user
	cas        cache[map[string]int]  // by path; the number of each key's line
	revoked    cache[*revocations]    // by path
	// revokedBefore is the content of RevokedKeys before its last change.
	revokedBefore atomic.Pointer[document[*revocations]]

	externalOnce sync.Once
	external     []*lookup // Command and URL

	mu           sync.Mutex
	lastReported map[problemKey]string // the problems that were last logged
	dirStates    map[fileKind]state    // of the folders whose file names were last checked
	shared       []state               // of the files for all users; see statAll
	sharedAt     time.Time
}

// A Grant is the result of a decision in favour of a login: the permissions of a
// line of authorized keys, or of a certificate.
type Grant struct {
	identity.Permissions
	// NoTouchRequired waives the touch of a FIDO key. Unless it is set, the caller
	// must refuse a signature of such a key without the flag for user presence.
	NoTouchRequired bool
	// VerifyRequired requires that a FIDO key has verified its user, by a PIN or a
	// fingerprint. If it is set, the caller must refuse a signature of such a key
	// without the flag for user verification. As with sshd, keys of other types
	// are not affected.
	VerifyRequired bool
	// Expires is the last moment at which the grant is valid; zero means never.
	// The caller ends sessions that are open then.
	Expires time.Time

	// Key is the SHA-256 fingerprint of the key, as ssh-keygen -l prints it. For a
	// certificate it is that of the certified key.
	Key string
	// CertKeyID, CertSerial and Principals are fields of the certificate, CAKey is
	// the fingerprint of the key that signed it. They are empty for a plain key.
	CertKeyID  string
	CertSerial uint64
	CAKey      string
	Principals []string
	// RolePrincipals are the Principals that may select roles: all of them if the
	// authority is in TrustedUserCAKeys. An authority in a user's file is trusted
	// for the principals of its line only, so that it cannot hand out roles.
	RolePrincipals []string

	// Source is the setting that granted the login, such as "authorized_keys_dir".
	// Line is the place in it, such as "alice:3" or "trusted_user_ca_keys
	// ca.pub:1". Both are for logs.
	Source, Line string

	deps dependencies
}

// An attempt is the input of a decision.
type attempt struct {
	user string
	key  ssh.PublicKey    // may be cert
	cert *ssh.Certificate // nil for a plain key
	from netip.Addr
	now  time.Time
	// answersSince, if not zero, is the end of the validity of the answer that
	// granted the login before; see lookup.usable.
	answersSince time.Time

	hasFile bool // in Dir; set by byDir
}

// Authorize decides whether the owner of key may log in as user from the address
// from at the time now. As with sshd, the first line with the key whose from and
// expiry-time options fit decides.
//
// The only side effect is on caches, so Authorize may be called for a key that is
// offered and not proven. For files, the steps are the same whether the user exists
// or not; the duration of a lookup may tell. Authorize may block for twice
// LookupTimeout for each of Command and URL. The error is for the operator's log, not
// for the user.
func (k *Keys) Authorize(user string, key ssh.PublicKey, from netip.Addr, now time.Time) (Grant, error) {
	return k.authorize(&attempt{user: user, key: key, from: from, now: now}, lookupAndWait)
}

// A lookupMode tells a decision how to use Command and URL.
type lookupMode int

const (
	lookupAndWait      lookupMode = iota // wait for answers
	lookupInBackground                   // use cached answers, ask for new ones in the background
	lookupNever                          // use files only
)

func (k *Keys) authorize(a *attempt, mode lookupMode) (Grant, error) {
	if err := checkName(a.user); err != nil {
		return Grant{}, err
	}
	// Before any file is read, so that a change during the decision is noticed.
	deps := k.statAll(a.user)
	a.cert, _ = a.key.(*ssh.Certificate)
	if err := a.checkForm(); err != nil {
		return Grant{}, err
	}
	if err := k.checkRevoked(a); err != nil {
		return Grant{}, err
	}
	g, err := k.decide(a, mode, &deps)
	if err != nil {
		return Grant{}, err
	}
	g.deps = deps
	g.Key = Fingerprint(a.key)
	return g, nil
}

// decide asks the sources in order. The first that knows the key, or the authority
// of the certificate, decides. As with sshd there is one exception: a certificate
// that TrustedUserCAKeys refuses may still be granted by the user's file.
func (k *Keys) decide(a *attempt, mode lookupMode, deps *dependencies) (Grant, error) {
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
	if g, known, err := k.byOwn(a); known && err == nil {
		return g, nil
	} else if known || errors.Is(err, ErrUndecided) {
		return Grant{}, err
	}
	if mode == lookupNever {
		return Grant{}, refusal
	}
	for _, l := range k.externalSources() {
		if l.needsFile && !a.hasFile {
			continue
		}
		file, until, err := l.ask(a.user, a.key, a.from, mode == lookupAndWait, a.answersSince)
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
		deps.refreshAt = until
		return g, nil
	}
	return Grant{}, refusal
}

// checkForm refuses keys that no source may grant.
func (a *attempt) checkForm() error {
	if a.cert == nil {
		return nil // a file grants only keys that were checked when it was parsed
	}
	if a.cert.CertType != ssh.UserCert {
		return errors.New("a certificate that is not for users")
	}
	if err := checkKey(a.cert.Key); err != nil {
		return err
	}
	// The signature of every certificate is verified, before the search for a
	// source that trusts it: the time it takes must not tell whether the user
	// exists, and the fields of a forged certificate must not reach the log.
	if err := checkKey(a.cert.SignatureKey); err != nil {
		return fmt.Errorf("the certificate's authority: %w", err)
	}
	return a.checkCertSignature()
}

// errUnknownKey is the refusal if no source knows the key.
func (a *attempt) errUnknownKey() error {
	if a.cert != nil {
		return fmt.Errorf("nothing trusts the authority of this certificate for %s", a.user)
	}
	return fmt.Errorf("no line of %s's authorized keys has this key", a.user)
}

// plainKey is key, without the certificate around it if there is one.
func plainKey(key ssh.PublicKey) ssh.PublicKey {
	if cert, ok := key.(*ssh.Certificate); ok {
		return cert.Key
	}
	return key
}

// Fingerprint is the SHA-256 fingerprint of key as ssh-keygen -l prints it. For a
// certificate it is that of the certified key.
func Fingerprint(key ssh.PublicKey) string { return ssh.FingerprintSHA256(plainKey(key)) }
