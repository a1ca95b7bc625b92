package relay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// TestOrder sends global requests, each with an open right behind it, and wants
// no open to arrive before its request; with a bastion that is there, and with
// one that comes later and finds all of them waiting.
func TestOrder(t *testing.T) {
	const pairs = 300
	for _, later := range []bool{false, true} {
		t.Run(fmt.Sprintf("later=%v", later), func(t *testing.T) {
			r := permitAll()
			r.MaxChannels = pairs
			w := start(t, r, overTCP)
			if !later {
				w.server <- w.up
			}
			var sent, opens sync.WaitGroup
			for i := range pairs {
				sent.Add(1)
				opens.Go(func() {
					id := binary.BigEndian.AppendUint32(nil, uint32(i))
					_, _, err := w.client.Conn.SendRequest("tcpip-forward", false, id)
					sent.Done()
					if err != nil {
						t.Error(err)
					}
					var refused *ssh.OpenChannelError
					if _, _, err = w.client.Conn.OpenChannel("direct-tcpip", id); !errors.As(err, &refused) {
						t.Errorf("open: %v", err)
					}
				})
			}
			if later {
				sent.Wait()
				w.server <- w.up
			}
			seen := make(map[string]bool)
			for opened := 0; opened < pairs; {
				select {
				case req := <-w.bastion.Reqs:
					seen[string(req.Payload)] = true
				case nc := <-w.bastion.Chans:
					for len(w.bastion.Reqs) > 0 { // may have come before it
						seen[string((<-w.bastion.Reqs).Payload)] = true
					}
					if !seen[string(nc.ExtraData())] {
						t.Fatalf("open %x came before its request", nc.ExtraData())
					}
					nc.Reject(ssh.Prohibited, "seen")
					opened++
				}
			}
			opens.Wait()
		})
	}
}

// A stubOpen is an open of which only the arrival matters.
type stubOpen struct{ ssh.NewChannel }

// TestNoMoreSessionsOrder: OpenSSH announces that no more sessions come right
// behind the open of its only one. Both are queued, apart, and either may be
// seen first.
func TestNoMoreSessionsOrder(t *testing.T) {
	for range 100 { // select chooses at random
		reqs, chans := make(chan *ssh.Request, 16), make(chan ssh.NewChannel, 16)
		s := &side{Peer: Peer{Reqs: reqs, Chans: chans}, toServer: true}
		chans <- stubOpen{}
		reqs <- &ssh.Request{Type: noMoreSessions}
		var late []bool
		take := func(want int) {
			for len(late) < want {
				items, _ := s.next(nil, nil)
				for _, it := range items {
					if it.open != nil {
						late = append(late, it.late)
					}
				}
			}
		}
		take(1)
		for len(reqs) > 0 {
			s.next(nil, nil)
		}
		chans <- stubOpen{}
		take(2)
		if late[0] || !late[1] {
			t.Fatalf("sessions count as late: %v, want only the second", late)
		}
	}
}

func TestNoMoreSessions(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		w.open("session")
		if ok, _, err := w.client.Conn.SendRequest(noMoreSessions, true, nil); !ok || err != nil {
			t.Errorf("no-more-sessions: %v, %v", ok, err)
		}
		wantRefusal(t, w.client, "session", ssh.Prohibited, "no more sessions")
		w.open("direct-tcpip")
		if n := len(w.bastion.Reqs); n != 0 {
			t.Errorf("no-more-sessions reached the bastion")
		}
	})
}

// wantRefusal opens a channel and wants that to fail.
func wantRefusal(t *testing.T, p Peer, kind string, reason ssh.RejectionReason, text string) {
	t.Helper()
	_, _, err := p.Conn.OpenChannel(kind, nil)
	var refused *ssh.OpenChannelError
	if !errors.As(err, &refused) {
		t.Errorf("opening %s: %v, want a refusal", kind, err)
	} else if refused.Reason != reason || !strings.Contains(refused.Message, text) {
		t.Errorf("opening %s: %v %q, want %v %q", kind, refused.Reason, refused.Message, reason, text)
	}
}

