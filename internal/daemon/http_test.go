package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/metrics"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// A faultyLedger fails while down is set, and counts its calls.
type faultyLedger struct {
	bastion.Memory
	down  atomic.Bool
	calls atomic.Int32
}

func (l *faultyLedger) Get(ctx context.Context, owner bastion.Owner) (bastion.Entry, error) {
	l.calls.Add(1)
	if l.down.Load() {
		return bastion.Entry{}, errors.New("no route to host")
	}
	return l.Memory.Get(ctx, owner)
}

// A faultyLauncher fails while down is set, and counts its calls. It is for List only.
type faultyLauncher struct {
	bastion.Launcher
	down  atomic.Bool
	calls atomic.Int32
}

func (l *faultyLauncher) List(context.Context) ([]bastion.OwnedTask, error) {
	l.calls.Add(1)
	if l.down.Load() {
		return nil, errors.New("no route to host")
	}
	return nil, nil
}

// A brokenWriter fails while broken is set.
type brokenWriter struct{ broken atomic.Bool }

func (w *brokenWriter) Write(p []byte) (int, error) {
	if w.broken.Load() {
		return 0, errors.New("no space left on device")
	}
	return len(p), nil
}

// newMonitored returns a Daemon that has all that the monitoring server uses.
func newMonitored(t *testing.T, ledger *faultyLedger, launchers ...*faultyLauncher) *Daemon {
	d := &Daemon{server: &gateway.Server{}, log: slog.New(slog.DiscardHandler)}
	d.metrics = metrics.New(d.state)
	d.draining, d.drain = context.WithCancel(t.Context())
	d.socketsClosed, d.closeSockets = context.WithCancel(t.Context())
	t.Cleanup(func() { d.drain(); d.closeSockets() })
	profiles := map[string]bastion.Profile{}
	for i, launcher := range launchers {
		profiles[fmt.Sprint(i)] = bastion.Profile{Launcher: launcher}
	}
	d.dialer = &bastion.Dialer{Ledger: observedLedger{ledger, &d.ledgerHealth, d.metrics}, Settings: bastion.Settings{Profiles: profiles}}
	return d
}

// get returns status and body of an answer of the monitoring server.
func get(d *Daemon, method, path string) (int, string) {
	answer := httptest.NewRecorder()
	d.monitoringHandler(d.log).ServeHTTP(answer, httptest.NewRequest(method, path, nil))
	return answer.Code, answer.Body.String()
}

func wantReady(t *testing.T, d *Daemon, want int, reason string) {
	t.Helper()
	if code, body := get(d, "GET", "/readyz"); code != want || body != reason+"\n" {
		t.Errorf("/readyz: %d %q, want %d %q", code, body, want, reason)
	}
	if code, body := get(d, "GET", "/healthz"); code != 200 || body != "ok\n" {
		t.Errorf("/healthz: %d %q", code, body)
	}
}

// TestReadyWithout: a gateway is ready unless neither its ledger nor any of its launchers
// works, and again when one of them does.
func TestReadyWithout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ledger, first, second := &faultyLedger{}, &faultyLauncher{}, &faultyLauncher{}
		d := newMonitored(t, ledger, first, second)
		const neither = "neither the ledger nor a launcher works"
		for _, tt := range []struct {
			ledger, first, second bool // down
			want                  int
			reason                string
		}{
			{false, false, false, 200, "ok"},
			{true, false, false, 200, "ok"},
			{true, true, false, 200, "ok"},
			{true, true, true, 503, neither},
			{false, true, true, 200, "ok"},
			{true, true, true, 503, neither},
			{true, false, true, 200, "ok"},
		} {
			ledger.down.Store(tt.ledger)
			first.down.Store(tt.first)
			second.down.Store(tt.second)
			time.Sleep(ledgerFresh)
			for range 4 { // the first calls cause the probes
				get(d, "GET", "/readyz")
				time.Sleep(probeInterval)
				synctest.Wait()
			}
			wantReady(t, d, tt.want, tt.reason)
		}
	})
}

