package relay

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// A model is a relay between two simulated ends. Each end keeps the state of RFC
// 4254 of its own, and checks that every message from the relay is legal in it.
type model struct {
	t               *testing.T
	j               *joined
	client, bastion *sim
	pairs           map[uint32]*pair // by the payload of the open
	opened          uint32
	arrived         bool
	honest          bool // no end sends messages against the protocol
	lost            bool // the bastion has gone, or never comes
	asks, heard     int  // of the gateway's own keepalives
}

// A pair is the channel at both ends.
type pair struct {
	client, bastion *simChannel
	early           bool // confirmed by the relay; the bastion has not confirmed it yet
	started         bool // the client has asked for a command
	commands        int  // those that the bastion has not answered
	mayEnd          bool // the relay may end it, so that bytes may be lost
}

// A sim is one end of the model.
type sim struct {
	m        *model
	name     string
	peer     *peer
	far      *sim
	evil     bool // breaks the protocol
	mutate   func(packet []byte) [][]byte
	inbox    [][]byte // from the relay, not looked at yet
	channels map[uint32]*simChannel
	opens    []uint32 // channels of the other end to be confirmed or refused
	asked    []expectation
	toAnswer []sshmsg.GlobalRequest
}

// A simChannel is a channel at one end.
type simChannel struct {
	number, remote      uint32
	session             bool
	confirmed           bool
	pair                *pair
	recvWindow, recvMax int64
	grace               int64 // by which an evil far end may exceed recvWindow
	sendWindow, sendMax int64
	sentEOF, sentClose  bool
	gotEOF, gotClose    bool
	sent, received      [2]int // bytes of data and of stderr
	asked               []expectation
	toAnswer            []sshmsg.Request
}

// An expectation is the reply that must come.
type expectation struct {
	ok, exact bool
	payload   byte
}

func newModel(t *testing.T, r *Relay) *model {
	m := &model{t: t, j: start(t, r), pairs: make(map[uint32]*pair), honest: true}
	m.client = &sim{m: m, name: "client", peer: m.j.client, channels: make(map[uint32]*simChannel)}
	m.bastion = &sim{m: m, name: "bastion", peer: m.j.bastion, channels: make(map[uint32]*simChannel), far: m.client}
	m.client.far = m.bastion
	synctest.Wait()
	return m
}

func (m *model) arrive() {
	if !m.arrived && !m.lost {
		m.arrived = true
		m.j.arrive()
		synctest.Wait()
	}
}

// end returns one end of the pair.
func (p *pair) end(of *sim) **simChannel {
	if of == of.m.client {
		return &p.client
	}
	return &p.bastion
}

// send has the relay read a packet, which an evil end changes.
func (s *sim) send(packet []byte) {
	packets := [][]byte{packet}
	if s.mutate != nil {
		packets = s.mutate(packet)
	}
	if testing.Verbose() {
		s.m.t.Logf("%s sends\n%s", s.name, describe(packets))
	}
	s.peer.send(packets...)
	synctest.Wait()
}

// pull looks at up to n packets from the relay, or at all of them if n is -1.
func (s *sim) pull(n int) (any bool) {
	s.inbox = append(s.inbox, s.peer.got()...)
	for len(s.inbox) > 0 && n != 0 {
		packet := s.inbox[0]
		s.inbox = s.inbox[1:]
		if testing.Verbose() {
			s.m.t.Logf("%s receives\n%s", s.name, describe([][]byte{packet}))
		}
		if err := s.receive(packet); err != nil && !s.evil {
			s.m.t.Fatalf("the %s got %q: %v", s.name, packet, err)
		}
		any, n = true, n-1
	}
	return any
}

// sequence is the byte at a position of a stream. It is never ASCII, which is used
// for text of the gateway and for ^C.
func sequence(c *simChannel, stream, at int) byte {
	return 0x80 | byte(at*5+stream*17+int(c.number)*0)&0x7f
}

// receive checks a packet and changes the state.
func (s *sim) receive(packet []byte) error {
	switch packet[0] {
	case sshmsg.NumGlobalRequest:
		q, err := sshmsg.ParseGlobalRequest(packet)
		if q.WantReply {
			s.toAnswer = append(s.toAnswer, q)
		}
		return err
	case sshmsg.NumRequestSuccess, sshmsg.NumRequestFailure:
		if len(s.asked) == 0 {
			return fmt.Errorf("a reply to no request")
		}
		q := s.asked[0]
		s.asked = s.asked[1:]
		ok := packet[0] == sshmsg.NumRequestSuccess
		if s.m.honest && !s.m.lost && (ok != q.ok || ok && q.exact && (len(packet) != 2 || packet[1] != q.payload)) {
			return fmt.Errorf("it should be the reply %+v", q)
		}
		return nil
	case sshmsg.NumOpen:
		return s.receiveOpen(packet)
	}
	n, err := sshmsg.Recipient(packet)
	if err != nil {
		return err
	}
	c := s.channels[n]
	switch {
	case c == nil:
		return fmt.Errorf("there is no channel %d", n)
	case c.gotClose:
		return fmt.Errorf("channel %d is closed", n)
	}
	switch packet[0] {
	case sshmsg.NumOpenConfirm:
		a, err := sshmsg.ParseOpenConfirm(packet)
		if c.confirmed || c.remote != math.MaxUint32 {
			return fmt.Errorf("channel %d is open", n)
		}
		c.confirmed, c.remote, c.sendWindow, c.sendMax = true, a.Sender, int64(a.Window), int64(a.MaxPacket)
		return err
	case sshmsg.NumOpenFailure:
		if c.confirmed || c.remote != math.MaxUint32 {
			return fmt.Errorf("channel %d is open", n)
		}
		delete(s.channels, n)
		return nil
	}
	if !c.confirmed {
		return fmt.Errorf("channel %d is not open", n)
	}
	return s.receiveOn(c, packet)
}

