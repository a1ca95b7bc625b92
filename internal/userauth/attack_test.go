package userauth

import (
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// A mallory is a client that sends arbitrary messages.
type mallory struct {
	t    testing.TB
	c    *transport.Conn
	user string
	key  ssh.Signer
}

func (m *mallory) send(p []byte) {
	if err := m.c.WritePacket(p); err == nil {
		m.c.Flush()
	}
}

// answer returns the number of the next message, or the peer's DISCONNECT.
func (m *mallory) answer() string {
	p, err := m.c.ReadPacket()
	var d *transport.DisconnectError
	switch {
	case errors.As(err, &d):
		return fmt.Sprintf("disconnect %d: %s", d.Reason, d.Message)
	case err != nil:
		return err.Error()
	}
	switch p[0] {
	case msgFailure:
		f := sshmsg.NewReader(p[1:])
		list := f.String()
		return fmt.Sprintf("failure %s %t", list, f.Bool())
	case msgSuccess:
		return "success"
	case msgPKOK:
		return "60"
	}
	return fmt.Sprint(p[0])
}

func (m *mallory) begin() {
	m.send(sshmsg.AppendString([]byte{transport.MsgServiceRequest}, serviceUserAuth))
	if got := m.answer(); got != "6" {
		m.t.Fatalf("answer to the service request: %s", got)
	}
}

// A forged request is signed and sent after a test has changed some of its fields.
type forged struct {
	user, service, method, algorithm string
	signed                           bool
	blob, hostKey, sessionID         []byte
	format                           string // of the signature
	signer                           ssh.Signer
	signature                        []byte
	rest                             []byte
	tail                             []byte // after the last field
	// These are signed in place of the same fields of the request.
	signedUser, signedService, signedMethod, signedAlgorithm string
}

func (m *mallory) forge(change func(f *forged)) {
	f := &forged{
		user: m.user, service: serviceConnection, method: MethodPublicKey, algorithm: ssh.KeyAlgoED25519, signed: true,
		blob: m.key.PublicKey().Marshal(), sessionID: m.c.SessionID(), signer: m.key,
	}
	if change != nil {
		change(f)
	}
	body := func(user, service, method, algorithm string) []byte {
		b := []byte{msgRequest}
		b = sshmsg.AppendString(sshmsg.AppendString(sshmsg.AppendString(b, user), service), method)
		b = sshmsg.AppendString(sshmsg.AppendString(sshmsg.AppendBool(b, f.signed), algorithm), f.blob)
		if f.hostKey != nil {
			b = sshmsg.AppendString(b, f.hostKey)
		}
		return b
	}
	or := func(a, b string) string {
		if a != "" {
			return a
		}
		return b
	}
	b := body(f.user, f.service, f.method, f.algorithm)
	if f.signed {
		data := append(sshmsg.AppendString(nil, f.sessionID), body(or(f.signedUser, f.user), or(f.signedService, f.service), or(f.signedMethod, f.method), or(f.signedAlgorithm, f.algorithm))...)
		if f.signature == nil {
			var sig *ssh.Signature
			var err error
			if s, ok := f.signer.(ssh.AlgorithmSigner); ok && f.format != "" {
				sig, err = s.SignWithAlgorithm(rand.Reader, data, f.format)
			} else {
				sig, err = f.signer.Sign(rand.Reader, data)
			}
			if err != nil {
				m.t.Fatal(err)
			}
			sig.Rest = append(sig.Rest, f.rest...)
			f.signature = ssh.Marshal(sig)
		}
		b = sshmsg.AppendString(b, f.signature)
	}
	m.send(append(b, f.tail...))
}

// TestForgedRequests changes a valid request or its signature, and compares the
// server's answer. An invalid request must not authenticate, and its key must not be
// reported as proven.
func TestForgedRequests(t *testing.T) {
	const refused = "failure publickey false"
	const malformed = "disconnect 2: malformed authentication request"
	small := signer(t, mustRSA(1024))
	rsaSigner := signer(t, rsaKey())
	cert := certificate(t, sshtest.NewKey(t))
	tests := []struct {
		name   string
		change func(m *mallory) func(f *forged)
		want   string
	}{
		{"valid", nil, "success"},
		{"another session", func(m *mallory) func(f *forged) { return func(f *forged) { f.sessionID = make([]byte, 32) } }, refused},
		{"another user", func(m *mallory) func(f *forged) { return func(f *forged) { f.signedUser = "bob" } }, refused},
		{"another service in the signature", func(m *mallory) func(f *forged) { return func(f *forged) { f.signedService = "x" } }, refused},
		{"another method in the signature", func(m *mallory) func(f *forged) { return func(f *forged) { f.signedMethod = methodHostBound } }, refused},
		{"another algorithm in the signature", func(m *mallory) func(f *forged) {
			return func(f *forged) { f.signedAlgorithm = ssh.KeyAlgoRSASHA256 }
		}, refused},
		{"another key signs", func(m *mallory) func(f *forged) { return func(f *forged) { f.signer = sshtest.NewKey(t) } }, refused},
		{"an empty signature", func(m *mallory) func(f *forged) { return func(f *forged) { f.signature = []byte{} } }, refused},
		{"a signature of no bytes", func(m *mallory) func(f *forged) {
			return func(f *forged) { f.signature = ssh.Marshal(ssh.Signature{Format: ssh.KeyAlgoED25519}) }
		}, refused},
		{"a signature of another type", func(m *mallory) func(f *forged) {
			return func(f *forged) {
				f.signature = ssh.Marshal(ssh.Signature{Format: ssh.KeyAlgoRSASHA256, Blob: make([]byte, 256)})
			}
		}, refused},
		{"data after the signature", func(m *mallory) func(f *forged) { return func(f *forged) { f.rest = []byte{1} } }, refused},
		{"data after the request", func(m *mallory) func(f *forged) { return func(f *forged) { f.tail = []byte{1} } }, malformed},
		{"data after a request without signature", func(m *mallory) func(f *forged) {
			return func(f *forged) { f.signed, f.tail = false, sshmsg.AppendString(nil, "x") }
		}, malformed},
		{"ssh-rsa", func(m *mallory) func(f *forged) {
			return func(f *forged) {
				f.algorithm, f.format, f.signer, f.blob = ssh.KeyAlgoRSA, ssh.KeyAlgoRSA, rsaSigner, rsaSigner.PublicKey().Marshal()
			}
		}, refused},
		{"SHA-1 under the name of rsa-sha2-256", func(m *mallory) func(f *forged) {
			return func(f *forged) {
				f.algorithm, f.format, f.signer, f.blob = ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSA, rsaSigner, rsaSigner.PublicKey().Marshal()
			}
		}, refused},
		{"rsa-sha2-512 under the name of rsa-sha2-256", func(m *mallory) func(f *forged) {
			return func(f *forged) {
				f.algorithm, f.format, f.signer, f.blob = ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512, rsaSigner, rsaSigner.PublicKey().Marshal()
			}
		}, refused},
		{"RSA of 1024 bits", func(m *mallory) func(f *forged) {
			return func(f *forged) {
				f.algorithm, f.format, f.signer, f.blob = ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA256, small, small.PublicKey().Marshal()
			}
		}, refused},
		{"an unknown algorithm", func(m *mallory) func(f *forged) { return func(f *forged) { f.algorithm = "ssh-x" } }, refused},
		{"a key of another type", func(m *mallory) func(f *forged) {
			return func(f *forged) { f.algorithm = ssh.KeyAlgoECDSA256 }
		}, refused},
		{"a certificate under its key's algorithm", func(m *mallory) func(f *forged) {
			return func(f *forged) { f.blob = cert.PublicKey().Marshal(); f.signer = cert }
		}, refused},
		{"a key under a certificate's algorithm", func(m *mallory) func(f *forged) {
			return func(f *forged) { f.algorithm = ssh.CertAlgoED25519v01 }
		}, refused},
		{"a malformed key", func(m *mallory) func(f *forged) { return func(f *forged) { f.blob = []byte("x") } }, refused},
		{"an empty key", func(m *mallory) func(f *forged) { return func(f *forged) { f.blob = nil } }, refused},
		{"bound to this host key", func(m *mallory) func(f *forged) {
			return func(f *forged) { f.method, f.hostKey = methodHostBound, m.c.HostKey().Marshal() }
		}, "success"},
		{"bound to another host key", func(m *mallory) func(f *forged) {
			return func(f *forged) { f.method, f.hostKey = methodHostBound, sshtest.NewKey(t).PublicKey().Marshal() }
		}, refused},
		{"bound to no host key", func(m *mallory) func(f *forged) { return func(f *forged) { f.method = methodHostBound } }, malformed},
		{"another service", func(m *mallory) func(f *forged) {
			return func(f *forged) { f.service = "ssh-userauth" }
		}, "disconnect 7: unknown service"},
		{"password", func(m *mallory) func(f *forged) { return func(f *forged) { f.method = "password" } }, refused},
		{"keyboard-interactive before its turn", func(m *mallory) func(f *forged) {
			return func(f *forged) { f.method = MethodKeyboardInteractive }
		}, refused},
		{"a long user name", func(m *mallory) func(f *forged) {
			return func(f *forged) { f.user = strings.Repeat("x", 2000) }
		}, malformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var log []Request
			var refusals []string
			w := serve(t, ServerConfig{Refused: func(user, method string, _ ssh.PublicKey, err error) { refusals = append(refusals, err.Error()) }}, accepting(&log))
			m := &mallory{t: t, c: w.conn(), user: "alice", key: sshtest.NewKey(t)}
			m.begin()
			var change func(f *forged)
			if tt.change != nil {
				change = tt.change(m)
			}
			m.forge(change)
			got := m.answer()
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			m.c.Close()
			w.result()
			if got == refused && len(refusals) != 1 {
				t.Errorf("refusals %q", refusals)
			}
			for _, req := range log {
				if s, ok := req.(*Signed); ok && tt.want != "success" {
					t.Errorf("reported as proven: %+v", s)
				}
			}
		})
	}
}

