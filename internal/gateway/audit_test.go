package gateway

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/record"
	"github.com/sallyport-ssh/sallyport/internal/relay"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// TestLoginRefused checks the login-refused events of failed logins.
func TestLoginRefused(t *testing.T) {
	ca := sshtest.NewKey(t)
	certify := func(key ssh.Signer) ssh.Signer {
		cert := &ssh.Certificate{Key: key.PublicKey(), Serial: 7, CertType: ssh.UserCert, KeyId: "alice@laptop", ValidPrincipals: []string{"alice", "ops"}, ValidBefore: ssh.CertTimeInfinity}
		if err := cert.SignCert(rand.Reader, ca); err != nil {
			t.Fatal(err)
		}
		signer, err := ssh.NewCertSigner(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return signer
	}
	const certificate = "alice@laptop 7 [alice ops]"
	for _, tt := range []struct {
		name        string
		keys        func(gw *testGateway) []ssh.Signer
		roles       policy.Roles
		auth        ssh.AuthMethod // in place of keys
		certificate string
		by          string // authorized_by
		reason      string
	}{
		{name: "a plain key", keys: func(*testGateway) []ssh.Signer { return []ssh.Signer{sshtest.NewKey(t)} }, reason: "not a key of this user"},
		{name: "a certificate", keys: func(*testGateway) []ssh.Signer { return []ssh.Signer{certify(sshtest.NewKey(t))} }, certificate: certificate, reason: "not a key of this user"},
		{name: "hers, and not proven", keys: func(gw *testGateway) []ssh.Signer {
			return []ssh.Signer{stolenKey{certify(gw.bob).PublicKey(), sshtest.NewKey(t)}}
		}, certificate: certificate, reason: "signature"},
		{name: "hers, without a role", keys: func(gw *testGateway) []ssh.Signer { return []ssh.Signer{certify(gw.bob)} }, roles: policy.Roles{}, certificate: certificate, by: "ca.pub:1", reason: "no role"},
		{name: "no key at all", keys: func(*testGateway) []ssh.Signer { return nil }, reason: "left without logging in"},
		{name: "a password", auth: ssh.Password("x"), reason: "left without logging in"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newTestGateway(t)
				events := gw.auditTo(t)
				gw.srv.Roles = tt.roles
				gw.srv.Authorize = func(_ string, key ssh.PublicKey, _ netip.Addr, _ time.Time) (auth.Grant, error) {
					if auth.Fingerprint(key) == auth.Fingerprint(gw.bob.PublicKey()) {
						return auth.Grant{Permissions: identity.AllowAll(), Line: "ca.pub:1"}, nil
					}
					return auth.Grant{}, errors.New("not a key of this user")
				}
				method := tt.auth
				if method == nil {
					method = ssh.PublicKeys(tt.keys(gw)...)
				}
				nc, served := gw.dialFrom(t.Context(), "203.0.113.7")
				if _, _, _, err := ssh.NewClientConn(nc, "gateway", &ssh.ClientConfig{User: "alice+big", Auth: []ssh.AuthMethod{method}, HostKeyCallback: ssh.InsecureIgnoreHostKey()}); err == nil {
					t.Fatal("logged in")
				}
				nc.Close()
				<-served
				var refused []audit.Event
				for _, e := range events() {
					if e.Type == audit.LoginRefused {
						refused = append(refused, e)
					}
				}
				if len(refused) != 1 {
					t.Fatalf("%d login-refused events, want 1", len(refused))
				}
				e := refused[0]
				got := ""
				if c := e.Certificate; c != nil {
					got = fmt.Sprintf("%s %d %v", c.ID, c.Serial, c.Principals)
				}
				if e.User != "alice" || e.Profile != "big" || got != tt.certificate || e.AuthorizedBy != tt.by || !strings.Contains(e.Reason, tt.reason) || (e.Key != "") != (tt.keys != nil && tt.name != "no key at all") {
					t.Errorf("the event is %+v with certificate %q, want %+v", e, got, tt)
				}
				if !strings.Contains(gw.logged(), "user=alice") {
					t.Errorf("the operator's log does not name the user:\n%s", gw.logged())
				}
			})
		})
	}
}

