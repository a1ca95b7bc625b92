package userauth

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"errors"
	"math/big"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

var errSignature = errors.New("signature did not verify")

// Flags of a FIDO key (OpenSSH's PROTOCOL.u2f).
const (
	flagUserPresent  = 1 << 0
	flagUserVerified = 1 << 2
)

// verifySK verifies the signature of a FIDO key (OpenSSH's PROTOCOL.u2f, SSH U2F
// signatures). It is not done by package ssh, because that requires the user's
// presence, which a line of authorized_keys may waive, and does not return the flags.
func verifySK(key ssh.PublicKey, data []byte, signature *ssh.Signature) (present, verified bool, err error) {
	// Package ssh exports neither the application nor the public key.
	f := sshmsg.NewReader(key.Marshal())
	if keyType := f.String(); keyType == ssh.KeyAlgoSKECDSA256 {
		f.Bytes() // the curve, which is P-256
	}
	public, application := f.Bytes(), f.Bytes()
	if f.End() != nil || len(signature.Rest) != 5 {
		return false, false, errSignature
	}
	flagsAndCounter := signature.Rest
	applicationHash, dataHash := sha256.Sum256(application), sha256.Sum256(data)
	signed := append(applicationHash[:], flagsAndCounter...)
	signed = append(signed, dataHash[:]...)
	if !verifyFIDO(key.Type(), public, signed, signature.Blob) {
		return false, false, errSignature
	}
	flags := flagsAndCounter[0]
	return flags&flagUserPresent != 0, flags&flagUserVerified != 0, nil
}

func verifyFIDO(keyType string, public, signed, blob []byte) bool {
	if keyType == ssh.KeyAlgoSKED25519 {
		return len(public) == ed25519.PublicKeySize && ed25519.Verify(public, signed, blob)
	}
	var rs struct{ R, S *big.Int }
	if err := ssh.Unmarshal(blob, &rs); err != nil {
		return false
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), public)
	if err != nil {
		return false
	}
	hash := sha256.Sum256(signed)
	return ecdsa.Verify(key, hash[:], rs.R, rs.S)
}
