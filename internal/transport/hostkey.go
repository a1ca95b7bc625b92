package transport

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/crypto/ssh"
)

// A hostKeyAlgorithm is the meaning of a host key algorithm's name in KEXINIT (RFC 8332,
// OpenSSH's PROTOCOL.certkeys).
type hostKeyAlgorithm struct {
	keyType   string // ssh.PublicKey.Type
	signature string // ssh.Signature.Format
}

var hostKeyAlgorithms = map[string]hostKeyAlgorithm{
	ssh.KeyAlgoED25519:   {ssh.KeyAlgoED25519, ssh.KeyAlgoED25519},
	ssh.KeyAlgoECDSA256:  {ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA256},
	ssh.KeyAlgoECDSA384:  {ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA384},
	ssh.KeyAlgoECDSA521:  {ssh.KeyAlgoECDSA521, ssh.KeyAlgoECDSA521},
	ssh.KeyAlgoRSASHA256: {ssh.KeyAlgoRSA, ssh.KeyAlgoRSASHA256},
	ssh.KeyAlgoRSASHA512: {ssh.KeyAlgoRSA, ssh.KeyAlgoRSASHA512},

	ssh.CertAlgoED25519v01:   {ssh.CertAlgoED25519v01, ssh.KeyAlgoED25519},
	ssh.CertAlgoECDSA256v01:  {ssh.CertAlgoECDSA256v01, ssh.KeyAlgoECDSA256},
	ssh.CertAlgoECDSA384v01:  {ssh.CertAlgoECDSA384v01, ssh.KeyAlgoECDSA384},
	ssh.CertAlgoECDSA521v01:  {ssh.CertAlgoECDSA521v01, ssh.KeyAlgoECDSA521},
	ssh.CertAlgoRSASHA256v01: {ssh.CertAlgoRSAv01, ssh.KeyAlgoRSASHA256},
	ssh.CertAlgoRSASHA512v01: {ssh.CertAlgoRSAv01, ssh.KeyAlgoRSASHA512},
}

// certAlgorithms are the names for host certificates, in order of preference.
var certAlgorithms = []string{
	ssh.CertAlgoED25519v01, ssh.CertAlgoECDSA256v01, ssh.CertAlgoECDSA384v01, ssh.CertAlgoECDSA521v01,
	ssh.CertAlgoRSASHA512v01, ssh.CertAlgoRSASHA256v01,
}

// serverHostKeyAlgorithms returns the algorithms of a server's host keys:
// certificates first, as sshd offers them.
func serverHostKeyAlgorithms(cfg *Config) []string {
	allowed := cfg.HostKeyAlgorithms
	if allowed == nil {
		allowed = append(slices.Clone(certAlgorithms), DefaultHostKeyAlgorithms...)
	}
	var names []string
	for _, name := range allowed {
		if hostKeySigner(cfg, name) != nil {
			names = append(names, name)
		}
	}
	return names
}

// hostKeySigner returns the first of the server's keys that can sign with an
// algorithm, or nil.
func hostKeySigner(cfg *Config, name string) ssh.Signer {
	algorithm, ok := hostKeyAlgorithms[name]
	if !ok {
		return nil
	}
	for _, signer := range cfg.HostKeys {
		if signer.PublicKey().Type() == algorithm.keyType && canSign(signer, algorithm.signature) {
			return signer
		}
	}
	return nil
}

func canSign(signer ssh.Signer, signature string) bool {
	if multi, ok := signer.(ssh.MultiAlgorithmSigner); ok {
		return slices.Contains(multi.Algorithms(), signature)
	}
	if _, ok := signer.(ssh.AlgorithmSigner); ok {
		return true
	}
	// A plain Signer signs with the algorithm of its key's type, which for
	// RSA is SHA-1.
	return signature != ssh.KeyAlgoRSASHA256 && signature != ssh.KeyAlgoRSASHA512
}

// signExchange signs the exchange hash.
func signExchange(signer ssh.Signer, name string, hash []byte) ([]byte, error) {
	format := hostKeyAlgorithms[name].signature
	var signature *ssh.Signature
	var err error
	if algorithmSigner, ok := signer.(ssh.AlgorithmSigner); ok {
		signature, err = algorithmSigner.SignWithAlgorithm(rand.Reader, hash, format)
	} else {
		signature, err = signer.Sign(rand.Reader, hash)
	}
	if err != nil {
		return nil, fmt.Errorf("signing with the host key: %w", err)
	}
	if signature.Format != format {
		return nil, fmt.Errorf("the host key signed with %s in place of %s", signature.Format, format)
	}
	return ssh.Marshal(signature), nil
}

// A HostKeyError says that the client does not accept the server's host key.
type HostKeyError struct{ Err error }

func (e *HostKeyError) Error() string { return "host key: " + e.Err.Error() }
func (e *HostKeyError) Unwrap() error { return e.Err }

// checkHostKey verifies the server's signature over the exchange hash, and then asks
// Config.HostKey about the key. In later key exchanges the key must be the same.
func (c *Conn) checkHostKey(name string, blob, signatureBlob, hash []byte) error {
	algorithm := hostKeyAlgorithms[name]
	// Cloned, because a key refers to the bytes that it was parsed from, and
	// outlives the packet.
	key, err := ssh.ParsePublicKey(bytes.Clone(blob))
	if err != nil {
		return &ProtocolError{ReasonKeyExchangeFailed, "malformed host key"}
	}
	if key.Type() != algorithm.keyType {
		return &ProtocolError{ReasonKeyExchangeFailed, "the host key is not of the type that was negotiated"}
	}
	if err := checkRSA(key); err != nil {
		return &HostKeyError{err}
	}
	var signature ssh.Signature
	if err := ssh.Unmarshal(signatureBlob, &signature); err != nil || len(signature.Rest) > 0 {
		return &ProtocolError{ReasonKeyExchangeFailed, "malformed host key signature"}
	}
	if signature.Format != algorithm.signature {
		return &ProtocolError{ReasonKeyExchangeFailed, "the host key signature is not of the type that was negotiated"}
	}
	if err := key.Verify(hash, &signature); err != nil {
		return &ProtocolError{ReasonKeyExchangeFailed, "the host key signature is wrong"}
	}
	if c.hostKey != nil {
		if !bytes.Equal(c.hostKey.Marshal(), blob) {
			return &HostKeyError{errors.New("it has changed since the first key exchange")}
		}
		return nil
	}
	if err := c.cfg.HostKey(key); err != nil {
		return &HostKeyError{err}
	}
	c.hostKey = key
	return nil
}

// checkRSA bounds RSA moduli, because small ones are weak, and large ones cost the
// client much CPU time.
func checkRSA(key ssh.PublicKey) error {
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	wrapper, ok := key.(ssh.CryptoPublicKey)
	if !ok {
		return nil
	}
	if public, ok := wrapper.CryptoPublicKey().(*rsa.PublicKey); ok {
		if bits := public.N.BitLen(); bits < 2048 || bits > 8192 {
			return fmt.Errorf("an RSA key of %d bits", bits)
		}
	}
	return nil
}
