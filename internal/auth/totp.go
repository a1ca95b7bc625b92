package auth

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"encoding/json"
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

// TOTP verifies the second factor of the users with a secret: six digits that an app
// displays (RFC 6238, with SHA-1 and steps of 30 s, which all apps support).
//
// Dir has a file for each such user, named like the user. The first line is the
// secret in base32; the rest is a comment. The file must belong to root or to the
// user of this process, and only the owner may be able to read it. Users without a
// file need no code.
//
// A code is valid for one login, in its own step and in the steps before and after
// it. After five wrong codes in a row, a user has to wait half a minute before each
// further one. Methods are safe for concurrent use.
type TOTP struct {
	Dir string
	// Codes stores the used codes and the number of wrong ones. If it is nil, they
	// are in memory, and are lost when the process ends.
	Codes CodeStore

	memory codeMemory
}

// A CodeStore stores a short text for each user and name. Gateways with the same users
// share one.
type CodeStore interface {
	// Update replaces the text by the result of change. old is empty if there is no
	// text. change may be called more than once. If it returns an error, the text
	// does not change, and Update returns that error.
	Update(ctx context.Context, user, name string, change func(old string) (string, error)) error
}

// codeMemory is the CodeStore of one process. The zero value is empty.
type codeMemory struct {
	mu    sync.Mutex
	texts map[[2]string]string
}

func (m *codeMemory) Update(_ context.Context, user, name string, change func(string) (string, error)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	next, err := change(m.texts[[2]string{user, name}])
	if err != nil {
		return err
	}
	if m.texts == nil {
		m.texts = map[[2]string]string{}
	}
	m.texts[[2]string{user, name}] = next
	return nil
}

// usedCodes is a user's text in a CodeStore, in JSON.
type usedCodes struct {
	Last  uint64    `json:"last"`           // the step of the last correct code
	Wrong int       `json:"wrong"`          // wrong codes since then
	Until time.Time `json:"until,omitzero"` // no code is verified before; zero if few were wrong
}

const (
	totpStep  = 30 * time.Second
	maxWrong  = 5
	wrongWait = 30 * time.Second
	// Bytes of a secret: the least that RFC 4226 section 4 permits, and the
	// recommended number.
	minSecret, newSecret = 16, 20
)

// The reasons to refuse a code.
var (
	ErrCode      = errors.New("the verification code is wrong")
	ErrCodeUsed  = errors.New("the verification code has been used")
	ErrCodeLater = errors.New("too many verification codes were wrong")
)

