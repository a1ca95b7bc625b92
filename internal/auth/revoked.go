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

// whatRevoked names the file in messages.
const whatRevoked = "revoked keys"

// maxRevoked is how long the file may be, in bytes: some 200,000 keys, or a
// hundred million serial numbers in a row.
const maxRevoked = 16 << 20

// checkRevoked refuses what RevokedKeys names, and everybody if that cannot be
// read.
//
// ssh-keygen -k rewrites the file in place, and a list that is cut off may look
// whole. So a file that has just changed is looked at again before it locks
// everybody out, and what was revoked before remains so until the change has
// settled.
func (k *Keys) checkRevoked(a *attempt) error {
	if k.RevokedKeys == "" {
		return nil
	}
	for tries := 0; ; tries++ {
		d, err := sharedFile(k, &k.revoked, k.RevokedKeys, whatRevoked, maxRevoked, parseRevocations)
		if err != nil {
			if age := time.Since(time.Unix(0, glance(k.RevokedKeys).ctime)); tries < 3 && age < time.Second {
				time.Sleep(50 * time.Millisecond)
				continue
			}
			return undecided{fmt.Errorf("nobody gets in, because the revoked keys are not known: %w", err)}
		}
		before := d
		if d.settled() {
			k.revokedBefore.Store(d)
		} else if b := k.revokedBefore.Load(); b != nil {
			before = b
		}
		for _, r := range []*revocations{d.text, before.text} {
			if err := r.check(a); err != nil {
				return err
			}
		}
		return nil
	}
}

// revocations is what RevokedKeys says.
type revocations struct {
	keys   map[string]bool // by wire format
	sha1   map[[sha1.Size]byte]bool
	sha256 map[[sha256.Size]byte]bool
	// certs is what is revoked of each authority's certificates, by its wire
	// format; that of "" is of all.
	certs map[string]*revokedCerts
}

// revokedCerts are certificates of one authority.
type revokedCerts struct {
	keyIDs  map[string]bool
	serials []serialRange // in order, without overlaps
	bitmaps []serialBitmap
}

// A serialRange is serial numbers from low to high, both included.
type serialRange struct{ low, high uint64 }

// A serialBitmap has a bit for each serial number from first on, the last byte
// first.
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

// check returns an error if the attempt's key is revoked, or the authority of
// its certificate, or the certificate.
func (r *revocations) check(a *attempt) error {
	if r.hasKey(a.plainKey()) {
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

// hasSerial never says so of 0, which means that the authority gave no serial
// numbers.
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

// parseRevocations parses either of the two formats. Whatever is wrong with it
// is an error: a key that somebody wanted to be revoked must not get in because
// of a slip.
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

// parseRevokedList parses public keys, one a line. They may be of kinds that
// could not log in anyway.
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
		// The name in front must be the one inside: half of what makes sure
		// that this is a key at all.
		if inside, ok := (&krlReader{data: wire}).string(); !ok || string(inside) != typ {
			return nil, fmt.Errorf("line %d: the key is cut off or garbled", n)
		}
		key, ok := canonicalKey(wire)
		if !ok && typ != "ssh-dss" {
			return nil, fmt.Errorf("line %d: the key is cut off or garbled, or of a type that is not known", n)
		}
		r.keys[key] = true
	}
	return r, nil
}

// canonicalKey returns the wire format as keys that log in have it: without a
// certificate around the key. ok is false if it is no key that is known here;
// such a key cannot log in.
func canonicalKey(wire []byte) (blob string, ok bool) {
	key, err := ssh.ParsePublicKey(wire)
	if err != nil {
		return string(wire), false
	}
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	return string(key.Marshal()), true
}
