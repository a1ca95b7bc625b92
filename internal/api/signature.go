package api

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/userauth"
)

// This file has the signatures of requests. A request is signed like a file, with ssh-keygen
// -Y sign (OpenSSH's PROTOCOL.sshsig), and has this header:
//
//	Authorization: SSHSIG user="alice", time="1764547200", nonce="...", signature="..."
//
// Signature is the armored signature without its first and last line and without line
// breaks. docs/api.md has an example in shell.

const (
	// Namespace is the namespace of the signatures.
	Namespace = "sallyport-api"
	// scheme is the authentication scheme of the header (RFC 9110, section 11.1).
	scheme = "SSHSIG"

	// maxSkew is the largest difference between the time in a request and the
	// gateway's clock.
	maxSkew = 2 * time.Minute

	maxSignature       = 24 << 10 // bytes, in base64; a certificate can have 8 KiB
	maxName            = 128      // bytes
	minNonce, maxNonce = 16, 64   // characters
)

// A Statement is the text that is signed for a request.
type Statement struct {
	Method string
	// Host is the request's Host header, and Target its path and query.
	Host, Target string
	User         string
	Time         time.Time // in seconds
	Nonce        string
}

// Text returns the signed text. No field contains a line break.
func (s Statement) Text() string {
	return fmt.Sprintf("%s 1\n%s %s\n%s\n%s\n%d\n%s\n", Namespace, s.Method, s.Target, s.Host, s.User, s.Time.Unix(), s.Nonce)
}

// Sign returns the Authorization header for a statement.
func Sign(s Statement, key ssh.Signer) (string, error) {
	if rsa, ok := key.(ssh.AlgorithmSigner); ok && key.PublicKey().Type() == ssh.CertAlgoRSAv01 {
		key = sha2Signer{rsa}
	}
	signature, err := sshsig.Sign(strings.NewReader(s.Text()), key, sshsig.HashSHA512, Namespace)
	if err != nil {
		return "", fmt.Errorf("signing a request: %w", err)
	}
	return fmt.Sprintf(`%s user="%s", time="%d", nonce="%s", signature="%s"`,
		scheme, s.User, s.Time.Unix(), s.Nonce, base64.StdEncoding.EncodeToString(signature.Marshal())), nil
}

// A sha2Signer signs with the key of an RSA certificate. Package sshsig would use SHA-1.
type sha2Signer struct{ ssh.AlgorithmSigner }

// Sign implements [ssh.Signer].
func (s sha2Signer) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	return s.SignWithAlgorithm(rand, data, ssh.KeyAlgoRSASHA512)
}

// A signedRequest is the parsed header of a request. Nothing in it is proven.
type signedRequest struct {
	user      string
	time      time.Time
	nonce     string
	signature *sshsig.Signature
}

// parseSigned parses the parameters of the header.
func parseSigned(params string) (signedRequest, error) {
	values, err := parseParams(params)
	if err != nil {
		return signedRequest{}, err
	}
	r := signedRequest{user: values["user"], nonce: values["nonce"]}
	if len(values) != 4 || r.user == "" || len(r.user) > maxName {
		return r, errors.New("the parameters are not user, time, nonce and signature")
	}
	seconds, err := strconv.ParseUint(values["time"], 10, 40)
	if err != nil {
		return r, errors.New("time is not a number of seconds since 1970")
	}
	r.time = time.Unix(int64(seconds), 0)
	if len(r.nonce) < minNonce || len(r.nonce) > maxNonce || strings.Trim(r.nonce, nonceCharacters) != "" {
		return r, fmt.Errorf("the nonce is not %d to %d letters, digits, - and _", minNonce, maxNonce)
	}
	if len(values["signature"]) > maxSignature {
		return r, errors.New("the signature is too long")
	}
	blob, err := base64.StdEncoding.Strict().DecodeString(values["signature"])
	if err != nil {
		return r, fmt.Errorf("the signature: %w", err)
	}
	if r.signature, err = sshsig.ParseSignature(blob); err != nil {
		return r, fmt.Errorf("the signature: %w", err)
	}
	return r, nil
}

const nonceCharacters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

// parseParams parses parameters of the form name="value", separated by commas (RFC 9110,
// section 11.2). A value has printable ASCII characters, and no quotes or backslashes.
func parseParams(text string) (map[string]string, error) {
	values := map[string]string{}
	for rest := text; ; {
		name, after, ok := strings.Cut(strings.TrimLeft(rest, " "), `="`)
		value, after, closed := strings.Cut(after, `"`)
		name = strings.ToLower(name)
		_, twice := values[name]
		if !ok || !closed || twice || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz") != "" || strings.ContainsFunc(value, unquotable) {
			return nil, errors.New(`the parameters are not written like name="value", name="value"`)
		}
		values[name] = value
		after = strings.TrimLeft(after, " ")
		if after == "" {
			return values, nil
		}
		if rest, ok = strings.CutPrefix(after, ","); !ok {
			return nil, errors.New("there is no comma between two parameters")
		}
	}
}

func unquotable(r rune) bool { return r < ' ' || r > '~' || r == '\\' }

// verify checks that the request was signed, for this statement except for user, time and
// nonce, with the key in the signature. Whether the key is the user's is not checked. The
// proof has no code and no check for a replay.
func (r signedRequest) verify(statement Statement, now time.Time) (gateway.Proof, error) {
	if skew := now.Sub(r.time); skew.Abs() > maxSkew {
		return gateway.Proof{}, fmt.Errorf("%w: %v ago", gateway.ErrClock, skew.Round(time.Second))
	}
	statement.User, statement.Time, statement.Nonce = r.user, r.time, r.nonce
	v := &verifier{PublicKey: r.signature.PublicKey}
	if err := sshsig.Verify(strings.NewReader(statement.Text()), r.signature, v, r.signature.HashAlgorithm, Namespace); err != nil {
		return gateway.Proof{}, fmt.Errorf("%w: %w", gateway.ErrUnproven, err)
	}
	return gateway.Proof{User: r.user, Key: r.signature.PublicKey, UserPresent: v.present, UserVerified: v.verified}, nil
}

// A verifier is a public key that verifies as package userauth does, and records the flags
// of a FIDO key.
type verifier struct {
	ssh.PublicKey
	present, verified bool
}

// Verify implements [ssh.PublicKey].
func (v *verifier) Verify(data []byte, signature *ssh.Signature) (err error) {
	v.present, v.verified, err = userauth.Verify(v.PublicKey, data, signature)
	return err
}