// ends returns both ways through a relay.
func (w *world) ends() map[string][2]Peer {
	return map[string][2]Peer{"to the bastion": {w.client, w.bastion}, "to the client": {w.bastion, w.client}}
}

func TestGlobalRequests(t *testing.T) {
	tests := []struct {
		kind     string
		payload  []byte
		ok       bool
		reply    []byte
		toServer bool // only
	}{
		{kind: "never-heard-of@example.com", payload: []byte("\x00\xff\x01"), ok: true, reply: []byte("\xfe\x00")},
		{kind: "never-heard-of@example.com", payload: []byte("no"), ok: false},
		{kind: "", payload: nil, ok: true},
		{kind: "tcpip-forward", payload: []byte("\x00\x00\x00\x00\x00\x00\x00\x00"), ok: true, reply: []byte("\x00\x00\xc0\x01"), toServer: true},
		{kind: "large@example.com", payload: bytes.Repeat([]byte("x"), 200<<10), ok: true},
	}
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		for way, ends := range w.ends() {
			from, to := ends[0], ends[1]
			for _, tt := range tests {
				if tt.toServer && way != "to the bastion" {
					continue
				}
				for _, wantReply := range []bool{true, false} {
					go func() {
						req := <-to.Reqs
						if req.Type != tt.kind || !bytes.Equal(req.Payload, tt.payload) || req.WantReply != wantReply {
							t.Errorf("%s: got %s %v %d bytes", way, req.Type, req.WantReply, len(req.Payload))
						}
						req.Reply(tt.ok, tt.reply)
					}()
					ok, reply, err := from.Conn.SendRequest(tt.kind, wantReply, tt.payload)
					synctest.Wait()
					if err != nil {
						t.Fatal(err)
					}
					if wantReply && (ok != tt.ok || !bytes.Equal(reply, tt.reply)) {
						t.Errorf("%s, %s: reply %v %x, want %v %x", way, tt.kind, ok, reply, tt.ok, tt.reply)
					}
				}
			}
		}
	})
}

// TestHopByHop: what belongs to one connection is answered here, and arrives
// nowhere.
func TestHopByHop(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		near, far := w.open("session")
		for way, ends := range w.ends() {
			for _, kind := range []string{keepalive, "hostkeys-00@openssh.com", "hostkeys-prove-00@openssh.com"} {
				for _, wantReply := range []bool{true, false} {
					if _, _, err := ends[0].Conn.SendRequest(kind, wantReply, nil); err != nil {
						t.Error(err)
					}
				}
			}
			synctest.Wait()
			if n := len(ends[1].Reqs); n != 0 {
				t.Errorf("%d requests came %s", n, way)
			}
		}
		for _, ends := range [][2]channel{{near, far}, {far, near}} {
			if _, err := ends[0].SendRequest(keepalive, true, nil); err != nil {
				t.Error(err)
			}
			if n := len(ends[1].reqs); n != 0 {
				t.Errorf("a channel's keepalive went through")
			}
		}
	})
}

func TestChannelRequests(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		for _, kind := range []string{"session", "never-heard-of@example.com"} {
			near, far := w.open(kind)
			for _, ends := range [][2]channel{{near, far}, {far, near}} {
				for i := range 40 {
					wantReply, ok := i%2 == 0, i%4 == 0
					payload := bytes.Repeat([]byte{0, byte(i)}, i)
					go func() {
						req := <-ends[1].reqs
						if req.Type != fmt.Sprint("r", i) || !bytes.Equal(req.Payload, payload) || req.WantReply != wantReply {
							t.Errorf("request %d arrived as %s %v %x", i, req.Type, req.WantReply, req.Payload)
						}
						req.Reply(ok, nil)
					}()
					got, err := ends[0].SendRequest(fmt.Sprint("r", i), wantReply, payload)
					synctest.Wait()
					if err != nil || wantReply && got != ok {
						t.Errorf("request %d: %v, %v", i, got, err)
					}
				}
			}
		}
	})
}

