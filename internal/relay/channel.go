package relay

import (
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/policy"
)

const (
	// stalled is how long a channel that its client has closed may take to
	// hand over what the client sent before, without any progress.
	stalled = 10 * time.Second
	// unreadStalled is the same for a peer that has said that it reads no more
	// data; stderr may still be on its way.
	unreadStalled = 2 * time.Second
	// requestsMax is how many channel requests may wait for the reply to an
	// earlier one, and requestBytes how much they may carry. A peer that sends
	// more loses the channel.
	requestsMax  = 1024
	requestBytes = 1 << 20
)

// bridge opens the same channel on the far side and carries everything both
// ways until both directions have ended.
//
// The near side is accepted only after the far side has confirmed: package ssh
// drops data that arrives before Accept, and the first bytes of a protocol in
// which the server speaks first would be lost.
func (s *side) bridge(nc ssh.NewChannel, number int) {
	far, farReqs, err := s.far.OpenChannel(nc.ChannelType(), nc.ExtraData())
	if err != nil {
		reason, text := ssh.ConnectionFailed, "the other side is closing its connection"
		if refused, ok := err.(*ssh.OpenChannelError); ok {
			reason, text = refused.Reason, refused.Message
		}
		s.r.refused(Refusal{Kind: nc.ChannelType(), FromClient: s.toServer, Payload: nc.ExtraData(), Channel: -1, ByFar: true, Code: reason, Why: text})
		nc.Reject(reason, text)
		return
	}
	watch, err := s.watchOpen(nc, number)
	if err != nil {
		far.Close()
		ssh.DiscardRequests(farReqs)
		nc.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	near, nearReqs, err := nc.Accept()
	if err != nil { // the near side's connection has ended, and the far side's is about to
		far.Close()
		ssh.DiscardRequests(farReqs)
		if watch != nil {
			watch.End(0, 0, false)
		}
		return
	}

	out := &flow{side: s, to: &sink{Channel: far}, from: near, toServer: s.toServer, watch: watch, number: number}
	back := &flow{side: s, to: &sink{Channel: near}, from: far, toServer: !s.toServer, watch: watch, number: number}
	out.reverse, back.reverse = back, out
	up, down := out, back
	if !s.toServer {
		up, down = back, out
	}
	defer s.r.enlist(up, nc.ChannelType(), s.toServer)()
	if watch != nil {
		defer func() { watch.End(up.bytes.Load(), down.bytes.Load(), down.lost && !s.r.clientLeft.Load()) }()
	}
	if s.toServer && nc.ChannelType() == "session" {
		out.session, back.session = back.to, back.to
		defer s.r.forget(back.to)
	}
	out.begin()
	back.begin()
	// One goroutine takes the requests of both, which are few.
	var finishing sync.WaitGroup
	for nearReqs != nil || farReqs != nil {
		f, reqs := out, &nearReqs
		var req *ssh.Request
		var ok bool
		select {
		case req, ok = <-nearReqs:
		case req, ok = <-farReqs:
			f, reqs = back, &farReqs
		}
		if !ok {
			*reqs = nil
			out.start(&finishing, f.finish)
			continue
		}
		f.queue.add(req)
	}
	finishing.Wait()
}

// A sink is the end of a channel that is written to. Package ssh wants writes
// to one stream, and the EOF after them, not to happen at once; data and EOF
// come from one goroutine, but stderr has writers of our own beside the bastion.
type sink struct {
	ssh.Channel
	tap atomic.Pointer[tapped]
	mu  sync.Mutex // held while writing to stderr and while sending EOF
	eof bool
}

func (s *sink) write(p []byte) (int, error) {
	if err := s.through(p, false); err != nil {
		return 0, err
	}
	return s.Channel.Write(p)
}

func (s *sink) writeStderr(p []byte) (int, error) {
	if err := s.through(p, true); err != nil {
		return 0, err
	}
	return s.say(p)
}

// say is writeStderr for words of our own, which no tap sees.
func (s *sink) say(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.eof {
		return 0, io.EOF
	}
	return s.Channel.Stderr().Write(p)
}

func (s *sink) closeWrite() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.eof = true
	s.Channel.CloseWrite()
}

// A flow is one direction of a channel.
type flow struct {
	*side
	to       *sink
	from     ssh.Channel
	session  *sink // the client's end, if this is a session
	toServer bool
	reverse  *flow
	number   int            // of the channel
	watch    ChannelWatcher // may be nil
	terminal bool           // the bastion has granted one; for passRequest

	queue   requests
	streams atomic.Int32 // data and stderr, as far as they have not ended
	idle    atomic.Int32 // those of them that had nothing left to read, and wait for more
	// What hands over what from has sent: requests and other things that come to
	// an end by themselves, stderr, and data.
	all, stderr, data sync.WaitGroup
	exited            chan struct{} // closed when the end of a session's command has been passed on, or never will be
	lost              bool          // the session ended because the bastion did; written before exited is closed
	bytes             atomic.Int64  // of data and stderr that have been handed over
	passed            atomic.Int64  // requests that have been handed over

	unread  atomic.Bool // see stopReading
	drained atomic.Bool // from is closed, and there is nothing left but data
}

