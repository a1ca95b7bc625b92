package relay

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

// gather reads a stream to its end, and tells what it has got and whether it
// has ended.
func gather(r io.Reader) (got func() (text string, eof bool)) {
	var mu sync.Mutex
	var text []byte
	var eof bool
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			mu.Lock()
			text = append(text, buf[:n]...)
			eof = err != nil
			mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return func() (string, bool) {
		mu.Lock()
		defer mu.Unlock()
		return string(text), eof
	}
}

// TestEOFWaitsForExit: the client of a session gets EOF after exit-status, and
// everybody else at once.
func TestEOFWaitsForExit(t *testing.T) {
	for _, exit := range []string{"exit-status", "exit-signal"} {
		bubble(t, func(t *testing.T) {
			w := join(t, permitAll(), inMemory)
			near, far := w.open("session")
			out, errs, in := gather(near), gather(near.Stderr()), gather(far)
			far.Write([]byte("out"))
			far.Stderr().Write([]byte("err"))
			far.CloseWrite()
			near.Write([]byte("in"))
			near.CloseWrite()
			time.Sleep(time.Hour)
			if text, eof := out(); text != "out" || eof {
				t.Errorf("before %s the client has %q, EOF %v", exit, text, eof)
			}
			if text, eof := errs(); text != "err" || eof {
				t.Errorf("before %s the client's stderr has %q, EOF %v", exit, text, eof)
			}
			if text, eof := in(); text != "in" || !eof {
				t.Errorf("the bastion has %q, EOF %v", text, eof)
			}
			if len(near.reqs) != 0 {
				t.Error("a request came from nowhere")
			}
			far.SendRequest(exit, false, []byte{0, 0, 0, 7})
			synctest.Wait()
			if req := <-near.reqs; req.Type != exit || !bytes.Equal(req.Payload, []byte{0, 0, 0, 7}) {
				t.Errorf("got %s %x", req.Type, req.Payload)
			}
			if _, eof := out(); !eof {
				t.Error("no EOF after exit")
			}
			far.Close()
			if _, open := <-near.reqs; open {
				t.Error("the channel is not closed")
			}
		})
	}
}

func TestEOFAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		for _, kind := range []string{"direct-tcpip", "forwarded-tcpip"} {
			from, to := w.client, w.bastion
			if kind == "forwarded-tcpip" {
				from, to = to, from
			}
			near, far := openBetween(t, from, to, kind)
			for _, ends := range [][2]channel{{near, far}, {far, near}} {
				got := gather(ends[1])
				ends[0].Write([]byte("x"))
				ends[0].CloseWrite()
				synctest.Wait()
				if text, eof := got(); text != "x" || !eof {
					t.Errorf("%s: got %q, EOF %v", kind, text, eof)
				}
			}
		}
	})
}

// A tap is a channel that records in which order it is written to.
type tap struct {
	ssh.Channel
	mu     *sync.Mutex
	events *[]string
}

func (c tap) record(event string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	*c.events = append(*c.events, event)
}

func (c tap) Write(p []byte) (int, error) { c.record("data"); return c.Channel.Write(p) }
func (c tap) CloseWrite() error           { c.record("EOF"); return c.Channel.CloseWrite() }
func (c tap) Close() error                { c.record("close"); return c.Channel.Close() }
func (c tap) Stderr() io.ReadWriter       { return tapStderr{c.Channel.Stderr(), c} }
func (c tap) SendRequest(name string, wantReply bool, payload []byte) (bool, error) {
	c.record(name)
	return c.Channel.SendRequest(name, wantReply, payload)
}

type tapStderr struct {
	io.ReadWriter
	tap tap
}

func (s tapStderr) Write(p []byte) (int, error) { s.tap.record("stderr"); return s.ReadWriter.Write(p) }

type tapOpen struct {
	ssh.NewChannel
	tap tap
}

func (o tapOpen) Accept() (ssh.Channel, <-chan *ssh.Request, error) {
	ch, reqs, err := o.NewChannel.Accept()
	o.tap.Channel = ch
	return o.tap, reqs, err
}

