package relay

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// TestAttacks sends messages against the protocol to a relay with one session, and
// wants the answer that each must get: DISCONNECT with a text, UNIMPLEMENTED, or none.
// In no case does the other peer receive anything, and the session lives on unless
// the answer is DISCONNECT. For peers that do not read, see TestBackPressure and
// TestUsedUpWindow.
func TestAttacks(t *testing.T) {
	const (
		dropped       = "dropped"
		unimplemented = "unimplemented"
	)
	malformed := func(num byte) []byte { return []byte{num, 0, 0, 0, 0, 0, 0, 0, 9, 'x'} }
	full := strings.Repeat("x", 500)
	for _, tt := range []struct {
		name    string
		by      string // the peer that sends
		packets [][]byte
		answer  string
	}{
		// Sizes.
		{"empty packet", "client", [][]byte{{}}, "empty packet"},
		{"open cut short", "client", [][]byte{open("session", 1, "")[:9]}, "malformed channel open"},
		{"confirmation cut short", "bastion", [][]byte{confirm(0, 70)[:9]}, "malformed channel open confirmation"},
		{"open failure cut short", "bastion", [][]byte{{sshmsg.NumOpenFailure, 0, 0}}, "malformed channel open failure"},
		{"global request longer than its packet", "client", [][]byte{{sshmsg.NumGlobalRequest, 255, 255, 255, 255}}, "malformed global request"},
		{"request longer than its packet", "client", [][]byte{malformed(sshmsg.NumRequest)}, "malformed channel request"},
		{"data longer than its packet", "client", [][]byte{malformed(sshmsg.NumData)}, "malformed channel data"},
		{"window adjustment cut short", "client", [][]byte{short(sshmsg.NumWindowAdjust, 0)}, "malformed window adjustment"},
		{"EOF with more behind it", "bastion", [][]byte{append(eof(0), 1)}, "malformed EOF"},
		{"CLOSE with more behind it", "client", [][]byte{append(closing(0), 1)}, "malformed close"},
		{"reply with more behind it", "bastion", [][]byte{append(success(0), 1)}, "malformed channel reply"},
		{"message without a channel number", "client", [][]byte{{sshmsg.NumEOF, 0, 0}}, "unknown channel"},
		{"data beyond the maximum packet, from the client", "client", [][]byte{data(0, strings.Repeat("x", 701))}, "data beyond the window or the maximum packet size"},
		{"data beyond the maximum packet, from the bastion", "bastion", [][]byte{data(0, strings.Repeat("x", 501))}, "data beyond the window or the maximum packet size"},

		// Windows.
		{"data far beyond the window", "bastion", [][]byte{data(0, full), data(0, full), data(0, full)}, "data beyond the window or the maximum packet size"},
		{"stderr far beyond the window", "bastion", [][]byte{stderr(0, full), data(0, full), stderr(0, full)}, "data beyond the window or the maximum packet size"},
		{"window beyond 2^32-1", "client", [][]byte{adjust(0, 1<<32-1)}, "window beyond 2^32-1 bytes"},
		{"window beyond 2^32-1, from the bastion", "bastion", [][]byte{adjust(0, 1<<32-1)}, "window beyond 2^32-1 bytes"},

		// Channels.
		{"data on an unknown channel", "client", [][]byte{data(5, "x")}, "unknown channel"},
		{"data on an unknown channel, from the bastion", "bastion", [][]byte{data(5, "x")}, "unknown channel"},
		{"data on channel 2^32-1", "client", [][]byte{data(1<<32-1, "x")}, "unknown channel"},
		{"data on the other peer's number of a channel", "client", [][]byte{data(70, "x")}, "unknown channel"},
		{"data behind CLOSE", "client", [][]byte{closing(0), data(0, "x")}, "message on a closed channel"},
		{"a second CLOSE", "bastion", [][]byte{closing(0), closing(0)}, "message on a closed channel"},
		{"window adjustment on an unknown channel", "client", [][]byte{adjust(5, 1)}, dropped},
		{"window adjustment on an unknown channel, from the bastion", "bastion", [][]byte{adjust(5, 1)}, dropped},
		{"window adjustment on an unknown channel, cut short", "client", [][]byte{short(sshmsg.NumWindowAdjust, 5)}, "malformed window adjustment"},
		{"data behind EOF", "client", [][]byte{eof(0), data(0, "x")}, dropped},
		{"a second EOF", "bastion", [][]byte{eof(0), eof(0)}, dropped},
		{"data before the confirmation", "client", [][]byte{open("session", 1, ""), data(1, "x")}, "message on a channel that is not open"},
		{"confirmation of its own open", "client", [][]byte{open("session", 1, ""), confirm(1, 1)}, "answer to no channel open"},
		{"confirmation of an open channel", "bastion", [][]byte{confirm(0, 70)}, "answer to no channel open"},
		{"confirmation of an unknown channel", "bastion", [][]byte{confirm(9, 70)}, "unknown channel"},
		{"failure of an open channel", "bastion", [][]byte{openFailure(0, 1, "")}, "answer to no channel open"},

		// Requests and replies.
		{"a reply to no request", "bastion", [][]byte{success(0)}, dropped},
		{"a reply to no request, from the client", "client", [][]byte{failure(0)}, dropped},
		{"a reply to no global request", "bastion", [][]byte{requestSuccess, requestFailure}, dropped},
		{"a reply to no global request, from the client", "client", [][]byte{append(requestSuccess, 0, 0, 0, 1)}, dropped},
		{"too many unanswered requests", "client", slices.Repeat([][]byte{request(0, "x", true, "")}, requestsMax+1), "too many unanswered requests"},
		{"too many unanswered global requests", "client", slices.Repeat([][]byte{global("x", true, "")}, requestsMax+1), "too many unanswered requests"},
		{"too much data behind a pty-req", "client", [][]byte{request(0, "pty-req", true, pty), data(0, strings.Repeat("x", heldMax))}, "too much sent before a request was answered"},

		// Messages.
		{"a message of authentication", "client", [][]byte{{50}}, unimplemented},
		{"a message of authentication, from the bastion", "bastion", [][]byte{{52}}, unimplemented},
		{"an unknown message", "client", [][]byte{{101, 1, 2, 3}}, unimplemented},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := join(t, permitAll())
				defer j.end()
				j.session()
				from, far := j.client, j.bastion
				if tt.by == "bastion" {
					from, far = far, from
				}
				from.send(tt.packets...)
				synctest.Wait()
				unknowns := 0
				switch tt.answer {
				case unimplemented:
					unknowns = 1
				case dropped:
				default:
					<-j.done
					if from.reason != reasonProtocolError || from.said != tt.answer {
						t.Errorf("disconnected with %d %q, want %q", from.reason, from.said, tt.answer)
					}
					if j.byClient != (tt.by == "client") {
						t.Errorf("ended by client: %v", j.byClient)
					}
					return
				}
				if from.unknowns != unknowns || from.isClosed() || far.isClosed() {
					t.Fatalf("%d times UNIMPLEMENTED, want %d; disconnected with %q", from.unknowns, unknowns, from.said)
				}
				passed := far.got()
				if len(passed) > 0 && passed[0][0] == sshmsg.NumEOF { // the first EOF is none
					passed = passed[1:]
				}
				if len(passed) > 0 || len(from.got()) > 0 {
					t.Errorf("the other peer has received\n%s", describe(passed))
				}
				j.client.send(adjust(0, 5))
				j.bastion.want("behind the attack", adjust(70, 5))
			})
		})
	}
}