func TestOpens(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		for way, ends := range w.ends() {
			from, to := ends[0], ends[1]
			for reason := ssh.Prohibited; reason < 6; reason++ { // 5 is nobody's
				text := fmt.Sprintf("because\x00 %d", reason)
				go func() {
					nc := <-to.Chans
					if nc.ChannelType() != "never-heard-of@example.com" || string(nc.ExtraData()) != "\x00extra" {
						t.Errorf("%s: got %s %q", way, nc.ChannelType(), nc.ExtraData())
					}
					nc.Reject(reason, text)
				}()
				_, _, err := from.Conn.OpenChannel("never-heard-of@example.com", []byte("\x00extra"))
				var refused *ssh.OpenChannelError
				if !errors.As(err, &refused) || refused.Reason != reason || refused.Message != text {
					t.Errorf("%s: %v, want %v %q", way, err, reason, text)
				}
			}
			wantRefusal(t, from, "tun@openssh.com", ssh.Prohibited, "tunnel")
		}
	})
}

func TestPermissions(t *testing.T) {
	type request struct {
		kind     string
		onClient bool // what the client asks; otherwise what the bastion does
	}
	tests := []struct {
		name     string
		clear    func(p *identity.Permissions)
		opens    []request
		globals  []string
		requests []string // in a session
	}{
		{"pty", func(p *identity.Permissions) { p.PTY = false }, nil, nil, []string{"pty-req"}},
		{"port forwarding", func(p *identity.Permissions) { p.PortForwarding = false },
			[]request{{"direct-tcpip", true}, {"direct-streamlocal@openssh.com", true}, {"direct-new@example.com", true},
				{"forwarded-tcpip", false}, {"forwarded-streamlocal@openssh.com", false}},
			[]string{"tcpip-forward", "streamlocal-forward@openssh.com"}, nil},
		{"agent forwarding", func(p *identity.Permissions) { p.AgentForwarding = false },
			[]request{{"auth-agent@openssh.com", false}, {"agent-connect", false}}, nil,
			[]string{"auth-agent-req@openssh.com", "agent-req"}},
		{"X11 forwarding", func(p *identity.Permissions) { p.X11Forwarding = false },
			[]request{{"x11", false}}, nil, []string{"x11-req"}},
	}
	for _, permitted := range []bool{true, false} {
		for _, tt := range tests {
			t.Run(fmt.Sprintf("%s=%v", tt.name, permitted), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					r := permitAll()
					if !permitted {
						tt.clear(&r.Permissions)
					}
					w := join(t, r, inMemory)
					near, far := w.open("session")
					for _, o := range tt.opens {
						from, to := w.bastion, w.client
						if o.onClient {
							from, to = w.client, w.bastion
						}
						if permitted {
							openBetween(t, from, to, o.kind)
						} else {
							wantRefusal(t, from, o.kind, ssh.Prohibited, "not permitted")
						}
					}
					go func() {
						for req := range w.bastion.Reqs {
							if !permitted {
								t.Errorf("%s reached the bastion", req.Type)
							}
							req.Reply(true, nil)
						}
					}()
					go func() {
						for req := range far.reqs {
							if !permitted && req.Type != "shell" {
								t.Errorf("%s reached the bastion", req.Type)
							}
							req.Reply(true, nil)
						}
					}()
					for _, kind := range tt.globals {
						if ok, _, err := w.client.Conn.SendRequest(kind, true, nil); ok != permitted || err != nil {
							t.Errorf("%s: %v, %v", kind, ok, err)
						}
					}
					for _, kind := range tt.requests {
						if ok, err := near.SendRequest(kind, true, nil); ok != permitted || err != nil {
							t.Errorf("%s: %v, %v", kind, ok, err)
						}
					}
					if ok, err := near.SendRequest("shell", true, nil); !ok || err != nil {
						t.Errorf("shell: %v, %v", ok, err)
					}
				})
			})
		}
	}
}

