// Package sshca makes and reads the short certificates with which gateways log
// in to bastions (PROTOCOL.certkeys of OpenSSH).
//
// A gateway holds the fleet key, an ordinary SSH private key. For every
// connection it makes a fresh Ed25519 key and signs a certificate for it that
// names one bastion (the principal), lives for [Lifetime], and carries what the
// user may do there. A bastion knows the fleet's public key and its own
// principal, and nothing that is secret.
//
// The standard options and extensions mean what they mean to sshd, so a stock
// sshd with TrustedUserCAKeys serves as a bastion too. Restrictions sshd does
// not know are critical options, which make it refuse rather than ignore them.
package sshca

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// Lifetime is how long a login certificate is good for. It bounds what a stolen
// one is worth, and how far the clocks of gateway and bastion may be apart.
const Lifetime = 2 * time.Minute

// skew is how far back a certificate is dated, for bastions whose clock is slow.
const skew = time.Minute

// Names of our own options and extensions. Critical options restrict: who does
// not know them must refuse (PROTOCOL.certkeys). Extensions only inform.
const (
	optPermitOpen   = "permit-open@sallyport"
	optPermitListen = "permit-listen@sallyport"
	optDestinations = "destinations@sallyport" // of the roles
	optListen       = "listen@sallyport"       // of the roles
	optNoShell      = "no-shell@sallyport"
	optNoExec       = "no-exec@sallyport"
	optNoSFTP       = "no-sftp@sallyport"
	optRequirePTY   = "require-pty@sallyport"
	extRoles        = "roles@sallyport" // to be named in refusals
	extEnvironment  = "environment@sallyport"
	extConnection   = "connection@sallyport" // SSH_CONNECTION's four fields
)

// criticalOptions lists what a bastion enforces, for [ssh.CertChecker].
var criticalOptions = []string{
	"force-command", "source-address", optPermitOpen, optPermitListen, optDestinations, optListen, optNoShell, optNoExec, optNoSFTP,
	optRequirePTY,
}

// Sign makes a key and a certificate for one login of id to the bastion called
// principal, and returns them as one signer. It never blocks. The key exists
// in memory only.
func Sign(fleet ssh.Signer, id identity.Identity, principal string, now time.Time) (ssh.Signer, error) {
	if principal == "" {
		return nil, errors.New("a login certificate needs a principal: without one it would fit every bastion")
	}
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	key, err := ssh.NewPublicKey(pub)
	if err != nil {
		return nil, err
	}
	signer, err := ssh.NewSignerFromSigner(priv)
	if err != nil {
		return nil, err
	}
	var serial [8]byte
	rand.Read(serial[:])
	cert := &ssh.Certificate{
		Key:             key,
		Serial:          binary.BigEndian.Uint64(serial[:]),
		CertType:        ssh.UserCert,
		KeyId:           id.User + "/" + id.ConnID,
		ValidPrincipals: []string{principal},
		ValidAfter:      uint64(now.Add(-skew).Unix()),
		ValidBefore:     uint64(now.Add(Lifetime).Unix()),
		Permissions:     permissions(id),
	}
	if err := cert.SignCert(rand.Reader, fleet); err != nil {
		return nil, fmt.Errorf("signing a login certificate for %s: %w", id.User, err)
	}
	return ssh.NewCertSigner(cert, signer)
}

func permissions(id identity.Identity) ssh.Permissions {
	p := id.Permissions
	out := ssh.Permissions{CriticalOptions: map[string]string{}, Extensions: map[string]string{}}
	for name, on := range map[string]bool{
		"permit-pty":              p.PTY,
		"permit-port-forwarding":  p.PortForwarding,
		"permit-agent-forwarding": p.AgentForwarding,
		"permit-X11-forwarding":   p.X11Forwarding,
		"permit-user-rc":          p.UserRC,
	} {
		if on {
			out.Extensions[name] = ""
		}
	}
	if p.ForceCommand != "" {
		out.CriticalOptions["force-command"] = p.ForceCommand
	}
	for name, list := range map[string][]string{
		optPermitOpen: p.PermitOpen, optPermitListen: p.PermitListen, optDestinations: p.Destinations, optListen: p.Listen,
	} {
		if len(list) > 0 {
			out.CriticalOptions[name] = strings.Join(list, ",")
		}
	}
	for name, on := range map[string]bool{optNoShell: p.NoShell, optNoExec: p.NoExec, optNoSFTP: p.NoSFTP, optRequirePTY: p.RequirePTY} {
		if on {
			out.CriticalOptions[name] = ""
		}
	}
	if len(p.Roles) > 0 {
		out.Extensions[extRoles] = strings.Join(p.Roles, ",")
	}
	if len(p.Environment) > 0 {
		// NUL separates: it can be in no environment variable.
		out.Extensions[extEnvironment] = strings.Join(p.Environment, "\x00")
	}
	if id.Client.IsValid() && id.Server.IsValid() {
		out.Extensions[extConnection] = fmt.Sprintf("%s %d %s %d",
			id.Client.Addr(), id.Client.Port(), id.Server.Addr(), id.Server.Port())
	}
	return out
}

