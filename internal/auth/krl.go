package auth

import (
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
)

// This file parses key revocation lists (OpenSSH's PROTOCOL.krl). Like OpenSSH, it
// refuses a list with an unknown section, unless that section is an extension that
// is not critical.

const krlMagic = "SSHKRL\n\x00"

const krlFormatVersion = 1

// The types of sections, and of the parts of a section of certificates.
const (
	krlCertificates      = 1
	krlExplicitKey       = 2
	krlFingerprintSHA1   = 3
	krlSignature         = 4
	krlFingerprintSHA256 = 5
	krlExtension         = 255

	krlSerialList   = 0x20
	krlSerialRange  = 0x21
	krlSerialBitmap = 0x22
	krlKeyID        = 0x23
	krlCertExt      = 0x39
)

var errKRLShort = errors.New("the revocation list is truncated")

// parseKRL parses a list that begins with krlMagic. The result does not refer to
// data.
func parseKRL(data []byte) (*revocations, error) {
	in := &krlReader{data: data[len(krlMagic):]}
	if version, ok := in.uint32(); !ok {
		return nil, errKRLShort
	} else if version != krlFormatVersion {
		return nil, fmt.Errorf("a revocation list of format %d; only %d is supported", version, krlFormatVersion)
	}
	// Version, time and flags; reserved, comment.
	ok := in.skip(3 * 8)
	for range 2 {
		_, found := in.string()
		ok = ok && found
	}
	if !ok {
		return nil, errKRLShort
	}
	r := &revocations{
		keys:   make(map[string]bool),
		sha1:   make(map[[sha1.Size]byte]bool),
		sha256: make(map[[sha256.Size]byte]bool),
		certs:  make(map[string]*revokedCerts),
	}
	for len(in.data) > 0 {
		typ, ok := in.byte()
		body, ok2 := in.string()
		if !ok || !ok2 {
			return nil, errKRLShort
		}
		if err := r.section(typ, &krlReader{data: body}); err != nil {
			return nil, fmt.Errorf("section %d of the revocation list: %w", typ, err)
		}
	}
	for _, c := range r.certs {
		c.serials = mergeRanges(c.serials)
	}
	return r, nil
}

func (r *revocations) section(typ byte, in *krlReader) error {
	switch typ {
	case krlCertificates:
		return r.certificates(in)
	case krlExplicitKey:
		return in.strings(func(blob []byte) error {
			key, _ := canonicalKey(blob) // a key of an unknown type cannot log in
			r.keys[key] = true
			return nil
		})
	case krlFingerprintSHA1:
		return in.strings(func(sum []byte) error {
			if len(sum) != sha1.Size {
				return errors.New("a fingerprint of the wrong length")
			}
			r.sha1[[sha1.Size]byte(sum)] = true
			return nil
		})
	case krlFingerprintSHA256:
		return in.strings(func(sum []byte) error {
			if len(sum) != sha256.Size {
				return errors.New("a fingerprint of the wrong length")
			}
			r.sha256[[sha256.Size]byte(sum)] = true
			return nil
		})
	case krlExtension:
		return in.extension()
	case krlSignature:
		// OpenSSH dropped them in 9.4, and could never create them.
		return errors.New("signatures of revocation lists are not supported, as in OpenSSH; create the list without one")
	default:
		return errUnknownPart
	}
}

// certificates parses the section of the certificates of one authority.
func (r *revocations) certificates(in *krlReader) error {
	blob, ok := in.string()
	_, ok2 := in.string() // reserved
	if !ok || !ok2 {
		return errKRLShort
	}
	ca := ""
	if len(blob) > 0 { // else of all authorities
		ca, _ = canonicalKey(blob)
	}
	c := r.certs[ca]
	if c == nil {
		c = &revokedCerts{keyIDs: make(map[string]bool)}
		r.certs[ca] = c
	}
	for len(in.data) > 0 {
		typ, ok := in.byte()
		body, ok2 := in.string()
		if !ok || !ok2 {
			return errKRLShort
		}
		if err := c.subsection(typ, &krlReader{data: body}); err != nil {
			return fmt.Errorf("part %#x: %w", typ, err)
		}
	}
	return nil
}

