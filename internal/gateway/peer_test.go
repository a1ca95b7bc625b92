package gateway

import (
	"context"
	"errors"
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
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// peerCert signs a certificate with which gateway a logs in to the gateway to.
func peerCert(t *testing.T, fleet ssh.Signer, to string) ssh.Signer {
	t.Helper()
	signer, err := sshca.SignPeer(fleet, identity.Peer{Gateway: "a-1", User: "root", ConnID: "conn1", Admin: true}, to, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// takePeers lets gateways with certificates of fleet log in, as to gateway b.
func (gw *testGateway) takePeers(fleet ssh.Signer) {
	v := sshca.PeerVerifier{Fleet: []ssh.PublicKey{fleet.PublicKey()}, Gateway: "b-1"}
	gw.srv.Peer = v.Verify
}

// TestPeerLogin: another gateway opens the console for a user, and the audit log names both.
func TestPeerLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		fleet := sshtest.NewKey(t)
		gw.takePeers(fleet)
		gw.srv.MaxConnectionsPerUser = 1
		var got ConsoleConn
		gw.srv.Console = func(ctx context.Context, c ConsoleConn) error {
			got = c
			if err := c.Audit(audit.Event{Type: audit.Exec, Command: "kick bob"}); err != nil {
				t.Error(err)
			}
			return plainConsole(ctx, c)
		}
		for range 3 { // the limit of connections is for users
			c, err := gw.connect(t.Context(), PeerUser, peerCert(t, fleet, "b-1"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			synctest.Wait()
		}
		id := got.Identity
		if id.User != "root" || id.Profile != "ctl" || id.Via != "a-1" || id.ViaConn != "conn1" || !id.Permissions.Admin || id.Permissions.PTY {
			t.Errorf("identity %+v", id)
		}
		if len(gw.dials) != 0 {
			t.Error("a bastion was dialled")
		}
		synctest.Wait()
		seen := map[audit.Type]int{}
		for _, e := range events() {
			if e.User == "" {
				continue
			}
			seen[e.Type]++
			if e.User != "root" || e.Profile != "ctl" || e.Via != "a-1" || e.ViaConn != "conn1" {
				t.Errorf("event %+v", e)
			}
		}
		if seen[audit.Login] != 3 || seen[audit.Exec] != 3 {
			t.Errorf("events %v", seen)
		}
	})
}

// TestPeerEnds: a gateway's connection ends with its certificate, and with the fleet key.
func TestPeerEnds(t *testing.T) {
	for _, tt := range []struct {
		name   string
		reload bool
		within time.Duration
	}{{"expired", false, sshca.Lifetime + 3*recheckInterval}, {"another fleet key", true, 3 * recheckInterval}} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newTestGateway(t)
				fleet := sshtest.NewKey(t)
				gw.takePeers(fleet)
				gw.srv.Console = plainConsole
				ctx, cancel := context.WithCancel(t.Context())
				ln := sshtest.NewListener()
				served := make(chan error, 1)
				go func() { served <- gw.srv.Serve(ctx, ln) }()
				near, err := ln.Dial()
				if err != nil {
					t.Fatal(err)
				}
				c, err := loginOn(near, PeerUser, peerCert(t, fleet, "b-1"))
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				if tt.reload {
					next := gw.srv.Settings
					next.Peer = sshca.PeerVerifier{Fleet: []ssh.PublicKey{sshtest.NewKey(t).PublicKey()}, Gateway: "b-1"}.Verify
					gw.srv.Reload(next)
				}
				c.Wait()
				if took := time.Since(began); took > tt.within {
					t.Errorf("ended after %v", took)
				}
				cancel()
				<-served
			})
		})
	}
}

