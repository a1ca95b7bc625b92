package relay

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// asks sends a channel request on channel 0, which is open, and reports whether it
// reaches the bastion, which grants it.
func (j *joined) asks(kind, payload string) bool {
	j.client.t.Helper()
	j.client.got()
	j.bastion.got()
	packet := request(0, kind, true, payload)
	j.client.send(packet)
	if len(j.bastion.got()) == 0 {
		j.client.want(kind, failure(40))
		return false
	}
	j.bastion.send(success(0))
	j.client.want(kind, success(40))
	return true
}

// asksGlobally is the same for a global request.
func (j *joined) asksGlobally(kind, payload string) bool {
	j.client.t.Helper()
	j.bastion.got()
	j.client.send(global(kind, true, payload))
	if len(j.bastion.got()) == 0 {
		j.client.want(kind, requestFailure)
		return false
	}
	j.bastion.send(requestSuccess)
	j.client.want(kind, requestSuccess)
	return true
}

// opensChannel has a peer open a channel, and reports whether that reaches the other,
// which refuses it.
func opensChannel(t *testing.T, from, to *peer, kind, payload string) bool {
	t.Helper()
	from.got()
	to.got()
	from.send(open(kind, 99, payload))
	if got := to.got(); len(got) > 0 {
		m, err := sshmsg.ParseOpen(got[0])
		if err != nil || m.Type != kind || string(m.Payload) != payload {
			t.Fatalf("%s arrives as\n%s", kind, describe(got))
		}
		to.send(openFailure(m.Sender, sshmsg.ConnectFailed, "not now"))
		from.want(kind, openFailure(99, sshmsg.ConnectFailed, "not now"))
		return true
	}
	got := from.got()
	m, err := sshmsg.ParseOpenFailure(got[0])
	if len(got) != 1 || err != nil || m.Recipient != 99 || m.Reason != sshmsg.Prohibited || m.Description == "" {
		t.Errorf("%s is answered with\n%s", kind, describe(got))
	}
	return false
}

// TestPermissions has each permission given and not given, in both directions.
func TestPermissions(t *testing.T) {
	tests := []struct {
		name         string
		clear        func(p *identity.Permissions)
		client       []string // channels that the client opens
		bastion      []string // and the bastion
		global, asks []string
	}{
		{"pty", func(p *identity.Permissions) { p.PTY = false }, nil, nil, nil, []string{"pty-req"}},
		{"port forwarding", func(p *identity.Permissions) { p.PortForwarding = false },
			[]string{"direct-tcpip", "direct-streamlocal@openssh.com", "direct-new@example.com"},
			[]string{"forwarded-tcpip", "forwarded-streamlocal@openssh.com", "forwarded-new@example.com"},
			[]string{"tcpip-forward", "streamlocal-forward@openssh.com"}, nil},
		{"agent forwarding", func(p *identity.Permissions) { p.AgentForwarding = false },
			nil, []string{"auth-agent@openssh.com", "agent-connect"}, nil, []string{"auth-agent-req@openssh.com", "agent-req"}},
		{"X11 forwarding", func(p *identity.Permissions) { p.X11Forwarding = false }, nil, []string{"x11"}, nil, []string{"x11-req"}},
	}
	payloads := map[string]string{
		"direct-tcpip": string(tcpip("h", 1)), "forwarded-tcpip": string(tcpip("h", 1)), "tcpip-forward": listenAt("h", 1),
		"forwarded-streamlocal@openssh.com": string(sshmsg.AppendString(nil, "/s")), "streamlocal-forward@openssh.com": string(sshmsg.AppendString(nil, "/s")),
		"x11-req": "\x00" + string(sshmsg.AppendString(sshmsg.AppendString(nil, "p"), "c")) + "\x00\x00\x00\x00", "pty-req": pty,
	}
	for _, permitted := range []bool{true, false} {
		for _, tt := range tests {
			t.Run(fmt.Sprintf("%s=%v", tt.name, permitted), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := permitAll()
					if !permitted {
						tt.clear(&r.Permissions)
					}
					j := join(t, r)
					defer j.end()
					j.session()
					check := func(kind string, reached bool) {
						t.Helper()
						if reached != permitted {
							t.Errorf("%s reaches the other side: %v", kind, reached)
						}
					}
					for _, kind := range tt.global {
						check(kind, j.asksGlobally(kind, payloads[kind]))
					}
					for _, kind := range tt.asks {
						check(kind, j.asks(kind, payloads[kind]))
					}
					for _, kind := range tt.client {
						check(kind, opensChannel(t, j.client, j.bastion, kind, payloads[kind]))
					}
					for _, kind := range tt.bastion {
						check(kind, opensChannel(t, j.bastion, j.client, kind, payloads[kind]))
					}
					if !j.asks("shell", "") {
						t.Error("the shell does not reach the bastion")
					}
				})
			})
		}
	}
}

