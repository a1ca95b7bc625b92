package config

import (
	"errors"
	"net"
	"net/netip"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/ecstask"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

// maxDuration keeps sums of durations far from overflow.
const maxDuration = 10 * 365 * 24 * time.Hour

// duration reads a duration as Go or sshd write it: 90s, 1h30m, 1d, 2w3d, or a
// number of seconds.
func (v value) duration(least time.Duration) time.Duration {
	s, ok := v.text()
	if !ok {
		return 0
	}
	d, err := parseDuration(s)
	switch {
	case err != nil:
		v.mistake("%q is not a duration; write it like 15m", s)
		return 0
	case d < least:
		v.mistake("%q is too short; the least is %v", s, least)
		return 0
	case d > maxDuration:
		v.mistake("%q is too long; the most is 10 years", s)
		return 0
	}
	return d
}

// durationOrZero reads a duration of at least least, or 0.
func (v value) durationOrZero(least time.Duration) time.Duration {
	if s, ok := v.text(); ok {
		if d, err := parseDuration(s); err == nil && d == 0 {
			return 0
		}
	}
	return v.duration(least)
}

// taskProtection reads a duration that ECS accepts for the protection of a task.
func (v value) taskProtection() time.Duration {
	if v.is("none") {
		return 0
	}
	d := v.duration(ecstask.Shortest)
	if d > ecstask.Longest {
		v.mistake("%v is too long; the most is %v", d, ecstask.Longest)
	}
	return d
}

var longUnits = regexp.MustCompile(`^(?:(\d{1,5})w)?(?:(\d{1,5})d)?(.*)$`)

func parseDuration(s string) (time.Duration, error) {
	if n, err := strconv.ParseUint(s, 10, 32); err == nil {
		return time.Duration(n) * time.Second, nil
	}
	m := longUnits.FindStringSubmatch(s)
	if m == nil || s == "" {
		return 0, errors.New("not a duration")
	}
	weeks, _ := strconv.Atoi(m[1]) // digits or nothing
	days, _ := strconv.Atoi(m[2])
	d := time.Duration(7*weeks+days) * 24 * time.Hour
	if m[3] == "" {
		return d, nil
	}
	rest, err := time.ParseDuration(m[3])
	if err != nil || rest < 0 || strings.HasPrefix(m[3], "+") || strings.HasPrefix(m[3], "-") {
		return 0, errors.New("not a duration")
	}
	if sum := d + rest; sum >= d {
		return sum, nil
	}
	return 0, errors.New("too long")
}

func (v value) integer(least, most int) int {
	s, ok := v.text()
	if !ok {
		return 0
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < least || n > most {
		v.mistake("%q is not a whole number from %d to %d", s, least, most)
		return 0
	}
	return n
}

func (v value) integerOrNone() int {
	if v.is("none") {
		return 0
	}
	return v.integer(1, 1_000_000)
}

// maxStartups reads start:rate:full, or one number, as sshd does. Unquoted it is
// text, because YAML 1.2 has no numbers to the base of 60.
func (v value) maxStartups() gateway.Startups {
	s, ok := v.text()
	if !ok {
		return gateway.Startups{}
	}
	var m gateway.Startups
	parts := strings.Split(s, ":")
	numbers := make([]int, len(parts))
	for i, p := range parts {
		n, err := strconv.Atoi(p)
		if err != nil || n < 1 || n > 1_000_000 {
			v.mistake("%q is not start:rate:full; write it like 10:30:100, or as one number", s)
			return m
		}
		numbers[i] = n
	}
	switch len(numbers) {
	case 1:
		m = gateway.Startups{Start: numbers[0], Rate: 100, Full: numbers[0]}
	case 3:
		m = gateway.Startups{Start: numbers[0], Rate: numbers[1], Full: numbers[2]}
	default:
		v.mistake("%q is not start:rate:full; write it like 10:30:100, or as one number", s)
		return m
	}
	if m.Rate > 100 {
		v.mistake("%q: the rate is in percent, and %d is more than 100", s, m.Rate)
	}
	if m.Start > m.Full {
		v.mistake("%q: start (%d) is greater than full (%d)", s, m.Start, m.Full)
	}
	return m
}

// address reads host:port.
func (v value) address() string {
	s, ok := v.text()
	if !ok {
		return ""
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		if _, err := strconv.ParseUint(s, 10, 16); err == nil {
			v.mistake("%q is not an address; write it like :%s", s, s)
		} else {
			v.mistake("%q is not an address; write it like :2222, 10.0.0.1:22 or [::1]:22", s)
		}
		return s
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		v.mistake("%q: %q is not a port; write a number up to 65535", s, port)
	}
	if strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r == '/' || r == 0x7f }) {
		v.mistake("%q: %q is not a host", s, host)
	}
	return s
}

