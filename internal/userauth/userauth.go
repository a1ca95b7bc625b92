// Package userauth is the SSH authentication protocol (RFC 4252) for servers and
// clients, over package transport. It parses requests and verifies signatures. It
// does not decide who may log in: the caller of a [Server] takes one request after
// the other and answers it.
//
//	s := userauth.NewServer(conn, userauth.ServerConfig{})
//	for {
//		req, err := s.Next()
//		if err != nil {
//			return err // the connection has ended
//		}
//		switch req := req.(type) {
//		case *userauth.Query: // offered, not proven
//			if known(req.User, req.Key) {
//				err = s.Accept(req)
//				break
//			}
//			err = s.Fail()
//		case *userauth.Signed: // proven, for req.User
//			if known(req.User, req.Key) {
//				return s.Succeed()
//			}
//			err = s.Fail()
//		default:
//			err = s.Fail()
//		}
//		if err != nil {
//			return err
//		}
//	}
//
// # Reading the package
//
//	userauth.go     names, numbers and algorithms
//	server.go       the server: one request after the other
//	publickey.go    the publickey methods: parsing and verification
//	sk.go           signatures of FIDO keys
//	interactive.go  keyboard-interactive (RFC 4256)
//	client.go       the client
package userauth

import (
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// Method names (RFC 4252, RFC 4256, OpenSSH's PROTOCOL section 3.1).
const (
	MethodNone                = "none"
	MethodPublicKey           = "publickey"
	MethodKeyboardInteractive = "keyboard-interactive"

	methodHostBound = "publickey-hostbound-v00@openssh.com"
)

const (
	serviceUserAuth   = "ssh-userauth"
	serviceConnection = "ssh-connection"
)

// Message numbers (RFC 4252 section 6; RFC 4256 section 5).
const (
	msgRequest      = 50
	msgFailure      = 51
	msgSuccess      = 52
	msgBanner       = 53
	msgPKOK         = 60 // in the method publickey
	msgInfoRequest  = 60 // in the method keyboard-interactive
	msgInfoResponse = 61
)

// DefaultAlgorithms are the signature algorithms that a server accepts, in the order
// in which it announces them. They do not include ssh-rsa, which uses SHA-1, or DSA.
var DefaultAlgorithms = []string{
	ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256,
	ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512,
}

// Extensions returns the extensions, for [transport.Config], of a server that accepts
// these algorithms: server-sig-algs (RFC 8308 section 3.1) and
// publickey-hostbound@openssh.com. Nil means DefaultAlgorithms.
func Extensions(algorithms []string) []transport.Extension {
	if algorithms == nil {
		algorithms = DefaultAlgorithms
	}
	return []transport.Extension{
		{Name: "server-sig-algs", Value: []byte(strings.Join(algorithms, ","))},
		{Name: "publickey-hostbound@openssh.com", Value: []byte("0")},
	}
}

// An algorithm is the meaning of an algorithm's name in a request (RFC 8332,
// OpenSSH's PROTOCOL.certkeys and PROTOCOL.u2f).
type algorithm struct {
	keyType   string // ssh.PublicKey.Type
	signature string // ssh.Signature.Format
}

var algorithms = map[string]algorithm{
	ssh.KeyAlgoED25519:    {ssh.KeyAlgoED25519, ssh.KeyAlgoED25519},
	ssh.KeyAlgoSKED25519:  {ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKED25519},
	ssh.KeyAlgoSKECDSA256: {ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoSKECDSA256},
	ssh.KeyAlgoECDSA256:   {ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA256},
	ssh.KeyAlgoECDSA384:   {ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA384},
	ssh.KeyAlgoECDSA521:   {ssh.KeyAlgoECDSA521, ssh.KeyAlgoECDSA521},
	ssh.KeyAlgoRSASHA256:  {ssh.KeyAlgoRSA, ssh.KeyAlgoRSASHA256},
	ssh.KeyAlgoRSASHA512:  {ssh.KeyAlgoRSA, ssh.KeyAlgoRSASHA512},

	ssh.CertAlgoED25519v01:    {ssh.CertAlgoED25519v01, ssh.KeyAlgoED25519},
	ssh.CertAlgoSKED25519v01:  {ssh.CertAlgoSKED25519v01, ssh.KeyAlgoSKED25519},
	ssh.CertAlgoSKECDSA256v01: {ssh.CertAlgoSKECDSA256v01, ssh.KeyAlgoSKECDSA256},
	ssh.CertAlgoECDSA256v01:   {ssh.CertAlgoECDSA256v01, ssh.KeyAlgoECDSA256},
	ssh.CertAlgoECDSA384v01:   {ssh.CertAlgoECDSA384v01, ssh.KeyAlgoECDSA384},
	ssh.CertAlgoECDSA521v01:   {ssh.CertAlgoECDSA521v01, ssh.KeyAlgoECDSA521},
	ssh.CertAlgoRSASHA256v01:  {ssh.CertAlgoRSAv01, ssh.KeyAlgoRSASHA256},
	ssh.CertAlgoRSASHA512v01:  {ssh.CertAlgoRSAv01, ssh.KeyAlgoRSASHA512},
}
