package mux

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/transport"
	"github.com/sallyport-ssh/sallyport/internal/userauth"
)

// A reference is a client of package ssh, connected to a Conn.
type reference struct {
	ssh.Conn
	chans <-chan ssh.NewChannel
	reqs  <-chan *ssh.Request
}

// connect returns a Conn whose Serve is not running yet, and its peer.
func connect(t testing.TB, maxChannels int) (*Conn, reference) {
	t.Helper()
	nc, ns := sshtest.TCPPipe(t)
	server := transport.NewServer(ns, &transport.Config{HostKeys: []ssh.Signer{sshtest.NewKey(t)}})
	in := make(chan error, 1)
	go func() {
		in <- func() error {
			if err := server.Handshake(); err != nil {
				return err
			}
			auth := userauth.NewServer(server, userauth.ServerConfig{})
			if _, err := auth.Next(); err != nil {
				return err
			}
			return auth.Succeed()
		}()
	}()
	conn, chans, reqs, err := ssh.NewClientConn(nc, "", &ssh.ClientConfig{HostKeyCallback: ssh.InsecureIgnoreHostKey()})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-in; err != nil {
		t.Fatal(err)
	}
	c := New(server, maxChannels)
	t.Cleanup(func() { conn.Close(); c.Close() })
	return c, reference{conn, chans, reqs}
}

// serve runs Serve until the test ends.
func serve(t testing.TB, c *Conn, global func(*Request), open func(*NewChannel)) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.Serve(global, open)
	}()
	t.Cleanup(func() { c.Close(); <-done })
}

func refuse(r *Request) { r.Reply(false, nil) }

// echo accepts every channel and echoes data and stderr, each by itself.
func echo(window int) func(*NewChannel) {
	return func(nc *NewChannel) {
		ch, err := nc.Accept(window)
		if err != nil {
			return
		}
		go func() {
			for req := range ch.Requests() {
				req.Reply(strings.HasPrefix(req.Type, "yes"), nil)
			}
		}()
		go func() {
			var both sync.WaitGroup
			both.Go(func() { io.Copy(ch, ch) })
			both.Go(func() { io.Copy(ch.Stderr(), ch.Stderr()) })
			both.Wait()
			ch.CloseWrite()
			ch.SendRequest("exit-status", false, sshmsg.AppendExitStatus(nil, 7))
			ch.Close()
		}()
	}
}

// TestEcho moves data both ways on many channels, through small windows and large
// ones.
func TestEcho(t *testing.T) {
	for _, window := range []int{1000, 50_000, DefaultWindow} {
		t.Run(fmt.Sprint(window), func(t *testing.T) {
			c, ref := connect(t, 100)
			serve(t, c, refuse, echo(window))
			var all sync.WaitGroup
			for range 10 {
				all.Go(func() {
					ch, reqs, err := ref.OpenChannel("echo", nil)
					if err != nil {
						t.Error(err)
						return
					}
					sent := make([]byte, 300_000)
					for i := range sent {
						sent[i] = byte(rand.Uint32())
					}
					var status []byte
					var parts sync.WaitGroup
					parts.Go(func() {
						for req := range reqs {
							status = req.Payload
						}
					})
					parts.Go(func() {
						for rest := sent; len(rest) > 0; {
							n := min(len(rest), 1+rand.IntN(60_000))
							if _, err := ch.Write(rest[:n]); err != nil {
								t.Error(err)
							}
							rest = rest[n:]
						}
						ch.Stderr().Write(sent[:5000])
						ch.CloseWrite()
					})
					parts.Go(func() {
						if got, _ := io.ReadAll(ch.Stderr()); !bytes.Equal(got, sent[:5000]) {
							t.Errorf("%d bytes of stderr came back", len(got))
						}
					})
					if got, err := io.ReadAll(ch); err != nil || !bytes.Equal(got, sent) {
						t.Errorf("%d bytes came back, %v", len(got), err)
					}
					parts.Wait()
					if !bytes.Equal(status, []byte{0, 0, 0, 7}) {
						t.Errorf("exit status %x", status)
					}
				})
			}
			all.Wait()
		})
	}
}