// begin starts to move all that from sends to the channel to.
func (f *flow) begin() {
	f.exited = make(chan struct{})
	f.queue.flow, f.queue.exit = f, sync.OnceFunc(func() { close(f.exited) })
	f.streams.Store(2)
	f.idle.Store(2)
	f.start(&f.stderr, func() { f.copy(f.to.writeStderr, f.from.Stderr()) })
	f.start(&f.data, func() { f.copy(f.to.write, f.from) })
}

// finish is for when from is closed, and no request will come any more: it sees
// to it that all has been handed over, the data, stderr and requests, and then
// EOF, and then close.
func (f *flow) finish() {
	handedOver := make(chan struct{})
	var hurry sync.WaitGroup
	f.start(&hurry, func() { f.hurry(handedOver) })
	f.queue.settle()
	if f.holdsEOF() && !f.queue.exited && f.r.lostText() != "" {
		f.lost = f.serverLost()
	}
	f.queue.exit()
	f.all.Wait()
	f.stderr.Wait()
	if f.drained.Store(true); f.unread.Load() {
		f.reverse.queue.settle() // as below
		f.to.Close()
	}
	f.data.Wait()
	close(handedOver)
	hurry.Wait()
	// A close overtakes the replies that are on their way from the other side.
	f.reverse.queue.settle()
	f.to.Close()
}

// holdsEOF says that EOF must wait for the end of the command.
//
// The end of a session is announced to the client by exit-status before EOF;
// RFC 4254, section 6.10, leaves the order open. An OpenSSH client that
// multiplexes closes as soon as it has sent and received EOF, package ssh
// confirms a close by itself and at once, and a status that comes later is
// lost: the user would see 255. So the EOF of a command that closes its output
// early is late; that is the price.
func (f *flow) holdsEOF() bool { return f.session != nil && !f.toServer }

// streamEnded counts the end of data or of stderr. EOF ends both: what stderr
// sends later would be dropped here, and sshd takes it for an attack.
func (f *flow) streamEnded() {
	if f.streams.Add(-1) > 0 {
		return
	}
	if f.holdsEOF() {
		<-f.exited
		// If the bastion is being ended, the agent may have been faster to end
		// the command, and to say so.
		if f.lost || f.r.expected.Load() != nil {
			f.to.writeStderr([]byte("\r\n" + f.r.lostText() + "\r\n"))
		}
	}
	f.to.closeWrite()
}

// start runs what in a goroutine that wg waits for and whose panics end this
// connection only.
func (f *flow) start(wg *sync.WaitGroup, what func()) {
	wg.Go(func() {
		defer f.recover("channel")
		what()
	})
}

// stopReading takes note that to's peer reads no more data, which it says with
// eow@openssh.com (OpenSSH PROTOCOL, section 2.1).
//
// OpenSSH's client throws away what it holds at that moment, a whole window if
// its output was slow, and never gives that part of the window back. So data may
// wait for ever to be handed over, as in "ssh host yes | head", and must not keep
// the channel from ending when the other side has ended it.
func (f *flow) stopReading() {
	if f.unread.Store(true); f.drained.Load() {
		f.to.Close() // and what waits for a window ends as soon as the peer confirms
	}
}

// hurry waits until everything has been handed over, for as long as there is
// progress, if nobody waits for the rest any more: if it was the client that
// closed the channel, or if the peer has said that it reads no more. One that
// does not read or reply must not keep the channel for ever then.
func (f *flow) hurry(handedOver <-chan struct{}) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	before, since := int64(-1), time.Now()
	for {
		select {
		case <-handedOver:
			return
		case <-tick.C:
		}
		if now := f.bytes.Load() + f.passed.Load(); now != before {
			before, since = now, time.Now()
		}
		if quiet := time.Since(since); f.unread.Load() && quiet >= unreadStalled || f.toServer && quiet >= stalled {
			f.to.Close() // what blocks ends as soon as the far side confirms
		}
	}
}

// serverLost says whether a session ended because its bastion's connection did.
// Package ssh closes the channels of a broken connection a moment before it
// tells that the connection is broken.
func (f *flow) serverLost() bool {
	timer := time.NewTimer(250 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-f.r.serverGone:
		return true
	case <-timer.C:
		return false
	}
}

// Copy buffers. Most channels are idle most of the time, and thousands of them
// must fit: while nothing comes in, a stream holds a small buffer only. As soon
// as that is filled a large one is borrowed, until the stream runs dry. A read
// from package ssh returns all that has arrived, up to the buffer's size, so a
// large one also saves locks, wake-ups and window adjustments.
const (
	smallBuffer = 128
	largeBuffer = 256 << 10
	// dry is what a read must return at least for the stream not to count as
	// dry: the payload of one full packet (RFC 4253, section 6.1).
	dry = 32 << 10
)

var largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

