package sshca

import (
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

func TestPeer(t *testing.T) {
	fleet := sshtest.NewKey(t)
	for _, want := range []identity.Peer{
		{Gateway: "a-123456", User: "root", ConnID: "c1", Admin: true},
		{Gateway: "a-123456", User: "alice", ConnID: "c/2"},
	} {
		signer, err := SignPeer(fleet, want, "b-abcdef", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		got, err := PeerVerifier{Fleet: []ssh.PublicKey{fleet.PublicKey()}, Gateway: "b-abcdef"}.Verify(signer.PublicKey())
		if err != nil || got != want {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
	}
	for _, tt := range []struct{ from, to string }{{"", "b"}, {"a", ""}} {
		if _, err := SignPeer(fleet, identity.Peer{Gateway: tt.from, User: "root"}, tt.to, time.Now()); err == nil {
			t.Errorf("signed a certificate from %q for %q", tt.from, tt.to)
		}
	}
}

// TestPeerRejects presents certificates to a gateway that are not for it.
func TestPeerRejects(t *testing.T) {
	const here = "b-abcdef"
	fleet, other := sshtest.NewKey(t), sshtest.NewKey(t)
	now := time.Now()
	login := func(principal string, p identity.Permissions) func(*ssh.Certificate) {
		return func(c *ssh.Certificate) {
			signer, err := Sign(fleet, identity.Identity{User: "root", ConnID: "c1", Permissions: p}, principal, now)
			if err != nil {
				t.Fatal(err)
			}
			*c = *signer.PublicKey().(*ssh.Certificate)
		}
	}
	tests := []struct {
		name   string
		change func(*ssh.Certificate)
		signer ssh.Signer
		here   string
		later  time.Duration
		want   string // in the error
	}{
		{name: "unchanged"},
		{name: "another fleet", signer: other, want: "has not signed"},
		{name: "another gateway", here: "c-abcdef", want: "principal"},
		{name: "a gateway without an ID", here: "-", want: "has no ID"},
		{name: "a login to a bastion", change: login(bastion, identity.AllowAll()), want: "principal"},
		{name: "a login to a bastion with this gateway's ID", change: login(here, identity.AllowAll()), want: "principal"},
		{name: "a login to a bastion with this gateway's principal", change: login(peerPrefix+here, identity.AllowAll()), want: "not for gateways"},
		{name: "a restricted login with this gateway's principal", change: login(peerPrefix+here, identity.Permissions{NoExec: true}), want: "unsupported critical option"},
		{name: "an empty purpose", change: func(c *ssh.Certificate) { c.CriticalOptions[optPeer] = "" }, want: "not for gateways"},
		{name: "a purpose that is no critical option", change: func(c *ssh.Certificate) {
			c.CriticalOptions, c.Extensions = nil, map[string]string{optPeer: "a-123456", extAdmin: ""}
		}, want: "not for gateways"},
		{name: "every gateway", change: func(c *ssh.Certificate) { c.ValidPrincipals = nil }, want: "without principals"},
		{name: "a host certificate", change: func(c *ssh.Certificate) { c.CertType = ssh.HostCert }, want: "not a user certificate"},
		{name: "another restriction", change: func(c *ssh.Certificate) { c.CriticalOptions["force-command"] = "users" }, want: "unsupported critical option"},
		{name: "no user", change: func(c *ssh.Certificate) { c.KeyId = "/c1" }, want: "USER/CONNECTION"},
		{name: "late", later: Lifetime + time.Second, want: "expired"},
		{name: "early", later: -skew - time.Minute, want: "not yet valid"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			good, err := SignPeer(fleet, identity.Peer{Gateway: "a-123456", User: "root", ConnID: "c1", Admin: true}, here, now)
			if err != nil {
				t.Fatal(err)
			}
			cert := *good.PublicKey().(*ssh.Certificate)
			if tt.change != nil {
				tt.change(&cert)
			}
			signer := fleet
			if tt.signer != nil {
				signer = tt.signer
			}
			sshtest.SignCert(t, &cert, signer)
			v := PeerVerifier{Fleet: []ssh.PublicKey{fleet.PublicKey()}, Gateway: here, Now: func() time.Time { return now.Add(tt.later) }}
			switch tt.here {
			case "":
			case "-":
				v.Gateway = ""
			default:
				v.Gateway = tt.here
			}
			p, err := v.Verify(&cert)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %+v, %v, want an error with %q", p, err, tt.want)
			}
		})
	}
	if _, err := (PeerVerifier{Fleet: []ssh.PublicKey{fleet.PublicKey()}, Gateway: here}).Verify(fleet.PublicKey()); err == nil {
		t.Error("a plain key was accepted")
	}
}

// TestBastionRejectsPeer: a bastion rejects the certificate of a gateway, even one whose
// principal is the bastion's own.
func TestBastionRejectsPeer(t *testing.T) {
	fleet := sshtest.NewKey(t)
	good, err := SignPeer(fleet, identity.Peer{Gateway: "a-123456", User: "alice", ConnID: "c1", Admin: true}, bastion, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	v := Verifier{Fleet: []ssh.PublicKey{fleet.PublicKey()}, Principal: bastion}
	if id, err := v.Verify(good.PublicKey()); err == nil || !strings.Contains(err.Error(), "unsupported critical option") && !strings.Contains(err.Error(), "principal") {
		t.Errorf("the bastion read %+v, %v", id, err)
	}
	cert := *good.PublicKey().(*ssh.Certificate)
	cert.ValidPrincipals = []string{bastion}
	sshtest.SignCert(t, &cert, fleet)
	if id, err := v.Verify(&cert); err == nil || !strings.Contains(err.Error(), "unsupported critical option") {
		t.Errorf("with its own principal, the bastion read %+v, %v", id, err)
	}
}
