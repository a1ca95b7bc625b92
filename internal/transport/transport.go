// Package transport is the SSH transport layer protocol (RFC 4253) for servers
// and clients: version exchange, key exchange, packet protection. It carries
// payloads; users and channels are other packages' concern.
//
// # Reading the package
//
//	transport.go   the exported API
//	version.go     identification strings (RFC 4253 section 4.2)
//	handshake.go   the key exchange state machine, for both roles
//	kexinit.go     KEXINIT and the choice of algorithms (section 7.1)
//	kex.go         the key exchange methods (RFC 8731, 5656, 8268) and ML-KEM
//	hostkey.go     host keys: the server's signature and the client's check
//	cipher.go      packet protection: AES-GCM, AES-CTR with HMAC, none
//	read.go        packets in: buffer, bounds, transport messages
//	write.go       packets out: sealing, queueing, flushing
//	conn.go        the state of a connection, and errors
//	syscall.go     read(2) and write(2) without the scheduler
//	extinfo.go     EXT_INFO (RFC 8308)
//	encoding.go    message numbers, strings and mpints
//
// # Goroutines and memory
//
// An idle Conn has no goroutine of its own and no buffer. One goroutine calls
// [Conn.ReadPacket]. Each key exchange runs in another one, for which ReadPacket waits,
// so that its large stack is freed afterwards. While the socket's send buffer is full, a
// third one waits for room.
package transport

import (
	"net"
	"time"

	"golang.org/x/crypto/ssh"
)

// Config configures one side of a connection. It may be shared by any number of
// Conns, and must not change while one of them is in use. The zero value is
// useful for a client that sets HostKey.
type Config struct {
	// Version is the identification string without CR LF (RFC 4253
	// section 4.2). Empty means "SSH-2.0-Sallyport".
	Version string

	// HostKeys are the server's keys and host certificates; at least one. An
	// RSA key signs with rsa-sha2-256 and rsa-sha2-512 only.
	HostKeys []ssh.Signer

	// HostKey, which a client must set, decides whether the client trusts the
	// server's host key, which may be an *ssh.Certificate. It is called in the
	// first key exchange, after the server has proven that it holds the private
	// key. In a later one, a server with another host key is disconnected.
	// [Conn.Handshake] wraps its error.
	HostKey func(ssh.PublicKey) error

	// KexAlgorithms, Ciphers, MACs and HostKeyAlgorithms are in order of
	// preference; nil means DefaultKexAlgorithms and so on. A server offers only
	// those HostKeyAlgorithms that HostKeys can sign with. If a name is not
	// implemented, Handshake returns an error; see [CheckAlgorithms].
	KexAlgorithms, Ciphers, MACs, HostKeyAlgorithms []string

	// CiphersFor, if not nil, returns the ciphers to offer to a peer with
	// this identification string, in place of Ciphers.
	CiphersFor func(peerVersion string) []string

	// Extensions are those that a server announces in EXT_INFO (RFC 8308), beside
	// ping@openssh.com. A client sends no EXT_INFO.
	Extensions []Extension

	// RekeyBytes is the number of bytes in one direction after which this side
	// starts a key exchange. Zero means 64 GiB, which is 2^32 blocks of AES
	// (RFC 4344 section 3.2). It also starts one after 2^31 packets (RFC 4344
	// section 3.1). Neither happens before [Conn.LoggedIn].
	RekeyBytes uint64

	// RekeyInterval is the time after [Conn.LoggedIn], and after each key
	// exchange, at which this side starts the next one, also on an idle
	// connection. Zero means never.
	RekeyInterval time.Duration

	// MaxQueued limits [Conn.Queued], in bytes. If a WritePacket exceeds it, the
	// connection fails with ErrQueueFull. It is the second defence against a peer
	// that causes writes and does not read; [Conn.WaitWritable] is the first. Zero
	// means 16 MiB.
	MaxQueued int
}

// An Extension is a name and a value of EXT_INFO (RFC 8308 section 2.3).
type Extension struct {
	Name  string
	Value []byte
}

// Algorithms are the result of a key exchange.
type Algorithms struct {
	Kex, HostKey        string
	CipherIn, CipherOut string
	MACIn, MACOut       string // empty for AES-GCM
}

// MaxPayload is the largest payload, in bytes, that can be read or written. Its packet
// is within OpenSSH's limit of 256 KiB; RFC 4253 section 6.1 demands 32,768 at least.
const MaxPayload = maxPacketLength - 32

// NewServer returns the server side of a connection on nc, which it owns. It
// does no I/O; call [Conn.Handshake] next.
func NewServer(nc net.Conn, cfg *Config) *Conn { return newConn(nc, cfg, true) }

// NewClient is NewServer for the client side.
func NewClient(nc net.Conn, cfg *Config) *Conn { return newConn(nc, cfg, false) }

// Messages of RFC 4253 section 12 that users of this package send or receive.
const (
	MsgServiceRequest = 5
	MsgServiceAccept  = 6
)

// Reasons for DISCONNECT (RFC 4253 section 11.1).
const (
	ReasonHostNotAllowed       = 1
	ReasonProtocolError        = 2
	ReasonKeyExchangeFailed    = 3
	ReasonMACError             = 5
	ReasonServiceNotAvailable  = 7
	ReasonVersionNotSupported  = 8
	ReasonHostKeyNotVerifiable = 9
	ReasonConnectionLost       = 10
	ReasonByApplication        = 11
	ReasonTooManyConnections   = 12
	ReasonAuthCancelled        = 13
	ReasonNoMoreAuthMethods    = 14
	ReasonIllegalUserName      = 15
)
