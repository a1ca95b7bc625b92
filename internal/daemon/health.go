package daemon

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/metrics"
)

const (
	// probeInterval is the least time between two probes of the same part, however
	// often /readyz is asked, and probeTimeout limits one.
	probeInterval = 10 * time.Second
	probeTimeout  = 5 * time.Second

	// ledgerFresh is the age up to which a success shows that the ledger works.
	// Heartbeats, which are calls of a shared ledger, are more frequent. Launchers are
	// called less often, and matter only if the ledger fails.
	ledgerFresh   = time.Minute
	launcherFresh = probeInterval

	// auditRetryInterval is the time between two attempts to write an audit log that
	// fails closed. See [audit.Log.Retry].
	auditRetryInterval = 10 * time.Second
)

// unhealthy returns the reason why the process should be replaced; empty if there is
// none.
func (d *Daemon) unhealthy() string {
	if d.server.AcceptStuck() {
		return "an accept loop is stuck"
	}
	return ""
}

// unready returns the reason why the gateway should get no new connections; empty if
// there is none. It does not block. The reason is public.
//
// A gateway without its ledger, or without its launchers, is ready: users log in to
// bastions that run, and all gateways would leave service together.
func (d *Daemon) unready() string {
	switch {
	case d.socketsClosed.Err() != nil:
		return "" // the successor answers the next request
	case d.Draining():
		return "draining"
	case d.events.Blocks():
		return "the audit log cannot be written"
	case !d.ledgerHealth.works(ledgerFresh, d.probeLedger, d.log) && !d.launcherHealth.works(launcherFresh, d.probeLaunchers, d.log):
		return "neither the ledger nor a launcher works"
	}
	return d.unhealthy()
}

// A health is that of the ledger, or of the launchers, by the result of the last call.
// The zero value is for a part without calls, which is taken to work.
type health struct {
	mu      sync.Mutex
	failing bool
	called  time.Time // when the last result came in
	probed  time.Time // when the last probe began
}

// observe records the result of a call, and reports whether a failure begins with it.
func (h *health) observe(err error) (begins bool) {
	if errors.Is(err, context.Canceled) {
		return false // the caller has ended
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	begins = err != nil && !h.failing
	h.failing, h.called = err != nil, time.Now()
	return begins
}

// works reports whether the last call has succeeded. If it has not, or is older than fresh,
// works starts a probe, whose result a later call returns.
func (h *health) works(fresh time.Duration, probe func(context.Context) error, log *slog.Logger) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	if (h.failing || now.Sub(h.called) > fresh) && now.Sub(h.probed) >= probeInterval {
		h.probed = now
		// Nothing waits for the probe: it only reads, and ends within probeTimeout.
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
			defer cancel()
			if err := safely(func() error { return probe(ctx) }); h.observe(err) {
				log.Warn("a probe for /readyz has failed", "err", err)
			}
		}()
	}
	return !h.failing
}

// probeLedger reads the entry of an owner that does not exist.
func (d *Daemon) probeLedger(ctx context.Context) error {
	_, err := d.dialer.Ledger.Get(ctx, bastion.Owner{User: "readyz", Profile: "readyz"})
	return err
}

// probeLaunchers returns nil if one launcher can list its tasks.
func (d *Daemon) probeLaunchers(ctx context.Context) error {
	var errs []error
	for _, launcher := range d.dialer.Launchers() {
		_, err := launcher.List(ctx)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// An observedLedger records the results and the durations of a ledger's calls.
type observedLedger struct {
	bastion.Ledger
	health  *health
	metrics *metrics.Metrics
}

// Get implements [bastion.Ledger].
func (l observedLedger) Get(ctx context.Context, owner bastion.Owner) (bastion.Entry, error) {
	began := time.Now()
	entry, err := l.Ledger.Get(ctx, owner)
	l.observe("get", began, err)
	return entry, err
}

// Swap implements [bastion.Ledger].
func (l observedLedger) Swap(ctx context.Context, owner bastion.Owner, old, new bastion.Entry) (bastion.Entry, error) {
	began := time.Now()
	entry, err := l.Ledger.Swap(ctx, owner, old, new)
	l.observe("swap", began, err)
	return entry, err
}

func (l observedLedger) observe(operation string, began time.Time, err error) {
	if errors.Is(err, bastion.ErrConflict) {
		err = nil // an answer like any other
	}
	l.health.observe(err)
	l.metrics.LedgerCall(operation, time.Since(began), err)
}

// retryAudit ends failures of an audit log that fails closed, until ctx ends.
func (d *Daemon) retryAudit(ctx context.Context) {
	tick := time.NewTicker(auditRetryInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if d.events.Blocks() {
				d.events.Retry()
			}
		case <-ctx.Done():
			return
		}
	}
}