// TestRolePermissions: what a login's roles rule out does not reach the bastion,
// which would refuse it too, as far as that can be told without an address.
func TestRolePermissions(t *testing.T) {
	type text struct{ Text string }
	exec := func(command string) []byte { return ssh.Marshal(text{command}) }
	type open struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}
	type bind struct {
		Host string
		Port uint32
	}
	session := func(kind string, payload []byte) func(*world) bool {
		return func(w *world) bool {
			near, far := w.open("session")
			reached := make(chan int, 1)
			go func() {
				n := 0
				for req := range far.reqs {
					n++
					req.Reply(true, nil)
				}
				reached <- n
			}()
			ok, err := near.SendRequest(kind, true, payload)
			near.Close()
			far.Close()
			if n := <-reached; err != nil || ok != (n == 1) {
				w.t.Errorf("answered with %v, %v, after %d requests have reached the bastion", ok, err, n)
			}
			return ok
		}
	}
	channel := func(host string, port uint32) func(*world) bool {
		return func(w *world) bool {
			reached := make(chan bool, 1)
			stop := make(chan struct{})
			go func() {
				select {
				case nc := <-w.bastion.Chans:
					nc.Reject(ssh.ConnectionFailed, "reached")
					reached <- true
				case <-stop:
					reached <- false
				}
			}()
			w.client.Conn.OpenChannel("direct-tcpip", ssh.Marshal(open{Host: host, Port: port}))
			close(stop)
			return <-reached
		}
	}
	global := func(host string, port uint32) func(*world) bool {
		return func(w *world) bool {
			done := make(chan struct{})
			defer func() { <-done }()
			stop := make(chan struct{})
			defer close(stop)
			go func() {
				defer close(done)
				select {
				case req := <-w.bastion.Reqs:
					req.Reply(true, nil)
				case <-stop:
				}
			}()
			ok, _, err := w.client.Conn.SendRequest("tcpip-forward", true, ssh.Marshal(bind{host, port}))
			if err != nil {
				w.t.Fatal(err)
			}
			return ok
		}
	}
	tests := []struct {
		name  string
		limit func(*identity.Permissions)
		ask   func(*world) bool // reports whether it has reached the bastion
		pass  bool
	}{
		{"shell", func(p *identity.Permissions) { p.NoShell = true }, session("shell", nil), false},
		{"a shell by an empty command", func(p *identity.Permissions) { p.NoShell = true }, session("exec", exec("")), false},
		{"a command without shells", func(p *identity.Permissions) { p.NoShell = true }, session("exec", exec("true")), true},
		{"exec", func(p *identity.Permissions) { p.NoExec = true }, session("exec", exec("true")), false},
		{"another subsystem", func(p *identity.Permissions) { p.NoExec = true }, session("subsystem", exec("netconf")), false},
		{"sftp without exec", func(p *identity.Permissions) { p.NoExec = true }, session("subsystem", exec("sftp")), true},
		{"sftp", func(p *identity.Permissions) { p.NoSFTP = true }, session("subsystem", exec("sftp")), false},
		{"a shell without a terminal", func(p *identity.Permissions) { p.RequirePTY = true }, session("shell", nil), false},
		{"a command without a terminal", func(p *identity.Permissions) { p.RequirePTY = true }, session("exec", exec("true")), false},
		{"sftp needs no terminal", func(p *identity.Permissions) { p.RequirePTY = true }, session("subsystem", exec("sftp")), true},
		{"a terminal", func(p *identity.Permissions) { p.RequirePTY = true }, session("pty-req", nil), true},
		{"destination", func(p *identity.Permissions) { p.Destinations = []string{"10.0.0.0/8:22"} }, channel("10.1.2.3", 22), true},
		{"another port", func(p *identity.Permissions) { p.Destinations = []string{"10.0.0.0/8:22"} }, channel("10.1.2.3", 23), false},
		{"another address", func(p *identity.Permissions) { p.Destinations = []string{"10.0.0.0/8:22"} }, channel("192.0.2.1", 22), false},
		{"no destination", func(p *identity.Permissions) { p.Destinations = []string{"none"} }, channel("10.1.2.3", 22), false},
		{"listener", func(p *identity.Permissions) { p.Listen = []string{"localhost:8080"} }, global("localhost", 8080), true},
		{"another listener", func(p *identity.Permissions) { p.Listen = []string{"localhost:8080"} }, global("localhost", 8081), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := permitAll()
				tt.limit(&r.Permissions)
				if got := tt.ask(join(t, r, inMemory)); got != tt.pass {
					t.Errorf("it reaches the bastion: %v, want %v", got, tt.pass)
				}
			})
		})
	}
}

