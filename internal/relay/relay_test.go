package relay

import (
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// TestSession is one whole session.
func TestSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		j.client.send(request(0, "exec", true, execTrue), data(0, "in"), eof(0))
		j.bastion.want("bastion", request(70, "exec", true, execTrue), data(70, "in"), eof(70))
		j.bastion.send(adjust(0, 2), success(0), data(0, "out"), stderr(0, "err"), exitStatus(0, 3), eof(0), closing(0))
		j.client.want("client", adjust(40, 2), success(40), data(40, "out"), stderr(40, "err"), exitStatus(40, 3), eof(40), closing(40))
		j.client.send(closing(0))
		j.bastion.want("bastion", closing(70))
		open, up, down := j.Channels()
		if len(open) != 0 || up != 2 || down != 6 {
			t.Errorf("left %v, %d bytes up, %d down", open, up, down)
		}
		// The number is free again.
		j.session()
		j.client.hangUp()
		<-j.done
		if !j.byClient || !errors.Is(j.err, io.EOF) {
			t.Errorf("ended by client: %v, %v", j.byClient, j.err)
		}
	})
}

// TestUnknown passes on what the relay has never heard of.
func TestUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.client.send(open("new-kind@example.com", 9, "payload"), global("new@example.com", true, "body"))
		j.bastion.want("bastion", open("new-kind@example.com", 0, "payload"), global("new@example.com", true, "body"))
		answer := sshmsg.OpenConfirm{Recipient: 0, Sender: 5, Window: 1, MaxPacket: 2, Payload: []byte("extra")}
		j.bastion.send(answer.Append(nil), append(requestSuccess, "reply"...), request(0, "odd@example.com", true, "x"))
		answer.Recipient, answer.Sender = 9, 0
		j.client.want("client", answer.Append(nil), append(requestSuccess, "reply"...), request(9, "odd@example.com", true, "x"))
		j.client.send(failure(0), []byte{101, 1, 2})
		j.bastion.want("bastion", failure(5))
		if j.client.unknowns != 1 {
			t.Errorf("%d messages were answered with UNIMPLEMENTED", j.client.unknowns)
		}
	})
}

// TestReplyOrder answers requests here that come behind some that the far side has
// not answered.
func TestReplyOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		listen := string(sshmsg.Listen{Host: "", Port: 0}.Append(nil))
		j.client.send(global("tcpip-forward", true, listen), global("keepalive@openssh.com", true, ""), global("hostkeys-prove-00@openssh.com", true, "x"))
		j.bastion.want("bastion", global("tcpip-forward", true, listen))
		j.client.want("client", global("keepalive@openssh.com", false, "")) // a sign of life
		j.bastion.send(append(requestSuccess, 0, 0, 1, 2))
		j.client.want("client", append(requestSuccess, 0, 0, 1, 2), requestFailure, requestFailure)
		j.client.send(global("keepalive@openssh.com", true, ""))
		j.client.want("client", requestFailure)

		j.session()
		j.client.send(request(0, "exec", true, execTrue), request(0, "keepalive@openssh.com", true, ""))
		j.bastion.want("bastion", request(70, "exec", true, execTrue))
		j.client.want("client")
		j.bastion.send(success(0))
		j.client.want("client", success(40), failure(40))
		// Replies to nothing are dropped.
		j.bastion.send(success(0), requestSuccess)
		j.client.want("client")
	})
}

// TestAsk is the gateway's own question between others.
func TestAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.client.send(global("a@example.com", true, ""))
		synctest.Wait()
		answered := false
		j.Ask(false, func() { answered = true })
		j.client.send(global("b@example.com", true, ""))
		j.bastion.want("bastion", global("a@example.com", true, ""), global("keepalive@openssh.com", true, ""), global("b@example.com", true, ""))
		j.bastion.send(append(requestSuccess, 'a'), requestFailure, append(requestSuccess, 'b'))
		j.client.want("client", append(requestSuccess, 'a'), append(requestSuccess, 'b'))
		if !answered {
			t.Error("the answer was not heard")
		}
	})
}

// TestHeld has requests wait for the reply to pty-req.
func TestHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		j.client.send(request(0, "pty-req", true, pty), request(0, "shell", true, ""), data(0, "ls\n"), adjust(0, 5))
		j.bastion.want("bastion", request(70, "pty-req", true, pty), adjust(70, 5))
		j.bastion.send(success(0))
		j.bastion.want("bastion", request(70, "shell", true, ""), data(70, "ls\n"))
		j.client.want("client", success(40))
		j.bastion.send(closing(0))
		j.client.send(closing(0))
		j.bastion.want("bastion", closing(70))
	})
}

