package auth

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// whatCA and whatPrincipals name the files in messages.
const (
	whatCA         = "trusted user CA keys"
	whatPrincipals = "authorized principals"
)

// parseCAKeys parses a file of authorities: public keys, one a line. The text
// is the line of each key, by its wire format.
func parseCAKeys(path string, data []byte) (map[string]int, []error, error) {
	keys := make(map[string]int)
	var problems []error
	n := 0
	for line := range bytes.SplitSeq(data, []byte("\n")) {
		n++
		e, err := parseLine(string(line), time.Local)
		if typ, _ := cutField(strings.Trim(string(line), " \t\r")); err == nil && e.key != nil && !isKeyType(typ) {
			err = errors.New("options are not for this file; write cert-authority and the key into a user's authorized keys")
		}
		switch {
		case err != nil:
			problems = append(problems, fmt.Errorf("%s:%d: %w", path, n, err))
		case e.key != nil:
			if ca := e.key.Marshal(); keys[string(ca)] == 0 {
				keys[string(ca)] = n
			}
		}
	}
	return keys, problems, nil
}

// byTrustedCA asks TrustedUserCAKeys and AuthorizedPrincipalsDir. known says
// whether the certificate's authority is among the former.
func (k *Keys) byTrustedCA(a *attempt) (g Grant, known bool, err error) {
	at := ""
	ca := a.cert.SignatureKey.Marshal()
	for _, path := range k.TrustedUserCAKeys {
		d, readErr := sharedFile(k, &k.cas, path, whatCA, maxFile, parseCAKeys)
		if readErr != nil {
			err = readErr
		} else if line := d.text[string(ca)]; line != 0 {
			at = fmt.Sprintf("%s:%d", filepath.Base(path), line)
			break
		}
	}
	if at == "" {
		return Grant{}, false, err
	}
	if k.AuthorizedPrincipalsDir == "" {
		g, err = a.byCertificate(nil, nil)
	} else {
		var line string
		g, line, err = k.byPrincipals(a)
		at += ", principals " + line
	}
	if err != nil {
		return Grant{}, true, fmt.Errorf("certificate of %s: %w", at, err)
	}
	g.RolePrincipals = g.Principals
	g.Source, g.Line = sourceCA, sourceCA+" "+at
	return g, true, nil
}

