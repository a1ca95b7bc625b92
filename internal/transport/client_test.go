package transport

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"slices"
	"testing"

	"golang.org/x/crypto/ssh"
)

// TestClientAgainstServers has servers show host keys that are not theirs, not
// trusted, or not the same as before.
func TestClientAgainstServers(t *testing.T) {
	other := newKey(t)
	ed := hostKeys()[0]
	for _, tt := range []struct {
		name   string
		signer func(s ssh.Signer) ssh.Signer
		want   string
	}{
		{"another key signs", func(s ssh.Signer) ssh.Signer { return liar{PublicKeySigner: s, signer: other} }, "the host key signature is wrong"},
		{"the signature has no bytes", func(s ssh.Signer) ssh.Signer { return liar{PublicKeySigner: s} }, "the host key signature is wrong"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nc, ns := tcpPipe(t)
			server := NewServer(ns, &Config{HostKeys: []ssh.Signer{tt.signer(ed)}})
			go server.Handshake()
			asked := false
			client := NewClient(nc, &Config{HostKey: func(ssh.PublicKey) error { asked = true; return nil }})
			err := client.Handshake()
			if err == nil || err.Error() != tt.want {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if asked {
				t.Error("the key was shown to HostKey before it was proven")
			}
			server.Close()
		})
	}
	t.Run("not trusted", func(t *testing.T) {
		nc, ns := tcpPipe(t)
		server := NewServer(ns, &Config{HostKeys: hostKeys()})
		done := make(chan error, 1)
		go func() { done <- server.Handshake() }()
		refuse := errors.New("not this one")
		client := NewClient(nc, &Config{HostKey: func(ssh.PublicKey) error { return refuse }})
		var hostKey *HostKeyError
		if err := client.Handshake(); !errors.Is(err, refuse) || !errors.As(err, &hostKey) {
			t.Errorf("client: %v", err)
		}
		var d *DisconnectError
		if err := <-done; !errors.As(err, &d) || d.Reason != ReasonHostKeyNotVerifiable {
			t.Errorf("server: %v", err)
		}
	})
	t.Run("another key later", func(t *testing.T) {
		serverConfig := &Config{HostKeys: hostKeys()}
		client, server := pair(t, &Config{}, serverConfig)
		serverConfig.HostKeys = []ssh.Signer{other}
		go func() {
			for {
				if _, err := server.ReadPacket(); err != nil {
					return
				}
			}
		}()
		client.Rekey()
		var hostKey *HostKeyError
		if _, err := client.ReadPacket(); !errors.As(err, &hostKey) {
			t.Errorf("client: %v", err)
		}
	})
}

// A liar shows one key and signs with another, or with nothing.
type liar struct {
	PublicKeySigner ssh.Signer
	signer          ssh.Signer
}

func (l liar) PublicKey() ssh.PublicKey { return l.PublicKeySigner.PublicKey() }

func (l liar) Sign(r io.Reader, data []byte) (*ssh.Signature, error) {
	if l.signer == nil {
		return &ssh.Signature{Format: l.PublicKey().Type()}, nil
	}
	return l.signer.Sign(r, data)
}

// TestHostKeyAlgorithms lists what a server offers with some sets of host keys.
func TestHostKeyAlgorithms(t *testing.T) {
	ed, p256, r := hostKeys()[0], hostKeys()[1], hostKeys()[4]
	certified := hostCertificate(t, ed, newKey(t))
	only256, err := ssh.NewSignerWithAlgorithms(r.(ssh.AlgorithmSigner), []string{ssh.KeyAlgoRSASHA256})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		keys    []ssh.Signer
		allowed []string
		want    []string
	}{
		{"one", []ssh.Signer{ed}, nil, []string{ssh.KeyAlgoED25519}},
		{"rsa", []ssh.Signer{r}, nil, []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}},
		{"rsa for one algorithm", []ssh.Signer{only256}, nil, []string{ssh.KeyAlgoRSASHA256}},
		{"rsa without a choice of algorithms", []ssh.Signer{liar{PublicKeySigner: r, signer: r}}, nil, nil},
		{"two", []ssh.Signer{p256, ed}, nil, []string{ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256}},
		{"certificate first", []ssh.Signer{ed, certified}, nil, []string{ssh.CertAlgoED25519v01, ssh.KeyAlgoED25519}},
		{"allowed", []ssh.Signer{ed, p256, certified}, []string{ssh.KeyAlgoECDSA256}, []string{ssh.KeyAlgoECDSA256}},
	} {
		if got := serverHostKeyAlgorithms(&Config{HostKeys: tt.keys, HostKeyAlgorithms: tt.allowed}); !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func hostCertificate(t testing.TB, key, authority ssh.Signer) ssh.Signer {
	t.Helper()
	cert := &ssh.Certificate{Key: key.PublicKey(), CertType: ssh.HostCert, ValidPrincipals: []string{"gateway"}, ValidBefore: ssh.CertTimeInfinity}
	if err := cert.SignCert(rand.Reader, authority); err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewCertSigner(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// TestHostCertificates shows host certificates of each kind of key, to our client
// and to package ssh's.
func TestHostCertificates(t *testing.T) {
	authority := newKey(t)
	for _, key := range hostKeys() {
		certified := hostCertificate(t, key, authority)
		for _, name := range certAlgorithms {
			if hostKeyAlgorithms[name].keyType != certified.PublicKey().Type() {
				continue
			}
			var shown ssh.PublicKey
			client, server := pair(t, &Config{HostKeyAlgorithms: []string{name}, HostKey: func(k ssh.PublicKey) error { shown = k; return nil }},
				&Config{HostKeys: []ssh.Signer{key, certified}})
			if _, ok := shown.(*ssh.Certificate); !ok || !bytes.Equal(server.HostKey().Marshal(), client.HostKey().Marshal()) {
				t.Errorf("%s: shown was a %T", name, shown)
			}

			nc, ns := tcpPipe(t)
			server = NewServer(ns, &Config{HostKeys: []ssh.Signer{certified}})
			go server.Handshake()
			checker := &ssh.CertChecker{IsHostAuthority: func(k ssh.PublicKey, _ string) bool {
				return bytes.Equal(k.Marshal(), authority.PublicKey().Marshal())
			}}
			checked := false
			_, _, _, err := ssh.NewClientConn(nc, "gateway:22", &ssh.ClientConfig{
				HostKeyAlgorithms: []string{name},
				HostKeyCallback: func(host string, addr net.Addr, k ssh.PublicKey) error {
					checked = true
					if err := checker.CheckHostKey(host, addr, k); err != nil {
						t.Error(err)
					}
					return errors.New("that was all")
				},
			})
			if !checked {
				t.Errorf("%s with package ssh: %v", name, err)
			}
			server.Close()
		}
	}
}