// TestHostilePeers: nothing but a gateway's certificate for this gateway logs in under the
// name of gateways, and it logs in under no other name. The gateway is misconfigured: its
// fleet key is also trusted for users, and there is a file of keys with the reserved name.
func TestHostilePeers(t *testing.T) {
	fleet, ca, stranger := sshtest.NewKey(t), sshtest.NewKey(t), sshtest.NewKey(t)
	dir := t.TempDir()
	keysDir := filepath.Join(dir, "keys")
	if err := os.Mkdir(keysDir, 0o700); err != nil {
		t.Fatal(err)
	}
	alice := sshtest.NewKey(t)
	line := string(ssh.MarshalAuthorizedKey(alice.PublicKey()))
	for _, name := range []string{"alice", PeerUser, "root"} {
		if err := os.WriteFile(filepath.Join(keysDir, name), []byte(line), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cas := filepath.Join(dir, "cas")
	if err := os.WriteFile(cas, append(ssh.MarshalAuthorizedKey(ca.PublicKey()), ssh.MarshalAuthorizedKey(fleet.PublicKey())...), 0o600); err != nil {
		t.Fatal(err)
	}
	keys := &auth.Keys{Dir: keysDir, TrustedUserCAKeys: []string{cas}}

	certified := func(signer ssh.Signer, options map[string]string, principals ...string) ssh.Signer {
		cert := &ssh.Certificate{
			Key: alice.PublicKey(), CertType: ssh.UserCert, KeyId: "root/conn1", ValidPrincipals: principals, ValidBefore: ssh.CertTimeInfinity,
			Permissions: ssh.Permissions{CriticalOptions: options, Extensions: map[string]string{"admin@sallyport": ""}},
		}
		sshtest.SignCert(t, cert, signer)
		s, err := ssh.NewCertSigner(cert, alice)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	toBastion := func(principal string) ssh.Signer {
		s, err := sshca.Sign(fleet, identity.Identity{User: "root", ConnID: "conn1", Permissions: identity.AllowAll()}, principal, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	purpose := map[string]string{"gateway-peer@sallyport": "a-1"}
	good := peerCert(t, fleet, "b-1")
	for _, tt := range []struct {
		name, user string
		key        ssh.Signer
		noPeers    bool // the gateway shares its table with no other
		ok         bool
	}{
		{name: "a gateway", user: PeerUser, key: good, ok: true},
		{name: "a gateway, where there are none", user: PeerUser, key: good, noPeers: true},
		{name: "a gateway on the way to another", user: PeerUser, key: peerCert(t, fleet, "c-1")},
		{name: "a gateway of another fleet", user: PeerUser, key: peerCert(t, stranger, "b-1")},
		{name: "a gateway's certificate without its key", user: PeerUser, key: stolenKey{good.PublicKey(), stranger}},
		{name: "a login to a bastion", user: PeerUser, key: toBastion("task-1")},
		{name: "a login to a bastion with this gateway's principal", user: PeerUser, key: toBastion("gateway/b-1")},
		{name: "a user's key", user: PeerUser, key: alice},
		{name: "a user's certificate", user: PeerUser, key: certified(ca, nil, "alice", PeerUser, "gateway/b-1")},
		{name: "a user's certificate with the purpose of gateways", user: PeerUser, key: certified(ca, purpose, "alice", PeerUser, "gateway/b-1")},
		{name: "the fleet key itself", user: PeerUser, key: fleet},
		{name: "a gateway as alice", user: "alice", key: good},
		{name: "a gateway as alice on the console", user: "alice+ctl", key: good},
		{name: "a gateway as root on the console", user: "root+ctl", key: good},
		{name: "a gateway's certificate that names alice, as alice", user: "alice+ctl", key: certified(fleet, purpose, "alice", "gateway/b-1")},
		{name: "a user with the reserved name and a profile", user: PeerUser + "+ctl", key: alice},
		{name: "a gateway with the reserved name and a profile", user: PeerUser + "+ctl", key: good},
		{name: "a gateway without the plus", user: "gateway", key: good},
		{name: "a gateway with another case", user: "+Gateway", key: good},
		{name: "a gateway with a blank", user: PeerUser + " ", key: good},
		{name: "alice herself", user: "alice+ctl", key: alice, ok: true},
		{name: "alice by a certificate", user: "alice+ctl", key: certified(ca, nil, "alice"), ok: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			gw := newTestGateway(t)
			gw.takePeers(fleet)
			if tt.noPeers {
				gw.srv.Peer = nil
			}
			gw.srv.Authorize = keys.Authorize
			gw.srv.Console = plainConsole
			c, err := gw.connect(t.Context(), tt.user, tt.key)
			if (err == nil) != tt.ok {
				t.Errorf("the login ended with %v; shown %q", err, c.shown())
			}
			if err == nil {
				c.Close()
			}
			if strings.Contains(gw.logged(), "panic") {
				t.Error(gw.logged())
			}
		})
	}
}

// TestRevokedUser: a revoked user is refused after her key is proven, with a sentence and no
// penalty, and her open connections end within seconds. So do other gateways' that act for her.
func TestRevokedUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		fleet := sshtest.NewKey(t)
		gw.takePeers(fleet)
		gw.srv.Console = plainConsole
		revoked := map[string]bool{}
		gw.srv.Revoked = func(user string, _ time.Time) error {
			gw.mu.Lock()
			defer gw.mu.Unlock()
			if revoked[user] {
				return errors.New("the user is revoked by root: a stolen laptop")
			}
			return nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		ln := sshtest.NewListener()
		served := make(chan error, 1)
		go func() { served <- gw.srv.Serve(ctx, ln) }()
		login := func(user string, key ssh.Signer) (*client, error) {
			near, err := ln.Dial()
			if err != nil {
				t.Fatal(err)
			}
			return loginOn(near, user, key)
		}
		var ends []*client
		for _, user := range []string{"alice", "alice+ctl"} {
			c, err := login(user, gw.alice)
			if err != nil {
				t.Fatal(err)
			}
			ends = append(ends, c)
		}
		c, err := login(PeerUser, peerCert(t, fleet, "b-1")) // for root
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, c)
		bob, err := login("bob", gw.bob)
		if err != nil {
			t.Fatal(err)
		}
		told := startShell(t, ends[0])
		time.Sleep(time.Minute)
		gw.mu.Lock()
		revoked["alice"], revoked["root"] = true, true
		gw.mu.Unlock()
		began := time.Now()
		for _, c := range ends {
			c.Wait()
		}
		if took := time.Since(began); took > 2*recheckInterval+disconnectGrace {
			t.Errorf("the connections ended after %v", took)
		}
		synctest.Wait()
		if !strings.Contains(told(), "An administrator has revoked your access, so this connection ends.") || strings.Contains(told(), "laptop") {
			t.Errorf("the session read %q", told())
		}
		if _, err := bob.run("id"); err != nil {
			t.Errorf("another user's connection: %v", err)
		}
		dials := len(gw.dials)
		for user, key := range map[string]ssh.Signer{"alice": gw.alice, "alice+ctl": gw.alice, PeerUser: peerCert(t, fleet, "b-1")} {
			if c, err := gw.connect(ctx, user, key); err == nil || !strings.Contains(c.shown(), "an administrator has revoked your access for the time being") || strings.Contains(c.shown(), "laptop") {
				t.Errorf("%s: %v; shown %q", user, err, c.shown())
			}
		}
		// A stranger does not learn of it.
		if c, err := gw.connect(ctx, "alice", gw.bob); err == nil || c.shown() != "" {
			t.Errorf("a stranger: %v; shown %q", err, c.shown())
		}
		if len(gw.dials) != dials {
			t.Error("a bastion was dialled")
		}
		gw.mu.Lock()
		delete(revoked, "alice")
		gw.mu.Unlock()
		c, err = login("alice", gw.alice)
		if err != nil {
			t.Errorf("after a permit: %v", err)
		} else {
			c.Close()
		}
		bob.Close()
		cancel()
		<-served
		refused, ended := 0, 0
		for _, e := range events() {
			switch {
			case e.Type == audit.LoginRefused && strings.Contains(e.Reason, "a stolen laptop"):
				refused++
			case e.Type == audit.End && e.By == "gateway" && strings.Contains(e.Reason, "a stolen laptop"):
				ended++
			}
		}
		if refused != 3 || ended < 3 {
			t.Errorf("%d refused logins and %d ended connections in the audit log", refused, ended)
		}
	})
}
