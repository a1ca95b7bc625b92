// Package relay joins two SSH connections packet by packet: the connection of a
// client and that of its bastion, both of which have logged in. The relay reads a message
// of the connection protocol (RFC 4254) from one side, decides whether it may pass, and
// writes it to the other side.
//
// # Reading the package
//
//	relay.go      a connection from its first packet to its end
//	global.go     global requests and the order of their replies
//	open.go       opening channels: limits, policy, confirmation
//	channel.go    messages on an open channel
//	ending.go     the end of a channel, and of one of the connections
//	early.go      sessions that are confirmed before the bastion is there
//	listeners.go  for which listeners a bastion may open channels
//	inject.go     text of the gateway in a client's window
//	notice.go     notices to terminals
//	watch.go      the interface to audit log and recordings
//	list.go       the list of channels that the console shows
//
// # Messages that pass
//
// Channels and requests of unknown types pass with their payload unchanged. The two ends
// agree on windows and packet sizes, so the relay neither holds data back nor
// acknowledges it. Replies keep the order of their requests (RFC 4254, sections 4 and
// 5.4). Messages about one of the two connections do not pass:
//
//   - keepalive@openssh.com is answered here, both as a global and as a channel
//     request, because a client expects an answer while its bastion is starting.
//   - no-more-sessions@openssh.com is enforced here.
//   - hostkeys-00@openssh.com and hostkeys-prove-00@openssh.com are about the host
//     keys of one connection (OpenSSH PROTOCOL, section 2.5): the relay answers a
//     client's hostkeys-prove with ProveHostKeys, and refuses all others.
//   - tun@openssh.com is refused: a bastion has no tunnel device.
//
// The relay rejects messages that the user's [identity.Permissions] rule out, as
// far as it can decide that without resolving a host name. The bastion resolves the name
// and decides again. The bastion alone enforces ForceCommand.
//
// # Channel numbers
//
// The relay gives each channel one number, which both peers use as the recipient channel
// when they write to the relay. It is an index into the connection's table, so a peer
// cannot name a channel of another connection. When the relay passes a message on, it
// replaces the number by the receiver's.
//
// # Memory
//
// The relay writes data to the other side at once; only bytes that do not fit the socket
// are queued. While more than queueMax bytes are queued for one side, the relay does not
// read from the other.
package relay

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// A Conn carries the packets of one connection that has logged in. ReadPacket and
// Buffered are called by one goroutine, the other methods by any.
type Conn interface {
	// ReadPacket returns the next packet, which is valid until the next call.
	ReadPacket() ([]byte, error)
	// Buffered reports whether ReadPacket would return without reading from
	// the network.
	Buffered() bool
	// WritePacket queues a packet. It copies p and does not block.
	WritePacket(p []byte) error
	// Flush sends what is queued, as far as the network takes it at once; the
	// rest follows without another call. It does not block.
	Flush() error
	// WaitWritableUnless blocks while more than bound bytes are queued, but
	// returns when unless is closed.
	WaitWritableUnless(bound int, unless <-chan struct{}) error
	// Exchanging returns a channel that is closed while a key exchange is
	// under way.
	Exchanging() <-chan struct{}
	// Unimplemented answers the packet last read with UNIMPLEMENTED (RFC 4253,
	// section 11.4).
	Unimplemented() error
	// Disconnect sends DISCONNECT (RFC 4253, section 11.1) and closes.
	Disconnect(reason uint32, text string) error
	// Close unblocks ReadPacket and WaitWritableUnless.
	Close() error
}

