package sshca

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// This file has the certificates with which one gateway logs in to the console of another,
// for a user of its own console. Bastions and gateways trust the same fleet key, so the
// two kinds of certificate exclude each other twice:
//
//   - The principal of a peer's certificate begins with peerPrefix, which no principal of a
//     bastion does.
//   - It has the critical option optPeer, which bastions do not know, and without which a
//     gateway rejects a certificate.

const (
	// peerPrefix and the ID of the gateway that is logged in to are the principal.
	peerPrefix = "gateway/"
	// optPeer has the ID of the gateway that logs in.
	optPeer = "gateway-peer@sallyport"
	// extAdmin is a grant and not a restriction, so it is an extension.
	extAdmin = "admin@sallyport"
)

// SignPeer generates a key and signs a certificate with which p logs in to the gateway
// whose ID is to. It returns both as one signer. The key exists in memory only.
func SignPeer(fleet ssh.Signer, p identity.Peer, to string, now time.Time) (ssh.Signer, error) {
	if p.Gateway == "" || to == "" {
		return nil, errors.New("a certificate for a gateway needs the IDs of both gateways")
	}
	permissions := ssh.Permissions{CriticalOptions: map[string]string{optPeer: p.Gateway}}
	if p.Admin {
		permissions.Extensions = map[string]string{extAdmin: ""}
	}
	signer, err := sign(fleet, p.User+"/"+p.ConnID, peerPrefix+to, permissions, now)
	if err != nil {
		return nil, fmt.Errorf("signing a certificate for the gateway %s: %w", to, err)
	}
	return signer, nil
}

// A PeerVerifier verifies the certificates of logins to one gateway's console by others.
type PeerVerifier struct {
	// Fleet are the public keys of the fleet's certificate authority.
	Fleet []ssh.PublicKey
	// Gateway is this gateway's ID. It must not be empty.
	Gateway string
	// Now returns the time; nil means time.Now.
	Now func() time.Time
}

// Verify checks that key is a certificate for a login to this gateway by another one.
//
// The caller must verify that the client has signed with key.
func (v PeerVerifier) Verify(key ssh.PublicKey) (identity.Peer, error) {
	if v.Gateway == "" {
		return identity.Peer{}, errors.New("this gateway has no ID")
	}
	cert, err := Verifier{Fleet: v.Fleet, Principal: peerPrefix + v.Gateway, Now: v.Now}.check(key, []string{optPeer})
	if err != nil {
		return identity.Peer{}, err
	}
	p := identity.Peer{Gateway: cert.CriticalOptions[optPeer]}
	if p.Gateway == "" {
		return identity.Peer{}, errors.New("a certificate of the fleet that is not for gateways")
	}
	if p.User, p.ConnID, err = parseKeyID(cert.KeyId); err != nil {
		return identity.Peer{}, err
	}
	_, p.Admin = cert.Extensions[extAdmin]
	return p, nil
}
