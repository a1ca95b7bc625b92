package gateway

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
)

// Startups is MaxStartups of sshd_config(5), a limit of connections that have not
// logged in. From Start on, a new connection is rejected with a probability of Rate
// percent, which grows to 100 at Full. Unlike in sshd, the probability for the first
// connection of a source depends on the number of sources, so that a few sources with
// many connections do not shut out others. The zero value means 10:30:100.
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

var errSourceStartups = errors.New("too many connections from this address have not logged in")

// take takes a slot for a connection from source. The error says why the connection is
// rejected. A perSource of zero is no limit.
func (s *startups) take(source netip.Prefix, max Startups, perSource int) (*startupSlot, error) {
	max = max.orDefault()
	s.mu.Lock()
	defer s.mu.Unlock()
	mine := s.source[source]
	if perSource > 0 && mine >= perSource {
		return nil, errSourceStartups
	}
	crowd := s.total
	if mine == 0 {
		crowd = len(s.source)
	}
	chance := 0
	switch {
	case s.total >= max.Full:
		chance = 100
	case crowd >= max.Start:
		chance = max.Rate + (100-max.Rate)*(crowd-max.Start)/(max.Full-max.Start)
	}
	if rand.IntN(100) < chance {
		return nil, fmt.Errorf("%d connections have not logged in yet", s.total)
	}
	if s.source == nil {
		s.source = make(map[netip.Prefix]int)
	}
	s.total++
	s.source[source]++
	slot := &startupSlot{}
	slot.release = sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.total--
		if s.source[source]--; s.source[source] == 0 {
			delete(s.source, source)
		}
	})
	return slot, nil
}

// A startupSlot counts one connection that has not logged in. Release may be called
// more than once.
type startupSlot struct{ release func() }
