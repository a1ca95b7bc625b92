package transport

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
)

// hostKeys returns one key of each kind.
var hostKeys = sync.OnceValue(func() []ssh.Signer {
	_, ed, _ := ed25519.GenerateKey(nil)
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	p521, _ := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	var signers []ssh.Signer
	for _, key := range []any{ed, p256, p384, p521, r} {
		s, err := ssh.NewSignerFromKey(key)
		if err != nil {
			panic(err)
		}
		signers = append(signers, s)
	}
	return signers
})

// Package sshtest imports this package, so that the tests of package transport, unlike
// those of transport_test, have a newKey and a tcpPipe of their own.

func newKey(t testing.TB) ssh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// tcpPipe returns the two ends of a TCP connection.
func tcpPipe(t testing.TB) (client, server net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err = net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func anyHostKey(ssh.PublicKey) error { return nil }

// pair returns two Conns that have done their handshake with each other, and
// take each other for logged in.
func pair(t testing.TB, clientConfig, serverConfig *Config) (client, server *Conn) {
	t.Helper()
	nc, ns := tcpPipe(t)
	if clientConfig.HostKey == nil {
		clientConfig.HostKey = anyHostKey
	}
	if serverConfig.HostKeys == nil {
		serverConfig.HostKeys = hostKeys()
	}
	client, server = NewClient(nc, clientConfig), NewServer(ns, serverConfig)
	done := make(chan error, 1)
	go func() { done <- server.Handshake() }()
	if err := client.Handshake(); err != nil {
		t.Fatalf("client: %v", err)
	}
	if err := <-done; err != nil {
		t.Fatalf("server: %v", err)
	}
	client.LoggedIn()
	server.LoggedIn()
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func TestPair(t *testing.T) {
	client, server := pair(t, &Config{}, &Config{})
	if !bytes.Equal(client.SessionID(), server.SessionID()) || len(client.SessionID()) == 0 {
		t.Error("session identifiers differ")
	}
	want := append([]byte{94}, bytes.Repeat([]byte("x"), 1000)...)
	for _, ends := range [][2]*Conn{{client, server}, {server, client}} {
		if err := ends[0].WritePacket(want); err != nil {
			t.Fatal(err)
		}
		if err := ends[0].Flush(); err != nil {
			t.Fatal(err)
		}
		got, err := ends[1].ReadPacket()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("got %q", got)
		}
	}
	client.Close()
	if _, err := server.ReadPacket(); err != io.EOF {
		t.Errorf("after Close: %v, want EOF", err)
	}
}

// combinations lists each algorithm at least once.
func combinations() []Config {
	var all []Config
	for _, kex := range slices.Sorted(mapKeys(kexMethods)) {
		all = append(all, Config{KexAlgorithms: []string{kex}})
	}
	for _, name := range slices.Sorted(mapKeys(ciphers)) {
		if ciphers[name].aead {
			all = append(all, Config{Ciphers: []string{name}})
			continue
		}
		for _, mac := range slices.Sorted(mapKeys(macs)) {
			all = append(all, Config{Ciphers: []string{name}, MACs: []string{mac}})
		}
	}
	for _, name := range DefaultHostKeyAlgorithms {
		all = append(all, Config{HostKeyAlgorithms: []string{name}})
	}
	return all
}

func mapKeys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func (cfg *Config) testName() string {
	return strings.Join(slices.Concat(cfg.KexAlgorithms, cfg.Ciphers, cfg.MACs, cfg.HostKeyAlgorithms), " ")
}
