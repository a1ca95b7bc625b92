package gateway

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
)

// Startups bounds connections that have not logged in, as MaxStartups of
// sshd_config(5) does: from Start on a new one is refused with a chance of Rate
// percent, growing to certainty at Full. The zero value means 10:30:100.
type Startups struct{ Start, Rate, Full int }

func (s Startups) orDefault() Startups {
	if s == (Startups{}) {
		return Startups{10, 30, 100}
	}
	return s
}

// startups counts connections that have not logged in.
type startups struct {
	mu     sync.Mutex
	total  int
	source map[netip.Prefix]int
}

var errSourceStartups = errors.New("too many connections from this address that have not logged in")

// admit counts a connection of a source in, or refuses it.
func (s *startups) admit(source netip.Prefix, max Startups, perSource int) (*admission, error) {
	max = max.orDefault()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= max.Start {
		chance := 100
		if s.total < max.Full && max.Full > max.Start {
			chance = max.Rate + (100-max.Rate)*(s.total-max.Start)/(max.Full-max.Start)
		}
		if rand.IntN(100) < chance {
			return nil, fmt.Errorf("%d connections have not logged in yet", s.total)
		}
	}
	if perSource > 0 && s.source[source] >= perSource {
		return nil, errSourceStartups
	}
	if s.source == nil {
		s.source = make(map[netip.Prefix]int)
	}
	s.total++
	s.source[source]++
	a := &admission{}
	a.release = sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.total--
		if s.source[source]--; s.source[source] == 0 {
			delete(s.source, source)
		}
	})
	return a, nil
}

// An admission is one connection's place among those not logged in. release
// may be called more than once.
type admission struct{ release func() }