// TestCloseWhileHeld closes a channel whose pty-req is never answered.
func TestCloseWhileHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		j.client.send(request(0, "pty-req", true, pty), request(0, "shell", true, ""))
		j.bastion.want("bastion", request(70, "pty-req", true, pty))
		j.bastion.send(closing(0))
		j.client.want("client", closing(40))
		j.client.send(closing(0))
		j.bastion.want("bastion", closing(70))
		if open, _, _ := j.Channels(); len(open) != 0 {
			t.Errorf("left %v", open)
		}
	})
}

// TestRequirePTY runs no command without a terminal, and none whose terminal was
// refused.
func TestRequirePTY(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := permitAll()
		r.Permissions.RequirePTY = true
		j := join(t, r)
		defer j.end()
		j.session()
		j.client.send(request(0, "exec", true, execTrue))
		j.client.want("client", failure(40))
		j.client.send(request(0, "pty-req", true, pty), request(0, "shell", true, ""))
		j.bastion.want("bastion", request(70, "pty-req", true, pty))
		j.bastion.send(failure(0))
		j.client.want("client", failure(40), failure(40))
		j.bastion.want("bastion")
		j.client.send(request(0, "pty-req", true, pty), request(0, "shell", true, ""))
		j.bastion.want("bastion", request(70, "pty-req", true, pty))
		j.bastion.send(success(0))
		j.bastion.want("bastion", request(70, "shell", true, ""))
	})
	// A client that wants no reply to its pty-req is not held to have a terminal.
	for _, granted := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			r := permitAll()
			r.Permissions.RequirePTY = true
			j := join(t, r)
			defer j.end()
			j.session()
			j.client.send(request(0, "pty-req", false, pty), request(0, "shell", true, ""))
			j.bastion.want("bastion", request(70, "pty-req", true, pty))
			if granted {
				j.bastion.send(success(0))
				j.bastion.want("bastion", request(70, "shell", true, ""))
				j.client.want("client")
			} else {
				j.bastion.send(failure(0))
				j.bastion.want("bastion")
				j.client.want("client", failure(40))
			}
		})
	}
}

// terminal opens a session with a shell on a terminal.
func (j *joined) terminal() {
	j.client.t.Helper()
	j.session()
	j.client.send(request(0, "pty-req", true, pty))
	j.bastion.want("bastion", request(70, "pty-req", true, pty))
	j.bastion.send(success(0))
	j.client.want("client", success(40))
	j.client.send(request(0, "shell", true, ""))
	j.bastion.want("bastion", request(70, "shell", true, ""))
	j.bastion.send(success(0))
	j.client.want("client", success(40))
}

// TestTell writes into the client's window, of which the bastion does not know.
func TestTell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.terminal()
		j.Tell("down soon") // 13 bytes
		j.client.want("client", stderr(40, "\r\ndown soon\r\n"))
		// The bastion uses all of the window that it knows.
		j.bastion.send(data(0, strings.Repeat("a", 500)), data(0, strings.Repeat("b", 500)), eof(0))
		j.client.want("client", data(40, strings.Repeat("a", 500)), data(40, strings.Repeat("b", 487)))
		j.Tell("not now: there is no room")
		j.client.send(adjust(0, 10))
		j.client.want("client", data(40, strings.Repeat("b", 10)))
		j.bastion.want("bastion")
		j.client.send(adjust(0, 20))
		j.client.want("client", data(40, "bbb"), eof(40))
		j.bastion.want("bastion", adjust(70, 17))
	})
}

// TestLost tells sessions that the bastion has gone.
func TestLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		j.session()
		j.client.send(open("direct-tcpip", 41, string(sshmsg.TCPIP{Host: "h", Port: 1}.Append(nil))))
		j.bastion.got()
		j.bastion.send(data(0, "last"))
		synctest.Wait()
		j.bastion.hangUp()
		j.client.want("client", data(40, "last"), stderr(40, "\r\nlost\r\n"), exitStatus(40, 255), eof(40), closing(40),
			sshmsg.OpenFailure{Recipient: 41, Reason: sshmsg.ConnectFailed, Description: "the other side is closing its connection"}.Append(nil))
		j.client.send(closing(0))
		<-j.done
		if j.byClient || j.client.reason != reasonByApplication {
			t.Errorf("by client: %v, reason %d", j.byClient, j.client.reason)
		}
	})
}

