package relay

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

// A logWatcher writes down what it is told.
type logWatcher struct {
	taps *Taps
	fail map[string]error // by what it is told of

	mu  sync.Mutex
	log []string
}

func (w *logWatcher) add(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, fmt.Sprintf(format, args...))
}

func (w *logWatcher) said() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.log, "; ")
}

func (w *logWatcher) Open(o Opening) (ChannelWatcher, error) {
	w.add("open %d %s %v", o.Number, o.Kind, o.FromClient)
	if err := w.fail["open"]; err != nil {
		return nil, err
	}
	return w, nil
}

func (w *logWatcher) Granted(kind string, fromClient bool, payload, reply []byte) error {
	w.add("granted %s %v %q %q", kind, fromClient, payload, reply)
	return w.fail[kind]
}

func (w *logWatcher) Refused(r Refusal) {
	w.add("refused %s %v channel %d global %v far %v %d %q", r.Kind, r.FromClient, r.Channel, r.Global, r.ByFar, r.Code, r.Why)
}

func (w *logWatcher) Request(kind string, fromClient bool, payload []byte) (*Taps, error) {
	w.add("request %s %v %q", kind, fromClient, payload)
	if kind == "shell" {
		return w.taps, w.fail[kind]
	}
	return nil, w.fail[kind]
}

func (w *logWatcher) Answered(kind string, fromClient bool, payload []byte, ok bool) {
	w.add("answered %s %v", kind, ok)
}

func (w *logWatcher) End(toBastion, toClient int64, lost bool) {
	w.add("end %d %d %v", toBastion, toClient, lost)
}

// answer replies to all requests of a channel with ok.
func (c channel) answer(ok bool) {
	for req := range c.reqs {
		req.Reply(ok, nil)
	}
}

// TestWatch: a session, from its opening to its end, with taps on both ways.
func TestWatch(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var shown, typed strings.Builder
		watcher := &logWatcher{taps: &Taps{
			ToClient: func(p []byte, stderr bool) error {
				fmt.Fprintf(&shown, "%v:%s ", stderr, p)
				return nil
			},
			ToBastion: func(p []byte, stderr bool) error {
				fmt.Fprintf(&typed, "%v:%s ", stderr, p)
				return nil
			},
		}}
		r := permitAll()
		r.Watch = watcher
		w := join(t, r, inMemory)
		near, far := w.open("session")
		go far.answer(true)
		far.Write([]byte("early"))
		io.ReadFull(near, make([]byte, 5))
		if ok, err := near.SendRequest("shell", true, nil); !ok || err != nil {
			t.Fatal(ok, err)
		}
		near.Write([]byte("input"))
		io.ReadFull(far, make([]byte, 5))
		far.Write([]byte("output"))
		io.ReadFull(near, make([]byte, 6))
		far.Stderr().Write([]byte("error"))
		io.ReadFull(near.Stderr(), make([]byte, 5))
		far.SendRequest("exit-status", false, []byte{0, 0, 0, 3})
		far.Close()
		for range near.reqs {
		}
		synctest.Wait()
		if shown.String() != "false:output true:error " || typed.String() != "false:input " {
			t.Errorf("the taps saw %q and %q", shown.String(), typed.String())
		}
		want := `open 0 session true; request shell true ""; answered shell true; request exit-status false "\x00\x00\x00\x03"; end 5 16 false`
		if got := watcher.said(); got != want {
			t.Errorf("\n got %s\nwant %s", got, want)
		}
	})
}

// TestWatchRefusals: whoever refuses, it is told, and what by.
func TestWatchRefusals(t *testing.T) {
	bubble(t, func(t *testing.T) {
		watcher := &logWatcher{}
		r := permitAll()
		r.Watch = watcher
		r.Permissions.PTY = false
		r.MaxSessions = 1
		w := join(t, r, inMemory)
		near, far := w.open("session")
		go far.answer(false)
		near.SendRequest("pty-req", true, nil)
		near.SendRequest("exec", true, nil)
		w.client.Conn.OpenChannel("session", nil)
		go func() {
			nc := <-w.bastion.Chans
			nc.Reject(ssh.Prohibited, "not there")
		}()
		w.client.Conn.OpenChannel("direct-tcpip", nil)
		go func() {
			(<-w.bastion.Reqs).Reply(false, nil)
			(<-w.bastion.Reqs).Reply(true, []byte("port"))
		}()
		w.client.Conn.SendRequest("tcpip-forward", true, []byte("one"))
		w.client.Conn.SendRequest("tcpip-forward", true, []byte("two"))
		synctest.Wait()
		want := strings.Join([]string{
			`open 0 session true`,
			`refused pty-req true channel 0 global false far false 1 "a terminal is not permitted for this key"`,
			`request exec true ""`, `answered exec false`,
			`refused session true channel -1 global false far false 4 "too many sessions on this connection"`,
			`refused direct-tcpip true channel -1 global false far true 1 "not there"`,
			`refused tcpip-forward true channel -1 global true far true 1 ""`,
			`granted tcpip-forward true "two" "port"`,
		}, "; ")
		if got := watcher.said(); got != want {
			t.Errorf("\n got %s\nwant %s", got, want)
		}
	})
}

