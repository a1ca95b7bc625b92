package transport

import (
	"crypto/rand"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
)

// Markers: names in the list of key exchange methods that are no methods (RFC 8308
// section 2.1; OpenSSH's PROTOCOL, section 1.9).
const (
	extInfoClient   = "ext-info-c"
	extInfoServer   = "ext-info-s"
	kexStrictClient = "kex-strict-c-v00@openssh.com"
	kexStrictServer = "kex-strict-s-v00@openssh.com"
)

// Defaults, in order of preference. Left out are SHA-1 and CBC, which are weak;
// chacha20-poly1305, because Go has no assembly for it on amd64; and finite-field groups,
// because they cost this side more CPU time than an unauthenticated peer. The NIST
// curves and diffie-hellman-group14-sha256 are implemented for configurations that name
// them.
var (
	DefaultKexAlgorithms     = []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519, "curve25519-sha256@libssh.org"}
	DefaultCiphers           = []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherAES256CTR, ssh.CipherAES192CTR, ssh.CipherAES128CTR}
	DefaultMACs              = []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM, ssh.HMACSHA256, ssh.HMACSHA512}
	DefaultHostKeyAlgorithms = []string{
		ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
		ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256,
	}
)

// CheckAlgorithms returns an error that names the first algorithm in cfg that
// this package does not implement.
func CheckAlgorithms(cfg *Config) error {
	if err := known("key exchange method", kexMethods, cfg.KexAlgorithms); err != nil {
		return err
	}
	if err := known("cipher", ciphers, cfg.Ciphers); err != nil {
		return err
	}
	if err := known("MAC", macs, cfg.MACs); err != nil {
		return err
	}
	return known("host key algorithm", hostKeyAlgorithms, cfg.HostKeyAlgorithms)
}

func known[T any](kind string, implemented map[string]T, names []string) error {
	for _, name := range names {
		if _, ok := implemented[name]; !ok {
			return fmt.Errorf("unknown %s %q", kind, name)
		}
	}
	return nil
}

// A kexInit is a KEXINIT message (RFC 4253 section 7.1) without its cookie and
// languages.
type kexInit struct {
	kex, hostKey, cipherCS, cipherSC, macCS, macSC, compressionCS, compressionSC []string

	guess bool // first_kex_packet_follows
}

// proposal returns this side's KEXINIT. The initial one negotiates extensions, too.
func (c *Conn) proposal(initial bool) *kexInit {
	cfg := c.cfg
	cipherNames := orDefault(cfg.Ciphers, DefaultCiphers)
	if cfg.CiphersFor != nil {
		cipherNames = cfg.CiphersFor(c.peerVersion)
	}
	macNames := orDefault(cfg.MACs, DefaultMACs)
	k := &kexInit{
		kex:      slices.Clone(orDefault(cfg.KexAlgorithms, DefaultKexAlgorithms)),
		hostKey:  orDefault(cfg.HostKeyAlgorithms, DefaultHostKeyAlgorithms),
		cipherCS: cipherNames, cipherSC: cipherNames,
		macCS: macNames, macSC: macNames,
		compressionCS: []string{"none"}, compressionSC: []string{"none"},
	}
	if c.server {
		k.hostKey = serverHostKeyAlgorithms(cfg)
	}
	switch {
	case initial && c.server:
		k.kex = append(k.kex, extInfoServer, kexStrictServer)
	case initial:
		k.kex = append(k.kex, extInfoClient, kexStrictClient)
	}
	return k
}

func orDefault(names, defaults []string) []string {
	if names == nil {
		return defaults
	}
	return names
}

func (k *kexInit) marshal() []byte {
	b := []byte{msgKexInit}
	b = append(b, make([]byte, 16)...)
	rand.Read(b[1:]) // the cookie
	for _, list := range k.lists() {
		b = appendString(b, strings.Join(*list, ","))
	}
	b = appendString(b, "") // languages
	b = appendString(b, "")
	b = append(b, 0)             // first_kex_packet_follows: never
	return append(b, 0, 0, 0, 0) // reserved
}

