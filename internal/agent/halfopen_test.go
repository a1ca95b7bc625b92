package agent

import (
	"fmt"
	"net"
	"testing"
	"time"
)

// A fromAddr is a connection from an address; "" is a Unix socket.
type fromAddr struct {
	net.Conn
	addr string
}

func (c *fromAddr) RemoteAddr() net.Addr {
	if c.addr == "" {
		return &net.UnixAddr{}
	}
	return &net.TCPAddr{IP: net.ParseIP(c.addr), Port: 1}
}

func TestHalfOpen(t *testing.T) {
	var h halfOpen
	add := func(addr string) (bool, *fromAddr) {
		t.Helper()
		ok, evicted := h.add(&fromAddr{addr: addr})
		e, _ := evicted.(*fromAddr)
		return ok, e
	}
	// One source gets at most half of the places.
	for i := range maxPerSource + 10 {
		if ok, evicted := add("192.0.2.1"); ok != (i < maxPerSource) || evicted != nil {
			t.Fatalf("connection %d: %t, %v", i, ok, evicted)
		}
	}
	// Addresses of one /64 are one source.
	for i := range maxPerSource + 10 {
		if ok, evicted := add(fmt.Sprintf("2001:db8::%d", i+1)); ok != (i < maxPerSource) || evicted != nil {
			t.Fatalf("connection %d: %t, %v", i, ok, evicted)
		}
	}
	// The set is full. A third source evicts connections of the other two until all
	// three have the same number.
	for i := range maxPerSource - 2 {
		ok, evicted := add("192.0.2.2")
		if i < 33 && (!ok || evicted == nil || evicted.addr == "192.0.2.2") || i > 33 && ok {
			t.Fatalf("connection %d: %t, %v; %d", i, ok, evicted, len(h.bySource))
		}
	}
	if h.n != maxHalfOpen {
		t.Errorf("%d connections", h.n)
	}
	for source, conns := range h.bySource {
		for len(conns) > 0 {
			h.remove(conns[0])
			h.remove(conns[0]) // no effect
			conns = h.bySource[source]
		}
	}
	if h.n != 0 || len(h.bySource) != 0 {
		t.Errorf("%d connections of %d sources are left", h.n, len(h.bySource))
	}
	// Many sources with one connection each do not block a new source.
	for i := range maxHalfOpen {
		add(fmt.Sprintf("192.0.2.%d", i))
	}
	if ok, evicted := add("198.51.100.1"); !ok || evicted == nil {
		t.Error("a new source was rejected")
	}
	// Unix sockets have no limit per source.
	h = halfOpen{}
	for i := range maxHalfOpen + 1 {
		if ok, _ := add(""); ok != (i < maxHalfOpen) {
			t.Errorf("connection %d of a Unix socket: %t", i, ok)
		}
	}
}

// TestSilentConnections opens 2,000 connections that send nothing. A login from another
// address must succeed.
func TestSilentConnections(t *testing.T) {
	b := start(t, nil)
	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}, Timeout: 10 * time.Second}
	for range 2000 {
		c, err := from.DialContext(t.Context(), "tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	c := b.dial(alice()) // fails the test if it is rejected
	c.Close()
}