// TestWatchForbids: what cannot be written down does not happen, and the user is
// told why.
func TestWatchForbids(t *testing.T) {
	why := errors.New("It cannot be written down.")
	bubble(t, func(t *testing.T) {
		r := permitAll()
		r.Watch = &logWatcher{fail: map[string]error{"open": why}}
		w := join(t, r, inMemory)
		opened := make(chan error, 1)
		go func() {
			_, _, err := w.client.Conn.OpenChannel("direct-tcpip", nil)
			opened <- err
		}()
		far, reqs, err := (<-w.bastion.Chans).Accept()
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(reqs)
		if n, err := far.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Error("the bastion's end goes on")
		}
		refused := (*ssh.OpenChannelError)(nil)
		if err := <-opened; !errors.As(err, &refused) || refused.Message != why.Error() {
			t.Errorf("the client reads %v", err)
		}
	})
	for _, kind := range []string{"exec", "tap"} {
		bubble(t, func(t *testing.T) {
			watcher := &logWatcher{fail: map[string]error{kind: why}, taps: &Taps{
				ToClient: func([]byte, bool) error { return why },
			}}
			r := permitAll()
			r.Watch = watcher
			w := join(t, r, inMemory)
			near, far := w.open("session")
			var asked []string
			var asking sync.WaitGroup
			asking.Go(func() {
				for req := range far.reqs {
					asked = append(asked, req.Type)
					req.Reply(true, nil)
				}
				far.Close()
			})
			if kind == "tap" {
				near.SendRequest("shell", true, nil)
				far.Write([]byte("nobody sees this"))
			} else if ok, _ := near.SendRequest("exec", true, nil); !ok {
				t.Error("a client that is told of a failure does not read why")
			}
			exited := make(chan string, 2)
			go func() {
				for req := range near.reqs {
					exited <- fmt.Sprintf("%s %q", req.Type, req.Payload)
				}
				close(exited)
			}()
			text, _ := io.ReadAll(near.Stderr())
			if out, _ := io.ReadAll(near); string(text) != "\r\n"+why.Error()+"\r\n" || len(out) > 0 {
				t.Errorf("%s: the client reads %q and %q", kind, text, out)
			}
			if got := <-exited; got != `exit-status "\x00\x00\x00\xff"` {
				t.Errorf("%s: it ends with %s", kind, got)
			}
			asking.Wait()
			if kind == "exec" && len(asked) > 0 {
				t.Errorf("the bastion was asked to %v", asked)
			}
		})
	}
}

// TestWatchLost tells a bastion that has gone from a client that has.
func TestWatchLost(t *testing.T) {
	for _, who := range []string{"client", "bastion"} {
		bubble(t, func(t *testing.T) {
			watcher := &logWatcher{}
			r := permitAll()
			r.Watch = watcher
			w := join(t, r, inMemory)
			w.open("session")
			if who == "client" {
				w.client.Conn.Close()
			} else {
				w.bastion.Conn.Close()
			}
			<-w.done
			if got, want := watcher.said(), fmt.Sprintf("open 0 session true; end 0 0 %v", who == "bastion"); got != want {
				t.Errorf("%s left: %s, want %s", who, got, want)
			}
		})
	}
}

// TestTapFails: once a session cannot be recorded any more, nothing passes, though
// the client reads nothing and cannot be told.
func TestTapFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var full atomic.Bool
		var seen atomic.Int64
		r := permitAll()
		r.Watch = &logWatcher{taps: &Taps{ToClient: func(p []byte, _ bool) error {
			if full.Load() {
				return errors.New("cannot be recorded")
			}
			seen.Add(int64(len(p)))
			return nil
		}}}
		w := join(t, r, inMemory)
		near, far := w.open("session")
		go far.answer(true)
		go ssh.DiscardRequests(near.reqs)
		near.SendRequest("shell", true, nil)
		go far.Write(make([]byte, 3<<20)) // more than the client's window
		synctest.Wait()
		var typed atomic.Int64
		ended := make(chan struct{})
		go func() {
			n, _ := io.Copy(io.Discard, far)
			typed.Store(n)
			close(ended)
		}()
		full.Store(true)
		go far.Stderr().Write([]byte("more"))
		synctest.Wait()
		near.Write([]byte("rm -rf evidence\n"))
		time.Sleep(farewell)
		synctest.Wait()
		select {
		case <-ended:
			if n := typed.Load(); n > 0 {
				t.Errorf("%d bytes that were typed have passed", n)
			}
		default:
			t.Error("the bastion's end is still open")
		}
		if n, _ := io.Copy(io.Discard, near); n > seen.Load() {
			t.Errorf("%d bytes have been shown, and %d seen", n, seen.Load())
		}
	})
}
