package cost

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
)

// openLog opens a real audit log in a bubble of synctest, whose clock it uses.
func openLog(t *testing.T, gateway string) (log *audit.Log, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "audit.log")
	log, err := audit.Open(audit.Config{File: path, Gateway: gateway, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return log, path
}

func write(t *testing.T, log *audit.Log, e audit.Event) {
	t.Helper()
	if err := log.Write(e); err != nil {
		t.Fatal(err)
	}
}

// small is the size of a bastion of 0.25 vCPU and 0.5 GB, in an event.
func small(e audit.Event) audit.Event {
	e.Platform, e.Capacity, e.Architecture, e.CPU, e.Memory = "fargate", "on-demand", "x86_64", 256, 512
	return e
}

func bastionEvent(kind audit.Type, user, task string) audit.Event {
	return audit.Event{Type: kind, User: user, Profile: "default", Task: task, Generation: 1}
}

// read reads files, in which no line may be bad.
func read(t *testing.T, paths ...string) *Log {
	t.Helper()
	l := &Log{OnBad: func(file string, line int, why error) { t.Errorf("%s:%d: %v", file, line, why) }}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err == nil {
			err = l.Read(path, bytes.NewReader(text))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func report(t *testing.T, l *Log, since, until time.Time, by By) Report {
	t.Helper()
	r, err := l.Report(since, until, by, DefaultPrices())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// want compares a group with the number of bastions, hours and costs.
func want(t *testing.T, r Report, name string, bastions int, hours, cost float64, estimated int) {
	t.Helper()
	i := slices.IndexFunc(r.Groups, func(g Group) bool { return g.Name == name })
	if i < 0 {
		t.Errorf("no group %q in %+v", name, r.Groups)
		return
	}
	g := r.Groups[i]
	if g.Bastions != bastions || math.Abs(g.Hours-hours) > 1e-5 || math.Abs(g.Cost-cost) > 1e-5 || g.Estimated != estimated {
		t.Errorf("%s: %d bastions, %v hours, %v USD, %d estimated; want %d, %v, %v, %d", name, g.Bastions, g.Hours, g.Cost, g.Estimated, bastions, hours, cost, estimated)
	}
}

// TestAuditLogs prices logs of two gateways that package audit has written.
func TestAuditLogs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, first := openLog(t, "one")
		two, second := openLog(t, "two")
		began := time.Now().UTC()
		write(t, one, audit.Event{Type: audit.GatewayStarted})
		time.Sleep(time.Hour)

		// Alice's bastion: both gateways have waited for its start. It is billed
		// for two hours, and its end is found later.
		pulled := time.Now().Add(20 * time.Second)
		time.Sleep(40 * time.Second)
		started := small(bastionEvent(audit.BastionStarted, "alice", "arn:alice/1"))
		started.Took, started.MaxLife = 40, (12 * time.Hour).Seconds()
		write(t, one, started)
		waited := bastionEvent(audit.BastionStarted, "alice", "arn:alice/1")
		waited.Took = 15
		write(t, two, waited)
		write(t, two, audit.Event{Type: audit.Login, User: "alice", Profile: "default", Conn: "x", Key: "SHA256:x"})
		time.Sleep(12 * time.Hour)
		ended := small(bastionEvent(audit.BastionEnded, "alice", "arn:alice/1"))
		ended.RanFrom, ended.RanUntil, ended.Reason = pulled, pulled.Add(2*time.Hour), "EssentialContainerExited"
		write(t, two, ended)

		// Bob's, on ARM and Spot, larger, is stopped by a gateway after half an hour.
		time.Sleep(time.Minute)
		big := bastionEvent(audit.BastionStarted, "bob", "arn:bob/1")
		big.Platform, big.Capacity, big.Architecture, big.CPU, big.Memory, big.EphemeralStorage, big.Took = "fargate", "spot", "arm64", 1024, 2048, 50, 60
		write(t, one, big)
		time.Sleep(29 * time.Minute)
		write(t, one, bastionEvent(audit.BastionStopped, "bob", "arn:bob/1"))

		// Carol's start fails after ten seconds, and is billed for a minute.
		failed := small(bastionEvent(audit.BastionFailed, "carol", "arn:carol/1"))
		failed.Took, failed.Reason = 30, "it has ended"
		failed.RanFrom, failed.RanUntil = time.Now().Add(-12*time.Second), time.Now().Add(-2*time.Second)
		write(t, one, failed)
		// Without a task, nothing was launched.
		write(t, one, audit.Event{Type: audit.BastionFailed, User: "carol", Profile: "default", Took: 3, Reason: "no capacity"})

		// Dave's runs on; Erin's is older than the log, and has no end in it either.
		running := small(bastionEvent(audit.BastionStarted, "dave", "arn:dave/1"))
		running.Took = 60
		write(t, one, running)
		waited = bastionEvent(audit.BastionStarted, "dave", "arn:dave/1")
		waited.Took = 15
		write(t, two, waited)
		write(t, two, audit.Event{Type: audit.BastionJoined, User: "erin", Profile: "default", Conn: "y", Task: "arn:erin/9", Generation: 9})
		// Frank's is a process of the gateway's machine.
		local := bastionEvent(audit.BastionStarted, "frank", "frank/1")
		local.Platform = "local"
		write(t, one, local)
		time.Sleep(time.Hour)
		write(t, two, audit.Event{Type: audit.GatewayStopped})
		total := time.Since(began)
		if err := errors.Join(one.Close(), two.Close()); err != nil {
			t.Fatal(err)
		}

		for _, order := range [][]string{{first, second}, {second, first}, {first, second, first}} {
			r := report(t, read(t, order...), time.Time{}, time.Time{}, ByUser)
			want(t, r, "alice", 1, 2, 2*(0.25*0.04048+0.5*0.004445), 0)
			want(t, r, "bob", 1, 0.5, 0.5*(0.01030969+2*0.00113349+30*0.000111), 0)
			want(t, r, "carol", 1, 1.0/60, (0.25*0.04048+0.5*0.004445)/60, 0)
			want(t, r, "dave", 1, 61.0/60, 61.0/60*(0.25*0.04048+0.5*0.004445), 1)
			want(t, r, "erin", 1, total.Hours(), 0, 1)
			want(t, r, "frank", 1, 1, 0, 1)
			if g := r.Total; g.Bastions != 6 || g.Estimated != 3 || g.Unpriced != 1 || g.Local != 1 {
				t.Errorf("total %+v", g)
			}
			if len(r.Groups) != 6 || r.Groups[0].Name != "alice" {
				t.Errorf("groups %+v", r.Groups)
			}
		}
	})
}

// TestMaxLife: a bastion without an end counts for its maximum life at most, and one
// without a start for its maximum life before its end.
func TestMaxLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, path := openLog(t, "one")
		write(t, log, audit.Event{Type: audit.GatewayStarted})
		time.Sleep(100 * time.Hour)
		running := small(bastionEvent(audit.BastionStarted, "alice", "arn:1"))
		running.MaxLife = (12 * time.Hour).Seconds()
		write(t, log, running)
		adopted := small(bastionEvent(audit.BastionAdopted, "bob", "arn:2"))
		adopted.MaxLife, adopted.RanFrom = (12 * time.Hour).Seconds(), time.Now().Add(-2*time.Hour)
		write(t, log, adopted)
		unknown := small(bastionEvent(audit.BastionAdopted, "carol", "arn:3"))
		unknown.MaxLife = (12 * time.Hour).Seconds()
		write(t, log, unknown)
		time.Sleep(time.Hour)
		write(t, log, bastionEvent(audit.BastionStopped, "carol", "arn:3"))
		time.Sleep(100 * time.Hour)
		// Its end is found days later, when ECS has forgotten it.
		write(t, log, bastionEvent(audit.BastionEnded, "bob", "arn:2"))
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
		r := report(t, read(t, path), time.Time{}, time.Time{}, ByUser)
		price := 0.25*0.04048 + 0.5*0.004445
		want(t, r, "alice", 1, 12, 12*price, 1)
		want(t, r, "bob", 1, 12, 12*price, 1)
		want(t, r, "carol", 1, 12, 12*price, 1)
	})
}

