package sshtest

import (
	"crypto/rand"
	"testing"

	"golang.org/x/crypto/ssh"
)

// SignCert is [ssh.Certificate.SignCert], but it also signs certificates without principals
// or with an empty one, as other certificate authorities do.
func SignCert(t testing.TB, cert *ssh.Certificate, ca ssh.Signer) {
	t.Helper()
	cert.Nonce = make([]byte, 32)
	rand.Read(cert.Nonce)
	cert.SignatureKey = ca.PublicKey()
	cert.Signature = nil
	unsigned := cert.Marshal()
	signature, err := ca.Sign(rand.Reader, unsigned[:len(unsigned)-4]) // without the length of the signature
	if err != nil {
		t.Fatal(err)
	}
	cert.Signature = signature
}
