package gateway

import (
	"net/netip"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/record"
)

// Settings are replaced as a whole by [Server.Reload]. A connection keeps the settings
// that were in force when it was accepted; the rechecks of its login use the present
// ones. The fields of Settings that were passed to a Server must not change. Settings of
// sshd_config(5) have the same meaning as there.
type Settings struct {
	Options
	// Authorize returns the grant of a user's key, or an error if the key is
	// refused. It must have no side effects, because it is also called for keys
	// that are only offered. The error is for the log, not for the client.
	Authorize func(user string, key ssh.PublicKey, from netip.Addr, now time.Time) (auth.Grant, error)
	// Recheck, if not nil, is called every few seconds for each login. It
	// returns the grant for the next call, or an error if the grant is no longer
	// valid; the login then ends, except on auth.ErrUndecided. It should not
	// block. See [auth.Keys.Recheck].
	Recheck func(user string, key ssh.PublicKey, from netip.Addr, now time.Time, granted auth.Grant) (auth.Grant, error)
	// Peer verifies a key with which another gateway logs in to the console as
	// [PeerUser], and returns for which user. It must have no side effects. If it
	// is nil, no gateway may log in. See [sshca.PeerVerifier].
	Peer func(key ssh.PublicKey) (identity.Peer, error)
	// SecondFactor, if not nil, checks a code after a key has been proven.
	SecondFactor SecondFactor
	// SecondFactorRequired refuses users for whom SecondFactor needs no code.
	SecondFactorRequired bool
	// Record returns the minimum to record of a login's sessions; the
	// login's permissions may add to it. Nil means nothing. Recordings stores
	// the recordings. A session that cannot be recorded ends, unless
	// RecordingsOptional is set.
	Record             func(identity.Identity) identity.Record
	Recordings         *record.Store
	RecordingsOptional bool
}

// Options are the settings that are plain values. Package config reads them from
// the configuration file, where they have the same names in snake_case.
type Options struct {
	// HostKeys are the host keys; at least one is needed. The first of each
	// type signs key exchanges. All are announced to clients, so that they can
	// learn future keys before a rotation.
	HostKeys []ssh.Signer
	// HostCertificates sign key exchanges with a certificate. The first of each
	// type is used.
	HostCertificates []ssh.Signer
	// Roles restrict users beside the options of their keys. A login ends when
	// one of its roles is no longer valid. Nil means no restriction by roles.
	Roles policy.Roles

	// ProxyProtocolFrom are the networks of load balancers. A connection from
	// them must begin with a header of the PROXY protocol, version 1 or 2, which
	// has the client's address. Connections from others must not.
	ProxyProtocolFrom []netip.Prefix

	// LoginGraceTime bounds the time until a key is proven. Waiting for a
	// bastion does not count. Zero means two minutes.
	LoginGraceTime time.Duration
	// MaxStartups limits connections without a proven key, and
	// PerSourceMaxStartups those of one source; zero is no limit.
	MaxStartups          Startups
	PerSourceMaxStartups int
	// PerSourceNetBlockSize is the size of a source. PerSourcePenalties apply
	// to sources that fail to log in, except those in
	// PerSourcePenaltyExemptList.
	PerSourceNetBlockSize      NetBlockSize
	PerSourcePenalties         Penalties
	PerSourcePenaltyExemptList []netip.Prefix
	// MaxAuthTries is the number of failed attempts after which a connection
	// ends; zero means six. A refused key counts even if it is only offered.
	MaxAuthTries int
	// MaxSessions limits the open sessions of a connection; zero means ten.
	// MaxConnectionsPerUser limits the connections of a user; zero means no
	// limit.
	MaxSessions, MaxConnectionsPerUser int
	// MaxChannels limits the open channels of a connection, of all types and in
	// both directions together. Zero means 1,000.
	MaxChannels int
	// LogPerUser limits the log entries that a user causes in the audit log and
	// the operator's log. At the limit, the user's connections end.
	LogPerUser LogLimit
	// ClientAliveInterval is the silence of a client after which a keepalive is
	// sent; zero means none. After ClientAliveCountMax keepalives without an
	// answer the connection ends; zero means 3.
	ClientAliveInterval time.Duration
	ClientAliveCountMax int
	// DisableTCPKeepAlive turns off TCP's own keepalive, which ends a
	// connection when the client's host has not answered for 16 minutes.
	DisableTCPKeepAlive bool
	// DrainDelay is the time that new connections are still accepted after Serve's
	// context ends: until load balancers have noticed it.
	DrainDelay time.Duration
	// Drain is the time that connections may go on after that.
	Drain time.Duration
	// Ciphers, MACs and KexAlgorithms are offered to clients; nil means the
	// defaults (see algorithms.go). If the first name begins with +, - or ^, the
	// list modifies the default, as in sshd_config(5).
	Ciphers, MACs, KexAlgorithms []string
	// RekeyBytes and RekeyInterval are those of [transport.Config], for the
	// connections of clients.
	RekeyBytes    uint64
	RekeyInterval time.Duration
	// VersionAddendum is appended to the server's identification string.
	VersionAddendum string
	// Banner is shown before authentication; usually empty.
	Banner string
}