// copy hands over what from sends until its end, or until to takes no more.
func (f *flow) copy(write func([]byte) (int, error), from io.Reader) {
	small := make([]byte, smallBuffer)
	for {
		// An error beside data says that the window could not be adjusted. What
		// has arrived is still to be read.
		n, err := from.Read(small)
		f.idle.Add(-1)
		if n == 0 && err != nil || !f.handOver(write, small[:n]) || n == len(small) && !f.copyBulk(write, from) {
			f.streamEnded()
			return
		}
		f.idle.Add(1)
	}
}

// copyBulk copies with a large buffer until the stream runs dry. It reports
// whether the stream goes on.
func (f *flow) copyBulk(write func([]byte) (int, error), from io.Reader) bool {
	buf := largeBuffers.Get().(*[largeBuffer]byte)
	defer largeBuffers.Put(buf)
	for full := true; ; { // for all that is known
		if !full {
			f.idle.Add(1)
		}
		n, err := from.Read(buf[:])
		if !full {
			f.idle.Add(-1)
		}
		full = n == len(buf)
		if n == 0 && err != nil || !f.handOver(write, buf[:n]) {
			return false
		}
		if n < dry {
			return true
		}
	}
}

// handOver writes p, a packet at a time so that progress shows.
func (f *flow) handOver(write func([]byte) (int, error), p []byte) bool {
	for packet := range slices.Chunk(p, dry) {
		n, err := write(packet)
		f.bytes.Add(int64(n))
		if err != nil {
			return false
		}
	}
	return true
}

// requests passes channel requests on, and their replies back, in order.
//
// Those that wait behind one whose reply is still out are kept here, not in
// package ssh: it keeps 16, and then stops the whole connection.
type requests struct {
	*flow
	exit   func() // called when the end of a session's command has been passed on
	exited bool   // whether that has happened; may be read after settle

	mu      sync.Mutex
	settled sync.Cond // busy has become false
	waiting []*ssh.Request
	bytes   int
	busy    bool // a goroutine of all passes those that wait
	over    bool // there were too many
}

// settle waits until no request waits or is being passed.
func (q *requests) settle() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.settled.L = &q.mu
	for q.busy {
		q.settled.Wait()
	}
}

// add has req passed on.
func (q *requests) add(req *ssh.Request) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.over:
	case len(q.waiting) >= requestsMax || q.bytes+len(req.Payload) > requestBytes:
		q.r.Log.Warn("too many channel requests", "side", q.name, "request", req.Type)
		q.over, q.waiting = true, nil
		// Not here, with the lock: it has to be written, and may wait for a peer
		// that does not read.
		q.start(&q.all, func() {
			q.from.Close()
			q.to.Close()
		})
	default:
		q.waiting = append(q.waiting, req)
		q.bytes += len(req.Payload)
		if !q.busy {
			q.busy = true
			q.start(&q.all, q.drain)
		}
	}
}

// drain passes those that wait.
func (q *requests) drain() {
	panicked := true
	defer func() {
		if panicked { // which closes the connection; nobody may wait for more
			q.mu.Lock()
			q.over, q.busy, q.waiting = true, false, nil
			q.settled.Broadcast()
			q.mu.Unlock()
		}
	}()
	for {
		q.mu.Lock()
		if len(q.waiting) == 0 {
			q.busy, q.waiting = false, nil
			q.settled.Broadcast()
			q.mu.Unlock()
			panicked = false
			return
		}
		req := q.waiting[0]
		q.waiting = q.waiting[1:]
		q.bytes -= len(req.Payload)
		q.mu.Unlock()
		q.pass(req)
	}
}

func (q *requests) pass(req *ssh.Request) {
	q.passRequest(req)
	q.passed.Add(1)
	if req.Type == "exit-status" || req.Type == "exit-signal" {
		q.exited = true
		q.exit()
	}
}

// passRequest passes one channel request on and its reply back.
func (f *flow) passRequest(req *ssh.Request) {
	if answeredHere(req) {
		return
	}
	why := policy.MayRequest(f.r.Permissions, req.Type, req.Payload)
	if why == nil && !f.terminal {
		why = policy.MayRunWithoutPTY(f.r.Permissions, req.Type, req.Payload)
	}
	if why != nil {
		f.r.refused(Refusal{Kind: req.Type, FromClient: f.toServer, Payload: req.Payload, Channel: f.number, Code: ssh.Prohibited, Why: why.Error()})
		req.Reply(false, nil)
		return
	}
	if f.watch != nil {
		taps, err := f.watch.Request(req.Type, f.toServer, req.Payload)
		if err != nil {
			// A client that is told of a failure leaves before it has read why.
			req.Reply(true, nil)
			f.end(err)
			return
		}
		if taps != nil {
			f.install(taps)
		}
	}
	ok, err := f.to.SendRequest(req.Type, req.WantReply, req.Payload)
	ok = ok && err == nil
	if req.Type == endOfWrite {
		f.reverse.stopReading()
	}
	if f.watch != nil && req.WantReply {
		f.watch.Answered(req.Type, f.toServer, req.Payload, ok)
	}
	f.terminal = f.terminal || req.Type == "pty-req" && ok
	if f.session != nil && f.toServer && (ok || !req.WantReply) {
		if req.Type == "pty-req" {
			f.r.remember(f.session)
		}
		f.r.runs(f, req)
	}
	req.Reply(ok, nil)
}