// TestPeriod: a bastion counts with the part of its time that is within the period,
// and within each day.
func TestPeriod(t *testing.T) {
	at := func(text string) time.Time {
		parsed, err := time.Parse(time.RFC3339, text)
		if err != nil {
			t.Fatal(err)
		}
		return parsed
	}
	const events = `{"v":1,"time":"2026-10-31T20:00:40Z","event":"bastion-started","user":"alice","profile":"default","task":"1","took":40,"platform":"fargate","capacity":"on-demand","architecture":"x86_64","cpu":1024,"memory":1024}
{"v":1,"time":"2026-11-02T06:00:00Z","event":"bastion-stopped","user":"alice","profile":"default","task":"1"}
{"v":1,"time":"2026-11-02T07:00:00Z","event":"bastion-started","user":"alice","profile":"big","task":"2","took":3600,"platform":"fargate","cpu":2048,"memory":4096}
{"v":1,"time":"2026-11-02T08:00:00Z","event":"bastion-ended","user":"alice","profile":"big","task":"2","ran_from":"2026-11-02T06:30:00+00:00","ran_until":"2026-11-02T08:30:00Z"}
`
	l := &Log{}
	if err := l.Read("log", strings.NewReader(events)); err != nil {
		t.Fatal(err)
	}
	one, two := 0.04048+0.004445, 2*0.04048+4*0.004445

	r := report(t, l, time.Time{}, time.Time{}, ByProfile)
	want(t, r, "default", 1, 34, 34*one, 0)
	want(t, r, "big", 1, 2, 2*two, 0) // also after the last event
	r = report(t, l, at("2026-11-01T00:00:00Z"), at("2026-11-02T07:00:00Z"), ByUser)
	want(t, r, "alice", 2, 30.5, 30*one+0.5*two, 0)
	r = report(t, l, at("2026-11-01T00:00:00Z"), at("2026-12-01T00:00:00Z"), ByDay)
	want(t, r, "2026-11-01", 1, 24, 24*one, 0)
	want(t, r, "2026-11-02", 2, 8, 6*one+2*two, 0)
	if len(r.Groups) != 2 || r.Groups[0].Name != "2026-11-01" || r.Total.Bastions != 2 {
		t.Errorf("%+v", r)
	}
	if r = report(t, l, at("2026-11-03T00:00:00Z"), time.Time{}, ByDay); r.Total != (Group{}) {
		t.Errorf("after the end: %+v", r.Total)
	}
	if _, err := l.Report(at("1990-01-01T00:00:00Z"), time.Time{}, ByDay, DefaultPrices()); err == nil {
		t.Error("no error for a report of 13,000 days")
	}
}

