package userauth

import (
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// ErrDenied says that the server has accepted none of the client's keys.
var ErrDenied = errors.New("permission denied")

// A DeniedError is ErrDenied with the methods that the server offered last.
type DeniedError struct{ Methods []string }

func (e *DeniedError) Error() string {
	return fmt.Sprintf("%v (%s)", ErrDenied, strings.Join(e.Methods, ","))
}

func (e *DeniedError) Is(target error) bool { return target == ErrDenied }

// Client logs in as user with each signer in turn, on a connection that has done
// its Handshake. A signer may be one for a certificate (see [ssh.NewCertSigner]).
// Banner, if not nil, is called with each banner of the server (RFC 4252 section 5.4).
//
// The error is a *DeniedError if the server refuses all keys, or demands another method
// after a key, and otherwise one of [transport.Conn.ReadPacket] or of a signer.
func Client(c *transport.Conn, user string, banner func(text string), signers ...ssh.Signer) error {
	cl := &client{c: c, user: user, banner: banner}
	if err := cl.begin(); err != nil {
		return err
	}
	denied := &DeniedError{Methods: []string{MethodPublicKey}}
	for _, signer := range signers {
		done, methods, err := cl.try(signer)
		if done || err != nil {
			return err
		}
		denied.Methods = methods
		if !slices.Contains(methods, MethodPublicKey) {
			break
		}
	}
	return denied
}

type client struct {
	c      *transport.Conn
	user   string
	banner func(string)
}

func (cl *client) begin() error {
	if err := cl.send(sshmsg.AppendString([]byte{transport.MsgServiceRequest}, serviceUserAuth)); err != nil {
		return err
	}
	p, err := cl.c.ReadPacket()
	if err != nil {
		return err
	}
	f := sshmsg.NewReader(p[1:])
	if service := f.String(); p[0] != transport.MsgServiceAccept || f.End() != nil || service != serviceUserAuth {
		return cl.unexpected(p)
	}
	return nil
}

// try sends a signed request, without a query before it, and waits for the answer.
// Methods are those that can continue, if the request has failed.
func (cl *client) try(signer ssh.Signer) (done bool, methods []string, err error) {
	name, signature, err := cl.algorithm(signer)
	if err != nil {
		return false, nil, err
	}
	blob := signer.PublicKey().Marshal()
	data := signedData(cl.c.SessionID(), cl.user, MethodPublicKey, name, blob, nil)
	var sig *ssh.Signature
	if s, ok := signer.(ssh.AlgorithmSigner); ok {
		sig, err = s.SignWithAlgorithm(rand.Reader, data, signature)
	} else {
		sig, err = signer.Sign(rand.Reader, data)
	}
	if err != nil {
		return false, nil, fmt.Errorf("signing the authentication request: %w", err)
	}
	// The request is the signed data without the session identifier, and the
	// signature.
	b := append([]byte(nil), data[4+len(cl.c.SessionID()):]...)
	if err := cl.send(sshmsg.AppendString(b, ssh.Marshal(sig))); err != nil {
		return false, nil, err
	}
	return cl.answer()
}

func (cl *client) answer() (done bool, methods []string, err error) {
	for {
		p, err := cl.c.ReadPacket()
		if err != nil {
			return false, nil, err
		}
		f := sshmsg.NewReader(p[1:])
		switch p[0] {
		case msgBanner:
			text := f.String()
			f.Bytes() // language
			if f.End() != nil {
				return false, nil, cl.unexpected(p)
			}
			if cl.banner != nil {
				cl.banner(text)
			}
		case msgSuccess:
			cl.c.LoggedIn()
			return true, nil, nil
		case msgFailure:
			list, _ := f.String(), f.Bool()
			if f.End() != nil {
				return false, nil, cl.unexpected(p)
			}
			return false, strings.Split(list, ","), nil
		default:
			return false, nil, cl.unexpected(p)
		}
	}
}

// algorithm returns the algorithm's name for the request, and that of the signature.
// Of the algorithms for RSA keys it chooses one that the server has announced (RFC
// 8332 section 3.3).
func (cl *client) algorithm(signer ssh.Signer) (name, signature string, err error) {
	announced, known := cl.c.PeerExtension("server-sig-algs")
	server := strings.Split(string(announced), ",")
	keyType := signer.PublicKey().Type()
	for _, name := range preferred {
		a := algorithms[name]
		if a.keyType != keyType {
			continue
		}
		if known && !slices.Contains(server, name) && !slices.Contains(server, a.signature) && strings.HasPrefix(a.signature, "rsa-") {
			continue
		}
		return name, a.signature, nil
	}
	return "", "", fmt.Errorf("no algorithm for a key of type %q that the server takes", keyType)
}

// preferred has the names of algorithms in the client's order of preference.
var preferred = []string{
	ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256,
	ssh.CertAlgoED25519v01, ssh.CertAlgoSKED25519v01, ssh.CertAlgoSKECDSA256v01, ssh.CertAlgoECDSA256v01, ssh.CertAlgoECDSA384v01, ssh.CertAlgoECDSA521v01,
	ssh.CertAlgoRSASHA512v01, ssh.CertAlgoRSASHA256v01,
}

func (cl *client) unexpected(p []byte) error {
	text := fmt.Sprintf("unexpected or malformed message %d during authentication", p[0])
	cl.c.Disconnect(transport.ReasonProtocolError, text)
	return errors.New(text)
}

func (cl *client) send(p []byte) error {
	if err := cl.c.WritePacket(p); err != nil {
		return err
	}
	return cl.c.Flush()
}