// TestLostUnread loses a bastion while the client reads nothing.
func TestLostUnread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		j.session()
		j.bastion.send(data(0, strings.Repeat("a", 1000)))
		j.client.got()
		began := time.Now()
		j.bastion.hangUp()
		j.client.want("client") // no window
		<-j.done
		if waited := time.Since(began); waited != farewell {
			t.Errorf("waited %v", waited)
		}
	})
}

// TestEnded gives no sentence to a session that has told its status.
func TestEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		j.session()
		j.bastion.send(exitStatus(0, 0))
		synctest.Wait()
		j.bastion.hangUp()
		j.client.want("client", exitStatus(40, 0), eof(40), closing(40))
		j.client.hangUp()
		<-j.done
	})
}

// TestExpect says why, also if the command ends before the connection does.
func TestExpect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		j.Expect("stopped by bob")
		j.bastion.send(exitStatus(0, 1), eof(0), closing(0))
		j.client.want("client", stderr(40, "\r\nstopped by bob\r\n"), exitStatus(40, 1), eof(40), closing(40))
	})
}

// TestLimits bounds sessions and channels.
func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := permitAll()
		r.MaxSessions, r.MaxChannels = 1, 2
		j := join(t, r)
		defer j.end()
		j.session()
		j.client.send(open("session", 1, ""), open("other", 2, ""), open("other", 3, ""))
		shortage := func(n uint32, why string) []byte {
			return sshmsg.OpenFailure{Recipient: n, Reason: sshmsg.ResourceShortage, Description: why}.Append(nil)
		}
		j.client.want("client", shortage(1, "too many sessions on this connection"), shortage(3, "too many channels on this connection"))
		j.bastion.want("bastion", open("other", 1, ""))
		j.bastion.send(sshmsg.OpenFailure{Recipient: 1, Reason: 2, Description: "no"}.Append(nil))
		j.client.want("client", sshmsg.OpenFailure{Recipient: 2, Reason: 2, Description: "no"}.Append(nil))
		j.client.send(global("no-more-sessions@openssh.com", true, ""), open("session", 4, ""))
		j.client.want("client", requestSuccess,
			sshmsg.OpenFailure{Recipient: 4, Reason: sshmsg.Prohibited, Description: "no more sessions were announced"}.Append(nil))
	})
}

// TestBackPressure reads nothing from a side while the other takes nothing, and
// then goes on.
func TestBackPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := permitAll()
		r.ProveHostKeys = func([]byte) ([]byte, bool) { return make([]byte, 10<<10), true }
		j := join(t, r)
		defer j.end()
		j.session()
		j.client.mu.Lock()
		j.client.stuck = true
		j.client.mu.Unlock()
		j.client.send(adjust(0, 4<<20))
		j.bastion.got()
		packet := data(0, strings.Repeat("x", 500))
		j.bastion.send(slices.Repeat([][]byte{packet}, 3000)...)
		synctest.Wait()
		if n := j.client.queued; n < queueMax || n > queueMax+2*len(packet) {
			t.Errorf("%d bytes are queued", n)
		}
		// The other way is free.
		j.client.send(data(0, "up"))
		j.bastion.want("bastion", data(70, "up"))
		j.client.mu.Lock()
		j.client.stuck = false
		j.client.changed.Broadcast()
		j.client.mu.Unlock()
		if got := j.client.got(); len(got) != 3000 {
			t.Errorf("%d packets came", len(got))
		}
		// Nor does a client fill memory with replies that it does not read.
		j.client.mu.Lock()
		j.client.stuck = true
		j.client.mu.Unlock()
		ask := global("hostkeys-prove-00@openssh.com", true, "")
		j.client.send(slices.Repeat([][]byte{ask}, 1000)...)
		synctest.Wait()
		if n := j.client.queued; n < repliesMax || n > repliesMax+11<<10 {
			t.Errorf("%d bytes of replies are queued", n)
		}
	})
}

// TestPanic ends one connection.
func TestPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := permitAll()
		r.Watch = panics{}
		j := join(t, r)
		j.client.send(open("session", 40, ""))
		j.bastion.got()
		j.bastion.send(confirm(0, 70))
		<-j.done
		if j.err == nil || !strings.Contains(j.err.Error(), "panic") {
			t.Errorf("ended with %v", j.err)
		}
	})
}

type panics struct{ Watcher }

func (panics) Open(Opening) (ChannelWatcher, error) { panic("on purpose") }
