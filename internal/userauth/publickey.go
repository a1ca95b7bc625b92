package userauth

import (
	"bytes"
	"crypto/rsa"
	"maps"
	"slices"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// publicKey parses the method's part of a request, and verifies the signature if
// there is one (RFC 4252 section 7; OpenSSH's PROTOCOL, section 3.1):
//
//	boolean   whether there is a signature
//	string    algorithm
//	string    public key
//	string    server host key (only if hostBound)
//	string    signature       (only if there is one)
func (s *Server) publicKey(f sshmsg.Reader, hostBound bool) (Request, error) {
	signed, name, blob := f.Bool(), f.String(), f.Bytes()
	var hostKey, signatureBlob []byte
	if hostBound {
		hostKey = f.Bytes()
	}
	if signed {
		signatureBlob = f.Bytes()
	}
	if f.End() != nil {
		return nil, s.malformed()
	}
	key, err := s.parseKey(name, blob)
	if err != nil {
		return nil, err
	}
	s.key = key
	// OpenSSH's PROTOCOL, section 3.1: the host key of the first key exchange.
	if hostBound && !bytes.Equal(hostKey, s.c.HostKey().Marshal()) {
		return nil, refuse("the request is bound to another host key")
	}
	if !signed {
		return &Query{User: s.user, Key: key, Algorithm: name, blob: blob}, nil
	}

	var signature ssh.Signature
	if err := ssh.Unmarshal(signatureBlob, &signature); err != nil {
		return nil, refuse("malformed signature")
	}
	if signature.Format != algorithms[name].signature {
		return nil, refuse("a signature of type %q for algorithm %q", signature.Format, name)
	}
	data := signedData(s.c.SessionID(), s.user, s.method, name, blob, hostKey)
	present, verified, err := verify(key, data, &signature)
	if err != nil {
		return nil, refuse("the signature is wrong: %v", err)
	}
	return &Signed{
		User: s.user, Key: key, Algorithm: name, HostBound: hostBound,
		UserPresent: present, UserVerified: verified,
	}, nil
}

// parseKey parses a public key and checks that the algorithm is accepted and that the
// key is of its type. RSA moduli are bounded, because small ones are weak, and large
// ones cost the server much CPU time.
func (s *Server) parseKey(name string, blob []byte) (ssh.PublicKey, error) {
	algorithm, ok := algorithms[name]
	if !ok || !slices.Contains(s.cfg.Algorithms, algorithm.signature) {
		return nil, refuse("algorithm %q is not accepted", name)
	}
	key, err := ssh.ParsePublicKey(blob)
	if err != nil {
		return nil, refuse("malformed key: %v", err)
	}
	if key.Type() != algorithm.keyType {
		return nil, refuse("a key of type %q for algorithm %q", key.Type(), name)
	}
	if err := checkSize(key); err != nil {
		return nil, err
	}
	return key, nil
}

// checkSize returns an error for an RSA key that is too small or too large.
func checkSize(key ssh.PublicKey) error {
	if public, ok := cryptoKey(key).(*rsa.PublicKey); ok {
		if bits := public.N.BitLen(); bits < 2048 || bits > 8192 {
			return refuse("an RSA key of %d bits", bits)
		}
	}
	return nil
}

// plainKey returns the key in a certificate, or the key itself.
func plainKey(key ssh.PublicKey) ssh.PublicKey {
	if cert, ok := key.(*ssh.Certificate); ok {
		return cert.Key
	}
	return key
}

func cryptoKey(key ssh.PublicKey) any {
	if k, ok := plainKey(key).(ssh.CryptoPublicKey); ok {
		return k.CryptoPublicKey()
	}
	return nil
}

// signedData returns the data that a client signs (RFC 4252 section 7). HostKey is
// used if the method is methodHostBound.
func signedData(sessionID []byte, user, method, name string, blob, hostKey []byte) []byte {
	b := sshmsg.AppendString(nil, sessionID)
	b = append(b, msgRequest)
	b = sshmsg.AppendString(b, user)
	b = sshmsg.AppendString(b, serviceConnection)
	b = sshmsg.AppendString(b, method)
	b = sshmsg.AppendBool(b, true)
	b = sshmsg.AppendString(b, name)
	b = sshmsg.AppendString(b, blob)
	if method == methodHostBound {
		b = sshmsg.AppendString(b, hostKey)
	}
	return b
}

// Verify verifies a signature that is not part of a login, such as one by ssh-keygen -Y
// sign. It accepts the keys and algorithms of a [Server] with DefaultAlgorithms. Present
// and verified are the flags of a FIDO key, and true for others.
func Verify(key ssh.PublicKey, data []byte, signature *ssh.Signature) (present, verified bool, err error) {
	ok := slices.ContainsFunc(slices.Collect(maps.Values(algorithms)), func(a algorithm) bool {
		return a.keyType == key.Type() && a.signature == signature.Format
	})
	if !ok {
		return false, false, refuse("a signature of type %q by a key of type %q", signature.Format, key.Type())
	}
	if err := checkSize(key); err != nil {
		return false, false, err
	}
	return verify(key, data, signature)
}

// verify verifies a signature; its format has been checked. Present and verified are
// the flags of a FIDO key, and true for others.
func verify(key ssh.PublicKey, data []byte, signature *ssh.Signature) (present, verified bool, err error) {
	switch signature.Format {
	case ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256:
		return verifySK(plainKey(key), data, signature)
	}
	if len(signature.Rest) > 0 {
		return false, false, errSignature
	}
	return true, true, key.Verify(data, signature)
}
