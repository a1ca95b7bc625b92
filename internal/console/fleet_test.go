package console

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/revoked"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// A testFleet is gateways in memory, which log in to each other with real certificates.
type testFleet struct {
	t   *testing.T
	key ssh.Signer
	at  map[string]*testConsole

	mu      sync.Mutex
	list    []FleetGateway
	listErr error
	answer  map[string]func(ctx context.Context, line string) ([]byte, error) // in place of the gateway's own
	asked   []string
}

// A member is the fleet as one of its gateways sees it.
type member struct {
	*testFleet
	id string
}

func newTestFleet(t *testing.T, ids ...string) *testFleet {
	store := revoked.Folder(filepath.Join(t.TempDir(), "revoked"))
	f := &testFleet{t: t, key: sshtest.NewKey(t), at: map[string]*testConsole{}, answer: map[string]func(context.Context, string) ([]byte, error){}}
	for i, id := range ids {
		tc := newTestConsole(t)
		tc.revokedIn(store)
		tc.server.Peer = sshca.PeerVerifier{Fleet: []ssh.PublicKey{f.key.PublicKey()}, Gateway: id}.Verify
		tc.console.Roles = func(id identity.Identity) ([]string, bool) {
			return nil, id.User == "root" && id.Via == "" || id.Permissions.Admin
		}
		tc.console.Fleet, tc.console.ID = member{f, id}, id
		f.at[id] = tc
		f.list = append(f.list, FleetGateway{
			ID: id, Version: "v1", Address: fmt.Sprintf("10.0.0.%d:22", i+1), SameSettings: true, Connections: 99, Started: time.Now(), Seen: time.Now(),
		})
	}
	return f
}

func (m member) Gateways(context.Context) ([]FleetGateway, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := slices.Clone(m.list)
	for i, g := range all {
		all[i].Self = g.ID == m.id
	}
	return all, m.listErr
}

func (m member) Self() FleetGateway {
	all, _ := m.Gateways(context.Background())
	g := all[slices.IndexFunc(all, func(g FleetGateway) bool { return g.Self })]
	g.Connections = len(m.at[m.id].server.Connections()) - 1 // without the one that asks
	return g
}

func (m member) Run(ctx context.Context, to FleetGateway, id identity.Identity, line string) ([]byte, error) {
	m.mu.Lock()
	m.asked = append(m.asked, to.ID+": "+line)
	instead := m.answer[to.ID]
	m.mu.Unlock()
	if instead != nil {
		return instead(ctx, line)
	}
	return m.run(to.ID, identity.Peer{Gateway: m.id, User: id.User, ConnID: id.ConnID, Admin: id.Permissions.Admin}, line)
}

