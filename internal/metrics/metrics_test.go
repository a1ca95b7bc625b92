package metrics

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/fargate"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

var update = flag.Bool("update", false, "write the table of docs/metrics.md")

// full returns metrics that have a time series of each metric.
func full() *Metrics {
	m := New(func() State {
		return State{
			Version: "1.2.3", Ready: true, Gateway: new(gateway.Server).Stats(),
			Bastions: map[string]bastion.Counts{"default": {Starting: 1, Running: 2}},
			Audit:    &audit.Stats{Written: 3, Free: 4},
		}
	})
	m.Profiles("default")
	m.LedgerCall("get", time.Millisecond, nil)
	m.LedgerCall("swap", time.Second, errors.New("timeout"))
	m.AWSRequest("ECS", "RunTask", "throttled")
	return m
}

// ours returns the metrics whose names begin with sallyport_.
func ours(t *testing.T, m *Metrics) []*dto.MetricFamily {
	all, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(all, func(f *dto.MetricFamily) bool { return !strings.HasPrefix(f.GetName(), "sallyport_") })
}

// TestLint applies Prometheus' rules for names and help texts.
func TestLint(t *testing.T) {
	var names []string
	for _, f := range ours(t, full()) {
		names = append(names, f.GetName())
	}
	problems, err := testutil.GatherAndLint(full().registry, names...)
	if err != nil || len(names) < 15 {
		t.Fatalf("%d metrics, %v", len(names), err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// TestDocs compares the table of docs/metrics.md with the registry: go test
// ./internal/metrics -run TestDocs -update writes it.
func TestDocs(t *testing.T) {
	const page = "../../docs/metrics.md"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	table.WriteString("| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n")
	for _, f := range ours(t, full()) {
		var labels []string
		for _, l := range f.Metric[0].Label {
			labels = append(labels, "`"+l.GetName()+"`")
		}
		fmt.Fprintf(&table, "| `%s` | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ", "), f.GetHelp())
	}
	const begin, end = "<!-- BEGIN METRICS -->\n", "<!-- END METRICS -->"
	before, rest, ok := strings.Cut(string(text), begin)
	_, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		t.Fatalf("%s has no place for the table", page)
	}
	want := before + begin + table.String() + end + after
	if *update {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if string(text) != want {
		t.Errorf("%s does not have the metrics of the registry; run go test ./internal/metrics -run TestDocs -update", page)
	}

	// Each value of a label is on the page. Of AWS there are too many.
	for _, f := range ours(t, full()) {
		for _, m := range f.Metric {
			for _, l := range m.Label {
				switch l.GetName() {
				case "version", "goversion", "profile", "service", "operation":
					continue
				}
				if !strings.Contains(after, "`"+l.GetValue()+"`") {
					t.Errorf("%s does not explain %s=%q of %s", page, l.GetName(), l.GetValue(), f.GetName())
				}
			}
		}
	}
}

// TestStarts counts starts by the cause of their failure.
func TestStarts(t *testing.T) {
	m := full()
	owner := bastion.Owner{User: "alice", Profile: "default"}
	m.BastionEvent(bastion.Event{Kind: bastion.Started, Owner: owner, Took: 42 * time.Second})
	m.BastionEvent(bastion.Event{Kind: bastion.Stopped, Owner: owner})
	for _, err := range []error{
		fmt.Errorf("%w (5m): launching: %w", bastion.ErrTimeout, bastion.ErrCapacity),
		&bastion.GoneError{TaskID: "t", Why: bastion.ErrImage},
		&bastion.GoneError{TaskID: "t", Why: errors.New("exit status 1")},
		fmt.Errorf("%w (5m)", bastion.ErrTimeout),
		errors.New("panic in start"),
	} {
		m.BastionEvent(bastion.Event{Kind: bastion.Failed, Owner: owner, Err: err})
	}
	for result, want := range map[string]float64{"ok": 1, "capacity": 1, "image": 1, "ended": 1, "timeout": 1, "other": 1, "quota": 0} {
		if got := testutil.ToFloat64(m.starts.WithLabelValues("default", result)); got != want {
			t.Errorf("%s: %v, want %v", result, got, want)
		}
	}
	for _, f := range ours(t, m) {
		if f.GetName() != "sallyport_bastion_start_duration_seconds" {
			continue
		}
		if h := f.Metric[0].Histogram; h.GetSampleCount() != 1 || h.GetSampleSum() != 42 {
			t.Errorf("durations: %v", h)
		}
	}
}

// TestAWSRequests: each attempt of a call counts by its result, also those that the SDK
// repeats.
func TestAWSRequests(t *testing.T) {
	cloud := awsfake.New(nil)
	server := httptest.NewServer(cloud)
	t.Cleanup(func() { cloud.Close(); server.Close() })
	for _, v := range awsfake.Environ(server.URL) {
		name, value, _ := strings.Cut(v, "=")
		t.Setenv(name, value)
	}
	var faults atomic.Pointer[[]awsfake.Fault]
	cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
		left := *faults.Load()
		if len(left) == 0 {
			return awsfake.Fault{}
		}
		rest := left[1:]
		faults.Store(&rest)
		return left[0]
	}
	m := New(func() State { return State{} })
	cfg, err := fargate.Load(t.Context(), m.AWSRequest)
	if err != nil {
		t.Fatal(err)
	}
	list := func() error { // by a new Cloud, because listings are cached
		l := &fargate.Launcher{Cloud: fargate.NewCloud(cfg, "prod"), Profile: "default", Options: fargate.Options{Cluster: awsfake.Cluster}}
		_, err := l.List(t.Context())
		return err
	}
	faults.Store(&[]awsfake.Fault{awsfake.Throttled, awsfake.Throttled})
	if err := list(); err != nil {
		t.Fatal(err)
	}
	cloud.Deny("ecs:ListTasks", true)
	if err := list(); err == nil {
		t.Error("a listing without permission")
	}
	for result, want := range map[string]float64{"throttled": 2, "ok": 1, "error": 1} {
		if got := testutil.ToFloat64(m.aws.WithLabelValues("ECS", "ListTasks", result)); got != want {
			t.Errorf("%s: %v, want %v", result, got, want)
		}
	}
}

// TestPanic: a panic in a part of the gateway does not end the process, and the other
// metrics are answered.
func TestPanic(t *testing.T) {
	m := New(func() State { panic("a mistake") })
	m.AWSRequest("ECS", "RunTask", "ok")
	var said strings.Builder
	answer := httptest.NewRecorder()
	m.Handler(slog.New(slog.NewTextHandler(&said, nil))).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	if body := answer.Body.String(); answer.Code != 200 || !strings.Contains(body, "\nsallyport_aws_requests_total{") || strings.Contains(body, "sallyport_ready") {
		t.Errorf("%d\n%s", answer.Code, body)
	}
	if !strings.Contains(said.String(), "panic: a mistake") {
		t.Errorf("logged %q", said.String())
	}
}
