package config

import (
	"bytes"
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	// maxHostKeys limits the announcement of host keys that is sent after each login.
	maxHostKeys = 16
	// maxFleetKeys limits the attempts of a login to a bastion: an agent of an
	// earlier version permits three.
	maxFleetKeys = 3
)

// FleetPublicKeys returns the public keys of g.FleetKeys, whose signatures bastions
// accept.
func (g *Gateway) FleetPublicKeys() []ssh.PublicKey {
	var keys []ssh.PublicKey
	for _, key := range g.FleetKeys {
		keys = append(keys, key.PublicKey())
	}
	return keys
}

// CertificateProblems returns an error for each of g.HostCertificates, and the certificate of
// the API, that is not valid at the time now.
func (g *Gateway) CertificateProblems(now time.Time) []error {
	var problems []error
	if err := g.API.problem(now); err != nil {
		problems = append(problems, err)
	}
	for _, signer := range g.HostCertificates {
		cert := signer.PublicKey().(*ssh.Certificate)
		name := fmt.Sprintf("host_certificates: the certificate %q (serial %d)", cert.KeyId, cert.Serial)
		if at := time.Unix(int64(min(cert.ValidAfter, 1<<62)), 0); now.Before(at) {
			problems = append(problems, fmt.Errorf("%s is not valid before %s", name, at.UTC().Format(time.RFC3339)))
		}
		if cert.ValidBefore == ssh.CertTimeInfinity {
			continue
		}
		if at := time.Unix(int64(min(cert.ValidBefore, 1<<62)), 0); !now.Before(at) {
			problems = append(problems, fmt.Errorf("%s has expired on %s", name, at.UTC().Format(time.RFC3339)))
		}
	}
	return problems
}

func sameKey(a, b ssh.PublicKey) bool { return bytes.Equal(a.Marshal(), b.Marshal()) }

// privateKeys reads a list of up to most private keys, or one.
func (v value) privateKeys(most int) []ssh.Signer {
	var keys []ssh.Signer
	list := v.list()
	if len(list) > most {
		v.mistake("%d keys; the most is %d", len(list), most)
	}
	for _, v := range list {
		key := v.privateKey()
		switch {
		case key == nil:
		case slices.ContainsFunc(keys, func(k ssh.Signer) bool { return sameKey(k.PublicKey(), key.PublicKey()) }):
			v.mistake("the same key is listed twice")
		default:
			keys = append(keys, key)
		}
	}
	return keys
}

// maxKey bounds the size of a key or certificate, in bytes.
const maxKey = 64 << 10

// fileOrSecret reads the file at a path, or the secret of a reference. private
// demands that others cannot read it. name is for mistakes; ok is false after one.
func (v value) fileOrSecret(private bool) (name string, data []byte, ok bool) {
	if s := resolve(v.node).Value; IsReference(s) {
		data, ok = v.secret(s, private)
		return s, data, ok
	}
	if name = v.path(); name == "" {
		return "", nil, false
	}
	if strings.HasPrefix(resolve(v.node).Value, "arn:") {
		v.mistake("%s: write ssm: or secretsmanager: before an ARN", resolve(v.node).Value)
		return "", nil, false
	}
	data, info, err := readFile(name, maxKey)
	if err == nil && private {
		// A public key that was named by mistake has mode 0644.
		if err = checkMode(info); err != nil && isPublicKey(data) {
			err = errPublicKey
		}
	}
	if err != nil {
		v.mistake("%s: %v", name, reason(err))
		return name, nil, false
	}
	return name, data, true
}

// secret reads the secret of a reference; ok is false after a mistake.
func (v value) secret(reference string, private bool) (text []byte, ok bool) {
	if v.aws == nil {
		v.mistake("%s: texts in AWS cannot be used here; name a file", reference)
		return nil, false
	}
	text, encrypted, err := v.aws.Secret(reference)
	switch {
	case err != nil:
		v.mistake("%s: %v", reference, err)
	case len(text) > maxKey:
		v.mistake("%s: longer than %d bytes", reference, maxKey)
	case private && !encrypted:
		v.mistake("%s: a private key is stored unencrypted; store it as a SecureString, and replace the key if others may have read it", reference)
	default:
		return text, true
	}
	return nil, false
}

