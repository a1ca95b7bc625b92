package transport

import (
	"crypto/ecdh"
	"crypto/mlkem"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"hash"
	"math/big"
)

// A kexMethod is a key exchange method of two messages, each of which carries one
// side's ephemeral public value (RFC 4253 section 8, RFC 5656 section 4). The values are
// strings in the messages and in the exchange hash. Diffie-Hellman's are mpints, which
// are encoded like strings.
//
// A secret is returned as it is hashed: encoded as an mpint or a string.
type kexMethod struct {
	hash func() hash.Hash
	// client returns the client's value, and the function that computes the
	// shared secret from the server's value.
	client func() (init []byte, finish func(reply []byte) (secret []byte, err error), err error)
	// server returns the server's value and the shared secret, for the client's
	// value.
	server func(init []byte) (reply, secret []byte, err error)
}

var kexMethods = map[string]*kexMethod{
	"mlkem768x25519-sha256":         {sha256.New, hybridClient, hybridServer},
	"curve25519-sha256":             ecdhMethod(ecdh.X25519(), sha256.New),
	"curve25519-sha256@libssh.org":  ecdhMethod(ecdh.X25519(), sha256.New),
	"ecdh-sha2-nistp256":            ecdhMethod(ecdh.P256(), sha256.New),
	"ecdh-sha2-nistp384":            ecdhMethod(ecdh.P384(), sha512.New384),
	"ecdh-sha2-nistp521":            ecdhMethod(ecdh.P521(), sha512.New),
	"diffie-hellman-group14-sha256": {sha256.New, dhClient, dhServer},
}

// errKexValue says that the peer's value is not valid for the method.
var errKexValue = errors.New("invalid key exchange value")

// ecdhMethod is ECDH (RFC 5656 section 4) or X25519 (RFC 8731). Crypto/ecdh
// refuses points that are not on a NIST curve, or at infinity, and results of
// X25519 that are all zero (RFC 8731 section 3).
func ecdhMethod(curve ecdh.Curve, h func() hash.Hash) *kexMethod {
	return &kexMethod{
		hash: h,
		client: func() ([]byte, func([]byte) ([]byte, error), error) {
			private, err := curve.GenerateKey(rand.Reader)
			if err != nil {
				return nil, nil, err
			}
			return private.PublicKey().Bytes(), func(reply []byte) ([]byte, error) {
				secret, err := agree(private, reply)
				return appendMPInt(nil, secret), err
			}, nil
		},
		server: func(init []byte) ([]byte, []byte, error) {
			private, err := curve.GenerateKey(rand.Reader)
			if err != nil {
				return nil, nil, err
			}
			secret, err := agree(private, init)
			return private.PublicKey().Bytes(), appendMPInt(nil, secret), err
		},
	}
}

func agree(private *ecdh.PrivateKey, value []byte) ([]byte, error) {
	public, err := private.Curve().NewPublicKey(value)
	if err != nil {
		return nil, errKexValue
	}
	secret, err := private.ECDH(public)
	if err != nil {
		return nil, errKexValue
	}
	return secret, nil
}

// The hybrid of ML-KEM-768 and X25519 (draft-ietf-sshm-mlkem-hybrid-kex). A value is the
// concatenation of both methods' values. The secret is the hash of both secrets, encoded
// as a string, not as an mpint.

const x25519Size = 32

func hybridClient() (init []byte, finish func([]byte) ([]byte, error), err error) {
	decapsulation, err := mlkem.GenerateKey768()
	if err != nil {
		return nil, nil, err
	}
	private, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	init = append(decapsulation.EncapsulationKey().Bytes(), private.PublicKey().Bytes()...)
	return init, func(reply []byte) ([]byte, error) {
		if len(reply) != mlkem.CiphertextSize768+x25519Size {
			return nil, errKexValue
		}
		postQuantum, err := decapsulation.Decapsulate(reply[:mlkem.CiphertextSize768])
		if err != nil {
			return nil, errKexValue
		}
		classical, err := agree(private, reply[mlkem.CiphertextSize768:])
		if err != nil {
			return nil, err
		}
		return hybridSecret(postQuantum, classical), nil
	}, nil
}

func hybridServer(init []byte) (reply, secret []byte, err error) {
	if len(init) != mlkem.EncapsulationKeySize768+x25519Size {
		return nil, nil, errKexValue
	}
	// NewEncapsulationKey768 checks that the key is reduced (FIPS 203 section 7.2).
	encapsulation, err := mlkem.NewEncapsulationKey768(init[:mlkem.EncapsulationKeySize768])
	if err != nil {
		return nil, nil, errKexValue
	}
	postQuantum, ciphertext := encapsulation.Encapsulate()
	private, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	classical, err := agree(private, init[mlkem.EncapsulationKeySize768:])
	if err != nil {
		return nil, nil, err
	}
	return append(ciphertext, private.PublicKey().Bytes()...), hybridSecret(postQuantum, classical), nil
}

func hybridSecret(postQuantum, classical []byte) []byte {
	sum := sha256.Sum256(append(postQuantum, classical...))
	return appendString(nil, string(sum[:]))
}

// Diffie-Hellman in group 14 (RFC 3526 section 3, RFC 8268). Package math/big does not
// take constant time; so that timing reveals little, each exponent is used once.
var (
	group14 = func() *big.Int {
		p, _ := new(big.Int).SetString("FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD1"+
			"29024E088A67CC74020BBEA63B139B22514A08798E3404DD"+
			"EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245"+
			"E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED"+
			"EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3D"+
			"C2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F"+
			"83655D23DCA3AD961C62F356208552BB9ED529077096966D"+
			"670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B"+
			"E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9"+
			"DE2BCBF6955817183995497CEA956AE515D2261898FA0510"+
			"15728E5A8AACAA68FFFFFFFFFFFFFFFF", 16)
		return p
	}()
	two = big.NewInt(2)
)

// dhExponentBits is twice the size of the longest key that is derived (RFC 4419
// section 6.2).
const dhExponentBits = 512

func dhKey() (exponent *big.Int, value []byte) {
	b := make([]byte, dhExponentBits/8)
	rand.Read(b)
	exponent = new(big.Int).SetBytes(b)
	return exponent, mpint(new(big.Int).Exp(two, exponent, group14).Bytes())
}

func dhAgree(exponent *big.Int, value []byte) ([]byte, error) {
	// RFC 4253 section 8 excludes values outside [1, p-1]. Exclude 1 and p-1,
	// too, because the secret would be 1 or p-1.
	y := new(big.Int).SetBytes(value)
	last := new(big.Int).Sub(group14, big.NewInt(1))
	if len(value) == 0 || value[0]&0x80 != 0 || y.Cmp(big.NewInt(1)) <= 0 || y.Cmp(last) >= 0 {
		return nil, errKexValue
	}
	return appendMPInt(nil, new(big.Int).Exp(y, exponent, group14).Bytes()), nil
}

func dhClient() (init []byte, finish func([]byte) ([]byte, error), err error) {
	exponent, value := dhKey()
	return value, func(reply []byte) ([]byte, error) { return dhAgree(exponent, reply) }, nil
}

func dhServer(init []byte) (reply, secret []byte, err error) {
	exponent, value := dhKey()
	secret, err = dhAgree(exponent, init)
	return value, secret, err
}
