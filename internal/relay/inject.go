package relay

import (
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// The gateway itself writes text to a client's sessions: notices, and the reason for
// which a session ends. The text uses the window that the client has granted to the
// bastion, and the bastion does not know that. So the gateway keeps back as many bytes
// of the next window adjustments, and holds data of the bastion that exceeds the client's
// window meanwhile.

// injected counts the gateway's text in the window of a client's session.
type injected struct {
	// debt is the number of bytes of text, sent or pending, by which the window
	// that the bastion knows is too large.
	debt    int64
	pending [][]byte // packets for the client that wait for its window, or behind another
	bytes   int      // of pending, with overhead
}

// injectedMax limits the packets, in bytes, that wait for a client's window. Beyond it,
// data and requests on the channel end the connection of the peer that sends them. A few
// messages of the gateway and replies to earlier requests may exceed it.
const injectedMax = 256 << 10

func (i *injected) waits() bool { return len(i.pending) > 0 }

func (i *injected) full() bool { return i.bytes >= injectedMax }

// add appends a packet to pending.
func (i *injected) add(packet []byte) {
	i.bytes += len(packet) + messageOverhead
	i.pending = append(i.pending, append([]byte(nil), packet...))
}

// data returns the number of bytes of data in pending.
func (i *injected) data() (n int64) {
	for _, packet := range i.pending {
		if m, err := sshmsg.ParseData(packet); err == nil {
			n += int64(len(m.Data))
		}
	}
	return n
}

// known returns the window that the bastion knows, computed from the client's real one.
func (i *injected) known(window int64) int64 { return window + i.debt - i.data() }

// pay returns the part of an adjustment that is kept back for the debt.
func (i *injected) pay(adjust uint32) uint32 {
	back := min(int64(adjust), i.debt)
	i.debt -= back
	return uint32(back)
}

// say writes text to the standard error of a client's session, now or when its
// window has room.
func (r *Relay) say(c *channel, text string) {
	if c.client.toldEOF || c.client.toldClose || c.client.sentClose {
		return
	}
	for len(text) > 0 {
		n := min(len(text), max(1, int(c.client.maxPacket)), 1024)
		c.injected.add(sshmsg.Data{Recipient: c.client.number, Extended: true, Code: sshmsg.Stderr, Data: []byte(text[:n])}.Append(nil))
		if c.err == nil && (c.early == nil || c.early.openSent) {
			c.injected.debt += int64(n)
		}
		text = text[n:]
	}
	r.sendInjected(c)
}

// sendInjected sends pending packets, as far as the window has room.
func (r *Relay) sendInjected(c *channel) {
	i := &c.injected
	for len(i.pending) > 0 {
		packet := i.pending[0]
		if m, err := sshmsg.ParseData(packet); err == nil && int64(len(m.Data)) > c.client.window {
			if c.client.window <= 0 {
				return
			}
			first := m
			first.Data = m.Data[:c.client.window]
			r.client.conn.WritePacket(first.Append(nil))
			m.Data = m.Data[c.client.window:]
			i.pending[0] = m.Append(nil)
			i.bytes -= len(packet) - len(i.pending[0])
			c.client.window = 0
			return
		} else if err == nil {
			c.client.window -= int64(len(m.Data))
		}
		i.bytes -= len(packet) + messageOverhead
		i.pending = i.pending[1:]
		r.client.conn.WritePacket(packet)
	}
	if len(i.pending) == 0 {
		i.pending = nil
	}
}

// discardInjected drops pending data, because the client has closed the channel, and sends
// the other pending packets.
func (r *Relay) discardInjected(c *channel) {
	pending := c.injected.pending
	c.injected = injected{}
	for _, packet := range pending {
		if packet[0] != sshmsg.NumData && packet[0] != sshmsg.NumExtendedData {
			r.client.conn.WritePacket(packet)
		}
	}
}

// tell writes a notice to the terminals whose window has room for it.
func (r *Relay) tell(n notice) {
	if r.client.conn == nil {
		return
	}
	told := false
	for _, c := range r.channels {
		if c == nil || !c.isSession() || c.err != nil || !c.terminal {
			continue
		}
		if !c.injected.waits() && c.client.window >= int64(len(n.line)) {
			r.say(c, n.line)
			told = true
		}
	}
	if told {
		r.client.conn.Flush()
	}
}
