package relay

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// A channel is one in the table: open, or being opened.
type channel struct {
	number     uint32 // the relay's, for both peers
	serial     int    // see Opening
	kind       string
	fromClient bool // opened by the client
	since      time.Time
	state      state
	payload    []byte // of the open; nil once it is answered
	kept       int    // bytes of kind and payload, see keep

	client, bastion end

	early     *early // not nil until the bastion has confirmed an early session
	confirmed bool   // it is, or was, an early session
	watch     ChannelWatcher
	taps      Taps
	err       error // why nothing passes any more; nil otherwise

	terminal bool   // pty-req was granted
	exited   bool   // the bastion has sent exit-status or exit-signal
	runs     string // see Channel
	command  string

	injected injected

	// held are messages of the client that wait: for the bastion to confirm an
	// early session, or, while holding is set, for the reply to pty-req.
	held      [][]byte
	heldBytes int
	holding   bool
}

// errEnded is why nothing passes on a channel that the relay has ended itself.
var errEnded = errors.New("ended")

type state int

const (
	opening state = iota // the open is not answered yet
	opened
)

// An end is the state of a channel at one of the peers.
type end struct {
	number    uint32
	window    int64 // bytes that may still be sent to it; negative within its grace
	grace     int64 // see windowGrace
	maxPacket uint32
	requests  []*channelRequest // by this peer, unanswered, oldest first
	bytes     atomic.Int64      // of data and stderr that came from it

	sentEOF, sentClose bool // by this peer
	toldEOF, toldClose bool // to this peer
}

// windowGrace is the part of the initial window, a tenth, by which a peer may exceed a
// window before it is disconnected. Current versions of OpenSSH take as much; 9.2
// drops the data beyond the window. RFC 4254 section 5.2 permits neither.
const windowGrace = 10

// grants takes the window and the maximum packet size of an open or a confirmation.
func (e *end) grants(window, maxPacket uint32) {
	e.window, e.grace, e.maxPacket = int64(window), int64(window)/windowGrace, maxPacket
}

func (c *channel) isSession() bool { return c.fromClient && c.kind == sshmsg.TypeSession }

// ends returns the end of the peer given and the other end.
func (r *Relay) ends(c *channel, of *leg) (its, far *end) {
	if of == &r.client {
		return &c.client, &c.bastion
	}
	return &c.bastion, &c.client
}

// channelOpen handles CHANNEL_OPEN: it refuses it or passes it on.
func (r *Relay) channelOpen(from *leg, packet []byte) error {
	m, err := sshmsg.ParseOpen(packet)
	if err != nil {
		return protocolError("malformed channel open")
	}
	if reason, why := r.mayOpen(from, m, len(packet)); why != "" {
		r.refused(Refusal{Kind: m.Type, FromClient: from == &r.client, Payload: m.Payload, Channel: -1, Code: reason, Why: why})
		from.conn.WritePacket(sshmsg.OpenFailure{Recipient: m.Sender, Reason: reason, Description: why}.Append(nil))
		return nil
	}
	c := r.newChannel(m.Type, from == &r.client)
	c.payload, c.kept = append([]byte(nil), m.Payload...), len(m.Type)+len(m.Payload)
	its, _ := r.ends(c, from)
	its.number = m.Sender
	its.grants(m.Window, m.MaxPacket)
	if from.far.conn == nil && c.isSession() {
		return r.confirmEarly(c)
	}
	m.Sender = c.number
	r.write(from.far, m.Append(nil))
	return nil
}

// mayOpen returns why a channel is refused; empty if it is not.
func (r *Relay) mayOpen(from *leg, m sshmsg.Open, size int) (reason uint32, why string) {
	if err := policy.MayOpenChannel(r.Permissions, m.Type, m.Payload); err != nil {
		return sshmsg.Prohibited, err.Error()
	}
	if from == &r.bastion {
		if err := r.listeners.mayOpen(m.Type, m.Payload); err != nil {
			return sshmsg.Prohibited, err.Error()
		}
	}
	session := m.Type == sshmsg.TypeSession
	switch {
	case r.refusal != "" && !(session && from == &r.client):
		return sshmsg.ConnectFailed, r.refusal
	case r.ending:
		return sshmsg.ConnectFailed, "connection is closing"
	case session && from == &r.client && r.noMoreSessions:
		return sshmsg.Prohibited, "no more sessions were announced"
	case session && r.sessions >= r.MaxSessions:
		return sshmsg.ResourceShortage, "too many sessions on this connection"
	case r.open >= r.MaxChannels:
		if !r.full {
			r.full = true
			r.Log.Warn("too many channels on this connection", "max_channels", r.MaxChannels)
		}
		return sshmsg.ResourceShortage, "too many channels on this connection"
	case !r.hasRoom(from.far, size):
		return sshmsg.ConnectFailed, "too many channels while the bastion is starting"
	case !r.keep(len(m.Type) + len(m.Payload)):
		return sshmsg.ResourceShortage, "too long requests for channels"
	}
	return 0, ""
}

// newChannel puts a channel into the table.
func (r *Relay) newChannel(kind string, fromClient bool) *channel {
	r.view.Lock()
	defer r.view.Unlock()
	c := &channel{serial: r.opened, kind: kind, fromClient: fromClient, since: time.Now()}
	r.opened++
	r.open++
	if kind == sshmsg.TypeSession {
		r.sessions++
	}
	for n, other := range r.channels {
		if other == nil {
			c.number = uint32(n)
			r.channels[n] = c
			return c
		}
	}
	c.number = uint32(len(r.channels))
	r.channels = append(r.channels, c)
	return c
}

