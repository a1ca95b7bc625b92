package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pires/go-proxyproto"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/semaphore"

	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/console"
	"github.com/sallyport-ssh/sallyport/internal/dynamo"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
)

// This file logs in to the consoles of the other gateways that share the table, and takes
// their logins.

const (
	// maxAnswer limits the answer of another gateway, in bytes: 10,000 connections with
	// a few channels each.
	maxAnswer = 16 << 20

	// askedByUsers and askedByAdmins limit the logins to other gateways that go on at
	// once. Each costs the other gateway a key exchange, and users may run their
	// commands in a loop. Administrators do not wait for them.
	askedByUsers, askedByAdmins = 8, 64

	// readInterval is the time for which the console uses a reading of the heartbeats.
	// A gateway that has just started is not in the table for as long, either.
	readInterval = time.Second
)

// fleet is the gateways that share the table, for the console.
type fleet struct {
	d    *Daemon
	last atomic.Pointer[[]dynamo.Gateway] // as read last; nil before

	// reading is locked while the heartbeats are read for the console.
	reading sync.Mutex
	readAt  time.Time // of last, for the console

	// users and admins limit the logins to other gateways that go on at once.
	users, admins *semaphore.Weighted
}

func newFleet(d *Daemon) *fleet {
	return &fleet{d: d, users: semaphore.NewWeighted(askedByUsers), admins: semaphore.NewWeighted(askedByAdmins)}
}

// read reads the heartbeats of all gateways.
func (f *fleet) read(ctx context.Context) ([]dynamo.Gateway, error) {
	all, err := f.d.table.Gateways(ctx)
	if err == nil {
		f.last.Store(&all)
	}
	return all, err
}

// Self implements [console.Fleet].
func (f *fleet) Self() console.FleetGateway { return f.describe(f.d.heartbeat()) }

// Gateways implements [console.Fleet].
func (f *fleet) Gateways(ctx context.Context) ([]console.FleetGateway, error) {
	err := f.readRecent(ctx)
	var out []console.FleetGateway
	if last := f.last.Load(); last != nil {
		for _, g := range *last {
			out = append(out, f.describe(g))
		}
	}
	return out, err
}

// readRecent reads the heartbeats, unless that was done less than readInterval ago: users may
// run their commands in a loop, and each reading costs money.
func (f *fleet) readRecent(ctx context.Context) error {
	f.reading.Lock()
	defer f.reading.Unlock()
	if time.Since(f.readAt) < readInterval {
		return nil
	}
	if _, err := f.read(ctx); err != nil {
		return err
	}
	f.readAt = time.Now()
	return nil
}

func (f *fleet) describe(g dynamo.Gateway) console.FleetGateway {
	out := describeHeartbeat(g, *f.d.settingsHash.Load())
	out.Self = g.ID == f.d.id
	return out
}

// describeHeartbeat returns the gateway of a heartbeat. Settings is the hash with which its
// settings are compared.
func describeHeartbeat(g dynamo.Gateway, settings string) console.FleetGateway {
	return console.FleetGateway{
		ID: g.ID, Version: g.Version, Address: g.Address, SameSettings: g.Settings == settings,
		Draining: g.Draining, Connections: g.Connections, Started: g.Started, Seen: g.Seen, Ended: time.Since(g.Seen) > maxSilence,
	}
}

// PrintFleet prints the gateways of the table, whose settings are compared with cfg.
func PrintFleet(ctx context.Context, to io.Writer, cfg *config.Gateway, table *dynamo.Table, asJSON bool) error {
	settings, err := settingsHash(cfg)
	if err != nil {
		return err
	}
	heartbeats, err := table.Gateways(ctx)
	if err != nil {
		return err
	}
	var all []console.FleetGateway
	for _, g := range heartbeats {
		all = append(all, describeHeartbeat(g, settings))
	}
	return console.PrintFleet(to, all, asJSON)
}

// verify is [gateway.Settings.Peer].
func (f *fleet) verify(key ssh.PublicKey) (identity.Peer, error) {
	return sshca.PeerVerifier{Fleet: f.d.cfg.Load().FleetPublicKeys(), Gateway: f.d.id}.Verify(key)
}

// errForeignKey is the error if the server at another gateway's address has none of the
// host keys that all gateways share.
var errForeignKey = errors.New("the server has a host key that is not in host_keys")

