package transport

import (
	"bytes"
	"crypto/ecdh"
	"crypto/mlkem"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

// A mallory is a client that sends arbitrary packets to a server of ours. It uses the
// parts of a Conn.
type mallory struct {
	*Conn
	t      testing.TB
	nc     net.Conn
	server *Conn
	done   chan error // of the server
}

// attack starts a server that does its handshake and then reads packets until it
// fails.
func attack(t testing.TB, cfg, serverConfig *Config) *mallory {
	t.Helper()
	nc, ns := tcpPipe(t)
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	cfg.HostKey = anyHostKey
	serverConfig.HostKeys = hostKeys()
	m := &mallory{Conn: NewClient(nc, cfg), t: t, nc: nc, server: NewServer(ns, serverConfig), done: make(chan error, 1)}
	go func() {
		err := m.server.Handshake()
		for err == nil {
			_, err = m.server.ReadPacket()
		}
		m.server.Close()
		m.done <- err
	}()
	return m
}

// send seals a payload as it is, also during a key exchange.
func (m *mallory) send(payload ...byte) {
	m.out.mu.Lock()
	m.out.seal(payload)
	m.out.mu.Unlock()
	m.Flush()
}

// sendBytes sends bytes that are no packet.
func (m *mallory) sendBytes(b ...byte) {
	m.sendRaw(string(b))
	m.Flush()
}

// begin does the exchange of versions and of KEXINIT, in which change may change
// ours, and takes the server's for an exchange that goes on.
func (m *mallory) begin(change func(k *kexInit)) (serverInit []byte) {
	m.t.Helper()
	m.versions()
	k := m.proposal(true)
	if change != nil {
		change(k)
	}
	m.kexInit = k.marshal()
	if k.guess {
		m.kexInit[len(m.kexInit)-5] = 1
	}
	m.out.exchanging, m.out.holding = true, true
	m.send(m.kexInit...)
	return m.serverInit()
}

func (m *mallory) versions() {
	m.t.Helper()
	if err := m.sendVersion(); err != nil {
		m.t.Fatal(err)
	}
	m.Flush()
	if err := m.readVersion(); err != nil {
		m.t.Fatal(err)
	}
}

func (m *mallory) serverInit() []byte {
	m.t.Helper()
	p, err := m.readKex(msgKexInit)
	if err != nil {
		m.t.Fatal(err)
	}
	return bytes.Clone(p)
}

// answer describes the next packet: "N" for a message, or the DISCONNECT.
func (m *mallory) answer() string {
	p, err := m.nextPacket()
	if err != nil {
		return err.Error()
	}
	if p[0] == msgDisconnect {
		var d *DisconnectError
		errors.As(parseDisconnect(p), &d)
		return fmt.Sprintf("disconnect %d: %s", d.Reason, d.Message)
	}
	return fmt.Sprint(p[0])
}

func (m *mallory) handshakeDone() {
	m.t.Helper()
	if err := m.Handshake(); err != nil {
		m.t.Fatal(err)
	}
	if m.server.cfg.Extensions != nil || m.strict {
		if p, err := m.nextPacket(); err != nil || p[0] != msgExtInfo {
			m.t.Fatalf("no EXT_INFO: %v %v", p, err)
		}
	}
}

// end closes mallory's side and returns the server's error.
func (m *mallory) end() error {
	m.t.Helper()
	m.nc.Close()
	select {
	case err := <-m.done:
		return err
	case <-time.After(20 * time.Second):
		m.t.Fatal("the server does not end")
		return nil
	}
}

func length(n uint32, rest ...byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, n), append(rest, make([]byte, 64)...)...)
}

