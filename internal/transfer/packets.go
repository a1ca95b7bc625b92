package transfer

import (
	"encoding/binary"
	"fmt"
)

// This file splits a stream of SFTP into packets, and reads their fields.

// packets splits one direction into packets.
type packets struct {
	needed func(typ byte) int // how many bytes of the body of a packet to keep

	head [5]byte // length and type
	have int     // bytes of head so far
	body []byte  // the bytes to keep, so far
	want int     // bytes that body lacks
	rest int     // bytes of the packet after body
}

// split parses the next bytes, and calls packet for each packet once its body is complete
// as far as it is needed.
func (s *packets) split(p []byte, packet func(typ byte, b body) error) error {
	for {
		if n := min(s.rest, len(p)); s.want == 0 && n > 0 {
			p, s.rest = p[n:], s.rest-n
		}
		if len(p) == 0 {
			return nil
		}
		if s.have < len(s.head) {
			n := copy(s.head[s.have:], p)
			p, s.have = p[n:], s.have+n
			if s.have < len(s.head) {
				return nil
			}
			length := binary.BigEndian.Uint32(s.head[:4])
			if length < 5 || length > maxPacket { // the type and an id, or a version
				return lost("a packet of %d bytes", length)
			}
			s.want = min(s.needed(s.head[4]), int(length)-1)
			s.rest = int(length) - 1 - s.want
			s.body = s.body[:0]
		}
		n := min(s.want, len(p))
		s.body = append(s.body, p[:n]...)
		p, s.want = p[n:], s.want-n
		if s.want > 0 {
			return nil
		}
		s.have = 0
		if err := packet(s.head[4], body{data: s.body}); err != nil {
			return err
		}
		if cap(s.body) > 1024 { // release it: most are short, and a session may be idle
			s.body = nil
		}
	}
}

// A body is the unread rest of a packet.
type body struct {
	data []byte
	bad  bool // a field was longer than the rest
}

func (b *body) bytes(n int) []byte {
	if n > len(b.data) {
		b.bad = true
		return make([]byte, n)
	}
	p := b.data[:n]
	b.data = b.data[n:]
	return p
}

func (b *body) uint32() uint32 { return binary.BigEndian.Uint32(b.bytes(4)) }
func (b *body) uint64() uint64 { return binary.BigEndian.Uint64(b.bytes(8)) }

// string reads a string of at most limit bytes.
func (b *body) string(limit int) string {
	n := b.uint32()
	if int64(n) > int64(limit) {
		b.bad = true
		return ""
	}
	return string(b.bytes(int(n)))
}

// path reads and clips a path.
func (b *body) path() string {
	n := b.uint32()
	if int64(n) > int64(len(b.data)) {
		b.bad = true
		return ""
	}
	return clip(b.bytes(int(n)))
}

// attributes returns the events of a request that sets attributes: section 5. Times are
// omitted, because many clients set them after every file.
func (b *body) attributes(path string) []Event {
	var events []Event
	flags := b.uint32()
	if flags&attrSize != 0 {
		events = append(events, Event{Op: "truncate", Path: path, To: fmt.Sprint(b.uint64())})
	}
	if flags&attrOwner != 0 {
		events = append(events, Event{Op: "owner", Path: path, To: fmt.Sprintf("%d:%d", b.uint32(), b.uint32())})
	}
	if flags&attrPermissions != 0 {
		events = append(events, Event{Op: "mode", Path: path, To: fmt.Sprintf("%04o", b.uint32()&0o7777)})
	}
	return events
}
