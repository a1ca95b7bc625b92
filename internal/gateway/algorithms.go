package gateway

import (
	"strings"

	"golang.org/x/crypto/ssh"
)

// What clients are offered, unless the configuration names something else.
//
// There is no chacha20-poly1305: package ssh has no assembly for it on amd64,
// and it must be rekeyed every GiB, which package ssh must never start by itself
// (see rekeyThreshold). There is nothing with SHA-1, no DSA, and no ECDH
// on the NIST curves, which no client needs.
var (
	defaultKexAlgorithms = []string{
		ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519,
		ssh.KeyExchangeDH16SHA512, ssh.KeyExchangeDH14SHA256,
	}
	defaultCiphers = []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherAES256CTR, ssh.CipherAES192CTR, ssh.CipherAES128CTR}
	// gcmCiphers is what OpenSSH clients are offered. Until version 10 they
	// put AES-CTR before AES-GCM, and the client's order decides (RFC 4253,
	// section 7.1); CTR with its HMAC costs about twice the CPU.
	gcmCiphers  = []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM}
	defaultMACs = []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM, ssh.HMACSHA256, ssh.HMACSHA512}

	publicKeyAlgorithms = []string{
		ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256,
		ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
		ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512,
	}
)

// rekeyThreshold is so high that package ssh never starts a key exchange by
// itself: while its own KEXINIT is unanswered it queues 64 packets and then stops
// reading, and under load both sides then wait for each other for ever. Clients
// start theirs as they like, and OpenSSH does. AES-GCM is good for far more than
// this under one key (RFC 5647, section 7.1 counts invocations, 2^64 of them).
const rekeyThreshold = 1 << 50

func (s *Server) algorithms(clientVersion string) ssh.Config {
	c := ssh.Config{
		RekeyThreshold: rekeyThreshold,
		KeyExchanges:   s.KexAlgorithms,
		Ciphers:        s.Ciphers,
		MACs:           s.MACs,
	}
	if len(c.KeyExchanges) == 0 {
		c.KeyExchanges = defaultKexAlgorithms
	}
	if len(c.MACs) == 0 {
		c.MACs = defaultMACs
	}
	if len(c.Ciphers) == 0 {
		c.Ciphers = defaultCiphers
		if strings.HasPrefix(clientVersion, "SSH-2.0-OpenSSH_") {
			c.Ciphers = gcmCiphers
		}
	}
	return c
}