func TestLimits(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := permitAll()
		r.MaxSessions, r.MaxChannels = 2, 4
		w := join(t, r, inMemory)
		near, far := w.open("session")
		w.open("session")
		wantRefusal(t, w.client, "session", ssh.ResourceShortage, "too many sessions")
		w.open("direct-tcpip")
		openBetween(t, w.bastion, w.client, "forwarded-tcpip")
		wantRefusal(t, w.client, "direct-tcpip", ssh.ResourceShortage, "too many channels")
		wantRefusal(t, w.bastion, "forwarded-tcpip", ssh.ResourceShortage, "too many channels")

		// One that has ended makes room.
		go ssh.DiscardRequests(near.reqs)
		go ssh.DiscardRequests(far.reqs)
		near.Close()
		time.Sleep(time.Second)
		w.open("session")
	})
}

// TestFloodOfOpens has a client open 10,000 channels that the bastion does not
// answer.
func TestFloodOfOpens(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := permitAll()
		r.MaxChannels = 8
		w := join(t, r, inMemory)
		const clients, each = 20, 500
		var refused atomic.Int64
		before := runtime.NumGoroutine()
		for range clients {
			go func() {
				for range each {
					var no *ssh.OpenChannelError
					if _, _, err := w.client.Conn.OpenChannel("direct-tcpip", nil); errors.As(err, &no) {
						refused.Add(1)
					}
				}
			}()
		}
		synctest.Wait()
		// Eight of the twenty wait for the bastion, and never get further.
		if n := refused.Load(); n < (clients-8)*each {
			t.Errorf("%d opens were refused", n)
		}
		if n := runtime.NumGoroutine() - before; n > 3*8 { // a caller and a relaying one for each
			t.Errorf("%d goroutines for 8 opens", n)
		}
		if n := len(w.bastion.Chans); n != 8 {
			t.Errorf("%d opens reached the bastion", n)
		}
	})
}

// TestKeepaliveBehindForward: replies to global requests carry no id. So while
// a tcpip-forward waits for the bastion, a keepalive must not be answered: the
// client would take that for the forward's refusal.
func TestKeepaliveBehindForward(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := permitAll()
		w := &world{t: t, relay: r, server: make(chan Peer, 1), done: make(chan struct{})}
		w.client, r.Client = connect(t, inMemory, &ssh.ClientConfig{})
		w.up, w.bastion = connect(t, inMemory, &ssh.ClientConfig{})
		// Package ssh does not send a request while the reply to another is
		// out, as OpenSSH does. So it sends one that wants no reply, and on
		// the way that is changed.
		reqs := make(chan *ssh.Request)
		go func(real <-chan *ssh.Request) {
			defer close(reqs)
			for req := range real {
				req.WantReply = true
				reqs <- req
			}
		}(r.Client.Reqs)
		r.Client.Reqs = reqs
		go w.run()

		if _, _, err := w.client.Conn.SendRequest(keepalive, true, nil); err != nil {
			t.Fatal(err) // at once: nothing else waits
		}
		replied := make(chan bool, 1)
		go func() {
			ok, _, _ := w.client.Conn.SendRequest("tcpip-forward", true, nil)
			replied <- ok
		}()
		synctest.Wait()
		if n := len(w.client.Reqs); n != 0 {
			t.Errorf("%d requests from the relay", n)
		}
		w.client.Conn.SendRequest(keepalive, false, nil)
		synctest.Wait()
		select {
		case <-replied:
			t.Fatal("the keepalive's reply was taken for the forward's")
		case sign := <-w.client.Reqs:
			if sign.WantReply {
				t.Error("the sign of life wants a reply")
			}
		}
		w.server <- w.up
		req := <-w.bastion.Reqs
		req.Reply(true, nil)
		if !<-replied {
			t.Error("the forward was refused")
		}
		w.client.Conn.Close()
		<-w.done
	})
}

