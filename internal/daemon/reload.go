package daemon

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/console"
)

// ownKeys is for [console.Console.OwnKeys].
func (d *Daemon) ownKeys() console.Keys {
	if keys := d.keys.Load(); keys.SelfService != "" {
		return keys
	}
	return nil
}

// refreshInterval is the time after which changes in AWS take effect, about.
const refreshInterval = time.Minute

// followConfig reopens the audit log, whose file log rotation has moved, and reloads
// the configuration, at each SIGHUP until ctx ends. It also follows changes in AWS.
// While the gateway drains it does not reload: the configuration is its successor's.
func (d *Daemon) followConfig(ctx context.Context) {
	for {
		select {
		case <-d.Hangups:
			d.hangup(ctx)
		case <-time.After(refreshInterval*3/4 + rand.N(refreshInterval/2)):
			d.refresh(ctx)
		case <-ctx.Done():
			return
		}
	}
}

func (d *Daemon) hangup(ctx context.Context) {
	if d.events != nil {
		if err := d.events.Reopen(); err != nil {
			d.log.Error("cannot reopen the audit log; continuing in the old file", "err", err)
		} else {
			d.log.Info("audit log reopened")
		}
	}
	if d.ConfigFile == "" || d.Draining() {
		return
	}
	d.notify("RELOADING=1")
	d.notReloaded(safely(func() error { return d.reload(ctx) }))
	d.notify("READY=1")
}

// notReloaded logs the mistakes that have prevented a reload, if err is not nil.
func (d *Daemon) notReloaded(err error) {
	if err == nil {
		return
	}
	mistakes := config.Mistakes{err}
	errors.As(err, &mistakes)
	for _, mistake := range mistakes {
		d.log.Error("mistake in the configuration", "err", mistake)
	}
	d.log.Error("configuration not reloaded; the old one stays in force", "config", d.ConfigFile, "mistakes", len(mistakes))
}

// refresh reloads a configuration in AWS if it has changed, and brings the copies of
// texts in AWS up to date. It logs a failure once, until there is another one or none.
func (d *Daemon) refresh(ctx context.Context) {
	if config.IsReference(d.ConfigFile) && !d.Draining() {
		err := safely(func() error { return d.reloadChanged(ctx) })
		if d.refreshFailed[0].changes(err) {
			d.notReloaded(err)
		}
	}
	var problems []error
	for _, c := range d.parts.cfg.Copies { // one that fails does not delay the others
		problems = append(problems, safely(func() error { return makeCopies(ctx, []config.Copy{c}, d.texts) }))
	}
	err := errors.Join(problems...)
	if changed := d.refreshFailed[1].changes(err); changed && err != nil {
		d.log.Error("cannot read keys or lists from AWS; the last ones stay in force", "err", err)
	} else if changed {
		d.log.Info("keys and lists in AWS can be read again")
	}
}

func (d *Daemon) reloadChanged(ctx context.Context) error {
	reading, cancel := context.WithTimeout(ctx, awsTimeout)
	defer cancel()
	text, err := d.texts.read(reading, d.ConfigFile)
	if err != nil {
		return fmt.Errorf("reading the configuration: %s: %w", d.ConfigFile, err)
	}
	if sha256.Sum256(text.Text) == d.parts.cfg.Digest {
		return nil
	}
	return d.reload(ctx)
}

// A failure is the last failure of a task that is repeated; empty if there was none.
type failure string

// changes reports whether err differs from the last failure, which it replaces.
func (f *failure) changes(err error) bool {
	before := *f
	*f = ""
	if err != nil {
		*f = failure(err.Error())
	}
	return *f != before
}

// reload puts the configuration into force, or returns all its mistakes and
// changes nothing.
func (d *Daemon) reload(ctx context.Context) error {
	reading, cancel := context.WithTimeout(ctx, awsTimeout)
	defer cancel()
	cfg, err := config.Reload(d.ConfigFile, d.texts.forConfig(reading, ""), d.parts.cfg)
	if err != nil {
		return err
	}
	if err := makeCopies(ctx, cfg.Copies, d.texts); err != nil {
		return err
	}
	next, err := assemble(cfg, d.cloud, d.table, d.parts, d.log)
	if err != nil {
		return err
	}
	// The dialer first: the new settings let users ask for new profiles.
	d.dialer.Reload(next.dialerSettings())
	d.server.Reload(d.serverSettings(next))
	if d.api != nil {
		d.api.Reload(d.apiSettings(next))
	}
	if err := d.use(next); err != nil {
		return err
	}
	d.log.Info("configuration reloaded", "config", d.ConfigFile)
	warnOfCertificates(cfg, d.log)
	return nil
}

// warnOfCertificates logs the host certificates that clients do not accept. They
// are not an error: clients may know the key itself.
func warnOfCertificates(cfg *config.Gateway, log *slog.Logger) {
	for _, problem := range cfg.CertificateProblems(time.Now()) {
		log.Warn("clients do not accept a host certificate", "err", problem)
	}
}
