package transport

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"
)

// recordStreams has the bytes that a client of ours sends in a handshake with a server of
// ours, or the server in one with a client.
var recordStreams = sync.OnceValues(func() (client, server []byte) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	defer ln.Close()
	nc, _ := net.Dial("tcp", ln.Addr().String())
	ns, _ := ln.Accept()
	defer nc.Close()
	defer ns.Close()
	var fromClient, fromServer bytes.Buffer
	c := NewClient(recorder{nc, &fromClient}, &Config{HostKey: anyHostKey})
	s := NewServer(recorder{ns, &fromServer}, &Config{HostKeys: hostKeys()[:1]})
	done := make(chan error, 1)
	go func() { done <- s.Handshake() }()
	if err := c.Handshake(); err != nil {
		panic(err)
	}
	<-done
	c.WaitWritable(0)
	s.WaitWritable(0)
	return fromClient.Bytes(), fromServer.Bytes()
})

type recorder struct {
	net.Conn
	w io.Writer
}

func (r recorder) Write(b []byte) (int, error) {
	r.w.Write(b)
	return r.Conn.Write(b)
}

// FuzzServerStream sends bytes to a server, from the identification string on. It
// must neither panic nor wait after the end, and nobody may come through.
func FuzzServerStream(f *testing.F) {
	client, _ := recordStreams()
	f.Add(client)
	f.Add([]byte("SSH-2.0-x\r\n"))
	weak := (&kexInit{kex: []string{"curve25519-sha256"}, hostKey: DefaultHostKeyAlgorithms, cipherCS: DefaultCiphers, cipherSC: DefaultCiphers, compressionCS: []string{"none"}, compressionSC: []string{"none"}}).marshal()
	b := append([]byte("SSH-2.0-x\r\n"), plain{}.seal(nil, 0, weak)...)
	b = plain{}.seal(b, 0, []byte{msgIgnore})
	b = plain{}.seal(b, 0, appendString([]byte{msgKexOffer}, bytes.Repeat([]byte{9}, 32)))
	f.Add(plain{}.seal(b, 0, []byte{msgNewKeys}))
	cfg := &Config{HostKeys: hostKeys()[:1], KexAlgorithms: append([]string{"ecdh-sha2-nistp256", "diffie-hellman-group14-sha256"}, DefaultKexAlgorithms...)}
	f.Fuzz(func(t *testing.T, b []byte) {
		nc, ns := tcpPipe(t)
		s := NewServer(ns, cfg)
		go func() {
			nc.Write(b)
			nc.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, nc)
		}()
		defer s.Close()
		if err := s.Handshake(); err == nil {
			if p, err := s.ReadPacket(); err == nil {
				t.Fatalf("a packet from nobody: %q", p)
			}
		} else if bytes.Contains([]byte(err.Error()), []byte("panic")) {
			t.Fatal(err)
		}
	})
}

// FuzzClientStream is FuzzServerStream for a client.
func FuzzClientStream(f *testing.F) {
	_, server := recordStreams()
	f.Add(server)
	f.Add([]byte("hello\r\n\r\nSSH-2.0-x\r\n"))
	cfg := &Config{HostKey: anyHostKey}
	f.Fuzz(func(t *testing.T, b []byte) {
		nc, ns := tcpPipe(t)
		go func() {
			ns.Write(b)
			ns.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, ns)
		}()
		c := NewClient(nc, cfg)
		defer c.Close()
		if err := c.Handshake(); err == nil {
			t.Fatal("a handshake with nobody")
		} else if bytes.Contains([]byte(err.Error()), []byte("panic")) {
			t.Fatal(err)
		}
	})
}

