package relay

import (
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// noting is a [Watcher] that counts, and lets no command "bad" run.
type noting struct{ opened, ended atomic.Int32 }

func (n *noting) Open(Opening) (ChannelWatcher, error) {
	n.opened.Add(1)
	return notingChannel{n}, nil
}
func (n *noting) Granted(string, bool, []byte, []byte) error { return nil }
func (n *noting) Refused(Refusal)                            {}

type notingChannel struct{ *noting }

func (n notingChannel) Taps() *Taps { return nil }
func (n notingChannel) Request(kind string, _ bool, payload []byte) error {
	if strings.HasSuffix(string(payload), "bad") {
		return errors.New("no")
	}
	return nil
}
func (n notingChannel) Answered(string, bool, []byte, bool) {}
func (n notingChannel) End(int64, int64, bool)              { n.ended.Add(1) }

// counts compares the counters of the relay.
func (j *joined) counts(open, sessions, kept int) {
	j.client.t.Helper()
	synctest.Wait()
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.Relay.open != open || j.sessions != sessions || j.kept != kept {
		j.client.t.Errorf("%d channels, %d sessions and %d bytes are counted, want %d, %d and %d", j.Relay.open, j.sessions, j.kept, open, sessions, kept)
	}
}

// earlyTerminal opens channel 0 with a terminal and a shell, before the bastion is
// there.
func (j *joined) earlyTerminal() {
	j.client.send(open("session", 40, ""), request(0, "pty-req", true, pty), request(0, "shell", true, ""))
	j.client.got()
}

// TestEndedBeforeConfirmed has a client close a session that has ended while the
// bastion has not confirmed it: nobody knows the bastion's number of the channel.
func TestEndedBeforeConfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := start(t, permitAll())
		defer j.end()
		j.earlyTerminal()
		j.arrive()
		j.bastion.want("bastion", open("session", 0, ""))
		j.client.send(data(0, "\x03"))
		j.client.got()
		j.client.send(closing(0))
		j.bastion.want("before the confirmation")
		j.bastion.send(confirm(0, 70))
		j.bastion.want("after it", closing(70))
		j.bastion.send(closing(0))
		j.counts(0, 0, 0)
	})
}

// TestRefusedAfterClose has the bastion refuse a session that the client has closed.
func TestRefusedAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := start(t, permitAll())
		defer j.end()
		j.client.send(open("session", 40, ""), request(0, "exec", true, execTrue), closing(0))
		j.client.got()
		j.arrive()
		j.bastion.want("bastion", open("session", 0, ""))
		j.bastion.send(openFailure(0, 2, "no"))
		j.counts(0, 0, 0)
		j.client.got()
		j.session()
		j.counts(1, 1, len("session"))
	})
}

// TestClosedWhileHeld has the bastion close a session while the client's CLOSE waits
// for the reply to its pty-req.
func TestClosedWhileHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		j.client.send(request(0, "pty-req", true, pty), request(0, "shell", true, ""), closing(0))
		j.bastion.want("bastion", request(70, "pty-req", true, pty))
		j.bastion.send(closing(0))
		j.bastion.want("bastion", closing(70))
		j.client.want("client", closing(40))
		j.counts(0, 0, 0)
	})
}

// TestEndedWithoutWindow ends a session whose client's window is used up.
func TestEndedWithoutWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := permitAll()
		watch := &noting{}
		r.Watch = watch
		j := join(t, r)
		defer j.end()
		j.session()
		j.bastion.send(data(0, strings.Repeat("x", 500)), data(0, strings.Repeat("x", 500)))
		j.client.got()
		j.client.send(request(0, "exec", true, "\x00\x00\x00\x03bad"))
		j.client.want("without a window", success(40))
		j.client.send(adjust(0, 1))
		j.client.want("with a window of a byte", stderr(40, "\r"))
		j.client.send(adjust(0, 1000))
		j.client.want("with a window", stderr(40, "\nno\r\n"), exitStatus(40, 255), eof(40), closing(40))
		j.bastion.want("bastion", closing(70))
		j.bastion.send(closing(0))
		j.client.send(closing(0))
		j.counts(0, 0, 0)
		if n := watch.ended.Load(); n != 1 {
			t.Errorf("the watcher was told of %d ends", n)
		}
	})
}