// TestSequences plays sequences of messages that no honest client sends.
func TestSequences(t *testing.T) {
	const refused = "failure publickey false"
	none := func(user string) []byte {
		return sshmsg.AppendString(sshmsg.AppendString(sshmsg.AppendString([]byte{msgRequest}, user), serviceConnection), MethodNone)
	}
	tests := []struct {
		name string
		play func(m *mallory) string // returns the last answer
		want string
		err  error // of the server
	}{
		{"no service request", func(m *mallory) string {
			m.send(none("alice"))
			return m.answer()
		}, "disconnect 2: unexpected message 50 before authentication", ErrRequest},
		{"another service", func(m *mallory) string {
			m.send(sshmsg.AppendString([]byte{transport.MsgServiceRequest}, serviceConnection))
			return m.answer()
		}, "disconnect 7: bad service request", ErrRequest},
		{"a second service request", func(m *mallory) string {
			m.begin()
			m.send(sshmsg.AppendString([]byte{transport.MsgServiceRequest}, serviceUserAuth))
			return m.answer()
		}, "disconnect 2: unexpected message 5 during authentication", ErrRequest},
		{"a channel before authentication", func(m *mallory) string {
			m.begin()
			m.send(sshmsg.AppendString([]byte{90}, "session"))
			return m.answer()
		}, "disconnect 2: unexpected message 90 during authentication", ErrRequest},
		{"SUCCESS from the client", func(m *mallory) string {
			m.begin()
			m.send([]byte{msgSuccess})
			return m.answer()
		}, "disconnect 2: unexpected message 52 during authentication", ErrRequest},
		{"answers to no question", func(m *mallory) string {
			m.begin()
			m.send([]byte{msgInfoResponse, 0, 0, 0, 0})
			return m.answer()
		}, "disconnect 2: unexpected message 61 during authentication", ErrRequest},
		{"another user", func(m *mallory) string {
			m.begin()
			m.send(none("alice"))
			m.answer()
			m.send(none("bob"))
			return m.answer()
		}, "disconnect 2: Change of username or service not allowed", ErrRequest},
		{"none, again and again", func(m *mallory) string {
			m.begin()
			last := ""
			for range 7 { // the first does not count
				m.send(none("alice"))
				last = m.answer()
			}
			return last
		}, "disconnect 2: Too many authentication failures", ErrTooManyTries},
		{"the sixth failure", func(m *mallory) string {
			m.begin()
			for range 6 {
				m.forge(func(f *forged) { f.sessionID = nil })
			}
			for range 5 {
				if got := m.answer(); got != refused {
					return got
				}
			}
			return m.answer()
		}, "disconnect 2: Too many authentication failures", ErrTooManyTries},
		{"five failures and a success", func(m *mallory) string {
			m.begin()
			m.send(none("alice"))
			m.answer()
			for range 5 {
				m.forge(func(f *forged) { f.sessionID = nil })
				m.answer()
			}
			m.forge(nil)
			return m.answer()
		}, "success", nil},
		{"queries without end", func(m *mallory) string {
			m.begin()
			for range maxRequests {
				m.forge(func(f *forged) { f.signed = false })
				if got := m.answer(); got != "60" {
					return got
				}
			}
			m.forge(func(f *forged) { f.signed = false })
			return m.answer()
		}, "disconnect 2: Too many authentication failures", ErrTooManyTries},
		{"a key exchange before authentication", func(m *mallory) string {
			m.begin()
			m.c.LoggedIn()
			m.c.Rekey()
			return m.answer()
		}, "disconnect 2: key exchange before authentication", nil},
		{"a truncated request", func(m *mallory) string {
			m.begin()
			m.send([]byte{msgRequest, 0, 0, 0, 5, 'a'})
			return m.answer()
		}, "disconnect 2: malformed authentication request", ErrRequest},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var log []Request
			w := serve(t, ServerConfig{}, accepting(&log))
			m := &mallory{t: t, c: w.conn(), user: "alice", key: sshtest.NewKey(t)}
			if got := tt.play(m); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			m.c.Close()
			if err := w.result(); tt.err != nil && !errors.Is(err, tt.err) {
				t.Errorf("server: %v, want %v", err, tt.err)
			}
		})
	}
}

