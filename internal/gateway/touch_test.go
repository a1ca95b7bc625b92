package gateway

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
)

// A fidoKey signs as a security key does, OpenSSH PROTOCOL.u2f, with the flags it
// has: bit 0 says that its user has touched it.
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

// TestTouch logs in with security keys that were touched, and with ones that were
// not.
func TestTouch(t *testing.T) {
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
	key, ca := newFIDOKey(t), newKey(t)
	keyText, caText := string(ssh.MarshalAuthorizedKey(key.PublicKey())), string(ssh.MarshalAuthorizedKey(ca.PublicKey()))
	if err := os.Mkdir(filepath.Join(dir, "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	write("keys/required", keyText)
	write("keys/waived", "no-touch-required "+keyText)
	write("keys/line", "cert-authority "+caText)
	write("keys/waivedline", "cert-authority,no-touch-required "+caText)
	keys := &auth.Keys{Dir: filepath.Join(dir, "keys"), TrustedUserCAKeys: []string{write("ca.pub", caText)}}
	onlyLines := &auth.Keys{Dir: keys.Dir}

	certify := func(user string, waives bool, signer ssh.Signer) ssh.Signer {
		cert := &ssh.Certificate{Key: signer.PublicKey(), CertType: ssh.UserCert, KeyId: "x", ValidPrincipals: []string{user}, ValidBefore: ssh.CertTimeInfinity}
		if waives {
			cert.Extensions = map[string]string{"no-touch-required": ""}
		}
		if err := cert.SignCert(rand.Reader, ca); err != nil {
			t.Fatal(err)
		}
		certified, err := ssh.NewCertSigner(cert, signer)
		if err != nil {
			t.Fatal(err)
		}
		return certified
	}
	plain := func(_ string, s ssh.Signer) ssh.Signer { return s }
	cert := func(user string, s ssh.Signer) ssh.Signer { return certify(user, false, s) }
	waiving := func(user string, s ssh.Signer) ssh.Signer { return certify(user, true, s) }
	for _, tt := range []struct {
		name, user string
		keys       *auth.Keys
		as         func(user string, s ssh.Signer) ssh.Signer
		touched    bool // gets in, if the key was touched
		untouched  bool // and if it was not
	}{
		{"a key", "required", keys, plain, true, false},
		{"a key with no-touch-required", "waived", keys, plain, true, true},
		{"a certificate", "alice", keys, cert, true, false},
		{"a certificate with no-touch-required", "alice", keys, waiving, true, true},
		{"an authority of a line, and a certificate", "line", onlyLines, cert, true, false},
		{"an authority of a line with no-touch-required, and a certificate", "waivedline", onlyLines, cert, true, false},
		{"both with no-touch-required", "waivedline", onlyLines, waiving, true, true},
		// The touch could not be asked for.
		{"an authority of a line, and a certificate with no-touch-required", "line", onlyLines, waiving, false, false},
	} {
		for flags, want := range []bool{tt.untouched, tt.touched} {
			w := newWorld(t)
			w.srv.Authorize = tt.keys.Authorize
			nc, served := w.dialFrom(t.Context(), "203.0.113.7")
			c, err := loginOn(nc, tt.user, tt.as(tt.user, fidoKey{key.private, byte(flags)}))
			if (err == nil) != want {
				t.Errorf("%s, flags %d: %v; the log:\n%s", tt.name, flags, err, w.logged())
			}
			if err == nil {
				c.Close()
			}
			nc.Close()
			<-served
		}
	}
}
