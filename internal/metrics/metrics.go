// Package metrics describes a gateway to Prometheus. docs/metrics.md lists the metrics.
//
// Counts that the parts of a gateway keep are read for each scrape, see [State]. Other
// results are reported by the functions of [Metrics]. No label holds a user's name or other
// text of a client, so that nobody but the operator can add time series.
package metrics

import (
	"errors"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// maxScrapes limits the requests that are answered at once. Each costs some milliseconds of
// CPU time if there are thousands of connections.
const maxScrapes = 2

// Metrics are those of one gateway. [New] makes them. Methods are safe for concurrent use.
type Metrics struct {
	registry      *prometheus.Registry
	starts        *prometheus.CounterVec
	startDuration *prometheus.HistogramVec
	ledger        *prometheus.HistogramVec
	aws           *prometheus.CounterVec
}

// New makes metrics, which call state for each scrape. It must not block.
func New(state func() State) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		starts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyport_bastion_starts_total",
			Help: "Starts of bastions that have succeeded or failed, by profile and result.",
		}, []string{"profile", "result"}),
		startDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "sallyport_bastion_start_duration_seconds",
			Help:    "Duration of starts of bastions that have succeeded.",
			Buckets: []float64{0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300},
		}, []string{"profile"}),
		ledger: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "sallyport_ledger_request_duration_seconds",
			Help:    "Duration of reads and changes of the ledger, with retries.",
			Buckets: []float64{0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10},
		}, []string{"operation", "result"}),
		aws: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyport_aws_requests_total",
			Help: "Requests to AWS, retries included.",
		}, []string{"service", "operation", "result"}),
	}
	m.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		stateCollector(state), m.starts, m.startDuration, m.ledger, m.aws,
	)
	return m
}

// Handler answers scrapes. The log receives its errors.
func (m *Metrics) Handler(log *slog.Logger) http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: maxScrapes,
	})
}

// Profiles makes the time series of these profiles, so that the first failed start of one
// is an increase from zero.
func (m *Metrics) Profiles(names ...string) {
	for _, name := range names {
		m.startDuration.WithLabelValues(name)
		m.starts.WithLabelValues(name, "ok")
		for _, reason := range startFailures {
			m.starts.WithLabelValues(name, reason.result)
		}
	}
}

// BastionEvent counts the outcome of a start; it ignores other events.
func (m *Metrics) BastionEvent(e bastion.Event) {
	switch e.Kind {
	case bastion.Started:
		m.starts.WithLabelValues(e.Owner.Profile, "ok").Inc()
		m.startDuration.WithLabelValues(e.Owner.Profile).Observe(e.Took.Seconds())
	case bastion.Failed:
		m.starts.WithLabelValues(e.Owner.Profile, startFailure(e.Err)).Inc()
	}
}

// startFailures has the result for each reason of a failed start. The first that fits
// counts: an ErrTimeout wraps the cause of the delay, and an ErrGone the reason of the end.
var startFailures = []struct {
	is     error
	result string
}{
	{bastion.ErrCapacity, "capacity"},
	{bastion.ErrQuota, "quota"},
	{bastion.ErrBusy, "throttled"},
	{bastion.ErrImage, "image"},
	{bastion.ErrSecrets, "secrets"},
	{bastion.ErrDenied, "denied"},
	{bastion.ErrConfig, "config"},
	{bastion.ErrPlatform, "platform"},
	{bastion.ErrNoAccount, "no_account"},
	{bastion.ErrMemory, "memory"},
	{bastion.ErrHostKey, "host_key"},
	{bastion.ErrNoAnswer, "no_answer"},
	{bastion.ErrLedger, "ledger"},
	{bastion.ErrTimeout, "timeout"},
	{bastion.ErrGone, "ended"},
	{nil, "other"},
}

func startFailure(err error) string {
	for _, reason := range startFailures {
		if reason.is == nil || errors.Is(err, reason.is) {
			return reason.result
		}
	}
	return ""
}

// LedgerCall records a call of the ledger: the operation is "get" or "swap".
func (m *Metrics) LedgerCall(operation string, took time.Duration, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.ledger.WithLabelValues(operation, result).Observe(took.Seconds())
}

// AWSRequest counts a request to AWS. The arguments are names in the SDK, and constants.
func (m *Metrics) AWSRequest(service, operation, result string) {
	m.aws.WithLabelValues(service, operation, result).Inc()
}
