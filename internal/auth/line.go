package auth

import (
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// An entry is a line of authorized keys: a key, and the options before it.
type entry struct {
	key  ssh.PublicKey // nil for a line without one
	line int
	options
}

// parseLine parses a line of authorized_keys. For an empty line or a comment the
// entry has no key. Times without a zone are in loc.
//
// [ssh.ParseAuthorizedKey] is not used, because it skips a line that it cannot parse
// without an error.
func parseLine(line string, loc *time.Location) (entry, error) {
	switch {
	case len(line) > maxLine:
		return entry{}, fmt.Errorf("longer than %d bytes", maxLine)
	case strings.Contains(line, "\x00"):
		return entry{}, errors.New("contains a NUL byte")
	}
	line = strings.Trim(line, " \t\r")
	if line == "" || line[0] == '#' {
		return entry{}, nil
	}
	if strings.HasPrefix(line, "-----BEGIN ") && strings.Contains(line, "PRIVATE KEY") {
		return entry{}, errors.New("a private key; write the public key, the file that ends in .pub, and replace the key if others may have read it")
	}
	e := entry{options: options{permissions: identity.AllowAll()}}
	typ, rest := cutField(line)
	if !isKeyType(typ) {
		var err error
		e.options, rest, err = parseOptions(line, loc)
		if err != nil {
			return entry{}, err
		}
		typ, rest = cutField(rest)
	}
	blob, _ := cutField(rest) // the comment is the operator's
	key, err := parseKey(typ, blob)
	if err != nil {
		return entry{}, err
	}
	e.key = key
	return e, nil
}

// cutField cuts s after its first field, and drops the blanks that follow.
func cutField(s string) (field, rest string) {
	if i := strings.IndexAny(s, " \t"); i >= 0 {
		return s[:i], strings.TrimLeft(s[i:], " \t")
	}
	return s, ""
}

// isKeyType distinguishes a key type from options: no option has such a prefix.
func isKeyType(s string) bool {
	return strings.HasPrefix(s, "ssh-") || strings.HasPrefix(s, "ecdsa-sha2-") || strings.HasPrefix(s, "sk-") || strings.HasPrefix(s, "webauthn-sk-")
}

func parseKey(typ, blob string) (ssh.PublicKey, error) {
	switch typ {
	case "":
		return nil, errors.New("no key after the options")
	case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
		ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoRSA:
	case "ssh-dss":
		return nil, errors.New("DSA keys are not accepted: they are too weak")
	default:
		if strings.HasSuffix(typ, "-cert-v01@openssh.com") {
			return nil, errors.New("a certificate is not accepted as a key; write the plain public key")
		}
		return nil, fmt.Errorf("%s is not an accepted type of key", quote(typ))
	}
	if blob == "" {
		return nil, fmt.Errorf("nothing after %s", typ)
	}
	wire, err := base64.StdEncoding.DecodeString(blob)
	if err != nil {
		return nil, fmt.Errorf("the %s key is truncated or corrupt: %w", typ, err)
	}
	key, err := ssh.ParsePublicKey(wire)
	if err != nil {
		return nil, fmt.Errorf("the %s key is truncated or corrupt: %w", typ, err)
	}
	if key.Type() != typ {
		return nil, fmt.Errorf("the line says %s, but the key in it is of type %s", typ, quote(key.Type()))
	}
	if err := checkKey(key); err != nil {
		return nil, err
	}
	return key, nil
}

// checkKey refuses keys that are too weak, or too expensive to verify with.
func checkKey(key ssh.PublicKey) error {
	if key, ok := key.(ssh.CryptoPublicKey); ok {
		if key, ok := key.CryptoPublicKey().(*rsa.PublicKey); ok {
			// A shorter modulus can be factored. A signature of a longer one
			// takes too long to verify for an unauthenticated client.
			if n := key.N.BitLen(); n < 2048 || n > 8192 {
				return fmt.Errorf("RSA keys of %d bits are not accepted, only 2048 to 8192", n)
			}
		}
	}
	return nil
}

// options are the options before a key.
type options struct {
	permissions identity.Permissions
	noTouch     bool      // no-touch-required
	verify      bool      // verify-required
	expires     time.Time // zero: never
	from        patterns  // nil: from any address
	authority   bool      // cert-authority: the key signs certificates, and cannot log in
	principals  []string  // of those certificates; nil: the user's name
}

// parseOptions parses the options at the start of line, up to the first blank outside
// quotes. rest is the text after the blanks.
//
// The grammar is that of sshd: keywords in upper or lower case, separated by commas;
// a value in double quotes directly after "="; \" is the only escape, any other
// backslash is literal. Later options override earlier ones, so "restrict,pty"
// permits a terminal and "pty,restrict" does not.
func parseOptions(line string, loc *time.Location) (o options, rest string, err error) {
	p := optionParser{loc: loc}
	p.permissions = identity.AllowAll()
	for {
		end := strings.IndexAny(line, ",= \t\"")
		if end < 0 {
			end = len(line)
		}
		name := line[:end]
		line = line[end:]
		switch {
		case name == "":
			return options{}, "", errors.New("an option is empty: a comma too many, or a blank outside quotes")
		case strings.HasPrefix(line, "="):
			var value string
			if value, line, err = unquote(line[1:]); err != nil {
				return options{}, "", fmt.Errorf("option %s: %w", quoteOption(name), err)
			}
			err = p.value(strings.ToLower(name), value)
		default:
			err = p.flag(strings.ToLower(name))
		}
		if err != nil {
			return options{}, "", fmt.Errorf("option %s: %w", quoteOption(name), err)
		}
		switch {
		case line == "", line[0] == ' ', line[0] == '\t':
			if p.principals != nil && !p.authority {
				return options{}, "", errors.New(`option "principals": restricts nothing without cert-authority; the line is refused`)
			}
			return p.options, strings.TrimLeft(line, " \t"), nil
		case line[0] == ',':
			line = line[1:]
		default:
			return options{}, "", fmt.Errorf("option %s: a comma or a blank must follow it", quoteOption(name))
		}
	}
}

// unquote parses a value in double quotes. rest is the text after it.
func unquote(s string) (value, rest string, err error) {
	if !strings.HasPrefix(s, `"`) {
		return "", "", errors.New(`its value must stand in double quotes`)
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return b.String(), s[i+1:], nil
		case s[i] == '\\' && i+1 < len(s) && s[i+1] == '"':
			i++
		}
		b.WriteByte(s[i])
	}
	return "", "", errors.New("its closing quote is missing")
}

