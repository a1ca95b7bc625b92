package relay

import (
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	// stalled is how long a channel that its client has closed may take to
	// hand over what the client sent before, without any progress.
	stalled = 10 * time.Second
	// requestsMax is how many channel requests may wait for the reply to an
	// earlier one. A client that sends more loses the channel.
	requestsMax = 1024
)

// bridge opens the same channel on the far side and carries everything both
// ways until both directions have ended.
//
// The near side is accepted only after the far side has confirmed: package ssh
// drops data that arrives before Accept, and the first bytes of a protocol in
// which the server speaks first would be lost.
func (s *side) bridge(nc ssh.NewChannel) {
	far, farReqs, err := s.far.OpenChannel(nc.ChannelType(), nc.ExtraData())
	if err != nil {
		reason, text := ssh.ConnectionFailed, "the other side is closing its connection"
		if refused, ok := err.(*ssh.OpenChannelError); ok {
			reason, text = refused.Reason, refused.Message
		}
		nc.Reject(reason, text)
		return
	}
	near, nearReqs, err := nc.Accept()
	if err != nil { // the near side's connection has ended, and the far side's is about to
		far.Close()
		ssh.DiscardRequests(farReqs)
		return
	}

	out := flow{side: s, to: &sink{Channel: far}, from: near, reqs: nearReqs, toServer: s.toServer}
	back := flow{side: s, to: &sink{Channel: near}, from: far, reqs: farReqs, toServer: !s.toServer}
	if s.toServer && nc.ChannelType() == "session" {
		out.session, back.session = back.to, back.to
		defer s.r.forget(back.to)
	}
	var wg sync.WaitGroup
	out.start(&wg, back.carry)
	out.carry()
	wg.Wait()
}

// A sink is the end of a channel that is written to. Package ssh wants writes
// to one stream, and the EOF after them, not to happen at once; data and EOF
// come from one goroutine, but stderr has writers of our own beside the bastion.
type sink struct {
	ssh.Channel
	mu  sync.Mutex // held while writing to stderr and while sending EOF
	eof bool
}

func (s *sink) writeStderr(p []byte) (int, error) {
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
	reqs     <-chan *ssh.Request // of from
	session  *sink               // the client's end, if this is a session
	toServer bool

	moved atomic.Int64 // bytes handed over, stderr included
}

// carry moves all that from sends to the channel to: data, stderr, requests,
// then EOF, then close. It returns when from is closed and all has been handed
// over.
//
// The end of a session is announced to the client by exit-status before EOF;
// RFC 4254, section 6.10, leaves the order open. An OpenSSH client that
// multiplexes closes as soon as it has sent and received EOF, package ssh
// confirms a close by itself and at once, and a status that comes later is
// lost: the user would see 255. So the EOF of a command that closes its output
// early is late; that is the price.
func (f *flow) carry() {
	toClient := f.session != nil && !f.toServer
	var (
		exited = make(chan struct{})
		exit   = sync.OnceFunc(func() { close(exited) })
		lost   bool // guarded by exited
		data   sync.WaitGroup
		all    sync.WaitGroup
	)
	f.start(&data, func() { f.copy(f.to.writeStderr, f.from.Stderr()) })
	f.start(&all, func() {
		f.copy(f.to.Write, f.from)
		// EOF ends both streams: what stderr sends later would be dropped
		// here, and take it for an attack is what sshd does.
		data.Wait()
		if toClient {
			<-exited
			if lost {
				f.to.writeStderr([]byte("\r\n" + f.r.Lost + "\r\n"))
			}
		}
		f.to.closeWrite()
	})

	seen := f.relayRequests(exit)
	// from is closed now: nothing more will come in.
	lost = toClient && !seen && f.serverLost()
	exit()
	f.await(&all)
	f.to.Close()
}

// start runs what in a goroutine that wg waits for and whose panics end this
// connection only.
func (f *flow) start(wg *sync.WaitGroup, what func()) {
	wg.Go(func() {
		defer f.recover("channel")
		what()
	})
}

// await waits until everything has been handed over. If it was the client that
// closed the channel, nobody waits for the rest any more, and a bastion that
// does not read must not keep the channel for ever.
func (f *flow) await(all *sync.WaitGroup) {
	if f.toServer {
		check := int64(-1)
		var timer *time.Timer
		timer = time.AfterFunc(stalled, func() {
			if now := f.moved.Load(); now != check {
				check = now
				timer.Reset(stalled)
				return
			}
			f.to.Close() // the copies end as soon as the far side confirms
		})
		defer timer.Stop()
	}
	all.Wait()
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
	smallBuffer = 512
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
		n, err := from.Read(small)
		if !f.handOver(write, small[:n]) || err != nil {
			return
		}
		if n == len(small) && !f.copyBulk(write, from) {
			return
		}
	}
}

// copyBulk copies with a large buffer until the stream runs dry. It reports
// whether the stream goes on.
func (f *flow) copyBulk(write func([]byte) (int, error), from io.Reader) bool {
	buf := largeBuffers.Get().(*[largeBuffer]byte)
	defer largeBuffers.Put(buf)
	for {
		n, err := from.Read(buf[:])
		if !f.handOver(write, buf[:n]) || err != nil {
			return false
		}
		if n < dry {
			return true
		}
	}
}

func (f *flow) handOver(write func([]byte) (int, error), p []byte) bool {
	if len(p) == 0 {
		return true
	}
	n, err := write(p)
	f.moved.Add(int64(n))
	return err == nil
}

// relayRequests passes channel requests on, and their replies back, in order,
// until from is closed. It calls exit when the end of a session's command has
// been passed on, and reports whether that happened.
//
// Requests that wait behind one whose reply is still out are kept here, not in
// package ssh: it keeps 16, and then stops the whole connection.
func (f *flow) relayRequests(exit func()) (exited bool) {
	var (
		mu    sync.Mutex
		queue []*ssh.Request
		busy  bool
		wg    sync.WaitGroup
	)
	pass := func(req *ssh.Request) {
		f.passRequest(req)
		if req.Type == "exit-status" || req.Type == "exit-signal" {
			exited = true // read after wg.Wait, or written by this goroutine
			exit()
		}
	}
	drain := func() {
		for {
			mu.Lock()
			if len(queue) == 0 {
				busy = false
				mu.Unlock()
				return
			}
			req := queue[0]
			queue = queue[1:]
			mu.Unlock()
			pass(req)
		}
	}
	for req := range f.reqs {
		mu.Lock()
		switch {
		case !busy && !req.WantReply: // nothing to wait for
			mu.Unlock()
			pass(req)
			continue
		case len(queue) >= requestsMax:
			mu.Unlock()
			f.r.Log.Warn("too many channel requests", "side", f.name, "request", req.Type)
			f.from.Close()
			continue
		}
		queue = append(queue, req)
		if !busy {
			busy = true
			wg.Wait() // of the drain before, which is as good as over
			f.start(&wg, drain)
		}
		mu.Unlock()
	}
	wg.Wait()
	return exited
}

// passRequest passes one channel request on and its reply back.
func (f *flow) passRequest(req *ssh.Request) {
	if answeredHere(req) {
		return
	}
	if !f.r.permitsRequest(req.Type) {
		req.Reply(false, nil)
		return
	}
	ok, err := f.to.SendRequest(req.Type, req.WantReply, req.Payload)
	ok = ok && err == nil
	if req.Type == "pty-req" && f.session != nil && (ok || !req.WantReply) {
		f.r.remember(f.session)
	}
	req.Reply(ok, nil)
}