// Needs reports whether user must give a code. If there is an error, the caller must
// refuse the login.
func (t *TOTP) Needs(user string) (bool, error) {
	_, err := t.secret(user)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Check returns nil if code is correct for user at the time now, and has not been
// used. If the CodeStore cannot be reached, the code is refused.
func (t *TOTP) Check(ctx context.Context, user, code string, now time.Time) error {
	secret, err := t.secret(user)
	if err != nil {
		return err
	}
	var codes CodeStore = &t.memory
	if t.Codes != nil {
		codes = t.Codes
	}
	var verdict error
	err = codes.Update(ctx, user, "totp", func(old string) (string, error) {
		var used usedCodes
		if old != "" {
			if err := json.Unmarshal([]byte(old), &used); err != nil {
				return "", fmt.Errorf("the used codes: %w", err)
			}
		}
		verdict = used.check(secret, code, now)
		next, err := json.Marshal(used)
		return string(next), err
	})
	if err != nil {
		return fmt.Errorf("checking the used codes: %w", err)
	}
	return verdict
}

// check returns nil if code is correct and unused. It enters the code in c.
func (c *usedCodes) check(secret, code string, now time.Time) error {
	if now.Before(c.Until) {
		return ErrCodeLater
	}
	code = strings.ReplaceAll(strings.TrimSpace(code), " ", "") // apps display groups of digits
	step := uint64(now.Unix()) / uint64(totpStep/time.Second)
	for _, s := range []uint64{step, step - 1, step + 1} {
		right, err := hotp.ValidateCustom(code, s, secret, hotp.ValidateOpts{Digits: 6})
		switch {
		case err != nil || !right: // an error is a wrong length
		case s <= c.Last:
			return ErrCodeUsed
		default:
			*c = usedCodes{Last: s}
			return nil
		}
	}
	if c.Wrong++; c.Wrong >= maxWrong {
		c.Until = now.Add(wrongWait)
	}
	return ErrCode
}

// secret returns the user's secret in base32. The error wraps fs.ErrNotExist if there
// is none. It never contains a secret.
func (t *TOTP) secret(user string) (string, error) {
	if !validUser(user) {
		return "", fmt.Errorf("%q is not a user name: %w", user, fs.ErrNotExist)
	}
	dir, err := openDir(t.Dir, kindTOTP)
	if err != nil {
		return "", fmt.Errorf("%v", err) // not wrapped: a missing folder does not mean that there is no secret
	}
	defer dir.Close()
	d, err := readIn(dir, user, 4096, nil, parseSecret)
	if errors.Is(err, fs.ErrNotExist) {
		// A link without a target, as for a moment while a folder is being
		// replaced, does not mean that there is no secret.
		if !dir.missing(user) {
			return "", fmt.Errorf("%v", err)
		}
	}
	if err != nil {
		return "", err
	}
	if d.state.mode&0o077 != 0 {
		return "", fmt.Errorf("%s: mode %04o lets others see the secret; chmod 600, and make a new one", filepath.Join(t.Dir, user), d.state.mode&0o7777)
	}
	return d.content, nil
}

func parseSecret(path string, data []byte) (string, []error, error) {
	line, _, _ := strings.Cut(string(data), "\n")
	secret := strings.ToUpper(strings.TrimRight(strings.ReplaceAll(strings.TrimSpace(line), " ", ""), "="))
	base := base32.StdEncoding.WithPadding(base32.NoPadding)
	raw, err := base.DecodeString(secret)
	if err != nil || len(raw) < minSecret || base.EncodeToString(raw) != secret { // DecodeString accepts truncated text
		return "", nil, fmt.Errorf("%s:1: not a secret of at least %d bytes in base32", path, minSecret)
	}
	return secret, nil, nil
}

// Problems returns all mistakes in the files.
func (t *TOTP) Problems() []error {
	dir, err := openDir(t.Dir, kindTOTP)
	if err != nil {
		return []error{err}
	}
	defer dir.Close()
	names, err := dir.names()
	if err != nil {
		return []error{err}
	}
	var problems []error
	for _, name := range names {
		if err := checkName(name); err != nil {
			problems = append(problems, misnamed(dir, name, err))
		} else if _, err := t.secret(name); err != nil {
			problems = append(problems, err)
		}
	}
	return problems
}

// Without returns the users with a file in the folder of authorized keys, but without a
// secret.
func (t *TOTP) Without(keys string) ([]string, error) {
	users, err := Users(keys)
	if err != nil {
		return nil, err
	}
	var without []string
	for _, name := range users {
		if has, err := t.Needs(name); err == nil && !has {
			without = append(without, name)
		}
	}
	return without, nil
}

// Enroll creates a secret for user and writes it to her file, which must not exist. It
// returns the URL with which an app imports the secret, and which is as confidential.
// The app displays issuer beside the user's name.
func (t *TOTP) Enroll(user, issuer string) (string, error) {
	if err := checkName(user); err != nil {
		return "", fmt.Errorf("%q: %w", user, err)
	}
	raw := make([]byte, newSecret)
	rand.Read(raw)
	secret := base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(raw)
	path := filepath.Join(t.Dir, user)
	// A link, because it is atomic and does not replace a file.
	temp, err := writeTemp(filepath.Dir(filepath.Clean(t.Dir)), []byte(secret+"\n"))
	if err != nil {
		return "", err
	}
	defer os.Remove(temp)
	if err := os.Link(temp, path); errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("%s exists already; remove it first if the user is to get a new secret", path)
	} else if err != nil {
		return "", err
	}
	u := url.URL{Scheme: "otpauth", Host: "totp", Path: "/" + issuer + ":" + user, RawQuery: url.Values{"secret": {secret}, "issuer": {issuer}}.Encode()}
	return u.String(), nil
}