func TestWaiting(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := start(t, permitAll(), inMemory)
		opened := make(chan channel)
		go func() {
			w.client.Conn.SendRequest("first@example.com", false, nil)
			ch, reqs, err := w.client.Conn.OpenChannel("session", nil)
			if err != nil {
				t.Error(err)
			}
			opened <- channel{ch, reqs}
		}()
		for range 60 {
			time.Sleep(time.Second)
			if _, _, err := w.client.Conn.SendRequest(keepalive, true, nil); err != nil {
				t.Fatal(err)
			}
		}
		w.server <- w.up
		if req := <-w.bastion.Reqs; req.Type != "first@example.com" {
			t.Errorf("got %s", req.Type)
		}
		nc := <-w.bastion.Chans
		far, _, err := nc.Accept()
		if err != nil {
			t.Fatal(err)
		}
		near := <-opened
		far.Write([]byte("here"))
		far.CloseWrite()
		far.Close()
		if got, _ := io.ReadAll(near); string(got) != "here" {
			t.Errorf("read %q", got)
		}
	})
}

func TestNeverComes(t *testing.T) {
	tests := []struct {
		name string
		do   func(t *testing.T, w *world)
	}{
		{"a session waits", func(t *testing.T, w *world) {
			go func() {
				time.Sleep(time.Second)
				close(w.server)
			}()
			wantRefusal(t, w.client, "session", ssh.ConnectionFailed, "no room")
		}},
		{"a session comes when it is known", func(t *testing.T, w *world) {
			close(w.server)
			time.Sleep(time.Second)
			wantRefusal(t, w.client, "session", ssh.ConnectionFailed, "no room")
		}},
		{"a forward waits", func(t *testing.T, w *world) {
			go func() {
				time.Sleep(time.Second)
				close(w.server)
			}()
			if ok, _, err := w.client.Conn.SendRequest("tcpip-forward", true, nil); ok || err != nil {
				t.Errorf("forward: %v, %v", ok, err)
			}
		}},
		{"nobody asks", func(t *testing.T, w *world) { close(w.server) }},
		// More than package ssh queues, so that it blocks.
		{"a flood", func(t *testing.T, w *world) {
			go func() {
				for range 1000 {
					w.client.Conn.SendRequest("flood@example.com", false, nil)
				}
			}()
			close(w.server)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := start(t, permitAll(), inMemory)
				tt.do(t, w)
				before := time.Now()
				<-w.done
				if w.byClient || !errors.Is(w.err, ErrNoServer) {
					t.Errorf("Run: %v, %v", w.byClient, w.err)
				}
				if took := time.Since(before); took > farewell {
					t.Errorf("the client was kept for %v", took)
				}
				if err := w.client.Conn.Wait(); err == nil {
					t.Error("the client's connection is open")
				}
			})
		})
	}
}

