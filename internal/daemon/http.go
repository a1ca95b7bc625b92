package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/pires/go-proxyproto"
	"golang.org/x/net/netutil"

	"github.com/sallyport-ssh/sallyport/internal/metrics"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
)

// The limits for clients of the monitoring server, which need no credentials.
const (
	maxMonitoringConns  = 64
	maxMonitoringHeader = 4 << 10 // bytes; package http adds as much
	monitoringRead      = 5 * time.Second
	monitoringWrite     = 10 * time.Second
)

// serveMonitoring answers requests until ctx ends or a successor has the sockets, and
// closes ln.
func (d *Daemon) serveMonitoring(ctx context.Context, ln net.Listener) {
	// Requests cause log lines, such as one about a semicolon in a query.
	limited := oplog.Limit{Bytes: 64 << 10, Per: time.Hour}.Handler(d.log.Handler())
	server := &http.Server{
		Handler:           d.monitoringHandler(slog.New(limited)),
		ReadHeaderTimeout: monitoringRead,
		ReadTimeout:       monitoringRead,
		WriteTimeout:      monitoringWrite,
		MaxHeaderBytes:    maxMonitoringHeader,
		ErrorLog:          slog.NewLogLogger(limited, slog.LevelWarn),
	}
	// An idle connection would occupy one of the few places.
	server.SetKeepAlivesEnabled(false)
	// Server.Shutdown would drop connections whose request it has not read.
	var open sync.WaitGroup
	server.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			open.Add(1)
		case http.StateClosed, http.StateHijacked:
			open.Done()
		}
	}
	defer context.AfterFunc(ctx, func() {
		if d.socketsClosed.Err() == nil {
			server.Close()
		}
	})()
	// A balancer that sends PROXY headers to the SSH port also begins its health checks
	// with one, wherever they connect to. Its address is of no interest.
	accepting := &proxyproto.Listener{
		Listener:          netutil.LimitListener(ln, maxMonitoringConns),
		ConnPolicy:        func(proxyproto.ConnPolicyOptions) (proxyproto.Policy, error) { return proxyproto.IGNORE, nil },
		ReadHeaderTimeout: monitoringRead,
	}
	defer context.AfterFunc(d.socketsClosed, func() { accepting.Close() })()
	d.log.Info("monitoring", "addr", ln.Addr().String())
	err := server.Serve(accepting)
	if d.socketsClosed.Err() != nil {
		open.Wait() // for the requests that this process has accepted
		return
	}
	if !errors.Is(err, http.ErrServerClosed) {
		d.log.Error("the monitoring server has ended", "err", err)
	}
}

// monitoringHandler has the paths of the monitoring server. Its requests may cause lines of
// the log.
func (d *Daemon) monitoringHandler(log *slog.Logger) http.Handler {
	paths := http.NewServeMux()
	paths.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { writeHealth(w, d.unhealthy()) })
	paths.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { writeHealth(w, d.unready()) })
	paths.Handle("GET /metrics", d.metrics.Handler(log))
	return paths
}

// state returns the counts for a scrape of the metrics.
func (d *Daemon) state() metrics.State {
	s := metrics.State{
		Version: d.Version, Ready: d.unready() == "", Draining: d.Draining(),
		Gateway: d.server.Stats(), Bastions: d.dialer.Counts(),
	}
	if d.events != nil {
		stats := d.events.Stats()
		s.Audit = &stats
	}
	return s
}

// writeHealth answers a health check: 503 with the reason, or 200 if that is empty.
func writeHealth(w http.ResponseWriter, reason string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if reason == "" {
		io.WriteString(w, "ok\n")
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
	io.WriteString(w, reason+"\n")
}
