package transport

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
)

// TestTampering changes, drops, repeats and reorders packets under each cipher.
func TestTampering(t *testing.T) {
	const badMAC = "disconnect 5: Corrupted MAC on input."
	protections := []Config{
		{Ciphers: []string{"aes128-gcm@openssh.com"}},
		{Ciphers: []string{"aes128-ctr"}, MACs: []string{"hmac-sha2-256-etm@openssh.com"}},
		{Ciphers: []string{"aes128-ctr"}, MACs: []string{"hmac-sha2-512"}},
	}
	for _, cfg := range protections {
		gcm := len(cfg.MACs) == 0
		etm := gcm || strings.Contains(cfg.MACs[0], "etm")
		seal := func(m *mallory, p ...byte) []byte {
			m.out.mu.Lock()
			defer m.out.mu.Unlock()
			b := m.out.protection.seal(nil, m.out.seq, p)
			m.out.seq++
			return b
		}
		for _, tt := range []struct {
			name string
			play func(m *mallory)
			want string
		}{
			{"as it should be", func(m *mallory) { m.sendBytes(seal(m, appendString([]byte{msgPing}, "x")...)...) }, "193"},
			{"a bit of the last byte", func(m *mallory) {
				b := seal(m, 94)
				b[len(b)-1] ^= 1
				m.sendBytes(b...)
			}, badMAC},
			{"a bit of the payload", func(m *mallory) {
				b := seal(m, 94)
				b[5] ^= 1
				m.sendBytes(b...)
			}, badMAC},
			{"a bit of the padding", func(m *mallory) {
				b := seal(m, 94)
				b[12] ^= 0x80
				m.sendBytes(b...)
			}, badMAC},
			{"repeated", func(m *mallory) {
				b := seal(m, msgIgnore)
				m.sendBytes(append(b, b...)...)
			}, "MAC or length"},
			{"dropped", func(m *mallory) {
				seal(m, msgIgnore)
				m.sendBytes(seal(m, msgIgnore)...)
			}, "MAC or length"},
			{"reordered", func(m *mallory) {
				a, b := seal(m, msgIgnore), seal(m, msgIgnore)
				m.sendBytes(append(b, a...)...)
			}, "MAC or length"},
			{"without protection", func(m *mallory) { m.sendBytes(plain{}.seal(nil, 0, []byte{94, 0})...) }, "MAC or length"},
			{"length shorter", func(m *mallory) {
				b := seal(m, make20(msgIgnore, 100)...)
				b[3] -= 16
				m.sendBytes(b...)
			}, "MAC or length"},
			{"an empty payload", func(m *mallory) { m.sendBytes(seal(m)...) }, "disconnect 2: Corrupted padlen on input."},
			{"length 0", func(m *mallory) {
				b := seal(m, 94)
				copy(b, []byte{0, 0, 0, 0})
				m.sendBytes(b...)
			}, "length"},
			{"length 2^32-1", func(m *mallory) {
				b := seal(m, 94)
				copy(b, []byte{255, 255, 255, 255})
				m.sendBytes(b...)
			}, "length"},
			{"length not of whole blocks", func(m *mallory) {
				b := seal(m, 94)
				b[3]++
				m.sendBytes(b...)
			}, "length"},
		} {
			t.Run(cfg.testName()+"/"+tt.name, func(t *testing.T) {
				client := cfg
				m := attack(t, &client, &Config{})
				m.handshakeDone()
				tt.play(m)
				if !etm && strings.HasPrefix(tt.want, "length") || tt.want == "MAC or length" {
					// Of an encrypted length that was changed nothing can be
					// said but that the connection ends.
					m.sendBytes(make([]byte, maxPacketLength)...)
				}
				got := m.answer()
				switch {
				case tt.want == "length" && etm:
					tt.want = "disconnect 2: Bad packet length."
				case tt.want == "length" || tt.want == "MAC or length":
					if got == "disconnect 2: Bad packet length." || got == badMAC || strings.Contains(got, "reset") {
						return
					}
				}
				if got != tt.want {
					t.Errorf("got %q, want %q", got, tt.want)
				}
				m.end()
			})
		}
	}
}

// TestTerrapin is a man in the middle that inserts packets before there are keys, so
// as to drop others behind them (CVE-2023-48795). Both sides are ours; with strict
// key exchange neither takes it.
func TestTerrapin(t *testing.T) {
	ignore := plain{}.seal(nil, 0, []byte{msgIgnore, 0, 0, 0, 0})
	for _, toClient := range []bool{true, false} {
		for _, before := range []int{0, 1} { // KEXINIT, or the packet behind it
			t.Run(fmt.Sprintf("to client %t, behind %d", toClient, before), func(t *testing.T) {
				nc, mc := tcpPipe(t)
				ms, ns := tcpPipe(t)
				client := NewClient(nc, &Config{HostKey: anyHostKey})
				server := NewServer(ns, &Config{HostKeys: hostKeys()})
				pass := func(to, from net.Conn, insert bool) {
					defer to.Close()
					version := make([]byte, 1)
					for {
						if _, err := from.Read(version); err != nil {
							return
						}
						to.Write(version)
						if version[0] == '\n' {
							break
						}
					}
					if insert && before == 1 {
						header := make([]byte, 4)
						io.ReadFull(from, header)
						to.Write(header)
						io.CopyN(to, from, int64(binary.BigEndian.Uint32(header)))
					}
					if insert {
						to.Write(ignore)
					}
					io.Copy(to, from)
				}
				go pass(mc, ms, toClient)
				go pass(ms, mc, !toClient)
				errs := make(chan error, 2)
				for _, c := range []*Conn{client, server} {
					go func() {
						err := c.Handshake()
						if err != nil {
							c.Close()
						}
						errs <- err
					}()
				}
				if err := <-errs; err == nil {
					t.Error("the handshake succeeded")
				}
				client.Close()
				server.Close()
				<-errs
			})
		}
	}
}