// quote quotes untrusted text for an error, and limits its length.
func quote(s string) string {
	const most = 64
	if len(s) > most {
		return fmt.Sprintf("%q...", s[:most])
	}
	return fmt.Sprintf("%q", s)
}

// quoteOption quotes the name of an option for an error. A longer word than any option is not
// quoted, because it may be a line of a private key.
func quoteOption(name string) string {
	const most = 24
	if len(name) > most {
		return fmt.Sprintf("of %d characters", len(name))
	}
	return quote(name)
}

type optionParser struct {
	options
	loc  *time.Location
	seen []string // options that may be given only once
	envs []string // names of the variables so far
}

var errUnknown = errors.New("unknown; the line is refused")

// flag parses an option without a value. name is in lower case.
func (p *optionParser) flag(name string) error {
	word, negated := strings.CutPrefix(name, "no-")
	on := !negated
	switch word {
	case "pty":
		p.permissions.PTY = on
	case "port-forwarding":
		p.permissions.PortForwarding = on
	case "agent-forwarding":
		p.permissions.AgentForwarding = on
	case "x11-forwarding":
		p.permissions.X11Forwarding = on
	case "user-rc":
		p.permissions.UserRC = on
	case "touch-required":
		p.noTouch = negated
	case "verify-required":
		p.verify = on
	case "restrict":
		if negated {
			return errUnknown
		}
		p.permissions.PTY = false
		p.permissions.PortForwarding = false
		p.permissions.AgentForwarding = false
		p.permissions.X11Forwarding = false
		p.permissions.UserRC = false
	case "cert-authority":
		if negated {
			return errUnknown
		}
		p.authority = true
	case "command", "from", "expiry-time", "environment", "permitopen", "permitlisten", "principals", "tunnel":
		if negated {
			return errUnknown
		}
		return errors.New(`needs a value, as in ` + word + `="..."`)
	default:
		return errUnknown
	}
	return nil
}