// run runs a command line as another gateway does.
func (f *testFleet) run(to string, p identity.Peer, line string) ([]byte, error) {
	signer, err := sshca.SignPeer(f.key, p, to, time.Now())
	if err != nil {
		return nil, err
	}
	tc := f.at[to]
	near, far := sshtest.Pipe()
	tc.servers.Go(func() { tc.server.ServeConn(f.t.Context(), far) })
	conn, chans, reqs, err := ssh.NewClientConn(near, to, &ssh.ClientConfig{
		User: gateway.PeerUser, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		return nil, err
	}
	c := ssh.NewClient(conn, chans, reqs)
	defer c.Close()
	s, err := c.NewSession()
	if err != nil {
		return nil, err
	}
	var out, said bytes.Buffer
	s.Stdout, s.Stderr = &out, &said
	if err := s.Run(line); err != nil {
		return nil, fmt.Errorf("%w: %s", err, said.String())
	}
	return out.Bytes(), nil
}

// stopped does not answer, as a process after SIGSTOP.
func stopped(ctx context.Context, _ string) ([]byte, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

func (f *testFleet) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *testFleet) end() {
	for _, tc := range f.at {
		tc.servers.Wait()
	}
}

// TestFleetShows: every command that shows connections shows those of all gateways.
func TestFleetShows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTestFleet(t, "a", "b", "c")
		defer f.end()
		a, b, c := f.at["a"], f.at["b"], f.at["c"]
		one, _ := b.work("alice")
		defer one.Close()
		two, _ := c.work("alice+big")
		defer two.Close()
		three, _ := c.work("bob")
		defer three.Close()
		a.running = c.running // in the ledger of all
		for _, tt := range []struct {
			user, line string
			want       []string
		}{
			{"root", "users", []string{`USER +ID .* GATEWAY`, `alice .* b\n`, `alice .* c\n`, `bob .* c\n`, `root .* a\n`}},
			{"alice", "sessions", []string{`ID .* GATEWAY`, ` default .* b\n +#0 .* session: exec printf '\?\[2J'\n`, ` big .* c\n`, ` ctl .* a \(this one\)\n`}},
			{"alice", "sessions --json", []string{`"gateway":"b",.*"profile":"default".*"command":"printf .*"gateway":"c",`}},
			{"root", "users --json", []string{`^\[{"user":"alice","connections":\[{"id":"\w+","gateway":"b".*"gateway":"c".*{"user":"bob",`}},
			{"alice", "status", []string{`big +running .* 7 +1 `}},
			{"root", "bastions --json", []string{`"user":"alice","profile":"big".*"connections":1}.*"user":"bob".*"connections":1}`}},
			{"root", "gateways", []string{`a \(this\) +up +yes`, `b +up +yes +\w+ +\w+ +1 +same +10.0.0.2:22 +v1\n`, `c +up +yes .* 2 +same`}},
			{"root", "gateways --json", []string{`"id":"b","version":"v1","state":"up","self":false,"same_settings":true,"connections":1,.*"address":"10.0.0.2:22","answers":true}`}},
		} {
			out, errs, status := a.run(tt.user, tt.line)
			if status != 0 || errs != "" {
				t.Errorf("%s: %s: status %d, %q", tt.user, tt.line, status, errs)
			}
			for _, want := range tt.want {
				if !regexp.MustCompile(want).MatchString(out) {
					t.Errorf("%s: %s: no %q in\n%s", tt.user, tt.line, want, out)
				}
			}
			if strings.Contains(out, "via") || strings.Count(out, "root") > 1 {
				t.Errorf("%s: %s: shows logins of gateways:\n%s", tt.user, tt.line, out)
			}
		}
		// Nobody sees the commands of another user.
		if out, _, _ := a.run("root", "users --json"); strings.Contains(out, "printf") {
			t.Errorf("an administrator sees %s", out)
		}
		if out, _, _ := a.run("bob", "sessions --json"); strings.Contains(out, "alice") || strings.Contains(out, "big") || !strings.Contains(out, `"gateway":"c"`) {
			t.Errorf("bob sees %s", out)
		}
	})
}

// TestFleetActs: kick and stop end connections to other gateways, and their sessions are
// told why.
func TestFleetActs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTestFleet(t, "a", "b", "c")
		defer f.end()
		a, b, c := f.at["a"], f.at["b"], f.at["c"]
		_, here := a.work("alice")
		_, there := b.work("alice")
		_, third := c.work("alice+big")
		bob, _ := c.work("bob")
		defer bob.Close()
		id := b.server.Connections()[0].ID()
		if out, errs, status := a.run("root", "kick "+id+" --yes --json"); status != 0 || out != `{"ended":["`+id+`"]}`+"\n" {
			t.Errorf("by id: status %d, %q, %q", status, out, errs)
		}
		if said := <-there; !strings.Contains(said, "An administrator has ended this connection") {
			t.Errorf("the session read %q", said)
		}
		if out, errs, status := a.run("root", "kick alice --yes"); status != 0 || out != "2 connections ended.\n" {
			t.Errorf("by name: status %d, %q, %q", status, out, errs)
		}
		<-here
		<-third
		if _, errs, status := a.run("root", "kick alice --yes"); status != 1 || !strings.Contains(errs, "No gateway has a connection with the id alice") {
			t.Errorf("again: status %d, %q", status, errs)
		}

		_, there = b.work("alice")
		a.running = b.running
		if out, errs, status := a.run("alice", "stop --yes --json"); status != 0 || out != `{"user":"alice","profile":"default","connections":1}`+"\n" {
			t.Errorf("stop: status %d, %q, %q", status, out, errs)
		}
		if said := <-there; !strings.Contains(said, "stopped from your console") {
			t.Errorf("the session read %q", said)
		}
		_, there = b.work("alice")
		a.running = b.running
		if out, errs, status := a.run("root", "stop alice --yes"); status != 0 || out != "The bastion alice+default is stopped.\n" {
			t.Errorf("stop: status %d, %q, %q", status, out, errs)
		}
		if said := <-there; !strings.Contains(said, "stopped by an administrator") {
			t.Errorf("the session read %q", said)
		}
		time.Sleep(time.Minute)
		if n := len(c.server.Connections()); n != 1 {
			t.Errorf("%d connections are left at c", n)
		}
	})
}

