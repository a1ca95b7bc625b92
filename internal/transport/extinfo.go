package transport

import "encoding/binary"

// pingExtension announces that this side answers PING with PONG (OpenSSH's PROTOCOL,
// section 1.8).
const pingExtension = "ping@openssh.com"

// maxExtensions limits the extensions of a peer's EXT_INFO that are kept.
const maxExtensions = 32

// marshalExtInfo returns the EXT_INFO that this side sends (RFC 8308 section 2.3).
func (c *Conn) marshalExtInfo() []byte {
	b := []byte{msgExtInfo}
	b = binary.BigEndian.AppendUint32(b, uint32(1+len(c.cfg.Extensions)))
	for _, e := range c.cfg.Extensions {
		b = appendString(b, e.Name)
		b = appendString(b, e.Value)
	}
	b = appendString(b, pingExtension)
	return appendString(b, "0")
}

// receiveExtInfo keeps the peer's extensions. EXT_INFO may follow the peer's first
// NEWKEYS, and a server may send it again before SUCCESS (RFC 8308 section 2.4). After
// the login it is ignored.
func (c *Conn) receiveExtInfo(p []byte) error {
	bad := &ProtocolError{ReasonProtocolError, "malformed EXT_INFO"}
	if len(p) < 5 {
		return bad
	}
	n, rest, ok := binary.BigEndian.Uint32(p[1:]), p[5:], true
	extensions := make(map[string][]byte)
	for range n { // ends at the latest when p does
		var name, value []byte
		if name, rest, ok = cutString(rest); !ok {
			return bad
		}
		if value, rest, ok = cutString(rest); !ok {
			return bad
		}
		if len(extensions) < maxExtensions {
			extensions[string(name)] = append([]byte(nil), value...)
		}
	}
	if len(rest) > 0 {
		return bad
	}
	if !c.loggedIn.Load() {
		c.extensions.Store(&extensions)
	}
	return nil
}

// PeerExtension returns the value of an extension that the peer has announced
// (RFC 8308). It is not to be modified. After [Conn.LoggedIn] there are none, because
// they are about authentication.
func (c *Conn) PeerExtension(name string) (value []byte, ok bool) {
	if extensions := c.extensions.Load(); extensions != nil {
		value, ok = (*extensions)[name]
	}
	return value, ok
}
