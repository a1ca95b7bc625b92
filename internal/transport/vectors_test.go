package transport

import (
	"bytes"
	"crypto/ecdh"
	"crypto/mlkem"
	"encoding/json"
	"math/big"
	"os"
	"strings"
	"testing"
)

// A vector is a key exchange between paramiko and OpenSSH, and the packets after it.
// See testdata/vectors.py.
type vector struct {
	Kex, Cipher, MAC string
	ClientVersion    []byte `json:"client_version"`
	ServerVersion    []byte `json:"server_version"`
	ClientInit       []byte `json:"client_init"` // KEXINIT
	ServerInit       []byte `json:"server_init"`
	ClientValue      []byte `json:"client_value"`
	ServerValue      []byte `json:"server_value"`
	HostKey          []byte `json:"host_key"`
	Signature        []byte
	Private          []byte            // the client's
	Secret           []byte            // as it is hashed
	Hash             []byte            // which is the session identifier, too
	Keys             map[string][]byte // A to F (RFC 4253 section 7.2)
	Packets          []struct {
		From          string
		Seq           uint32
		Wire, Payload []byte
	}
}

func vectors(t *testing.T) (all []vector) {
	data, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

// TestVectors computes with the inputs of each vector, and wants its results.
func TestVectors(t *testing.T) {
	for _, v := range vectors(t) {
		t.Run(strings.TrimSpace(v.Kex+" "+v.Cipher+" "+v.MAC), func(t *testing.T) {
			v.negotiation(t)
			v.exchange(t)
			for _, direction := range []struct{ from, letters string }{{"client", "ACE"}, {"server", "BDF"}} {
				v.packets(t, direction.from, direction.letters)
			}
		})
	}
}

func (v *vector) negotiation(t *testing.T) {
	client, err := parseKexInit(v.ClientInit)
	if err != nil {
		t.Fatal(err)
	}
	server, err := parseKexInit(v.ServerInit)
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := negotiate(client, server, true)
	want := Algorithms{Kex: v.Kex, HostKey: "ssh-ed25519", CipherIn: v.Cipher, CipherOut: v.Cipher, MACIn: v.MAC, MACOut: v.MAC}
	if err != nil || got != want {
		t.Errorf("negotiated %+v, %v; want %+v", got, err, want)
	}
}

// exchange wants the shared secret, the exchange hash and the keys, and the server's
// signature to be of that hash.
func (v *vector) exchange(t *testing.T) {
	if secret, err := v.agree(); err != nil || !bytes.Equal(secret, v.Secret) {
		t.Errorf("shared secret %x, %v; want %x", secret, err, v.Secret)
	}
	method := kexMethods[v.Kex]
	h := method.hash()
	for _, s := range [][]byte{v.ClientVersion, v.ServerVersion, v.ClientInit, v.ServerInit} {
		h.Write(appendString(nil, s))
	}
	hash := exchangeHash(h, v.HostKey, v.ClientValue, v.ServerValue, v.Secret)
	if !bytes.Equal(hash, v.Hash) {
		t.Errorf("exchange hash %x, want %x", hash, v.Hash)
	}
	c := &Conn{cfg: &Config{HostKey: anyHostKey}}
	if err := c.checkHostKey("ssh-ed25519", v.HostKey, v.Signature, hash); err != nil {
		t.Errorf("the server's signature: %v", err)
	}
	keys := keySource{method.hash, v.Secret, hash, hash}
	for letter, want := range v.Keys {
		if got := keys.derive(letter[0], len(want)); !bytes.Equal(got, want) {
			t.Errorf("key %s is %x, want %x", letter, got, want)
		}
	}
}

// agree returns the shared secret of the client's private key and the server's value.
func (v *vector) agree() ([]byte, error) {
	curves := map[string]ecdh.Curve{
		"curve25519-sha256@libssh.org": ecdh.X25519(),
		"ecdh-sha2-nistp256":           ecdh.P256(), "ecdh-sha2-nistp384": ecdh.P384(), "ecdh-sha2-nistp521": ecdh.P521(),
	}
	sizes := map[string]int{"ecdh-sha2-nistp521": 66, "ecdh-sha2-nistp384": 48}
	switch curve := curves[v.Kex]; {
	case curve != nil:
		size := max(sizes[v.Kex], 32)
		private, err := curve.NewPrivateKey(append(make([]byte, size-len(v.Private)), v.Private...))
		if err != nil {
			return nil, err
		}
		secret, err := agree(private, v.ServerValue)
		return appendMPInt(nil, secret), err
	case v.Kex == "diffie-hellman-group14-sha256":
		return dhAgree(new(big.Int).SetBytes(v.Private), v.ServerValue)
	}
	decapsulation, err := mlkem.NewDecapsulationKey768(v.Private[:mlkem.SeedSize])
	if err != nil {
		return nil, err
	}
	postQuantum, err := decapsulation.Decapsulate(v.ServerValue[:mlkem.CiphertextSize768])
	if err != nil {
		return nil, err
	}
	private, err := ecdh.X25519().NewPrivateKey(v.Private[mlkem.SeedSize:])
	if err != nil {
		return nil, err
	}
	classical, err := agree(private, v.ServerValue[mlkem.CiphertextSize768:])
	return hybridSecret(postQuantum, classical), err
}

// packets opens the packets of one side, and then the packets that seal makes of their payloads:
// the padding is random, so that seal cannot be compared.
func (v *vector) packets(t *testing.T, from, letters string) {
	keys := keySource{kexMethods[v.Kex].hash, v.Secret, v.Hash, v.Hash}
	theirs := keys.protection(letters, v.Cipher, v.MAC)
	sealer, opener := keys.protection(letters, v.Cipher, v.MAC), keys.protection(letters, v.Cipher, v.MAC)
	opened := 0
	for _, p := range v.Packets {
		if p.From != from {
			continue
		}
		opened++
		for name, open := range map[string]struct {
			protection
			wire []byte
		}{"of OpenSSH or paramiko": {theirs, p.Wire}, "of seal": {opener, sealer.seal(nil, p.Seq, p.Payload)}} {
			size, err := open.size(open.wire, maxPacketLength)
			if err != nil || size != len(open.wire) {
				t.Fatalf("packet %d from the %s, %s: size %d, %v; want %d", p.Seq, from, name, size, err, len(open.wire))
			}
			if payload, err := open.open(open.wire, p.Seq); err != nil || !bytes.Equal(payload, p.Payload) {
				t.Fatalf("packet %d from the %s, %s: opened as %x, %v; want %x", p.Seq, from, name, payload, err, p.Payload)
			}
		}
	}
	if opened < 2 {
		t.Errorf("%d packets from the %s", opened, from)
	}
}

// TestVectorsAreComplete wants each cipher and MAC, and each method that is
// implemented, to have a vector.
func TestVectorsAreComplete(t *testing.T) {
	missing := map[string]bool{}
	for _, cfg := range combinations() {
		missing[cfg.testName()] = cfg.HostKeyAlgorithms == nil
	}
	missing["curve25519-sha256"] = false // another name of curve25519-sha256@libssh.org
	for _, v := range vectors(t) {
		missing[v.Kex] = false
		missing[strings.TrimSpace(v.Cipher+" "+v.MAC)] = false
	}
	for name, yes := range missing {
		if yes {
			t.Errorf("no vector for %s", name)
		}
	}
}
