package relay

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// TestEarly confirms a session at once and replays it.
func TestEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := permitAll()
		r.Waiting = func() string { return "wait" }
		j := start(t, r)
		defer j.end()
		early := sshmsg.OpenConfirm{Recipient: 40, Sender: 0, Window: earlyWindow, MaxPacket: earlyMaxPacket}.Append(nil)
		listen := string(sshmsg.Listen{Host: "", Port: 8080}.Append(nil))
		j.client.send(global("tcpip-forward", true, listen), open("session", 40, ""),
			request(0, "pty-req", true, pty), request(0, "odd@example.com", true, ""), request(0, "shell", true, ""), data(0, "ls\n"))
		j.client.want("client", early, success(40), failure(40), success(40), stderr(40, "wait"))
		time.Sleep(progressEvery)
		j.client.want("client", stderr(40, "."))
		j.client.send(adjust(0, 11), open("direct-tcpip", 41, string(sshmsg.TCPIP{Host: "h", Port: 1}.Append(nil))))
		j.client.want("client")
		j.arrive()
		opened := sshmsg.Open{Type: "session", Sender: 0, Window: 1004, MaxPacket: 500}.Append(nil)
		j.bastion.want("bastion", global("tcpip-forward", true, listen), opened,
			open("direct-tcpip", 1, string(sshmsg.TCPIP{Host: "h", Port: 1}.Append(nil))))
		j.client.want("client", stderr(40, "\r\n"))
		j.Tell("x") // between the open and its confirmation
		j.client.want("client", stderr(40, "\r\nx\r\n"))
		j.bastion.send(confirm(0, 70), requestSuccess, confirm(1, 71))
		j.bastion.want("bastion", request(70, "pty-req", true, pty), request(70, "shell", true, ""), data(70, "ls\n"))
		j.client.want("client", adjust(40, 8192-earlyWindow), requestSuccess, confirm(41, 1))
		j.bastion.send(success(0), success(0), data(0, "out"))
		j.client.want("client", data(40, "out"))
		time.Sleep(time.Minute)
		j.client.want("client")
		j.client.send(adjust(0, 7))
		j.bastion.want("bastion", adjust(70, 2)) // five bytes are kept back
	})
}

// TestEarlyRefused ends a session whose requests the bastion does not grant.
func TestEarlyRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := start(t, permitAll())
		defer j.end()
		j.client.send(open("session", 40, ""), request(0, "subsystem", true, string(sshmsg.AppendString(nil, "odd"))))
		j.client.got()
		j.arrive()
		j.bastion.got()
		j.bastion.send(confirm(0, 70))
		j.client.got()
		j.bastion.got()
		j.bastion.send(failure(0))
		j.client.want("client", stderr(40, "\r\nrefused\r\n"), exitStatus(40, 255), eof(40), closing(40))
		j.bastion.want("bastion", closing(70))
	})
}

// TestEarlyCloses replays a session that the client has closed meanwhile, and one
// that it has interrupted not at all.
func TestEarlyCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := start(t, permitAll())
		defer j.end()
		j.client.send(open("session", 40, ""), request(0, "exec", false, execTrue), eof(0), closing(0),
			open("session", 41, ""), request(1, "pty-req", true, pty), request(1, "shell", true, ""), data(1, "\x03"))
		j.client.got()
		j.client.send(closing(1))
		j.client.want("client")
		j.arrive()
		j.bastion.want("bastion", open("session", 0, ""))
		j.bastion.send(confirm(0, 70))
		j.bastion.want("bastion", request(70, "exec", true, execTrue), eof(70), closing(70))
		j.bastion.send(closing(0))
		j.client.want("client", closing(40))
		if open, _, _ := j.Channels(); len(open) != 0 {
			t.Errorf("left %v", open)
		}
	})
}

// TestNeverComes tells everybody why there is no bastion.
func TestNeverComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := start(t, permitAll())
		j.client.send(open("session", 40, ""), request(0, "exec", true, execTrue), open("other", 41, ""), global("x", true, ""), global("y", false, ""))
		j.client.got()
		close(j.server)
		no := func(n uint32) []byte {
			return sshmsg.OpenFailure{Recipient: n, Reason: sshmsg.ConnectFailed, Description: "no room"}.Append(nil)
		}
		j.client.want("client", requestFailure, stderr(40, "\r\nno room\r\n"), exitStatus(40, 255), eof(40), closing(40), no(41))
		early := sshmsg.OpenConfirm{Recipient: 42, Sender: 0, Window: earlyWindow, MaxPacket: earlyMaxPacket}.Append(nil)
		j.client.send(closing(0), open("session", 42, ""), global("z", true, ""), request(0, "exec", true, execTrue))
		j.client.want("client", early, requestFailure, success(42), stderr(42, "\r\nno room\r\n"), exitStatus(42, 255), eof(42), closing(42))
		j.client.send(closing(0), open("session", 43, ""))
		j.client.got()
		<-j.done
		j.client.want("client", stderr(43, "\r\nno room\r\n"), exitStatus(43, 255), eof(43), closing(43))
		if j.byClient || !errors.Is(j.err, ErrNoBastion) {
			t.Errorf("by client: %v, %v", j.byClient, j.err)
		}
	})
}

// TestBacklogIsBounded has a client ask for too much of a bastion that is starting.
func TestBacklogIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := start(t, permitAll())
		big := strings.Repeat("x", 1<<17)
		for range 8 {
			j.client.send(open("other", 1, big))
		}
		if got := j.client.got(); len(got) != 1 || got[0][0] != sshmsg.NumOpenFailure {
			t.Errorf("got\n%s", describe(got))
		}
		j.client.send(global("other", true, big))
		<-j.done
		if !strings.Contains(j.client.said, "too many requests") {
			t.Errorf("disconnected with %q", j.client.said)
		}
		j = start(t, permitAll())
		for range requestsMax + 1 {
			j.client.send(global("other", true, ""))
		}
		<-j.done
		if j.client.reason != reasonProtocolError {
			t.Errorf("disconnected with %d", j.client.reason)
		}
	})
}
