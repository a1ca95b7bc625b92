package transport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"
)

// A choppy net.Conn reads and writes in pieces of random size, and has no file
// descriptor to a Conn.
type choppy struct {
	net.Conn
	most int
	mu   sync.Mutex
	rng  *rand.Rand
}

func (c *choppy) piece(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return min(n, 1+c.rng.IntN(c.most))
}

func (c *choppy) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	return c.Conn.Read(b[:c.piece(len(b))])
}

func (c *choppy) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = c.Conn.Write(b[n:][:c.piece(len(b)-n)])
		n += m
	}
	return n, err
}

// exchangeRandomly has both ends send numbered packets of random size to each
// other, and start key exchanges at random moments, until each has received n.
func exchangeRandomly(t *testing.T, a, b *Conn, n int, rekeys bool, seed uint64) {
	t.Helper()
	var wg sync.WaitGroup
	run := func(from, to *Conn, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 1))
		wg.Go(func() {
			for i := range n {
				p := make([]byte, 9+rng.IntN(1<<(4+rng.IntN(11))))
				p[0] = 94
				binary.BigEndian.PutUint64(p[1:], uint64(i))
				if err := from.WritePacket(p); err != nil {
					t.Errorf("packet %d: %v", i, err)
					return
				}
				if rng.IntN(3) == 0 {
					from.Flush()
				}
				if rng.IntN(10) == 0 {
					from.WaitWritable(1 << 20)
				}
				if rekeys && rng.IntN(60) == 0 {
					from.Rekey()
				}
			}
			from.Flush()
		})
		wg.Go(func() {
			for i := range n {
				p, err := to.ReadPacket()
				if err != nil {
					t.Errorf("packet %d: %v", i, err)
					from.Close()
					return
				}
				if got := binary.BigEndian.Uint64(p[1:]); got != uint64(i) {
					t.Errorf("packet %d came in place of %d", got, i)
					from.Close()
					return
				}
			}
			// A key exchange of the other side may be under way still.
			to.Peek()
		})
	}
	run(a, b, seed)
	run(b, a, seed+1)
	wg.Wait()
}

// TestSplits carries packets, and key exchanges of both sides at random moments,
// over streams that are cut into pieces of one byte and more.
func TestSplits(t *testing.T) {
	for _, cfg := range []Config{
		{Ciphers: []string{"aes128-gcm@openssh.com"}},
		{Ciphers: []string{"aes256-ctr"}, MACs: []string{"hmac-sha2-256-etm@openssh.com"}},
		{Ciphers: []string{"aes256-ctr"}, MACs: []string{"hmac-sha2-256"}},
	} {
		for _, most := range []int{1, 7, 5000, 1 << 20} {
			t.Run(fmt.Sprintf("%s/%d", cfg.testName(), most), func(t *testing.T) {
				t.Parallel()
				nc, ns := tcpPipe(t)
				config := cfg
				config.HostKey = anyHostKey
				seed := uint64(most)
				client := NewClient(&choppy{Conn: nc, most: most, rng: rand.New(rand.NewPCG(seed, 2))}, &config)
				server := NewServer(&choppy{Conn: ns, most: most, rng: rand.New(rand.NewPCG(seed, 3))}, &Config{HostKeys: hostKeys()[:1]})
				defer client.Close()
				defer server.Close()
				done := make(chan error, 1)
				go func() { done <- server.Handshake() }()
				if err := client.Handshake(); err != nil {
					t.Fatal(err)
				}
				if err := <-done; err != nil {
					t.Fatal(err)
				}
				client.LoggedIn()
				server.LoggedIn()
				n := 400
				if most < 100 {
					n = 100
				}
				exchangeRandomly(t, client, server, n, true, seed)
			})
		}
	}
}

// TestRandomRekeys is TestSplits over sockets, with more packets.
func TestRandomRekeys(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			client, server := pair(t, &Config{}, &Config{})
			exchangeRandomly(t, client, server, 3000, true, seed)
		})
	}
}

