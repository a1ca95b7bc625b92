package relay

import (
	"math"
	"slices"

	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

const (
	// heldMax bounds the messages of the client, in bytes, that wait on a channel
	// for the reply to a pty-req, or for the bastion.
	heldMax = 256 << 10
)

// channelMessage handles a message about a channel that from has opened or
// confirmed.
func (r *Relay) channelMessage(from *leg, packet []byte) error {
	c, err := r.find(packet)
	if packet[0] == sshmsg.NumWindowAdjust && (err != nil || r.sentClose(c, from)) {
		return lateWindowAdjust(packet)
	}
	if err != nil {
		return err
	}
	switch {
	case r.sentClose(c, from):
		return protocolError("message on a closed channel")
	case c.state == opening && !(c.early != nil && from == &r.client):
		return protocolError("message on a channel that is not open")
	case packet[0] == sshmsg.NumClose:
		return r.close(c, from, packet)
	case c.err != nil: // the relay has ended it, and the peer has not seen that yet
		if from == &r.client && packet[0] == sshmsg.NumWindowAdjust {
			return r.ownWindow(c, packet)
		}
		return nil
	case from == &r.client && c.early != nil:
		return r.earlyMessage(c, packet)
	case from == &r.client && c.holds(packet):
		return c.hold(packet)
	}
	return r.channelPacket(c, from, packet)
}

func (r *Relay) sentClose(c *channel, from *leg) bool {
	its, _ := r.ends(c, from)
	return its.sentClose
}

// lateWindowAdjust drops a window adjustment for a channel that its sender has closed. Apache
// MINA sends one if a key exchange has delayed it, and OpenSSH drops it, too.
func lateWindowAdjust(packet []byte) error {
	if _, err := sshmsg.ParseWindowAdjust(packet); err != nil {
		return protocolError("malformed window adjustment")
	}
	return nil
}

// channelPacket passes a message on.
func (r *Relay) channelPacket(c *channel, from *leg, packet []byte) error {
	switch packet[0] {
	case sshmsg.NumData, sshmsg.NumExtendedData:
		return r.data(c, from, packet)
	case sshmsg.NumWindowAdjust:
		return r.windowAdjust(c, from, packet)
	case sshmsg.NumRequest:
		return r.channelRequest(c, from, packet)
	case sshmsg.NumSuccess, sshmsg.NumFailure:
		return r.channelReply(c, from, packet)
	}
	// EOF
	if _, err := sshmsg.ParseRecipient(packet); err != nil {
		return protocolError("malformed EOF")
	}
	if its, _ := r.ends(c, from); !its.sentEOF {
		its.sentEOF = true
		r.send(c, from.far, packet)
	}
	return nil
}

// send sends a packet about a channel, with the recipient that to knows it by. It
// changes the packet.
func (r *Relay) send(c *channel, to *leg, packet []byte) {
	its, _ := r.ends(c, to)
	if its.toldClose || to.conn == nil {
		return
	}
	switch packet[0] {
	case sshmsg.NumEOF:
		its.toldEOF = true
	case sshmsg.NumClose:
		its.toldClose = true
	}
	sshmsg.SetRecipient(packet, its.number)
	// A window adjustment does not wait, because it is about the other direction.
	if to == &r.client && c.injected.waits() && packet[0] != sshmsg.NumWindowAdjust {
		c.injected.add(packet)
		return
	}
	to.conn.WritePacket(packet)
}

// data passes data and extended data on, once a tap has seen it.
func (r *Relay) data(c *channel, from *leg, packet []byte) error {
	m, err := sshmsg.ParseData(packet)
	if err != nil {
		return protocolError("malformed channel data")
	}
	its, far := r.ends(c, from)
	if its.sentEOF {
		return nil // dropped, as OpenSSH does
	}
	known, maxPacket := far.window, far.maxPacket
	if from == &r.bastion {
		known = c.injected.known(far.window)
	} else if c.confirmed {
		maxPacket = max(maxPacket, earlyMaxPacket)
	}
	// If far has sent CLOSE, its window is not tracked any more, and data is dropped.
	if n := int64(len(m.Data)); !far.sentClose && (n > known+far.grace || n > int64(maxPacket)) {
		return protocolError("data beyond the window or the maximum packet size") // RFC 4254, section 5.2
	}
	tap := c.taps.ToBastion
	if from == &r.bastion {
		tap = c.taps.ToClient
	}
	if tap != nil {
		if err := tap(m.Data, m.Extended); err != nil {
			r.fail(c, err)
			return nil
		}
	}
	its.bytes.Add(int64(len(m.Data)))
	if from == &r.bastion && r.FirstData != nil {
		r.FirstData()
		r.FirstData = nil
	}
	if far.sentClose {
		return nil // it reads no more data
	}
	if from == &r.bastion && (c.injected.waits() || int64(len(m.Data)) > far.window) {
		// The gateway has used a part of the window that the bastion knows.
		if c.injected.full() {
			return protocolError("too many packets for a window that is used up")
		}
		sshmsg.SetRecipient(packet, far.number)
		c.injected.add(packet)
		r.sendInjected(c) // the part that fits
		return nil
	}
	far.window -= int64(len(m.Data))
	if from == &r.client {
		r.sendData(c, m, packet)
	} else {
		r.send(c, &r.client, packet)
	}
	return nil
}

// sendData sends the bastion data, in several packets if it takes only smaller ones
// than the client of an early session was told.
func (r *Relay) sendData(c *channel, m sshmsg.Data, packet []byte) {
	size := int(c.bastion.maxPacket)
	if len(m.Data) <= size {
		r.send(c, &r.bastion, packet)
		return
	}
	for ; len(m.Data) > 0; m.Data = m.Data[min(size, len(m.Data)):] {
		part := m
		part.Data = m.Data[:min(size, len(m.Data))]
		r.send(c, &r.bastion, part.Append(nil))
	}
}

// windowAdjust passes a window adjustment on, without the bytes by which the gateway has
// used the window itself.
func (r *Relay) windowAdjust(c *channel, from *leg, packet []byte) error {
	m, err := sshmsg.ParseWindowAdjust(packet)
	if err != nil {
		return protocolError("malformed window adjustment")
	}
	its, _ := r.ends(c, from)
	its.window += int64(m.Bytes)
	if its.window > math.MaxUint32 {
		return protocolError("window beyond 2^32-1 bytes") // RFC 4254, section 5.2
	}
	if from == &r.client && (c.injected.debt > 0 || c.injected.waits()) {
		m.Bytes -= c.injected.pay(m.Bytes)
		r.sendInjected(c)
		if m.Bytes == 0 {
			return nil
		}
		packet = m.Append(nil)
	}
	r.send(c, from.far, packet)
	return nil
}

// ownWindow handles a window adjustment of the client that does not pass to the bastion at
// once: the bastion does not know the channel yet, or the relay has ended the channel and
// the text that says why waits for the window.
func (r *Relay) ownWindow(c *channel, packet []byte) error {
	m, err := sshmsg.ParseWindowAdjust(packet)
	if err != nil {
		return protocolError("malformed window adjustment")
	}
	c.client.window += int64(m.Bytes)
	if c.client.window > math.MaxUint32 {
		return protocolError("window beyond 2^32-1 bytes") // RFC 4254, section 5.2
	}
	if c.early != nil && c.early.openSent {
		c.early.adjust += int64(m.Bytes - c.injected.pay(m.Bytes))
	}
	r.sendInjected(c)
	return nil
}

// close handles CLOSE. The channel is over when both peers have sent one.
func (r *Relay) close(c *channel, from *leg, packet []byte) error {
	if _, err := sshmsg.ParseRecipient(packet); err != nil {
		return protocolError("malformed close")
	}
	its, far := r.ends(c, from)
	its.sentClose = true
	if from == &r.client {
		// The client reads no more data, so drop data that waits for its window.
		r.discardInjected(c)
	}
	switch {
	case c.early != nil && !c.early.started && c.err == nil:
		r.endChannel(c, false) // nothing was asked of the bastion
		return nil
	case from == &r.client && c.err == nil && !c.bastion.sentClose && (c.early != nil || c.holding):
		return c.hold(packet) // behind the messages that are held
	case from == &r.client:
	default: // the bastion reads no more messages, so drop those that are held
		c.holding, c.held, c.heldBytes = false, nil, 0
		if c.client.sentClose && !c.bastion.toldClose { // which was held
			r.send(c, &r.bastion, sshmsg.AppendRecipient(nil, sshmsg.NumClose, 0))
		}
	}
	// Before the bastion has confirmed the channel, its number is not known.
	if !far.toldClose && c.state == opened {
		r.send(c, from.far, packet)
	}
	r.freeIfClosed(c)
	return nil
}

func (r *Relay) freeIfClosed(c *channel) {
	if c.client.sentClose && c.bastion.sentClose && c.client.toldClose && c.bastion.toldClose {
		r.free(c)
	}
}

// A channelRequest is one that wants a reply.
type channelRequest struct {
	kind      string
	payload   []byte // a copy, if there is a watcher
	kept      int    // bytes of kind and payload, see keep
	fulfilled bool   // the relay has replied with success before it passed it on
	silent    bool   // the peer wants no reply, but the relay does
	undo      func() // called if the request is refused; may be nil
	done, ok  bool
}

// channelRequest handles a request on a channel.
func (r *Relay) channelRequest(c *channel, from *leg, packet []byte) error {
	m, err := sshmsg.ParseRequest(packet)
	if err != nil {
		return protocolError("malformed channel request")
	}
	if c.injected.full() {
		return protocolError("too many requests for a window that is used up")
	}
	its, _ := r.ends(c, from)
	begins := c.isSession() && from == &r.client && isCommand(m.Type)
	undecided := begins && slices.ContainsFunc(its.requests, func(q *channelRequest) bool { return isCommand(q.kind) && !q.done })
	// JSch wants no reply to its pty-req. Without one to a command, the relay and its
	// watcher would take a command that the bastion has refused for the session's.
	silent := !m.WantReply && (begins || c.isSession() && from == &r.client && m.Type == sshmsg.RequestPTY)
	if silent {
		m.WantReply = true
		packet = m.Append(nil)
	}
	var q *channelRequest
	if m.WantReply {
		if len(its.requests) >= requestsMax {
			return protocolError("too many unanswered requests")
		}
		q = &channelRequest{kind: m.Type, kept: len(m.Type) + len(m.Payload), silent: silent}
		if !r.keep(q.kept) {
			return protocolError("too long unanswered requests")
		}
		if r.Watch != nil || m.Type == sshmsg.RequestExec || m.Type == sshmsg.RequestSubsystem {
			q.payload = append([]byte(nil), m.Payload...)
		}
		its.requests = append(its.requests, q)
	}
	if undecided {
		// A session has one command, and it is not known yet whether it is the earlier one.
		r.refused(Refusal{Kind: m.Type, FromClient: true, Payload: m.Payload, Channel: c.serial, Code: sshmsg.Prohibited, Why: "an earlier command of the session is not answered yet"})
		q.done = true
		r.answerChannel(c, from)
		return nil
	}
	pass, forbidden := r.mayPass(c, from, m)
	if !pass {
		if q != nil {
			q.done, q.ok = true, forbidden != nil
			r.answerChannel(c, from)
		}
		if forbidden != nil {
			r.fail(c, forbidden)
		}
		return nil
	}
	if c.isSession() && from == &r.client {
		undo := r.listeners.session(c.serial, m.Type, m.Payload)
		if q != nil {
			q.undo = undo
			c.holding = m.Type == sshmsg.RequestPTY
		}
	}
	if !m.WantReply && from == &r.client {
		r.started(c, m.Type, m.Payload)
	}
	r.send(c, from.far, packet)
	return nil
}

// mayPass decides whether a channel request passes. If not, the reply is failure. But if
// the watcher has forbidden the request, the reply is success and then the channel ends
// with the reason, because a client disconnects on failure before it reads the reason.
func (r *Relay) mayPass(c *channel, from *leg, m sshmsg.Request) (pass bool, forbidden error) {
	fromClient := from == &r.client
	switch m.Type {
	case sshmsg.Keepalive, sshmsg.HostKeys, sshmsg.HostKeysProve:
		return false, nil
	case sshmsg.RequestExitStatus, sshmsg.RequestExitSignal:
		// If the bastion is being ended, the command may end before the
		// connection does.
		if !fromClient && !c.exited && r.expected != "" {
			r.say(c, "\r\n"+r.expected+"\r\n")
		}
		c.exited = c.exited || !fromClient
	}
	why := policy.MayRequest(r.Permissions, m.Type, m.Payload)
	if why == nil && !c.terminal {
		why = policy.MayRunWithoutPTY(r.Permissions, m.Type, m.Payload)
	}
	if why != nil {
		r.refused(Refusal{Kind: m.Type, FromClient: fromClient, Payload: m.Payload, Channel: c.serial, Code: sshmsg.Prohibited, Why: why.Error()})
		return false, nil
	}
	if c.watch != nil {
		forbidden = c.watch.Request(m.Type, fromClient, m.Payload)
	}
	return forbidden == nil, forbidden
}

// channelReply handles the reply to a request. A reply to no request is dropped, as by
// OpenSSH.
func (r *Relay) channelReply(c *channel, from *leg, packet []byte) error {
	if _, err := sshmsg.ParseRecipient(packet); err != nil {
		return protocolError("malformed channel reply")
	}
	_, far := r.ends(c, from)
	var q *channelRequest
	for _, request := range far.requests {
		if !request.done {
			q = request
			break
		}
	}
	if q == nil {
		return nil
	}
	fromClient := from == &r.bastion // the request
	q.done, q.ok = true, packet[0] == sshmsg.NumSuccess
	if !q.ok && q.undo != nil {
		q.undo()
	}
	if c.watch != nil {
		c.watch.Answered(q.kind, fromClient, q.payload, q.ok)
	}
	if fromClient && q.ok {
		r.started(c, q.kind, q.payload)
	}
	if fromClient && q.kind == sshmsg.RequestPTY {
		c.terminal = c.terminal || q.ok
	}
	r.answerChannel(c, from.far)
	if fromClient && q.fulfilled && !q.ok && mustSucceed(q.kind) {
		r.endSession(c, r.NotGranted, false)
		return nil
	}
	if fromClient && q.kind == sshmsg.RequestPTY && c.holding {
		return r.release(c)
	}
	return nil
}

// answerChannel sends the replies that are due: those without an earlier request of the
// peer that is unanswered.
func (r *Relay) answerChannel(c *channel, to *leg) {
	its, _ := r.ends(c, to)
	for len(its.requests) > 0 && its.requests[0].done {
		q := its.requests[0]
		its.requests = its.requests[1:]
		r.kept -= q.kept
		if q.fulfilled || q.silent {
			continue
		}
		num := byte(sshmsg.NumFailure)
		if q.ok {
			num = sshmsg.NumSuccess
		}
		r.send(c, to, sshmsg.AppendRecipient(nil, num, 0))
	}
	if len(its.requests) == 0 {
		its.requests = nil
	}
}

// started notes the command of a session, for the console.
func (r *Relay) started(c *channel, kind string, payload []byte) {
	r.view.Lock()
	defer r.view.Unlock()
	switch kind {
	case sshmsg.RequestShell:
		c.runs = kind
	case sshmsg.RequestExec, sshmsg.RequestSubsystem:
		text, err := sshmsg.ParseString(payload)
		if err != nil {
			return
		}
		// Copied, since the rest of it may be long.
		text = string([]byte(text[:min(len(text), commandMax)]))
		if c.runs = kind; kind == sshmsg.RequestExec {
			c.command = text
		} else {
			c.runs = text
		}
	}
}

// holds reports whether a message of the client has to wait for the reply to its
// pty-req. A command has to, because the permission to run it, and its recording, depend
// on whether there is a terminal. Window adjustments and replies do not wait.
func (c *channel) holds(packet []byte) bool {
	switch packet[0] {
	case sshmsg.NumWindowAdjust, sshmsg.NumSuccess, sshmsg.NumFailure:
		return false
	}
	return c.holding
}

// hold keeps a message of the client for [Relay.release].
func (c *channel) hold(packet []byte) error {
	if c.heldBytes += len(packet) + messageOverhead; c.heldBytes > heldMax {
		return protocolError("too much sent before a request was answered")
	}
	c.held = append(c.held, append([]byte(nil), packet...))
	return nil
}

// release handles the messages that were held.
func (r *Relay) release(c *channel) error {
	held := c.held
	c.holding, c.held, c.heldBytes = false, nil, 0
	for i, packet := range held {
		switch {
		case c.err != nil:
			return nil
		case c.holding: // another pty-req
			for _, packet := range held[i:] {
				c.hold(packet)
			}
			return nil
		case packet[0] == sshmsg.NumClose:
			r.send(c, &r.bastion, packet)
			r.freeIfClosed(c)
			return nil
		}
		if err := r.channelPacket(c, &r.client, packet); err != nil {
			return &heldError{err}
		}
	}
	return nil
}