// hostCertificate reads a certificate of one of keys, as ssh-keygen -s -h makes it,
// and returns a signer with certificate and key; nil if it cannot be used.
func (v value) hostCertificate(keys []ssh.Signer) ssh.Signer {
	p, data, ok := v.fileOrSecret(false)
	if !ok {
		return nil
	}
	public, _, _, _, err := ssh.ParseAuthorizedKey(data)
	if err != nil {
		v.mistake("%s: is not a certificate; name the file that ends in -cert.pub", p)
		return nil
	}
	cert, isCertificate := public.(*ssh.Certificate)
	switch {
	case !isCertificate:
		v.mistake("%s: is a public key and no certificate; name the file that ends in -cert.pub", p)
		return nil
	case cert.CertType != ssh.HostCert:
		v.mistake("%s: is a certificate for a user; make it with ssh-keygen -h", p)
		return nil
	case len(cert.ValidPrincipals) == 0:
		v.mistake("%s: names no host, so OpenSSH accepts it for every host; name the hosts with ssh-keygen -n HOST", p)
		return nil
	}
	i := slices.IndexFunc(keys, func(k ssh.Signer) bool { return sameKey(k.PublicKey(), cert.Key) })
	if i < 0 {
		v.mistake("%s: is for the key %s, which is not in host_keys", p, ssh.FingerprintSHA256(cert.Key))
		return nil
	}
	signer, err := ssh.NewCertSigner(cert, keys[i])
	if err != nil {
		v.mistake("%s: %v", p, err)
		return nil
	}
	return signer
}

// privateKey reads the path of a private key, or a reference, and returns nil if the
// key cannot be used. No mistake quotes the key.
func (v value) privateKey() ssh.Signer {
	p, data, ok := v.fileOrSecret(true)
	if !ok {
		return nil
	}
	key, err := parsePrivateKey(data)
	if err != nil {
		v.mistake("%s: %v", p, err)
		return nil
	}
	return key
}

// checkMode checks the mode of a private key as ssh does: only its owner may have
// access. A key of another owner may be shared with the gateway by a group.
func checkMode(info os.FileInfo) error {
	forbidden := os.FileMode(0o007)
	if s, ok := info.Sys().(*syscall.Stat_t); ok && int(s.Uid) == os.Geteuid() {
		forbidden = 0o077
	}
	if mode := info.Mode().Perm(); mode&forbidden != 0 {
		return fmt.Errorf("mode %04o gives others access to it; chmod 600 it", mode)
	}
	return nil
}

var errPublicKey = errors.New("is a public key; the private one is the file without .pub")

func isPublicKey(data []byte) bool {
	_, _, _, _, err := ssh.ParseAuthorizedKey(data)
	return err == nil
}

func parsePrivateKey(data []byte) (ssh.Signer, error) {
	key, err := ssh.ParsePrivateKey(data)
	if missing := (*ssh.PassphraseMissingError)(nil); errors.As(err, &missing) {
		return nil, errors.New("has a passphrase, which a server cannot type; remove it with ssh-keygen -p")
	}
	if err != nil {
		if isPublicKey(data) {
			return nil, errPublicKey
		}
		return nil, errors.New("is not a private key in a known format")
	}
	switch typ := key.PublicKey().Type(); typ {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		return key, nil
	case ssh.KeyAlgoRSA:
		public, ok := key.PublicKey().(ssh.CryptoPublicKey).CryptoPublicKey().(*rsa.PublicKey)
		if !ok || public.N.BitLen() < 2048 || public.N.BitLen() > 8192 {
			return nil, errors.New("is an RSA key that is not of 2048 to 8192 bits")
		}
		algorithms, ok := key.(ssh.AlgorithmSigner)
		if !ok {
			return nil, errors.New("cannot sign with SHA-2")
		}
		// Otherwise it would also sign with SHA-1 (RFC 8332).
		return ssh.NewSignerWithAlgorithms(algorithms, []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256})
	default:
		return nil, fmt.Errorf("is a key of type %s; use ed25519, ecdsa or rsa", typ)
	}
}