// TestRolePermissions has limits that roles set, as far as they can be decided without
// an address.
func TestRolePermissions(t *testing.T) {
	word := func(s string) string { return string(sshmsg.AppendString(nil, s)) }
	in := func(kind, payload string) func(*joined) bool {
		return func(j *joined) bool { return j.asks(kind, payload) }
	}
	channel := func(host string, port uint32) func(*joined) bool {
		return func(j *joined) bool {
			j.client.send(open("direct-tcpip", 41, string(tcpip(host, port))))
			return len(j.bastion.got()) > 0
		}
	}
	listener := func(host string, port uint32) func(*joined) bool {
		return func(j *joined) bool { return j.asksGlobally("tcpip-forward", listenAt(host, port)) }
	}
	noShell := func(p *identity.Permissions) { p.NoShell = true }
	noExec := func(p *identity.Permissions) { p.NoExec = true }
	requirePTY := func(p *identity.Permissions) { p.RequirePTY = true }
	to10 := func(p *identity.Permissions) { p.Destinations = []string{"10.0.0.0/8:22"} }
	at8080 := func(p *identity.Permissions) { p.Listen = []string{"localhost:8080"} }
	tests := []struct {
		name  string
		limit func(*identity.Permissions)
		ask   func(*joined) bool // reports whether it has reached the bastion
		pass  bool
	}{
		{"shell", noShell, in("shell", ""), false},
		{"a shell by an empty command", noShell, in("exec", word("")), false},
		{"a command without shells", noShell, in("exec", word("true")), true},
		{"exec", noExec, in("exec", word("true")), false},
		{"another subsystem", noExec, in("subsystem", word("netconf")), false},
		{"sftp without exec", noExec, in("subsystem", word("sftp")), true},
		{"sftp", func(p *identity.Permissions) { p.NoSFTP = true }, in("subsystem", word("sftp")), false},
		{"a shell without a terminal", requirePTY, in("shell", ""), false},
		{"a command without a terminal", requirePTY, in("exec", word("true")), false},
		{"sftp needs no terminal", requirePTY, in("subsystem", word("sftp")), true},
		{"a terminal", requirePTY, in("pty-req", pty), true},
		{"destination", to10, channel("10.1.2.3", 22), true},
		{"another port", to10, channel("10.1.2.3", 23), false},
		{"another address", to10, channel("192.0.2.1", 22), false},
		{"no destination", func(p *identity.Permissions) { p.Destinations = []string{"none"} }, channel("10.1.2.3", 22), false},
		{"listener", at8080, listener("localhost", 8080), true},
		{"another listener", at8080, listener("localhost", 8081), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := permitAll()
				tt.limit(&r.Permissions)
				j := join(t, r)
				defer j.end()
				j.session()
				if got := tt.ask(j); got != tt.pass {
					t.Errorf("it reaches the bastion: %v, want %v", got, tt.pass)
				}
			})
		})
	}
}

// TestTunnel refuses tunnel devices, in both directions.
func TestTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		if opensChannel(t, j.client, j.bastion, "tun@openssh.com", "") || opensChannel(t, j.bastion, j.client, "tun@openssh.com", "") {
			t.Error("a tunnel reaches the other side")
		}
	})
}

// TestOpens passes on channels of an unknown type and the reasons of their refusal.
func TestOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		for _, ends := range [][2]*peer{{j.client, j.bastion}, {j.bastion, j.client}} {
			from, to := ends[0], ends[1]
			for reason := uint32(0); reason < 6; reason++ { // 0 and 5 are nobody's
				from.send(open("never-heard-of@example.com", 9, "\x00extra"))
				to.want("open", open("never-heard-of@example.com", 0, "\x00extra"))
				to.send(openFailure(0, reason, "because\x00"))
				from.want("failure", openFailure(9, reason, "because\x00"))
			}
		}
	})
}

// TestRequests passes on requests of unknown types in both directions, on channels and
// global ones, with and without replies.
func TestRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		for _, ends := range []struct {
			from, to           *peer
			recipient, onwards uint32
			back, home         uint32
		}{{j.client, j.bastion, 0, 70, 0, 40}, {j.bastion, j.client, 0, 40, 0, 70}} {
			for i := range 40 {
				kind, payload := fmt.Sprint("r", i), strings.Repeat("\x00"+string(rune(i)), i*i*10)
				wantReply, ok := i%2 == 0, i%4 == 0
				ends.from.send(request(ends.recipient, kind, wantReply, payload), global(kind, wantReply, payload))
				ends.to.want(kind, request(ends.onwards, kind, wantReply, payload), global(kind, wantReply, payload))
				switch {
				case !wantReply:
				case ok:
					ends.to.send(success(ends.back), append([]byte{sshmsg.NumRequestSuccess}, "reply\x00"...))
					ends.from.want(kind, success(ends.home), append([]byte{sshmsg.NumRequestSuccess}, "reply\x00"...))
				default:
					ends.to.send(failure(ends.back), requestFailure)
					ends.from.want(kind, failure(ends.home), requestFailure)
				}
			}
		}
	})
}

// TestHopByHop answers here what belongs to one connection.
func TestHopByHop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		for _, ends := range []struct {
			from, to *peer
			home     uint32
		}{{j.client, j.bastion, 40}, {j.bastion, j.client, 70}} {
			for _, kind := range []string{"keepalive@openssh.com", "hostkeys-00@openssh.com", "hostkeys-prove-00@openssh.com"} {
				ends.from.send(global(kind, false, ""), global(kind, true, ""), request(0, kind, false, ""), request(0, kind, true, ""))
				ends.from.want(kind, requestFailure, failure(ends.home))
				ends.to.want(kind)
			}
		}
	})
}

// TestFloodOfOpens has a client open 10,000 channels that the bastion does not answer.
func TestFloodOfOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r := permitAll()
		r.MaxChannels, r.Log = 8, slog.New(slog.NewTextHandler(&log, nil))
		j := join(t, r)
		defer j.end()
		j.client.send(slices.Repeat([][]byte{open("other", 5, "")}, 10000)...)
		if n := len(j.bastion.got()); n != 8 {
			t.Errorf("%d opens reached the bastion", n)
		}
		if n := len(j.client.got()); n != 10000-8 {
			t.Errorf("%d opens were refused", n)
		}
		if n := strings.Count(log.String(), "max_channels=8"); n != 1 {
			t.Errorf("the limit is logged %d times:\n%s", n, &log)
		}
	})
}
