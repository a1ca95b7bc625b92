// Package sshmsg has the messages of the SSH connection protocol (RFC 4254) and
// of OpenSSH's extensions to it (OpenSSH PROTOCOL) as types, each with a parser
// and an encoder.
//
//	sshmsg.go   message numbers and reason codes
//	channel.go  the messages
//	payload.go  the payloads of channel types and requests
//	reader.go   the fields that messages consist of
//
// A parser reads the whole of a message and fails if a field is cut short or if
// bytes follow the last field. The strings and byte slices of a parsed message
// point into the packet, so they are valid for as long as the packet is. A parser
// does not allocate, except for a copy that its comment names. No input makes it
// panic.
package sshmsg

import "errors"

// Message numbers (RFC 4250, section 4.1.2).
const (
	NumDisconnect     = 1
	NumIgnore         = 2
	NumUnimplemented  = 3
	NumDebug          = 4
	NumGlobalRequest  = 80
	NumRequestSuccess = 81
	NumRequestFailure = 82
	NumOpen           = 90
	NumOpenConfirm    = 91
	NumOpenFailure    = 92
	NumWindowAdjust   = 93
	NumData           = 94
	NumExtendedData   = 95
	NumEOF            = 96
	NumClose          = 97
	NumRequest        = 98
	NumSuccess        = 99
	NumFailure        = 100
)

// Reason codes of [OpenFailure] (RFC 4254, section 5.1).
const (
	Prohibited         = 1
	ConnectFailed      = 2
	UnknownChannelType = 3
	ResourceShortage   = 4
)

// Stderr is the only type of extended data (RFC 4254, section 5.2).
const Stderr = 1

// ErrMalformed is the error of every parser.
var ErrMalformed = errors.New("sshmsg: malformed message")