// TestLateWindowAdjust: a window adjustment behind its sender's CLOSE is dropped, while the
// other peer still sends, and after its CLOSE.
func TestLateWindowAdjust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		j.client.send(closing(0), adjust(0, 1))
		j.bastion.want("of the client's", closing(70))
		j.bastion.send(closing(0), adjust(0, 1))
		j.client.want("of the bastion's", closing(40))
		j.client.send(adjust(0, 1), global("x", false, ""))
		j.bastion.want("behind all", global("x", false, ""))
	})
}

// TestUsedUpWindow sends a session text of the gateway's own that the client's window
// has no room for, so that all packets for the client wait behind it.
func TestUsedUpWindow(t *testing.T) {
	half := strings.Repeat("x", 500)
	// usedUp returns a relay with a terminal whose window is used up, and two bytes of
	// a notice that wait.
	usedUp := func(t *testing.T) *joined {
		j := join(t, permitAll())
		j.terminal()
		j.Tell("notice")
		j.client.want("the notice", stderr(40, "\r\nnotice\r\n"))
		j.bastion.send(data(0, half), data(0, half))
		j.client.want("the part that fits", data(40, half), data(40, strings.Repeat("x", 490)))
		return j
	}
	t.Run("an adjustment of the bastion's window does not wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			j := usedUp(t)
			defer j.end()
			j.bastion.send(exitStatus(0, 3), adjust(0, 77))
			j.client.want("ahead of the data", adjust(40, 77))
			j.client.send(adjust(0, 10))
			j.client.want("the rest", data(40, strings.Repeat("x", 10)), exitStatus(40, 3))
			j.bastion.want("the bastion's window is paid for the notice")
		})
	})
	for _, tt := range []struct {
		name   string
		packet []byte
		answer string
	}{
		{"packets without data", data(0, ""), "too many packets for a window that is used up"},
		{"requests", request(0, "x", false, ""), "too many requests for a window that is used up"},
	} {
		t.Run("endless "+tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := usedUp(t)
				defer j.end()
				for range 1 + injectedMax/messageOverhead {
					j.bastion.send(tt.packet)
				}
				<-j.done
				if j.bastion.reason != reasonProtocolError || j.bastion.said != tt.answer {
					t.Errorf("disconnected with %d %q, want %q", j.bastion.reason, j.bastion.said, tt.answer)
				}
				if j.byClient {
					t.Error("ended by the client")
				}
			})
		})
	}
	t.Run("text that waits when the bastion comes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := permitAll()
			r.Waiting = func() string { return strings.Repeat("w", 1010) }
			j := start(t, r)
			defer j.end()
			j.client.send(open("session", 40, ""), request(0, "pty-req", true, pty), request(0, "shell", true, ""))
			j.client.got() // 1000 bytes of the text, and that ends the window
			j.arrive()
			j.bastion.want("a window without room", sshmsg.Open{Type: "session", MaxPacket: 500}.Append(nil))
			j.bastion.send(confirm(0, 70))
			j.client.got()
			j.bastion.got()
			// 12 bytes wait: of the text, and the line end behind it.
			j.client.send(adjust(0, 100))
			j.client.want("the text", stderr(40, strings.Repeat("w", 10)), stderr(40, "\r\n"))
			j.bastion.want("the rest of the window", adjust(70, 88))
			j.bastion.send(data(0, strings.Repeat("x", 88)))
			j.client.want("all that the bastion may send", data(40, strings.Repeat("x", 88)))
		})
	})
}