func (s *sim) receiveOpen(packet []byte) error {
	o, err := sshmsg.ParseOpen(packet)
	if err != nil {
		return err
	}
	for _, c := range s.channels {
		if c.remote == o.Sender {
			return fmt.Errorf("the relay's number is in use")
		}
	}
	p := &pair{}
	if s.m.honest {
		if len(o.Payload) != 1 || s.m.pairs[uint32(o.Payload[0])] == nil {
			return fmt.Errorf("an open that nobody has sent")
		}
		p = s.m.pairs[uint32(o.Payload[0])]
	}
	c := s.add(o.Type == "session", p)
	c.remote, c.sendWindow, c.sendMax = o.Sender, int64(o.Window), int64(o.MaxPacket)
	s.opens = append(s.opens, c.number)
	return nil
}

// add has a channel with the lowest number that is free.
func (s *sim) add(session bool, p *pair) *simChannel {
	c := &simChannel{remote: math.MaxUint32, session: session, pair: p}
	for s.channels[c.number] != nil {
		c.number++
	}
	s.channels[c.number] = c
	*p.end(s) = c
	return c
}

// receiveOn is a message on an open channel.
func (s *sim) receiveOn(c *simChannel, packet []byte) error {
	var err error
	switch packet[0] {
	case sshmsg.NumWindowAdjust:
		var a sshmsg.WindowAdjust
		a, err = sshmsg.ParseWindowAdjust(packet)
		if c.sendWindow += int64(a.Bytes); c.sendWindow > math.MaxUint32 {
			return fmt.Errorf("a window beyond 2^32-1")
		}
	case sshmsg.NumData, sshmsg.NumExtendedData:
		return s.receiveData(c, packet)
	case sshmsg.NumEOF:
		_, err = sshmsg.ParseRecipient(packet)
		if c.gotEOF {
			return fmt.Errorf("a second EOF")
		}
		c.gotEOF = true
		return cmpErr(err, s.complete(c))
	case sshmsg.NumClose:
		_, err = sshmsg.ParseRecipient(packet)
		c.gotClose = true
		if err := s.complete(c); err != nil {
			return err
		}
		if c.sentClose {
			delete(s.channels, c.number)
		}
	case sshmsg.NumRequest:
		var q sshmsg.Request
		q, err = sshmsg.ParseRequest(packet)
		if q.WantReply {
			c.toAnswer = append(c.toAnswer, q)
		}
	case sshmsg.NumSuccess, sshmsg.NumFailure:
		_, err = sshmsg.ParseRecipient(packet)
		if len(c.asked) == 0 {
			return fmt.Errorf("a reply to no request")
		}
		q := c.asked[0]
		c.asked = c.asked[1:]
		if ok := packet[0] == sshmsg.NumSuccess; s.m.honest && !s.m.lost && q.exact && ok != q.ok {
			return fmt.Errorf("it should be the reply %+v", q)
		}
	default:
		return fmt.Errorf("an unknown message")
	}
	return err
}

func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *sim) receiveData(c *simChannel, packet []byte) error {
	d, err := sshmsg.ParseData(packet)
	if err != nil {
		return err
	}
	c.recvWindow -= int64(len(d.Data))
	switch {
	case c.gotEOF:
		return fmt.Errorf("data behind EOF")
	case c.recvWindow < 0 && !(s.far.evil && c.recvWindow >= -c.grace):
		return fmt.Errorf("%d bytes beyond the window", -c.recvWindow)
	case int64(len(d.Data)) > c.recvMax:
		return fmt.Errorf("a packet of more than %d bytes", c.recvMax)
	}
	stream := 0
	if d.Extended {
		stream = 1
	}
	for _, b := range d.Data {
		if b < 0x80 { // of the gateway, or ^C
			continue
		}
		if want := sequence(c, stream, c.received[stream]); s.m.honest && b != want {
			return fmt.Errorf("byte %d of stream %d is %#x, want %#x", c.received[stream], stream, b, want)
		}
		c.received[stream]++
	}
	return nil
}

// complete checks that all that the other end has sent has come.
func (s *sim) complete(c *simChannel) error {
	from := *c.pair.end(s.far)
	if !s.m.honest || s.m.lost || c.pair.mayEnd || c.sentClose || from == nil {
		return nil
	}
	if c.received != from.sent {
		return fmt.Errorf("%d bytes came of %d", c.received, from.sent)
	}
	return nil
}

// list returns the channels in order, open ones only.
func (s *sim) list() (all []*simChannel) {
	for _, c := range s.channels {
		if c.confirmed && !c.sentClose {
			all = append(all, c)
		}
	}
	slices.SortFunc(all, func(a, b *simChannel) int { return int(a.number) - int(b.number) })
	return all
}
