// Package sshca signs and verifies the short-lived certificates with which gateways log in
// to bastions and, see peer.go, to each other's consoles (OpenSSH, PROTOCOL.certkeys).
//
// A gateway holds the fleet key, an SSH private key that is a certificate authority. For
// every connection the gateway generates an Ed25519 key and signs a certificate for it.
// The certificate is valid for one bastion (the principal) and for [Lifetime], and carries
// the user's permissions. A bastion needs the public fleet key and its own principal;
// neither is a secret.
//
// The standard options and extensions mean the same as to sshd, so an sshd with
// TrustedUserCAKeys can serve as a bastion. Restrictions that sshd does not have are
// critical options, so sshd rejects the certificate instead of ignoring them.
package sshca

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// Lifetime is the validity of a login certificate. It bounds the use of a stolen
// certificate, and how far a bastion's clock may be ahead of the gateway's.
const Lifetime = 2 * time.Minute

// skew is how far a bastion's clock may be behind the gateway's: the validity of a
// certificate begins so long before it is signed.
const skew = time.Minute

// Names of our own options and extensions. A server that does not know a critical option
// must reject the certificate, and ignores an extension that it does not know
// (PROTOCOL.certkeys). So restrictions are critical options.
const (
	optPermitOpen   = "permit-open@sallyport"
	optPermitListen = "permit-listen@sallyport"
	optDestinations = "destinations@sallyport" // from the roles
	optListen       = "listen@sallyport"       // from the roles
	optNoShell      = "no-shell@sallyport"
	optNoExec       = "no-exec@sallyport"
	optNoSFTP       = "no-sftp@sallyport"
	optRequirePTY   = "require-pty@sallyport"
	extRoles        = "roles@sallyport" // for messages about denied forwards
	extEnvironment  = "environment@sallyport"
	extConnection   = "connection@sallyport" // SSH_CONNECTION's four fields
)

// criticalOptions are the critical options that a bastion enforces.
var criticalOptions = []string{
	"force-command", optPermitOpen, optPermitListen, optDestinations, optListen, optNoShell, optNoExec, optNoSFTP,
	optRequirePTY,
}

// Sign generates a key and signs a certificate for one login of id to the bastion with
// that principal. It returns both as one signer. The key exists in memory only.
func Sign(fleet ssh.Signer, id identity.Identity, principal string, now time.Time) (ssh.Signer, error) {
	if principal == "" {
		return nil, errors.New("a login certificate without a principal would be valid for every bastion")
	}
	signer, err := sign(fleet, id.User+"/"+id.ConnID, principal, permissions(id), now)
	if err != nil {
		return nil, fmt.Errorf("signing a login certificate for %s: %w", id.User, err)
	}
	return signer, nil
}

// sign generates a key, and signs a certificate for it that is valid for [Lifetime].
func sign(fleet ssh.Signer, keyID, principal string, p ssh.Permissions, now time.Time) (ssh.Signer, error) {
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
		KeyId:           keyID,
		ValidPrincipals: []string{principal},
		ValidAfter:      uint64(now.Add(-skew).Unix()),
		ValidBefore:     uint64(now.Add(Lifetime).Unix()),
		Permissions:     p,
	}
	if err := cert.SignCert(rand.Reader, fleet); err != nil {
		return nil, err
	}
	return ssh.NewCertSigner(cert, signer)
}

// FormatKeys writes public keys as lines of an authorized_keys file, for
// [ParseKeys].
func FormatKeys(keys []ssh.PublicKey) string {
	var lines []string
	for _, key := range keys {
		lines = append(lines, strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))))
	}
	return strings.Join(lines, "\n")
}

// ParseKeys reads the public keys of a fleet's certificate authority: one or more lines of
// an authorized_keys file. A line without a key is an error.
func ParseKeys(text string) ([]ssh.PublicKey, error) {
	var keys []ssh.PublicKey
	for rest := []byte(strings.TrimSpace(text)); len(rest) > 0 || keys == nil; {
		key, _, _, more, err := ssh.ParseAuthorizedKey(rest)
		if err != nil {
			return nil, err
		}
		keys, rest = append(keys, key), bytes.TrimSpace(more)
	}
	return keys, nil
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
		// Separated by NUL, which no environment variable can contain.
		out.Extensions[extEnvironment] = strings.Join(p.Environment, "\x00")
	}
	if id.Client.IsValid() && id.Server.IsValid() {
		out.Extensions[extConnection] = fmt.Sprintf("%s %d %s %d",
			id.Client.Addr(), id.Client.Port(), id.Server.Addr(), id.Server.Port())
	}
	return out
}

// A Verifier verifies the certificates of logins to one bastion.
type Verifier struct {
	// Fleet are the public keys of the fleet's certificate authority: one, or several
	// while the key is rotated.
	Fleet []ssh.PublicKey
	// Principal is this bastion's name. It must not be empty.
	Principal string
	// Now returns the time; nil means time.Now.
	Now func() time.Time
}

// Verify checks that key is a certificate for a login to this bastion, and returns the
// identity in it. The identity's Key is not set. A certificate with a source-address
// option is rejected, as with every critical option that a bastion does not enforce.
//
// The caller must verify that the client has signed with key.
func (v Verifier) Verify(key ssh.PublicKey) (identity.Identity, error) {
	cert, err := v.check(key, criticalOptions)
	if err != nil {
		return identity.Identity{}, err
	}
	return read(cert)
}

// check verifies a certificate of the fleet for v.Principal, whose critical options are
// all among supported.
func (v Verifier) check(key ssh.PublicKey, supported []string) (*ssh.Certificate, error) {
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, errors.New("a plain key, not a certificate of the fleet")
	}
	if cert.CertType != ssh.UserCert {
		return nil, errors.New("a host certificate, not a user certificate")
	}
	if v.Principal == "" || len(cert.ValidPrincipals) == 0 {
		return nil, errors.New("a certificate without principals")
	}
	if !slices.ContainsFunc(v.Fleet, func(k ssh.PublicKey) bool { return bytes.Equal(cert.SignatureKey.Marshal(), k.Marshal()) }) {
		return nil, errors.New("a certificate that the fleet key has not signed")
	}
	checker := ssh.CertChecker{SupportedCriticalOptions: supported, Clock: v.Now}
	if err := checker.CheckCert(v.Principal, cert); err != nil {
		return nil, err
	}
	return cert, nil
}

// parseKeyID reads a key id of the form USER/CONNECTION.
func parseKeyID(text string) (user, conn string, err error) {
	user, conn, ok := strings.Cut(text, "/")
	if !ok || user == "" {
		return "", "", fmt.Errorf("the key id %q is not USER/CONNECTION", text)
	}
	return user, conn, nil
}

func read(cert *ssh.Certificate) (identity.Identity, error) {
	user, conn, err := parseKeyID(cert.KeyId)
	if err != nil {
		return identity.Identity{}, err
	}
	has := func(name string) bool { _, ok := cert.Extensions[name]; return ok }
	denied := func(name string) bool { _, ok := cert.CriticalOptions[name]; return ok }
	list := func(name string) []string {
		if s, ok := cert.CriticalOptions[name]; ok && s == "" {
			return []string{"none"} // an empty list permits nothing
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
		return client, server, fmt.Errorf("%s: %q does not have four fields", extConnection, s)
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