// TestLeftWhileStarting has a client leave whose terminal is shown dots.
func TestLeftWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := permitAll()
		var asked atomic.Int32
		r.Waiting = func() string { asked.Add(1); return "." }
		j := start(t, r)
		j.earlyTerminal()
		j.end()
		before := asked.Load()
		time.Sleep(time.Minute)
		if n := asked.Load(); before == 0 || n != before {
			t.Errorf("asked for the text %d times, %d of them after the end", n, n-before)
		}
	})
}

// TestEveryOpenEnds has a client leave with a session that it has asked nothing of,
// when no bastion comes.
func TestEveryOpenEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := permitAll()
		watch := &noting{}
		r.Watch = watch
		j := start(t, r)
		j.client.send(open("session", 40, ""))
		j.client.got()
		close(j.server)
		synctest.Wait()
		j.client.hangUp()
		<-j.done
		if opened, ended := watch.opened.Load(), watch.ended.Load(); opened != 1 || ended != 1 {
			t.Errorf("%d channels were opened and %d have ended", opened, ended)
		}
	})
}

// TestLostWhileOpening has a client answer the open of a bastion that has gone.
func TestLostWhileOpening(t *testing.T) {
	for _, accepts := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			j := join(t, permitAll())
			defer j.end()
			j.session()
			j.bastion.send(open("new-kind@example.com", 71, ""))
			j.client.want("client", open("new-kind@example.com", 1, ""))
			j.bastion.hangUp()
			j.client.got()
			if accepts {
				j.client.send(confirm(1, 41))
				j.client.want("client", closing(41))
				j.client.send(closing(1))
			} else {
				j.client.send(openFailure(1, 1, "no"))
			}
			j.client.want("client")
			j.counts(1, 1, len("session"))
			j.client.send(closing(0))
			<-j.done
			if j.client.reason != reasonByApplication {
				t.Errorf("the client was disconnected for reason %d: %s", j.client.reason, j.client.said)
			}
		})
	}
}

// TestLeftUnderLoad has a client leave to whom much is being sent, which is no fault
// of the bastion's.
func TestLeftUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged strings.Builder
		r := permitAll()
		r.Log = slog.New(slog.NewTextHandler(&logged, nil))
		j := join(t, r)
		j.session()
		j.client.stuck = true
		j.client.send(adjust(0, 1<<20))
		synctest.Wait()
		for range 1000 {
			j.bastion.send(data(0, strings.Repeat("x", 500)))
		}
		synctest.Wait()
		j.client.hangUp()
		<-j.done
		if logged.Len() > 0 {
			t.Errorf("logged %s", &logged)
		}
	})
}

