package transport

import (
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// A Conn is one side of an SSH transport.
//
// Handshake, ReadPacket, Peek, Buffered and Unimplemented belong to one goroutine
// at a time, the reader. Any goroutine may call the other methods; the results of the
// handshake are valid after Handshake has returned.
type Conn struct {
	nc     net.Conn
	raw    syscall.RawConn // nil if there is no file descriptor
	cfg    *Config
	server bool

	peerVersion   string
	sessionID     []byte        // nil before the first key exchange
	hostKey       ssh.PublicKey // of the first key exchange
	strict        bool          // strict key exchange (OpenSSH's PROTOCOL, section 1.10)
	algorithms    atomic.Pointer[Algorithms]
	extensions    atomic.Pointer[map[string][]byte]
	loggedIn      atomic.Bool
	received      atomic.Uint64
	exchangeBegun atomic.Pointer[chan struct{}] // see Exchanging

	kexInit []byte // this side's KEXINIT while a key exchange is under way; guarded by out.mu

	in  reader
	out writer
}

func newConn(nc net.Conn, cfg *Config, server bool) *Conn {
	c := &Conn{nc: nc, cfg: cfg, server: server}
	if sc, ok := nc.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			c.raw = raw
			c.in.tryRead = c.try
		}
	}
	c.in.protection, c.out.protection = plain{}, plain{}
	idle := make(chan struct{})
	c.exchangeBegun.Store(&idle)
	return c
}

// A DisconnectError is the peer's DISCONNECT message (RFC 4253 section 11.1).
type DisconnectError struct {
	Reason  uint32
	Message string // the peer's text, cut to 1 KiB; may hold any bytes
}

func (e *DisconnectError) Error() string {
	return fmt.Sprintf("disconnected by peer: %q (reason %d)", e.Message, e.Reason)
}

// A ProtocolError says how the peer violated the protocol. The peer has been sent
// DISCONNECT with this reason and text.
type ProtocolError struct {
	Reason uint32
	Text   string
}

func (e *ProtocolError) Error() string { return e.Text }

// ErrNoCommonAlgorithm says that negotiation failed (RFC 4253 section 7.1).
var ErrNoCommonAlgorithm = errors.New("no common algorithm")

// ErrQueueFull says that Config.MaxQueued was exceeded.
var ErrQueueFull = errors.New("the peer does not read")

// LoggedIn lifts the limits that hold before authentication: one key exchange,
// packets of 35,000 bytes (RFC 4253 section 6.1), 1 MiB and 1,024 packets in all.
// Package userauth calls it.
func (c *Conn) LoggedIn() {
	c.loggedIn.Store(true)
	c.extensions.Store(nil)
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	if c.cfg.RekeyInterval > 0 && c.out.err == nil {
		c.out.rekeyTimer = time.AfterFunc(c.cfg.RekeyInterval, func() { c.Rekey() })
	}
}

// SessionID returns the exchange hash of the first key exchange (RFC 4253
// section 7.2). It is not to be modified.
func (c *Conn) SessionID() []byte { return c.sessionID }

// HostKey returns the server's host key of the first key exchange, on either
// side.
func (c *Conn) HostKey() ssh.PublicKey { return c.hostKey }

// PeerVersion returns the peer's identification string without CR LF.
func (c *Conn) PeerVersion() string { return c.peerVersion }

// Version returns this side's identification string without CR LF.
func (c *Conn) Version() string {
	if c.cfg.Version != "" {
		return c.cfg.Version
	}
	return defaultVersion
}

// Algorithms returns the choices of the last key exchange.
func (c *Conn) Algorithms() Algorithms {
	if a := c.algorithms.Load(); a != nil {
		return *a
	}
	return Algorithms{}
}

// Received returns how many bytes have been read from the network.
func (c *Conn) Received() uint64 { return c.received.Load() }

// Sent returns how many bytes the kernel has taken.
func (c *Conn) Sent() uint64 {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return c.out.sent
}

// RemoteAddr returns the net.Conn's remote address.
func (c *Conn) RemoteAddr() net.Addr { return c.nc.RemoteAddr() }

// LocalAddr returns the net.Conn's local address.
func (c *Conn) LocalAddr() net.Addr { return c.nc.LocalAddr() }

func (c *Conn) rekeyBytes() uint64 {
	if c.cfg.RekeyBytes > 0 {
		return c.cfg.RekeyBytes
	}
	return defaultRekeyBytes
}

// defaultRekeyBytes is Config.RekeyBytes's default.
const defaultRekeyBytes = 64 << 30

func (c *Conn) maxQueued() int {
	if c.cfg.MaxQueued > 0 {
		return c.cfg.MaxQueued
	}
	return defaultMaxQueued
}
