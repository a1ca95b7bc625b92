package auth

import (
	"context"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pquerna/otp/hotp"
)

// rfcSecret is that of RFC 6238, appendix B: "12345678901234567890".
const rfcSecret = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"

func totpDir(t *testing.T, files map[string]string) *TOTP {
	dir := filepath.Join(t.TempDir(), "totp")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return &TOTP{Dir: dir}
}

// TestTOTPVectors: RFC 6238, appendix B; the last six of its eight digits.
func TestTOTPVectors(t *testing.T) {
	t.Parallel()
	for at, code := range map[int64]string{59: "287082", 1111111109: "081804", 1111111111: "050471", 1234567890: "005924", 2000000000: "279037", 20000000000: "353130"} {
		totp := totpDir(t, map[string]string{"alice": rfcSecret + "\n"})
		if err := totp.Check(t.Context(), "alice", code, time.Unix(at, 0)); err != nil {
			t.Errorf("%s at %d: %v", code, at, err)
		}
		if err := totp.Check(t.Context(), "alice", code, time.Unix(at, 0)); !errors.Is(err, ErrCodeUsed) {
			t.Errorf("%s a second time: %v", code, err)
		}
	}
}

func TestTOTP(t *testing.T) {
	t.Parallel()
	totp := totpDir(t, map[string]string{
		"alice": "gezd gnbv gy3t qojq gezd gnbv gy3t qojq\n# made by hand\n", "bob": rfcSecret,
		"short": "GEZDGNBV\n", "garbage": "not base32!\n", "empty": "",
	})
	if err := os.WriteFile(filepath.Join(totp.Dir, "open"), []byte(rfcSecret), 0o644); err != nil {
		t.Fatal(err)
	}
	for user, want := range map[string]bool{"alice": true, "bob": true, "carol": false, "../totp/alice": false, "": false} {
		if needs, err := totp.Needs(user); needs != want || err != nil {
			t.Errorf("%q: %v, %v", user, needs, err)
		}
	}
	for _, user := range []string{"short", "garbage", "empty", "open"} {
		needs, err := totp.Needs(user)
		if needs || err == nil || strings.Contains(err.Error(), "GEZDG") || strings.Contains(err.Error(), "base32!") {
			t.Errorf("%q: %v, %v", user, needs, err)
		}
		if err := totp.Check(t.Context(), user, "000000", time.Now()); err == nil {
			t.Errorf("%q may log in", user)
		}
	}
	if got := len(totp.Problems()); got != 4 {
		t.Errorf("%d problems: %v", got, totp.Problems())
	}
	// She has one, which cannot be found at the moment.
	if err := os.Symlink("..data/carol", filepath.Join(totp.Dir, "linked")); err != nil {
		t.Fatal(err)
	}
	if needs, err := totp.Needs("linked"); needs || err == nil {
		t.Errorf("with a link that leads nowhere: %v, %v", needs, err)
	}
	gone := &TOTP{Dir: filepath.Join(totp.Dir, "nothing")}
	if needs, err := gone.Needs("alice"); needs || err == nil {
		t.Errorf("without the folder: %v, %v", needs, err)
	}

	now := time.Unix(1_800_000_015, 0) // in the middle of a step
	code := func(at time.Time) string {
		c, err := hotp.GenerateCode(rfcSecret, uint64(at.Unix())/30)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if err := totp.Check(t.Context(), "bob", code(now.Add(-time.Minute)), now); !errors.Is(err, ErrCode) {
		t.Errorf("two steps old: %v", err)
	}
	if err := totp.Check(t.Context(), "bob", code(now.Add(-30*time.Second)), now); err != nil {
		t.Errorf("a step old: %v", err)
	}
	if c := code(now); totp.Check(t.Context(), "bob", " "+c[:3]+" "+c[3:]+"\n", now) != nil {
		t.Error("with a space in it: refused")
	}
	if err := totp.Check(t.Context(), "bob", code(now.Add(-30*time.Second)), now); !errors.Is(err, ErrCodeUsed) {
		t.Errorf("older than one that was used: %v", err)
	}
	if err := totp.Check(t.Context(), "bob", code(now.Add(30*time.Second)), now); err != nil {
		t.Errorf("a step early: %v", err)
	}

	// Whoever guesses has five tries, and then one each half minute.
	later := now.Add(time.Hour)
	for _, wrong := range []string{"", "1", "12345", "1234567", "abcdef"} {
		if err := totp.Check(t.Context(), "bob", wrong, later); !errors.Is(err, ErrCode) {
			t.Errorf("%q: %v", wrong, err)
		}
	}
	if err := totp.Check(t.Context(), "bob", code(later), later); !errors.Is(err, ErrCodeLater) {
		t.Errorf("right, after five wrong ones: %v", err)
	}
	if err := totp.Check(t.Context(), "alice", code(later), later); err != nil {
		t.Errorf("another user meanwhile: %v", err)
	}
	later = later.Add(wrongWait)
	if err := totp.Check(t.Context(), "bob", "000000", later); !errors.Is(err, ErrCode) && !errors.Is(err, ErrCodeLater) {
		t.Error(err)
	}
	if err := totp.Check(t.Context(), "bob", code(later), later); !errors.Is(err, ErrCodeLater) {
		t.Errorf("second try at once: %v", err)
	}
	later = later.Add(wrongWait)
	if err := totp.Check(t.Context(), "bob", code(later), later); err != nil {
		t.Errorf("after the wait: %v", err)
	}
}

func TestEnroll(t *testing.T) {
	t.Parallel()
	totp := totpDir(t, nil)
	text, err := totp.Enroll("alice", "Sallyport")
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "otpauth" || u.Host != "totp" || u.Path != "/Sallyport:alice" {
		t.Fatal(text, err)
	}
	now := time.Now()
	code, err := hotp.GenerateCode(u.Query().Get("secret"), uint64(now.Unix())/30)
	if err != nil {
		t.Fatal(err)
	}
	if err := totp.Check(t.Context(), "alice", code, now); err != nil {
		t.Error(err)
	}
	if _, err := totp.Enroll("alice", "Sallyport"); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("a second time: %v", err)
	}
	if _, err := totp.Enroll("../alice", "Sallyport"); err == nil {
		t.Error("a name that is a path is taken")
	}
	if problems := totp.Problems(); problems != nil {
		t.Error(problems)
	}
}