func TestBadLines(t *testing.T) {
	const good = `{"v":1,"time":"2026-11-02T06:00:00Z","event":"gateway-started","new_field":{"a":[1]},"lost":3}`
	lines := []string{
		good,
		`{"v":1,"seq":9,"ti`, // of a killed gateway
		"",
		good,
		`{"v":2,"time":"2026-11-02T06:00:00Z","event":"gateway-started"}`,
		`{"v":1,"time":"2026-11-02T06:00:00Z"}`,
		`{"v":1,"time":"yesterday","event":"login"}`,
		`{"v":1,"time":"2026-11-02T06:00:00Z","event":"bastion-started","user":"alice","profile":"default"}`,
		`[]`,
		`{"v":1,"time":"2026-11-02T06:00:00Z","event":"bastion-ended","user":"a","profile":"p","task":"1","ran_from":"0002-11-02T06:00:00Z","ran_until":"9998-11-02T06:00:00Z"}`,
		`{"v":1,"pad":"` + strings.Repeat("x", 3*maxLine) + `"}`,
		`{"v":1,"time":"2026-11-02T06:00:00Z","event":"bastion-joined","task":"1","profile":"p","user":"` + strings.Repeat("u", maxName+1) + `"}`,
		`{"v":1,"time":"2026-11-02T06:00:00Z","event":"bastion-joined","task":"1","profile":"p","user":"u","platform":"` + strings.Repeat("u", maxName+1) + `"}`,
		`{"v":1,"time":"2026-11-02T06:00:00Z","event":"bastion-joined","task":"1","profile":"p","user":"u","architecture":"` + strings.Repeat("u", maxName+1) + `"}`,
		`{"v":1,"time":"2026-11-02T08:00:00Z","event":"bastion-started","user":"alice","profile":"default","task":"1","took":1e300,"cpu":-3,"max_life":-1}`,
		`{"v":1,"time":"2026-11-02T09:00:00Z","event":"gateway-stopped"}`,
		`{"v":1,"time":"2026-11-02T09:0`, // the last one, without a newline
	}
	text := strings.Join(lines, "\n")
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	io.WriteString(w, text)
	w.Close()
	for name, data := range map[string]string{"plain": text, "gzip": zipped.String()} {
		var bad []int
		l := &Log{OnBad: func(_ string, line int, _ error) { bad = append(bad, line) }}
		if err := l.Read(name, strings.NewReader(data)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !slices.Equal(bad, []int{2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 17}) {
			t.Errorf("%s: bad lines %v", name, bad)
		}
		r := report(t, l, time.Time{}, time.Time{}, ByUser)
		want(t, r, "alice", 1, 1, 0, 1)
		if r.BadLines != len(bad) || r.Lost != 6 || r.Total.Unpriced != 1 {
			t.Errorf("%s: %+v", name, r)
		}
	}

	// What was read before an error counts.
	l := &Log{}
	long := strings.Repeat(good+"\n", 100_000)
	zipped.Reset()
	w = gzip.NewWriter(&zipped)
	io.WriteString(w, long)
	w.Close()
	if err := l.Read("cut", bytes.NewReader(zipped.Bytes()[:zipped.Len()-100])); !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "cut: after line ") {
		t.Errorf("a cut file: %v", err)
	}
	if l.lost == 0 {
		t.Error("nothing was counted")
	}
	if err := (&Log{}).Read("not gzip", strings.NewReader("\x1f\x8bxx")); err == nil {
		t.Error("no error for a broken gzip file")
	}
	if _, err := (&Log{}).Report(time.Time{}, time.Time{}, ByUser, DefaultPrices()); err == nil {
		t.Error("no error without events")
	}
}