func (c *revokedCerts) subsection(typ byte, in *krlReader) error {
	switch typ {
	case krlSerialList:
		for len(in.data) > 0 {
			serial, ok := in.uint64()
			if !ok {
				return errKRLShort
			}
			if err := c.addRange(serial, serial); err != nil {
				return err
			}
		}
		return nil
	case krlSerialRange:
		low, ok := in.uint64()
		high, ok2 := in.uint64()
		if !ok || !ok2 {
			return errKRLShort
		}
		if err := c.addRange(low, high); err != nil {
			return err
		}
		return in.end()
	case krlSerialBitmap:
		first, ok := in.uint64()
		bits, ok2 := in.string()
		if !ok || !ok2 {
			return errKRLShort
		}
		// The bitmap is an mpint (RFC 4251 section 5) that is not negative.
		if len(bits) > 0 && bits[0]&0x80 != 0 {
			return errors.New("a negative bitmap")
		}
		for len(bits) > 0 && bits[0] == 0 {
			bits = bits[1:]
		}
		b := serialBitmap{first: first, bits: slices.Clone(bits)}
		switch {
		case first == 0 && b.has(0):
			return errSerialZero
		// A lower limit than needed; no authority has such serial numbers.
		case first > math.MaxUint64-8*uint64(len(bits)):
			return errors.New("a bitmap beyond the last serial number")
		}
		c.bitmaps = append(c.bitmaps, b)
		return in.end()
	case krlKeyID:
		return in.strings(func(id []byte) error {
			c.keyIDs[string(id)] = true
			return nil
		})
	case krlCertExt:
		return in.extension()
	default:
		return errUnknownPart
	}
}

var (
	errUnknownPart = errors.New("unknown type")
	errSerialZero  = errors.New("serial number 0, which means none, cannot be revoked")
)

func (c *revokedCerts) addRange(low, high uint64) error {
	switch {
	case low == 0:
		return errSerialZero
	case low > high:
		return fmt.Errorf("a range of serial numbers from %d down to %d", low, high)
	}
	c.serials = append(c.serials, serialRange{low, high})
	return nil
}

// mergeRanges sorts ranges and joins those that overlap.
func mergeRanges(ranges []serialRange) []serialRange {
	slices.SortFunc(ranges, func(a, b serialRange) int {
		switch {
		case a.low < b.low:
			return -1
		case a.low > b.low:
			return 1
		}
		return 0
	})
	merged := ranges[:0]
	for _, r := range ranges {
		if n := len(merged); n > 0 && r.low <= merged[n-1].high {
			merged[n-1].high = max(merged[n-1].high, r.high)
			continue
		}
		merged = append(merged, r)
	}
	return slices.Clip(merged)
}

// A krlReader reads the types of RFC 4251 section 5 from the front of data.
type krlReader struct{ data []byte }

func (in *krlReader) skip(n int) bool {
	if len(in.data) < n {
		return false
	}
	in.data = in.data[n:]
	return true
}

func (in *krlReader) byte() (byte, bool) {
	if len(in.data) == 0 {
		return 0, false
	}
	b := in.data[0]
	return b, in.skip(1)
}

func (in *krlReader) uint32() (uint32, bool) {
	if len(in.data) < 4 {
		return 0, false
	}
	n := binary.BigEndian.Uint32(in.data)
	return n, in.skip(4)
}

func (in *krlReader) uint64() (uint64, bool) {
	if len(in.data) < 8 {
		return 0, false
	}
	n := binary.BigEndian.Uint64(in.data)
	return n, in.skip(8)
}

// string returns a slice of data.
func (in *krlReader) string() ([]byte, bool) {
	n, ok := in.uint32()
	if !ok || uint64(n) > uint64(len(in.data)) {
		return nil, false
	}
	s := in.data[:n]
	return s, in.skip(int(n))
}

// strings calls f for each string up to the end.
func (in *krlReader) strings(f func([]byte) error) error {
	for len(in.data) > 0 {
		s, ok := in.string()
		if !ok {
			return errKRLShort
		}
		if err := f(s); err != nil {
			return err
		}
	}
	return nil
}

// extension reads an extension, and refuses it if it is critical: none is supported.
func (in *krlReader) extension() error {
	name, ok := in.string()
	critical, ok2 := in.byte()
	_, ok3 := in.string()
	switch {
	case !ok || !ok2 || !ok3:
		return errKRLShort
	case critical != 0:
		return fmt.Errorf("unknown critical extension %s", quote(string(name)))
	}
	return in.end()
}

func (in *krlReader) end() error {
	if len(in.data) > 0 {
		return errors.New("trailing data")
	}
	return nil
}
