package relay

import (
	"testing"
	"testing/synctest"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// opens has the bastion open a channel, and reports whether that reaches the
// client, which refuses it.
func (j *joined) opens(kind string, payload []byte) bool {
	j.client.t.Helper()
	j.bastion.got()
	j.bastion.send(open(kind, 99, string(payload)))
	got := j.client.got()
	if len(got) == 0 {
		j.bastion.want("bastion", sshmsg.OpenFailure{Recipient: 99, Reason: sshmsg.Prohibited, Description: errNotAsked.Error()}.Append(nil))
		return false
	}
	m, err := sshmsg.ParseOpen(got[0])
	if err != nil || m.Type != kind {
		j.client.t.Fatalf("%s: the client got\n%s", kind, describe(got))
	}
	j.client.send(sshmsg.OpenFailure{Recipient: m.Sender, Reason: sshmsg.ConnectFailed}.Append(nil))
	synctest.Wait()
	j.bastion.got()
	return true
}

func tcpip(host string, port uint32) []byte {
	return sshmsg.TCPIP{Host: host, Port: port, OriginHost: "192.0.2.1", OriginPort: 4000}.Append(nil)
}

func listenAt(host string, port uint32) string {
	return string(sshmsg.Listen{Host: host, Port: port}.Append(nil))
}

// TestNotAsked refuses all that the client has not asked for.
func TestNotAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		for kind, payload := range map[string][]byte{
			"forwarded-tcpip":                   tcpip("localhost", 80),
			"forwarded-streamlocal@openssh.com": sshmsg.AppendString(nil, "/tmp/s"),
			"auth-agent@openssh.com":            nil,
			"agent-connect":                     nil,
			"x11":                               []byte(listenAt("127.0.0.1", 4000)),
		} {
			if j.opens(kind, payload) {
				t.Errorf("%s reached the client", kind)
			}
		}
		if j.opens("forwarded-tcpip", nil) || j.opens("forwarded-streamlocal@openssh.com", nil) {
			t.Error("malformed opens reached the client")
		}
		if !j.opens("unknown@example.com", nil) {
			t.Error("a channel of an unknown type did not reach the client")
		}
	})
}

// TestListeners follows listeners from the request to the cancellation.
func TestListeners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		const tcp, unix = "forwarded-tcpip", "forwarded-streamlocal@openssh.com"
		want := func(want bool, kind string, payload []byte) {
			t.Helper()
			if got := j.opens(kind, payload); got != want {
				t.Errorf("%s %q passes: %v, want %v", kind, payload, got, want)
			}
		}
		// Granted, by its host as it was written, and its port.
		j.client.send(global("tcpip-forward", true, listenAt("localhost", 8080)))
		j.bastion.got()
		want(true, tcp, tcpip("localhost", 8080)) // before the reply
		j.bastion.send(requestSuccess)
		j.client.want("client", requestSuccess)
		want(true, tcp, tcpip("localhost", 8080))
		want(false, tcp, tcpip("localhost", 8081))
		want(false, tcp, tcpip("127.0.0.1", 8080))
		want(false, unix, sshmsg.AppendString(nil, "localhost"))

		// Any port, until the bastion has chosen one.
		j.client.send(global("tcpip-forward", true, listenAt("", 0)))
		j.bastion.got()
		want(true, tcp, tcpip("", 7))
		j.bastion.send(append(requestSuccess, 0, 0, 0x12, 0x34))
		j.client.want("client", append(requestSuccess, 0, 0, 0x12, 0x34))
		want(true, tcp, tcpip("", 0x1234))
		want(false, tcp, tcpip("", 7))

		// A port that is never known.
		for _, reply := range [][]byte{requestSuccess, append(requestSuccess, 0, 0, 0, 0)} {
			j.client.send(global("tcpip-forward", true, listenAt("none", 0)))
			j.bastion.got()
			j.bastion.send(reply)
			j.client.got()
		}
		j.client.send(global("tcpip-forward", false, listenAt("none", 0)))
		want(false, tcp, tcpip("none", 40001))

		// Refused.
		j.client.send(global("streamlocal-forward@openssh.com", true, string(sshmsg.AppendString(nil, "/a"))))
		j.bastion.got()
		j.bastion.send(requestFailure)
		j.client.want("client", requestFailure)
		want(false, unix, sshmsg.AppendString(nil, "/a"))

		// Cancelled without a reply, which the bastion is asked for all the
		// same: until it has confirmed, its opens pass.
		j.bastion.got()
		j.client.send(global("cancel-tcpip-forward", false, listenAt("localhost", 8080)), global("other", true, ""))
		j.bastion.want("bastion", global("cancel-tcpip-forward", true, listenAt("localhost", 8080)), global("other", true, ""))
		want(true, tcp, tcpip("localhost", 8080))
		j.bastion.send(requestSuccess, requestFailure)
		j.client.want("client", requestFailure) // to the other one
		want(false, tcp, tcpip("localhost", 8080))
		want(true, tcp, tcpip("", 0x1234))

		// A cancellation that fails changes nothing.
		j.client.send(global("cancel-tcpip-forward", true, listenAt("", 0x1234)))
		j.bastion.got()
		j.bastion.send(requestFailure)
		j.client.want("client", requestFailure)
		want(true, tcp, tcpip("", 0x1234))
	})
}