// byPrincipals has the first line of the user's principals that the certificate
// names decide, as with sshd.
func (k *Keys) byPrincipals(a *attempt) (g Grant, at string, err error) {
	for tries := 0; ; tries++ {
		d, err := userFile(k, &k.principals, k.AuthorizedPrincipalsDir, whatPrincipals, a.user, parsePrincipals)
		if err != nil {
			return Grant{}, a.user, err
		}
		err = fmt.Errorf("none of its principals may log in as %s", a.user)
		if d == nil {
			return Grant{}, a.user, err
		}
		for _, l := range d.text {
			if !slices.Contains(a.cert.ValidPrincipals, l.principal) {
				continue
			}
			if g, err = a.byCertificate(&l.options, []string{l.principal}); err == nil {
				return g, fmt.Sprintf("%s:%d", a.user, l.line), nil
			}
			break
		}
		if !d.halfWritten() || tries == 3 {
			return Grant{}, a.user, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// A principalLine is one line of AuthorizedPrincipalsFile.
type principalLine struct {
	principal string
	line      int
	options
}

// parsePrincipals parses AuthorizedPrincipalsFile of sshd_config(5): a principal
// a line, behind the options of authorized_keys if there are any.
func parsePrincipals(path string, data []byte) ([]principalLine, []error, error) {
	var lines []principalLine
	var problems []error
	n := 0
	for text := range bytes.SplitSeq(data, []byte("\n")) {
		n++
		l, err := parsePrincipal(string(text), time.Local)
		switch {
		case err != nil:
			problems = append(problems, fmt.Errorf("%s:%d: %w", path, n, err))
		case l.principal != "":
			l.line = n
			lines = append(lines, l)
		}
	}
	return lines, problems, nil
}

// parsePrincipal parses one line; that of an empty line or a comment has no
// principal. As with sshd a comment may stand behind one too, and so there is no
// # in an option.
func parsePrincipal(text string, loc *time.Location) (principalLine, error) {
	switch {
	case len(text) > maxLine:
		return principalLine{}, fmt.Errorf("longer than %d bytes", maxLine)
	case strings.Contains(text, "\x00"):
		return principalLine{}, errors.New("contains a NUL byte")
	}
	text, _, _ = strings.Cut(text, "#")
	text = strings.Trim(text, " \t\r")
	l := principalLine{principal: text, options: options{permissions: identity.AllowAll()}}
	if i := strings.LastIndexAny(text, " \t"); i >= 0 {
		o, rest, err := parseOptions(text, loc)
		if err != nil {
			return principalLine{}, err
		}
		if rest != text[i+1:] {
			return principalLine{}, fmt.Errorf("%s is not one principal behind options", quote(rest))
		}
		if o.authority {
			return principalLine{}, errors.New(`option "cert-authority": belongs to keys, not to principals`)
		}
		l = principalLine{principal: rest, options: o}
	}
	if strings.Contains(l.principal, `"`) {
		return principalLine{}, errors.New("a quote in the name of a principal; mind that # begins a comment even between quotes")
	}
	return l, nil
}

// byCertificate says what the certificate permits, restricted by the options of
// the line that trusts it; nil is a line that restricts nothing. principals are
// those that may log in, one of which the certificate must name; nil means the
// user's own name. Roles may go by no other principals either.
//
// Where certificate and line say different things, the stricter counts.
func (a *attempt) byCertificate(o *options, principals []string) (Grant, error) {
	if principals == nil {
		principals = []string{a.user}
	}
	cert := a.cert
	mine := slices.DeleteFunc(slices.Clone(cert.ValidPrincipals), func(p string) bool { return !slices.Contains(principals, p) })
	switch {
	case len(cert.ValidPrincipals) == 0:
		// Package ssh, and sshd in some places, takes it for everybody's.
		return Grant{}, errors.New("the certificate names no principals")
	case len(mine) == 0:
		return Grant{}, fmt.Errorf("none of the certificate's principals, %s, may log in as %s", quote(strings.Join(cert.ValidPrincipals, ",")), a.user)
	}
	until, err := a.valid()
	if err != nil {
		return Grant{}, err
	}
	g := Grant{
		Expires:    until,
		CertKeyID:  cert.KeyId,
		CertSerial: cert.Serial,
		CAKey:      ssh.FingerprintSHA256(cert.SignatureKey),
		Principals: slices.Clone(cert.ValidPrincipals),
	}
	g.RolePrincipals = mine
	if err := a.certOptions(&g); err != nil {
		return Grant{}, err
	}
	if o != nil {
		if err := a.restrict(&g, o); err != nil {
			return Grant{}, err
		}
	}
	return g, nil
}

// caSignatures are the algorithms a certificate may be signed with: those of
// CASignatureAlgorithms of sshd_config(5), which leaves SHA-1 out.
var caSignatures = []string{
	ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512,
}

// signed checks the signature of the certificate, and nothing else.
func (a *attempt) signed() error {
	cert := a.cert
	if cert.Signature == nil || !slices.Contains(caSignatures, cert.Signature.Format) {
		return errors.New("the certificate is signed with an algorithm that is not accepted")
	}
	// CheckCert is the only way to that check. The rest of what it does is
	// done by us, with better reasons, so let it find nothing: no principals
	// is as good as all to it, and it looks at the clock only once.
	checker := ssh.CertChecker{Clock: func() time.Time { return time.Unix(int64(min(cert.ValidAfter, math.MaxInt64)), 0) }}
	for name := range cert.CriticalOptions {
		checker.SupportedCriticalOptions = append(checker.SupportedCriticalOptions, name)
	}
	principal := ""
	if len(cert.ValidPrincipals) > 0 {
		principal = cert.ValidPrincipals[0]
	}
	if checker.CheckCert(principal, cert) != nil {
		return errors.New("the certificate's signature is wrong, or it is never valid")
	}
	return nil
}

// valid says until when the certificate is; zero means for ever.
func (a *attempt) valid() (time.Time, error) {
	const most = math.MaxInt64 / 4 // far from where package time overflows
	cert := a.cert
	if cert.ValidAfter > most || a.now.Before(time.Unix(int64(cert.ValidAfter), 0)) {
		return time.Time{}, errors.New("the certificate is not yet valid")
	}
	if cert.ValidBefore == ssh.CertTimeInfinity {
		return time.Time{}, nil
	}
	if cert.ValidBefore > most {
		return time.Time{}, errors.New("the certificate's end is not a possible time")
	}
	until := time.Unix(int64(cert.ValidBefore), 0)
	if !a.now.Before(until) {
		return time.Time{}, fmt.Errorf("the certificate %w at %s", ErrExpired, until.UTC().Format(time.RFC3339))
	}
	return until, nil
}

// certOptions adds what the certificate itself permits and demands: OpenSSH
// PROTOCOL.certkeys, critical options and extensions.
func (a *attempt) certOptions(g *Grant) error {
	for name, value := range a.cert.CriticalOptions {
		switch name {
		case "force-command":
			if value == "" {
				return errors.New("the certificate forces an empty command")
			}
			g.ForceCommand = value
		case "source-address":
			ok, err := fromNetworks(value, a.from)
			if err != nil {
				return fmt.Errorf("the certificate's source-address: %w", err)
			}
			if !ok {
				return fmt.Errorf("the certificate may not be used from %v", a.from)
			}
		case "verify-required":
			return errors.New("the certificate has verify-required, which cannot be enforced: whether a FIDO key verified its user is not known here")
		default:
			return fmt.Errorf("the certificate has the critical option %s, which is not known here", quote(name))
		}
	}
	for name, value := range a.cert.Extensions {
		switch name {
		case "permit-pty":
			g.PTY = true
		case "permit-port-forwarding":
			g.PortForwarding = true
		case "permit-agent-forwarding":
			g.AgentForwarding = true
		case "permit-X11-forwarding":
			g.X11Forwarding = true
		case "permit-user-rc":
			g.UserRC = true
		case "no-touch-required":
			g.NoTouchRequired = true
		default:
			continue // what is not known is not permitted
		}
		if value != "" {
			return fmt.Errorf("the certificate's extension %s has a value", name)
		}
	}
	return nil
}

// fromNetworks says whether addr is in a list of networks and addresses.
func fromNetworks(list string, addr netip.Addr) (bool, error) {
	addr = addr.Unmap().WithZone("")
	in := false
	for s := range strings.SplitSeq(list, ",") {
		network, err := parseNetwork(s)
		if err != nil {
			return false, err
		}
		if !network.IsValid() {
			return false, fmt.Errorf("%s is neither an address nor a network", quote(s))
		}
		in = in || network.Contains(addr)
	}
	return in, nil
}

// restrict takes away what the options of the line do not permit.
func (a *attempt) restrict(g *Grant, o *options) error {
	line, err := o.grant(a)
	if err != nil {
		return err
	}
	p := &g.Permissions
	p.PTY = p.PTY && line.PTY
	p.PortForwarding = p.PortForwarding && line.PortForwarding
	p.AgentForwarding = p.AgentForwarding && line.AgentForwarding
	p.X11Forwarding = p.X11Forwarding && line.X11Forwarding
	p.UserRC = p.UserRC && line.UserRC
	p.PermitOpen, p.PermitListen, p.Environment = line.PermitOpen, line.PermitListen, line.Environment
	switch {
	case p.ForceCommand == "":
		p.ForceCommand = line.ForceCommand
	case line.ForceCommand != "" && line.ForceCommand != p.ForceCommand:
		return errors.New("the certificate and the line force different commands")
	}
	if g.Expires.IsZero() || !line.Expires.IsZero() && line.Expires.Before(g.Expires) {
		g.Expires = line.Expires
	}
	// Package ssh waives the touch if the certificate alone says so, and
	// cannot be kept from it.
	if g.NoTouchRequired && !line.NoTouchRequired && strings.HasPrefix(a.cert.Key.Type(), "sk-") {
		return errors.New("the certificate waives the touch of its FIDO key and the line that trusts it does not, which cannot be enforced here; add no-touch-required to the line, or make the certificate without")
	}
	g.NoTouchRequired = g.NoTouchRequired && line.NoTouchRequired
	return nil
}
