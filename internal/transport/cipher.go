package transport

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"hash"
	"slices"
)

// Packet layout (RFC 4253 section 6):
//
//	uint32  packet_length   of all that follows but the MAC
//	byte    padding_length  at least 4
//	byte[]  payload
//	byte[]  padding
//	byte[]  MAC or tag
const (
	lengthSize = 4
	minPadding = 4
	aesBlock   = aes.BlockSize

	// maxPacketLength bounds packet_length, as OpenSSH does, and
	// maxEarlyPacketLength before authentication (RFC 4253 section 6.1).
	maxPacketLength      = 256 << 10
	maxEarlyPacketLength = 35000
	// maxOverhead is an upper bound of a packet's size less its payload's:
	// length, padding length, padding, MAC.
	maxOverhead = lengthSize + 1 + minPadding + aesBlock + sha512.Size
)

// Errors of packets that are invalid or were modified in transit. The texts are
// OpenSSH's.
var (
	errPacketLength = &ProtocolError{ReasonProtocolError, "Bad packet length."}
	errPadding      = &ProtocolError{ReasonProtocolError, "Corrupted padlen on input."}
	errMAC          = &ProtocolError{ReasonMACError, "Corrupted MAC on input."}
)

// A protection protects the packets of one direction under one set of keys. Seq
// is the packet's sequence number (RFC 4253 section 6.4).
type protection interface {
	// seal appends the packet of payload to out.
	seal(out []byte, seq uint32, payload []byte) []byte

	// size returns the size of the packet that b begins with, or 0 if b is too
	// short to tell. Limit bounds packet_length. Size may decrypt a part of b in
	// place; until open is called, it must be called again with the same b, to
	// which bytes may have been appended.
	size(b []byte, limit uint32) (int, error)

	// open checks and decrypts the packet b in place and returns its payload, a
	// part of b. The length of b is the size that size has returned.
	open(b []byte, seq uint32) ([]byte, error)
}

// appendPlain appends a packet without MAC. The length of the packet without its first
// skip bytes is a multiple of block.
func appendPlain(out, payload []byte, block, skip int) []byte {
	padding := block - (lengthSize-skip+1+len(payload))%block
	if padding < minPadding {
		padding += block
	}
	out = slices.Grow(out, maxOverhead+len(payload))
	out = binary.BigEndian.AppendUint32(out, uint32(1+len(payload)+padding))
	out = append(out, byte(padding))
	out = append(out, payload...)
	n := len(out)
	out = out[:n+padding]
	rand.Read(out[n:]) // it cannot fail
	return out
}

// checkLength checks packet_length, before any byte is allocated or read for the packet.
// The length of the packet without its first skip bytes must be a multiple of block, and
// leave room for the padding and one byte of payload.
func checkLength(length, limit uint32, block, skip int) error {
	if length < 1+1+minPadding || length > limit || (int(length)+lengthSize-skip)%block != 0 {
		return errPacketLength
	}
	return nil
}

// trim returns the payload of b, which is a packet without length and MAC. An empty
// payload is an error, because it has no message number.
func trim(b []byte) ([]byte, error) {
	padding := int(b[0])
	if padding < minPadding || padding > len(b)-2 {
		return nil, errPadding
	}
	return b[1 : len(b)-padding], nil
}

// plain is the protection before the first key exchange: none.
type plain struct{}

const plainBlock = 8

func (plain) seal(out []byte, _ uint32, payload []byte) []byte {
	return appendPlain(out, payload, plainBlock, 0)
}

func (plain) size(b []byte, limit uint32) (int, error) {
	if len(b) < lengthSize {
		return 0, nil
	}
	length := binary.BigEndian.Uint32(b)
	return lengthSize + int(length), checkLength(length, limit, plainBlock, 0)
}

func (plain) open(b []byte, _ uint32) ([]byte, error) { return trim(b[lengthSize:]) }

// gcm is AES-GCM as in RFC 5647, with OpenSSH's rules for negotiation. The length
// is not encrypted, but authenticated (section 7.3).
type gcm struct {
	aead cipher.AEAD
	// nonce is 4 fixed bytes and a counter of 8 bytes; both begin with values
	// that are derived with the key (section 7.1). The counter counts packets. It
	// cannot repeat, because a key protects at most 2^32 packets; see maxPackets.
	nonce [12]byte
}

const gcmTag = 16

func newGCM(key, iv []byte) protection {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // the key's size is fixed by the algorithm
	}
	g := &gcm{}
	if g.aead, err = cipher.NewGCM(block); err != nil {
		panic(err)
	}
	copy(g.nonce[:], iv)
	return g
}

func (g *gcm) seal(out []byte, _ uint32, payload []byte) []byte {
	start := len(out)
	out = appendPlain(out, payload, aesBlock, lengthSize)
	length, body := out[start:start+lengthSize], out[start+lengthSize:]
	g.aead.Seal(body[:0], g.nonce[:], body, length)
	g.next()
	return out[:len(out)+gcmTag]
}

