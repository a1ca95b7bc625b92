package userauth

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"io"
	"math/big"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

func signer(t testing.TB, key any) ssh.Signer {
	t.Helper()
	s, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var rsaKey = sync.OnceValue(func() *rsa.PrivateKey { return mustRSA(2048) })

func mustRSA(bits int) *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		panic(err)
	}
	return key
}

// certificate returns a signer for a user certificate of key.
func certificate(t testing.TB, key ssh.Signer) ssh.Signer {
	t.Helper()
	cert := &ssh.Certificate{
		Key: key.PublicKey(), CertType: ssh.UserCert, KeyId: "test", ValidPrincipals: []string{"alice"},
		ValidBefore: ssh.CertTimeInfinity, Permissions: ssh.Permissions{Extensions: map[string]string{"permit-pty": ""}},
	}
	if err := cert.SignCert(rand.Reader, sshtest.NewKey(t)); err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewCertSigner(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A fidoKey signs as a FIDO key does (OpenSSH's PROTOCOL.u2f).
type fidoKey struct {
	ed    ed25519.PrivateKey
	ec    *ecdsa.PrivateKey // if it is not nil
	flags byte
}

func (k *fidoKey) PublicKey() ssh.PublicKey {
	const application = "ssh:"
	var blob []byte
	if k.ec != nil {
		public, _ := k.ec.PublicKey.Bytes()
		blob = ssh.Marshal(struct {
			Type, Curve string
			Key         []byte
			Application string
		}{ssh.KeyAlgoSKECDSA256, "nistp256", public, application})
	} else {
		blob = ssh.Marshal(struct {
			Type        string
			Key         []byte
			Application string
		}{ssh.KeyAlgoSKED25519, k.ed.Public().(ed25519.PublicKey), application})
	}
	key, err := ssh.ParsePublicKey(blob)
	if err != nil {
		panic(err)
	}
	return key
}

func (k *fidoKey) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	application, message := sha256.Sum256([]byte("ssh:")), sha256.Sum256(data)
	rest := []byte{k.flags, 0, 0, 0, 1}
	signed := append(append(application[:], rest...), message[:]...)
	if k.ec == nil {
		return &ssh.Signature{Format: ssh.KeyAlgoSKED25519, Blob: ed25519.Sign(k.ed, signed), Rest: rest}, nil
	}
	hash := sha256.Sum256(signed)
	r, s, err := ecdsa.Sign(rand.Reader, k.ec, hash[:])
	blob := ssh.Marshal(struct{ R, S *big.Int }{r, s})
	return &ssh.Signature{Format: ssh.KeyAlgoSKECDSA256, Blob: blob, Rest: rest}, err
}

// A testServer is a server whose decisions a test makes, and the client's end of its
// connection.
type testServer struct {
	t      testing.TB
	client net.Conn
	host   ssh.Signer
	done   chan error
}

// serve starts a server that calls decide after the handshake. The client's end of the
// connection is unused.
func serve(t testing.TB, cfg ServerConfig, decide func(s *Server) error) *testServer {
	t.Helper()
	client, server := sshtest.TCPPipe(t)
	w := &testServer{t: t, client: client, host: sshtest.NewKey(t), done: make(chan error, 1)}
	c := transport.NewServer(server, &transport.Config{HostKeys: []ssh.Signer{w.host}, Extensions: Extensions(cfg.Algorithms)})
	go func() {
		err := c.Handshake()
		if err == nil {
			err = decide(NewServer(c, cfg))
		}
		if err != nil {
			c.Close()
		}
		w.done <- err
	}()
	return w
}

// result waits for the error of decide.
func (w *testServer) result() error {
	w.t.Helper()
	select {
	case err := <-w.done:
		return err
	case <-time.After(20 * time.Second):
		w.t.Fatal("the server does not end")
		return nil
	}
}

// conn does the handshake on the client's end.
func (w *testServer) conn() *transport.Conn {
	w.t.Helper()
	c := transport.NewClient(w.client, &transport.Config{HostKey: func(ssh.PublicKey) error { return nil }})
	if err := c.Handshake(); err != nil {
		w.t.Fatal(err)
	}
	return c
}

// accepting lets any key of any user in, and appends the requests to log.
func accepting(log *[]Request) func(s *Server) error {
	return func(s *Server) error {
		for {
			req, err := s.Next()
			if err != nil {
				return err
			}
			*log = append(*log, req)
			switch req := req.(type) {
			case *Query:
				err = s.Accept(req)
			case *Signed:
				return s.Succeed()
			default:
				err = s.Fail()
			}
			if err != nil {
				return err
			}
		}
	}
}

// TestKeys logs in with each kind of key, with package ssh's client and with ours.
func TestKeys(t *testing.T) {
	ec := func(curve elliptic.Curve) *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	_, ed, _ := ed25519.GenerateKey(nil)
	tests := []struct {
		name              string
		key               ssh.Signer
		algorithm         string
		present, verified bool
	}{
		{"ed25519", sshtest.NewKey(t), ssh.KeyAlgoED25519, true, true},
		{"ecdsa 256", signer(t, ec(elliptic.P256())), ssh.KeyAlgoECDSA256, true, true},
		{"ecdsa 384", signer(t, ec(elliptic.P384())), ssh.KeyAlgoECDSA384, true, true},
		{"ecdsa 521", signer(t, ec(elliptic.P521())), ssh.KeyAlgoECDSA521, true, true},
		{"rsa", signer(t, rsaKey()), "", true, true},
		{"fido ed25519", &fidoKey{ed: ed, flags: 1}, ssh.KeyAlgoSKED25519, true, false},
		{"fido ed25519, not touched", &fidoKey{ed: ed}, ssh.KeyAlgoSKED25519, false, false},
		{"fido ed25519, verified", &fidoKey{ed: ed, flags: 5}, ssh.KeyAlgoSKED25519, true, true},
		{"fido ecdsa", &fidoKey{ec: ec(elliptic.P256()), flags: 1}, ssh.KeyAlgoSKECDSA256, true, false},
		{"fido ecdsa, not touched", &fidoKey{ec: ec(elliptic.P256()), flags: 4}, ssh.KeyAlgoSKECDSA256, false, true},
		{"certificate", certificate(t, sshtest.NewKey(t)), ssh.CertAlgoED25519v01, true, true},
		{"rsa certificate", certificate(t, signer(t, rsaKey())), "", true, true},
		{"fido certificate", certificate(t, &fidoKey{ed: ed}), ssh.CertAlgoSKED25519v01, false, false},
	}
	clients := map[string]func(w *testServer, key ssh.Signer) error{
		"ours": func(w *testServer, key ssh.Signer) error {
			return Client(w.conn(), "alice", nil, key)
		},
		"package ssh": func(w *testServer, key ssh.Signer) error {
			conn, _, _, err := ssh.NewClientConn(w.client, "", &ssh.ClientConfig{
				User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
			})
			if err == nil {
				conn.Close()
			}
			return err
		},
	}
	for name, login := range clients {
		for _, tt := range tests {
			t.Run(name+"/"+tt.name, func(t *testing.T) {
				var log []Request
				w := serve(t, ServerConfig{}, accepting(&log))
				if err := login(w, tt.key); err != nil {
					t.Fatalf("client: %v", err)
				}
				if err := w.result(); err != nil {
					t.Fatalf("server: %v", err)
				}
				got, ok := log[len(log)-1].(*Signed)
				if !ok {
					t.Fatalf("last request is %T", log[len(log)-1])
				}
				if !slices.Equal(got.Key.Marshal(), tt.key.PublicKey().Marshal()) || got.User != "alice" {
					t.Errorf("got %+v", got)
				}
				if tt.algorithm != "" && got.Algorithm != tt.algorithm {
					t.Errorf("algorithm %s, want %s", got.Algorithm, tt.algorithm)
				}
				if strings.Contains(tt.name, "rsa") && !strings.HasPrefix(got.Algorithm, "rsa-sha2-") {
					t.Errorf("algorithm %s for RSA", got.Algorithm)
				}
				if got.UserPresent != tt.present || got.UserVerified != tt.verified {
					t.Errorf("present %t, verified %t; want %t, %t", got.UserPresent, got.UserVerified, tt.present, tt.verified)
				}
			})
		}
	}
}

// TestVerify verifies signatures outside of a login. As in one, SHA-1 is not accepted, nor
// are weak keys, and a certificate does not change that.
func TestVerify(t *testing.T) {
	data := []byte("data")
	_, ed, _ := ed25519.GenerateKey(nil)
	sign := func(key ssh.Signer, algorithm string) *ssh.Signature {
		t.Helper()
		var signature *ssh.Signature
		var err error
		if algorithm == "" {
			signature, err = key.Sign(rand.Reader, data)
		} else {
			signature, err = key.(ssh.AlgorithmSigner).SignWithAlgorithm(rand.Reader, data, algorithm)
		}
		if err != nil {
			t.Fatal(err)
		}
		return signature
	}
	plain, large := sshtest.NewKey(t), signer(t, rsaKey())
	weak := signer(t, mustRSA(1024))
	longer := sign(plain, "")
	longer.Rest = []byte{1}
	for _, tt := range []struct {
		name              string
		key               ssh.PublicKey
		signature         *ssh.Signature
		ok                bool
		present, verified bool // if ok
	}{
		{"ed25519", plain.PublicKey(), sign(plain, ""), true, true, true},
		{"certificate", certificate(t, plain).PublicKey(), sign(plain, ""), true, true, true},
		{"rsa", large.PublicKey(), sign(large, ssh.KeyAlgoRSASHA512), true, true, true},
		{"rsa certificate", certificate(t, large).PublicKey(), sign(large, ssh.KeyAlgoRSASHA256), true, true, true},
		{"rsa with SHA-1", large.PublicKey(), sign(large, ssh.KeyAlgoRSA), false, false, false},
		{"rsa certificate with SHA-1", certificate(t, large).PublicKey(), sign(large, ssh.KeyAlgoRSA), false, false, false},
		{"weak rsa", weak.PublicKey(), sign(weak, ssh.KeyAlgoRSASHA512), false, false, false},
		{"another key's", sshtest.NewKey(t).PublicKey(), sign(plain, ""), false, false, false},
		{"data behind it", plain.PublicKey(), longer, false, false, false},
		{"fido, touched", (&fidoKey{ed: ed}).PublicKey(), sign(&fidoKey{ed: ed, flags: 1}, ""), true, true, false},
		{"fido, not touched", (&fidoKey{ed: ed}).PublicKey(), sign(&fidoKey{ed: ed}, ""), true, false, false},
	} {
		present, verified, err := Verify(tt.key, data, tt.signature)
		if (err == nil) != tt.ok || tt.ok && (present != tt.present || verified != tt.verified) {
			t.Errorf("%s: present %t, verified %t, %v", tt.name, present, verified, err)
		}
		if _, _, err := Verify(tt.key, []byte("other data"), tt.signature); err == nil {
			t.Errorf("%s: the signature of other data is accepted", tt.name)
		}
	}
}

// TestSecondFactor asks for a code after the key, with banners around it.
func TestSecondFactor(t *testing.T) {
	var answers []string
	w := serve(t, ServerConfig{}, func(s *Server) error {
		for {
			req, err := s.Next()
			if err != nil {
				return err
			}
			switch req := req.(type) {
			case *Query:
				err = s.Accept(req)
			case *Signed:
				err = errors.Join(s.Banner("one moment\r\n"), s.Partial(MethodKeyboardInteractive))
			case *KeyboardInteractive:
				if answers, err = s.Ask("", "", Prompt{Text: "Code: "}); err != nil {
					return err
				}
				if answers[0] != "123456" {
					if _, err := s.Ask("", "wrong"); err != nil {
						return err
					}
					err = s.Fail()
					break
				}
				return errors.Join(s.Banner("welcome\r\n"), s.Succeed())
			default:
				err = s.Fail()
			}
			if err != nil {
				return err
			}
		}
	})
	var banners []string
	tries := 0
	conn, _, _, err := ssh.NewClientConn(w.client, "", &ssh.ClientConfig{
		User: "alice", HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		BannerCallback: func(m string) error { banners = append(banners, m); return nil },
		Auth: []ssh.AuthMethod{
			ssh.PublicKeys(sshtest.NewKey(t)),
			ssh.RetryableAuthMethod(ssh.KeyboardInteractive(func(_, instruction string, questions []string, echos []bool) ([]string, error) {
				if len(questions) == 0 {
					return nil, nil
				}
				if tries++; tries == 1 {
					return []string{"000000"}, nil
				}
				return []string{"123456"}, nil
			}), 3),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := w.result(); err != nil {
		t.Fatal(err)
	}
	if want := []string{"one moment\r\n", "welcome\r\n"}; !reflect.DeepEqual(banners, want) {
		t.Errorf("banners %q, want %q", banners, want)
	}
	if tries != 2 || answers[0] != "123456" {
		t.Errorf("%d tries, answers %q", tries, answers)
	}
}

// TestClientDenied logs in where no key is taken, and where a key is not enough.
func TestClientDenied(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer func(s *Server) error
		want   []string
		keys   int
	}{
		{"denied", (*Server).Fail, []string{MethodPublicKey}, 2},
		{"partial", func(s *Server) error { return s.Partial(MethodKeyboardInteractive) }, []string{MethodKeyboardInteractive}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keys := 0
			w := serve(t, ServerConfig{}, func(s *Server) error {
				for {
					if _, err := s.Next(); err != nil {
						return err
					}
					keys++
					if err := tt.answer(s); err != nil {
						return err
					}
				}
			})
			c := w.conn()
			err := Client(c, "alice", nil, sshtest.NewKey(t), sshtest.NewKey(t))
			var denied *DeniedError
			if !errors.As(err, &denied) || !errors.Is(err, ErrDenied) || !slices.Equal(denied.Methods, tt.want) {
				t.Errorf("got %v", err)
			}
			c.Close()
			if err := w.result(); err != io.EOF {
				t.Errorf("server: %v", err)
			}
			if keys != tt.keys {
				t.Errorf("%d keys were tried, want %d", keys, tt.keys)
			}
		})
	}
}

// TestClientOfPackageSSH logs in to package ssh's server.
func TestClientOfPackageSSH(t *testing.T) {
	for _, key := range []ssh.Signer{sshtest.NewKey(t), certificate(t, sshtest.NewKey(t)), signer(t, rsaKey())} {
		nc, ns := sshtest.TCPPipe(t)
		sc := &ssh.ServerConfig{
			PublicKeyCallback: func(m ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
				if m.User() != "bob" || !slices.Equal(k.Marshal(), key.PublicKey().Marshal()) {
					return nil, errors.New("another")
				}
				return nil, nil
			},
			BannerCallback: func(ssh.ConnMetadata) string { return "hello" },
		}
		sc.AddHostKey(sshtest.NewKey(t))
		go ssh.NewServerConn(ns, sc)
		c := transport.NewClient(nc, &transport.Config{HostKey: func(ssh.PublicKey) error { return nil }})
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		banner := ""
		if err := Client(c, "bob", func(s string) { banner += s }, sshtest.NewKey(t), key); err != nil {
			t.Fatalf("%s: %v", key.PublicKey().Type(), err)
		}
		if banner != "hello" {
			t.Errorf("banner %q", banner)
		}
		c.Close()
	}
}

// TestSlowAnswer has a server take long to answer: it goes on showing banners, and
// learns from the transport that its client has left.
func TestSlowAnswer(t *testing.T) {
	for _, tt := range []struct {
		name  string
		leave bool
	}{{"stays", false}, {"leaves", true}} {
		t.Run(tt.name, func(t *testing.T) {
			asked, ready := make(chan struct{}), make(chan struct{})
			w := serve(t, ServerConfig{}, func(s *Server) error {
				for {
					req, err := s.Next()
					if err != nil {
						return err
					}
					if _, ok := req.(*Signed); !ok {
						if err := s.Fail(); err != nil {
							return err
						}
						continue
					}
					close(asked)
					go s.Banner("still starting\r\n")
					select {
					case <-ready:
						return s.Succeed()
					case <-s.c.Peek():
						return s.c.ReadError()
					}
				}
			})
			c := w.conn()
			banners := make(chan string, 1)
			done := make(chan error, 1)
			go func() { done <- Client(c, "alice", func(s string) { banners <- s }, sshtest.NewKey(t)) }()
			<-asked
			if got := <-banners; got != "still starting\r\n" {
				t.Errorf("banner %q", got)
			}
			if tt.leave {
				c.Close()
				if err := w.result(); err != io.EOF {
					t.Errorf("server: %v", err)
				}
				<-done
				return
			}
			close(ready)
			if err := <-done; err != nil {
				t.Error(err)
			}
			if err := w.result(); err != nil {
				t.Error(err)
			}
		})
	}
}
