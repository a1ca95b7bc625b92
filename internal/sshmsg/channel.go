package sshmsg

import "encoding/binary"

// A GlobalRequest is SSH_MSG_GLOBAL_REQUEST (RFC 4254, section 4). Type is a copy.
type GlobalRequest struct {
	Type      string
	WantReply bool
	Payload   []byte
}

// ParseGlobalRequest parses a packet.
func ParseGlobalRequest(packet []byte) (m GlobalRequest, err error) {
	r := body(packet, NumGlobalRequest)
	m.Type, m.WantReply, m.Payload = r.String(), r.Bool(), r.Remainder()
	return m, r.End()
}

// Append appends the packet to b.
func (m GlobalRequest) Append(b []byte) []byte {
	b = AppendString(append(b, NumGlobalRequest), m.Type)
	return append(AppendBool(b, m.WantReply), m.Payload...)
}

// An Open is SSH_MSG_CHANNEL_OPEN (RFC 4254, section 5.1). Type is a copy.
type Open struct {
	Type      string
	Sender    uint32
	Window    uint32 // bytes
	MaxPacket uint32 // bytes of data
	Payload   []byte
}

// ParseOpen parses a packet.
func ParseOpen(packet []byte) (m Open, err error) {
	r := body(packet, NumOpen)
	m.Type, m.Sender, m.Window, m.MaxPacket, m.Payload = r.String(), r.Uint32(), r.Uint32(), r.Uint32(), r.Remainder()
	return m, r.End()
}

// Append appends the packet to b.
func (m Open) Append(b []byte) []byte {
	b = AppendString(append(b, NumOpen), m.Type)
	b = AppendUint32(AppendUint32(AppendUint32(b, m.Sender), m.Window), m.MaxPacket)
	return append(b, m.Payload...)
}

// An OpenConfirm is SSH_MSG_CHANNEL_OPEN_CONFIRMATION (RFC 4254, section 5.1).
type OpenConfirm struct {
	Recipient, Sender uint32
	Window            uint32 // bytes
	MaxPacket         uint32 // bytes of data
	Payload           []byte
}

// ParseOpenConfirm parses a packet.
func ParseOpenConfirm(packet []byte) (m OpenConfirm, err error) {
	r := body(packet, NumOpenConfirm)
	m.Recipient, m.Sender, m.Window, m.MaxPacket, m.Payload = r.Uint32(), r.Uint32(), r.Uint32(), r.Uint32(), r.Remainder()
	return m, r.End()
}

// Append appends the packet to b.
func (m OpenConfirm) Append(b []byte) []byte {
	b = AppendUint32(AppendUint32(append(b, NumOpenConfirm), m.Recipient), m.Sender)
	b = AppendUint32(AppendUint32(b, m.Window), m.MaxPacket)
	return append(b, m.Payload...)
}

// An OpenFailure is SSH_MSG_CHANNEL_OPEN_FAILURE (RFC 4254, section 5.1).
// Description is a copy.
type OpenFailure struct {
	Recipient, Reason uint32
	Description       string
}

// ParseOpenFailure parses a packet. The language tag may be missing, because some
// implementations send none.
func ParseOpenFailure(packet []byte) (m OpenFailure, err error) {
	r := body(packet, NumOpenFailure)
	m.Recipient, m.Reason, m.Description = r.Uint32(), r.Uint32(), r.String()
	if len(r.rest) > 0 {
		r.Bytes()
	}
	return m, r.End()
}

// Append appends the packet to b.
func (m OpenFailure) Append(b []byte) []byte {
	b = AppendUint32(AppendUint32(append(b, NumOpenFailure), m.Recipient), m.Reason)
	return AppendString(AppendString(b, m.Description), "")
}

// A WindowAdjust is SSH_MSG_CHANNEL_WINDOW_ADJUST (RFC 4254, section 5.2).
type WindowAdjust struct{ Recipient, Bytes uint32 }

// ParseWindowAdjust parses a packet.
func ParseWindowAdjust(packet []byte) (m WindowAdjust, err error) {
	r := body(packet, NumWindowAdjust)
	m.Recipient, m.Bytes = r.Uint32(), r.Uint32()
	return m, r.End()
}

// Append appends the packet to b.
func (m WindowAdjust) Append(b []byte) []byte {
	return AppendUint32(AppendUint32(append(b, NumWindowAdjust), m.Recipient), m.Bytes)
}

// Data is SSH_MSG_CHANNEL_DATA, or SSH_MSG_CHANNEL_EXTENDED_DATA if Extended, in
// which case Code is its type (RFC 4254, section 5.2).
type Data struct {
	Recipient uint32
	Extended  bool
	Code      uint32
	Data      []byte
}

// ParseData parses a packet of either kind.
func ParseData(packet []byte) (m Data, err error) {
	m.Extended = len(packet) > 0 && packet[0] == NumExtendedData
	num := byte(NumData)
	if m.Extended {
		num = NumExtendedData
	}
	r := body(packet, num)
	m.Recipient = r.Uint32()
	if m.Extended {
		m.Code = r.Uint32()
	}
	m.Data = r.Bytes()
	return m, r.End()
}

// Append appends the packet to b.
func (m Data) Append(b []byte) []byte {
	if m.Extended {
		b = AppendUint32(AppendUint32(append(b, NumExtendedData), m.Recipient), m.Code)
	} else {
		b = AppendUint32(append(b, NumData), m.Recipient)
	}
	return AppendString(b, m.Data)
}

// A Request is SSH_MSG_CHANNEL_REQUEST (RFC 4254, section 5.4). Type is a copy.
type Request struct {
	Recipient uint32
	Type      string
	WantReply bool
	Payload   []byte
}

// ParseRequest parses a packet.
func ParseRequest(packet []byte) (m Request, err error) {
	r := body(packet, NumRequest)
	m.Recipient, m.Type, m.WantReply, m.Payload = r.Uint32(), r.String(), r.Bool(), r.Remainder()
	return m, r.End()
}

// Append appends the packet to b.
func (m Request) Append(b []byte) []byte {
	b = AppendString(AppendUint32(append(b, NumRequest), m.Recipient), m.Type)
	return append(AppendBool(b, m.WantReply), m.Payload...)
}

// ParseRecipient parses a message that has no field but the recipient channel: EOF,
// CLOSE, SUCCESS and FAILURE of a channel (RFC 4254, sections 5.3 and 5.4).
func ParseRecipient(packet []byte) (recipient uint32, err error) {
	if len(packet) == 0 {
		return 0, ErrMalformed
	}
	r := body(packet, packet[0])
	recipient = r.Uint32()
	return recipient, r.End()
}

// AppendRecipient appends a message with that field only to b.
func AppendRecipient(b []byte, num byte, recipient uint32) []byte {
	return AppendUint32(append(b, num), recipient)
}

// Recipient returns the recipient channel, which is the first field of every message
// about a channel but Open. It does not check the other fields.
func Recipient(packet []byte) (uint32, error) {
	if len(packet) < 5 {
		return 0, ErrMalformed
	}
	return binary.BigEndian.Uint32(packet[1:]), nil
}

// SetRecipient replaces the recipient channel in place. The packet must have one, as
// Recipient reports.
func SetRecipient(packet []byte, number uint32) { binary.BigEndian.PutUint32(packet[1:], number) }
