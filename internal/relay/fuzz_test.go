package relay

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// step takes one action.
func (m *model) step(b *bytesOf) {
	op, which, arg := b.next(), b.next(), b.next()
	s := m.client
	if op&1 == 1 {
		s = m.bastion
	}
	var c *simChannel
	if all := s.list(); len(all) > 0 {
		c = all[which%len(all)]
	}
	switch op = op >> 1 % 16; {
	case op == 0:
		s.open(arg)
	case op == 1:
		s.answerOpen(arg)
	case op == 2:
		s.pull(arg)
	case op == 3:
		s.global(arg)
	case op == 4:
		s.answerGlobal()
	case op == 5 && arg&3 == 0:
		m.arrive()
	case op == 5 && arg&3 == 1 && (s == m.client || m.arrived) && m.asks < 100:
		m.asks++
		s.m.j.Ask(s == m.client, func() { m.heard++ })
		synctest.Wait()
	case op == 5 && arg&3 == 2:
		time.Sleep(time.Duration(which) * 100 * time.Millisecond)
	case op == 5:
		m.j.Tell("a notice of the gateway"[:which%24])
		synctest.Wait()
	case c == nil:
	case op == 6 || op == 7:
		s.data(c, arg)
	case op == 8 || op == 9:
		s.request(c, arg)
	case op == 10:
		s.answer(c)
	case op == 11 || op == 12:
		s.adjust(c, sizes[arg&7])
	case op == 13:
		s.eof(c)
	case op == 14:
		s.close(c)
	case op == 15 && s == m.client:
		s.interrupt(c)
	}
}

// settle has an end look at all that has come, and answer it, until there is no more.
func (m *model) settle() {
	for range 200 {
		any := false
		for _, s := range []*sim{m.client, m.bastion} {
			if s == m.bastion && m.lost {
				continue
			}
			any = s.pull(-1) || any
			for len(s.opens) > 0 {
				any = true
				s.answerOpen(0x2f) // a window of 5000 bytes
			}
			for len(s.toAnswer) > 0 {
				any = true
				s.answerGlobal()
			}
			for _, c := range s.list() {
				for len(c.toAnswer) > 0 {
					any = true
					s.answer(c)
				}
				if c.recvWindow < 10000 {
					any = true
					s.adjust(c, 50000)
				}
			}
		}
		if !any {
			return
		}
	}
	m.t.Fatal("it does not settle")
}

// closeAll closes all open channels of an end.
func (m *model) closeAll(s *sim) {
	for _, c := range s.list() {
		s.close(c)
	}
	m.settle()
}

// loudHandler counts errors in the log: panics.
type loudHandler struct {
	slog.Handler
	errors atomic.Int32
}

func (h *loudHandler) Enabled(context.Context, slog.Level) bool { return true }
func (h *loudHandler) Handle(_ context.Context, r slog.Record) error {
	if r.Level >= slog.LevelError {
		h.errors.Add(1)
	}
	return nil
}

// mutation returns how an evil end changes its packets.
func mutation(b *bytesOf) func([]byte) [][]byte {
	var kept [][]byte
	return func(packet []byte) [][]byte {
		kind, arg := b.next(), b.next()
		packet = bytes.Clone(packet)
		at := arg % len(packet)
		switch kind % 16 {
		case 1:
			packet[at] ^= 1 << (kind >> 4 & 7)
		case 2:
			packet = packet[:at]
		case 3:
			return append([][]byte{packet, packet}, take(&kept)...)
		case 4:
			kept = append(kept, packet)
			return nil
		case 5:
			packet = append(packet, make([]byte, 1+arg)...)
		case 6:
			if len(packet) >= 5 {
				sshmsg.SetRecipient(packet, uint32(arg&7))
			}
		case 7:
			if at+4 <= len(packet) {
				binary.BigEndian.PutUint32(packet[at:], 1<<32-1)
			}
		case 8:
			packet[0] = byte(80 + arg%22)
		case 9:
			packet = append(packet, make([]byte, arg<<5)...)
			if len(packet) >= 9 && packet[0] == sshmsg.NumData {
				binary.BigEndian.PutUint32(packet[5:], uint32(len(packet)-9))
			}
		}
		return append([][]byte{packet}, take(&kept)...)
	}
}

func take(kept *[][]byte) [][]byte {
	all := *kept
	*kept = nil
	return all
}

// FuzzRelay has two ends act at random. If both keep to the protocol, no byte is
// lost, invented or reordered, and all ends in the end. If one does not, the relay
// does not panic or hang, and sends the other nothing that is against the protocol.
func FuzzRelay(f *testing.F) {
	for _, seed := range fuzzSeeds() {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) > 2000 {
			return
		}
		synctest.Test(t, func(t *testing.T) { fuzzRelay(t, input) })
	})
}