// TestOpenChannel opens channels from this side.
func TestOpenChannel(t *testing.T) {
	c, ref := connect(t, 100)
	serve(t, c, refuse, func(nc *NewChannel) { nc.Reject(sshmsg.Prohibited, "no") })
	go func() {
		for nc := range ref.chans {
			if nc.ChannelType() == "bad" {
				nc.Reject(ssh.ConnectionFailed, "go away")
				continue
			}
			ch, reqs, err := nc.Accept()
			if err != nil {
				return
			}
			go func() {
				for req := range reqs {
					req.Reply(req.Type == "yes", nil)
				}
			}()
			go func() {
				io.WriteString(ch, "hello "+string(nc.ExtraData()))
				ch.Close()
			}()
		}
	}()
	ch, err := c.OpenChannel("good", []byte("you"))
	if err != nil {
		t.Fatal(err)
	}
	for kind, want := range map[string]bool{"yes": true, "no": false} {
		if ok, err := ch.SendRequest(kind, true, nil); ok != want && err == nil {
			t.Errorf("request %s: %v, %v", kind, ok, err)
		}
	}
	if got, err := io.ReadAll(ch); string(got) != "hello you" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	var refused *OpenError
	if _, err := c.OpenChannel("bad", nil); !errors.As(err, &refused) || refused.Message != "go away" || refused.Reason != sshmsg.ConnectFailed {
		t.Errorf("refused with %v", err)
	}
	if _, _, err := ref.OpenChannel("x", nil); err == nil || !strings.Contains(err.Error(), "no") {
		t.Errorf("rejected with %v", err)
	}
}

// TestRequests replies to global requests and to those of a channel, in order.
func TestRequests(t *testing.T) {
	c, ref := connect(t, 100)
	serve(t, c, func(r *Request) { r.Reply(r.Type == "yes", append([]byte("re: "), r.Payload...)) }, echo(0))
	if ok, payload, err := ref.SendRequest("yes", true, []byte("x")); !ok || string(payload) != "re: x" || err != nil {
		t.Errorf("global: %v %q, %v", ok, payload, err)
	}
	if ok, _, err := ref.SendRequest("no", true, nil); ok || err != nil {
		t.Errorf("global: %v, %v", ok, err)
	}
	ch, _, err := ref.OpenChannel("echo", nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		kind := []string{"yes", "no"}[i%2]
		if ok, err := ch.SendRequest(kind, true, nil); ok != (i%2 == 0) || err != nil {
			t.Fatalf("request %d: %v, %v", i, ok, err)
		}
	}
	go func() {
		for req := range ref.reqs {
			req.Reply(req.Type == "yes", []byte("answer"))
		}
	}()
	if ok, answer, err := c.SendRequest("yes", true, nil); !ok || string(answer) != "answer" || err != nil {
		t.Errorf("ours: %v %q, %v", ok, answer, err)
	}
}

// TestUnread wants a channel that is not read to hold no more than its window, and to
// block neither other channels nor requests.
func TestUnread(t *testing.T) {
	c, ref := connect(t, 100)
	held := make(chan *Channel, 1)
	serve(t, c, func(r *Request) { r.Reply(true, nil) }, func(nc *NewChannel) {
		ch, err := nc.Accept(10_000)
		if err != nil {
			t.Error(err)
		}
		held <- ch
	})
	ch, _, err := ref.OpenChannel("x", nil)
	if err != nil {
		t.Fatal(err)
	}
	ours := <-held
	wrote := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(ch, bytes.NewReader(make([]byte, 100_000)))
		wrote <- n
	}()
	for range 10 {
		if ok, _, err := ref.SendRequest("alive", true, nil); !ok || err != nil {
			t.Fatalf("%v, %v", ok, err)
		}
	}
	ours.mu.Lock()
	sum := 0
	for _, chunk := range ours.in.chunks {
		sum += len(*chunk)
	}
	ours.mu.Unlock()
	if sum > 10_000 {
		t.Errorf("%d bytes are held", sum)
	}
	go io.Copy(io.Discard, ours)
	if n := <-wrote; n != 100_000 {
		t.Errorf("wrote %d", n)
	}
}

