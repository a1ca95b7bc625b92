package transport

import (
	"errors"
	"testing"
)

// TestTolerated plays exchanges that are unusual and permitted.
func TestTolerated(t *testing.T) {
	weak := func(k *kexInit) { k.kex = []string{"curve25519-sha256"} } // not strict
	finish := func(m *mallory, serverInit []byte) {
		m.t.Helper()
		init, _, _ := kexMethods["curve25519-sha256"].client()
		m.send(appendString([]byte{msgKexOffer}, init)...)
		if got := m.answer(); got != "31" {
			m.t.Errorf("got %s, want a reply", got)
		}
	}
	t.Run("messages 2 to 4 within a key exchange that is not strict", func(t *testing.T) {
		m := attack(t, &Config{}, &Config{})
		m.versions()
		m.send(msgIgnore, 0, 0, 0, 0)
		k := m.proposal(true)
		weak(k)
		m.send(k.marshal()...)
		init := m.serverInit()
		m.send(msgDebug, 0, 0, 0, 0, 0, 0, 0, 0, 0)
		m.send(msgUnimplemented, 0, 0, 0, 0)
		finish(m, init)
	})
	t.Run("a wrong guess", func(t *testing.T) {
		m := attack(t, &Config{}, &Config{})
		init := m.begin(func(k *kexInit) {
			k.kex = []string{"diffie-hellman-group14-sha256", "curve25519-sha256", kexStrictClient}
			k.guess = true
		})
		m.send(append([]byte{msgKexOffer}, 1, 2, 3)...)
		finish(m, init)
	})
	t.Run("a wrong guess of the host key", func(t *testing.T) {
		m := attack(t, &Config{}, &Config{KexAlgorithms: []string{"curve25519-sha256"}})
		init := m.begin(func(k *kexInit) {
			k.kex = []string{"curve25519-sha256", kexStrictClient}
			k.hostKey = []string{"ssh-dss", "ssh-ed25519"}
			k.guess = true
		})
		m.send(append([]byte{msgKexOffer}, 1, 2, 3)...)
		finish(m, init)
	})
	t.Run("a right guess", func(t *testing.T) {
		m := attack(t, &Config{}, &Config{KexAlgorithms: []string{"curve25519-sha256"}})
		init := m.begin(func(k *kexInit) {
			k.kex = []string{"curve25519-sha256", kexStrictClient}
			k.guess = true
		})
		finish(m, init)
	})
	t.Run("DISCONNECT in place of a guess", func(t *testing.T) {
		m := attack(t, &Config{}, &Config{})
		m.begin(func(k *kexInit) { k.kex = []string{"x", "curve25519-sha256"}; k.guess = true })
		m.send(marshalDisconnect(ReasonByApplication, "bye")...)
		var d *DisconnectError
		if err := <-m.done; !errors.As(err, &d) || d.Message != "bye" {
			t.Errorf("server: %v", err)
		}
	})
	t.Run("AEAD without a common MAC", func(t *testing.T) {
		m := attack(t, &Config{}, &Config{})
		init := m.begin(func(k *kexInit) { weak(k); k.macCS, k.macSC = []string{"x"}, nil })
		finish(m, init)
	})
}

// TestNotStrict carries packets and key exchanges with a peer that does not know
// strict key exchange, so that sequence numbers go on.
func TestNotStrict(t *testing.T) {
	for _, cfg := range []Config{{}, {Ciphers: []string{"aes128-ctr"}, MACs: []string{"hmac-sha2-256-etm@openssh.com"}}} {
		m := attack(t, &cfg, &Config{RekeyBytes: 500})
		m.versions()
		m.send(msgIgnore, 0, 0, 0, 0) // so that they are not the same on both sides
		k := m.proposal(true)
		k.kex = []string{"curve25519-sha256"}
		m.kexInit = k.marshal()
		m.out.exchanging, m.out.holding = true, true
		close(*m.exchangeBegun.Load())
		m.send(m.kexInit...)
		if err := m.exchange(m.serverInit(), false); err != nil {
			t.Fatal(err)
		}
		m.server.LoggedIn()
		m.LoggedIn()
		for i := range 50 {
			ping := appendString([]byte{msgPing}, []byte{byte(i)})
			if err := m.WritePacket(ping); err != nil {
				t.Fatal(err)
			}
			m.Flush()
			if i%20 == 10 {
				m.Rekey()
			}
		}
		for pongs := 0; pongs < 50; {
			p, err := m.nextPacket()
			if err != nil {
				t.Fatal(err)
			}
			switch p[0] {
			case msgPong:
				if p[5] != byte(pongs) {
					t.Errorf("PONG %d in place of %d", p[5], pongs)
				}
				pongs++
			case msgKexInit:
				if err := m.exchange(p, false); err != nil {
					t.Fatal(err)
				}
			}
		}
		if m.strict || m.server.strict || m.in.seq < 50 {
			t.Errorf("strict %t, %t; sequence number %d", m.strict, m.server.strict, m.in.seq)
		}
		m.end()
	}
}
