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

// parseCAKeys parses a file of authorities: public keys, one per line. The content
// has the line number of each key, by its wire format.
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

// byTrustedCA asks TrustedUserCAKeys and AuthorizedPrincipalsDir. known reports
// whether the certificate's authority is in TrustedUserCAKeys.
func (k *Keys) byTrustedCA(a *attempt) (g Grant, known bool, err error) {
	at := ""
	ca := a.cert.SignatureKey.Marshal()
	for _, path := range k.TrustedUserCAKeys {
		d, readErr := sharedFile(k, &k.cas, path, kindCA, maxFile, parseCAKeys)
		if readErr != nil {
			err = readErr
		} else if line := d.content[string(ca)]; line != 0 {
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

// byPrincipals asks the user's file in AuthorizedPrincipalsDir. As with sshd, the
// first line with a principal of the certificate decides.
func (k *Keys) byPrincipals(a *attempt) (g Grant, at string, err error) {
	for tries := 0; ; tries++ {
		d, err := userFile(k, &k.principals, k.AuthorizedPrincipalsDir, kindPrincipals, a.user, parsePrincipals)
		if err != nil {
			return Grant{}, a.user, err
		}
		err = fmt.Errorf("none of its principals may log in as %s", a.user)
		if d == nil {
			return Grant{}, a.user, err
		}
		for _, l := range d.content {
			if !slices.Contains(a.cert.ValidPrincipals, l.principal) {
				continue
			}
			if g, err = a.byCertificate(&l.options, []string{l.principal}); err == nil {
				return g, fmt.Sprintf("%s:%d", a.user, l.line), nil
			}
			break
		}
		if !d.halfWritten() || tries == halfWrittenRetries {
			return Grant{}, a.user, err
		}
		time.Sleep(halfWrittenDelay)
	}
}

// A principalLine is one line of AuthorizedPrincipalsFile.
type principalLine struct {
	principal string
	line      int
	options
}

// parsePrincipals parses AuthorizedPrincipalsFile of sshd_config(5): one principal
// per line, after the options of authorized_keys if there are any.
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

// parsePrincipal parses one line. For an empty line or a comment the principal is
// empty. As with sshd, a comment may also follow a principal, so an option cannot
// contain a #.
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
			return principalLine{}, fmt.Errorf("%s is not one principal after options", quote(rest))
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

// byCertificate returns the permissions of the certificate, restricted by the options
// of the line that trusts it; nil options do not restrict. The certificate must name
// one of the principals; nil principals mean the user's own name. RolePrincipals are
// those of the certificate that are among them.
//
// If certificate and line differ, the stricter one counts.
func (a *attempt) byCertificate(o *options, principals []string) (Grant, error) {
	if principals == nil {
		principals = []string{a.user}
	}
	cert := a.cert
	matching := slices.DeleteFunc(slices.Clone(cert.ValidPrincipals), func(p string) bool { return !slices.Contains(principals, p) })
	if len(matching) == 0 {
		return Grant{}, fmt.Errorf("none of the certificate's principals, %s, may log in as %s", quote(strings.Join(cert.ValidPrincipals, ",")), a.user)
	}
	until, err := a.checkValidity()
	if err != nil {
		return Grant{}, err
	}
	g := Grant{
		Expires:    until,
		CertKeyID:  cert.KeyId,
		CertSerial: cert.Serial,
		CAKey:      ssh.FingerprintSHA256(cert.SignatureKey),
		Principals: slices.Clone(cert.ValidPrincipals),

		RolePrincipals: matching,
	}
	if err := a.certOptions(&g); err != nil {
		return Grant{}, err
	}
	if o != nil {
		line, err := o.grant(a)
		if err != nil {
			return Grant{}, err
		}
		if err := g.intersect(line); err != nil {
			return Grant{}, fmt.Errorf("the certificate and the line %w", err)
		}
	}
	return g, nil
}

// caSignatures are the algorithms of accepted signatures of certificates: the
// defaults of CASignatureAlgorithms in sshd_config(5), without SHA-1.
var caSignatures = []string{
	ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512,
}

// checkCertSignature verifies the signature of the certificate, and nothing else.
func (a *attempt) checkCertSignature() error {
	cert := a.cert
	if cert.Signature == nil || !slices.Contains(caSignatures, cert.Signature.Format) {
		return errors.New("the certificate is signed with an algorithm that is not accepted")
	}
	// CheckCert is the only exported function that verifies the signature. Its
	// other checks are done elsewhere, with better errors, so they must succeed
	// here: any principal of the certificate is accepted, and the clock is set to
	// the beginning of its validity.
	named := slices.IndexFunc(cert.ValidPrincipals, func(p string) bool { return p != "" })
	if named < 0 {
		return errors.New("the certificate names no principals")
	}
	checker := ssh.CertChecker{Clock: func() time.Time { return time.Unix(int64(min(cert.ValidAfter, math.MaxInt64)), 0) }}
	for name := range cert.CriticalOptions {
		checker.SupportedCriticalOptions = append(checker.SupportedCriticalOptions, name)
	}
	if checker.CheckCert(cert.ValidPrincipals[named], cert) != nil {
		return errors.New("the certificate's signature is wrong, or it is never valid")
	}
	return nil
}

// checkValidity returns the end of the certificate's validity; zero means never. It
// is an error if the attempt is not within the validity.
func (a *attempt) checkValidity() (time.Time, error) {
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

// certOptions adds the certificate's critical options and extensions to g (OpenSSH's
// PROTOCOL.certkeys).
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
			g.VerifyRequired = true
		default:
			return fmt.Errorf("the certificate has the unknown critical option %s", quote(name))
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
			continue // unknown extensions permit nothing
		}
		if value != "" {
			return fmt.Errorf("the certificate's extension %s has a value", name)
		}
	}
	return nil
}

// fromNetworks reports whether addr is in a list of networks and addresses.
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
