package auth

import (
	"net/netip"
	"time"
)

// Rates are per second; a burst is how many may come at once.
const (
	sourceRate, sourceBurst = 2, 20
	totalRate, totalBurst   = 50, 200
	maxSources              = 4096
)

// A rateLimiter limits how often something may happen, per source and in total. It
// is not safe for concurrent use.
type rateLimiter struct {
	total   bucket
	sources map[netip.Prefix]*bucket
}

// allow reports whether one more may happen at the time now, and counts it if so.
func (r *rateLimiter) allow(from netip.Addr, now time.Time) bool {
	bits := 32
	if from = from.Unmap(); from.Is6() {
		bits = 64 // the network of one customer
	}
	source, _ := from.Prefix(bits) // the zero Prefix without an address
	b := r.sources[source]
	if b == nil {
		if len(r.sources) >= maxSources {
			r.dropIdle(now)
		}
		if len(r.sources) >= maxSources {
			return false
		}
		if r.sources == nil {
			r.sources = make(map[netip.Prefix]*bucket)
		}
		b = &bucket{}
		r.sources[source] = b
	}
	// The source's bucket first: a source above its own rate must not use up the
	// total.
	return b.take(now, sourceRate, sourceBurst) && r.total.take(now, totalRate, totalBurst)
}

// dropIdle drops the sources whose buckets are full again.
func (r *rateLimiter) dropIdle(now time.Time) {
	for source, b := range r.sources {
		if now.Sub(b.at) >= sourceBurst/sourceRate*time.Second {
			delete(r.sources, source)
		}
	}
}

// A bucket is a token bucket. The zero value is full.
type bucket struct {
	used float64
	at   time.Time
}

func (b *bucket) take(now time.Time, rate, burst float64) bool {
	if passed := now.Sub(b.at).Seconds(); passed > 0 {
		b.used = max(0, b.used-passed*rate)
		b.at = now
	}
	if b.used+1 > burst {
		return false
	}
	b.used++
	return true
}