// TestFrameOrder looks at what a session's client is sent at the end.
func TestFrameOrder(t *testing.T) {
	type step = func(far channel)
	data := func(far channel) { far.Write([]byte("x")) }
	stderr := func(far channel) { far.Stderr().Write([]byte("x")) }
	eof := func(far channel) { far.CloseWrite() }
	exit := func(far channel) { far.SendRequest("exit-status", false, []byte{0, 0, 0, 0}) }
	closes := func(far channel) { far.Close() }
	pause := func(channel) { time.Sleep(time.Second) }
	tests := []struct {
		name  string
		steps []step
		want  []string
	}{
		{"sshd", []step{exit, pause, data, pause, eof, closes}, []string{"exit-status", "data", "EOF", "close"}},
		{"early EOF", []step{data, pause, eof, pause, exit, closes}, []string{"data", "exit-status", "EOF", "close"}},
		{"no EOF", []step{data, pause, exit, closes}, []string{"data", "exit-status", "EOF", "close"}},
		{"no exit", []step{data, pause, eof, closes}, []string{"data", "EOF", "close"}},
		{"stderr last", []step{exit, pause, data, pause, stderr, eof, closes}, []string{"exit-status", "data", "stderr", "EOF", "close"}},
		{"only close", []step{closes}, []string{"EOF", "close"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var mu sync.Mutex
				var events []string
				w := &world{t: t, relay: permitAll(), server: make(chan Peer, 1), done: make(chan struct{})}
				w.client, w.relay.Client = connect(t, inMemory, &ssh.ClientConfig{})
				w.up, w.bastion = connect(t, inMemory, &ssh.ClientConfig{})
				chans := make(chan ssh.NewChannel)
				go func(real <-chan ssh.NewChannel) {
					defer close(chans)
					for nc := range real {
						chans <- tapOpen{nc, tap{mu: &mu, events: &events}}
					}
				}(w.relay.Client.Chans)
				w.relay.Client.Chans = chans
				go w.run()
				w.server <- w.up
				near, far := w.open("session")
				out, errs := gather(near), gather(near.Stderr())
				for _, step := range tt.steps {
					step(far)
				}
				for range near.reqs {
				}
				time.Sleep(time.Second)
				if !slices.Equal(events, tt.want) {
					t.Errorf("got %q, want %q", events, tt.want)
				}
				for _, got := range []func() (string, bool){out, errs} {
					if text, eof := got(); text != "" && text != "x" || !eof {
						t.Errorf("read %q, EOF %v", text, eof)
					}
				}
				w.client.Conn.Close()
				<-w.done
			})
		})
	}
}

// send writes n random bytes in random pieces and returns their hash.
func send(t *testing.T, to io.Writer, n int, seed uint64) [32]byte {
	random := rand.New(rand.NewPCG(seed, 0))
	hash := sha256.New()
	block := make([]byte, 128<<10)
	source := rand.NewChaCha8([32]byte{byte(seed)})
	for n > 0 {
		size := min(n, 1+random.IntN(1<<random.IntN(18)))
		source.Read(block[:size])
		hash.Write(block[:size])
		if _, err := to.Write(block[:size]); err != nil {
			t.Error(err)
			break
		}
		n -= size
	}
	return [32]byte(hash.Sum(nil))
}

// receive reads to EOF and returns the hash of what it got.
func receive(t *testing.T, from io.Reader) [32]byte {
	hash := sha256.New()
	if _, err := io.Copy(hash, from); err != nil {
		t.Error(err)
	}
	return [32]byte(hash.Sum(nil))
}