// TestFleetConfirm: at a terminal, kick counts the connections to all gateways first.
func TestFleetConfirm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTestFleet(t, "a", "b")
		defer f.end()
		_, there := f.at["b"].work("alice")
		root := f.at["a"].connect("root+ctl", "SSH-2.0-test")
		defer root.Close()
		_, in, shown := f.at["a"].terminal(root)
		in.Write([]byte("kick alice\rn\rkick alice\ry\r"))
		if said := <-there; !strings.Contains(said, "An administrator") {
			t.Errorf("the session read %q", said)
		}
		time.Sleep(time.Minute) // until the connection has ended
		in.Write([]byte("kick alice\r"))
		time.Sleep(time.Minute)
		for _, want := range []string{"End 1 connection of alice? [y/N]", "Nothing was done.", "1 connection ended.", "No gateway has a connection"} {
			if !strings.Contains(shown(), want) {
				t.Errorf("no %q in %q", want, shown())
			}
		}
	})
}

// TestFleetSilent: a gateway that does not answer is named, delays a command by askTimeout at
// most, and makes an act fail. The others are shown and act.
func TestFleetSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTestFleet(t, "a", "b", "c")
		defer f.end()
		a := f.at["a"]
		f.answer["c"] = stopped
		for _, tt := range []struct {
			line   string
			status int
			out    string
			err    string
		}{
			{"users", 0, "alice", "Gateway c did not answer: its connections are not shown.\n"},
			{"users --json", 0, `"gateway":"b"`, "Gateway c did not answer: its connections are not shown.\n"},
			{"gateways --json", 0, `"id":"c","version":"v1","state":"up","self":false,"same_settings":true,"connections":99,"since":"2000-01-01T00:00:00Z","seen":"2000-01-01T00:00:00Z","address":"10.0.0.3:22","answers":false}`, ""},
			{"bastions", 0, "alice", "Gateway c did not answer: its connections are not counted.\n"},
			{"kick alice --yes", 1, "1 connection ended.\n", "Gateway c did not answer: its connections may continue.\n"},
			{"kick alice --yes --json", 1, `"unanswered":["c"]}`, "Gateway c did not answer: its connections may continue.\n"},
			{"kick nobody --yes", 1, "", "Gateway c did not answer: its connections may continue.\n"},
			{"stop alice --yes", 0, "The bastion alice+default is stopped.\n", "Gateway c did not answer: its sessions in the bastion end without this reason.\n"},
			{"drain c --yes", 1, "", "Gateway c did not answer: it was not drained.\n"},
		} {
			alice, _ := f.at["b"].work("alice")
			f.set(func() { a.running = f.at["b"].running })
			began := time.Now()
			out, errs, status := a.run("root", tt.line)
			if took := time.Since(began); took > askTimeout+2*time.Second {
				t.Errorf("%s took %v", tt.line, took)
			}
			if status != tt.status || !strings.Contains(out, tt.out) || errs != tt.err {
				t.Errorf("%s: status %d, want %d\nstdout %q\n  want %q\nstderr %q\n  want %q", tt.line, status, tt.status, out, tt.out, errs, tt.err)
			}
			alice.Close()
			time.Sleep(time.Second)
		}
	})
}

// TestFleetDrain drains gateways by their IDs.
func TestFleetDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTestFleet(t, "a", "b")
		defer f.end()
		a, b := f.at["a"], f.at["b"]
		alice, _ := b.work("alice")
		defer alice.Close()
		for line, want := range map[string]string{
			"drain c --yes": "There is no gateway c; gateways lists them.",
			"drain b":       "add --yes",
			"drain b a":     "no use for",
		} {
			if out, errs, status := a.run("root", line); status == 0 || !strings.Contains(errs, want) {
				t.Errorf("%s: status %d, %q, %q", line, status, out, errs)
			}
		}
		if a.drained || b.drained {
			t.Error("drained")
		}
		if out, errs, status := a.run("root", "drain b --yes --json"); status != 0 || out != `{"gateway":"b","connections":1,"drain_seconds":60}`+"\n" {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
		if a.drained || !b.drained {
			t.Errorf("a is drained: %v, b: %v", a.drained, b.drained)
		}
		f.set(func() { f.list[1].Draining = true })
		if out, errs, status := a.run("root", "users"); status != 0 || errs != "" || !strings.Contains(out, "alice") {
			t.Errorf("users, while b drains and still accepts connections: status %d, %q, %q", status, out, errs)
		}
		f.answer["b"] = func(context.Context, string) ([]byte, error) { return nil, errors.New("connection refused") }
		if out, errs, status := a.run("root", "kick alice --yes"); status != 1 || errs != "Gateway b drains and takes no commands: its connections may continue.\n" {
			t.Errorf("kick at a draining gateway: status %d, %q, %q", status, out, errs)
		}
		f.set(func() { f.list[1].Ended = true })
		if out, errs, status := a.run("root", "drain b --yes"); status != 1 || errs != "Gateway b has ended.\n" {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
		if out, errs, status := a.run("root", "drain a --yes"); status != 0 || !strings.Contains(out, "The gateway is going out of service.") {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
		if !a.drained {
			t.Error("a is not drained")
		}
	})
}