// TestWriters has several goroutines write at once, with key exchanges among it.
func TestWriters(t *testing.T) {
	client, server := pair(t, &Config{}, &Config{})
	const writers, each = 8, 500
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				p := make([]byte, 100)
				p[0], p[1] = 94, byte(w)
				binary.BigEndian.PutUint32(p[2:], uint32(i))
				if client.WritePacket(p) != nil || client.Flush() != nil {
					t.Error("writing failed")
					return
				}
				if w == 0 && i%100 == 50 {
					client.Rekey()
				}
			}
		})
	}
	go func() { // so that the client takes part in its key exchanges
		for {
			if _, err := client.ReadPacket(); err != nil {
				return
			}
		}
	}()
	var next [writers]uint32
	for range writers * each {
		p, err := server.ReadPacket()
		if err != nil {
			t.Fatal(err)
		}
		if got := binary.BigEndian.Uint32(p[2:]); got != next[p[1]] {
			t.Fatalf("writer %d: packet %d in place of %d", p[1], got, next[p[1]])
		}
		next[p[1]]++
	}
	wg.Wait()
}

// TestControlPassesData writes to a peer that reads nothing: WritePacket and Flush
// return, WaitWritable waits, and Close ends it.
func TestControlPassesData(t *testing.T) {
	client, server := pair(t, &Config{MaxQueued: 64 << 20}, &Config{})
	for client.Queued() < 4<<20 {
		client.WritePacket(make20(94, 32<<10))
		if err := client.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	waited := make(chan error, 1)
	go func() { waited <- client.WaitWritable(1 << 20) }()
	select {
	case err := <-waited:
		t.Fatalf("WaitWritable returned %v although nothing was read", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := client.WritePacket([]byte{100}); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	client.Close()
	if took := time.Since(begun); took > 5*closeTimeout {
		t.Errorf("Close took %v", took)
	}
	if err := <-waited; !errors.Is(err, net.ErrClosed) {
		t.Errorf("WaitWritable returned %v", err)
	}
	if err := client.WritePacket([]byte{94}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("WritePacket returned %v", err)
	}
	server.Close()
}

// TestCloseSends closes a connection with much in its send buffer, which the peer
// reads.
func TestCloseSends(t *testing.T) {
	client, server := pair(t, &Config{}, &Config{})
	const n = 100
	for range n {
		client.WritePacket(make20(94, 30000))
	}
	go client.Disconnect(ReasonByApplication, "that was all")
	for range n {
		if _, err := server.ReadPacket(); err != nil {
			t.Fatal(err)
		}
	}
	var d *DisconnectError
	if _, err := server.ReadPacket(); !errors.As(err, &d) || d.Message != "that was all" {
		t.Errorf("got %v", err)
	}
}

// TestEnds closes the stream within a packet, and between two.
func TestEnds(t *testing.T) {
	client, server := pair(t, &Config{}, &Config{})
	client.WritePacket([]byte{94, 1})
	client.Flush()
	if _, err := server.ReadPacket(); err != nil {
		t.Fatal(err)
	}
	client.nc.Write([]byte{0, 0, 0})
	client.nc.Close()
	for range 2 {
		if _, err := server.ReadPacket(); err != io.ErrUnexpectedEOF {
			t.Errorf("got %v, want an unexpected EOF", err)
		}
	}
}

// TestDeadline has ReadPacket end at a deadline of the net.Conn.
func TestDeadline(t *testing.T) {
	client, _ := pair(t, &Config{}, &Config{})
	client.nc.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := client.ReadPacket(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// TestPeek reads in the background.
func TestPeek(t *testing.T) {
	client, server := pair(t, &Config{}, &Config{})
	peeked := server.Peek()
	if server.Buffered() || server.ReadError() != nil {
		t.Error("something is there already")
	}
	client.WritePacket([]byte{94, 7})
	client.Flush()
	<-peeked
	if p, err := server.ReadPacket(); err != nil || !bytes.Equal(p, []byte{94, 7}) {
		t.Errorf("got %v, %v", p, err)
	}
	peeked = server.Peek()
	client.Close()
	<-peeked
	if err := server.ReadError(); err != io.EOF {
		t.Errorf("got %v", err)
	}
}

// TestUnimplemented answers a packet behind which another has come.
func TestUnimplemented(t *testing.T) {
	client, server := pair(t, &Config{}, &Config{})
	for _, number := range []byte{msgIgnore, 200, 94, msgIgnore} {
		client.WritePacket([]byte{number, 0})
	}
	client.Flush()
	for _, want := range []byte{200, 94} {
		if p, err := server.ReadPacket(); err != nil || p[0] != want {
			t.Fatalf("got %v, %v", p, err)
		}
		for want == 200 && !server.Buffered() {
			time.Sleep(time.Millisecond)
		}
		server.Unimplemented()
	}
	server.Flush()
	client.nextPacket() // EXT_INFO
	for _, want := range []byte{1, 2} {
		if p, err := client.nextPacket(); err != nil || !bytes.Equal(p, []byte{msgUnimplemented, 0, 0, 0, want}) {
			t.Errorf("got %v, %v", p, err)
		}
	}
}

// TestLargest sends the largest payload under each protection, before which no
// larger is taken.
func TestLargest(t *testing.T) {
	for _, cfg := range []Config{
		{Ciphers: []string{"aes128-gcm@openssh.com"}},
		{Ciphers: []string{"aes128-ctr"}, MACs: []string{"hmac-sha2-512-etm@openssh.com"}},
		{Ciphers: []string{"aes128-ctr"}, MACs: []string{"hmac-sha2-512"}},
	} {
		client, server := pair(t, &cfg, &Config{})
		if err := client.WritePacket(make20(94, MaxPayload+1)); err == nil {
			t.Error("a payload that is too large was taken")
		}
		client.WritePacket(make20(94, MaxPayload))
		client.WritePacket(make20(95, 1))
		client.Flush()
		if p, err := server.ReadPacket(); err != nil || len(p) != MaxPayload {
			t.Errorf("%d bytes, %v", len(p), err)
		}
		if p, err := server.ReadPacket(); err != nil || p[0] != 95 {
			t.Errorf("%v, %v", p, err)
		}
	}
}

// TestNothingLeaks opens and closes connections in different states, and counts
// goroutines and descriptors.
func TestNothingLeaks(t *testing.T) {
	descriptors := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip(err)
		}
		return len(list)
	}
	hostKeys()
	n := 300
	if testing.Short() {
		n = 30
	}
	goroutines, files := runtime.NumGoroutine(), descriptors()
	for i := range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		nc, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		ns, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		ln.Close()
		client := NewClient(nc, &Config{HostKey: anyHostKey, KexAlgorithms: []string{"curve25519-sha256"}})
		server := NewServer(ns, &Config{HostKeys: hostKeys()[:1]})
		done := make(chan error, 1)
		go func() { done <- server.Handshake() }()
		switch i % 6 {
		case 0: // closed at once
			client.Close()
			<-done
		case 1: // within the handshake
			client.sendVersion()
			client.Rekey()
			client.Close()
			<-done
		case 2: // with packets in the buffers
			client.Handshake()
			<-done
			client.WritePacket(make20(94, 30000))
			server.WritePacket(make20(94, 30000))
			client.Close()
		case 3: // while something reads ahead
			client.Handshake()
			<-done
			client.Peek()
			server.Close()
		case 4: // within a key exchange
			client.Handshake()
			<-done
			client.LoggedIn()
			server.LoggedIn()
			client.Rekey()
			client.WritePacket([]byte{94})
			client.Close()
			server.ReadPacket()
		case 5: // by the server, full
			client.Handshake()
			<-done
			server.LoggedIn()
			for server.Queued() == 0 {
				server.WritePacket(make20(94, 30000))
				server.Flush()
			}
			client.Close()
		}
		server.Close()
		client.Close()
	}
	deadline := time.Now().Add(10 * time.Second)
	for runtime.NumGoroutine() > goroutines+2 || descriptors() > files+2 {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines and %d descriptors; before it were %d and %d", runtime.NumGoroutine(), descriptors(), goroutines, files)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
