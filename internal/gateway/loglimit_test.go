package gateway

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// forward opens a direct-tcpip channel to host, and closes it. It reports whether the
// channel was refused. An error means that the connection to the gateway has ended.
func (c *client) forward(host string) (refused bool, err error) {
	ch, reqs, err := c.OpenChannel("direct-tcpip", ssh.Marshal(struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}{host, 80, "127.0.0.1", 4321}))
	if errors.As(err, new(*ssh.OpenChannelError)) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	ch.Close()
	ssh.DiscardRequests(reqs)
	return false, nil
}

// denyForwards permits all users everything except forwards.
func (gw *testGateway) denyForwards() {
	p := identity.AllowAll()
	p.PermitOpen = []string{"none"}
	gw.permit(p)
}

// size returns the approximate size of events.
func size(events []audit.Event) (bytes int) {
	for _, e := range events {
		bytes += 400 + len(e.Destination) + len(e.Rule)
	}
	return bytes
}

// times returns the number of events of a type, and the sum of their Times.
func times(events []audit.Event, t audit.Type) (lines, times int) {
	for _, e := range events {
		if e.Type == t {
			lines++
			times += max(e.Times, 1)
		}
	}
	return lines, times
}

// TestLogLimit: a user requests forwards to many hosts with long names, which are refused.
// The connection ends, then all connections of the user, and logins are refused for a
// while. Every refusal is counted, and another user is not affected.
func TestLogLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		const limit = 256 << 10
		gw.srv.LogPerUser = LogLimit{Bytes: limit, Per: time.Hour}
		gw.denyForwards()
		bob, err := gw.connect(t.Context(), "bob", gw.bob)
		if err != nil {
			t.Fatal(err)
		}
		defer bob.Close()

		refusals, logins := 0, 0
		var last *client
		for ; logins < 10; logins++ {
			alice, err := gw.connect(t.Context(), "alice", gw.alice)
			if last = alice; err != nil {
				break
			}
			ended := false
			for i := 0; !ended; i++ {
				refused, err := alice.forward(fmt.Sprintf("%d.%01900d", refusals, 0))
				if ended = err != nil; refused {
					refusals++
				}
				if i > 10_000 {
					t.Fatalf("the connection does not end: %.3000s", gw.logged())
				}
			}
			alice.Wait()
		}
		if logins < 1 || logins > 4 {
			t.Errorf("%d logins before one is refused", logins)
		}
		if !strings.Contains(last.shown(), "more log entries than one user may cause. Try again in") {
			t.Errorf("banner %q", last.shown())
		}
		for range 200 {
			if _, err := gw.connect(t.Context(), "alice", gw.alice); err == nil {
				t.Fatal("a login beyond the limit succeeded")
			}
		}
		if out, err := bob.run("who"); err != nil || out != "I am bob" {
			t.Errorf("bob: %q, %v", out, err)
		}
		time.Sleep(time.Hour)
		alice, err := gw.connect(t.Context(), "alice", gw.alice)
		if err != nil {
			t.Fatalf("an hour later: %v: %s", err, alice.shown())
		}
		alice.Close()
		bob.Close()
		time.Sleep(time.Second)
		synctest.Wait()
		gw.srv.flushSuppressed(time.Now(), true)

		all := events()
		if got := size(all); got > limit+limit/4 {
			t.Errorf("%d bytes of events, want about %d", got, limit)
		}
		// The client may not have read the last answer of each connection.
		if _, got := times(all, audit.Refused); got < refusals || got > refusals+logins {
			t.Errorf("the events count %d refusals, want %d", got, refusals)
		}
		if lines, got := times(all, audit.LoginRefused); got != 201 || lines > 3 {
			t.Errorf("%d refused logins in %d lines, want 201 in at most 3", got, lines)
		}
		byGateway := 0
		for _, e := range all {
			if e.Type == audit.End && strings.Contains(e.Reason, "log_per_user") && e.By == "gateway" {
				byGateway++
			}
		}
		if byGateway != logins {
			t.Errorf("%d end events name log_per_user, want %d", byGateway, logins)
		}
		if lines, _ := times(all, audit.Connection); lines > 10 {
			t.Errorf("%d connection events, want at most 10", lines)
		}
		if got := len(gw.logged()); got > limit {
			t.Errorf("%d bytes in the operator's log", got)
		}
	})
}

// TestLogRepeats: equal refusals are written as two events, and the connection goes on.
func TestLogRepeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		gw.srv.LogPerUser = LogLimit{Bytes: 100 << 10, Per: time.Hour}
		gw.denyForwards()
		alice, err := gw.connect(t.Context(), "alice", gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		for range 2000 {
			if refused, err := alice.forward("db.internal"); !refused {
				t.Fatal(err)
			}
		}
		alice.Close()
		time.Sleep(time.Second)
		all := events()
		if lines, got := times(all, audit.Refused); lines != 2 || got != 2000 {
			t.Errorf("%d lines count %d refusals, want 2 lines of 2000", lines, got)
		}
	})
}

// TestLogForwards: a client opens many forwards to the same destination, like a program
// without a connection pool. Until half of the limit is used, each is an event; then they
// are folded, and the connection goes on.
func TestLogForwards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		gw.srv.LogPerUser = LogLimit{Bytes: 200 << 10, Per: time.Hour}
		alice, err := gw.connect(t.Context(), "alice", gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		const forwards = 2000
		for range forwards {
			if refused, err := alice.forward("db.internal"); refused || err != nil {
				t.Fatal(refused, err)
			}
		}
		alice.Close()
		time.Sleep(time.Second)
		all := events()
		lines, got := times(all, audit.ForwardEnd)
		if got != forwards || lines < 20 || lines > 400 {
			t.Errorf("%d lines count %d forwards, want 20 to 400 lines of %d", lines, got, forwards)
		}
		if begun, _ := times(all, audit.Forward); begun != lines && begun != lines-1 {
			t.Errorf("%d forwards have begun, and %d have ended", begun, lines)
		}
	})
}