// TestFleetOldList: without the table, the gateways that were known before are asked, and
// acts fail.
func TestFleetOldList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTestFleet(t, "a", "b")
		defer f.end()
		a := f.at["a"]
		_, there := f.at["b"].work("alice")
		f.listErr = errors.New("arn:aws:dynamodb")
		const gap = "The list of gateways cannot be read, so this may not be about all of them.\n"
		if out, errs, status := a.run("root", "users"); status != 0 || !strings.Contains(out, "alice") || errs != gap {
			t.Errorf("users: status %d, %q, %q", status, out, errs)
		}
		if out, errs, status := a.run("root", "kick alice --yes"); status != 1 || out != "1 connection ended.\n" || errs != gap {
			t.Errorf("kick: status %d, %q, %q", status, out, errs)
		}
		<-there
		f.list = nil
		if _, errs, status := a.run("root", "gateways"); status != 1 || !strings.Contains(errs, "cannot be read") {
			t.Errorf("gateways: status %d, %q", status, errs)
		}
	})
}

// TestPeerCommands: another gateway runs its few commands, with the permissions of the user
// for whom it acts, about this gateway only. Users cannot run the commands of gateways.
func TestPeerCommands(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTestFleet(t, "a", "b")
		defer f.end()
		b := f.at["b"]
		alice, _ := b.work("alice")
		defer alice.Close()
		admin := identity.Peer{Gateway: "a", User: "root", ConnID: "r1", Admin: true}
		for _, tt := range []struct {
			peer identity.Peer
			line string
			want string // in the output, or else in the error
			ok   bool
		}{
			{admin, "users --json", `[{"user":"alice",`, true},
			{admin, "kick bob --yes --json", `{"ended":[]}`, true},
			{admin, "gateways --json", `[{"id":"b",`, true},
			{admin, "sessions --json", `[]`, true},
			{admin, "whoami", "Gateways may not run whoami.", false},
			{admin, "keys add ssh-ed25519 AAAA", "Gateways may not run keys add.", false},
			{admin, "stop alice --yes", "Gateways may not run stop.", false},
			{admin, "status", "Gateways may not run status.", false},
			{admin, "log", "Gateways may not run log.", false},
			{identity.Peer{Gateway: "a", User: "alice", ConnID: "a1"}, "sessions --json", `"command":"printf`, true},
			{identity.Peer{Gateway: "a", User: "bob", ConnID: "b1"}, "sessions --json", `[]`, true},
			// The name of an administrator makes none: the other gateway has to say so.
			{identity.Peer{Gateway: "a", User: "root", ConnID: "r1"}, "users --json", "users is for administrators.", false},
			{identity.Peer{Gateway: "a", User: "bob", ConnID: "b1"}, "kick alice --yes", "kick is for administrators.", false},
			{identity.Peer{Gateway: "a", User: "bob", ConnID: "b1"}, "drain --yes", "drain is for administrators.", false},
			{identity.Peer{Gateway: "a", User: "bob", ConnID: "b1"}, "disconnect alice+default --json", "Only administrators", false},
			{identity.Peer{Gateway: "a", User: "alice", ConnID: "a1"}, "disconnect alice+big --json", `{"ended":[]}`, true},
		} {
			out, err := f.run("b", tt.peer, tt.line)
			text := string(out)
			if err != nil {
				text = err.Error()
			}
			if (err == nil) != tt.ok || !strings.Contains(text, tt.want) {
				t.Errorf("for %s: %s: %q, %v, want %q", tt.peer.User, tt.line, out, err, tt.want)
			}
		}
		time.Sleep(time.Minute)
		if b.drained || len(b.server.Connections()) != 1 || len(b.stopped) > 0 {
			t.Errorf("drained %v, stopped %q, %d connections", b.drained, b.stopped, len(b.server.Connections()))
		}
		f.set(func() { f.asked = nil })
		for _, user := range []string{"root", "alice"} {
			if out, errs, status := b.run(user, "disconnect alice+default"); status != 2 || !strings.Contains(errs, `no command "disconnect"`) {
				t.Errorf("%s: status %d, %q, %q", user, status, out, errs)
			}
			if out, _, _ := b.run(user, "help"); strings.Contains(out, "disconnect") {
				t.Errorf("help for %s lists it:\n%s", user, out)
			}
		}
		if len(f.asked) > 0 {
			t.Errorf("asked %q", f.asked)
		}
	})
}