func TestClientLeavesFirst(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := start(t, permitAll(), inMemory)
		go w.client.Conn.OpenChannel("session", nil)
		go w.client.Conn.SendRequest("tcpip-forward", true, nil)
		time.Sleep(time.Second)
		before := time.Now()
		w.client.Conn.Close()
		<-w.done
		if !w.byClient || w.err == nil || time.Since(before) != 0 {
			t.Errorf("Run: %v, %v after %v", w.byClient, w.err, time.Since(before))
		}
		w.server <- w.up
		synctest.Wait()
		if len(w.server) != 1 {
			t.Error("the bastion was taken")
		}
	})
}

func TestBacklogIsBounded(t *testing.T) {
	t.Run("opens", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			w := start(t, permitAll(), inMemory)
			var refused atomic.Int64
			for range backlogMax + 50 {
				go func() {
					var no *ssh.OpenChannelError
					if _, _, err := w.client.Conn.OpenChannel("session", nil); errors.As(err, &no) {
						refused.Add(1)
					}
				}()
			}
			synctest.Wait()
			if n := refused.Load(); n != 50 {
				t.Errorf("%d opens were refused, want 50", n)
			}
		})
	})
	for name, payload := range map[string][]byte{"requests": nil, "bytes": make([]byte, 200<<10)} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := start(t, permitAll(), inMemory)
				go func() {
					for range backlogMax + 1 {
						if _, _, err := w.client.Conn.SendRequest("flood@example.com", false, payload); err != nil {
							return
						}
					}
				}()
				<-w.done
				if !w.byClient {
					t.Errorf("Run: %v, %v", w.byClient, w.err)
				}
			})
		})
	}
}

func TestEnd(t *testing.T) {
	for _, byClient := range []bool{true, false} {
		t.Run(fmt.Sprintf("byClient=%v", byClient), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := join(t, permitAll(), inMemory)
				w.open("direct-tcpip")
				ends, other := w.client, w.bastion
				if !byClient {
					ends, other = other, ends
				}
				ends.Conn.Close()
				<-w.done
				if w.byClient != byClient || !errors.Is(w.err, io.EOF) {
					t.Errorf("Run: %v, %v", w.byClient, w.err)
				}
				other.Conn.Wait()
			})
		})
	}
}

// TestEndDuringRequest: either side ends while the other owes it a reply.
func TestEndDuringRequest(t *testing.T) {
	for _, byClient := range []bool{true, false} {
		t.Run(fmt.Sprintf("byClient=%v", byClient), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := join(t, permitAll(), inMemory)
				ends := w.client
				if !byClient {
					ends = w.bastion
				}
				go ends.Conn.SendRequest("never-answered@example.com", true, nil)
				synctest.Wait()
				ends.Conn.Close()
				<-w.done
				if w.byClient != byClient {
					t.Errorf("Run: %v, %v", w.byClient, w.err)
				}
			})
		})
	}
}

// A panicky connection is a bug of ours, or of package ssh.
type panicky struct{ ssh.Conn }

func (panicky) OpenChannel(string, []byte) (ssh.Channel, <-chan *ssh.Request, error) { panic("open") }
func (panicky) SendRequest(string, bool, []byte) (bool, []byte, error)               { panic("request") }

// TestPanic wants a panic to end its connection and nothing else.
func TestPanic(t *testing.T) {
	for name, do := range map[string]func(ssh.Conn){
		"open":    func(c ssh.Conn) { c.OpenChannel("session", nil) },
		"request": func(c ssh.Conn) { c.SendRequest("x", true, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var log bytes.Buffer
				r := permitAll()
				r.Log = slog.New(slog.NewTextHandler(&log, nil))
				w := start(t, r, inMemory)
				w.server <- Peer{Conn: panicky{w.up.Conn}, Chans: w.up.Chans, Reqs: w.up.Reqs}
				do(w.client.Conn)
				<-w.done
				if !strings.Contains(log.String(), "panicky") {
					t.Errorf("no stack in the log: %s", &log)
				}
			})
		})
	}
}
