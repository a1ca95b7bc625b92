package gateway

import (
	"bytes"
	"crypto/rand"
	"regexp"
	"slices"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// This file announces the gateway's host keys to clients and proves that it has them.
// So clients learn future host keys and forget retired ones (OpenSSH PROTOCOL, section
// 2.5; UpdateHostKeys in ssh_config(5)).

// confusedByHostKeys matches the clients to which sshd does not announce host keys
// (SSH_BUG_HOSTKEYS in its compat.c): TTSSH up to version 2.72.
var confusedByHostKeys = regexp.MustCompile(`^SSH-2\.0-TTSSH/(1\.5\.|2\.[1-6]|2\.7[012])`)

// announceHostKeys sends the client all public host keys. Like sshd, it leaves
// certificates out.
func (c *conn) announceHostKeys() {
	if confusedByHostKeys.MatchString(c.clientVersion) {
		return
	}
	var payload []byte
	for _, key := range c.cfg.HostKeys {
		payload = append(payload, ssh.Marshal(struct{ Key []byte }{key.PublicKey().Marshal()})...)
	}
	// If this fails, the connection has ended, and its next read fails, too.
	c.ssh.WritePacket(sshmsg.GlobalRequest{Type: sshmsg.HostKeys, Payload: payload}.Append(nil))
	c.ssh.Flush()
}

// hostKeyProver returns a function that answers hostkeys-prove requests: one signature
// by each host key in the request, in its order. Each key signs once for a connection,
// because clients ask once and RSA signatures are expensive.
func (c *conn) hostKeyProver() func(payload []byte) (reply []byte, ok bool) {
	unproven := slices.Clone(c.cfg.HostKeys)
	return func(payload []byte) ([]byte, bool) {
		var reply []byte
		for len(payload) > 0 {
			var next struct {
				Key  []byte
				Rest []byte `ssh:"rest"`
			}
			if ssh.Unmarshal(payload, &next) != nil {
				return nil, false
			}
			i := slices.IndexFunc(unproven, func(k ssh.Signer) bool { return bytes.Equal(k.PublicKey().Marshal(), next.Key) })
			if i < 0 {
				return nil, false
			}
			sig, err := proveHostKey(unproven[i], c.ssh)
			if err != nil {
				c.log.Error("cannot prove a host key", "key", auth.Fingerprint(unproven[i].PublicKey()), "err", err)
				return nil, false
			}
			unproven = slices.Delete(unproven, i, i+1)
			reply = append(reply, ssh.Marshal(struct{ Signature []byte }{ssh.Marshal(sig)})...)
			payload = next.Rest
		}
		return reply, len(reply) > 0
	}
}

// proveHostKey signs the session identifier of client with key. An RSA key signs with
// the hash of the key exchange's RSA signature, if it had one: OpenSSH accepts no
// other.
func proveHostKey(key ssh.Signer, client *transport.Conn) (*ssh.Signature, error) {
	signed := ssh.Marshal(struct {
		Kind      string
		Session   []byte
		PublicKey []byte
	}{sshmsg.HostKeysProve, client.SessionID(), key.PublicKey().Marshal()})
	rsa, ok := key.(ssh.AlgorithmSigner)
	if key.PublicKey().Type() != ssh.KeyAlgoRSA || !ok {
		return key.Sign(rand.Reader, signed)
	}
	algorithm := ssh.KeyAlgoRSASHA512
	switch client.Algorithms().HostKey {
	case ssh.KeyAlgoRSASHA256, ssh.CertAlgoRSASHA256v01:
		algorithm = ssh.KeyAlgoRSASHA256
	}
	return rsa.SignWithAlgorithm(rand.Reader, signed, algorithm)
}