// TestProbes: however often /readyz is asked, a part is probed once in ten seconds at
// most; and not at all if other calls have shown that it works.
func TestProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ledger, launcher := &faultyLedger{}, &faultyLauncher{}
		d := newMonitored(t, ledger, launcher)
		const interval = 100 * time.Millisecond
		askFor := func(duration time.Duration) {
			for range duration / interval {
				get(d, "GET", "/readyz")
				time.Sleep(interval)
			}
		}
		d.ledgerHealth.observe(nil)
		askFor(ledgerFresh)
		if n := ledger.calls.Load() + launcher.calls.Load(); n != 0 {
			t.Errorf("%d probes while the ledger is known to work, want none", n)
		}
		ledger.down.Store(true)
		launcher.down.Store(true)
		d.ledgerHealth.observe(errors.New("timeout"))
		askFor(10 * time.Minute)
		for name, n := range map[string]int32{"ledger": ledger.calls.Load(), "launcher": launcher.calls.Load()} {
			if n < 50 || n > 61 {
				t.Errorf("%d probes of the %s in ten minutes, want 60", n, name)
			}
		}
		wantReady(t, d, 503, "neither the ledger nor a launcher works")
	})
}

// TestObserve: answers of a ledger that say no are answers, and a caller who gives up
// shows nothing.
func TestObserve(t *testing.T) {
	d := newMonitored(t, &faultyLedger{})
	ledger, owner := d.dialer.Ledger, bastion.Owner{User: "alice", Profile: "default"}
	if _, err := ledger.Swap(t.Context(), owner, bastion.Entry{Version: 7}, bastion.Entry{}); !errors.Is(err, bastion.ErrConflict) || d.ledgerHealth.failing {
		t.Errorf("a conflict (%v) is a failure", err)
	}
	d.ledgerHealth.observe(fmt.Errorf("GetItem: %w", context.Canceled))
	if d.ledgerHealth.failing {
		t.Error("a cancelled call is a failure")
	}
	if began := d.ledgerHealth.observe(errors.New("timeout")); !began || !d.ledgerHealth.failing {
		t.Error("a timeout is no failure")
	}
	if began := d.ledgerHealth.observe(errors.New("timeout")); began {
		t.Error("a failure begins twice")
	}
}

// TestReady: a gateway that drains is not ready, nor is one whose audit log fails closed.
func TestReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := &brokenWriter{}
		d := newMonitored(t, &faultyLedger{}, &faultyLauncher{})
		var err error
		if d.events, err = audit.Open(audit.Config{Stdout: disk, FailClosed: true, Log: d.log}); err != nil {
			t.Fatal(err)
		}
		defer d.events.Close()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go d.retryAudit(ctx)
		wantReady(t, d, 200, "ok")
		disk.broken.Store(true)
		d.events.Write(audit.Event{Type: audit.Login})
		time.Sleep(time.Minute)
		wantReady(t, d, 503, "the audit log cannot be written")
		disk.broken.Store(false) // no user comes, because the balancer sends none
		time.Sleep(auditRetryInterval)
		synctest.Wait()
		wantReady(t, d, 200, "ok")
		d.drain()
		wantReady(t, d, 503, "draining")
	})
}

// TestMonitoringPaths: other methods and paths get the answers of package http.
func TestMonitoringPaths(t *testing.T) {
	d := newMonitored(t, &faultyLedger{})
	for _, tt := range []struct {
		method, path string
		want         int
	}{
		{"HEAD", "/readyz", 200},
		{"POST", "/readyz", 405},
		{"DELETE", "/healthz", 405},
		{"GET", "/", 404},
		{"GET", "/readyz/x", 404},
	} {
		if code, body := get(d, tt.method, tt.path); code != tt.want {
			t.Errorf("%s %s: %d %q, want %d", tt.method, tt.path, code, body, tt.want)
		}
	}
}