// A Relay joins a client's connection to its bastion's. Set the fields, then
// call [Relay.Run], once.
type Relay struct {
	// Client is the client's connection. The relay owns it.
	Client      Conn
	Permissions identity.Permissions

	// MaxSessions limits the channels of type session that are open at once,
	// and MaxChannels those of all types, in both directions together. Zero
	// means 10 and 1000.
	MaxSessions, MaxChannels int

	// ProveHostKeys answers the client's hostkeys-prove-00@openssh.com, which is
	// about the host keys of the gateway (OpenSSH PROTOCOL, section 2.5). Nil
	// means that such requests fail.
	ProveHostKeys func(payload []byte) (reply []byte, ok bool)

	// Lost, if not nil, returns the text for the standard error of every session
	// that is open when the bastion's connection ends by itself. It is called
	// once at most, and may block for some seconds; the sessions end after it.
	Lost func() string
	// NotGranted and Interrupted are texts for the standard error of a session
	// that was confirmed before the bastion was there: NotGranted if the bastion
	// then refuses the session, its terminal or its command; Interrupted if the
	// terminal sends ^C before the bastion is there. Empty means no text.
	NotGranted, Interrupted string
	// Waiting, if not nil, returns the text that a terminal shows while its
	// bastion is starting. It must not block.
	Waiting func() string

	// Watch, if not nil, is called for channels and requests; see Watcher.
	Watch Watcher

	// FirstData, if not nil, is called when the bastion sends the first data of a
	// channel. It must not block.
	FirstData func()

	Log *slog.Logger

	mu              sync.Mutex
	client, bastion leg
	channels        []*channel // by our number; nil where it is free
	open            int        // channels in the table
	sessions        int        // of those, of type session
	opened          int        // channels so far, the serial number of the next
	noMoreSessions  bool
	full            bool          // logged that MaxChannels was reached
	first           *leg          // the side that has ended first; nil while neither has
	ending          bool          // new channels are refused
	drained         chan struct{} // closed when ending is set and no channel is open
	backlogBytes    int
	kept            int    // bytes, see keep
	refusal         string // why the start of the bastion has failed; empty otherwise
	expected        string // see Expect

	// view guards, beside mu, the fields that Channels reads. Channels locks only
	// view, because mu is held during calls of a Watcher, which may block.
	view                sync.Mutex
	toBastion, toClient int64 // bytes of the channels that have ended

	listeners listeners
	notices   notices
}

const (
	maxSessionsDefault = 10
	maxChannelsDefault = 1000

	// If more than queueMax bytes are queued for one side, beside the socket's
	// buffer, the relay stops reading from the other. If more than repliesMax bytes
	// are queued for a side, the relay stops reading from the same side: beyond
	// queueMax there are only replies, to a peer that sends requests and does not
	// read.
	queueMax   = 256 << 10
	repliesMax = 1 << 20

	// backlogMax bounds the bytes of messages that wait for a bastion that is
	// still starting, with overhead for each message. OpenSSH sends a handful;
	// each -R adds one, and so does each keepalive behind it.
	backlogMax      = 1 << 20
	messageOverhead = 64

	// keptMax bounds the copies, in bytes, of unanswered opens and requests of a
	// connection. A request has 256 KiB at most.
	keptMax = 4 << 20

	// farewell is the time that a client has to read the reason for the end of its
	// connection, and to open the session in which it is written.
	farewell = 2 * time.Second
)

// ErrNoBastion says that the bastion's start has failed.
var ErrNoBastion = errors.New("no bastion")

// A leg is one of the two connections.
type leg struct {
	conn Conn // nil while the bastion is starting
	name string
	far  *leg

	requests []*globalRequest // by this peer, unanswered, oldest first
	sent     []*globalRequest // to this peer, unanswered, oldest first

	backlog []waiting // for this peer, until it is there
}

// A protocolError is the fault of a peer, whose connection it ends.
type protocolError string

func (e protocolError) Error() string { return string(e) }

// A heldError is a protocolError in a message of the client that was held and is handled
// together with a packet of the bastion.
type heldError struct{ error }

func (e *heldError) Unwrap() error { return e.error }

// Run relays until either side ends, then closes the other. Every goroutine it
// starts has returned when Run returns, and both connections are closed.
//
// The bastion may still be starting: Run receives its connection from bastion. Until
// then Run confirms sessions that the client opens, and holds its other messages. If
// bastion is closed without a value, the start has failed: every session shows the text
// that refusal returns and ends with exit status 255, also if it is opened in the next two
// seconds. All other channels and requests are refused with that text, and Run returns
// ErrNoBastion.
//
// If the client disconnects before the bastion is there, Run returns at once and has
// received no value from bastion.
//
// The error is that of the side that ended first, [io.EOF] if the peer closed its
// connection. ByClient says that it was the client's side.
func (r *Relay) Run(bastion <-chan Conn, refusal func() string) (byClient bool, err error) {
	r.begin()
	clientEnd := make(chan struct{}) // closed when the client's connection has ended
	bastionErr := r.startBastion(bastion, refusal, clientEnd)
	err = r.pump(&r.client)
	close(clientEnd)
	return r.clientEnded(err, bastionErr)
}

