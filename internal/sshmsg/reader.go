package sshmsg

import (
	"encoding/binary"
	"math"
)

// A Reader takes fields of the types of RFC 4251, section 5, from the front of a
// message. If a field is cut short, that field and all further ones are zero, and End
// returns an error; so a parser reads all fields and checks once. A length is compared
// with the bytes that are there before it is used.
type Reader struct {
	rest   []byte
	failed bool
}

// NewReader returns a Reader of data. Byte slices that it returns point into data.
func NewReader(data []byte) Reader { return Reader{rest: data} }

// body returns a Reader of the fields behind the message number, which must be num.
func body(packet []byte, num byte) Reader {
	if len(packet) == 0 || packet[0] != num {
		return Reader{failed: true}
	}
	return NewReader(packet[1:])
}

func (r *Reader) take(n int) []byte {
	if r.failed || n > len(r.rest) {
		r.failed, r.rest = true, nil
		return nil
	}
	field := r.rest[:n:n]
	r.rest = r.rest[n:]
	return field
}

// Bool takes a boolean.
func (r *Reader) Bool() bool {
	b := r.take(1)
	return b != nil && b[0] != 0
}

// Uint32 takes a uint32.
func (r *Reader) Uint32() uint32 {
	b := r.take(4)
	if b == nil {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

// Bytes takes a string, without copying it.
func (r *Reader) Bytes() []byte {
	n := r.Uint32()
	if n > math.MaxInt32 {
		r.failed = true
		return nil
	}
	return r.take(int(n))
}

// String takes a string, as a copy.
func (r *Reader) String() string { return string(r.Bytes()) }

// Remainder takes all bytes that are left.
func (r *Reader) Remainder() []byte {
	rest := r.rest
	r.rest = nil
	return rest
}

// Failed reports whether a field was cut short so far.
func (r *Reader) Failed() bool { return r.failed }

// End returns ErrMalformed if a field was cut short, or if bytes are left.
func (r *Reader) End() error {
	if r.failed || len(r.rest) > 0 {
		return ErrMalformed
	}
	return nil
}

// AppendBool appends a boolean to b.
func AppendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

// AppendUint32 appends a uint32 to b.
func AppendUint32(b []byte, v uint32) []byte { return binary.BigEndian.AppendUint32(b, v) }

// AppendString appends a string to b.
func AppendString[T string | []byte](b []byte, s T) []byte {
	return append(AppendUint32(b, uint32(len(s))), s...)
}
