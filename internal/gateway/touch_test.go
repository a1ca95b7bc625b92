package gateway

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// A fidoKey signs as a security key does, OpenSSH PROTOCOL.u2f, with the flags it
// has: bit 0 says that its user has touched it, bit 2 that it has verified the user.
type fidoKey struct {
	private ed25519.PrivateKey
	flags   byte
}

const fidoApplication = "ssh:"

func newFIDOKey(t testing.TB) fidoKey {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return fidoKey{private: priv}
}

func (k fidoKey) PublicKey() ssh.PublicKey {
	key, err := ssh.ParsePublicKey(ssh.Marshal(struct {
		Type        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, k.private.Public().(ed25519.PublicKey), fidoApplication}))
	if err != nil {
		panic(err)
	}
	return key
}

func (k fidoKey) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	application, message := sha256.Sum256([]byte(fidoApplication)), sha256.Sum256(data)
	signed := append(application[:], k.flags, 0, 0, 0, 1) // a counter after the flags
	signed = append(signed, message[:]...)
	return &ssh.Signature{Format: ssh.KeyAlgoSKED25519, Blob: ed25519.Sign(k.private, signed), Rest: []byte{k.flags, 0, 0, 0, 1}}, nil
}

// fidoLogins is a folder of keys and an authority, for logins with security keys.
type fidoLogins struct {
	key  fidoKey
	ca   ssh.Signer
	keys *auth.Keys // with the authority
	// onlyLines trusts the authority by cert-authority lines only.
	onlyLines *auth.Keys
}