// Run implements [console.Fleet].
func (f *fleet) Run(ctx context.Context, to console.FleetGateway, id identity.Identity, line string) ([]byte, error) {
	limit := f.users
	if id.Permissions.Admin {
		limit = f.admins
	}
	if err := limit.Acquire(ctx, 1); err != nil {
		return nil, fmt.Errorf("waiting for other logins to gateways: %w", err)
	}
	defer limit.Release(1)

	cfg := f.d.cfg.Load()
	var signers []ssh.Signer
	for _, key := range cfg.FleetKeys { // in this order, because the other gateway may know only one of them
		signer, err := sshca.SignPeer(key, identity.Peer{Gateway: f.d.id, User: id.User, ConnID: id.ConnID, Admin: id.Permissions.Admin}, to.ID, time.Now())
		if err != nil {
			return nil, err
		}
		signers = append(signers, signer)
	}
	nc, err := (&net.Dialer{}).DialContext(ctx, "tcp", to.Address)
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	text, err := runOn(nc, cfg, signers, line)
	if errors.Is(err, errForeignKey) {
		f.d.log.Error("WRONG HOST KEY: another server answers at the address of a gateway; not logging in to it", "gateway", to.ID, "addr", to.Address, "err", err)
	}
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return text, err
}

// runOn logs in to a gateway's console on nc and runs a command line.
func runOn(nc net.Conn, cfg *config.Gateway, signers []ssh.Signer, line string) ([]byte, error) {
	// The other gateway takes this one for a load balancer if that has an address of
	// the same network.
	me := identity.AddrPort(nc.LocalAddr()).Addr()
	if slices.ContainsFunc(cfg.ProxyProtocolFrom, func(p netip.Prefix) bool { return p.Contains(me) }) {
		if _, err := proxyproto.HeaderProxyFromAddrs(2, nc.LocalAddr(), nc.RemoteAddr()).WriteTo(nc); err != nil {
			return nil, err
		}
	}
	conn, chans, reqs, err := ssh.NewClientConn(nc, nc.RemoteAddr().String(), &ssh.ClientConfig{
		User:              gateway.PeerUser,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(signers...)},
		ClientVersion:     "SSH-2.0-Sallyport_gateway",
		HostKeyAlgorithms: hostKeyAlgorithms(cfg.HostKeys),
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			if slices.ContainsFunc(cfg.HostKeys, func(k ssh.Signer) bool { return bytes.Equal(k.PublicKey().Marshal(), key.Marshal()) }) {
				return nil
			}
			return fmt.Errorf("%w: %s", errForeignKey, ssh.FingerprintSHA256(key))
		},
	})
	if err != nil {
		return nil, err
	}
	client := ssh.NewClient(conn, chans, reqs)
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		return nil, err
	}
	out, said := &limitedBuffer{max: maxAnswer}, &limitedBuffer{max: 1 << 10}
	session.Stdout, session.Stderr = out, said
	if err := session.Run(line); err != nil {
		return nil, fmt.Errorf("%w: %q", err, said.Bytes())
	}
	return out.Bytes(), nil
}

// hostKeyAlgorithms returns the signature algorithms of the keys.
func hostKeyAlgorithms(keys []ssh.Signer) []string {
	var names []string
	for _, key := range keys {
		of := []string{key.PublicKey().Type()}
		if of[0] == ssh.KeyAlgoRSA {
			of = []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
		}
		for _, name := range of {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

// A limitedBuffer fails a write beyond max bytes.
type limitedBuffer struct {
	bytes.Buffer
	max int
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if b.Len()+len(p) > b.max {
		return 0, fmt.Errorf("an answer of more than %d bytes", b.max)
	}
	return b.Buffer.Write(p)
}

// reachable returns the address at which other hosts reach a listener. For a listener at
// all addresses, it is the one from which this host sends to others; on Fargate that is the
// private address of the task. It is empty if there is none.
func reachable(listener net.Addr) string {
	at := identity.AddrPort(listener)
	if !at.IsValid() {
		return ""
	}
	if !at.Addr().IsUnspecified() {
		return at.String()
	}
	// Connecting a UDP socket sends nothing. The addresses are for documentation (RFC
	// 5737, RFC 3849), and have the default route.
	for _, to := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} {
		if at.Addr().Is4() && to[0] == '[' {
			continue
		}
		conn, err := net.Dial("udp", to)
		if err != nil {
			continue
		}
		conn.Close()
		if host := conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(); host.IsGlobalUnicast() {
			return netip.AddrPortFrom(host, at.Port()).String()
		}
	}
	return ""
}