// TestUnansweredIsBounded has a client send long requests to a bastion that answers
// none.
func TestUnansweredIsBounded(t *testing.T) {
	long := strings.Repeat("x", 200<<10)
	t.Run("requests", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			j := join(t, permitAll())
			defer j.end()
			j.session()
			for range 10 {
				j.client.send(request(0, "new@example.com", true, long), global("new@example.com", true, long))
				j.bastion.got()
			}
			if j.client.closed {
				t.Fatalf("disconnected: %s", j.client.said)
			}
			j.client.send(request(0, "new@example.com", true, long))
			<-j.done
			if j.client.reason != reasonProtocolError {
				t.Errorf("ended for reason %d: %s", j.client.reason, j.client.said)
			}
		})
	})
	t.Run("answered", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			j := join(t, permitAll())
			defer j.end()
			j.session()
			for range 30 {
				j.client.send(request(0, "new@example.com", true, long), global("new@example.com", true, long))
				j.bastion.got()
				j.bastion.send(failure(0), requestFailure)
				j.client.got()
			}
			j.counts(1, 1, len("session"))
		})
	})
	t.Run("channels", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			j := join(t, permitAll())
			defer j.end()
			for range 21 {
				j.client.send(open(long, 40, ""))
				j.bastion.got()
			}
			j.client.want("client", openFailure(40, 4, "too long requests for channels"))
			for n := range uint32(20) {
				j.bastion.send(openFailure(n, 1, "no"))
			}
			j.counts(0, 0, 0)
		})
	})
	t.Run("listeners", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			j := join(t, permitAll())
			defer j.end()
			j.client.send(global("tcpip-forward", true, listenAt(long, 80)), global("cancel-tcpip-forward", true, listenAt(long, 80)))
			j.client.want("client", requestFailure, requestFailure)
			j.bastion.want("bastion")
		})
	})
}

// TestEarlyWindow has a client grant more than there can be.
func TestEarlyWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := start(t, permitAll())
		defer j.end()
		j.client.send(open("session", 40, ""), adjust(0, 1<<32-1))
		<-j.done
		if j.client.reason != reasonProtocolError {
			t.Errorf("ended for reason %d", j.client.reason)
		}
	})
}

// TestDebt has the bastion send data of which only a part fits the client's window,
// because the gateway has used some of it.
func TestDebt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.terminal()
		j.Tell("hello")
		line := "\r\nhello\r\n"
		j.client.want("notice", stderr(40, line))
		j.bastion.send(data(0, strings.Repeat("x", 500)), data(0, strings.Repeat("x", 500)))
		j.client.want("the part that fits", data(40, strings.Repeat("x", 500)), data(40, strings.Repeat("x", 500-len(line))))
		j.client.send(adjust(0, 500))
		j.client.want("the rest", data(40, strings.Repeat("x", len(line))))
		j.bastion.want("bastion", adjust(70, 500-uint32(len(line))))
	})
}

// TestDebtOfClosed has the bastion use all of the window that it knows, when the client
// has closed the channel and the gateway has used some of that window.
func TestDebtOfClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.terminal()
		j.Tell("hello")
		j.bastion.send(data(0, strings.Repeat("x", 500)))
		j.client.got()
		j.client.send(closing(0))
		j.bastion.want("bastion", closing(70))
		j.bastion.send(data(0, strings.Repeat("x", 500)), closing(0))
		j.client.want("client", closing(40))
		if j.bastion.closed {
			t.Errorf("the bastion was disconnected: %s", j.bastion.said)
		}
		j.counts(0, 0, 0)
	})
}

func openFailure(recipient, reason uint32, why string) []byte {
	return sshmsg.OpenFailure{Recipient: recipient, Reason: reason, Description: why}.Append(nil)
}

// TestHeldViolation has a client send a malformed message that is held until the
// bastion has answered: the bastion is not at fault.
func TestHeldViolation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		j.client.send(request(0, "pty-req", true, pty), []byte{sshmsg.NumRequest, 0, 0, 0, 0, 1})
		j.bastion.got()
		j.bastion.send(success(0))
		<-j.done
		if !j.byClient || j.client.reason != reasonProtocolError || j.bastion.reason != 0 {
			t.Errorf("ended by client: %v; reasons %d and %d", j.byClient, j.client.reason, j.bastion.reason)
		}
	})
}

// TestPanicInProgress ends one connection, and not the process.
func TestPanicInProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := permitAll()
		first := true
		r.Waiting = func() string {
			if !first {
				panic("on purpose")
			}
			first = false
			return "."
		}
		j := start(t, r)
		j.earlyTerminal()
		<-j.done
		if !j.byClient {
			t.Error("the connection did not end by the client's side")
		}
	})
}