// exchange sends data both ways on each stream of a channel, and requests
// between, closes it, and wants all of it to arrive.
func exchange(t *testing.T, near, far channel, size int, seed uint64) {
	var sum, got [4][32]byte
	var reading, writing, arriving sync.WaitGroup
	for i, from := range []io.Reader{near, near.Stderr()} {
		reading.Go(func() { got[i] = receive(t, from) })
	}
	for i, from := range []io.Reader{far, far.Stderr()} {
		arriving.Go(func() { got[2+i] = receive(t, from) })
	}
	for i, to := range []io.Writer{far, far.Stderr(), near, near.Stderr()} {
		writing.Go(func() { sum[i] = send(t, to, size, 4*seed+uint64(i)) })
	}
	const requests = 200
	for _, ends := range [][2]channel{{near, far}, {far, near}} {
		writing.Go(func() {
			for i := range requests {
				if ok, err := ends[0].SendRequest("r", i%2 == 1, []byte{byte(i)}); err != nil || ok != (i%4 == 1) {
					t.Errorf("request %d: %v, %v", i, ok, err)
				}
			}
		})
		reading.Go(func() {
			n := 0
			for req := range ends[1].reqs {
				if req.Type == "r" {
					if req.Payload[0] != byte(n) {
						t.Errorf("request %d came as %d", req.Payload[0], n)
					}
					req.Reply(n%4 == 1, nil)
					n++
				}
			}
			if n != requests {
				t.Errorf("%d requests arrived", n)
			}
		})
	}
	writing.Wait()
	near.CloseWrite()
	arriving.Wait() // who closes a channel does not want more
	far.SendRequest("exit-status", false, []byte{0, 0, 0, 0})
	far.CloseWrite()
	far.Close()
	reading.Wait()
	if sum != got {
		t.Errorf("what arrived is not what was sent: %x, %x", sum, got)
	}
}

func TestEverythingArrives(t *testing.T) {
	w := join(t, permitAll(), overTCP)
	var all sync.WaitGroup
	for i, kind := range []string{"session", "session", "direct-tcpip"} {
		near, far := w.open(kind)
		all.Go(func() { exchange(t, near, far, 3<<19, uint64(i)) })
	}
	all.Wait()
}

// TestRekey has the client renew its keys again and again under load.
func TestRekey(t *testing.T) {
	r := permitAll()
	w := &world{t: t, relay: r, server: make(chan Peer, 1), done: make(chan struct{})}
	w.client, r.Client = connect(t, overTCP, &ssh.ClientConfig{Config: ssh.Config{RekeyThreshold: 256 << 10}})
	w.up, w.bastion = connect(t, overTCP, &ssh.ClientConfig{})
	go w.run()
	w.server <- w.up
	near, far := w.open("session")
	var both sync.WaitGroup
	const size = 4 << 20
	var sum, got [2][32]byte
	both.Go(func() { sum[0] = send(t, near, size, 1); near.CloseWrite() })
	both.Go(func() {
		sum[1] = send(t, far, size, 2)
		far.SendRequest("exit-status", false, []byte{0, 0, 0, 0})
		far.CloseWrite()
	})
	both.Go(func() { got[0] = receive(t, far) })
	both.Go(func() { got[1] = receive(t, near) })
	both.Wait()
	if sum != got {
		t.Error("what arrived is not what was sent")
	}
	w.client.Conn.Close()
	<-w.done
}

// TestServerSpeaksFirst: what comes with the confirmation is not lost.
func TestServerSpeaksFirst(t *testing.T) {
	w := join(t, permitAll(), overTCP)
	for range 100 {
		go func() {
			nc := <-w.bastion.Chans
			ch, _, err := nc.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			ch.Write([]byte("SSH-2.0-hello\r\n"))
			ch.Close()
		}()
		near, _, err := w.client.Conn.OpenChannel("direct-tcpip", nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(near); string(got) != "SSH-2.0-hello\r\n" || err != nil {
			t.Fatalf("read %q, %v", got, err)
		}
	}
}

// TestSlowReader: a client may pause as long as it likes, even when the bastion
// has gone meanwhile.
func TestSlowReader(t *testing.T) {
	for _, gone := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			w := join(t, permitAll(), inMemory)
			near, far := w.open("session")
			// Less than the two windows there are on the way.
			sum := send(t, far, 3<<20, 1)
			far.SendRequest("exit-status", false, []byte{0, 0, 0, 0})
			far.CloseWrite()
			far.Close()
			if gone {
				time.Sleep(time.Second)
				w.bastion.Conn.Close()
			}
			time.Sleep(time.Hour)
			if got := receive(t, near); got != sum {
				t.Errorf("what arrived is not what was sent (gone: %v)", gone)
			}
			if req := <-near.reqs; req == nil || req.Type != "exit-status" {
				t.Errorf("no exit-status")
			}
		})
	}
}

