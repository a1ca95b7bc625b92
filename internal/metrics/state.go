package metrics

import (
	"fmt"
	"runtime"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

// A State has the counts that a gateway keeps by itself.
type State struct {
	Version         string
	Ready, Draining bool // as /readyz answers
	Gateway         gateway.Stats
	Bastions        map[string]bastion.Counts // by profile
	Audit           *audit.Stats              // nil if there is no audit log
}

// A stateCollector collects the metrics of a State.
type stateCollector func() State

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("sallyport_"+name, help, labels, nil)
}

var (
	buildInfo = desc("build_info", "The version of the gateway, and of Go. The value is 1.", "version", "goversion")
	ready     = desc("ready", "Whether the gateway accepts logins, as /readyz says: 1 or 0.")
	draining  = desc("draining", "Whether the gateway leaves service: 1 or 0.")

	connections = desc("connections", "Open connections of clients, by state.", "state")
	accepted    = desc("connections_accepted_total", "Connections that were accepted, also those of port scanners and health checks.")
	rejected    = desc("connections_rejected_total", "Connections that were rejected before a login, by reason.", "reason")
	logins      = desc("logins_total", "Logins, by protocol and result.", "protocol", "result")
	channels    = desc("channels", "Open channels of relayed connections, by type.", "type")
	relayed     = desc("relayed_bytes_total", "Data and stderr in the channels of relayed connections, by direction.", "direction")

	bastions = desc("bastions", "Bastions that this gateway is starting, or that run as far as it knows.", "profile", "state")

	auditEvents  = desc("audit_events_total", "Events that were written to the audit log.")
	auditLost    = desc("audit_lost_events_total", "Events that could not be written to the audit log.")
	auditQueue   = desc("audit_queue_events", "Events that wait to be written to the audit log; at most 1024.")
	auditFailing = desc("audit_failing", "Whether the last write of the audit log has failed: 1 or 0.")
	auditFree    = desc("audit_free_bytes", "Space for the audit log in its file system, with the reserve.")
)

// Describe implements [prometheus.Collector].
func (stateCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		buildInfo, ready, draining, connections, accepted, rejected, logins, channels, relayed, bastions,
		auditEvents, auditLost, auditQueue, auditFailing, auditFree,
	} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector]. A panic becomes an error of the scrape, because
// it would end the process.
func (state stateCollector) Collect(ch chan<- prometheus.Metric) {
	defer func() {
		if p := recover(); p != nil {
			ch <- prometheus.NewInvalidMetric(buildInfo, fmt.Errorf("panic: %v", p))
		}
	}()
	s := state()
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	counter := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, value, labels...)
	}
	gauge(buildInfo, 1, s.Version, runtime.Version())
	gauge(ready, number(s.Ready))
	gauge(draining, number(s.Draining))
	for state, n := range s.Gateway.Connections {
		gauge(connections, float64(n), state)
	}
	counter(accepted, float64(s.Gateway.Accepted))
	for reason, n := range s.Gateway.Rejected {
		counter(rejected, float64(n), reason)
	}
	for login, n := range s.Gateway.Logins {
		counter(logins, float64(n), login.Protocol, login.Result)
	}
	for kind, n := range s.Gateway.Channels {
		gauge(channels, float64(n), kind)
	}
	counter(relayed, float64(s.Gateway.FromClients), "from_client")
	counter(relayed, float64(s.Gateway.ToClients), "to_client")
	for profile, n := range s.Bastions {
		gauge(bastions, float64(n.Starting), profile, "starting")
		gauge(bastions, float64(n.Running), profile, "running")
	}
	if s.Audit == nil {
		return
	}
	counter(auditEvents, float64(s.Audit.Written))
	counter(auditLost, float64(s.Audit.Lost))
	gauge(auditQueue, float64(s.Audit.Queued))
	gauge(auditFailing, number(s.Audit.Failing))
	if s.Audit.Free >= 0 {
		gauge(auditFree, float64(s.Audit.Free))
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
