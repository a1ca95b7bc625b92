package sshca

import (
	"bytes"
	"crypto/ed25519"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

const bastion = "task-1"

// gatewayOnly are the permissions that only the gateway enforces. Certificates do not carry
// them.
var gatewayOnly = map[string]bool{"Record": true, "Limits": true, "Admin": true}

// TestPermissions signs a certificate for each permission that a bastion enforces, and for
// all of them together. Verify must return the same permissions.
func TestPermissions(t *testing.T) {
	fleet := sshtest.NewKey(t)
	roundTrip := func(t *testing.T, p identity.Permissions) {
		t.Helper()
		id := identity.Identity{User: "alice", ConnID: "c1", Permissions: p}
		signer, err := Sign(fleet, id, bastion, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		got, err := Verifier{Fleet: []ssh.PublicKey{fleet.PublicKey()}, Principal: bastion}.Verify(signer.PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got.Permissions, p) {
			t.Errorf("signed\n%+v\nverified\n%+v", p, got.Permissions)
		}
	}
	all := identity.Permissions{}
	whole := reflect.ValueOf(&all).Elem()
	for i := range whole.NumField() {
		name := whole.Type().Field(i).Name
		if gatewayOnly[name] {
			continue
		}
		t.Run(name, func(t *testing.T) {
			one := identity.Permissions{}
			for _, field := range []reflect.Value{reflect.ValueOf(&one).Elem().Field(i), whole.Field(i)} {
				switch field.Interface().(type) {
				case bool:
					field.SetBool(true)
				case string:
					field.SetString("a 'command', with\n\"all\" sorts of # things")
				case []string:
					field.Set(reflect.ValueOf([]string{"one", "two=2", "[::1]:22"}))
				default:
					t.Fatalf("a permission of type %s: add it to gatewayOnly, or to this test", field.Type())
				}
			}
			roundTrip(t, one)
		})
	}
	roundTrip(t, all)
	roundTrip(t, identity.Permissions{})
	roundTrip(t, identity.AllowAll())
	roundTrip(t, identity.Permissions{Destinations: []string{"none"}, Listen: []string{"none"}, PermitOpen: []string{"none"}, PermitListen: []string{"none"}})
}

func TestIdentity(t *testing.T) {
	fleet := sshtest.NewKey(t)
	for _, want := range []identity.Identity{
		{User: "alice", ConnID: "c1"},
		{User: "alice", ConnID: "c/2"},
		{User: "alice", ConnID: "c3", Client: netip.MustParseAddrPort("192.0.2.1:55"), Server: netip.MustParseAddrPort("[2001:db8::1]:22")},
		{User: "alice", ConnID: "c4", Client: netip.MustParseAddrPort("[fe80::1%eth0]:55"), Server: netip.MustParseAddrPort("[fe80::2%eth0]:22")},
	} {
		signer, err := Sign(fleet, want, bastion, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		got, err := Verifier{Fleet: []ssh.PublicKey{fleet.PublicKey()}, Principal: bastion}.Verify(signer.PublicKey())
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
	}
}

func TestVerifyRejects(t *testing.T) {
	fleet, other := sshtest.NewKey(t), sshtest.NewKey(t)
	now := time.Now()
	tests := []struct {
		name   string
		change func(*ssh.Certificate)
		signer ssh.Signer
		later  time.Duration
		want   string // in the error
	}{
		{name: "unchanged", want: ""},
		{name: "another fleet", signer: other, want: "has not signed"},
		{name: "another bastion", change: func(c *ssh.Certificate) { c.ValidPrincipals = []string{"task-2"} }, want: "principal"},
		{name: "no principal", change: func(c *ssh.Certificate) { c.ValidPrincipals = nil }, want: "without principals"},
		{name: "a host certificate", change: func(c *ssh.Certificate) { c.CertType = ssh.HostCert }, want: "not a user certificate"},
		{name: "an unknown critical option", change: func(c *ssh.Certificate) { c.CriticalOptions["new-restriction@example.com"] = "" }, want: "unsupported critical option"},
		{name: "a key id without a connection", change: func(c *ssh.Certificate) { c.KeyId = "alice" }, want: "USER/CONNECTION"},
		{name: "a key id without a user", change: func(c *ssh.Certificate) { c.KeyId = "/c1" }, want: "USER/CONNECTION"},
		{name: "a malformed connection", change: func(c *ssh.Certificate) { c.Extensions[extConnection] = "1.2.3.4 x 5 6" }, want: "invalid port"},
		{name: "late", later: Lifetime + time.Second, want: "expired"},
		{name: "early", later: -skew - time.Minute, want: "not yet valid"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			good, err := Sign(fleet, identity.Identity{User: "alice", ConnID: "c1"}, bastion, now)
			if err != nil {
				t.Fatal(err)
			}
			cert := *good.PublicKey().(*ssh.Certificate)
			if tt.change != nil {
				tt.change(&cert)
			}
			if tt.signer == nil {
				tt.signer = fleet
			}
			sshtest.SignCert(t, &cert, tt.signer)
			_, err = Verifier{Fleet: []ssh.PublicKey{fleet.PublicKey()}, Principal: bastion, Now: func() time.Time { return now.Add(tt.later) }}.Verify(&cert)
			switch {
			case tt.want == "" && err != nil:
				t.Error(err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
	if _, err := (Verifier{Fleet: []ssh.PublicKey{fleet.PublicKey()}, Principal: bastion}).Verify(fleet.PublicKey()); err == nil {
		t.Error("a plain key was accepted")
	}
	if _, err := Sign(fleet, identity.Identity{User: "alice"}, "", now); err == nil {
		t.Error("signed a certificate without a principal")
	}
}

func FuzzRead(f *testing.F) {
	f.Add("alice/c1", "192.0.2.1 55 192.0.2.2 22", "none", "A=b\x00C=d")
	f.Add("alice/c1", "fe80::1%eth0 55 ::1 22", "", "")
	f.Add("/", "1 2 3", ",", "\x00")
	f.Fuzz(func(t *testing.T, keyID, connection, destinations, environment string) {
		cert := &ssh.Certificate{Key: fuzzKey, KeyId: keyID, Permissions: ssh.Permissions{
			CriticalOptions: map[string]string{optDestinations: destinations},
			Extensions:      map[string]string{extConnection: connection, extEnvironment: environment},
		}}
		id, err := read(cert)
		if err != nil {
			return
		}
		if id.User == "" || strings.Contains(id.User, "/") || !id.Client.IsValid() || !id.Server.IsValid() {
			t.Errorf("%q, %q: %+v", keyID, connection, id)
		}
		if len(id.Permissions.Destinations) == 0 {
			t.Errorf("destinations %q do not restrict", destinations)
		}
	})
}

var fuzzKey = func() ssh.PublicKey {
	key, err := ssh.NewPublicKey(ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)))
	if err != nil {
		panic(err)
	}
	return key
}()

func TestKeys(t *testing.T) {
	one, two := sshtest.NewKey(t).PublicKey(), sshtest.NewKey(t).PublicKey()
	keys, err := ParseKeys(FormatKeys([]ssh.PublicKey{one, two}) + "\n")
	if err != nil || len(keys) != 2 || !bytes.Equal(keys[0].Marshal(), one.Marshal()) || !bytes.Equal(keys[1].Marshal(), two.Marshal()) {
		t.Errorf("got %v, %v", keys, err)
	}
	for _, text := range []string{"", "\n", "nonsense", FormatKeys([]ssh.PublicKey{one}) + "\nnonsense"} {
		if keys, err := ParseKeys(text); err == nil {
			t.Errorf("%q: %v", text, keys)
		}
	}
}
