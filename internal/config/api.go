package config

import (
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/api"
)

// API are the settings of the HTTP API. Its certificate and key are written as tls, with
// paths of PEM files or references to them.
type API struct {
	// Listen is the "host:port" addresses to accept requests at; one or a list. Empty,
	// the default, means that there is no API. Port 0 takes any free port.
	Listen []string
	// PlainHTTP permits addresses other than those of this machine without TLS.
	PlainHTTP bool
	api.Options
}

// api reads the value of the key api.
func (v value) api(a *API) {
	var certificate, key *value
	seen := v.mapping(map[string]func(value){
		"listen": func(v value) { a.Listen = v.addresses() },
		"tls": func(v value) {
			v.mapping(map[string]func(value){
				"certificate": func(v value) { certificate = &v },
				"key":         func(v value) { key = &v },
			})
			if certificate == nil || key == nil {
				v.mistake("needs certificate and key, the paths of two PEM files")
				return
			}
			a.Certificate = certificate.certificate(*key)
		},
		"plain_http":     func(v value) { a.PlainHTTP = v.boolean() },
		"names":          func(v value) { a.Names = v.hostNames() },
		"ssh_address":    func(v value) { a.SSHAddress = v.reachableAddress() },
		"operator_token": func(v value) { a.OperatorToken = v.operatorToken() },
		"oidc":           func(v value) { v.oidc(&a.OIDC) },
	})
	switch {
	case !seen["listen"]:
		v.mistake("names no address; write listen: \":8443\", or leave api out")
	case seen["tls"]:
	case a.PlainHTTP && !seen["names"]:
		v.mistake("plain_http needs names, the host names by which clients call")
	case !a.PlainHTTP && slices.ContainsFunc(a.Listen, func(addr string) bool { return !isLoopbackAddress(addr) }):
		v.mistake("needs tls, with certificate and key, for addresses of other machines; plain_http: true permits them without, behind a proxy that ends TLS")
	}
}

// leastToken is the least length of an operator's token, in bytes.
const leastToken = 32

// operatorToken reads the file or secret with a token, and returns its hash.
func (v value) operatorToken() *[sha256.Size]byte {
	path, text, ok := v.fileOrSecret(true)
	if !ok {
		return nil
	}
	token := strings.TrimSpace(string(text))
	if len(token) < leastToken || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		v.mistake("%s: is not one line of at least %d printable characters; make one with openssl rand -hex 32", path, leastToken)
		return nil
	}
	return api.HashToken(token)
}

// oidc reads the value of the key oidc.
func (v value) oidc(o *api.OIDC) {
	text := func(to *string) func(value) { return func(v value) { *to, _ = v.text() } }
	seen := v.mapping(map[string]func(value){
		"issuer": func(v value) {
			o.Issuer, _ = v.text()
			u, err := url.Parse(o.Issuer)
			if err != nil || u.Host == "" || u.Scheme != "https" && (u.Scheme != "http" || !isLoopback(u.Hostname())) {
				v.mistake("%q is not a URL that begins with https://", o.Issuer)
			}
		},
		"audience":         text(&o.Audience),
		"user_claim":       text(&o.UserClaim),
		"user_suffix":      text(&o.UserSuffix),
		"principals_claim": text(&o.PrincipalsClaim),
	})
	for _, required := range []string{"issuer", "audience", "user_claim"} {
		if !seen[required] {
			v.mistake("needs %s", required)
		}
	}
}

func isLoopbackAddress(hostPort string) bool {
	host, _, _ := net.SplitHostPort(hostPort)
	return isLoopback(host)
}

// addresses reads one or several addresses to listen at.
func (v value) addresses() (all []string) {
	for _, v := range v.list() {
		if addr := v.address(); slices.Contains(all, addr) {
			v.mistake("%q is listed twice", addr)
		} else {
			all = append(all, addr)
		}
	}
	return all
}

// certificate reads a certificate, with those of its intermediate authorities behind it, and
// its private key. It returns nil after a mistake.
func (v value) certificate(key value) *tls.Certificate {
	path, chain, ok := v.fileOrSecret(false)
	keyPath, private, keyOK := key.fileOrSecret(true)
	if !ok || !keyOK {
		return nil
	}
	pair, err := tls.X509KeyPair(chain, private)
	if err != nil {
		v.mistake("%s with the key %s: %v", path, keyPath, err) // no error of package tls contains the key
		return nil
	}
	return &pair
}

// problem returns an error if the certificate of the API is not valid at the time now.
func (a *API) problem(now time.Time) error {
	if a.Certificate == nil {
		return nil
	}
	leaf := a.Certificate.Leaf
	switch {
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("api.tls: the certificate is not valid before %s", leaf.NotBefore.UTC().Format(time.RFC3339))
	case now.After(leaf.NotAfter):
		return fmt.Errorf("api.tls: the certificate has expired on %s", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

var hostNamePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)

// hostNames reads names or addresses of hosts, without ports.
func (v value) hostNames() (names []string) {
	for _, v := range v.list() {
		s, ok := v.text()
		if !ok {
			continue
		}
		s = strings.ToLower(s)
		if _, err := netip.ParseAddr(s); err != nil && !hostNamePattern.MatchString(s) {
			v.mistake("%q is not the name or the address of a host; write it without a port", s)
			continue
		}
		names = append(names, s)
	}
	return names
}
