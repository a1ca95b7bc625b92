package gateway

import (
	"context"
	"fmt"
	"runtime"
	"runtime/metrics"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/relay"
	"github.com/sallyport-ssh/sallyport/internal/wire"
)

// Package ssh queues each packet of data by itself until it is read, at some 50
// bytes beside what is in it, and bounds only the latter: 2 MiB on each channel.
// A peer that sends single bytes to somebody who reads nothing fills 100 MB with
// each channel. Neither the queues nor the packets can be seen from here, so what
// is in them is judged by what has come in and has not gone out.

const (
	// lookEvery is how often it is looked how much memory is in use, and
	// looksAtRest every which time who holds it, while there is plenty.
	lookEvery   = time.Second
	looksAtRest = 5
	// heldMin is what a user must hold for her connections to be closed. A peer
	// that means no harm holds 2 MiB at most with each channel that is stuck.
	heldMin = 16 << 20
)

// held is what one peer of a connection has sent that is not known to have been
// handed over.
type held struct {
	// Bytes that had been received from it, handed over, and handed to it, when
	// there was nothing.
	received, handed, back int64
}

// look returns how many bytes there may be, of packets as they came. Package ssh
// has them in memory at about twice that.
func (h *held) look(received int64, to, back relay.Direction) int64 {
	if !to.HeldUp {
		*h = held{received, to.Bytes, back.Bytes}
		return 0
	}
	// What surrounds data on the wire has come in as well, and does not go out:
	// a hundredth of it with large packets, a tenth with those that programs
	// send. So has the word that there is room for more of what goes the other
	// way, for each 64 KiB or so. A stream that is never at rest would add it up.
	handed := to.Bytes - h.handed
	return max(0, received-h.received-handed-handed/8-(back.Bytes-h.back)/512)
}

// guardMemory closes connections that hold much when memory is scarce, until ctx
// ends.
func (s *Server) guardMemory(ctx context.Context) {
	if s.MaxMemory == 0 {
		return
	}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if n%looksAtRest == 0 || s.heapInUse() > s.MaxMemory/2 {
			s.freeMemory()
		}
	}
}

// freeMemory closes the connections of the user who holds most, if memory is
// scarce, and returns when they have ended.
func (s *Server) freeMemory() {
	defer func() {
		if p := recover(); p != nil {
			logPanic(s.Log, p)
		}
	}()
	worst, total := s.holdsMost()
	if s.heapInUse() <= s.MaxMemory {
		return
	}
	nobody := total < heldMin
	if nobody {
		// Only a word about it can be done, and that does not need a
		// collection each second.
		if time.Since(s.scarce) < time.Minute {
			return
		}
		s.scarce = time.Now()
	}
	// Much of it may be garbage.
	if runtime.GC(); s.heapInUse() <= s.MaxMemory {
		return
	}
	if nobody {
		s.Log.Error("memory is scarce, and no user holds much of it", "in_use", s.heapInUse(), "max_memory", s.MaxMemory)
		return
	}
	var ending sync.WaitGroup
	for _, c := range worst {
		why := fmt.Sprintf("memory was scarce, and %d MiB that had been sent on it were not read", c.unread>>20)
		c.log.Warn("closing a connection that holds memory", "user", c.identity.User, "err", why)
		c.because("gateway", why)
		ending.Go(func() { c.disconnect(memoryMessage(c.ref)) })
	}
	ending.Wait()
	runtime.GC() // so that the next look sees what that has given back
}

// holdsMost returns the connections of the user who holds most, and how much she
// holds. Those with little of it, below half of the average, are not among them.
func (s *Server) holdsMost() (worst []*conn, most int64) {
	holding := make(map[string][]*conn)
	total := make(map[string]int64)
	user := ""
	for _, c := range s.loggedIn() {
		if c.unread = c.lookHeld(); c.unread == 0 {
			continue
		}
		name := c.identity.User
		holding[name] = append(holding[name], c)
		if total[name] += c.unread; total[name] > total[user] {
			user = name
		}
	}
	for _, c := range holding[user] {
		if c.unread >= total[user]/int64(2*len(holding[user])) {
			worst = append(worst, c)
		}
	}
	return worst, total[user]
}

// lookHeld returns how much the peers of a connection have sent that has not been
// handed over. Nobody but the goroutine of guardMemory calls it.
func (c *conn) lookHeld() int64 {
	if c.relay == nil { // the console reads, and throws away, what people type
		return c.wire.Received()
	}
	toBastion, toClient := c.relay.Progress()
	sum := c.fromClientHeld.look(c.wire.Received(), toBastion, toClient)
	if b := c.bastion(); b != nil {
		if stream, ok := b.Net.(*wire.Conn); ok {
			sum += c.fromBastionHeld.look(stream.Received(), toClient, toBastion)
		}
	}
	return sum
}

// heapInUse returns how many bytes of the heap are in use, those included that
// are garbage but have not been collected.
func (s *Server) heapInUse() int64 {
	if s.heap != nil {
		return s.heap()
	}
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return int64(sample[0].Value.Uint64())
}