func TestTooMany(t *testing.T) {
	l := &Log{limit: 3}
	var b strings.Builder
	for i := range 4 {
		for range 2 {
			fmt.Fprintf(&b, `{"v":1,"time":"2026-11-02T06:00:00Z","event":"bastion-joined","user":"u","profile":"p","task":"%d"}`+"\n", i)
		}
	}
	if err := l.Read("log", strings.NewReader(b.String())); !errors.Is(err, errTooMany) || !strings.Contains(err.Error(), "line 7") {
		t.Errorf("got %v", err)
	}
}

func TestMinimum(t *testing.T) {
	at := time.Date(2026, 11, 2, 6, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		name string
		run  run
		want time.Duration
	}{
		{"a second", run{from: at, until: at.Add(time.Second)}, time.Minute},
		{"a fraction of a second more", run{from: at, until: at.Add(61*time.Second + time.Millisecond)}, 62 * time.Second},
		{"whole seconds", run{from: at, until: at.Add(61 * time.Second)}, 61 * time.Second},
		{"an end before its start, by another clock", run{from: at, until: at.Add(-time.Second)}, time.Minute},
		{"local", run{started: at, stopped: at.Add(time.Second), size: size{platform: "local"}}, time.Second},
		{"the platform's times win", run{started: at, from: at.Add(30 * time.Second), until: at.Add(time.Hour), stopped: at.Add(2 * time.Hour)}, time.Hour - 30*time.Second},
	} {
		start, end, estimated := tt.run.interval(at.Add(-time.Hour), at.Add(10*time.Hour))
		if got := end.Sub(start); got != tt.want || estimated {
			t.Errorf("%s: %v (%v), want %v", tt.name, got, estimated, tt.want)
		}
	}
}