// TestLogShare: a user's limit is a share of the free space.
func TestLogShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		gw.srv.LogPerUser = LogLimit{Bytes: 1 << 40, Per: time.Hour}
		gw.srv.freeLogSpace = func() int64 { return 1 << 20 }
		gw.denyForwards()
		for n := 0; ; n++ {
			alice, err := gw.connect(t.Context(), "alice", gw.alice)
			if err != nil {
				break
			}
			for err == nil {
				n++
				_, err = alice.forward(fmt.Sprintf("%d.%0200d", n, 0))
			}
			if n > 10_000 {
				t.Fatalf("the connection does not end: %.3000s", gw.logged())
			}
			alice.Wait()
		}
		bob, err := gw.connect(t.Context(), "bob", gw.bob)
		if err != nil {
			t.Fatalf("bob: %v", err)
		}
		bob.Close()
		time.Sleep(time.Second)
		if got := size(events()); got > 200<<10 {
			t.Errorf("%d bytes of events, with 1 MiB left", got)
		}
		if want := "at most an eighth of the free space"; !strings.Contains(gw.logged(), want) {
			t.Errorf("the log does not say %q", want)
		}
	})
}

// TestLogShareOverDays: with a limit far larger than the disk, a user who causes as many
// entries as possible for a day does not fill the disk.
func TestLogShareOverDays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		free := int64(64 << 20)
		gw.srv.LogPerUser = LogLimit{Bytes: 250 << 20, Per: time.Hour}
		gw.srv.freeLogSpace = func() int64 { return free }
		c := &conn{srv: gw.srv, cfg: gw.srv.settings(), log: gw.srv.Log}
		c.quota.user.Store(gw.srv.budgets.get("alice", c.cfg.LogPerUser))
		for range 24 * 60 {
			for n := 0; ; n++ {
				c.quota.own = budget{} // another connection
				if over, _ := c.overLogLimit(); over || free < 0 || n > 100_000 {
					break
				}
				c.spend(1000)
				free -= 1000
			}
			time.Sleep(time.Minute)
		}
		c.quota.disconnecting.Wait()
		if free < 1<<20 || free > 32<<20 {
			t.Errorf("%d bytes are left", free)
		}
	})
}

// TestLogQueuePerUser: while the log is slow, a user with many channels uses one slot of
// its queue, and no event of others is lost.
func TestLogQueuePerUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		slow := &slowWriter{release: make(chan struct{})}
		log, err := audit.Open(audit.Config{Stdout: slow, FailClosed: true, Log: gw.srv.Log})
		if err != nil {
			t.Fatal(err)
		}
		gw.srv.Audit = log
		log.OnFailure(func() { t.Error("the log has failed") })
		var writing sync.WaitGroup
		var begun atomic.Int32
		for _, user := range []string{"alice", "bob"} {
			c := &conn{srv: gw.srv, cfg: gw.srv.settings(), log: gw.srv.Log}
			c.quota.user.Store(gw.srv.budgets.get(user, c.cfg.LogPerUser))
			channels := map[string]int{"alice": 3000, "bob": 1}[user]
			for range channels {
				writing.Go(func() {
					begun.Add(1)
					if err := c.audit(identity.Identity{User: user}, audit.Event{Type: audit.Forward}); err != nil {
						t.Errorf("%s: %v", user, err)
					}
				})
			}
		}
		for begun.Load() < 3001 {
			runtime.Gosched()
		}
		close(slow.release)
		writing.Wait()
		if err := log.Close(); err != nil || slow.lines != 3001 {
			t.Errorf("%d lines, %v", slow.lines, err)
		}
	})
}

// A slowWriter counts lines. It blocks until it is released.
type slowWriter struct {
	release chan struct{}
	lines   int
}

func (gw *slowWriter) Write(p []byte) (int, error) {
	<-gw.release
	gw.lines++
	return len(p), nil
}

// TestLogUnauthenticated: beyond the limit, refused logins of unknown keys from many
// addresses are counted.
func TestLogUnauthenticated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		gw.srv.LogPerUser = LogLimit{Bytes: 50 << 10, Per: time.Hour}
		key := sshtest.NewKey(t)
		const strangers = 500
		for i := range strangers {
			nc, served := gw.dialFrom(t.Context(), fmt.Sprintf("192.0.2.%d", i%10))
			_, _, _, err := ssh.NewClientConn(nc, "gateway", &ssh.ClientConfig{User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.InsecureIgnoreHostKey()})
			if err == nil {
				t.Fatal("logged in")
			}
			nc.Close()
			<-served
		}
		alice, err := gw.connect(t.Context(), "alice", gw.alice)
		if err != nil {
			t.Fatalf("alice: %v", err)
		}
		alice.Close()
		time.Sleep(time.Second)
		gw.srv.flushSuppressed(time.Now(), true)
		lines, got := times(events(), audit.LoginRefused)
		if got != strangers || lines > 150 {
			t.Errorf("%d lines count %d refused logins, want at most 150 lines of %d", lines, got, strangers)
		}
	})
}
