package config

import (
	"errors"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Auth are the settings of authentication, without AuthorizedKeysDir; see package
// auth.
type Auth struct {
	// TOTPDir holds the secrets of users from whom a verification code is required;
	// see auth.TOTP. Default none.
	TOTPDir string
	// TOTPRequired, in the file "totp: required", rejects users without a secret in
	// TOTPDir, which must be set. Default "totp: optional".
	TOTPRequired bool
	// SelfServiceKeys lets users add keys of their own on the console. Default
	// false.
	SelfServiceKeys bool
	// TrustedUserCAKeys (in the file: trusted_user_ca_keys) are paths of files of
	// public keys: the authorities whose certificates log users in. One or a list;
	// they must exist. Default none.
	TrustedUserCAKeys []string
	// AuthorizedPrincipalsDir holds a file for each user with the principals that
	// may log in as her. It must exist. Empty, the default, means that only her own
	// name is a principal.
	AuthorizedPrincipalsDir string
	// RevokedKeys is the path of a list of keys, or of a key revocation list,
	// that must exist. In the file "none" is no list. Default none.
	RevokedKeys string

	// AuthorizedKeysCommand is a program with an absolute path, and its
	// arguments: a list, or a line in which blanks separate them and quotes
	// hold them together. AuthorizedKeysCommandUser is the account it runs
	// as; required with it. Default none.
	AuthorizedKeysCommand     []string
	AuthorizedKeysCommandUser string
	// AuthorizedKeysURL is the URL of the keys of users that have a file in
	// AuthorizedKeysDir, with %u for the name. Default none.
	AuthorizedKeysURL string
	// AuthorizedKeysTimeout is the timeout of these two, and AuthorizedKeysCache the
	// time for which their answers are cached. At least 1s, and at most 1m and 1h;
	// default 10s and 60s.
	AuthorizedKeysTimeout, AuthorizedKeysCache time.Duration
	// AuthorizedKeysStale is the time for which a cached answer of the URL is used
	// while requests fail. At least AuthorizedKeysCache, at most 24h; default 10m.
	AuthorizedKeysStale time.Duration
}

func defaultAuth() Auth {
	return Auth{
		AuthorizedKeysTimeout: 10 * time.Second,
		AuthorizedKeysCache:   time.Minute,
		AuthorizedKeysStale:   10 * time.Minute,
	}
}

// checkAuth reports settings that contradict each other. v is the whole file.
func (v value) checkAuth(a *Auth) {
	if len(a.AuthorizedKeysCommand) > 0 && a.AuthorizedKeysCommandUser == "" {
		v.add(v.lineOf("authorized_keys_command"), "authorized_keys_command: needs authorized_keys_command_user, the account to run it as; use one that has no other purpose")
	}
	if len(a.AuthorizedKeysCommand) == 0 && a.AuthorizedKeysCommandUser != "" {
		v.add(v.lineOf("authorized_keys_command_user"), "authorized_keys_command_user: there is no authorized_keys_command")
	}
	if a.TOTPRequired && a.TOTPDir == "" {
		v.add(v.lineOf("totp"), "totp: required needs totp_dir, the folder of the users' secrets")
	}
	if a.AuthorizedPrincipalsDir != "" && len(a.TrustedUserCAKeys) == 0 {
		v.add(v.lineOf("authorized_principals_dir"), "authorized_principals_dir: does nothing without trusted_user_ca_keys")
	}
	if a.AuthorizedKeysStale < a.AuthorizedKeysCache && a.AuthorizedKeysStale > 0 {
		line := v.lineOf("authorized_keys_stale")
		if line == 0 { // it is the default that is shorter
			line = v.lineOf("authorized_keys_cache")
		}
		v.add(line, "authorized_keys_stale: %v is shorter than authorized_keys_cache, %v", a.AuthorizedKeysStale, a.AuthorizedKeysCache)
	}
}

func (v value) durationUpTo(most time.Duration) time.Duration {
	d := v.duration(time.Second)
	if d > most {
		v.mistake("%v is too long; the most is %v", d, most)
	}
	return d
}

func (v value) files() []string {
	var paths []string
	for _, v := range v.list() {
		paths = append(paths, v.file())
	}
	return paths
}

func (v value) fileOrNone() string {
	if v.is("none") {
		return ""
	}
	return v.file()
}

// file reads the path of a regular file that exists, or the reference of a text.
func (v value) file() string {
	if p, ok := v.copyOf(false, false); ok {
		return p
	}
	p := v.path()
	if p == "" {
		return ""
	}
	switch info, err := os.Stat(p); {
	case err != nil:
		v.mistake("%s: %v", p, reason(err))
	case !info.Mode().IsRegular():
		v.mistake("%s: not a regular file", p)
	}
	return p
}

// keysCommand reads a command and checks the tokens in it.
func (v value) keysCommand() []string {
	if v.is("none") {
		return nil
	}
	items := v.list()
	var args []string
	for _, item := range items {
		s, ok := item.text()
		if !ok {
			return nil
		}
		args = append(args, s)
	}
	if len(items) == 1 {
		var err error
		if args, err = splitArgs(args[0]); err != nil {
			v.mistake("%v", err)
			return nil
		}
	}
	if len(args) == 0 {
		v.mistake("the command is empty")
		return nil
	}
	if !filepath.IsAbs(args[0]) {
		v.mistake("%q is not an absolute path", args[0])
	}
	for _, arg := range args[1:] {
		for i := 0; i < len(arg); i++ {
			if arg[i] != '%' {
				continue
			}
			if i++; i == len(arg) || !strings.ContainsRune("%utkf", rune(arg[i])) {
				v.mistake("%q: after %% there can be u (user), t (type of key), k (key), f (fingerprint) or another %%; a gateway's users have no home, uid or routing domain", arg)
				break
			}
		}
	}
	return args
}

// splitArgs splits a line as sshd does: at blanks outside single and double quotes.
// A backslash escapes a quote, a backslash or, outside quotes, a blank; any other
// backslash is literal.
func splitArgs(line string) ([]string, error) {
	var args []string
	var arg strings.Builder
	quote, inArg := byte(0), false
	for i := 0; i < len(line); i++ {
		c := line[i]
		blank := c == ' ' || c == '\t'
		switch {
		case c == '\\' && i+1 < len(line) && (strings.IndexByte(`\"'`, line[i+1]) >= 0 || quote == 0 && line[i+1] == ' '):
			i++
			arg.WriteByte(line[i])
			inArg = true
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '"' || c == '\''):
			quote, inArg = c, true
		case quote == 0 && blank:
			if inArg {
				args = append(args, arg.String())
				arg.Reset()
				inArg = false
			}
		default:
			arg.WriteByte(c)
			inArg = true
		}
	}
	if quote != 0 {
		return nil, errors.New("a quote is not closed")
	}
	if inArg {
		args = append(args, arg.String())
	}
	return args, nil
}

// keysURL reads a URL with %u in it. No mistake repeats it: it may hold a token.
func (v value) keysURL() string {
	s, ok := v.text()
	if !ok || s == "none" {
		return ""
	}
	scheme, rest, _ := strings.Cut(s, "://")
	host, path := rest, ""
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		host, path = rest[:i], rest[i:]
	}
	u, err := url.Parse(scheme + "://" + host + strings.ReplaceAll(path, "%u", "u"))
	switch {
	case err != nil || host == "" || strings.Contains(host, "%"):
		v.mistake("not a URL; write it like https://github.com/%%u.keys")
	case u.User != nil:
		v.mistake("has a user or password in front of the host; this file must not contain any")
	case u.Scheme != "https" && (u.Scheme != "http" || !isLoopback(u.Hostname())):
		v.mistake("must begin with https://: with http:// an attacker on the network can add keys (http:// is permitted for this machine)")
	case strings.Contains(path, "#"):
		v.mistake("has a fragment, the part behind #, which no server is told")
	case !strings.Contains(path, "%u"):
		v.mistake("has no %%u for the user's name in its path or query, so all users would have the same keys")
	}
	return s
}

func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}