// FuzzSession sends arbitrary requests on a session. The bastion grants those that are
// valid in its state, and refuses some at random. If a program runs on a terminal, the
// session is recorded.
func FuzzSession(f *testing.F) {
	kinds := []string{
		"pty-req", "shell", "exec", "subsystem", "window-change", "env", "signal", "x11-req", // of a client
		"exit-status", "exit-signal", // of the bastion
	}
	const quiet, refused = 0x10, 0x20
	step := func(kind byte, payload any) []byte {
		p := ssh.Marshal(payload)
		return append([]byte{kind, byte(len(p))}, p...)
	}
	type size struct{ Columns, Rows, Width, Height uint32 }
	pty := func(flags byte) []byte { return step(flags, terminalRequest{"xterm", 80, 24, 0, 0, "\x00"}) }
	shell := []byte{1, 0}
	text := func(s string) any { return struct{ S string }{s} }
	join := func(steps ...[]byte) (all []byte) {
		for _, s := range steps {
			all = append(all, s...)
		}
		return all
	}
	f.Add(join(pty(0), shell))
	f.Add(join(pty(0), pty(0), shell))
	f.Add(join(pty(quiet), pty(0), shell))
	f.Add(join(pty(refused), pty(0), pty(quiet), shell))
	f.Add(join(pty(refused), shell))
	f.Add(join(pty(0), step(4, size{132, 50, 0, 0}), step(2, text("ls")), step(4, size{1 << 31, 0, 0, 0}), step(8, struct{ N uint32 }{3})))
	f.Add(join(step(3, text("sftp")), step(9, struct {
		Name string
		Core bool
		A, B string
	}{"KILL", false, "", ""})))
	f.Add([]byte{0, 3, 0, 0, 0, 1, 0})

	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, steps []byte) {
		s := &Server{Settings: Settings{Recordings: &record.Store{Dir: filepath.Join(dir, t.Name())}}, Log: slog.New(slog.DiscardHandler)}
		defer os.RemoveAll(s.Recordings.Dir)
		c := &conn{srv: s, cfg: &s.Settings, ref: "abcdefgh", log: s.Log, began: time.Now(), identity: identity.Identity{User: "alice", Profile: "default"}}
		gw := &watcher{conn: c, mode: identity.RecordInput}
		ch, err := gw.Open(relay.Opening{Kind: "session", FromClient: true})
		if err != nil {
			t.Fatal(err)
		}
		session := ch.(*sessionWatcher)
		taps := session.Taps()
		tty, started := false, false // at the bastion
		for len(steps) >= 2 {
			kind, flags, n := kinds[int(steps[0]&0xf)%len(kinds)], steps[0], min(int(steps[1]), len(steps)-2)
			payload := steps[2 : 2+n]
			steps = steps[2+n:]
			fromClient := kind != "exit-status" && kind != "exit-signal"
			if err := session.Request(kind, fromClient, payload); err != nil {
				t.Fatalf("%s: %v", kind, err)
			}
			taps.ToClient(payload, false)
			taps.ToBastion(payload, false)
			if !fromClient {
				continue
			}
			ok := flags&refused == 0
			switch kind {
			case "pty-req":
				var r terminalRequest
				ok = ok && !tty && !started && ssh.Unmarshal(payload, &r) == nil
				tty = tty || ok
			case "shell", "exec", "subsystem":
				ok = ok && !started
				started = started || ok
				if ok && tty && session.recording == nil {
					t.Fatal("a program runs on a terminal without a recording")
				}
			}
			if flags&quiet == 0 {
				session.Answered(kind, true, payload, ok)
			}
		}
		session.End(1, 2, false)
	})
}

// terminalRequest is the payload of a pty-req (RFC 4254, section 6.2).
type terminalRequest struct {
	Term                         string
	Columns, Rows, Width, Height uint32
	Modes                        string
}

// FuzzEvents makes events from arbitrary payloads. Each can be encoded as JSON.
func FuzzEvents(f *testing.F) {
	kinds := []string{
		"direct-tcpip", "forwarded-tcpip", "direct-streamlocal@openssh.com", "forwarded-streamlocal@openssh.com", "x11",
		"tcpip-forward", "cancel-tcpip-forward", "streamlocal-forward@openssh.com", "cancel-streamlocal-forward@openssh.com",
		"exec", "subsystem", "shell",
	}
	type hostPorts struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}
	f.Add(byte(0), ssh.Marshal(hostPorts{"db.internal", 5432, "::1", 1 << 31}), []byte{})
	f.Add(byte(1), ssh.Marshal(hostPorts{"a\nb", 0, "", 0}), []byte{})
	f.Add(byte(2), ssh.Marshal(struct {
		Path, Reserved string
		Zero           uint32
	}{"/run/x\x1b[0m", "", 0}), []byte{})
	f.Add(byte(4), ssh.Marshal(struct {
		Host string
		Port uint32
	}{"127.0.0.1", 6010}), []byte{})
	f.Add(byte(5), ssh.Marshal(struct {
		Host string
		Port uint32
	}{"", 0}), []byte{0, 0, 0x9c, 0x40})
	f.Add(byte(7), ssh.Marshal(struct{ Path string }{"/run/y"}), []byte{})
	f.Add(byte(9), ssh.Marshal(struct{ Command string }{"ls \xff"}), []byte{})
	f.Fuzz(func(t *testing.T, k byte, payload, reply []byte) {
		kind := kinds[int(k)%len(kinds)]
		events := []audit.Event{channelEvent(kind, payload), requestEvent(kind, payload)}
		if e, known := listenerEvent(kind, payload, reply); known {
			events = append(events, e)
		}
		var m hostPorts
		if kind == "direct-tcpip" && ssh.Unmarshal(payload, &m) == nil && events[0].Destination != sshmsg.HostPort(m.Host, m.Port) {
			t.Fatalf("destination %q, want %q", events[0].Destination, sshmsg.HostPort(m.Host, m.Port))
		}
		for _, e := range events {
			if _, err := json.Marshal(e); err != nil {
				t.Fatalf("%+v: %v", e, err)
			}
		}
	})
}
