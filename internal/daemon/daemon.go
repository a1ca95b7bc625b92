// Package daemon makes a gateway of a configuration and runs it. It is the one
// place where launchers, dialer, ledger, key sources, second factor, roles,
// penalties, audit log, recordings and console are joined to the server, so that
// no command can leave one out.
package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/api"
	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/console"
	"github.com/sallyport-ssh/sallyport/internal/dynamo"
	"github.com/sallyport-ssh/sallyport/internal/fargate"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/metrics"
	"github.com/sallyport-ssh/sallyport/internal/revoked"
	"github.com/sallyport-ssh/sallyport/internal/tracing"
)

// A Daemon is a gateway with all parts that its configuration asks for. [New]
// makes it.
type Daemon struct {
	// ConfigFile is the path of the file that is read again at each hangup, or the
	// reference of a text in AWS, which is also read again every minute. Empty means
	// that there is none.
	ConfigFile string
	// Hangups receives SIGHUP. It may be nil.
	Hangups <-chan os.Signal
	// Version is that of the program. Other gateways show it.
	Version string
	// Monitoring accepts requests of health checks and for metrics. It may be nil. Serve closes it.
	Monitoring net.Listener
	// API accepts requests to the HTTP API. If it is empty, there is none.
	API []net.Listener
	// Notify, if not nil, receives the states of sd_notify(3): READY=1 when Serve
	// begins to accept, RELOADING=1 and READY=1 around a reload, STOPPING=1 when the
	// gateway begins to drain. It must not block.
	Notify func(state string)

	cloud  *fargate.Cloud // nil: no profile is on Fargate
	table  *dynamo.Table  // nil: no state is shared with other gateways
	server *gateway.Server
	users  *console.Console
	api    *api.Server // nil: there is none
	dialer *bastion.Dialer
	ledger *bastion.Folder // nil: the ledger is in memory, or the table
	events *audit.Log      // nil: there is no audit log
	log    *slog.Logger

	metrics *metrics.Metrics
	tracer  *tracing.Tracer // nil: logins are not traced

	drain    context.CancelFunc // ends the context draining
	draining context.Context    // has ended when the gateway leaves service

	closeSockets  context.CancelFunc // ends the context socketsClosed
	socketsClosed context.Context    // has ended when a successor has the sockets

	// The heartbeat in the table has these.
	id           string
	started      time.Time
	settingsHash atomic.Pointer[string] // of parts
	address      atomic.Pointer[string] // of the first listener, for other gateways; nil before Serve

	sshPort string // ":port" of the first listener; set by Serve
	fleet   *fleet // the gateways that share table
	revoked *revoked.List

	ledgerHealth, launcherHealth health

	parts *parts // in force; this and refreshFailed are of the goroutine of followConfig
	// refreshFailed are the failures of reloads and of copies.
	refreshFailed [2]failure
	texts         texts
	keys          atomic.Pointer[auth.Keys]      // of parts, for the console
	cfg           atomic.Pointer[config.Gateway] // of parts, for other gateways' logins and logins to them
}

// New makes a gateway of cfg, opens its audit log, and adopts the bastions that
// run. [MakeCopies] must have made the copies of cfg. An audit log to standard output
// goes to stdout. The caller closes the Daemon.
func New(ctx context.Context, cfg *config.Gateway, stdout io.Writer, log *slog.Logger) (_ *Daemon, err error) {
	d := &Daemon{id: gatewayID(), started: time.Now(), log: log}
	d.metrics = metrics.New(d.state)
	cloud, err := newCloud(ctx, cfg, d.metrics.AWSRequest, log)
	if err != nil {
		return nil, err
	}
	table, err := newTable(ctx, cfg, d.metrics.AWSRequest)
	if err != nil {
		return nil, err
	}
	parts, err := assemble(cfg, cloud, table, nil, log)
	if err != nil {
		return nil, err
	}
	if err := makeStateDir(cfg); err != nil {
		return nil, err
	}
	d.cloud, d.table, d.texts = cloud, table, newTexts(d.metrics.AWSRequest)
	d.fleet = newFleet(d)
	if err := d.use(parts); err != nil {
		return nil, err
	}
	warnOfCertificates(cfg, log)
	if err := d.readRevoked(ctx, cfg.StateDir); err != nil {
		return nil, err
	}

	recent := &console.Recent{}
	if d.events, err = openAudit(cfg, stdout, recent.Add, log); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.release()
		}
	}()
	if err := d.events.Write(audit.Event{Type: audit.GatewayStarted}); err != nil {
		return nil, err
	}
	// Local bastions are found by their files. Tasks of Fargate, and the host keys
	// that were pinned for them, must be remembered across a restart.
	var ledger bastion.Ledger = &bastion.Memory{}
	switch {
	case table != nil:
		ledger = table
	case cloud != nil:
		if d.ledger, err = bastion.OpenFolder(filepath.Join(cfg.StateDir, "ledger"), log); err != nil {
			return nil, err
		}
		ledger = d.ledger
	}
	d.dialer = &bastion.Dialer{
		Settings: parts.dialerSettings(),
		Ledger:   observedLedger{ledger, &d.ledgerHealth, d.metrics},
		Log:      log,
		Event:    func(e bastion.Event) { d.metrics.BastionEvent(e); d.events.Write(bastionEvent(e)) },
	}
	if table != nil {
		d.dialer.Starts = table
		d.dialer.Alone = d.alone
	}
	if cloud != nil {
		d.dialer.AfterSweep = func(ctx context.Context, owners map[bastion.Owner]bool) error {
			return cloud.DeleteUnusedGroups(ctx, owners, d.dialer.Launchers())
		}
	}
	switch err := d.dialer.Adopt(ctx); {
	case errors.Is(err, bastion.ErrConfig): // a retry would not help
		return nil, err
	case err != nil:
		log.Error("cannot adopt all running bastions; trying again soon", "err", err)
	}
	d.tracer = tracing.New(cfg.Tracing.Options, cfg.Deployment, d.id, log)
	d.server = &gateway.Server{
		Settings:   d.serverSettings(parts),
		Dial:       d.dialer.Dial,
		UsualStart: d.dialer.UsualStart,
		WhyEnded:   d.dialer.WhyEnded,
		Revoked:    d.revoked.Check,
		Audit:      d.events,
		Tracer:     d.tracer,
		Log:        log,
	}
	d.events.OnFailure(d.server.AuditFailed)

	d.draining, d.drain = context.WithCancel(context.WithoutCancel(ctx))
	d.socketsClosed, d.closeSockets = context.WithCancel(context.WithoutCancel(ctx))
	users := &console.Console{
		Gateway:  d.server,
		Bastions: d.dialer,
		Drain:    d.drain,
		Roles:    func(id identity.Identity) ([]string, bool) { return id.Permissions.Roles, id.Permissions.Admin },
		OwnKeys:  d.ownKeys,
		Revoked:  d.revoked,
		Log:      log,
	}
	if d.events != nil { // else no events reach recent
		users.Recent = recent
	}
	if table != nil {
		users.Fleet, users.ID = d.fleet, d.id
	}
	d.server.Console, d.users = users.Serve, users
	return d, nil
}