// clientEnded waits for the end of the bastion's side, and returns the results of Run.
// Err is the end of the client's connection.
func (r *Relay) clientEnded(err error, bastionErr <-chan error) (byClient bool, why error) {
	if byClient = r.endedFirst(&r.client); byClient {
		r.clientGone()
	}
	r.Client.Close()
	if ofBastion := <-bastionErr; !byClient {
		err = ofBastion
	}
	r.finish()
	return byClient, err
}

// begin sets the defaults and the two legs.
func (r *Relay) begin() {
	if r.MaxSessions == 0 {
		r.MaxSessions = maxSessionsDefault
	}
	if r.MaxChannels == 0 {
		r.MaxChannels = maxChannelsDefault
	}
	r.drained = make(chan struct{})
	r.mu.Lock()
	defer r.unlock()
	r.client = leg{conn: r.Client, name: "client", far: &r.bastion}
	r.bastion = leg{name: "bastion", far: &r.client}
}

// startBastion calls runBastion in a goroutine, and returns the channel of its result.
func (r *Relay) startBastion(bastion <-chan Conn, refusal func() string, clientEnd <-chan struct{}) <-chan error {
	// If the bastion is there already, no session is confirmed in its place.
	var up Conn
	select {
	case up = <-bastion: // nil if it was closed, which runBastion notices
	default:
	}
	if up != nil {
		r.join(up)
	}
	end := make(chan error, 1)
	go func() { end <- r.runBastion(up, bastion, refusal, clientEnd) }()
	return end
}

// runBastion is the bastion's side of Run: it waits for the bastion, handles its
// packets, and ends the client's connection if the bastion's ends first. Up is the
// bastion's connection if it is there already.
func (r *Relay) runBastion(up Conn, bastion <-chan Conn, refusal func() string, clientEnd <-chan struct{}) (err error) {
	defer r.Client.Close()
	defer r.recovered(&r.bastion, &err)
	if up == nil {
		select {
		case <-clientEnd:
			return nil
		case up = <-bastion:
		}
		if up == nil {
			if r.endedFirst(&r.bastion) {
				r.dismiss(refusal())
				r.awaitFarewell(clientEnd, farewell)
			}
			return ErrNoBastion
		}
		if !r.join(up) {
			up.Close()
			return nil
		}
	}
	defer up.Close()
	err = r.pump(&r.bastion)
	if r.endedFirst(&r.bastion) {
		r.bastionGone()
		r.awaitFarewell(clientEnd, farewell)
	}
	return err
}

// endedFirst notes that a side has ended, and reports whether it is the first.
func (r *Relay) endedFirst(side *leg) bool {
	r.mu.Lock()
	defer r.unlock()
	if r.first == nil {
		r.first = side
	}
	return r.first == side
}

// pump handles the packets of one peer until its connection ends. Its goroutine waits in
// ReadPacket for most of the connection's life, so Run and pump use little stack: if all
// frames have less than 1,248 bytes, a garbage collection shrinks the stack to 4 KiB.
func (r *Relay) pump(from *leg) (err error) {
	defer r.recovered(from, &err)
	for err == nil {
		var packet []byte
		if packet, err = from.conn.ReadPacket(); err == nil {
			err = r.packet(from, packet)
		}
	}
	return err
}

// recovered turns a panic into an error, so that it ends one connection only.
func (r *Relay) recovered(from *leg, err *error) {
	if p := recover(); p != nil {
		oplog.Panic(r.Log, "relay from "+from.name, p)
		*err = fmt.Errorf("panic: %v", p)
	}
}

// blame disconnects the peer whose fault err is, and returns its side.
func (r *Relay) blame(from *leg, err error) *leg {
	at := from
	if held := (*heldError)(nil); errors.As(err, &held) {
		at = &r.client
	}
	r.Log.Warn("protocol error", "side", at.name, "err", err)
	at.conn.Disconnect(reasonProtocolError, err.Error())
	return at
}

