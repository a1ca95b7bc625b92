package tracing

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// A fakeCollector is the collector of a Tracer, without a network.
type fakeCollector struct {
	mu       sync.Mutex
	spans    []*tracepb.Span
	requests int
	largest  int // spans of a request
	hangs    bool
	status   int
}

// RoundTrip implements [http.RoundTripper].
func (c *fakeCollector) RoundTrip(req *http.Request) (*http.Response, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests++
	if c.hangs {
		c.mu.Unlock()
		<-req.Context().Done()
		c.mu.Lock()
		return nil, context.Cause(req.Context())
	}
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	var data tracepb.TracesData
	if err := proto.Unmarshal(body, &data); err != nil {
		return nil, err
	}
	n := 0
	for _, resource := range data.ResourceSpans {
		for _, scope := range resource.ScopeSpans {
			c.spans = append(c.spans, scope.Spans...)
			n += len(scope.Spans)
		}
	}
	c.largest = max(c.largest, n)
	return &http.Response{StatusCode: c.status, Body: http.NoBody, Request: req}, nil
}

// text returns the spans in the order of their ends, with the names of their parents.
func (c *fakeCollector) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	names := map[string]string{}
	for _, s := range c.spans {
		names[string(s.SpanId)] = s.Name
	}
	var lines []string
	for _, s := range c.spans {
		line := fmt.Sprintf("%s<%s", s.Name, names[string(s.ParentSpanId)])
		for _, a := range s.Attributes {
			line += fmt.Sprintf(" %s=%s", a.Key, a.Value.GetStringValue())
		}
		line += fmt.Sprintf(" %v", time.Duration(s.EndTimeUnixNano-s.StartTimeUnixNano))
		if s.Status.GetCode() == tracepb.Status_STATUS_CODE_ERROR {
			line += " error: " + s.Status.Message
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func newTestTracer(t *testing.T, sample float64) (*Tracer, *fakeCollector, *strings.Builder) {
	t.Helper()
	fake, log := &fakeCollector{status: 200}, &strings.Builder{}
	tracer := newTracer(Options{Endpoint: "http://127.0.0.1:4318/v1/traces", Sample: sample}, "", "test", fake, slog.New(slog.NewTextHandler(log, nil)))
	t.Cleanup(tracer.Close)
	return tracer, fake, log
}

// settle waits until all spans have been sent.
func settle() {
	time.Sleep(2 * batchTime)
	synctest.Wait()
}

var client = netip.MustParseAddrPort("192.0.2.1:4711")

// TestLogin: the spans of a login have the times of its phases, and form a tree.
func TestLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracer, fake, _ := newTestTracer(t, 1)
		l := tracer.Login(time.Now(), "accept", "ref1", client)
		time.Sleep(time.Second)
		l.Phase("auth")
		time.Sleep(2 * time.Second)
		ctx := l.Proven(t.Context(), "alice", "default")
		outer, end := Start(ctx, "bastion")
		_, endInner := Start(outer, "handshake", "task", "t1")
		time.Sleep(time.Second)
		endInner(errors.New("no answer" + strings.Repeat("!", 2*maxText)))
		end(nil)
		l.Connected()
		time.Sleep(5 * time.Second)
		l.FirstByte()
		l.FirstByte()                 // later calls change nothing
		l.End(errors.New("too late")) // when the connection ends
		settle()
		got := fake.text()
		got = strings.ReplaceAll(got, strings.Repeat("!", maxText-len("no answer")), "!")
		want := `accept<login 1s
auth<login 2s
handshake<bastion task=t1 1s error: no answer!
bastion<login 1s
first byte<login 5s
login< user=alice profile=default conn=ref1 client=192.0.2.1:4711 9s`
		if got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
	})
}

// TestEnds: traces that have no first byte.
func TestEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracer, fake, _ := newTestTracer(t, 1)
		begin := func(conn string) *Login {
			l := tracer.Login(time.Now(), "auth", conn, client)
			time.Sleep(time.Second)
			return l
		}
		failed := begin("failed")
		failed.Proven(t.Context(), "alice", "\xff")
		failed.End(errors.New("no capacity \xc3"))
		// A login that opens no channel ends with the bastion's connection, and not with its own.
		idle := begin("idle")
		idle.Proven(t.Context(), "alice", "default")
		idle.Connected()
		time.Sleep(time.Hour)
		idle.End(nil)
		refused := begin("refused")
		refused.Refused(errors.New("no role"), true)
		refused.End(nil)
		stranger := begin("stranger")
		stranger.Refused(errors.New("no key of hunter2"), false)
		var none *Login // without a Tracer
		none.Phase("x")
		none.Refused(nil, true)
		none.Connected()
		none.FirstByte()
		none.End(nil)
		settle()
		want := `auth<login 1s
login< user=alice profile=? conn=failed client=192.0.2.1:4711 1s error: no capacity ?
auth<login 1s
login< user=alice profile=default conn=idle client=192.0.2.1:4711 1s
auth<login 1s error: no role
login< conn=refused client=192.0.2.1:4711 1s error: no role
auth<login 1s error: no user was proven
login< conn=stranger client=192.0.2.1:4711 1s error: no user was proven`
		if got := fake.text(); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
	})
}