func (k *kexInit) lists() []*[]string {
	return []*[]string{&k.kex, &k.hostKey, &k.cipherCS, &k.cipherSC, &k.macCS, &k.macSC, &k.compressionCS, &k.compressionSC}
}

// maxKexInit bounds a KEXINIT, in bytes, also after the login. OpenSSH's has about 1.5
// KiB.
const maxKexInit = maxEarlyPacketLength

func parseKexInit(p []byte) (*kexInit, error) {
	bad := &ProtocolError{ReasonProtocolError, "malformed KEXINIT"}
	if len(p) < 17 || len(p) > maxKexInit || p[0] != msgKexInit {
		return nil, bad
	}
	k, rest, ok := &kexInit{}, p[17:], true
	for _, list := range k.lists() {
		var s []byte
		if s, rest, ok = cutString(rest); !ok {
			return nil, bad
		}
		if len(s) > 0 {
			*list = strings.Split(string(s), ",")
		}
	}
	for range 2 { // languages
		if _, rest, ok = cutString(rest); !ok {
			return nil, bad
		}
	}
	if len(rest) != 5 {
		return nil, bad
	}
	k.guess = rest[0] != 0
	return k, nil
}

// negotiate chooses the algorithms (RFC 4253 section 7.1): the first of each of the
// client's lists that the server's list has, too. If wrongGuess is true, the peer has
// sent a packet of a key exchange method that was not chosen, so its next packet must be
// ignored (section 7).
func negotiate(client, server *kexInit, weAreServer bool) (a Algorithms, wrongGuess bool, err error) {
	cipherCS, cipherSC, macCS, macSC := &a.CipherOut, &a.CipherIn, &a.MACOut, &a.MACIn
	theirs := server
	if weAreServer {
		cipherCS, cipherSC, macCS, macSC = &a.CipherIn, &a.CipherOut, &a.MACIn, &a.MACOut
		theirs = client
	}
	var compression string
	for _, choice := range []struct {
		kind           string
		to             *string
		client, server []string
		offered        []string
	}{
		{"key exchange method", &a.Kex, methods(client.kex), methods(server.kex), theirs.kex},
		{"host key type", &a.HostKey, client.hostKey, server.hostKey, theirs.hostKey},
		{"cipher", cipherCS, client.cipherCS, server.cipherCS, theirs.cipherCS},
		{"cipher", cipherSC, client.cipherSC, server.cipherSC, theirs.cipherSC},
		{"MAC", macCS, client.macCS, server.macCS, theirs.macCS},
		{"MAC", macSC, client.macSC, server.macSC, theirs.macSC},
		{"compression", &compression, client.compressionCS, server.compressionCS, theirs.compressionCS},
		{"compression", &compression, client.compressionSC, server.compressionSC, theirs.compressionSC},
	} {
		// An AEAD cipher is its own MAC, so that no MAC need be common
		// (OpenSSH's PROTOCOL, section 1.6).
		if choice.to == macCS && ciphers[*cipherCS].aead || choice.to == macSC && ciphers[*cipherSC].aead {
			continue
		}
		i := slices.IndexFunc(choice.client, func(name string) bool { return slices.Contains(choice.server, name) })
		if i < 0 {
			return a, false, &negotiationError{choice.kind, strings.Join(choice.offered, ",")}
		}
		*choice.to = strings.Clone(choice.client[i]) // which is a part of the whole list
	}
	// A guess is right if both sides prefer the same method and host key algorithm.
	wrongGuess = theirs.guess && !(sameFirst(client.kex, server.kex) && sameFirst(client.hostKey, server.hostKey))
	return a, wrongGuess, nil
}

// methods returns names without markers and unknown methods, so that no peer can
// choose one.
func methods(names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool { return kexMethods[name] == nil })
}

func sameFirst(a, b []string) bool { return len(a) > 0 && len(b) > 0 && a[0] == b[0] }

// A negotiationError is ErrNoCommonAlgorithm with the kind of algorithm and the peer's
// list.
type negotiationError struct{ kind, offered string }

func (e *negotiationError) Error() string {
	return fmt.Sprintf("no matching %s found. Their offer: %.1024s", e.kind, e.offered)
}

func (e *negotiationError) Is(target error) bool { return target == ErrNoCommonAlgorithm }
