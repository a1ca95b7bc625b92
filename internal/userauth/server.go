package userauth

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// ServerConfig configures a Server. The zero value is useful.
type ServerConfig struct {
	// MaxAuthTries is how many attempts may fail before the client is
	// disconnected, as in sshd_config(5); zero means 6.
	MaxAuthTries int
	// Algorithms are the signature algorithms to accept, for plain keys and
	// those in certificates; nil means DefaultAlgorithms.
	Algorithms []string
	// Methods are offered until [Server.Partial] replaces them; nil means
	// publickey alone.
	Methods []string
	// Refused, if not nil, is called for each request that Next has refused
	// itself. Key is the key of the request, or nil if it has none that can be
	// parsed; the client has not proven that it holds it.
	Refused func(user, method string, key ssh.PublicKey, err error)
}

const (
	defaultMaxAuthTries = 6
	// maxRequests bounds all requests of a client, because a query that is
	// accepted is no failed attempt.
	maxRequests = 128
	// maxUser bounds user names, in bytes.
	maxUser = 1024
)

// A Request is one of *[None], *[Query], *[Signed] and *[KeyboardInteractive]. Only a
// Signed proves anything.
type Request any

// None is the method "none" (RFC 4252 section 5.2). Clients begin with it to
// learn the methods.
type None struct{ User string }

// A Query asks whether a key would be accepted (RFC 4252 section 7). The client
// has not proven that it holds the private key.
type Query struct {
	User      string
	Key       ssh.PublicKey // may be an *ssh.Certificate
	Algorithm string        // as in the request, such as "rsa-sha2-512"

	blob []byte
}

// A Signed request has a valid signature by the key, over this connection's session
// identifier and this user name. Whether the key is one of the user's has not been
// checked.
type Signed struct {
	User      string
	Key       ssh.PublicKey // may be an *ssh.Certificate, whose authority has not been checked
	Algorithm string
	// HostBound says that the signature also covers the host key
	// (publickey-hostbound-v00@openssh.com).
	HostBound bool
	// UserPresent and UserVerified are the flags that a FIDO key has signed
	// (OpenSSH's PROTOCOL.u2f); both are true for other keys. A caller refuses
	// a request without UserPresent unless the key's options waive it
	// (no-touch-required), and one without UserVerified if they demand it
	// (verify-required).
	UserPresent, UserVerified bool
}

// KeyboardInteractive asks for keyboard-interactive (RFC 4256 section 3.1). The
// caller calls [Server.Ask], any number of times, before it answers.
type KeyboardInteractive struct{ User string }

// ErrTooManyTries says that MaxAuthTries was reached. The client has been
// disconnected.
var ErrTooManyTries = errors.New("too many authentication failures")

// ErrRequest says that a message of the client violated the protocol. The client has
// been disconnected.
var ErrRequest = errors.New("invalid authentication request")

// A Server is the server side of one connection's authentication. Its methods,
// except Banner, are called by one goroutine, which is the reader of the
// transport.
type Server struct {
	c   *transport.Conn
	cfg ServerConfig

	methods   []string
	user      string        // of the first request
	method    string        // of the unanswered request
	key       ssh.PublicKey // of that request; nil if none was parsed
	requests  int
	failures  int    // failed attempts
	readAhead []byte // a request that Ask has read; nil if there is none

	mu        sync.Mutex // guards these, and keeps banners behind SERVICE_ACCEPT
	began     bool       // SERVICE_ACCEPT was sent
	succeeded bool
}

// NewServer returns a Server on a connection that has done its Handshake.
func NewServer(c *transport.Conn, cfg ServerConfig) *Server {
	if cfg.MaxAuthTries == 0 {
		cfg.MaxAuthTries = defaultMaxAuthTries
	}
	if cfg.Algorithms == nil {
		cfg.Algorithms = DefaultAlgorithms
	}
	if cfg.Methods == nil {
		cfg.Methods = []string{MethodPublicKey}
	}
	return &Server{c: c, cfg: cfg, methods: cfg.Methods}
}

// User returns the user name of the client's requests, or "" before the first. It is
// not authenticated, and may hold any bytes.
func (s *Server) User() string { return s.user }

// Next returns the client's next request. The caller must have answered the previous
// one with Accept, Fail or Partial; Succeed is the last answer. Next itself refuses
// a request with a method that is not offered, an algorithm that is not accepted or an
// invalid signature, and counts it as a failed attempt, as sshd does.
//
// The error is ErrTooManyTries, wraps ErrRequest, or is one of
// [transport.Conn.ReadPacket].
func (s *Server) Next() (Request, error) {
	if err := s.begin(); err != nil {
		return nil, err
	}
	for {
		p := s.readAhead
		s.readAhead = nil
		if p == nil {
			var err error
			if p, err = s.c.ReadPacket(); err != nil {
				return nil, err
			}
		}
		if p[0] != msgRequest {
			return nil, s.disconnect(transport.ReasonProtocolError, fmt.Sprintf("unexpected message %d during authentication", p[0]))
		}
		// Copied, because the parts of a Request point into it, and the packet
		// is valid until the next read only.
		req, err := s.request(bytes.Clone(p[1:]))
		var refusal *refusal
		if !errors.As(err, &refusal) {
			return req, err
		}
		if s.cfg.Refused != nil {
			s.cfg.Refused(s.user, s.method, s.key, refusal.err)
		}
		if err := s.Fail(); err != nil {
			return nil, err
		}
	}
}

