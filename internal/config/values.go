package config

import (
	"crypto/rsa"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/ssh"
)

// maxDuration keeps sums of durations far from overflow.
const maxDuration = 10 * 365 * 24 * time.Hour

// duration reads what Go and sshd both call a duration: 90s, 1h30m, 1d, 2w3d,
// or a plain number of seconds.
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

// maxStartups reads start:rate:full, or one number, as sshd does. Unquoted it
// is still text: YAML 1.2 has no numbers to the base of 60.
func (v value) maxStartups() MaxStartups {
	s, ok := v.text()
	if !ok {
		return MaxStartups{}
	}
	var m MaxStartups
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
		m = MaxStartups{Start: numbers[0], Rate: 100, Full: numbers[0]}
	case 3:
		m = MaxStartups{Start: numbers[0], Rate: numbers[1], Full: numbers[2]}
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

var (
	// ciphers are those of package ssh without chacha20; see Defaults.
	ciphers = []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherAES256CTR, ssh.CipherAES192CTR, ssh.CipherAES128CTR}
	// macs are those of package ssh without SHA-1.
	macs = []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM, ssh.HMACSHA256, ssh.HMACSHA512}
)

func (v value) algorithms(kind string, known []string) []string {
	var names []string
	for _, v := range v.list() {
		switch name, ok := v.text(); {
		case !ok:
		case slices.Contains(names, name):
			v.mistake("%q is listed twice", name)
		case !slices.Contains(known, name):
			v.mistake("%q is not a %s that is offered here; there are %s", name, kind, strings.Join(known, ", "))
		default:
			names = append(names, name)
		}
	}
	return names
}

// versionAddendum reads what may follow "SSH-2.0-OpenSSH_Sallyport ". RFC 4253,
// section 4.2: printable ASCII, and the whole line at most 255 bytes.
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

// banner reads the text that the value is the path of.
func (v value) banner() string {
	if v.is("none") {
		return ""
	}
	p := v.path()
	if p == "" {
		return ""
	}
	// It goes out in one packet, of which clients take 256 KiB.
	text, _, err := readFile(p, 128<<10)
	switch {
	case err != nil:
		v.mistake("%s: %v", p, reason(err))
	case !utf8.Valid(text): // RFC 4252, section 5.4
		v.mistake("%s: not UTF-8 text", p)
	}
	return string(text)
}

// privateKey reads the private key that the value is the path of, and returns
// nil if it cannot be used. No mistake repeats anything out of the file.
func (v value) privateKey() ssh.Signer {
	p := v.path()
	if p == "" {
		return nil
	}
	data, info, err := readFile(p, 64<<10)
	if err != nil {
		v.mistake("%s: %v", p, reason(err))
		return nil
	}
	if err := checkMode(info); err != nil {
		v.mistake("%s: %v", p, err)
		return nil
	}
	key, err := parsePrivateKey(data)
	if err != nil {
		v.mistake("%s: %v", p, err)
		return nil
	}
	return key
}

// checkMode is what ssh asks of a private key: nobody but its owner may read
// it. One that belongs to somebody else may be shared with the gateway by a
// group, but not with everybody.
func checkMode(info os.FileInfo) error {
	forbidden := os.FileMode(0o007)
	if s, ok := info.Sys().(*syscall.Stat_t); ok && int(s.Uid) == os.Geteuid() {
		forbidden = 0o077
	}
	if mode := info.Mode().Perm(); mode&forbidden != 0 {
		return fmt.Errorf("mode %04o lets others at a private key; chmod 600 it", mode)
	}
	return nil
}

func parsePrivateKey(data []byte) (ssh.Signer, error) {
	key, err := ssh.ParsePrivateKey(data)
	if missing := (*ssh.PassphraseMissingError)(nil); errors.As(err, &missing) {
		return nil, errors.New("has a passphrase, which nobody is there to type; take it off with ssh-keygen -p")
	}
	if err != nil {
		if _, _, _, _, err := ssh.ParseAuthorizedKey(data); err == nil {
			return nil, errors.New("is a public key; name the private one, without .pub")
		}
		return nil, errors.New("is not a private key in a format that is known")
	}
	switch typ := key.PublicKey().Type(); typ {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		return key, nil
	case ssh.KeyAlgoRSA:
		public, ok := key.PublicKey().(ssh.CryptoPublicKey).CryptoPublicKey().(*rsa.PublicKey)
		if !ok || public.N.BitLen() < 2048 || public.N.BitLen() > 8192 {
			return nil, errors.New("is an RSA key that is not of 2048 to 8192 bits")
		}
		algorithms, ok := key.(ssh.AlgorithmSigner)
		if !ok {
			return nil, errors.New("cannot sign with SHA-2")
		}
		// Without this it would sign with SHA-1 too (RFC 8332).
		return ssh.NewSignerWithAlgorithms(algorithms, []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256})
	default:
		return nil, fmt.Errorf("is a key of type %s; use ed25519, ecdsa or rsa", typ)
	}
}

// join makes p absolute.
func join(dir, p string) string {
	if filepath.IsAbs(p) {
		return filepath.Clean(p)
	}
	return filepath.Join(dir, p)
}