func TestReadPrices(t *testing.T) {
	known := DefaultPrices()
	for name, p := range known.Prices {
		if !(p.Price > 0) || p.Unit == "" || !strings.HasPrefix(p.Page, "https://") || p.AsOf == "" {
			t.Errorf("%s: %+v", name, p)
		}
	}
	if got := known.AsOf(); got != "2026-09-28 to 2026-10-09" {
		t.Errorf("as of %q", got)
	}
	if same, err := ReadPrices(bytes.NewReader(Builtin())); err != nil || fmt.Sprint(same) != fmt.Sprint(known) {
		t.Errorf("the built-in table: %v, %v", same, err)
	}
	own, err := ReadPrices(strings.NewReader(`{"prices": {"vcpu": {"price": 0.03}}}`))
	if err != nil || own.Prices["vcpu"].Price != 0.03 || own.Prices["gb"] != known.Prices["gb"] {
		t.Errorf("one price: %+v, %v", own.Prices["vcpu"], err)
	}
	if got := own.AsOf(); got != "2026-09-28 to an unknown date" {
		t.Errorf("as of %q", got)
	}
	all := strings.ReplaceAll(string(Builtin()), "us-east-1", "eu-central-1")
	if there, err := ReadPrices(strings.NewReader(all)); err != nil || there.Region != "eu-central-1" {
		t.Errorf("another Region: %v, %v", there.Region, err)
	}
	for text, problem := range map[string]string{
		`{"prices": {"vcpu": {"price": -1}}}`:                                "out of range",
		`{"prices": {"vcpus": {"price": 1}}}`:                                `unknown price "vcpus"`,
		`{"price": {}}`:                                                      "unknown field",
		`{"region": "eu-central-1", "prices": {"vcpu": {"price": 0.04656}}}`: `there is no price "gb", and the built-in one is for us-east-1`,
		`{"currency": "CNY"}`:                                                "built-in one is for us-east-1 in USD",
		``:                                                                   "EOF",
	} {
		if _, err := ReadPrices(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), problem) {
			t.Errorf("%s: %v, want %s", text, err, problem)
		}
	}
}

// FuzzRead: no input makes hours or a cost that are negative or no numbers, or a
// report whose groups do not add up.
func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"v":1,"time":"2026-10-31T20:00:40Z","event":"bastion-started","user":"alice","profile":"default","task":"1","took":40,"platform":"fargate","cpu":1024,"memory":1024,"max_life":60}
{"v":1,"time":"2026-11-02T06:00:00Z","event":"bastion-stopped","user":"alice","profile":"default","task":"1"}
`), true)
	f.Add([]byte(`{"v":1,"time":"2199-01-02T00:00:00Z","event":"bastion-ended","user":"a","profile":"b","task":"1","ran_from":"2000-11-02T06:00:00Z","ran_until":"2200-11-02T06:00:00Z"}`), false)
	f.Add([]byte("\x1f\x8b\x08"), false)
	f.Fuzz(func(t *testing.T, data []byte, period bool) {
		l := &Log{}
		l.Read("log", bytes.NewReader(data))
		var since, until time.Time
		if period {
			since, until = time.Date(2026, 10, 1, 0, 0, 0, 0, time.UTC), time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
		}
		for _, by := range []By{ByUser, ByProfile, ByDay} {
			r, err := l.Report(since, until, by, DefaultPrices())
			if err != nil {
				continue
			}
			hours := 0.0
			for _, g := range append(r.Groups, r.Total) {
				if !(g.Hours >= 0) || !(g.Cost >= 0) || math.IsInf(g.Hours, 0) || math.IsInf(g.Cost, 0) {
					t.Errorf("by %s: %+v", by, g)
				}
			}
			for _, g := range r.Groups {
				hours += g.Hours
			}
			if math.Abs(hours-r.Total.Hours) > 1e-3+1e-9*hours {
				t.Errorf("by %s: %v hours in groups, %v in total", by, hours, r.Total.Hours)
			}
		}
	})
}
