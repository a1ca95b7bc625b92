package auth

import (
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/pquerna/otp/hotp"
)

// TOTP asks some users for a second factor: the six digits that an app shows
// (RFC 6238, with SHA-1 and steps of 30 s, which all apps know).
//
// Dir holds a file for each of these users, named as she is. Its first line is
// the secret in base32; what follows is for people. Nobody but the owner may
// read it, who must be root or this process's user. Users without a file are not
// asked.
//
// A code is good for one login, in its own step of 30 s and the two beside it.
// After five that were wrong a user has to wait half a minute for each more.
// What was used and what was wrong is forgotten when the process ends. Methods
// are safe for concurrent use.
type TOTP struct {
	Dir string

	mu    sync.Mutex
	users map[string]*codes // only of users who have a file
}

// codes is what is remembered of a user.
type codes struct {
	last  uint64    // the step of the last code that was right
	wrong int       // since
	until time.Time // when the next may be tried, if there were too many
}

const (
	totpStep  = 30 * time.Second
	wrongMax  = 5
	wrongWait = 30 * time.Second
	// secretLeast is what RFC 4226, section 4, requires.
	secretLeast = 16 // bytes
)

// Why a code is refused.
var (
	ErrCode      = errors.New("the verification code is wrong")
	ErrCodeUsed  = errors.New("the verification code has been used")
	ErrCodeLater = errors.New("too many verification codes were wrong")
)

// Needs reports whether user must give a code. An error means that it cannot be
// found out; nobody may be let in then.
func (t *TOTP) Needs(user string) (bool, error) {
	_, err := t.secret(user)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Check returns nil if code is right for user now, and was never given before.
func (t *TOTP) Check(user, code string, now time.Time) error {
	secret, err := t.secret(user)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.users == nil {
		t.users = map[string]*codes{}
	}
	c := t.users[user]
	if c == nil {
		c = &codes{}
		t.users[user] = c
	}
	if now.Before(c.until) {
		return ErrCodeLater
	}
	code = strings.ReplaceAll(strings.TrimSpace(code), " ", "") // as apps show them
	step := uint64(now.Unix()) / uint64(totpStep/time.Second)
	for _, s := range []uint64{step, step - 1, step + 1} {
		right, err := hotp.ValidateCustom(code, s, secret, hotp.ValidateOpts{Digits: 6})
		switch {
		case err != nil || !right: // too short, say
		case s <= c.last:
			return ErrCodeUsed
		default:
			*c = codes{last: s}
			return nil
		}
	}
	if c.wrong++; c.wrong >= wrongMax {
		c.until = now.Add(wrongWait)
	}
	return ErrCode
}

// secret returns the user's, in base32. The error wraps fs.ErrNotExist if she has
// none, and holds no secret.
func (t *TOTP) secret(user string) (string, error) {
	if !validUser(user) {
		return "", fmt.Errorf("%q is no name of a user: %w", user, fs.ErrNotExist)
	}
	dir, err := openDir(t.Dir, "totp_dir")
	if err != nil {
		return "", fmt.Errorf("%v", err) // a folder that is not there is another matter than a file
	}
	defer dir.Close()
	d, err := readIn(dir, user, 4096, nil, parseSecret)
	if errors.Is(err, fs.ErrNotExist) {
		// A link that leads nowhere, as for a moment in a folder that is being
		// exchanged, is not the same as no secret.
		if _, linkErr := dir.Lstat(user); !errors.Is(linkErr, fs.ErrNotExist) {
			return "", fmt.Errorf("%v", err)
		}
	}
	if err != nil {
		return "", err
	}
	if d.state.mode&0o077 != 0 {
		return "", fmt.Errorf("%s: mode %04o lets others see the secret; chmod 600, and make a new one", filepath.Join(t.Dir, user), d.state.mode&0o7777)
	}
	return d.text, nil
}

func parseSecret(path string, data []byte) (string, []error, error) {
	line, _, _ := strings.Cut(string(data), "\n")
	secret := strings.ToUpper(strings.TrimRight(strings.ReplaceAll(strings.TrimSpace(line), " ", ""), "="))
	base := base32.StdEncoding.WithPadding(base32.NoPadding)
	raw, err := base.DecodeString(secret)
	if err != nil || len(raw) < secretLeast || base.EncodeToString(raw) != secret { // it decodes what is cut off, too
		return "", nil, fmt.Errorf("%s:1: is not a secret of at least %d bytes in base32", path, secretLeast)
	}
	return secret, nil, nil
}

// Problems returns what is wrong with the files.
func (t *TOTP) Problems() []error {
	entries, err := os.ReadDir(t.Dir)
	if err != nil {
		return []error{err}
	}
	var problems []error
	for _, e := range entries {
		if _, err := t.secret(e.Name()); err != nil {
			problems = append(problems, err)
		}
	}
	return problems
}

// Enroll makes a secret for user, writes it to her file, which must not be there,
// and returns the URL by which apps take it, which is as secret. Issuer is what
// the app shows beside the user's name.
func (t *TOTP) Enroll(user, issuer string) (string, error) {
	if !validUser(user) {
		return "", fmt.Errorf("%q is no name of a user", user)
	}
	raw := make([]byte, 20) // what RFC 4226 recommends
	rand.Read(raw)
	secret := base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(raw)
	path := filepath.Join(t.Dir, user)
	// Linked into place when it is whole: a gateway that reads half of it would
	// keep the user out.
	f, err := os.CreateTemp(filepath.Dir(filepath.Clean(t.Dir)), ".totp-*")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(secret + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return "", err
	}
	if err := os.Link(f.Name(), path); errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("%s is there already; remove it first if the user is to get a new secret", path)
	} else if err != nil {
		return "", err
	}
	u := url.URL{Scheme: "otpauth", Host: "totp", Path: "/" + issuer + ":" + user, RawQuery: url.Values{"secret": {secret}, "issuer": {issuer}}.Encode()}
	return u.String(), nil
}