func FuzzParseSecret(f *testing.F) {
	f.Add([]byte(rfcSecret + "\n"))
	f.Add([]byte("gezd gnbv===\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		secret, _, err := parseSecret("alice", data)
		if err != nil {
			return
		}
		if _, err := hotp.GenerateCode(secret, 1); err != nil {
			t.Errorf("%q is taken for a secret: %v", data, err)
		}
	})
}

// TestSharedCodes: two gateways that share a CodeStore accept a code once, and
// count wrong codes together. Without the store, a code is refused.
func TestSharedCodes(t *testing.T) {
	t.Parallel()
	one := totpDir(t, map[string]string{"alice": rfcSecret + "\n"})
	store := &codeMemory{}
	one.Codes = store
	two := &TOTP{Dir: one.Dir, Codes: store}
	now := time.Unix(1_000_000_000, 0)
	code, err := hotp.GenerateCode(rfcSecret, uint64(now.Unix())/30)
	if err != nil {
		t.Fatal(err)
	}
	if err := one.Check(t.Context(), "alice", code, now); err != nil {
		t.Error(err)
	}
	if err := two.Check(t.Context(), "alice", code, now); !errors.Is(err, ErrCodeUsed) {
		t.Errorf("the same code at another gateway: %v", err)
	}
	for i := range maxWrong {
		if err := []*TOTP{one, two}[i%2].Check(t.Context(), "alice", "000000", now); !errors.Is(err, ErrCode) {
			t.Error(err)
		}
	}
	if err := two.Check(t.Context(), "alice", "000000", now); !errors.Is(err, ErrCodeLater) {
		t.Errorf("after %d wrong codes: %v", maxWrong, err)
	}

	one.Codes = brokenStore{}
	if err := one.Check(t.Context(), "alice", code, now.Add(time.Hour)); err == nil || !strings.Contains(err.Error(), "no table") {
		t.Errorf("without the store: %v", err)
	}
	store.Update(t.Context(), "alice", "totp", func(string) (string, error) { return "{", nil })
	if err := two.Check(t.Context(), "alice", code, now.Add(time.Hour)); err == nil {
		t.Error("accepted beside a text that makes no sense")
	}
}

type brokenStore struct{}

func (brokenStore) Update(context.Context, string, string, func(string) (string, error)) error {
	return errors.New("no table")
}