// begin answers the service request, which is the first message (RFC 4253 section
// 10).
func (s *Server) begin() error {
	if s.began {
		return nil
	}
	p, err := s.c.ReadPacket()
	if err != nil {
		return err
	}
	if p[0] != transport.MsgServiceRequest {
		return s.disconnect(transport.ReasonProtocolError, fmt.Sprintf("unexpected message %d before authentication", p[0]))
	}
	f := sshmsg.NewReader(p[1:])
	if service := f.String(); f.End() != nil || service != serviceUserAuth {
		return s.disconnect(transport.ReasonServiceNotAvailable, "bad service request")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.began = true
	return s.send(sshmsg.AppendString([]byte{transport.MsgServiceAccept}, serviceUserAuth))
}

// A refusal is the reason for which a request fails, and the connection does not.
type refusal struct{ err error }

func (r *refusal) Error() string { return r.err.Error() }

func refuse(format string, args ...any) error { return &refusal{fmt.Errorf(format, args...)} }

// request parses a USERAUTH_REQUEST (RFC 4252 section 5) and verifies its signature, if
// it has one. The error is a *refusal if the request fails.
func (s *Server) request(p []byte) (Request, error) {
	f := sshmsg.NewReader(p)
	user, service, method := f.String(), f.String(), f.String()
	if f.Failed() || len(user) > maxUser {
		return nil, s.malformed()
	}
	if s.requests++; s.requests > maxRequests {
		return nil, s.tooMany()
	}
	if service != serviceConnection {
		return nil, s.disconnect(transport.ReasonServiceNotAvailable, "unknown service")
	}
	// As sshd does, refuse another user name on the same connection (RFC 4252
	// section 5 permits that), so that no decision about one user can be used
	// for another.
	if s.requests > 1 && user != s.user {
		return nil, s.disconnect(transport.ReasonProtocolError, "Change of username or service not allowed")
	}
	s.user, s.method, s.key = user, method, nil
	base := method
	if method == methodHostBound {
		base = MethodPublicKey
	}
	switch {
	case method == MethodNone:
		if f.End() != nil {
			return nil, s.malformed()
		}
		return &None{user}, nil
	case !slices.Contains(s.methods, base):
		return nil, refuse("method %q is not offered", method)
	case base == MethodPublicKey:
		return s.publicKey(f, method == methodHostBound)
	case base == MethodKeyboardInteractive:
		f.Bytes() // language
		f.Bytes() // submethods
		if f.End() != nil {
			return nil, s.malformed()
		}
		return &KeyboardInteractive{user}, nil
	}
	return nil, refuse("method %q is not implemented", method)
}

func (s *Server) malformed() error {
	return s.disconnect(transport.ReasonProtocolError, "malformed authentication request")
}

// Accept answers a Query with PK_OK (RFC 4252 section 7): the client may sign with
// this key.
func (s *Server) Accept(q *Query) error {
	b := sshmsg.AppendString([]byte{msgPKOK}, q.Algorithm)
	return s.send(sshmsg.AppendString(b, q.blob))
}

// Fail answers a request with FAILURE and the methods that can continue. It
// counts as a failed attempt, except a "none" that is the client's first request,
// and disconnects the client if there were MaxAuthTries, with ErrTooManyTries. If
// the client has abandoned the request (see [Server.Ask]), Fail counts the attempt
// and sends nothing, since the next request gets an answer of its own.
func (s *Server) Fail() error {
	if s.method != MethodNone || s.requests > 1 {
		s.failures++
	}
	if s.failures >= s.cfg.MaxAuthTries {
		return s.tooMany()
	}
	if s.readAhead != nil {
		return nil
	}
	return s.fail(false)
}

// Partial answers a request that has succeeded if another method must succeed, too
// (RFC 4252 section 5.1). Methods replace those that were offered before.
func (s *Server) Partial(methods ...string) error {
	s.methods = methods
	return s.fail(true)
}

func (s *Server) fail(partial bool) error {
	b := sshmsg.AppendString([]byte{msgFailure}, strings.Join(s.methods, ","))
	return s.send(sshmsg.AppendBool(b, partial))
}

// Banner shows text to the user (RFC 4252 section 5.4). Line ends are CR LF. Any
// goroutine may call it, also between Next and the answer. It does nothing before the
// service request and after Succeed.
func (s *Server) Banner(text string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.began || s.succeeded {
		return nil
	}
	return s.send(sshmsg.AppendString(sshmsg.AppendString([]byte{msgBanner}, text), ""))
}

// Succeed sends SUCCESS, and lifts the transport's limits for clients that have not
// logged in. From then on the caller reads the transport itself.
func (s *Server) Succeed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.succeeded = true
	s.c.LoggedIn()
	return s.send([]byte{msgSuccess})
}

// tooMany disconnects the client, with sshd's text.
func (s *Server) tooMany() error {
	s.c.Disconnect(transport.ReasonProtocolError, "Too many authentication failures")
	return ErrTooManyTries
}

func (s *Server) disconnect(reason uint32, text string) error {
	s.c.Disconnect(reason, text)
	return fmt.Errorf("%w: %s", ErrRequest, text)
}

func (s *Server) send(p []byte) error {
	if err := s.c.WritePacket(p); err != nil {
		return err
	}
	return s.c.Flush()
}