// TestClientClosesStalled: the bastion has stopped reading, or owes a reply,
// and the client closes the channel.
func TestClientClosesStalled(t *testing.T) {
	for _, what := range []string{"data", "request"} {
		t.Run(what, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := permitAll()
				r.MaxChannels = 1
				w := join(t, r, inMemory)
				near, far := w.open("session")
				go func() {
					if what == "data" {
						near.Write(make([]byte, 3<<20)) // fills the bastion's window
					} else {
						near.SendRequest("exec", true, nil)
					}
				}()
				time.Sleep(time.Second)
				closed := time.Now()
				near.Close()
				for range far.reqs {
				}
				if took := time.Since(closed); took < stalled || took > 2*stalled {
					t.Errorf("closed after %v", took)
				}
				time.Sleep(time.Second)
				w.open("session") // there is room again
			})
		})
	}
}

// TestClientClosesSlow: as long as the bastion reads, even slowly, what the
// client has sent before it closed is handed over.
func TestClientClosesSlow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		near, far := w.open("session")
		const size = 3 << 20
		go func() {
			near.Write(make([]byte, size))
			near.Close()
		}()
		got, buf := 0, make([]byte, 128<<10) // as much as makes package ssh open the window
		for {
			time.Sleep(stalled / 2)
			n, err := io.ReadFull(far, buf)
			got += n
			if err != nil {
				break
			}
		}
		if got != size {
			t.Errorf("%d bytes arrived of %d", got, size)
		}
	})
}

// TestReadsNoMore: a client that reads no more data, and whose window nobody will
// open again, learns all the same how its command has ended and that the channel
// is closed, at once.
func TestReadsNoMore(t *testing.T) {
	for _, when := range []string{"while it runs", "after it has ended", "never"} {
		t.Run(when, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := join(t, permitAll(), inMemory)
				near, far := w.open("session")
				go far.Write(make([]byte, 5<<20)) // more than the two windows there are
				time.Sleep(time.Second)
				eow := func() { near.SendRequest(endOfWrite, false, nil) }
				if when == "while it runs" {
					eow()
					if req := <-far.reqs; req.Type != endOfWrite {
						t.Fatalf("the bastion gets %s", req.Type)
					}
				}
				far.SendRequest("exit-status", false, []byte{0, 0, 0, 7})
				far.Close()
				if when == "after it has ended" {
					time.Sleep(time.Minute)
					eow()
				}
				if req := <-near.reqs; req == nil || req.Type != "exit-status" || req.Payload[3] != 7 {
					t.Fatalf("instead of exit-status there comes %v", req)
				}
				began := time.Now()
				closed := make(chan struct{})
				go func() {
					for range near.reqs {
					}
					close(closed)
				}()
				select {
				case <-closed:
				case <-time.After(time.Hour):
				}
				if took := time.Since(began); when != "never" && took > 0 {
					t.Errorf("the channel is closed after %v", took)
				} else if when == "never" && took < time.Hour {
					t.Errorf("a client that only pauses is cut off after %v", took)
				}
			})
		})
	}
}

// TestReadsNoMoreButStderr: that a client reads no more data says nothing of
// stderr, unless that cannot get through either.
func TestReadsNoMoreButStderr(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		near, far := w.open("session")
		near.SendRequest(endOfWrite, false, nil)
		<-far.reqs
		go func() {
			far.Stderr().Write(make([]byte, 3<<20))
			far.SendRequest("exit-status", false, []byte{0, 0, 0, 0})
			far.Close()
		}()
		got, buf := 0, make([]byte, 100<<10)
		for {
			time.Sleep(unreadStalled / 2)
			n, err := io.ReadFull(near.Stderr(), buf)
			if got += n; err != nil {
				break
			}
		}
		if got != 3<<20 {
			t.Errorf("%d bytes of stderr arrived", got)
		}

		near, far = w.open("session")
		near.SendRequest(endOfWrite, false, nil)
		<-far.reqs
		far.Stderr().Write(make([]byte, 3<<20)) // nobody reads it
		far.Close()
		began := time.Now()
		for range near.reqs {
		}
		if took := time.Since(began); took < unreadStalled || took > 2*unreadStalled {
			t.Errorf("closed after %v", took)
		}
	})
}