// connect returns the client's end of a connection, on which data is sent.
func connect(t *testing.T, ln *sshtest.Listener, data string) net.Conn {
	client, err := ln.Dial()
	if err != nil {
		t.Error(err)
		return nil
	}
	io.WriteString(client, data)
	return client
}

const readyRequest = "GET /readyz HTTP/1.1\r\nHost: gateway\r\n\r\n"

// serveOn serves the requests of ln until stop is called.
func serveOn(t *testing.T, ln net.Listener) (stop func()) {
	return newMonitored(t, &faultyLedger{}).serveOn(t, ln)
}

func (d *Daemon) serveOn(t *testing.T, ln net.Listener) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { d.serveMonitoring(ctx, ln); close(ended) }()
	return func() { cancel(); <-ended }
}

// TestHandOverOfMonitoring: when a successor has the sockets, requests that this process
// has accepted are answered, not with the drain that begins, and no more are accepted.
func TestHandOverOfMonitoring(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newMonitored(t, &faultyLedger{})
		ln := sshtest.NewListener()
		stop := d.serveOn(t, ln)
		client := connect(t, ln, readyRequest[:10])
		synctest.Wait()
		d.HandOver()
		synctest.Wait()
		if _, err := ln.Dial(); err == nil {
			t.Error("a request after the hand-over is accepted")
		}
		ended := make(chan struct{})
		go func() { stop(); close(ended) }() // as a process without SSH connections does
		synctest.Wait()
		io.WriteString(client, readyRequest[10:])
		if answer, err := io.ReadAll(client); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200 ") {
			t.Errorf("a request from before is answered with %q (%v)", answer, err)
		}
		<-ended
	})
}

// TestStrangersOfMonitoring: connections that send nothing, or too much, end soon, and a
// health check is answered behind many of them.
func TestStrangersOfMonitoring(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := sshtest.NewListener()
		defer serveOn(t, ln)()
		greedy := "GET /readyz HTTP/1.1\r\nHost: gateway\r\nX: " + strings.Repeat("x", 3*maxMonitoringHeader) + "\r\n\r\n"
		if answer, _ := io.ReadAll(connect(t, ln, greedy)); !strings.HasPrefix(string(answer), "HTTP/1.1 431 ") {
			t.Errorf("a header of %d bytes is answered with %q", len(greedy), answer)
		}

		var accepted atomic.Int32
		for range 2 * maxMonitoringConns {
			go func() {
				connect(t, ln, "GET /readyz HTTP/1.1\r\n")
				accepted.Add(1)
			}()
		}
		synctest.Wait()
		if n := accepted.Load(); n != maxMonitoringConns {
			t.Errorf("of %d connections, %d are accepted, want %d", 2*maxMonitoringConns, n, maxMonitoringConns)
		}
		began := time.Now()
		answer, err := io.ReadAll(connect(t, ln, readyRequest))
		if took := time.Since(began); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200 ") || took > 3*monitoringRead {
			t.Errorf("behind %d slow clients: %q (%v) after %v", 2*maxMonitoringConns, answer, err, took)
		}
		if !strings.Contains(string(answer), "\r\nConnection: close\r\n") {
			t.Errorf("the connection is kept: %q", answer)
		}
	})
}

// TestBalancersHeader: a health check may begin with a PROXY header of either version, as
// one does if the header is enabled for the target group.
func TestBalancersHeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := sshtest.NewListener()
		defer serveOn(t, ln)()
		for name, header := range map[string]string{
			"no header":         "",
			"version 1":         "PROXY TCP4 192.0.2.1 192.0.2.2 1000 2222\r\n",
			"version 1 unknown": "PROXY UNKNOWN\r\n",
			"version 2, local":  "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00",
		} {
			if answer, err := io.ReadAll(connect(t, ln, header+readyRequest)); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200 ") {
				t.Errorf("%s: %q (%v)", name, answer, err)
			}
		}
		// A client that never sends anything is not kept.
		if answer, err := io.ReadAll(connect(t, ln, "")); len(answer) > 0 || err != nil {
			t.Errorf("a silent client is answered with %q (%v)", answer, err)
		}
	})
}
