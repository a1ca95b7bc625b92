package relay

import (
	"testing"
	"testing/synctest"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// earlySession opens channel 0 before the bastion is there.
func (j *joined) earlySession() {
	j.client.t.Helper()
	j.client.send(open("session", 40, ""))
	j.client.want("client", sshmsg.OpenConfirm{Recipient: 40, Sender: 0, Window: earlyWindow, MaxPacket: earlyMaxPacket}.Append(nil))
}

// asksEarly reports whether a request is answered with success.
func (j *joined) asksEarly(kind, payload string) bool {
	j.client.t.Helper()
	j.client.send(request(0, kind, true, payload))
	got := j.client.got()
	return len(got) > 0 && got[0][0] == sshmsg.NumSuccess
}

// TestEarlyRefusals refuses requests that are not permitted, and does not send them to the
// bastion.
func TestEarlyRefusals(t *testing.T) {
	tests := []struct {
		name    string
		limit   func(*identity.Permissions)
		refused []string
		granted []string
	}{
		{"pty", func(p *identity.Permissions) { p.PTY = false }, []string{"pty-req"}, []string{"shell"}},
		{"agent and X11", func(p *identity.Permissions) { p.AgentForwarding, p.X11Forwarding = false, false },
			[]string{"auth-agent-req@openssh.com", "x11-req"}, []string{"env", "shell"}},
		{"shell", func(p *identity.Permissions) { p.NoShell = true }, []string{"shell"}, []string{"exec"}},
		{"no terminal", func(p *identity.Permissions) { p.RequirePTY = true }, []string{"shell", "exec"}, []string{"pty-req", "shell"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := permitAll()
				tt.limit(&r.Permissions)
				j := start(t, r)
				defer j.end()
				j.earlySession()
				for _, kind := range tt.refused {
					if j.asksEarly(kind, execTrue) {
						t.Errorf("%s is granted", kind)
					}
				}
				want := [][]byte{}
				for _, kind := range tt.granted {
					if !j.asksEarly(kind, execTrue) {
						t.Errorf("%s is refused", kind)
					}
					want = append(want, request(70, kind, mustSucceed(kind), execTrue))
				}
				j.arrive()
				j.bastion.got()
				j.bastion.send(confirm(0, 70))
				j.bastion.want("bastion", want...)
			})
		})
	}
}

// TestEarlyLimits counts sessions that wait like others.
func TestEarlyLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := permitAll()
		r.MaxSessions = 1
		j := start(t, r)
		defer j.end()
		j.earlySession()
		j.client.send(open("session", 41, ""))
		j.client.want("client", openFailure(41, sshmsg.ResourceShortage, "too many sessions on this connection"))
		j.client.send(closing(0)) // nothing was asked of the bastion
		j.client.want("client", closing(40))
		j.counts(0, 0, 0)
		j.earlySession()
		if !j.asksEarly("exec", execTrue) {
			t.Error("exec is refused")
		}
		j.client.send(closing(0)) // the command will run
		j.client.want("client")
		j.client.send(open("session", 41, ""), global("no-more-sessions@openssh.com", false, ""), open("session", 42, ""))
		j.client.want("client", openFailure(41, sshmsg.ResourceShortage, "too many sessions on this connection"),
			openFailure(42, sshmsg.Prohibited, "no more sessions were announced"))
	})
}

// TestEarlyNotGranted refuses requests in the bastion that the relay has granted.
func TestEarlyNotGranted(t *testing.T) {
	told := [][]byte{stderr(40, "\r\nrefused\r\n"), exitStatus(40, 255), eof(40), closing(40)}
	for _, kind := range []string{"pty-req", "shell", "exec", "subsystem", "session", "env", "gone"} {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := start(t, permitAll())
				defer j.end()
				j.earlySession()
				if asked := map[string]string{"session": "exec", "gone": "exec"}[kind]; asked != "" {
					j.asksEarly(asked, execTrue)
				} else {
					j.asksEarly(kind, execTrue)
				}
				j.arrive()
				j.bastion.want("bastion", open("session", 0, ""))
				switch kind {
				case "gone":
					j.bastion.hangUp()
					j.client.want("client", stderr(40, "\r\nlost\r\n"), exitStatus(40, 255), eof(40), closing(40))
					return
				case "session":
					j.bastion.send(openFailure(0, sshmsg.ResourceShortage, "text of the bastion"))
					j.client.want("client", told...)
					j.client.send(closing(0))
					j.counts(0, 0, 0)
					return
				}
				j.bastion.send(confirm(0, 70))
				j.client.want("client", adjust(40, 8192-earlyWindow))
				j.bastion.got()
				j.bastion.send(failure(0))
				if kind == "env" {
					j.client.want("client")
					return
				}
				j.client.want("client", told...)
				j.bastion.want("bastion", closing(70))
			})
		})
	}
}

// TestEarlyExpect gives the reason that is known if no bastion comes, and sends Tell to
// terminals that wait.
func TestEarlyExpect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := start(t, permitAll())
		defer j.end()
		j.earlySession()
		if !j.asksEarly("pty-req", pty) || !j.asksEarly("shell", "") {
			t.Error("a terminal is refused")
		}
		j.Tell("soon")
		j.client.want("client", stderr(40, "\r\nsoon\r\n"))
		j.Expect("Your key was revoked.")
		close(j.server)
		j.client.want("client", stderr(40, "\r\nYour key was revoked.\r\n"), exitStatus(40, 255), eof(40), closing(40))
	})
}

// TestChannels checks the list of channels for the console.
func TestChannels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		long := make([]byte, 2*commandMax)
		for i := range long {
			long[i] = 'x'
		}
		j.client.send(request(0, "exec", true, string(sshmsg.AppendString(nil, string(long)))), data(0, "question"), open("other", 41, ""))
		j.bastion.got()
		j.bastion.send(success(0), data(0, "the answer"), stderr(0, "!"))
		synctest.Wait()
		open, up, down := j.Channels()
		if len(open) != 1 || up != 8 || down != 11 { // other is not confirmed
			t.Fatalf("%+v, %d bytes up, %d down", open, up, down)
		}
		if c := open[0]; c.Number != 0 || c.Kind != "session" || !c.FromClient || c.Runs != "exec" || c.Command != string(long[:commandMax]) ||
			c.ToBastion != 8 || c.ToClient != 11 || c.Since.IsZero() {
			t.Errorf("channel %+v", c)
		}
		j.bastion.send(confirm(1, 71), closing(0))
		j.client.send(closing(0))
		synctest.Wait()
		if open, up, down = j.Channels(); len(open) != 1 || open[0].Number != 1 || up != 8 || down != 11 {
			t.Errorf("after its end %+v, %d, %d", open, up, down)
		}
	})
}