// newFIDOLogins makes a file of authorized keys for each user, with the options
// before the security key, or before the authority if they have cert-authority.
func newFIDOLogins(t *testing.T, options map[string]string) *fidoLogins {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	l := &fidoLogins{key: newFIDOKey(t), ca: sshtest.NewKey(t)}
	if err := os.Mkdir(filepath.Join(dir, "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	caText := string(ssh.MarshalAuthorizedKey(l.ca.PublicKey()))
	for user, text := range options {
		key := string(ssh.MarshalAuthorizedKey(l.key.PublicKey()))
		if strings.Contains(text, "cert-authority") {
			key = caText
		}
		write("keys/"+user, strings.TrimSpace(text+" "+key)+"\n")
	}
	l.onlyLines = &auth.Keys{Dir: filepath.Join(dir, "keys")}
	l.keys = &auth.Keys{Dir: l.onlyLines.Dir, TrustedUserCAKeys: []string{write("ca.pub", caText)}}
	return l
}

// certify returns signer with a certificate of the authority for user.
func (l *fidoLogins) certify(t *testing.T, user string, permissions ssh.Permissions, signer ssh.Signer) ssh.Signer {
	t.Helper()
	cert := &ssh.Certificate{
		Key: signer.PublicKey(), CertType: ssh.UserCert, KeyId: "x", ValidPrincipals: []string{user}, ValidBefore: ssh.CertTimeInfinity, Permissions: permissions,
	}
	sshtest.SignCert(t, cert, l.ca)
	certified, err := ssh.NewCertSigner(cert, signer)
	if err != nil {
		t.Fatal(err)
	}
	return certified
}

// login logs in to a gateway that authorizes by keys.
func (l *fidoLogins) login(t *testing.T, keys *auth.Keys, user string, signer ssh.Signer) (logged string, err error) {
	t.Helper()
	gw := newTestGateway(t)
	gw.srv.Authorize = keys.Authorize
	nc, served := gw.dialFrom(t.Context(), "203.0.113.7")
	c, err := loginOn(nc, user, signer)
	if err == nil {
		c.Close()
	}
	nc.Close()
	<-served
	return gw.logged(), err
}

// TestTouch logs in with security keys that were touched, and with ones that were
// not.
func TestTouch(t *testing.T) {
	l := newFIDOLogins(t, map[string]string{
		"required": "", "waived": "no-touch-required", "line": "cert-authority", "waivedline": "cert-authority,no-touch-required",
	})
	plain := func(_ string, s ssh.Signer) ssh.Signer { return s }
	cert := func(user string, s ssh.Signer) ssh.Signer { return l.certify(t, user, ssh.Permissions{}, s) }
	waiving := func(user string, s ssh.Signer) ssh.Signer {
		return l.certify(t, user, ssh.Permissions{Extensions: map[string]string{"no-touch-required": ""}}, s)
	}
	for _, tt := range []struct {
		name, user string
		keys       *auth.Keys
		as         func(user string, s ssh.Signer) ssh.Signer
		touched    bool // gets in, if the key was touched
		untouched  bool // and if it was not
	}{
		{"a key", "required", l.keys, plain, true, false},
		{"a key with no-touch-required", "waived", l.keys, plain, true, true},
		{"a certificate", "alice", l.keys, cert, true, false},
		{"a certificate with no-touch-required", "alice", l.keys, waiving, true, true},
		{"an authority of a line, and a certificate", "line", l.onlyLines, cert, true, false},
		{"an authority of a line with no-touch-required, and a certificate", "waivedline", l.onlyLines, cert, true, false},
		{"both with no-touch-required", "waivedline", l.onlyLines, waiving, true, true},
		// Like in sshd, both have to waive it.
		{"an authority of a line, and a certificate with no-touch-required", "line", l.onlyLines, waiving, true, false},
	} {
		for flags, want := range []bool{tt.untouched, tt.touched} {
			if logged, err := l.login(t, tt.keys, tt.user, tt.as(tt.user, fidoKey{l.key.private, byte(flags)})); (err == nil) != want {
				t.Errorf("%s, flags %d: %v; the log:\n%s", tt.name, flags, err, logged)
			}
		}
	}
}

// TestVerifyRequired logs in with security keys that have verified their user, and
// with ones that have not.
func TestVerifyRequired(t *testing.T) {
	l := newFIDOLogins(t, map[string]string{
		"free": "", "required": "verify-required", "untouched": "verify-required,no-touch-required",
		"line": "cert-authority", "requiredline": "cert-authority,verify-required",
	})
	plain := func(_ string, s ssh.Signer) ssh.Signer { return s }
	cert := func(user string, s ssh.Signer) ssh.Signer { return l.certify(t, user, ssh.Permissions{}, s) }
	requiring := func(user string, s ssh.Signer) ssh.Signer {
		return l.certify(t, user, ssh.Permissions{CriticalOptions: map[string]string{"verify-required": ""}}, s)
	}
	const none, touched, verified, both = 0, 1, 4, 5
	for _, tt := range []struct {
		name, user string
		keys       *auth.Keys
		as         func(user string, s ssh.Signer) ssh.Signer
		accepted   []byte // flags of signatures that get in
	}{
		{"a key without options", "free", l.keys, plain, []byte{touched, both}},
		{"a key", "required", l.keys, plain, []byte{both}},
		{"a key with no-touch-required", "untouched", l.keys, plain, []byte{verified, both}},
		{"a certificate", "alice", l.keys, requiring, []byte{both}},
		{"an authority of a line", "requiredline", l.onlyLines, cert, []byte{both}},
		{"an authority of a line, by the certificate", "line", l.onlyLines, requiring, []byte{both}},
	} {
		for _, flags := range []byte{none, touched, verified, both} {
			logged, err := l.login(t, tt.keys, tt.user, tt.as(tt.user, fidoKey{l.key.private, flags}))
			if want := bytes.IndexByte(tt.accepted, flags) >= 0; (err == nil) != want {
				t.Errorf("%s, flags %d: %v; the log:\n%s", tt.name, flags, err, logged)
			}
			if flags == touched && err != nil && !strings.Contains(logged, errVerify.Error()) {
				t.Errorf("%s, not verified: the log does not tell why:\n%s", tt.name, logged)
			}
		}
	}
	// As with sshd, keys of other types are not affected.
	plainKey := sshtest.NewKey(t)
	if logged, err := l.login(t, l.keys, "alice", l.certify(t, "alice", ssh.Permissions{CriticalOptions: map[string]string{"verify-required": ""}}, plainKey)); err != nil {
		t.Errorf("a certificate of a plain key: %v; the log:\n%s", err, logged)
	}
}
