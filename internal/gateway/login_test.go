package gateway

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// connectRaw connects with package transport and requests the service ssh-userauth.
func (gw *testGateway) connectRaw(t *testing.T) (c *transport.Conn, served <-chan struct{}) {
	t.Helper()
	near, far := sshtest.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		gw.srv.ServeConn(t.Context(), far)
	}()
	c = transport.NewClient(near, &transport.Config{Version: gw.clientVersion, HostKey: func(ssh.PublicKey) error { return nil }})
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	send(t, c, ssh.Marshal(struct {
		Service string `sshtype:"5"`
	}{"ssh-userauth"}))
	receive(t, c)
	return c, done
}

func send(t *testing.T, c *transport.Conn, packets ...[]byte) {
	t.Helper()
	for _, p := range packets {
		if err := c.WritePacket(p); err != nil {
			t.Fatal(err)
		}
	}
	c.Flush()
}

func receive(t *testing.T, c *transport.Conn) []byte {
	t.Helper()
	p, err := c.ReadPacket()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// authRequest is a request of RFC 4252, section 5.
func authRequest(user, method string, rest []byte) []byte {
	return append(ssh.Marshal(struct {
		User, Service, Method string `sshtype:"50"`
	}{user, "ssh-connection", method}), rest...)
}

// signedRequest is a publickey request with a signature (RFC 4252, section 7).
func signedRequest(t *testing.T, c *transport.Conn, user string, key ssh.Signer) []byte {
	t.Helper()
	request := authRequest(user, "publickey", ssh.Marshal(struct {
		Signed         bool
		Algorithm, Key string
	}{true, ssh.KeyAlgoED25519, string(key.PublicKey().Marshal())}))
	data := append(ssh.Marshal(struct{ Session string }{string(c.SessionID())}), request...)
	signature, err := key.Sign(nil, data)
	if err != nil {
		t.Fatal(err)
	}
	return append(request, ssh.Marshal(struct{ Signature string }{string(ssh.Marshal(signature))})...)
}

// TestBannerFirst: the banner comes before the answer to a client's first request, for
// each method.
func TestBannerFirst(t *testing.T) {
	for _, method := range []string{"none", "password", "publickey"} {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newTestGateway(t)
				gw.srv.Banner = "Hello.\r\n"
				c, served := gw.connectRaw(t)
				defer func() { c.Close(); <-served }()
				var rest []byte
				switch method {
				case "password":
					rest = ssh.Marshal(struct {
						Change   bool
						Password string
					}{false, "x"})
				case "publickey": // ssh-rsa, which is SHA-1
					rest = ssh.Marshal(struct {
						Signed         bool
						Algorithm, Key string
					}{false, "ssh-rsa", "x"})
				}
				for range 2 {
					send(t, c, authRequest("alice", method, rest))
				}
				for i, want := range []byte{53, 51, 51} { // BANNER, FAILURE, FAILURE
					if p := receive(t, c); p[0] != want {
						t.Fatalf("answer %d is %d %q, want a message %d", i, p[0], p, want)
					}
				}
			})
		})
	}
}

// TestClientLeavesWhileStarting: the connection ends if the client leaves while its bastion
// is starting, even if it has sent a request without waiting for the answer.
func TestClientLeavesWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.boot, gw.clientVersion = time.Hour, "SSH-2.0-phpseclib_3.0 (openssl)"
		c, served := gw.connectRaw(t)
		signed := signedRequest(t, c, "alice", gw.alice)
		send(t, c, signed, authRequest("alice", "none", nil))
		if p := receive(t, c); p[0] != 53 { // that the bastion is starting
			t.Fatalf("got %d %q", p[0], p)
		}
		began := time.Now()
		c.Close()
		<-served
		if took := time.Since(began); took > 3*progressInterval {
			t.Errorf("the connection ended %v after the client had left", took)
		}
	})
}

// TestWrongSignatureNamesKey: if a wrong signature comes without a query before, the audit
// log has the key's fingerprint.
func TestWrongSignatureNamesKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		c, served := gw.connectRaw(t)
		send(t, c, signedRequest(t, c, "alice", stolenKey{gw.alice.PublicKey(), gw.bob}))
		if p := receive(t, c); p[0] != 51 { // FAILURE
			t.Fatalf("got %d %q", p[0], p)
		}
		c.Close()
		<-served
		for _, e := range events() {
			if e.Type == audit.LoginRefused {
				if want := auth.Fingerprint(gw.alice.PublicKey()); e.Key != want || !strings.Contains(e.Reason, "signature") {
					t.Errorf("key %q, reason %q; want key %s and a reason about the signature", e.Key, e.Reason, want)
				}
				return
			}
		}
		t.Error("no login-refused event")
	})
}

// usedCode is a SecondFactor that refuses every code as used.
type usedCode struct{}

func (usedCode) Needs(string) (bool, error) { return true, nil }

func (usedCode) Check(context.Context, string, string, time.Time) error { return auth.ErrCodeUsed }

// TestAbandonedAfterWrongCode: if a client abandons keyboard-interactive after a wrong
// code, at the text that explains it, the attempt counts and only the next request is
// answered.
func TestAbandonedAfterWrongCode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		gw.srv.SecondFactor, gw.srv.MaxAuthTries = usedCode{}, 3
		c, served := gw.connectRaw(t)
		defer func() { c.Close(); <-served }()
		expect := func(want byte) {
			t.Helper()
			for {
				p := receive(t, c)
				if p[0] == 53 { // BANNER
					continue
				}
				if p[0] != want {
					t.Fatalf("got %d %q, want message %d", p[0], p, want)
				}
				return
			}
		}
		send(t, c, signedRequest(t, c, "alice", gw.alice))
		expect(51) // FAILURE, partial success
		start := authRequest("alice", "keyboard-interactive", ssh.Marshal(struct{ Language, Submethods string }{}))
		send(t, c, start)
		for range 3 {
			expect(60) // INFO_REQUEST for the code
			send(t, c, ssh.Marshal(struct {
				N    uint32 `sshtype:"61"`
				Code string
			}{1, "123456"}))
			expect(60) // with the text
			send(t, c, start)
		}
		for {
			p, err := c.ReadPacket()
			if err != nil {
				break
			}
			if p[0] != 53 {
				t.Fatalf("got %d %q after the third attempt, want the end", p[0], p)
			}
		}
	})
}