// value parses an option with a value. name is in lower case. No error repeats a
// command or an environment variable, because they may contain secrets.
func (p *optionParser) value(name, value string) error {
	switch name {
	case "command":
		if err := p.once(name); err != nil {
			return err
		}
		if value == "" {
			return errors.New("an empty command forces nothing; write the command, or leave the option out")
		}
		p.permissions.ForceCommand = value
	case "from":
		if err := p.once(name); err != nil {
			return err
		}
		from, err := parsePatterns(value)
		if err != nil {
			return err
		}
		p.from = from
	case "expiry-time":
		t, err := parseTime(value, p.loc)
		if err != nil {
			return err
		}
		if p.expires.IsZero() || t.Before(p.expires) {
			p.expires = t
		}
	case "environment":
		return p.setenv(value)
	case "permitopen":
		spec, err := parsePermit(value, false)
		if err != nil {
			return err
		}
		p.permissions.PermitOpen = append(p.permissions.PermitOpen, spec)
	case "permitlisten":
		spec, err := parsePermit(value, true)
		if err != nil {
			return err
		}
		p.permissions.PermitListen = append(p.permissions.PermitListen, spec)
	case "principals":
		if err := p.once(name); err != nil {
			return err
		}
		for principal := range strings.SplitSeq(value, ",") {
			if principal == "" {
				return errors.New("a principal is empty")
			}
			p.principals = append(p.principals, principal)
		}
	case "tunnel":
		return errors.New("tunnel devices are not supported; the line is refused")
	default:
		if p.flag(name) == nil {
			return errors.New("takes no value")
		}
		return errUnknown
	}
	return nil
}

func (p *optionParser) once(name string) error {
	if slices.Contains(p.seen, name) {
		return errors.New("given more than once")
	}
	p.seen = append(p.seen, name)
	return nil
}

// setenv adds a variable. As with sshd, the first one of a name counts. There is no
// list of permitted names as in PermitUserEnvironment, because the file belongs to
// the operator, not to the user.
func (p *optionParser) setenv(s string) error {
	name, _, ok := strings.Cut(s, "=")
	if !ok || name == "" {
		return errors.New("must have the form NAME=value")
	}
	for _, c := range []byte(name) {
		if !isAlnum(c) && c != '_' {
			return errors.New("a variable's name is made of letters, digits and underscores")
		}
	}
	if slices.Contains(p.envs, name) {
		return nil
	}
	p.envs = append(p.envs, name)
	p.permissions.Environment = append(p.permissions.Environment, s)
	return nil
}

func isAlnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// parseTime parses YYYYMMDD[HHMM[SS]], in UTC if it ends in Z or UTC, and else in
// loc. As with sshd, years before 1970 are refused. So the result is never the zero
// time, which means no expiry.
func parseTime(s string, loc *time.Location) (time.Time, error) {
	digits := s
	upper := strings.ToUpper(s)
	for _, zone := range []string{"Z", "UTC"} {
		if strings.HasSuffix(upper, zone) {
			digits, loc = s[:len(s)-len(zone)], time.UTC
			break
		}
	}
	layout := "20060102150405"
	if n := len(digits); n == 8 || n == 12 || n == 14 {
		t, err := time.ParseInLocation(layout[:n], digits, loc)
		if err == nil && t.Year() >= 1970 {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%s is not a time; write YYYYMMDD, YYYYMMDDHHMM or YYYYMMDDHHMMSS, with a Z for UTC", quote(s))
}

// parsePermit parses a value of permitopen or permitlisten. It returns host:port, with
// brackets around the host only if it contains a colon, or the port alone. Only
// permitlisten may have a port alone (barePort).
func parsePermit(s string, barePort bool) (string, error) {
	host, port := "", s
	if strings.Contains(s, ":") || !barePort {
		var err error
		if host, port, err = net.SplitHostPort(s); err != nil || host == "" {
			return "", fmt.Errorf("%s is not host:port", quote(s))
		}
		// No comma: in the agent's certificate it separates entries.
		if len(host) > 1024 || strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r == 0x7f || strings.ContainsRune(`,/"\[]`, r) }) {
			return "", fmt.Errorf("%s is not a host", quote(host))
		}
	}
	if port != "*" {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return "", fmt.Errorf("%s is not a port; write 1 to 65535, or *", quote(port))
		}
		port = strconv.FormatUint(n, 10)
	}
	if host == "" {
		return port, nil
	}
	return net.JoinHostPort(host, port), nil
}