// serverSettings returns the settings of the server. Other gateways may log in if they
// share the table.
func (d *Daemon) serverSettings(parts *parts) gateway.Settings {
	s := parts.serverSettings()
	if d.table != nil {
		s.Peer = d.fleet.verify
	}
	return s
}

// use has the console and the heartbeat show the parts.
func (d *Daemon) use(parts *parts) error {
	hash, err := settingsHash(parts.cfg)
	if err != nil {
		return err
	}
	d.parts = parts
	d.keys.Store(parts.keys)
	d.cfg.Store(parts.cfg)
	d.settingsHash.Store(&hash)
	d.metrics.Profiles(slices.Collect(maps.Keys(parts.profiles))...)
	return nil
}

// Close writes the last event and closes the audit log and the ledger. No
// connection may be served any more.
func (d *Daemon) Close() {
	d.drain()
	d.events.Write(audit.Event{Type: audit.GatewayStopped})
	d.log.Info("stopped")
	d.release()
}

func (d *Daemon) release() {
	if d.ledger != nil {
		d.ledger.Close()
	}
	d.events.Close()
	d.tracer.Close()
}

// ServeConn serves one connection, until it has ended, and closes it.
func (d *Daemon) ServeConn(ctx context.Context, conn net.Conn) { d.server.ServeConn(ctx, conn) }

// Draining reports whether the gateway leaves service.
func (d *Daemon) Draining() bool { return d.draining.Err() != nil }

// HandOver closes the listeners, because a successor accepts from the same sockets, and
// drains the gateway. Logins that have begun go on.
func (d *Daemon) HandOver() {
	d.server.HandOver()
	d.closeSockets()
	d.drain()
}

// notify calls Notify, if it is set.
func (d *Daemon) notify(state string) {
	if d.Notify != nil {
		d.Notify(state)
	}
}

// Serve accepts connections from the listeners, which it closes, until ctx ends or
// an administrator drains the gateway. It returns when all connections have ended,
// and the starts of bastions that they have caused.
func (d *Daemon) Serve(ctx context.Context, listeners ...net.Listener) error {
	stop := context.AfterFunc(ctx, d.drain)
	defer stop()

	for _, ln := range listeners {
		d.log.Info("listening", "addr", ln.Addr().String())
	}
	if len(listeners) > 0 {
		address := reachable(listeners[0].Addr())
		d.address.Store(&address)
		d.sshPort = portOf(listeners[0].Addr())
	}

	var periodic sync.WaitGroup
	served, end := context.WithCancel(context.WithoutCancel(ctx))
	defer func() { d.drain(); end(); periodic.Wait() }()
	if len(d.API) > 0 {
		d.api = d.newAPI()
		periodic.Go(func() { d.serveAPI(d.draining) })
	}
	periodic.Go(func() { d.sweep(d.draining) })
	periodic.Go(func() { returnMemory(served) })
	periodic.Go(func() { d.followConfig(served) }) // this and the next two also while it drains
	periodic.Go(func() { d.protectOnECS(served) })
	periodic.Go(func() { d.refreshRevoked(served) })
	if d.table != nil {
		periodic.Go(func() { d.beat(served) })
	}
	if d.events != nil {
		periodic.Go(func() { d.retryAudit(served) })
	}
	if d.Monitoring != nil {
		periodic.Go(func() { d.serveMonitoring(served, d.Monitoring) })
	}
	defer context.AfterFunc(d.socketsClosed, func() {
		for _, ln := range listeners {
			ln.Close()
		}
	})()
	told := make(chan struct{})
	context.AfterFunc(d.draining, func() { defer close(told); d.notify("STOPPING=1") })
	defer func() { d.drain(); <-told }() // Serve may return at once when it drains
	d.notify("READY=1")

	drained, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	context.AfterFunc(d.draining, func() { time.AfterFunc(max(d.server.DrainTime(), time.Second), cancel) })
	err := d.server.Serve(d.draining, listeners...)
	d.drain() // if a listener has failed

	// The next gateway would have to repeat a start that is interrupted here. It
	// may use the rest of the time that connections have to end.
	if waitErr := d.dialer.Wait(drained); waitErr != nil {
		d.log.Warn("bastions are still starting", "err", waitErr)
	}
	return err
}
