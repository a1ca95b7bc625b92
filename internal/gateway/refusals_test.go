package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
)

// auditTo has w write an audit log, and returns what reads it: after it the log is
// closed.
func (w *world) auditTo(t testing.TB) func() []audit.Event {
	t.Helper()
	path := filepath.Join(t.TempDir(), "audit.log")
	log, err := audit.Open(audit.Config{File: path, FailClosed: true, Log: w.srv.Log})
	if err != nil {
		t.Fatal(err)
	}
	w.srv.Audit = log
	return func() []audit.Event {
		t.Helper()
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var events []audit.Event
		for line := range strings.Lines(string(data)) {
			var e audit.Event
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				t.Fatal(err)
			}
			events = append(events, e)
		}
		return events
	}
}

// TestTurnedAway has strangers connect who are refused at once, and looks at what
// is told of them and when.
func TestTurnedAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		events := w.auditTo(t)
		turnAway := func(from string, why string) {
			c := &conn{Server: w.srv, ref: newRef(), log: w.srv.Log, client: netip.MustParseAddrPort(from)}
			c.turnedAway(slog.LevelWarn, errors.New(why))
		}
		turnAway("192.0.2.1:1", "a")
		for i := range 1000 {
			turnAway(fmt.Sprintf("192.0.2.1:%d", 1000+i), "b")
		}
		turnAway("192.0.2.2:1", "c")
		turnAway("192.0.2.2:2", "d")
		turnAway("192.0.2.3:1", "e")
		time.Sleep(refusalsEvery)
		w.srv.tellRefused(time.Now(), false)
		// Who goes on is told of no earlier than that.
		turnAway("192.0.2.1:2", "f")
		w.srv.tellRefused(time.Now(), false)
		// Of the third source there was nothing to tell, so this is its first again.
		turnAway("192.0.2.3:2", "g")
		w.srv.tellRefused(time.Now(), true)

		var got []string
		for _, e := range events() {
			got = append(got, fmt.Sprintf("%v %s %d %s", e.Client, e.Rule, e.Times, e.Source))
		}
		second := []string{"192.0.2.1:1999 b 1000 192.0.2.1/32", "192.0.2.2:2 d 0 "}
		if len(got) > 4 && got[3] == second[1] { // in any order
			got[3], got[4] = got[4], got[3]
		}
		want := append([]string{"192.0.2.1:1 a 0 ", "192.0.2.2:1 c 0 ", "192.0.2.3:1 e 0 "}, append(second, "192.0.2.3:2 g 0 ", "192.0.2.1:2 f 0 ")...)
		if strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("told\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		if n := strings.Count(w.logged(), "connection refused"); n != len(want) {
			t.Errorf("the operator was told %d times:\n%s", n, w.logged())
		}
	})
}

// TestTurnedAwayMany has a million strangers come from as many addresses, and
// wants few lines of it and no connection forgotten.
func TestTurnedAwayMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r refusals
		lines, connections := 0, 0
		tell := func(all bool) {
			for _, has := range r.due(time.Now(), all) {
				lines++
				connections += has.more
			}
		}
		const strangers, minutes = 1_000_000, 60
		for i := range strangers {
			a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
			if r.add(netip.PrefixFrom(a, 32), audit.Event{}, slog.LevelInfo, time.Now()) {
				lines++
				connections++
			}
			if len(r.of) > refusalSources+1 {
				t.Fatalf("%d sources are remembered", len(r.of))
			}
			if i%(strangers/minutes) == 0 {
				time.Sleep(time.Minute)
				tell(false)
			}
		}
		tell(true)
		if most := (refusalSources + 2) * (minutes/5 + 2); lines > most {
			t.Errorf("%d lines in %d minutes, want %d at most", lines, minutes, most)
		}
		if connections != strangers {
			t.Errorf("the lines tell of %d connections, want %d", connections, strangers)
		}
	})
}

// TestTurnedAwayIsServed wants both refusals of ServeConn to be counted.
func TestTurnedAwayIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		events := w.auditTo(t)
		w.srv.PerSourceMaxStartups = 1
		held, served := w.dialFrom(t.Context(), "203.0.113.7")
		synctest.Wait()
		refused := func() {
			nc, served := w.dialFrom(t.Context(), "203.0.113.7")
			<-served
			nc.Close()
		}
		for range 10 {
			refused()
		}
		w.srv.PerSourcePenalties = sshdPenalties
		w.srv.penalties.add(netip.MustParsePrefix("203.0.113.7/32"), sshdPenalties, time.Minute, "x")
		for range 10 {
			refused()
		}
		held.Close()
		<-served
		w.srv.tellRefused(time.Now(), true)
		var lines, connections int
		for _, e := range events() {
			if e.Type == audit.ConnectionRefused {
				lines++
				connections += max(e.Times, 1)
			}
		}
		if lines != 2 || connections != 20 {
			t.Errorf("%d lines of %d connections, want 2 of 20", lines, connections)
		}
	})
}
