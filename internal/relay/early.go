package relay

import (
	"bytes"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/oplog"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// An early session is one that the client opens while its bastion is starting. The relay
// confirms it at once and answers its requests, because many clients have a timeout of 10
// or 20 seconds for opening a channel. When the bastion is there, the relay opens the
// session in the bastion and sends the client's messages in their order.

// early is the state of an early session until the bastion has confirmed it.
type early struct {
	openSent bool  // to the bastion
	started  bool  // the client has requested a shell, command or subsystem
	window   int64 // bytes that the client may still send; negative within the grace
	adjust   int64 // adjustments since the open, in bytes, to pass to the bastion

	progress *time.Timer // of a terminal that is shown that its bastion is starting
	dots     int
}

const (
	// earlyWindow is the receive window of an early session, in bytes, for typing
	// ahead. It is smaller than the initial window of any known server.
	earlyWindow    = 4 << 10
	earlyMaxPacket = 32 << 10 // RFC 4253, section 6.1

	interrupt = 3 // ^C

	// progressEvery is the interval of dots on a terminal, and every
	// linesEvery-th of them is a new line with the time.
	progressEvery = 4 * time.Second
	linesEvery    = 5
)

// confirmEarly confirms an early session.
func (r *Relay) confirmEarly(c *channel) error {
	if why := r.watchOpen(c); why != nil {
		r.client.conn.WritePacket(sshmsg.OpenFailure{Recipient: c.client.number, Reason: sshmsg.ConnectFailed, Description: why.Error()}.Append(nil))
		r.free(c)
		return nil
	}
	c.early = &early{window: earlyWindow}
	r.view.Lock()
	c.confirmed = true
	r.view.Unlock()
	r.client.conn.WritePacket(sshmsg.OpenConfirm{Recipient: c.client.number, Sender: c.number, Window: earlyWindow, MaxPacket: earlyMaxPacket}.Append(nil))
	r.await(&r.bastion, waiting{early: c})
	return nil
}

// openEarly opens an early session in the bastion.
func (r *Relay) openEarly(c *channel) {
	if c.err != nil {
		return
	}
	if c.early.progress != nil {
		r.say(c, "\r\n")
		r.stopProgress(c)
	}
	c.early.openSent = true
	c.injected.debt = c.injected.data()
	r.bastion.conn.WritePacket(sshmsg.Open{
		Type: c.kind, Sender: c.number, Window: uint32(max(0, c.client.window)), MaxPacket: c.client.maxPacket, Payload: c.payload,
	}.Append(nil))
	c.payload = nil
}

// earlyMessage handles a message of the client on an early session.
func (r *Relay) earlyMessage(c *channel, packet []byte) error {
	switch packet[0] {
	case sshmsg.NumWindowAdjust:
		return r.ownWindow(c, packet)
	case sshmsg.NumSuccess, sshmsg.NumFailure:
		return nil
	case sshmsg.NumRequest:
		return r.earlyRequest(c, packet)
	case sshmsg.NumData, sshmsg.NumExtendedData:
		m, err := sshmsg.ParseData(packet)
		if err != nil {
			return protocolError("malformed channel data")
		}
		if c.client.sentEOF {
			return nil // dropped, as OpenSSH does
		}
		if c.early.window -= int64(len(m.Data)); c.early.window < -earlyWindow/windowGrace {
			return protocolError("data beyond the window")
		}
		if c.terminal && c.early.started && bytes.IndexByte(m.Data, interrupt) >= 0 {
			r.endSession(c, r.Interrupted, false)
			return nil
		}
	case sshmsg.NumEOF:
		if _, err := sshmsg.ParseRecipient(packet); err != nil {
			return protocolError("malformed EOF")
		}
		if c.client.sentEOF {
			return nil
		}
		c.client.sentEOF = true
	}
	return c.hold(packet)
}

// earlyRequest answers a request. A request that begins a session succeeds, because the
// bastion most likely grants it.
func (r *Relay) earlyRequest(c *channel, packet []byte) error {
	m, err := sshmsg.ParseRequest(packet)
	if err != nil {
		return protocolError("malformed channel request")
	}
	wantReply := m.WantReply
	m.WantReply = false // answered here
	pass, forbidden := false, error(nil)
	if c.acceptsEarly(m.Type, wantReply) {
		pass, forbidden = r.mayPass(c, &r.client, m)
	}
	if pass {
		if m.Type == sshmsg.RequestPTY {
			c.terminal = true
		}
		m.WantReply = mustSucceed(m.Type)
		if err := c.hold(m.Append(nil)); err != nil {
			return err
		}
	}
	if wantReply {
		num := byte(sshmsg.NumFailure)
		if pass || forbidden != nil {
			num = sshmsg.NumSuccess
		}
		r.send(c, &r.client, sshmsg.AppendRecipient(nil, num, 0))
	}
	if forbidden != nil {
		r.fail(c, forbidden)
		return nil
	}
	if pass && isCommand(m.Type) {
		r.started(c, m.Type, m.Payload)
		c.early.started = true
		if r.refusal != "" {
			r.endSession(c, r.refusal, false)
		} else {
			r.startProgress(c)
		}
	}
	return nil
}

// acceptsEarly reports whether a request may be answered with success. As with sshd, the
// requests that prepare a session come before its only command. An unknown request is
// refused if the client wants a reply, because the relay cannot know the bastion's, and
// the next reply cannot be sent before it.
func (c *channel) acceptsEarly(kind string, wantReply bool) bool {
	switch kind {
	case sshmsg.RequestPTY:
		return !c.early.started && !c.terminal
	case sshmsg.RequestEnv, sshmsg.RequestX11, sshmsg.RequestAgent, sshmsg.RequestShell, sshmsg.RequestExec, sshmsg.RequestSubsystem:
		return !c.early.started
	}
	return !wantReply
}

// startProgress shows the text of Waiting, and then dots, on a terminal until the bastion
// is there.
func (r *Relay) startProgress(c *channel) {
	if !c.terminal || r.Waiting == nil || c.early.openSent {
		return
	}
	r.say(c, r.Waiting())
	c.early.progress = time.AfterFunc(progressEvery, func() { r.showProgress(c) })
}

// showProgress runs in the timer's goroutine. A panic ends the connection only.
func (r *Relay) showProgress(c *channel) {
	defer func() {
		if p := recover(); p != nil {
			oplog.Panic(r.Log, "progress", p)
			r.Client.Close()
		}
	}()
	r.mu.Lock()
	defer r.unlock()
	if c.early == nil || c.early.progress == nil || c.err != nil || c.injected.waits() {
		return
	}
	c.early.dots++
	text := "."
	if c.early.dots%linesEvery == 0 {
		text = "\r\n" + r.Waiting()
	}
	r.say(c, text)
	r.client.conn.Flush()
	c.early.progress.Reset(progressEvery)
}

func (r *Relay) stopProgress(c *channel) {
	if c.early != nil && c.early.progress != nil {
		c.early.progress.Stop()
		c.early.progress = nil
	}
}

// endEarly ends early sessions without a command, after the time of farewell.
func (r *Relay) endEarly() {
	r.mu.Lock()
	defer r.unlock()
	for _, c := range r.channels {
		if c != nil && c.early != nil && c.err == nil {
			r.endSession(c, r.refusal, false)
		}
	}
}

func isCommand(kind string) bool {
	return kind == sshmsg.RequestShell || kind == sshmsg.RequestExec || kind == sshmsg.RequestSubsystem
}

// mustSucceed reports whether an early session must end if the bastion refuses a request
// of this kind, which the relay has answered with success. A terminal is one, because the
// client has put the user's terminal into raw mode.
func mustSucceed(kind string) bool { return kind == sshmsg.RequestPTY || isCommand(kind) }

// replayEarly sends the client's messages to the bastion, which has confirmed the early
// session.
func (r *Relay) replayEarly(c *channel) {
	held, left, more := c.held, c.early.window, c.early.adjust
	c.early, c.held, c.heldBytes = nil, nil, 0
	if c.err != nil || c.bastion.window < earlyWindow || c.bastion.maxPacket == 0 {
		r.endSession(c, r.NotGranted, false)
		if !c.bastion.toldClose {
			r.send(c, &r.bastion, sshmsg.AppendRecipient(nil, sshmsg.NumClose, 0))
		}
		return
	}
	if rest := c.bastion.window - earlyWindow; rest > 0 && !c.client.sentClose {
		r.client.conn.WritePacket(sshmsg.WindowAdjust{Recipient: c.client.number, Bytes: uint32(rest)}.Append(nil))
	}
	c.bastion.window -= earlyWindow - left
	if more > 0 {
		r.send(c, &r.bastion, sshmsg.WindowAdjust{Bytes: uint32(more)}.Append(nil))
	}
	for _, packet := range held {
		switch packet[0] {
		case sshmsg.NumRequest:
			m, err := sshmsg.ParseRequest(packet)
			if err == nil {
				r.listeners.session(c.serial, m.Type, m.Payload)
			}
			if err == nil && m.WantReply {
				c.client.requests = append(c.client.requests, &channelRequest{kind: m.Type, payload: append([]byte(nil), m.Payload...), fulfilled: true})
			}
		case sshmsg.NumData, sshmsg.NumExtendedData:
			if m, err := sshmsg.ParseData(packet); err == nil {
				c.client.bytes.Add(int64(len(m.Data)))
				if tap := c.taps.ToBastion; tap != nil {
					if err := tap(m.Data, m.Extended); err != nil {
						r.fail(c, err)
						return
					}
				}
				r.sendData(c, m, packet)
			}
			continue
		}
		r.send(c, &r.bastion, packet)
	}
	r.freeIfClosed(c)
}