// TestExitAfterClose: a client that closes first gets no exit-status, and
// nothing hangs.
func TestExitAfterClose(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		near, far := w.open("session")
		near.Close()
		synctest.Wait()
		far.SendRequest("exit-status", false, []byte{0, 0, 0, 0})
		far.CloseWrite()
		far.Close()
		for range near.reqs {
		}
		time.Sleep(time.Second)
		w.relay.mu.Lock()
		defer w.relay.mu.Unlock()
		if w.relay.channels != 0 {
			t.Errorf("%d channels are open", w.relay.channels)
		}
	})
}

// TestTooManyRequestsOfWhoReadsNot: a client that takes nothing cannot be told
// that its channel is closed. Nobody else waits for that.
func TestTooManyRequestsOfWhoReadsNot(t *testing.T) {
	valve := newValve()
	links := 0
	w := join(t, permitAll(), func(t testing.TB) (a, b net.Conn) {
		a, b = overTCP(t)
		if links++; links == 1 {
			b = valved{Conn: b, writing: valve}
		}
		return a, b
	})
	near, far := w.open("session")
	go func() {
		for req := range far.reqs {
			req.Reply(true, nil)
		}
	}()
	w.relay.mu.Lock()
	var up *flow
	for up = range w.relay.carried {
	}
	w.relay.mu.Unlock()

	valve.shut()
	defer valve.open()
	// Not on a fake clock: who waits to write waits for a mutex of package ssh.
	eventually := func(what string, is func(*requests) bool) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			if up.queue.mu.TryLock() {
				ok := is(&up.queue)
				up.queue.mu.Unlock()
				if ok {
					return
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("never, or locked: %s", what)
			}
		}
	}
	go near.SendRequest("r", true, nil)
	eventually("a reply waits to be written", func(q *requests) bool { return q.busy })
	go func() {
		for range requestsMax + 2 {
			near.SendRequest("r", false, nil)
		}
	}()
	eventually("too many requests", func(q *requests) bool { return q.over })
	if toBastion, _ := w.relay.Progress(); !toBastion.HeldUp {
		t.Error("what the client has sent is not held up")
	}
}

// TestRequestsBehindAnUnanswered: too many cost the client its channel, and
// others nothing.
func TestRequestsBehindAnUnanswered(t *testing.T) {
	tests := []struct {
		name     string
		requests int
		payload  []byte
	}{
		{"many", 2000, nil},
		{"large", 50, make([]byte, 64<<10)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := join(t, permitAll(), inMemory)
				near, far := w.open("session")
				other, otherFar := w.open("session")
				go io.Copy(otherFar, otherFar)
				go near.SendRequest("first", true, nil)
				synctest.Wait()
				for range tt.requests {
					near.SendRequest("next", false, tt.payload)
				}
				for range near.reqs {
				}
				for req := range far.reqs {
					if req.Type != "first" {
						t.Errorf("%s overtook the first", req.Type)
					}
				}
				other.Write([]byte("echo"))
				if _, err := io.ReadFull(other, make([]byte, 4)); err != nil {
					t.Error(err)
				}
			})
		})
	}
	t.Run("few", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			w := join(t, permitAll(), inMemory)
			near, far := w.open("session")
			other, otherFar := w.open("session")
			go io.Copy(otherFar, otherFar)
			go near.SendRequest("first", true, nil)
			synctest.Wait()
			for i := range 500 {
				near.SendRequest("next", false, []byte(fmt.Sprint(i)))
			}
			other.Write([]byte("echo")) // the connection is not stopped
			if _, err := io.ReadFull(other, make([]byte, 4)); err != nil {
				t.Error(err)
			}
			(<-far.reqs).Reply(true, nil)
			for i := range 500 {
				if req := <-far.reqs; string(req.Payload) != fmt.Sprint(i) {
					t.Fatalf("request %d came as %s", i, req.Payload)
				}
			}
		})
	})
}

