package agent

import (
	"net"
	"net/netip"
	"sync"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

const (
	// maxHalfOpen limits the unauthenticated connections, and maxPerSource those from
	// one source.
	maxHalfOpen  = 100
	maxPerSource = 50
)

// halfOpen is the set of unauthenticated connections. If it is full, a source with fewer
// connections evicts the oldest connection of the source with the most, so that one source
// cannot block the others. The zero value is empty.
type halfOpen struct {
	mu       sync.Mutex
	n        int
	bySource map[netip.Prefix][]net.Conn // oldest first
}

// sourceOf returns the source of a connection: an IPv4 address, or the /64 of an IPv6
// address. It is the zero Prefix for Unix sockets, to which only the gateway's account can
// connect.
func sourceOf(nc net.Conn) netip.Prefix {
	addr := identity.AddrPort(nc.RemoteAddr()).Addr().WithZone("")
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	source, err := addr.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return source
}

// add adds nc, or returns false if there is no room. The caller must close the evicted
// connection, if there is one.
func (h *halfOpen) add(nc net.Conn) (ok bool, evicted net.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	source := sourceOf(nc)
	if source.IsValid() && len(h.bySource[source]) >= maxPerSource {
		return false, nil
	}
	if h.n >= maxHalfOpen {
		var most netip.Prefix
		for s, conns := range h.bySource {
			if len(conns) > len(h.bySource[most]) {
				most = s
			}
		}
		if len(h.bySource[most]) <= len(h.bySource[source]) {
			return false, nil
		}
		evicted = h.bySource[most][0]
		h.removeLocked(most, evicted)
	}
	if h.bySource == nil {
		h.bySource = make(map[netip.Prefix][]net.Conn)
	}
	h.bySource[source] = append(h.bySource[source], nc)
	h.n++
	return true, evicted
}

// remove removes nc, unless it has been evicted.
func (h *halfOpen) remove(nc net.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.removeLocked(sourceOf(nc), nc)
}

func (h *halfOpen) removeLocked(source netip.Prefix, nc net.Conn) {
	conns := h.bySource[source]
	for i, c := range conns {
		if c != nc {
			continue
		}
		h.n--
		if len(conns) == 1 {
			delete(h.bySource, source)
			return
		}
		h.bySource[source] = append(conns[:i:i], conns[i+1:]...)
		return
	}
}