func (g *gcm) size(b []byte, limit uint32) (int, error) {
	if len(b) < lengthSize {
		return 0, nil
	}
	length := binary.BigEndian.Uint32(b)
	return lengthSize + int(length) + gcmTag, checkLength(length, limit, aesBlock, lengthSize)
}

func (g *gcm) open(b []byte, _ uint32) ([]byte, error) {
	length, body := b[:lengthSize], b[lengthSize:]
	p, err := g.aead.Open(body[:0], g.nonce[:], body, length)
	if err != nil {
		return nil, errMAC
	}
	g.next()
	return trim(p)
}

func (g *gcm) next() {
	counter := g.nonce[4:]
	binary.BigEndian.PutUint64(counter, binary.BigEndian.Uint64(counter)+1)
}

// ctr is AES-CTR (RFC 4344) with HMAC (RFC 6668).
type ctr struct {
	stream cipher.Stream
	mac    hash.Hash
	// etm says that the MAC is of the encrypted packet, and the length is not
	// encrypted (OpenSSH's PROTOCOL, section 1.5). If it is false the MAC is
	// of the packet before encryption.
	etm bool
	// begun says that size has decrypted the first block of the packet, for the
	// length. It is never set with etm.
	begun bool
	seq   [4]byte
	sum   [sha512.Size]byte
}

func newCTR(key, iv, macKey []byte, m macAlgorithm) protection {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // the key's size is fixed by the algorithm
	}
	return &ctr{stream: cipher.NewCTR(block, iv), mac: hmac.New(m.hash, macKey), etm: m.etm}
}

// tag returns the MAC of data, valid until the next tag.
func (c *ctr) tag(seq uint32, data []byte) []byte {
	binary.BigEndian.PutUint32(c.seq[:], seq)
	c.mac.Reset()
	c.mac.Write(c.seq[:])
	c.mac.Write(data)
	return c.mac.Sum(c.sum[:0])
}

func (c *ctr) seal(out []byte, seq uint32, payload []byte) []byte {
	start := len(out)
	if c.etm {
		out = appendPlain(out, payload, aesBlock, lengthSize)
		packet := out[start:]
		c.stream.XORKeyStream(packet[lengthSize:], packet[lengthSize:])
		return append(out, c.tag(seq, packet)...)
	}
	out = appendPlain(out, payload, aesBlock, 0)
	packet := out[start:]
	tag := c.tag(seq, packet)
	c.stream.XORKeyStream(packet, packet)
	return append(out, tag...)
}

func (c *ctr) size(b []byte, limit uint32) (int, error) {
	skip := 0
	switch {
	case c.etm:
		if len(b) < lengthSize {
			return 0, nil
		}
		skip = lengthSize
	case len(b) < aesBlock:
		return 0, nil
	case !c.begun:
		c.stream.XORKeyStream(b[:aesBlock], b[:aesBlock])
		c.begun = true
	}
	length := binary.BigEndian.Uint32(b)
	return lengthSize + int(length) + c.mac.Size(), checkLength(length, limit, aesBlock, skip)
}

func (c *ctr) open(b []byte, seq uint32) ([]byte, error) {
	packet, tag := b[:len(b)-c.mac.Size()], b[len(b)-c.mac.Size():]
	if c.etm {
		if subtle.ConstantTimeCompare(c.tag(seq, packet), tag) != 1 {
			return nil, errMAC
		}
		c.stream.XORKeyStream(packet[lengthSize:], packet[lengthSize:])
		return trim(packet[lengthSize:])
	}
	c.begun = false
	c.stream.XORKeyStream(packet[aesBlock:], packet[aesBlock:])
	if subtle.ConstantTimeCompare(c.tag(seq, packet), tag) != 1 {
		return nil, errMAC
	}
	return trim(packet[lengthSize:])
}

// A cipherAlgorithm has the sizes of a cipher's key and IV.
type cipherAlgorithm struct {
	key, iv int // bytes
	aead    bool
}

var ciphers = map[string]cipherAlgorithm{
	"aes128-gcm@openssh.com": {key: 16, iv: 12, aead: true},
	"aes256-gcm@openssh.com": {key: 32, iv: 12, aead: true},
	"aes128-ctr":             {key: 16, iv: aesBlock},
	"aes192-ctr":             {key: 24, iv: aesBlock},
	"aes256-ctr":             {key: 32, iv: aesBlock},
}

// A macAlgorithm is an HMAC. Its key is as long as its hash.
type macAlgorithm struct {
	hash func() hash.Hash
	key  int // bytes
	etm  bool
}

var macs = map[string]macAlgorithm{
	"hmac-sha2-256-etm@openssh.com": {sha256.New, sha256.Size, true},
	"hmac-sha2-512-etm@openssh.com": {sha512.New, sha512.Size, true},
	"hmac-sha2-256":                 {sha256.New, sha256.Size, false},
	"hmac-sha2-512":                 {sha512.New, sha512.Size, false},
}