// TestStrangersAreBounded: refused logins that anyone can cause have few traces, and leave
// those of users alone.
func TestStrangersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracer, fake, _ := newTestTracer(t, 1)
		for range 1000 {
			tracer.Login(time.Now(), "auth", "stranger", client).Refused(errors.New("no such key"), false)
		}
		l := tracer.Login(time.Now(), "auth", "user", client)
		l.Proven(t.Context(), "alice", "default")
		l.End(nil)
		settle()
		text := fake.text()
		if n := strings.Count(text, "conn=stranger"); n != refusedBurst || !strings.Contains(text, "conn=user") {
			t.Errorf("%d traces of strangers, in\n%s", n, text)
		}
	})
}

// TestSample: a login that is not sampled has no spans at all.
func TestSample(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracer, fake, _ := newTestTracer(t, 0.5)
		const logins = 400
		for range logins {
			l := tracer.Login(time.Now(), "auth", "x", client)
			ctx := l.Proven(t.Context(), "alice", "default")
			_, end := Start(ctx, "bastion")
			end(nil)
			l.Connected()
			l.FirstByte()
		}
		settle()
		traces := map[string]int{}
		for _, s := range fake.spans {
			traces[string(s.TraceId)]++
		}
		for id, n := range traces {
			if n != 4 {
				t.Errorf("trace %x has %d spans", id, n)
			}
		}
		// Fewer than 100 or more than 300 of 400 have a probability below 1e-20.
		if len(traces) < logins/4 || len(traces) > logins*3/4 {
			t.Errorf("%d of %d logins are traced", len(traces), logins)
		}
	})
}

// TestCollectorHangs: a collector that does not answer delays no login and fills no memory.
func TestCollectorHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracer, fake, log := newTestTracer(t, 1)
		fake.hangs = true
		began := time.Now()
		const spans = 20 * maxQueued
		for range spans / 2 {
			l := tracer.Login(time.Now(), "auth", "x", client)
			l.Proven(t.Context(), "alice", "default")
			l.End(nil)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("logins have waited for %v", took)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if n := strings.Count(log.String(), "traces cannot be sent"); n < 2 || n > 6 {
			t.Errorf("%d lines of log:\n%s", n, log)
		}
		// It answers again: at most the queue had been kept.
		fake.mu.Lock()
		fake.hangs = false
		fake.mu.Unlock()
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if n := len(fake.spans); n > maxQueued {
			t.Errorf("%d spans were kept", n)
		}
		l := tracer.Login(time.Now(), "auth", "afterwards", client)
		l.Proven(t.Context(), "alice", "default")
		l.End(nil)
		settle()
		if !strings.Contains(fake.text(), "conn=afterwards") || fake.largest > maxBatch {
			t.Errorf("the collector works again, and has the spans\n%s", fake.text())
		}
	})
}

// TestClose sends the spans that wait, and is bounded.
func TestClose(t *testing.T) {
	for _, hangs := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			tracer, fake, _ := newTestTracer(t, 1)
			fake.hangs = hangs
			for range maxQueued / 4 {
				l := tracer.Login(time.Now(), "auth", "x", client)
				l.Proven(t.Context(), "alice", "default")
				l.End(nil)
			}
			began := time.Now()
			tracer.Close()
			synctest.Wait()
			if took := time.Since(began); took > closeTimeout || !hangs && (took != 0 || len(fake.spans) != maxQueued/2) {
				t.Errorf("after %v, the collector has %d spans", took, len(fake.spans))
			}
		})
	}
}

// TestStatus: answers other than 200 are failures.
func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracer, fake, log := newTestTracer(t, 1)
		fake.status = 503
		l := tracer.Login(time.Now(), "auth", "x", client)
		l.Proven(t.Context(), "alice", "default")
		l.End(nil)
		settle()
		if !strings.Contains(log.String(), "Service Unavailable") {
			t.Errorf("log %q", log)
		}
	})
}

// TestOff: without an endpoint, tracing a login allocates nothing.
func TestOff(t *testing.T) {
	tracer := New(Options{}, "", "x", slog.New(slog.DiscardHandler))
	if n := testing.AllocsPerRun(100, func() { traceLogin(t.Context(), tracer) }); tracer != nil || n != 0 {
		t.Errorf("%v allocations", n)
	}
	tracer.Close()
}

// traceLogin makes the calls of a login to a running bastion.
func traceLogin(ctx context.Context, tracer *Tracer) {
	l := tracer.Login(time.Time{}, "accept", "ref", client)
	l.Phase("key exchange")
	l.Phase("auth")
	ctx = l.Proven(ctx, "alice", "default")
	ctx, end := Start(ctx, "bastion")
	_, endInner := Start(ctx, "handshake", "task", "t1")
	endInner(nil)
	end(nil)
	l.Connected()
	l.FirstByte()
	l.End(nil)
}

func BenchmarkLogin(b *testing.B) {
	on := newTracer(Options{Endpoint: "http://127.0.0.1:4318/v1/traces", Sample: 1}, "", "x", &fakeCollector{status: 200}, slog.New(slog.DiscardHandler))
	defer on.Close()
	for name, tracer := range map[string]*Tracer{"off": nil, "on": on} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				traceLogin(b.Context(), tracer)
			}
		})
	}
}
