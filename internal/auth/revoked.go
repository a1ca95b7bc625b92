package auth

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// maxRevoked limits the size of the file, in bytes: some 200,000 keys, or a bitmap of
// a hundred million serial numbers.
const maxRevoked = 16 << 20

// checkRevoked refuses the keys and certificates in RevokedKeys, and every attempt if
// that file cannot be read.
//
// ssh-keygen -k rewrites the file in place, and a truncated list may be a valid one.
// So a file that has just changed and cannot be parsed is read again before it
// refuses every login, and the keys that were revoked before the change remain
// revoked until the change has settled.
func (k *Keys) checkRevoked(a *attempt) error {
	if k.RevokedKeys == "" {
		return nil
	}
	for tries := 0; ; tries++ {
		d, err := sharedFile(k, &k.revoked, k.RevokedKeys, kindRevoked, maxRevoked, parseRevocations)
		if err != nil {
			if age := time.Since(time.Unix(0, stat(k.RevokedKeys).ctime)); tries < halfWrittenRetries && age < halfWrittenAge {
				time.Sleep(halfWrittenDelay)
				continue
			}
			return undecided{fmt.Errorf("every login is refused, because the revoked keys cannot be read: %w", err)}
		}
		before := d
		if d.settled() {
			k.revokedBefore.Store(d)
		} else if b := k.revokedBefore.Load(); b != nil {
			before = b
		}
		for _, r := range []*revocations{d.content, before.content} {
			if err := r.check(a); err != nil {
				return err
			}
		}
		return nil
	}
}

// revocations is the content of RevokedKeys.
type revocations struct {
	keys   map[string]bool // by wire format
	sha1   map[[sha1.Size]byte]bool
	sha256 map[[sha256.Size]byte]bool
	// certs has the revoked certificates of each authority, by the wire format of
	// its key; those of "" are revoked for all authorities.
	certs map[string]*revokedCerts
}

// revokedCerts are the revoked certificates of one authority.
type revokedCerts struct {
	keyIDs  map[string]bool
	serials []serialRange // in order, without overlaps
	bitmaps []serialBitmap
}

// A serialRange has the serial numbers from low to high, both included.
type serialRange struct{ low, high uint64 }

// A serialBitmap has a bit for each serial number from first on, in big-endian order:
// the bit of first is the lowest bit of the last byte.
type serialBitmap struct {
	first uint64
	bits  []byte
}

func (b serialBitmap) has(serial uint64) bool {
	if serial < b.first {
		return false
	}
	n := serial - b.first
	if n/8 >= uint64(len(b.bits)) {
		return false
	}
	return b.bits[len(b.bits)-1-int(n/8)]>>(n%8)&1 == 1
}

// check returns an error if the attempt's key, its certificate, or the authority of
// that is revoked.
func (r *revocations) check(a *attempt) error {
	if r.hasKey(plainKey(a.key)) {
		return errors.New("the key is revoked")
	}
	if a.cert == nil {
		return nil
	}
	if r.hasKey(a.cert.SignatureKey) {
		return errors.New("the authority of the certificate is revoked")
	}
	for _, ca := range []string{string(a.cert.SignatureKey.Marshal()), ""} {
		certs := r.certs[ca]
		switch {
		case certs == nil:
		case certs.keyIDs[a.cert.KeyId]:
			return errors.New("the certificate is revoked by its key id")
		case certs.hasSerial(a.cert.Serial):
			return fmt.Errorf("the certificate is revoked by its serial number %d", a.cert.Serial)
		}
	}
	return nil
}

func (r *revocations) hasKey(key ssh.PublicKey) bool {
	blob := key.Marshal()
	return r.keys[string(blob)] || r.sha1[sha1.Sum(blob)] || r.sha256[sha256.Sum256(blob)]
}

// hasSerial reports whether a serial number is revoked. 0 never is: it means that the
// authority does not use serial numbers.
func (c *revokedCerts) hasSerial(serial uint64) bool {
	if serial == 0 {
		return false
	}
	_, found := slices.BinarySearchFunc(c.serials, serial, func(r serialRange, serial uint64) int {
		switch {
		case r.high < serial:
			return -1
		case r.low > serial:
			return 1
		}
		return 0
	})
	return found || slices.ContainsFunc(c.bitmaps, func(b serialBitmap) bool { return b.has(serial) })
}

// parseRevocations parses a file in either format. Any mistake is an error for the
// whole file: a key must not log in because of a typing error in the line that
// revokes it.
func parseRevocations(path string, data []byte) (*revocations, []error, error) {
	var r *revocations
	var err error
	if bytes.HasPrefix(data, []byte(krlMagic)) {
		r, err = parseKRL(data)
	} else {
		r, err = parseRevokedList(data)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil, nil
}

// parseRevokedList parses public keys, one per line. They may be of types that cannot
// log in.
func parseRevokedList(data []byte) (*revocations, error) {
	r := &revocations{keys: make(map[string]bool)}
	n := 0
	for text := range bytes.SplitSeq(data, []byte("\n")) {
		n++
		line := strings.Trim(string(text), " \t\r")
		if line == "" || line[0] == '#' {
			continue
		}
		typ, rest := cutField(line)
		blob, _ := cutField(rest)
		wire, err := base64.StdEncoding.DecodeString(blob)
		if err != nil || blob == "" {
			return nil, fmt.Errorf("line %d: not a public key", n)
		}
		// The type before the key must be the one in it.
		if inside, ok := (&krlReader{data: wire}).string(); !ok || string(inside) != typ {
			return nil, fmt.Errorf("line %d: the key is truncated or corrupt", n)
		}
		key, ok := canonicalKey(wire)
		if !ok && typ != "ssh-dss" {
			return nil, fmt.Errorf("line %d: the key is truncated or corrupt, or of an unknown type", n)
		}
		r.keys[key] = true
	}
	return r, nil
}

// canonicalKey returns the wire format of a key, or of the key in a certificate. ok is
// false if the type of the key is unknown; such a key cannot log in.
func canonicalKey(wire []byte) (blob string, ok bool) {
	key, err := ssh.ParsePublicKey(wire)
	if err != nil {
		return string(wire), false
	}
	return string(plainKey(key).Marshal()), true
}