// TestCloses ends channels and connections from each side, under writers and
// readers.
func TestCloses(t *testing.T) {
	for _, how := range []string{"peer closes the channel", "channel closes", "peer closes the connection", "connection closes"} {
		t.Run(how, func(t *testing.T) {
			c, ref := connect(t, 100)
			held := make(chan *Channel, 1)
			serve(t, c, refuse, func(nc *NewChannel) {
				ch, _ := nc.Accept(0)
				held <- ch
			})
			ch, reqs, err := ref.OpenChannel("x", nil)
			if err != nil {
				t.Fatal(err)
			}
			go ssh.DiscardRequests(reqs)
			ours := <-held
			var ended sync.WaitGroup
			ended.Go(func() { io.Copy(ours, endless{}) }) // the peer reads nothing
			ended.Go(func() {
				if how != "channel closes" {
					io.ReadAll(ours)
				}
			})
			ended.Go(func() {
				for range ours.Requests() {
				}
			})
			ended.Go(func() { ours.SendRequest("never answered", how != "channel closes", nil) })
			switch how {
			case "peer closes the channel":
				ch.Close()
			case "channel closes":
				ours.Close()
				ch.Close()
			case "peer closes the connection":
				ref.Close()
			case "connection closes":
				c.Close()
			}
			ended.Wait()
			if how == "peer closes the channel" {
				if _, err := ours.Write([]byte("x")); err != io.EOF {
					t.Errorf("wrote after the close: %v", err)
				}
			}
		})
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestTooMany wants channels beyond the limit to be rejected until others are closed.
func TestTooMany(t *testing.T) {
	c, ref := connect(t, 2)
	serve(t, c, refuse, echo(0))
	first, reqs, err := ref.OpenChannel("echo", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := ref.OpenChannel("echo", nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ref.OpenChannel("echo", nil); err == nil {
		t.Fatal("a third channel was opened")
	}
	first.CloseWrite()
	ssh.DiscardRequests(reqs)
	if _, _, err := ref.OpenChannel("echo", nil); err != nil {
		t.Fatal(err)
	}
}

// A script is a Transport whose peer sends the packets given and reads nothing.
type script struct {
	packets [][]byte
	wrote   [][]byte
	said    string
	mu      sync.Mutex
}

func (s *script) ReadPacket() ([]byte, error) {
	if len(s.packets) == 0 {
		return nil, io.EOF
	}
	p := s.packets[0]
	s.packets = s.packets[1:]
	return p, nil
}

func (s *script) WritePacket(p []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wrote = append(s.wrote, bytes.Clone(p))
	return nil
}
func (s *script) Flush() error           { return nil }
func (s *script) WaitWritable(int) error { return nil }
func (s *script) Unimplemented() error   { return s.WritePacket([]byte{sshmsg.NumUnimplemented}) }
func (s *script) Close() error           { return nil }
func (s *script) Disconnect(_ uint32, text string) error {
	s.said = text
	return nil
}

// TestAttacks sends messages against the protocol to an endpoint with one channel,
// and wants the answer that each must get: DISCONNECT with a text, or, if the text is
// empty, the messages given. The transport limits the queue of a peer that does
// not read.
func TestAttacks(t *testing.T) {
	const window = 100
	opened := sshmsg.Open{Type: "x", Sender: 9, Window: 10, MaxPacket: 10}.Append(nil)
	confirmed := sshmsg.OpenConfirm{Recipient: 9, Window: window, MaxPacket: MaxPacket}.Append(nil)
	data := func(n uint32, size int) []byte {
		return sshmsg.Data{Recipient: n, Data: make([]byte, size)}.Append(nil)
	}
	short := func(num byte) []byte { return sshmsg.AppendRecipient(nil, num, 0) }
	request := func(size int) []byte { return sshmsg.Request{Type: "x", Payload: make([]byte, size)}.Append(nil) }
	closing := short(sshmsg.NumClose)
	malformed := func(num byte) []byte { return []byte{num, 0, 0, 0, 0, 0, 0, 0, 9, 'x'} }
	tests := []struct {
		name    string
		packets [][]byte
		said    string
		answers [][]byte
	}{
		// Sizes.
		{"empty packet", [][]byte{{}}, "empty packet", nil},
		{"open cut short", [][]byte{opened[:9]}, "malformed channel open", nil},
		{"confirmation cut short", [][]byte{confirmed[:9]}, "malformed channel open confirmation", nil},
		{"open failure cut short", [][]byte{{sshmsg.NumOpenFailure, 0}}, "malformed channel open failure", nil},
		{"global request longer than its packet", [][]byte{{sshmsg.NumGlobalRequest, 255, 255, 255, 255}}, "malformed global request", nil},
		{"request longer than its packet", [][]byte{malformed(sshmsg.NumRequest)}, "malformed channel request", nil},
		{"data longer than its packet", [][]byte{malformed(sshmsg.NumData)}, "malformed channel data", nil},
		{"data cut short", [][]byte{{sshmsg.NumData, 0, 0, 0, 0, 0}}, "malformed channel data", nil},
		{"window adjustment cut short", [][]byte{short(sshmsg.NumWindowAdjust)}, "malformed window adjustment", nil},
		{"EOF with more behind it", [][]byte{append(short(sshmsg.NumEOF), 1)}, "malformed channel message", nil},
		{"CLOSE with more behind it", [][]byte{append(short(sshmsg.NumClose), 1)}, "malformed channel message", nil},
		{"reply with more behind it", [][]byte{append(short(sshmsg.NumSuccess), 1)}, "malformed channel message", nil},
		{"message without a channel number", [][]byte{{sshmsg.NumEOF, 0, 0}}, "malformed channel message", nil},

		// Windows.
		{"data beyond the window, within the grace", [][]byte{data(0, window+window/windowGrace)}, "", nil},
		{"data beyond the grace", [][]byte{data(0, window), data(0, 1+window/windowGrace)}, "data beyond the window", nil},
		{"data of 2^31 bytes", [][]byte{{sshmsg.NumData, 0, 0, 0, 0, 0x80, 0, 0, 0}}, "malformed channel data", nil},
		{"window beyond 2^32-1", [][]byte{sshmsg.WindowAdjust{Bytes: 1<<32 - 1}.Append(nil)}, "window beyond 2^32-1 bytes", nil},

		// Channels.
		{"data on an unknown channel", [][]byte{data(3, 1)}, "unknown channel", nil},
		{"data on channel 2^32-1", [][]byte{data(1<<32-1, 1)}, "unknown channel", nil},
		{"data behind CLOSE", [][]byte{closing, data(0, 1)}, "unknown channel", nil},
		{"a second CLOSE", [][]byte{closing, closing}, "unknown channel", nil},
		{"window adjustment behind CLOSE", [][]byte{closing, sshmsg.WindowAdjust{Bytes: 1}.Append(nil)}, "", [][]byte{sshmsg.AppendRecipient(nil, sshmsg.NumClose, 9)}},
		{"window adjustment on an unknown channel", [][]byte{sshmsg.WindowAdjust{Recipient: 3, Bytes: 1}.Append(nil)}, "", nil},
		{"data behind EOF", [][]byte{short(sshmsg.NumEOF), data(0, 1)}, "", nil},
		{"extended data of an unknown type", [][]byte{sshmsg.Data{Extended: true, Code: 7, Data: []byte("x")}.Append(nil)}, "", nil},
		{"confirmation of an open channel", [][]byte{sshmsg.OpenConfirm{}.Append(nil)}, "answer to no channel open", nil},
		{"failure of an open channel", [][]byte{sshmsg.OpenFailure{}.Append(nil)}, "answer to no channel open", nil},
		{"confirmation of an unknown channel", [][]byte{sshmsg.OpenConfirm{Recipient: 3}.Append(nil)}, "answer for an unknown channel", nil},
		{"too many channels", [][]byte{opened, opened}, "", [][]byte{
			sshmsg.OpenConfirm{Recipient: 9, Sender: 1, Window: window, MaxPacket: MaxPacket}.Append(nil),
			sshmsg.OpenFailure{Recipient: 9, Reason: sshmsg.ResourceShortage, Description: "too many channels"}.Append(nil),
		}},

		// Requests and replies.
		{"a reply to no request", [][]byte{short(sshmsg.NumSuccess), short(sshmsg.NumFailure)}, "", nil},
		{"a reply to no global request", [][]byte{{sshmsg.NumRequestSuccess}, {sshmsg.NumRequestFailure}}, "", nil},
		{"too many requests", slices.Repeat([][]byte{request(0)}, requestsMax+1), "too many channel requests", nil},
		{"too long requests", slices.Repeat([][]byte{request(requestBytesMax / 4)}, 5), "too many channel requests", nil},

		// Messages.
		{"an unknown message", [][]byte{{200}}, "", [][]byte{{sshmsg.NumUnimplemented}}},
		{"a message of authentication", [][]byte{{50}}, "", [][]byte{{sshmsg.NumUnimplemented}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := &script{packets: append([][]byte{opened}, tt.packets...)}
			err := New(s, 2).Serve(refuse, func(nc *NewChannel) { nc.Accept(window) })
			if s.said != tt.said || (err == io.EOF) != (tt.said == "") {
				t.Errorf("disconnected with %q, %v; want %q", s.said, err, tt.said)
			}
			if want := append([][]byte{confirmed}, tt.answers...); tt.said == "" && !slices.EqualFunc(s.wrote, want, bytes.Equal) {
				t.Errorf("answers %q, want %q", s.wrote, want)
			}
		})
	}
}

// FuzzServe has an endpoint read any packets.
func FuzzServe(f *testing.F) {
	f.Add(sshmsg.Open{Type: "x", Sender: 9, Window: 10, MaxPacket: 10}.Append(nil), sshmsg.Data{Data: []byte("x")}.Append(nil), []byte{97, 0, 0, 0, 0})
	f.Add([]byte{80, 0, 0, 0, 1, 'x', 1}, []byte{81}, []byte{98, 0, 0, 0, 0, 0, 0, 0, 1, 'y', 1})
	f.Fuzz(func(t *testing.T, a, b, d []byte) {
		s := &script{packets: [][]byte{
			sshmsg.Open{Type: "x", Sender: 9, Window: 10, MaxPacket: 10}.Append(nil), a, b, d,
			sshmsg.AppendRecipient(nil, sshmsg.NumEOF, 0), a,
		}}
		c := New(s, 2)
		var all sync.WaitGroup
		c.Serve(refuse, func(nc *NewChannel) {
			if ch, err := nc.Accept(100); err == nil {
				all.Go(func() { io.Copy(io.Discard, ch) })
				all.Go(func() {
					for req := range ch.Requests() {
						req.Reply(true, nil)
					}
				})
				all.Go(func() { ch.Write([]byte("some words")) })
			}
		})
		all.Wait()
	})
}
