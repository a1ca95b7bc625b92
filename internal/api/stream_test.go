package api

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tmaxmax/go-sse"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/console"
)

// A follower is the client of a stream of events.
type follower struct {
	conn   net.Conn
	header http.Header
	events <-chan sse.Event // closed at the end of the stream
}

// follow opens a stream for a user.
func (ta *testAPI) follow(user string, key ssh.Signer, target, lastID string) *follower {
	ta.t.Helper()
	conn, resp := ta.openStream(user, key, target, lastID)
	if resp.StatusCode != 200 {
		ta.t.Fatalf("status %s", resp.Status)
	}
	events := make(chan sse.Event, 1000)
	go func() {
		defer close(events)
		for e, err := range sse.Read(resp.Body, nil) {
			if err == nil {
				events <- e
			}
		}
	}()
	return &follower{conn, resp.Header, events}
}

func (ta *testAPI) openStream(user string, key ssh.Signer, target, lastID string) (net.Conn, *http.Response) {
	ta.t.Helper()
	c := newCall("GET", target)
	c.User = user
	c.header.Set("Accept", "text/event-stream")
	if lastID != "" {
		c.header.Set("Last-Event-ID", lastID)
	}
	conn, err := ta.ln.Dial()
	if err != nil {
		ta.t.Fatal(err)
	}
	ta.t.Cleanup(func() { conn.Close() })
	req := c.request(ta.t, key)
	if err := req.Write(conn); err != nil {
		ta.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		ta.t.Fatal(err)
	}
	return conn, resp
}

// next returns the events that have arrived, in a few words, and the ID of the last one.
func (f *follower) next(t testing.TB) (all []string, last string) {
	t.Helper()
	synctest.Wait()
	for {
		select {
		case e, ok := <-f.events:
			if !ok {
				return append(all, "the end"), last
			}
			last = e.LastEventID
			if e.Type != "" {
				all = append(all, e.Type+" "+e.Data)
				continue
			}
			var event console.Event
			if err := json.Unmarshal([]byte(e.Data), &event); err != nil {
				t.Fatalf("%v: %s", err, e.Data)
			}
			all = append(all, strings.TrimSpace(string(event.Type)+" "+event.Command))
		default:
			return all, last
		}
	}
}

// TestStream: a user sees her own events as they happen, and goes on after a break.
func TestStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, withRoles)
		want := func(f *follower, want ...string) (last string) {
			t.Helper()
			got, last := f.next(t)
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			return last
		}
		alice := ta.follow("alice", ta.alice, "/v1/events?last=1", "")
		if h := alice.header; h.Get("Content-Type") != "text/event-stream" || h.Get("Cache-Control") != "no-store" || h.Get("X-Accel-Buffering") != "no" {
			t.Errorf("header %v", h)
		}
		want(alice, "exec GET /v1/events?last=1")
		root := ta.follow("root", ta.root, "/v1/events?last=1", "")
		want(root, "exec GET /v1/events?last=1")
		ta.do("GET", "/v1/whoami")
		time.Sleep(time.Second)
		last := want(alice, "login", "exec GET /v1/whoami", "end")
		want(root) // an administrator, too, sees her own only

		// The stream lives much longer than a write may take.
		time.Sleep(time.Hour)
		ta.gateway.Audit.Write(audit.Event{Type: audit.BastionLaunching, User: "alice", Profile: "default", Generation: 3})
		want(alice, "bastion-launching")
		alice.conn.Close()
		time.Sleep(time.Second)

		// Events of the meantime are not lost.
		alice = ta.follow("alice", ta.alice, "/v1/events", last)
		want(alice, "bastion-launching", "end", "login", "exec GET /v1/events")
		alice.conn.Close()
		// An ID of another gateway.
		alice = ta.follow("alice", ta.alice, "/v1/events", "AAAAAAAAAAAA-7")
		if got, _ := alice.next(t); got[0] != "missed {}" || got[1] != "login" {
			t.Errorf("got %s", got)
		}
		// HEAD has no stream.
		c := newCall("HEAD", "/v1/events")
		c.header.Set("Accept", "text/event-stream")
		if got := ta.send(c, ta.alice); got.status != 200 || got.header.Get("Content-Type") != "text/event-stream" {
			t.Errorf("HEAD: %v", got)
		}
		alice.conn.Close()
		time.Sleep(time.Second)
		ends := map[string]int{}
		calls := 0
		for _, e := range ta.events() {
			if e.Type == audit.End && e.User == "alice" {
				ends[e.By+": "+e.Reason]++
			}
			if e.Type == audit.Exec && e.User == "alice" && strings.Contains(e.Command, "/v1/events") {
				calls++
			}
		}
		if ends["client: the client has closed the stream"] != 3 || calls != 4 {
			t.Errorf("ends %v, %d calls", ends, calls)
		}
	})
}