// free takes a channel out of the table, when both peers have closed it.
func (r *Relay) free(c *channel) {
	r.view.Lock()
	r.channels[c.number] = nil
	r.toBastion += c.client.bytes.Load()
	r.toClient += c.bastion.bytes.Load()
	r.view.Unlock()
	r.open--
	if c.kind == sshmsg.TypeSession {
		r.sessions--
	}
	r.kept -= c.kept
	for _, requests := range [][]*channelRequest{c.client.requests, c.bastion.requests} {
		for _, q := range requests {
			r.kept -= q.kept
		}
	}
	r.listeners.sessionEnded(c.serial)
	r.stopProgress(c)
	r.endWatch(c, false)
	if r.ending && r.open == 0 {
		close(r.drained)
	}
}

// endWatch tells the watcher that a channel has ended.
func (r *Relay) endWatch(c *channel, lost bool) {
	if c.watch != nil {
		c.watch.End(c.client.bytes.Load(), c.bastion.bytes.Load(), lost)
		c.watch = nil
	}
}

// find returns the channel that a message of from is about.
func (r *Relay) find(packet []byte) (*channel, error) {
	n, err := sshmsg.Recipient(packet)
	if err != nil || uint64(n) >= uint64(len(r.channels)) || r.channels[n] == nil {
		return nil, protocolError("unknown channel")
	}
	return r.channels[n], nil
}

// answered returns the channel whose open from answers.
func (r *Relay) answered(from *leg, number uint32) (*channel, error) {
	if uint64(number) >= uint64(len(r.channels)) {
		return nil, protocolError("unknown channel")
	}
	c := r.channels[number]
	if c == nil || c.state != opening || c.fromClient == (from == &r.client) || c.early != nil && !c.early.openSent {
		return nil, protocolError("answer to no channel open")
	}
	return c, nil
}

// openConfirmed handles CHANNEL_OPEN_CONFIRMATION.
func (r *Relay) openConfirmed(from *leg, packet []byte) error {
	m, err := sshmsg.ParseOpenConfirm(packet)
	if err != nil {
		return protocolError("malformed channel open confirmation")
	}
	c, err := r.answered(from, m.Recipient)
	if err != nil {
		return err
	}
	its, far := r.ends(c, from)
	its.number = m.Sender
	its.grants(m.Window, m.MaxPacket)
	r.view.Lock()
	c.state = opened
	r.view.Unlock()
	switch {
	case c.early != nil:
		r.replayEarly(c)
		return nil
	case c.err != nil: // the bastion has gone meanwhile
		r.send(c, from, sshmsg.AppendRecipient(nil, sshmsg.NumClose, 0))
		return nil
	}
	if why := r.watchOpen(c); why != nil {
		from.conn.WritePacket(sshmsg.AppendRecipient(nil, sshmsg.NumClose, its.number))
		its.toldClose = true
		c.err = why
		from.far.conn.WritePacket(sshmsg.OpenFailure{Recipient: far.number, Reason: sshmsg.ConnectFailed, Description: why.Error()}.Append(nil))
		far.sentClose, far.toldClose = true, true // it never had it
		return nil
	}
	c.payload = nil
	m.Recipient, m.Sender = far.number, c.number
	from.far.conn.WritePacket(m.Append(nil))
	return nil
}

// watchOpen calls the watcher, if there is one, for a new channel.
func (r *Relay) watchOpen(c *channel) (err error) {
	if r.Watch == nil {
		return nil
	}
	c.watch, err = r.Watch.Open(Opening{Number: c.serial, Kind: c.kind, FromClient: c.fromClient, Payload: c.payload})
	if err == nil && c.watch != nil {
		if taps := c.watch.Taps(); taps != nil {
			c.taps = *taps
		}
	}
	return err
}

// openFailed handles CHANNEL_OPEN_FAILURE.
func (r *Relay) openFailed(from *leg, packet []byte) error {
	m, err := sshmsg.ParseOpenFailure(packet)
	if err != nil {
		return protocolError("malformed channel open failure")
	}
	c, err := r.answered(from, m.Recipient)
	if err != nil {
		return err
	}
	r.refused(Refusal{Kind: c.kind, FromClient: c.fromClient, Payload: c.payload, Channel: -1, ByFar: true, Code: m.Reason, Why: m.Description})
	if c.early != nil {
		c.bastion.sentClose, c.bastion.toldClose = true, true // it never had it
		if c.err != nil {
			r.freeIfClosed(c)
		} else {
			r.endSession(c, r.NotGranted, false) // frees it, too
		}
		return nil
	}
	if c.err == nil {
		_, far := r.ends(c, from)
		m.Recipient = far.number
		from.far.conn.WritePacket(m.Append(nil))
	}
	r.free(c)
	return nil
}

// reject refuses a channel that is in the table, for a reason of the relay's.
func (r *Relay) reject(c *channel, reason uint32, why string) {
	r.refused(Refusal{Kind: c.kind, FromClient: c.fromClient, Payload: c.payload, Channel: -1, Code: reason, Why: why})
	to, its := &r.client, &c.client
	if !c.fromClient {
		to, its = &r.bastion, &c.bastion
	}
	to.conn.WritePacket(sshmsg.OpenFailure{Recipient: its.number, Reason: reason, Description: why}.Append(nil))
	r.free(c)
}