func fuzzRelay(t *testing.T, input []byte) {
	b := bytesOf(input)
	r := permitAll()
	r.MaxSessions, r.MaxChannels = 4, 8
	r.Waiting = func() string { return "your bastion is starting" }
	log := &loudHandler{}
	r.Log = slog.New(log)
	m := newModel(t, r)
	defer m.j.end()
	mode := b.next()
	if mode&1 == 1 {
		m.arrive()
	}
	end := mode >> 1 % 4
	switch mode >> 3 % 4 {
	case 2:
		m.honest, m.client.evil, m.client.mutate = false, true, mutation(&b)
	case 3:
		m.honest, m.bastion.evil, m.bastion.mutate = false, true, mutation(&b)
	}
	for len(b) > 0 {
		m.step(&b)
	}
	m.client.mutate, m.bastion.mutate = nil, nil
	switch {
	case m.client.evil, m.honest && end == 3:
		m.client.pull(-1)
		m.bastion.pull(-1)
		m.client.peer.hangUp()
		synctest.Wait()
		m.bastion.pull(-1)
	case m.arrived && (m.bastion.evil || end == 2):
		m.bastionLost()
	case !m.arrived && end == 1:
		m.neverComes()
	default:
		m.orderly()
	}
	m.j.end()
	if n := log.errors.Load(); n > 0 {
		t.Errorf("%d panics", n)
	}
	for _, s := range []*sim{m.client, m.bastion} {
		if !s.evil && s.peer.reason == reasonProtocolError {
			t.Errorf("the %s was disconnected: %s", s.name, s.peer.said)
		}
	}
}

// orderly ends everything that is open.
func (m *model) orderly() {
	m.arrive()
	m.settle()
	for _, s := range []*sim{m.client, m.bastion} {
		if len(s.asked) > 0 {
			m.t.Errorf("the %s waits for %d replies", s.name, len(s.asked))
		}
		for n, c := range s.channels {
			if len(c.asked) > 0 && !c.gotClose && !c.sentClose && s.far.has(c.pair) {
				m.t.Errorf("the %s waits for %d replies on channel %d", s.name, len(c.asked), n)
			}
			if !c.confirmed {
				m.t.Errorf("channel %d of the %s is not open", n, s.name)
			}
		}
	}
	if m.heard != m.asks && m.honest {
		m.t.Errorf("%d of %d keepalives were answered; %d, %d wait", m.heard, m.asks, len(m.j.Relay.client.sent), len(m.j.Relay.bastion.sent))
	}
	m.closeAll(m.client)
	m.closeAll(m.bastion)
	r := m.j.Relay
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range []*sim{m.client, m.bastion} {
		for n, c := range s.channels {
			m.t.Errorf("channel %d of the %s is left: %+v", n, s.name, *c)
		}
	}
	for n, c := range r.channels {
		if c != nil {
			m.t.Errorf("channel %d of the relay is left: %+v %+v", n, &c.client, &c.bastion)
		}
	}
	if r.open != 0 || r.sessions != 0 {
		m.t.Errorf("%d channels and %d sessions are left", r.open, r.sessions)
	}
}

// has reports whether the end still sends on its channel.
func (s *sim) has(p *pair) bool {
	c := *p.end(s)
	return c != nil && c.confirmed && !c.sentClose
}

// bastionLost loses the bastion: every channel of the client ends, and then Run
// does, without a delay.
func (m *model) bastionLost() {
	if m.client.peer.isClosed() {
		return // the relay has disconnected the bastion, and then the client
	}
	m.bastion.peer.hangUp()
	synctest.Wait()
	m.lost = true
	began := time.Now()
	m.settleClient()
	for range 2 {
		m.closeClosed()
	}
	m.wantNothingOpen()
	<-m.j.done
	if waited := time.Since(began); waited > 0 {
		m.t.Errorf("Run returned after %v", waited)
	}
}

// neverComes has no bastion come.
func (m *model) neverComes() {
	m.lost = true
	close(m.j.server)
	synctest.Wait()
	m.settleClient()
	time.Sleep(farewell + time.Second)
	m.client.pull(-1)
	for n, c := range m.client.channels {
		if !c.gotClose {
			m.t.Errorf("channel %d of the client is left: %+v", n, *c)
		}
	}
}

func (m *model) settleClient() {
	m.settle()
}

// closeClosed has the client close the channels that the relay has closed.
func (m *model) closeClosed() {
	for _, c := range m.client.list() {
		if c.gotClose {
			m.client.close(c)
		}
	}
	m.settleClient()
}

func (m *model) wantNothingOpen() {
	for n, c := range m.client.channels {
		m.t.Errorf("channel %d of the client is left: %+v", n, *c)
	}
	if len(m.client.asked) > 0 {
		m.t.Errorf("the client waits for %d replies", len(m.client.asked))
	}
}

// fuzzSeeds are random actions in every mode.
func fuzzSeeds() (seeds [][]byte) {
	for mode := range 32 {
		for long := range 3 {
			seed := []byte{byte(mode)}
			state := uint32(mode*3+long)*2654435761 + 12345
			for range 60 << (2 * long) {
				state ^= state << 13
				state ^= state >> 17
				state ^= state << 5
				seed = append(seed, byte(state>>8))
			}
			seeds = append(seeds, seed)
		}
	}
	return seeds
}