func TestLost(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		near, far := w.open("session")
		forward, _ := w.open("direct-tcpip")
		out, errs, forwardErrs := gather(near), gather(near.Stderr()), gather(forward.Stderr())
		far.Write([]byte("half a li"))
		synctest.Wait()
		w.bastion.Conn.Close()
		for req := range near.reqs {
			t.Errorf("got %s", req.Type)
		}
		<-w.done
		synctest.Wait()
		if text, eof := out(); text != "half a li" || !eof {
			t.Errorf("stdout %q, EOF %v", text, eof)
		}
		if text, eof := errs(); text != "\r\n"+lostText+"\r\n" || !eof {
			t.Errorf("stderr %q, EOF %v", text, eof)
		}
		if text, _ := forwardErrs(); text != "" {
			t.Errorf("the forward was told %q", text)
		}
		if err := w.client.Conn.Wait(); err == nil || w.byClient {
			t.Errorf("client: %v, by client %v", err, w.byClient)
		}
	})
}

// TestNotLost: a session that the bastion ends without a status is not told
// that the bastion has gone.
func TestNotLost(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		near, far := w.open("session")
		errs := gather(near.Stderr())
		far.Close()
		for range near.reqs {
		}
		time.Sleep(time.Second)
		w.bastion.Conn.Close()
		<-w.done
		if text, _ := errs(); text != "" {
			t.Errorf("stderr %q", text)
		}
	})
}

func TestTell(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		terminal, far := w.open("session")
		go func() {
			for req := range far.reqs {
				req.Reply(true, nil)
			}
		}()
		if ok, err := terminal.SendRequest("pty-req", true, nil); !ok || err != nil {
			t.Fatal(ok, err)
		}
		plain, plainFar := w.open("session")
		refused, refusedFar := w.open("session")
		go func() { (<-refusedFar.reqs).Reply(false, nil) }()
		refused.SendRequest("pty-req", true, nil)

		const lines = 100
		told, untold, none := gather(terminal.Stderr()), gather(plain.Stderr()), gather(refused.Stderr())
		var writing sync.WaitGroup
		writing.Go(func() {
			for range lines {
				far.Stderr().Write([]byte("from the bastion"))
			}
		})
		for range lines {
			w.relay.Tell("going down")
		}
		writing.Wait()
		plainFar.Stderr().Write([]byte("own"))
		time.Sleep(time.Second)
		text, _ := told()
		if n, m := bytes.Count([]byte(text), []byte("\r\ngoing down\r\n")), bytes.Count([]byte(text), []byte("from the bastion")); n != lines || m != lines {
			t.Errorf("%d lines of ours, %d of the bastion", n, m)
		}
		if text, _ := untold(); text != "own" {
			t.Errorf("a session without a terminal got %q", text)
		}
		if text, _ := none(); text != "" {
			t.Errorf("a session that was refused a terminal got %q", text)
		}
		far.SendRequest("exit-status", false, []byte{0, 0, 0, 0})
		far.Close()
		for range terminal.reqs {
		}
		w.relay.Tell("nobody there")
	})
}

// TestTellWaitsForNobody: a terminal that is not read does not stop Tell.
func TestTellWaitsForNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		near, far := w.open("session")
		near.SendRequest("pty-req", false, nil)
		far.Write(make([]byte, 2<<20)) // the client's window
		synctest.Wait()
		before := time.Now()
		w.relay.Tell("going down")
		if took := time.Since(before); took != 0 {
			t.Errorf("Tell took %v", took)
		}
		w.client.Conn.Close()
		<-w.done
	})
}

// TestReplyBeforeClose: a command that ends at once, and takes its channel with
// it, does not take the reply to the request that started it.
func TestReplyBeforeClose(t *testing.T) {
	bubble(t, func(t *testing.T) { // where goroutines meet in ever new orders
		for range 20 {
			r := permitAll()
			r.MaxSessions = 100
			w := join(t, r, inMemory)
			var wg sync.WaitGroup
			for range 50 {
				near, far := w.open("session")
				wg.Go(func() {
					for req := range far.reqs {
						req.Reply(true, nil)
						far.SendRequest("exit-status", false, []byte{0, 0, 0, 0})
						far.Close()
					}
				})
				wg.Go(func() {
					if ok, err := near.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{"true"})); !ok || err != nil {
						t.Errorf("exec: %v, %v", ok, err)
					}
					for range near.reqs {
					}
				})
			}
			wg.Wait()
		}
	})
}