// TestInteractiveAttacks sends wrong and malformed responses to
// keyboard-interactive.
func TestInteractiveAttacks(t *testing.T) {
	request := func(method string) []byte {
		b := sshmsg.AppendString(sshmsg.AppendString(sshmsg.AppendString([]byte{msgRequest}, "alice"), serviceConnection), method)
		if method == MethodKeyboardInteractive {
			b = sshmsg.AppendString(sshmsg.AppendString(b, ""), "")
		}
		return b
	}
	response := func(n byte, answers ...string) []byte {
		b := []byte{msgInfoResponse, 0, 0, 0, n}
		for _, a := range answers {
			b = sshmsg.AppendString(b, a)
		}
		return b
	}
	for _, tt := range []struct {
		name   string
		answer []byte
		want   string
	}{
		{"right", response(1, "x"), "success"},
		{"none", response(0), "disconnect 2: wrong number of answers"},
		{"two", response(2, "x", "y"), "disconnect 2: wrong number of answers"},
		{"said to be many", []byte{msgInfoResponse, 255, 255, 255, 255}, "disconnect 2: wrong number of answers"},
		{"missing", response(1), "disconnect 2: malformed answers"},
		{"long", response(1, strings.Repeat("x", 5000)), "disconnect 2: malformed answers"},
		{"data after the responses", append(response(1, "x"), 0), "disconnect 2: malformed answers"},
		{"another message", []byte{90}, "disconnect 2: unexpected message 90 during authentication"},
		{"another request", request(MethodNone), "failure keyboard-interactive false"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := serve(t, ServerConfig{Methods: []string{MethodKeyboardInteractive}}, func(s *Server) error {
				for {
					req, err := s.Next()
					if err != nil {
						return err
					}
					if _, ok := req.(*KeyboardInteractive); !ok {
						if err := s.Fail(); err != nil {
							return err
						}
						continue
					}
					if _, err := s.Ask("", "", Prompt{Text: "?"}); errors.Is(err, ErrAbandoned) {
						continue
					} else if err != nil {
						return err
					}
					return s.Succeed()
				}
			})
			m := &mallory{t: t, c: w.conn()}
			m.begin()
			m.send(request(MethodKeyboardInteractive))
			if got := m.answer(); got != "60" {
				t.Fatalf("got %q", got)
			}
			m.send(tt.answer)
			if got := m.answer(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			m.c.Close()
			w.result()
		})
	}
}

// TestKeysOutlivePackets keeps the keys of requests while later packets overwrite the
// read buffer: each must still be the key that was sent, so it must not alias the
// buffer.
func TestKeysOutlivePackets(t *testing.T) {
	var log []Request
	w := serve(t, ServerConfig{}, accepting(&log))
	m := &mallory{t: t, c: w.conn(), user: "alice"}
	m.begin()
	var keys []ssh.Signer
	for range 100 { // without waiting for answers, so that they share the buffer
		m.key = sshtest.NewKey(t)
		keys = append(keys, m.key)
		m.forge(func(f *forged) { f.signed = false })
	}
	for range keys {
		if got := m.answer(); got != "60" {
			t.Fatal(got)
		}
	}
	m.c.Close()
	w.result()
	for i, req := range log {
		if got := req.(*Query).Key; ssh.FingerprintSHA256(got) != ssh.FingerprintSHA256(keys[i].PublicKey()) {
			t.Errorf("key %d has changed", i)
		}
	}
}