// TestDisplaysAndAgents follows what sessions ask for.
func TestDisplaysAndAgents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		x11 := func(single byte) string {
			return string(rune(single)) + string(sshmsg.AppendString(sshmsg.AppendString(nil, "MIT-MAGIC-COOKIE-1"), "00")) + "\x00\x00\x00\x00"
		}
		origin := []byte(listenAt("127.0.0.1", 4000))
		ask := func(kind, payload string, reply []byte) {
			t.Helper()
			j.client.send(request(0, kind, true, payload))
			j.bastion.got()
			j.bastion.send(reply)
			j.client.got()
		}
		ask("auth-agent-req@openssh.com", "", failure(0))
		ask("x11-req", x11(0), failure(0))
		if j.opens("auth-agent@openssh.com", nil) || j.opens("x11", origin) {
			t.Error("a refused request opens the way")
		}
		ask("auth-agent-req@openssh.com", "", success(0))
		ask("x11-req", x11(1), success(0))
		for range 2 {
			if !j.opens("auth-agent@openssh.com", nil) {
				t.Error("the agent is not reached")
			}
		}
		if !j.opens("x11", origin) || j.opens("x11", origin) {
			t.Error("a single connection to the display is not one")
		}
		j.bastion.send(closing(0))
		j.client.send(closing(0))
		synctest.Wait()
		j.client.got()
		j.bastion.got()
		j.session()
		ask("x11-req", x11(0), success(0))
		for range 2 {
			if !j.opens("x11", origin) {
				t.Error("the display is not reached")
			}
		}
		j.bastion.send(closing(0))
		j.client.send(closing(0))
		synctest.Wait()
		j.client.got()
		if j.opens("x11", origin) {
			t.Error("the display of a session that has ended is reached")
		}
		if !j.opens("auth-agent@openssh.com", nil) {
			t.Error("the agent is not reached any more")
		}
	})
}

// FuzzAsked: no message of either side makes the account of requests panic, or
// permit a kind of channel that was not asked for.
func FuzzAsked(f *testing.F) {
	f.Add("tcpip-forward", []byte(listenAt("localhost", 0)), []byte{0, 0, 0, 1}, tcpip("localhost", 1))
	f.Add("streamlocal-forward@openssh.com", sshmsg.AppendString(nil, "/s"), []byte(nil), sshmsg.AppendString(nil, "/s"))
	f.Add("x11-req", []byte{1}, []byte(nil), []byte(nil))
	f.Add("auth-agent-req@openssh.com", []byte(nil), []byte(nil), []byte(nil))
	f.Fuzz(func(t *testing.T, kind string, request, reply, open []byte) {
		var a listeners
		kinds := []string{"forwarded-tcpip", "forwarded-streamlocal@openssh.com", "auth-agent@openssh.com", "x11"}
		if l, cancel, ok := parseListener(kind, request); ok && !cancel {
			settle, err := a.listen(l)
			if err != nil {
				t.Fatal(err)
			}
			settle(true, reply)
			for _, other := range kinds {
				if other != l.kind && a.mayOpen(other, open) == nil {
					t.Errorf("%s permits %s", kind, other)
				}
			}
			a.mayOpen(l.kind, open)
			a.cancelled(l)
			if (l.port != 0 || l.kind != "forwarded-tcpip") && a.mayOpen(l.kind, open) == nil {
				t.Error("it is permitted after the cancellation")
			}
			return
		}
		undo := a.session(0, kind, request)
		permitted := 0
		for _, kind := range kinds {
			if a.mayOpen(kind, open) == nil {
				permitted++
			}
		}
		if undo != nil {
			undo()
		}
		for _, kind := range kinds {
			if permitted > 1 || a.mayOpen(kind, open) == nil {
				t.Errorf("%s permits too much", kind)
			}
		}
	})
}