// FuzzPayloads sends payloads to a server behind the key exchange, before and after
// authentication.
func FuzzPayloads(f *testing.F) {
	for _, b := range [][]byte{
		{msgDisconnect}, marshalDisconnect(1, "bye"), {msgIgnore}, {msgUnimplemented, 0, 0, 0, 1}, {msgDebug}, {8},
		(&Conn{cfg: &Config{Extensions: []Extension{{"a", []byte("b")}}}}).marshalExtInfo(),
		{msgNewKeys}, {msgKexOffer}, {msgKexReply}, appendString([]byte{msgPing}, "x"), {msgPong}, {94, 0, 0},
		(&kexInit{kex: DefaultKexAlgorithms, hostKey: DefaultHostKeyAlgorithms, cipherCS: DefaultCiphers, cipherSC: DefaultCiphers, compressionCS: []string{"none"}, compressionSC: []string{"none"}}).marshal(),
	} {
		f.Add(true, b, []byte{94})
		f.Add(false, b, []byte{94})
		f.Add(true, b, appendString([]byte{msgKexOffer}, bytes.Repeat([]byte{9}, 32)))
	}
	serverConfig := &Config{HostKeys: hostKeys()[:1]}
	f.Fuzz(func(t *testing.T, loggedIn bool, a, b []byte) {
		nc, ns := tcpPipe(t)
		s := NewServer(ns, serverConfig)
		done := make(chan error, 1)
		go func() {
			err := s.Handshake()
			if err == nil && loggedIn {
				s.LoggedIn()
			}
			for err == nil {
				var p []byte
				if p, err = s.ReadPacket(); err == nil && (len(p) == 0 || p[0] < msgFirstOther && p[0] != 5 && p[0] != 6 || p[0] == msgPing || p[0] == msgPong) {
					t.Errorf("ReadPacket returned %q", p)
				}
			}
			s.Close()
			done <- err
		}()
		c := NewClient(nc, &Config{HostKey: anyHostKey, KexAlgorithms: []string{"curve25519-sha256"}})
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		c.LoggedIn()
		c.out.mu.Lock()
		for _, p := range [][]byte{a, b} {
			c.out.seal(p[:min(len(p), 30000)])
		}
		c.out.mu.Unlock()
		c.WaitWritable(0)
		nc.(*net.TCPConn).CloseWrite()
		go io.Copy(io.Discard, nc)
		if err := <-done; bytes.Contains([]byte(err.Error()), []byte("panic")) {
			t.Fatal(err)
		}
	})
}

// FuzzNegotiate parses a peer's KEXINIT and negotiates, in both roles.
func FuzzNegotiate(f *testing.F) {
	client := (&Conn{cfg: &Config{}}).proposal(true)
	server := (&Conn{server: true, cfg: &Config{HostKeys: hostKeys()}}).proposal(true)
	f.Add(client.marshal())
	f.Add(server.marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		peer, err := parseKexInit(b)
		if err != nil {
			return
		}
		if _, err := parseKexInit(peer.marshal()); err != nil && len(b) < maxKexInit {
			t.Fatalf("a message that was parsed cannot be parsed again: %v", err)
		}
		for _, weAreServer := range []bool{true, false} {
			var got Algorithms
			if weAreServer {
				got, _, err = negotiate(peer, server, true)
			} else {
				got, _, err = negotiate(client, peer, false)
			}
			if err != nil {
				continue
			}
			_, okHostKey := hostKeyAlgorithms[got.HostKey]
			in, okIn := ciphers[got.CipherIn]
			out, okOut := ciphers[got.CipherOut]
			if kexMethods[got.Kex] == nil || !okHostKey || !okIn || !okOut || !in.aead && macs[got.MACIn].hash == nil || !out.aead && macs[got.MACOut].hash == nil {
				t.Fatalf("chosen: %+v", got)
			}
		}
	})
}

// FuzzOpen opens bytes as packets under each protection, and seals and opens
// payloads.
func FuzzOpen(f *testing.F) {
	keys := &keySource{kexMethods["curve25519-sha256"].hash, []byte("secret"), []byte("sum"), []byte("session")}
	f.Add(byte(0), []byte{0, 0, 0, 12, 4, 94, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	for i := range byte(5) {
		f.Add(i, bytes.Repeat([]byte{0}, 100))
		f.Add(i, []byte("SSH-2.0-x"))
	}
	f.Fuzz(func(t *testing.T, which byte, b []byte) {
		make := func() protection {
			switch which % 4 {
			case 0:
				return plain{}
			case 1:
				return keys.protection("ACE", "aes128-gcm@openssh.com", "")
			case 2:
				return keys.protection("ACE", "aes128-ctr", "hmac-sha2-256-etm@openssh.com")
			}
			return keys.protection("ACE", "aes128-ctr", "hmac-sha2-512")
		}
		if len(b) > 0 && len(b) <= MaxPayload {
			sealed := make().seal([]byte("before"), 7, b)[6:]
			in := make()
			for i := range len(sealed) + 1 {
				if n, err := in.size(sealed[:i:i], maxPacketLength); err != nil || n > 0 && n != len(sealed) {
					t.Fatalf("size of %d bytes: %d, %v", i, n, err)
				}
			}
			if got, err := in.open(sealed, 7); err != nil || !bytes.Equal(got, b) {
				t.Fatalf("opened %q, %v", got, err)
			}
		}
		in := make()
		b = bytes.Clone(b)
		n, err := in.size(b, maxPacketLength)
		if err != nil || n == 0 || n > len(b) {
			return
		}
		if p, err := in.open(b[:n], 7); err == nil && (len(p) == 0 || which%4 != 0) {
			t.Fatalf("opened %q", p)
		}
	})
}
