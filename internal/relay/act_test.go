package relay

import (
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// bytesOf hands out the fuzzer's bytes; behind the last they are zero.
type bytesOf []byte

func (b *bytesOf) next() int {
	if len(*b) == 0 {
		return 0
	}
	n := (*b)[0]
	*b = (*b)[1:]
	return int(n)
}

var sizes = []int64{0, 1, 20, 100, 700, 4096, 5000, 70000}

// open opens a channel.
func (s *sim) open(arg int) {
	if s == s.m.bastion && !s.m.arrived || s.m.opened >= 200 {
		return
	}
	p := &pair{}
	id := byte(s.m.opened)
	s.m.pairs[s.m.opened] = p
	s.m.opened++
	kind := "kind@example.com"
	if s == s.m.client && arg&1 == 0 {
		kind = "session"
	}
	c := s.add(kind == "session", p)
	c.grants(sizes[arg>>1&7], sizes[1+arg>>4%7])
	p.early = kind == "session" && !s.m.arrived
	s.send(sshmsg.Open{Type: kind, Sender: c.number, Window: uint32(c.recvWindow), MaxPacket: uint32(c.recvMax), Payload: []byte{id}}.Append(nil))
}

func (c *simChannel) grants(window, maxPacket int64) {
	c.recvWindow, c.recvMax, c.grace = window, maxPacket, window/windowGrace
}

// answerOpen confirms or refuses the oldest channel that the other end has opened.
func (s *sim) answerOpen(arg int) {
	if len(s.opens) == 0 {
		return
	}
	c := s.channels[s.opens[0]]
	s.opens = s.opens[1:]
	if arg&7 == 0 {
		if c.pair.early {
			c.pair.mayEnd, c.pair.early = true, false
		}
		delete(s.channels, c.number)
		s.send(sshmsg.OpenFailure{Recipient: c.remote, Reason: sshmsg.ConnectFailed}.Append(nil))
		return
	}
	c.confirmed = true
	c.grants(sizes[arg>>3&7], sizes[1+arg>>6])
	if c.pair.early {
		c.pair.early = false
		c.pair.mayEnd = c.pair.mayEnd || c.recvWindow < earlyWindow
	}
	s.send(sshmsg.OpenConfirm{Recipient: c.remote, Sender: c.number, Window: uint32(c.recvWindow), MaxPacket: uint32(c.recvMax)}.Append(nil))
}

// data sends as much as the windows permit.
func (s *sim) data(c *simChannel, arg int) {
	n := min(sizes[arg&7], c.sendWindow, c.sendMax)
	if c.sentEOF || n < 0 {
		return
	}
	stream := arg >> 3 & 1
	d := sshmsg.Data{Recipient: c.remote, Extended: stream == 1, Code: uint32(stream)}
	for range n {
		d.Data = append(d.Data, sequence(c, stream, c.sent[stream]))
		c.sent[stream]++
	}
	c.sendWindow -= n
	s.send(d.Append(nil))
}

// interrupt sends ^C.
func (s *sim) interrupt(c *simChannel) {
	if c.sentEOF || c.sendWindow == 0 || c.sendMax == 0 {
		return
	}
	c.sendWindow--
	c.pair.mayEnd = c.pair.mayEnd || c.pair.early
	s.send(sshmsg.Data{Recipient: c.remote, Data: []byte{interrupt}}.Append(nil))
}

func (s *sim) eof(c *simChannel) {
	if !c.sentEOF {
		c.sentEOF = true
		s.send(eof(c.remote))
	}
}

func (s *sim) close(c *simChannel) {
	c.sentClose = true
	if c.gotClose {
		delete(s.channels, c.number)
	}
	if c.pair.early && !c.pair.started {
		c.pair.mayEnd = true
	}
	s.send(closing(c.remote))
}

func (s *sim) adjust(c *simChannel, n int64) {
	c.recvWindow += n
	s.send(adjust(c.remote, uint32(n)))
}

var (
	clientRequests  = []string{"pty-req", "shell", "exec", "env", "odd@example.com", "keepalive@openssh.com", "window-change", "subsystem"}
	bastionRequests = []string{"exit-status", "odd@example.com", "keepalive@openssh.com", "exit-signal"}
)

// request asks on a channel. The reply is to be success if bit 6 is set.
func (s *sim) request(c *simChannel, arg int) {
	kinds := bastionRequests[:]
	if s == s.m.client {
		kinds = clientRequests
	}
	kind := kinds[arg%len(kinds)]
	wantReply := arg&0x20 != 0
	ok := arg&0x40 != 0 && kind != "keepalive@openssh.com"
	if c.session && isCommand(kind) && s == s.m.client {
		switch {
		case c.pair.commands > 0: // it is not known whether this one can run
			ok = false
		case !c.pair.early || !c.pair.started:
			c.pair.commands++
		}
	}
	if wantReply {
		c.asked = append(c.asked, expectation{ok: ok, exact: !c.pair.early})
	}
	if c.pair.early && isCommand(kind) {
		c.pair.started = true
	}
	if c.pair.early && mustSucceed(kind) && arg&0x40 == 0 {
		c.pair.mayEnd = true
	}
	s.send(sshmsg.Request{Recipient: c.remote, Type: kind, WantReply: wantReply, Payload: []byte{byte(arg)}}.Append(nil))
}

// answer replies to the oldest request on a channel.
func (s *sim) answer(c *simChannel) {
	if len(c.toAnswer) == 0 {
		return
	}
	q := c.toAnswer[0]
	c.toAnswer = c.toAnswer[1:]
	if c.session && isCommand(q.Type) && s == s.m.bastion {
		c.pair.commands--
	}
	if len(q.Payload) == 1 && q.Payload[0]&0x40 != 0 {
		s.send(success(c.remote))
	} else {
		s.send(failure(c.remote))
	}
}

// global sends a global request, to which the relay or the other end replies.
func (s *sim) global(arg int) {
	if s == s.m.bastion && !s.m.arrived {
		return
	}
	kind := "odd@example.com"
	if arg&7 == 0 {
		kind = "keepalive@openssh.com"
	} else if arg&7 == 1 {
		kind = "hostkeys-00@openssh.com"
	}
	wantReply := arg&0x20 != 0
	if wantReply {
		ok := arg&0x40 != 0 && kind == "odd@example.com"
		s.asked = append(s.asked, expectation{ok: ok, exact: true, payload: byte(arg)})
	}
	s.send(sshmsg.GlobalRequest{Type: kind, WantReply: wantReply, Payload: []byte{byte(arg)}}.Append(nil))
}

func (s *sim) answerGlobal() {
	if len(s.toAnswer) == 0 {
		return
	}
	q := s.toAnswer[0]
	s.toAnswer = s.toAnswer[1:]
	if len(q.Payload) == 1 && q.Payload[0]&0x40 != 0 {
		s.send([]byte{sshmsg.NumRequestSuccess, q.Payload[0]})
	} else {
		s.send(requestFailure)
	}
}
