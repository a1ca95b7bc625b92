package gateway

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
)

// TestSuppressedLog checks the entries of rejected connections, and their times.
func TestSuppressedLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		turnAway := func(from string, why string) {
			c := &conn{srv: gw.srv, cfg: gw.srv.settings(), ref: newRef(), log: gw.srv.Log, clientAddr: netip.MustParseAddrPort(from)}
			c.logRejected(rejectedStartups, slog.LevelWarn, errors.New(why))
		}
		turnAway("192.0.2.1:1", "a")
		for i := range 1000 {
			turnAway(fmt.Sprintf("192.0.2.1:%d", 1000+i), "b")
		}
		turnAway("192.0.2.2:1", "c")
		turnAway("192.0.2.2:2", "d")
		turnAway("192.0.2.3:1", "e")
		time.Sleep(suppressInterval)
		gw.srv.flushSuppressed(time.Now(), false)
		// The next entry of a source comes an interval later.
		turnAway("192.0.2.1:2", "f")
		gw.srv.flushSuppressed(time.Now(), false)
		// The third source was dropped, so this is a first entry.
		turnAway("192.0.2.3:2", "g")
		gw.srv.flushSuppressed(time.Now(), true)

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
			t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		if n := strings.Count(gw.logged(), "connection refused"); n != len(want) {
			t.Errorf("%d lines in the operator's log:\n%s", n, gw.logged())
		}
	})
}

// TestSuppressedLogLimits: a million connections from as many addresses make few lines,
// which count every connection.
func TestSuppressedLogLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r suppressedLog[netip.Prefix]
		lines, connections := 0, 0
		tell := func(all bool) {
			for _, has := range r.flush(time.Now(), all) {
				lines++
				connections += has.count
			}
		}
		const strangers, minutes = 1_000_000, 60
		for i := range strangers {
			a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
			if r.add(netip.PrefixFrom(a, 32), audit.Event{}, slog.LevelInfo, time.Now()) {
				lines++
				connections++
			}
			if len(r.of) > suppressSources+1 {
				t.Fatalf("%d sources are kept", len(r.of))
			}
			if i%(strangers/minutes) == 0 {
				time.Sleep(time.Minute)
				tell(false)
			}
		}
		tell(true)
		if most := (suppressSources + 2) * (minutes/5 + 2); lines > most {
			t.Errorf("%d lines in %d minutes, want %d at most", lines, minutes, most)
		}
		if connections != strangers {
			t.Errorf("the lines count %d connections, want %d", connections, strangers)
		}
	})
}

// TestServeConnSuppresses: ServeConn counts rejections by penalties and by MaxStartups.
func TestServeConnSuppresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		gw.srv.PerSourceMaxStartups = 1
		held, served := gw.dialFrom(t.Context(), "203.0.113.7")
		synctest.Wait()
		refused := func() {
			nc, served := gw.dialFrom(t.Context(), "203.0.113.7")
			<-served
			nc.Close()
		}
		for range 10 {
			refused()
		}
		gw.srv.PerSourcePenalties = sshdPenalties
		gw.srv.penalties.add(netip.MustParsePrefix("203.0.113.7/32"), sshdPenalties, time.Minute, "x")
		for range 10 {
			refused()
		}
		held.Close()
		<-served
		gw.srv.flushSuppressed(time.Now(), true)
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