// TestBeforeKeys sends packets that no honest client sends before there are keys, and
// wants the answer that each must get.
func TestBeforeKeys(t *testing.T) {
	const (
		badLength  = "disconnect 2: Bad packet length."
		badPadding = "disconnect 2: Corrupted padlen on input."
	)
	raw := func(b []byte) func(m *mallory) {
		return func(m *mallory) {
			m.versions()
			m.sendBytes(b...)
			m.serverInit()
		}
	}
	first := func(p ...byte) func(m *mallory) {
		return func(m *mallory) {
			m.versions()
			m.send(p...)
			m.serverInit()
		}
	}
	after := func(p ...byte) func(m *mallory) {
		return func(m *mallory) {
			m.begin(nil)
			m.send(p...)
		}
	}
	offering := func(kex string, value []byte) func(m *mallory) {
		return func(m *mallory) {
			m.begin(func(k *kexInit) { k.kex = []string{kex, kexStrictClient} })
			m.send(appendString([]byte{msgKexOffer}, value)...)
		}
	}
	without := func(change func(k *kexInit)) func(m *mallory) {
		return func(m *mallory) { m.begin(change) }
	}
	lists := func(mangle func(b []byte) []byte) func(m *mallory) {
		return func(m *mallory) {
			m.versions()
			m.send(mangle(m.proposal(true).marshal())...)
			m.serverInit()
		}
	}
	none := []string{"nothing"}
	const badValue = "disconnect 3: invalid key exchange value"
	unreduced := bytes.Repeat([]byte{0xff}, mlkem.EncapsulationKeySize768+x25519Size)
	order8, _ := new(big.Int).SetString("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800", 16)
	last := new(big.Int).Sub(group14, big.NewInt(1))
	p256, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	offCurve := p256.PublicKey().Bytes()
	offCurve[64] ^= 1

	for _, tt := range []struct {
		name string
		play func(m *mallory)
		want string
	}{
		{"length 0", raw(length(0)), badLength},
		{"length 1", raw(length(1)), badLength},
		{"length 4", raw(length(4)), badLength},
		{"length 5", raw(length(5)), badLength},
		{"length not of whole blocks", raw(length(13)), badLength},
		{"length 2^32-1", raw(length(1<<32 - 1)), badLength},
		{"length 2^31", raw(length(1 << 31)), badLength},
		{"length 35004", raw(length(35004)), badLength},
		{"padding 0", raw(length(12, 0)), badPadding},
		{"padding 3", raw(length(12, 3)), badPadding},
		{"padding as long as the packet", raw(length(12, 11)), badPadding},
		{"padding longer than the packet", raw(length(12, 255)), badPadding},
		{"NEWKEYS first", first(msgNewKeys), "disconnect 2: unexpected message 21"},
		{"service request first", first(appendString([]byte{5}, "ssh-userauth")...), "disconnect 2: unexpected message 5"},
		{"authentication first", first(50), "disconnect 2: unexpected message 50"},
		{"PING first", first(appendString([]byte{msgPing}, "x")...), "disconnect 2: unexpected message 192"},
		{"message 0", first(0), "disconnect 2: unexpected message 0"},
		{"an offer first", first(msgKexOffer), "disconnect 2: unexpected message 30"},

		{"KEXINIT alone", first(msgKexInit), "disconnect 2: malformed KEXINIT"},
		{"KEXINIT cut short", lists(func(b []byte) []byte { return b[:len(b)-1] }), "disconnect 2: malformed KEXINIT"},
		{"KEXINIT with more behind it", lists(func(b []byte) []byte { return append(b, 0) }), "disconnect 2: malformed KEXINIT"},
		{"KEXINIT with a list longer than it is", lists(func(b []byte) []byte { b[17] = 0xff; return b }), "disconnect 2: malformed KEXINIT"},

		{"no method", without(func(k *kexInit) { k.kex = none }), "disconnect 3: no matching key exchange method found. Their offer: nothing"},
		{"only markers for methods", without(func(k *kexInit) { k.kex = []string{extInfoServer, kexStrictServer, extInfoClient, kexStrictClient} }),
			"disconnect 3: no matching key exchange method found. Their offer: ext-info-s,kex-strict-s-v00@openssh.com,ext-info-c,kex-strict-c-v00@openssh.com"},
		{"a method that is not configured", without(func(k *kexInit) { k.kex = []string{"ecdh-sha2-nistp521"} }), "disconnect 3: no matching key exchange method found. Their offer: ecdh-sha2-nistp521"},
		{"no host key", without(func(k *kexInit) { k.hostKey = none }), "disconnect 3: no matching host key type found. Their offer: nothing"},
		{"ssh-rsa", without(func(k *kexInit) { k.hostKey = []string{"ssh-rsa"} }), "disconnect 3: no matching host key type found. Their offer: ssh-rsa"},
		{"no cipher in", without(func(k *kexInit) { k.cipherCS = none }), "disconnect 3: no matching cipher found. Their offer: nothing"},
		{"no cipher out", without(func(k *kexInit) { k.cipherSC = []string{"none"} }), "disconnect 3: no matching cipher found. Their offer: none"},
		{"no MAC for CTR", without(func(k *kexInit) { k.cipherCS = []string{"aes128-ctr"}; k.macCS = none }), "disconnect 3: no matching MAC found. Their offer: nothing"},
		{"only compression", without(func(k *kexInit) { k.compressionCS = []string{"zlib"} }), "disconnect 3: no matching compression found. Their offer: zlib"},
		{"empty lists", without(func(k *kexInit) { *k = kexInit{} }), "disconnect 3: no matching key exchange method found. Their offer: "},

		{"strict: IGNORE first", func(m *mallory) {
			m.versions()
			m.send(msgIgnore, 0, 0, 0, 0)
			m.send(m.proposal(true).marshal()...)
			m.serverInit()
		}, "disconnect 2: strict key exchange: KEXINIT was not the first packet"},
		{"strict: IGNORE after KEXINIT", after(msgIgnore, 0, 0, 0, 0), "disconnect 2: unexpected message 2"},
		{"strict: DEBUG after KEXINIT", after(msgDebug), "disconnect 2: unexpected message 4"},
		{"strict: UNIMPLEMENTED after KEXINIT", after(msgUnimplemented, 0, 0, 0, 0), "disconnect 2: unexpected message 3"},
		{"strict: EXT_INFO after KEXINIT", after(msgExtInfo, 0, 0, 0, 0), "disconnect 2: unexpected message 7"},
		{"a second KEXINIT", after(make([]byte, 0)...), ""},
		{"a reply", after(msgKexReply), "disconnect 2: unexpected message 31"},
		{"NEWKEYS before the offer", after(msgNewKeys), "disconnect 2: unexpected message 21"},
		{"data before the offer", after(94, 0), "disconnect 2: unexpected message 94"},
		{"an empty offer", after(msgKexOffer), "disconnect 3: malformed key exchange offer"},
		{"an offer with more behind it", after(append(appendString([]byte{msgKexOffer}, "x"), 0)...), "disconnect 3: malformed key exchange offer"},
		{"an offer longer than it is", after(msgKexOffer, 255, 255, 255, 255), "disconnect 3: malformed key exchange offer"},

		{"X25519: zero", offering("curve25519-sha256", make([]byte, 32)), badValue},
		{"X25519: one", offering("curve25519-sha256", append([]byte{1}, make([]byte, 31)...)), badValue},
		{"X25519: order 8", offering("curve25519-sha256", order8.Bytes()), badValue},
		{"X25519: short", offering("curve25519-sha256", make([]byte, 31)), badValue},
		{"X25519: long", offering("curve25519-sha256", make([]byte, 33)), badValue},
		{"X25519: empty", offering("curve25519-sha256", nil), badValue},
		{"ML-KEM: empty", offering("mlkem768x25519-sha256", nil), badValue},
		{"ML-KEM: short", offering("mlkem768x25519-sha256", unreduced[1:]), badValue},
		{"ML-KEM: not reduced", offering("mlkem768x25519-sha256", unreduced), badValue},
		{"ML-KEM: X25519 of zero", offering("mlkem768x25519-sha256", make([]byte, len(unreduced))), badValue},
		{"P-256: off the curve", offering("ecdh-sha2-nistp256", offCurve), badValue},
		{"P-256: infinity", offering("ecdh-sha2-nistp256", []byte{0}), badValue},
		{"P-256: compressed", offering("ecdh-sha2-nistp256", append([]byte{2}, offCurve[1:33]...)), badValue},
		{"P-256: empty", offering("ecdh-sha2-nistp256", nil), badValue},
		{"DH: empty, which is zero", offering("diffie-hellman-group14-sha256", nil), badValue},
		{"DH: one", offering("diffie-hellman-group14-sha256", []byte{1}), badValue},
		{"DH: p-1", offering("diffie-hellman-group14-sha256", mpint(last.Bytes())), badValue},
		{"DH: p", offering("diffie-hellman-group14-sha256", mpint(group14.Bytes())), badValue},
		{"DH: p+2", offering("diffie-hellman-group14-sha256", mpint(new(big.Int).Add(group14, two).Bytes())), badValue},
		{"DH: negative", offering("diffie-hellman-group14-sha256", []byte{0x80, 1}), badValue},
		{"DH: long", offering("diffie-hellman-group14-sha256", bytes.Repeat([]byte{1}, 30000)), badValue},
	} {
		if tt.name == "a second KEXINIT" {
			tt.play = func(m *mallory) { m.begin(nil); m.send(m.proposal(true).marshal()...) }
			tt.want = "disconnect 2: unexpected message 20"
		}
		t.Run(tt.name, func(t *testing.T) {
			serverConfig := &Config{}
			if strings.HasPrefix(tt.name, "P-256") || strings.HasPrefix(tt.name, "DH") {
				serverConfig.KexAlgorithms = []string{"ecdh-sha2-nistp256", "diffie-hellman-group14-sha256"}
			}
			m := attack(t, &Config{}, serverConfig)
			tt.play(m)
			if got := m.answer(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			err := m.end()
			if m.server.sessionID != nil && tt.want[:12] != "disconnect 2" {
				t.Error("there is a session")
			}
			var violation *ProtocolError
			if !errors.As(err, &violation) && !errors.Is(err, ErrNoCommonAlgorithm) {
				t.Errorf("server: %v", err)
			}
		})
	}
}

// TestAfterKeys sends packets that no honest client sends after the key exchange, and
// wants the answer that each must get.
func TestAfterKeys(t *testing.T) {
	big := make([]byte, 34900)
	big[0] = msgIgnore
	tests := []struct {
		name string
		send [][]byte
		want string
	}{
		{"NEWKEYS", [][]byte{{msgNewKeys}}, "disconnect 2: unexpected message 21"},
		{"an offer", [][]byte{{msgKexOffer, 0, 0, 0, 0}}, "disconnect 2: unexpected message 30"},
		{"a reply", [][]byte{{msgKexReply}}, "disconnect 2: unexpected message 31"},
		{"message 49", [][]byte{{49}}, "disconnect 2: unexpected message 49"},
		{"KEXINIT", [][]byte{(&kexInit{}).marshal()}, "disconnect 2: key exchange before authentication"},
		{"message 0", [][]byte{{0}}, "3"},
		{"message 8", [][]byte{{8}}, "3"},
		{"message 19", [][]byte{{19}}, "3"},
		{"PING", [][]byte{appendString([]byte{msgPing}, "x")}, "193"},
		{"PING without data", [][]byte{{msgPing}}, "disconnect 2: malformed PING"},
		{"PING with more behind it", [][]byte{append(appendString([]byte{msgPing}, "x"), 0)}, "disconnect 2: malformed PING"},
		{"PONG that nobody asked for", [][]byte{appendString([]byte{msgPong}, "x"), {msgNewKeys}}, "disconnect 2: unexpected message 21"},
		{"UNIMPLEMENTED", [][]byte{{msgUnimplemented, 0, 0, 0, 0}, {msgNewKeys}}, "disconnect 2: unexpected message 21"},
		{"IGNORE without data", [][]byte{{msgIgnore}, {msgNewKeys}}, "disconnect 2: unexpected message 21"},
		{"EXT_INFO cut short", [][]byte{{msgExtInfo, 0, 0}}, "disconnect 2: malformed EXT_INFO"},
		{"EXT_INFO with fewer than it says", [][]byte{{msgExtInfo, 255, 255, 255, 255}}, "disconnect 2: malformed EXT_INFO"},
		{"EXT_INFO with more", [][]byte{{msgExtInfo, 0, 0, 0, 0, 1}}, "disconnect 2: malformed EXT_INFO"},
		{"too much", slices.Repeat([][]byte{big}, 33), "disconnect 2: too much before authentication"},
		{"too many", slices.Repeat([][]byte{{msgIgnore}}, 1100), "disconnect 2: too much before authentication"},
		{"too long", [][]byte{append(bytes.Clone(big), make([]byte, 100)...)}, "disconnect 2: Bad packet length."},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := attack(t, &Config{}, &Config{})
			m.handshakeDone()
			for _, p := range tt.send {
				m.send(p...)
			}
			if got := m.answer(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			m.end()
		})
	}
	t.Run("UNIMPLEMENTED has the number of the packet", func(t *testing.T) {
		m := attack(t, &Config{}, &Config{})
		m.handshakeDone()
		for range 5 {
			m.send(msgIgnore)
		}
		m.send(8)
		if p, err := m.nextPacket(); err != nil || !bytes.Equal(p, []byte{msgUnimplemented, 0, 0, 0, 5}) {
			t.Errorf("got %v, %v", p, err)
		}
	})
}

// TestNeverReads has a peer ask for answers that it does not read.
func TestNeverReads(t *testing.T) {
	m := attack(t, &Config{}, &Config{MaxQueued: 1 << 20})
	m.handshakeDone()
	m.server.LoggedIn()
	ping := appendString([]byte{msgPing}, make([]byte, 30000))
	for range 1000 {
		m.out.mu.Lock()
		m.out.seal(ping)
		m.out.mu.Unlock()
		if m.WaitWritable(1<<16) != nil {
			break
		}
	}
	if err := <-m.done; !errors.Is(err, ErrQueueFull) {
		t.Errorf("server: %v", err)
	}
}

// TestDataDuringExchange sends data between KEXINIT and NEWKEYS, which RFC 4253
// section 7.1 forbids, but for a KEXINIT that has not been answered yet.
func TestDataDuringExchange(t *testing.T) {
	m := attack(t, &Config{}, &Config{})
	m.handshakeDone()
	m.server.LoggedIn()
	m.Rekey()
	m.send(94, 0)
	for {
		if got := m.answer(); got != "20" {
			if got != "disconnect 2: unexpected message 94" {
				t.Errorf("got %q", got)
			}
			break
		}
	}
	m.end()
}