// A Verifier accepts the logins that a fleet's gateways make to one bastion.
type Verifier struct {
	// Fleet is the public key of the fleet's certificate authority.
	Fleet ssh.PublicKey
	// Principal is this bastion's name. It must not be empty.
	Principal string
	// Now, if not nil, stands in for time.Now.
	Now func() time.Time
}

// Verify checks that key is a certificate for a login to this bastion, and
// returns what it says, which is not the user's own key. It does not check the source-address option:
// golang.org/x/crypto/ssh does that for permissions it is handed. The caller
// must also have the signature made with key verified, as package ssh does.
func (v Verifier) Verify(key ssh.PublicKey) (identity.Identity, error) {
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return identity.Identity{}, errors.New("a bastion is entered with a certificate of the fleet, not with a plain key")
	}
	if cert.CertType != ssh.UserCert {
		return identity.Identity{}, errors.New("not a user certificate")
	}
	// CheckCert takes a certificate without principals for one that fits all.
	if v.Principal == "" || len(cert.ValidPrincipals) == 0 {
		return identity.Identity{}, errors.New("certificate without principals")
	}
	if string(cert.SignatureKey.Marshal()) != string(v.Fleet.Marshal()) {
		return identity.Identity{}, errors.New("certificate signed by a key that is not the fleet's")
	}
	checker := ssh.CertChecker{SupportedCriticalOptions: criticalOptions, Clock: v.Now}
	if err := checker.CheckCert(v.Principal, cert); err != nil {
		return identity.Identity{}, err
	}
	return read(cert)
}

func read(cert *ssh.Certificate) (identity.Identity, error) {
	user, conn, ok := strings.Cut(cert.KeyId, "/")
	if !ok || user == "" {
		return identity.Identity{}, fmt.Errorf("key id %q is not USER/CONNECTION", cert.KeyId)
	}
	has := func(name string) bool { _, ok := cert.Extensions[name]; return ok }
	denied := func(name string) bool { _, ok := cert.CriticalOptions[name]; return ok }
	list := func(name string) []string {
		if s, ok := cert.CriticalOptions[name]; ok && s == "" {
			return []string{"none"} // a list that is there limits
		}
		return split(cert.CriticalOptions[name], ",")
	}
	id := identity.Identity{
		User:   user,
		ConnID: conn,
		Permissions: identity.Permissions{
			PTY:             has("permit-pty"),
			PortForwarding:  has("permit-port-forwarding"),
			AgentForwarding: has("permit-agent-forwarding"),
			X11Forwarding:   has("permit-X11-forwarding"),
			UserRC:          has("permit-user-rc"),
			ForceCommand:    cert.CriticalOptions["force-command"],
			PermitOpen:      list(optPermitOpen),
			PermitListen:    list(optPermitListen),
			Environment:     split(cert.Extensions[extEnvironment], "\x00"),
			Destinations:    list(optDestinations),
			Listen:          list(optListen),
			NoShell:         denied(optNoShell),
			NoExec:          denied(optNoExec),
			NoSFTP:          denied(optNoSFTP),
			RequirePTY:      denied(optRequirePTY),
			Roles:           split(cert.Extensions[extRoles], ","),
		},
	}
	if s, ok := cert.Extensions[extConnection]; ok {
		var err error
		if id.Client, id.Server, err = parseConnection(s); err != nil {
			return identity.Identity{}, err
		}
	}
	return id, nil
}

func split(s, sep string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, sep)
}

func parseConnection(s string) (client, server netip.AddrPort, err error) {
	f := strings.Fields(s)
	if len(f) != 4 {
		return client, server, fmt.Errorf("%s: %q has not four fields", extConnection, s)
	}
	parse := func(addr, port string) (netip.AddrPort, error) {
		a, err := netip.ParseAddr(addr)
		if err != nil {
			return netip.AddrPort{}, err
		}
		if strings.Contains(addr, ":") {
			addr = "[" + addr + "]"
		}
		p, err := netip.ParseAddrPort(addr + ":" + port)
		if err != nil {
			return netip.AddrPort{}, err
		}
		return netip.AddrPortFrom(a, p.Port()), nil
	}
	if client, err = parse(f[0], f[1]); err != nil {
		return client, server, err
	}
	server, err = parse(f[2], f[3])
	return client, server, err
}