// packet handles one packet, and then flushes and waits as keepUp says.
func (r *Relay) packet(from *leg, packet []byte) error {
	if err := r.lockAndHandle(from, packet); err != nil {
		if r.blame(from, err) == from {
			return err
		}
		return nil // the client's pump returns
	}
	return r.keepUp(from)
}

func (r *Relay) lockAndHandle(from *leg, packet []byte) error {
	r.mu.Lock()
	defer r.unlock()
	return r.handle(from, packet)
}

// keepUp flushes both connections if no other packet of from is there yet, so that all
// packets of one read(2) leave in one write(2). Then it waits while too many bytes are
// queued for either side. It does not wait while a key exchange is under way on from,
// because from must be read until that is over; see
// transport.Conn.WaitWritableUnless.
func (r *Relay) keepUp(from *leg) error {
	r.mu.Lock()
	far := from.far.conn
	r.unlock()
	if !from.conn.Buffered() {
		from.conn.Flush()
		if far != nil {
			far.Flush()
		}
	}
	if far == nil {
		return from.conn.WaitWritableUnless(repliesMax, from.conn.Exchanging())
	}
	// The error of far is its own pump's concern.
	far.WaitWritableUnless(queueMax, from.conn.Exchanging())
	return from.conn.WaitWritableUnless(repliesMax, from.conn.Exchanging())
}

// handle handles a packet by its message number. An error is the peer's fault and ends
// its connection.
func (r *Relay) handle(from *leg, packet []byte) error {
	if len(packet) == 0 {
		return protocolError("empty packet")
	}
	switch packet[0] {
	case sshmsg.NumGlobalRequest:
		return r.globalRequest(from, packet)
	case sshmsg.NumRequestSuccess, sshmsg.NumRequestFailure:
		return r.globalReply(from, packet)
	case sshmsg.NumOpen:
		return r.channelOpen(from, packet)
	case sshmsg.NumOpenConfirm:
		return r.openConfirmed(from, packet)
	case sshmsg.NumOpenFailure:
		return r.openFailed(from, packet)
	case sshmsg.NumWindowAdjust, sshmsg.NumData, sshmsg.NumExtendedData, sshmsg.NumEOF, sshmsg.NumClose,
		sshmsg.NumRequest, sshmsg.NumSuccess, sshmsg.NumFailure:
		return r.channelMessage(from, packet)
	}
	return from.conn.Unimplemented()
}

// reasonProtocolError and reasonByApplication are of RFC 4253, section 11.1.
const (
	reasonProtocolError = 2
	reasonByApplication = 11
)

// write sends a packet to a peer, or adds it to the backlog of a bastion that is
// starting.
func (r *Relay) write(to *leg, packet []byte) {
	switch {
	case to.conn != nil:
		to.conn.WritePacket(packet) // the reader gets the error, too
	case r.refusal == "":
		r.await(to, waiting{packet: append([]byte(nil), packet...)})
	}
}

// A waiting message is a packet, or the opening of an early session.
type waiting struct {
	packet []byte
	early  *channel
}

// await adds a message to the backlog of a bastion that is starting. The caller has
// called hasRoom.
func (r *Relay) await(to *leg, w waiting) {
	r.backlogBytes += len(w.packet) + messageOverhead
	to.backlog = append(to.backlog, w)
}

// keep counts a copy of n bytes of a peer's message, which lasts until the message is
// answered or its channel is freed. If the copies would exceed keptMax, it returns false
// and does not count this one.
func (r *Relay) keep(n int) bool {
	if r.kept+n > keptMax {
		return false
	}
	r.kept += n
	return true
}

// hasRoom reports whether n more bytes may wait for the bastion.
func (r *Relay) hasRoom(to *leg, n int) bool {
	return to.conn != nil || r.backlogBytes+n+messageOverhead <= backlogMax
}

// join sets the bastion's connection and sends the backlog. It returns false if the
// client has disconnected.
func (r *Relay) join(up Conn) bool {
	r.mu.Lock()
	defer r.unlock()
	if r.ending {
		return false
	}
	r.bastion.conn = up
	backlog := r.bastion.backlog
	r.bastion.backlog, r.backlogBytes = nil, 0
	for _, w := range backlog {
		if w.early != nil {
			r.openEarly(w.early)
		} else {
			up.WritePacket(w.packet)
		}
	}
	up.Flush()
	return true
}