// TestHostileAnswer: the answer of another gateway is data: it does not control the terminal,
// and does not pass for another gateway's.
func TestHostileAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTestFleet(t, "a", "b", "c")
		defer f.end()
		a := f.at["a"]
		evil := "x\x1b[2J\u202e\n\tb"
		users, _ := json.Marshal([]map[string]any{{"user": evil, "connections": []map[string]any{{
			"id": evil, "gateway": "c", "client": evil, "client_version": evil, "profile": evil,
			"channels": []map[string]any{{"kind": evil, "command": evil, "runs": evil}},
		}}}})
		for _, answer := range []string{string(users), "", "null", "[]", "{}", `[{"user":7}]`, "[[[[", `[{"connections":null}]`, "\x1b[2J"} {
			f.set(func() {
				f.answer["b"] = func(context.Context, string) ([]byte, error) { return []byte(answer), nil }
			})
			for _, line := range []string{"users", "users --json", "gateways", "gateways --json", "bastions", "kick x --yes", "kick x --yes --json", "drain b --yes"} {
				out, errs, _ := a.run("root", line)
				if strings.ContainsAny(out+errs, "\x1b\u202e\r") || strings.Contains(out, "\n\tb") {
					t.Errorf("%s with the answer %q: %q", line, answer, out+errs)
				}
				if strings.Contains(out, `"gateway":"c"`) {
					t.Errorf("%s: b passes for c: %s", line, out)
				}
			}
		}
		if strings.Contains(a.log.String(), "panic") {
			t.Error(a.log.String())
		}
	})
}

// TestOthers: gateways that have ended are not asked, and successors at their addresses are
// not taken for them.
func TestOthers(t *testing.T) {
	now := time.Now()
	g := func(id, addr string, started, silence time.Duration, change ...func(*FleetGateway)) FleetGateway {
		out := FleetGateway{ID: id, Address: addr, Started: now.Add(-started), Seen: now.Add(-silence)}
		for _, c := range change {
			c(&out)
		}
		return out
	}
	self := func(g *FleetGateway) { g.Self = true }
	draining := func(g *FleetGateway) { g.Draining = true }
	ended := func(g *FleetGateway) { g.Ended = true }
	for _, tt := range []struct {
		name string
		all  []FleetGateway
		want string
	}{
		{"itself", []FleetGateway{g("a", "h:1", time.Hour, 0, self)}, ""},
		{"another", []FleetGateway{g("a", "h:1", time.Hour, 0, self), g("b", "h:2", time.Hour, 5*time.Minute)}, "ask b"},
		{"an ended one", []FleetGateway{g("a", "h:1", time.Hour, 0, self), g("b", "h:2", time.Hour, 11*time.Minute, ended)}, ""},
		{"one of an older version", []FleetGateway{g("a", "", time.Hour, 0, self), g("b", "", time.Hour, 0)}, "b has no address for other gateways"},
		{"a draining one", []FleetGateway{g("a", "h:1", time.Minute, 0, self), g("b", "h:2", time.Hour, 0, draining)}, "ask b"},
		{"a draining one, and its successor", []FleetGateway{g("a", "h:1", time.Minute, 0, self), g("b", "h:1", time.Hour, 0, draining)}, "b drains and takes no commands"},
		{"a killed one, a moment ago", []FleetGateway{g("a", "h:1", 0, 0, self), g("b", "h:1", time.Hour, 30*time.Second)}, "b has the address of a"},
		{"a killed one", []FleetGateway{g("a", "h:1", 0, 0, self), g("b", "h:1", time.Hour, 2*time.Minute)}, ""},
		{"a killed one, and its successor", []FleetGateway{g("a", "h:3", 0, 0, self), g("b", "h:1", time.Hour, 2*time.Minute), g("c", "h:1", time.Minute, 0)}, "ask c"},
		{"one that is older than this one's predecessor", []FleetGateway{g("a", "h:1", time.Hour, 0, self), g("b", "h:1", time.Minute, 0)}, "ask b"},
	} {
		ask, not := others(tt.all)
		var got []string
		for _, g := range ask {
			got = append(got, "ask "+g.ID)
		}
		for _, m := range not {
			got = append(got, m.id+" "+m.why)
		}
		if strings.Join(got, "; ") != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}
