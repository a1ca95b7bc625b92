package gateway

import (
	"encoding/binary"
	"io"
	"net"
	"time"
)

const (
	// rejectTimeout bounds the time that reject takes.
	rejectTimeout = time.Second
	// maxRejecting limits the rejected connections that wait until their
	// clients have read the message.
	maxRejecting = 100
)

// reject sends the client a message and closes nc, before the key exchange. The text
// is in a DISCONNECT after the identification, which clients show. OpenSSH's client
// would show a line before the identification (RFC 4253, section 4.2), which sshd
// sends, only with -v. A client of the HTTP API is sent nothing, because an answer would
// cost a TLS handshake.
func (c *conn) reject(nc net.Conn, reason uint32, text string) {
	defer nc.Close()
	if c.isCall {
		return
	}
	nc.SetDeadline(time.Now().Add(rejectTimeout))
	if _, err := nc.Write(append([]byte(c.version()+"\r\n"), disconnectPacket(reason, text)...)); err != nil {
		return
	}
	// Wait until the client closes, because the kernel sends a reset if nc is
	// closed with unread input, and the client may lose the text.
	defer c.srv.rejecting.Add(-1)
	half, ok := nc.(interface{ CloseWrite() error })
	if c.srv.rejecting.Add(1) <= maxRejecting && ok && half.CloseWrite() == nil {
		io.Copy(io.Discard, io.LimitReader(nc, 64<<10))
	}
}

// disconnectPacket returns an SSH_MSG_DISCONNECT packet (RFC 4253, sections 6 and 11.1)
// for the time before the first key exchange: unencrypted and without a MAC.
func disconnectPacket(reason uint32, text string) []byte {
	payload := []byte{1} // SSH_MSG_DISCONNECT
	payload = binary.BigEndian.AppendUint32(payload, reason)
	payload = binary.BigEndian.AppendUint32(payload, uint32(len(text)))
	payload = append(payload, text...)
	payload = binary.BigEndian.AppendUint32(payload, 0) // no language
	// The packet is a multiple of 8 bytes, and padding is at least 4 of them.
	padding := 8 - (4+1+len(payload))%8
	if padding < 4 {
		padding += 8
	}
	packet := binary.BigEndian.AppendUint32(nil, uint32(1+len(payload)+padding))
	packet = append(packet, byte(padding))
	packet = append(packet, payload...)
	return append(packet, make([]byte, padding)...)
}