// reachableAddress reads the host:port at which others connect.
func (v value) reachableAddress() string {
	s := v.address()
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return s
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		v.mistake("%q names no host; write the address at which other gateways reach this one", s)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err == nil && n == 0 {
		v.mistake("%q names no port; write that of a listener", s)
	}
	return s
}

var (
	// ciphers, macs and kexes are those that package transport implements.
	ciphers = []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherAES256CTR, ssh.CipherAES192CTR, ssh.CipherAES128CTR}
	macs    = []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM, ssh.HMACSHA256, ssh.HMACSHA512}
	kexes   = []string{
		ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519, "curve25519-sha256@libssh.org",
		ssh.KeyExchangeECDHP256, ssh.KeyExchangeECDHP384, ssh.KeyExchangeECDHP521, ssh.KeyExchangeDH14SHA256,
	}
	// defaultCiphers and defaultKexes are those that package gateway offers to every
	// client by default.
	defaultCiphers = ciphers[:2]
	defaultKexes   = []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519}
)

// algorithms reads a YAML list, or a list in the syntax of sshd_config(5): with
// commas, and +, ^ or - before the first name. essential are the algorithms of the
// smallest default, of which a list with - must leave one.
func (v value) algorithms(kind string, known, essential []string) []string {
	var names []string
	op := byte(0)
	for i, v := range v.list() {
		text, ok := v.text()
		if i == 0 && text != "" && strings.IndexByte("+^-", text[0]) >= 0 {
			op, text = text[0], text[1:]
		}
		for _, name := range strings.Split(text, ",") {
			matches := func(known string) bool {
				match, err := path.Match(name, known)
				return known == name || op == '-' && err == nil && match
			}
			switch {
			case !ok:
			case slices.Contains(names, name):
				v.mistake("%q is listed twice", name)
			case !slices.ContainsFunc(known, matches):
				v.mistake("%q is not a %s that is offered here; there are %s", name, kind, strings.Join(known, ", "))
			default:
				names = append(names, name)
			}
			essential = slices.DeleteFunc(slices.Clone(essential), func(known string) bool { return op == '-' && matches(known) })
		}
	}
	if len(essential) == 0 {
		v.mistake("leaves no %s to offer; list the algorithms to offer", kind)
	}
	if op != 0 && len(names) > 0 {
		names[0] = string(op) + names[0]
	}
	return names
}

// maxRekeyBytes is the most that AES may protect with one key (RFC 4344 section
// 3.2).
const maxRekeyBytes = 64 << 30

// rekeyLimit reads a number of bytes or "default", and then a duration or "none",
// which may be left out.
func (v value) rekeyLimit() (bytes uint64, interval time.Duration) {
	s, ok := v.text()
	if !ok {
		return 0, 0
	}
	fields := strings.Fields(s)
	if len(fields) == 0 || len(fields) > 2 {
		v.mistake("%q is not a limit for keys; write it like 1G, 1G 1h or default 1h", s)
		return 0, 0
	}
	if fields[0] != "default" {
		size, ok := parseSize(fields[0])
		if !ok || size < 16 || size > maxRekeyBytes {
			v.mistake("%q is not default or a size from 16 bytes to 64G", fields[0])
		}
		bytes = uint64(size)
	}
	if len(fields) == 2 && fields[1] != "none" {
		var err error
		if interval, err = parseDuration(fields[1]); err != nil || interval < time.Second || interval > maxDuration {
			v.mistake("%q is not none or a duration of at least 1s", fields[1])
		}
	}
	return bytes, interval
}

// versionAddendum reads the text after "SSH-2.0-OpenSSH_99_Sallyport ": printable
// ASCII, in a line of at most 255 bytes (RFC 4253, section 4.2).
func (v value) versionAddendum() string {
	s, ok := v.text()
	if !ok {
		return ""
	}
	if s == "none" {
		return ""
	}
	if len(s) > 128 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
		v.mistake("must be at most 128 printable ASCII characters")
	}
	return s
}

// banner reads the path of a text, and returns the text.
func (v value) banner() string {
	if v.is("none") {
		return ""
	}
	p := resolve(v.node).Value
	var text []byte
	if IsReference(p) {
		text, _ = v.secret(p, false)
	} else {
		if p = v.path(); p == "" {
			return ""
		}
		// It is sent in one packet, which clients limit to 256 KiB.
		var err error
		if text, _, err = readFile(p, 128<<10); err != nil {
			v.mistake("%s: %v", p, reason(err))
		}
	}
	if !utf8.Valid(text) { // RFC 4252, section 5.4
		v.mistake("%s: not UTF-8 text", p)
	}
	return string(text)
}

// join makes p absolute.
func join(dir, p string) string {
	if filepath.IsAbs(p) {
		return filepath.Clean(p)
	}
	return filepath.Join(dir, p)
}
