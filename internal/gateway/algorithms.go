package gateway

import (
	"path"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/transport"
	"github.com/sallyport-ssh/sallyport/internal/userauth"
)

// This file chooses the algorithms that clients are offered: the defaults of package
// transport, changed by the configuration. docs/security.md lists and explains them.

// gcmCiphers are offered to OpenSSH clients in place of the default. Before version 10
// they prefer AES-CTR to AES-GCM, and the client's order decides (RFC 4253, section
// 7.1); CTR with its HMAC costs about twice the CPU.
var gcmCiphers = []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM}

// transportConfig returns the configuration of the client's transport.
func (c *conn) transportConfig() *transport.Config {
	return &transport.Config{
		Version:       c.version(),
		HostKeys:      slices.Concat(c.cfg.HostKeys, c.cfg.HostCertificates),
		KexAlgorithms: applyList(transport.DefaultKexAlgorithms, c.cfg.KexAlgorithms),
		CiphersFor: func(clientVersion string) []string {
			if strings.HasPrefix(clientVersion, "SSH-2.0-OpenSSH_") {
				return applyList(gcmCiphers, c.cfg.Ciphers)
			}
			return applyList(transport.DefaultCiphers, c.cfg.Ciphers)
		},
		MACs:       applyList(transport.DefaultMACs, c.cfg.MACs),
		Extensions: userauth.Extensions(nil),

		RekeyBytes:    c.cfg.RekeyBytes,
		RekeyInterval: c.cfg.RekeyInterval,
	}
}

// applyList applies a list of the configuration to a default list, in the syntax of
// Ciphers in sshd_config(5). If the first name begins with +, the names are appended;
// with ^, they are put first; with -, names that match one of the patterns are removed.
// Otherwise list replaces the default, unless it is empty. The result is never empty,
// because package transport would use its own defaults then.
func applyList(byDefault, list []string) []string {
	if len(list) == 0 {
		return byDefault
	}
	op, names := list[0][0], slices.Clone(list)
	if strings.IndexByte("+^-", op) >= 0 {
		names[0] = names[0][1:]
	}
	added := func(name string) bool { return slices.Contains(names, name) }
	switch op {
	case '+':
		return append(slices.DeleteFunc(slices.Clone(byDefault), added), names...)
	case '^':
		return append(names, slices.DeleteFunc(slices.Clone(byDefault), added)...)
	case '-':
		left := slices.DeleteFunc(slices.Clone(byDefault), func(name string) bool {
			return slices.ContainsFunc(names, func(pattern string) bool { ok, _ := path.Match(pattern, name); return ok })
		})
		if len(left) == 0 {
			return []string{"none"}
		}
		return left
	}
	return names
}