// TestStreamHeartbeat: a stream without events has comments, which are no events.
func TestStreamHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, nil)
		conn, resp := ta.openStream("alice", ta.alice, "/v1/events?last=1", "")
		lines := bufio.NewReader(resp.Body)
		var text strings.Builder
		began := time.Now()
		for beats := 0; beats < 4; {
			line, err := lines.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			text.WriteString(line)
			if line == ":\n" {
				beats++
			}
		}
		conn.Close()
		if took := time.Since(began); took != 4*heartbeat || !strings.HasPrefix(text.String(), "retry: 4000\n\nid: ") || strings.Count(text.String(), "data:") != 1 {
			t.Errorf("after %v:\n%s", took, text.String())
		}
	})
}

// TestSlowStream: a client that does not read is disconnected, keeps no memory until then,
// and is told of the gap when it comes back.
func TestSlowStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, nil)
		conn, resp := ta.openStream("alice", ta.alice, "/v1/events?last=1", "")
		began := time.Now()
		for !strings.Contains(ta.logged(), errSlow.Error()) { // more than fits into the connection
			for range 10 {
				ta.gateway.Audit.Write(audit.Event{Type: audit.Exec, User: "alice", Command: strings.Repeat("x", 128)})
			}
			time.Sleep(100 * time.Millisecond)
			if time.Since(began) > 10*time.Minute {
				t.Fatal("it is still connected", ta.logged())
			}
		}
		// Events that had been sent before are still there.
		var last string
		for e, err := range sse.Read(resp.Body, nil) {
			if err == nil {
				last = e.LastEventID
			}
		}
		conn.Close()
		got, _ := ta.follow("alice", ta.alice, "/v1/events", last).next(t)
		if last == "" || got[0] != "missed {}" || len(got) < 50 {
			t.Errorf("after %q: %d events, %s", last, len(got), got[0])
		}
	})
}

// TestStreamEnds: streams end at a drain and when the login is no longer permitted, and their
// users are told so.
func TestStreamEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, nil)
		f := ta.follow("alice", ta.alice, "/v1/events?last=1", "")
		removeKeys(t, ta, "alice")
		time.Sleep(20 * time.Second)
		if got, _ := f.next(t); len(got) != 3 || !strings.HasPrefix(got[1], `notice {"text":"The key you logged in with is no longer accepted`) || got[2] != "the end" {
			t.Errorf("a removed key: %q", got)
		}
		f = ta.follow("root", ta.root, "/v1/events?last=1", "")
		began := time.Now()
		ends := 0
		for _, e := range ta.events() { // ends the server
			if e.Type == audit.End && e.User == "root" && e.By == "gateway" && e.Reason == errDraining.Error() {
				ends++
			}
		}
		got, _ := f.next(t)
		if n := len(got); n < 3 || !strings.Contains(got[n-2], "Connect again.") || got[n-1] != "the end" || ends != 1 || time.Since(began) > 5*time.Second {
			t.Errorf("a drain: %q, %d ends, after %v", got, ends, time.Since(began))
		}
	})
}

// TestStreamLimits: one user cannot open many streams, and a closed one makes room.
func TestStreamLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, func(ta *testAPI) { ta.gateway.MaxConnectionsPerUser = 20 })
		refused := func() bool {
			conn, resp := ta.openStream("alice", ta.alice, "/v1/events", "")
			if resp.StatusCode == 200 {
				return false
			}
			defer conn.Close()
			text, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != 429 || !strings.Contains(string(text), `"code":"too-many-streams"`) {
				t.Errorf("%s %s", resp.Status, text)
			}
			return true
		}
		first := ta.follow("alice", ta.alice, "/v1/events", "")
		opened := 1
		for !refused() {
			opened++
		}
		if opened != 4 {
			t.Errorf("%d streams", opened)
		}
		first.conn.Close()
		time.Sleep(time.Second)
		if refused() {
			t.Error("refused although one has ended")
		}
	})
}

// TestStreamWithoutEvents: without an audit log there is nothing to wait for.
func TestStreamWithoutEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ta := newTestAPI(t, func(ta *testAPI) { ta.server.Console.Recent = nil })
		c := newCall("GET", "/v1/events")
		c.header.Set("Accept", "text/event-stream")
		if got := ta.send(c, ta.alice); got.status != 404 || got.code() != "no-events" {
			t.Errorf("%v", got)
		}
	})
}

func TestAcceptsStream(t *testing.T) {
	for header, want := range map[string]bool{
		"": false, "*/*": false, "text/*": false, "application/json": false, "text/event-streams": false,
		"text/event-stream": true, "Text/Event-Stream; q=0.5": true, "application/json, text/event-stream": true,
		"text/event-stream;q=0": false, "text/event-stream;q=0.0, application/json": false, ";;, text/event-stream": true,
	} {
		if got := acceptsStream([]string{header}); got != want {
			t.Errorf("%q: %t", header, got)
		}
	}
}
