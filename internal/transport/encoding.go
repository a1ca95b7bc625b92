package transport

import (
	"bytes"
	"encoding/binary"
)

// Message numbers (RFC 4250 section 4.1.2; RFC 8308 section 2.3; OpenSSH's
// PROTOCOL, section 1.8).
const (
	msgDisconnect    = 1
	msgIgnore        = 2
	msgUnimplemented = 3
	msgDebug         = 4
	msgExtInfo       = 7
	msgKexInit       = 20
	msgNewKeys       = 21
	msgKexOffer      = 30 // KEXDH_INIT, KEX_ECDH_INIT, KEX_HYBRID_INIT
	msgKexReply      = 31
	msgPing          = 192
	msgPong          = 193

	msgFirstTransport = 1  // to 19
	msgFirstKex       = 20 // to 49
	msgFirstOther     = 50
)

// appendString appends a string (RFC 4251 section 5).
func appendString[T []byte | string](b []byte, s T) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// cutString returns the string that b begins with, and the rest of b.
func cutString(b []byte) (s, rest []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, nil, false
	}
	return b[4 : 4+n], b[4+n:], true
}

// mpint returns the body of the mpint whose magnitude is b.
func mpint(b []byte) []byte {
	b = bytes.TrimLeft(b, "\x00")
	if len(b) > 0 && b[0]&0x80 != 0 {
		return append([]byte{0}, b...)
	}
	return b
}

// appendMPInt appends the mpint whose magnitude is value.
func appendMPInt(b, value []byte) []byte { return appendString(b, mpint(value)) }
