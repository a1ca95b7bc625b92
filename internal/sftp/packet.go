package sftp

import (
	"encoding/binary"
	"errors"
	"strings"

	"golang.org/x/sys/unix"
)

// A packet is the unread rest of a message. Once err is set, all reads return zero values,
// and the request has no effect.
type packet struct {
	id   uint32
	data []byte
	err  error
}

var errMalformed = errors.New("malformed message")

func (p *packet) take(n uint64) []byte {
	if p.err != nil || n > uint64(len(p.data)) {
		p.err = errMalformed
		return make([]byte, min(n, 8))
	}
	b := p.data[:n]
	p.data = p.data[n:]
	return b
}

func (p *packet) uint32() uint32 { return binary.BigEndian.Uint32(p.take(4)) }
func (p *packet) uint64() uint64 { return binary.BigEndian.Uint64(p.take(8)) }

func (p *packet) bytes() []byte {
	n := p.uint32()
	if b := p.take(uint64(n)); p.err == nil {
		return b
	}
	return nil
}

// string reads a string without NUL.
func (p *packet) string() string {
	s := string(p.bytes())
	if strings.ContainsRune(s, 0) {
		p.err = errMalformed
		return ""
	}
	return s
}

// Flags for the fields of attributes.
const (
	hasSize        = 1
	hasOwner       = 2
	hasPermissions = 4
	hasTimes       = 8
	hasExtended    = 1 << 31
)

// attributes are those of a file. flags has the fields that are set.
type attributes struct {
	flags        uint32
	size         uint64
	uid, gid     uint32
	permissions  uint32
	atime, mtime uint32
}

func (p *packet) attributes() (a attributes) {
	a.flags = p.uint32()
	if a.flags&hasSize != 0 {
		a.size = p.uint64()
	}
	if a.flags&hasOwner != 0 {
		a.uid, a.gid = p.uint32(), p.uint32()
	}
	if a.flags&hasPermissions != 0 {
		a.permissions = p.uint32()
	}
	if a.flags&hasTimes != 0 {
		a.atime, a.mtime = p.uint32(), p.uint32()
	}
	if a.flags&hasExtended != 0 {
		for n := p.uint32(); n > 0 && p.err == nil; n-- {
			p.bytes()
			p.bytes()
		}
	}
	return a
}

func (a attributes) times() []unix.Timespec {
	return []unix.Timespec{{Sec: int64(a.atime)}, {Sec: int64(a.mtime)}}
}

// A reply is a message under construction. send fills in its length.
type reply struct{ data []byte }

func message(kind byte) *reply { return &reply{[]byte{0, 0, 0, 0, kind}} }

func (r *reply) uint32(v uint32) *reply {
	r.data = binary.BigEndian.AppendUint32(r.data, v)
	return r
}

func (r *reply) uint64(v uint64) *reply {
	r.data = binary.BigEndian.AppendUint64(r.data, v)
	return r
}

func (r *reply) string(s string) *reply {
	r.data = append(binary.BigEndian.AppendUint32(r.data, uint32(len(s))), s...)
	return r
}

func (r *reply) stat(st *unix.Stat_t) *reply {
	return r.uint32(hasSize | hasOwner | hasPermissions | hasTimes).uint64(uint64(st.Size)).
		uint32(st.Uid).uint32(st.Gid).uint32(st.Mode).uint32(uint32(st.Atim.Sec)).uint32(uint32(st.Mtim.Sec))
}
