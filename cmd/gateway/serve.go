package main

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/daemon"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
)

type serveCmd struct {
	Config string `default:"/etc/sallyport/gateway.yaml" placeholder:"FILE" help:"The configuration file, or ssm:NAME or secretsmanager:NAME (default /etc/sallyport/gateway.yaml)."`
}

// Run serves until SIGTERM or SIGINT.
func (c *serveCmd) Run(ctx context.Context, s streams) error {
	cfg, err := daemon.LoadConfig(ctx, c.Config, "")
	if err != nil {
		return err
	}
	if err := daemon.MakeCopies(ctx, cfg); err != nil {
		return err
	}
	sockets, err := openSockets(ctx, cfg)
	if err != nil {
		return err
	}
	defer sockets.close()
	return serve(ctx, c.Config, cfg, sockets, s)
}

// serve runs a gateway on the sockets, which it closes, until ctx ends. cfg was read from
// path, which is read again at SIGHUP; an empty path means that there is none.
func serve(ctx context.Context, path string, cfg *config.Gateway, sockets *sockets, s streams) error {
	// If the reader of standard error or standard output goes away, the gateway
	// goes on without. SIGPIPE is caught and not ignored, because bastions would
	// inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	// Before anything that takes time: until then these end the process.
	hangups, upgrades := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	if path != "" {
		signal.Notify(upgrades, syscall.SIGUSR2)
		defer signal.Stop(upgrades)
	}

	log := oplog.New(s.err)
	d, err := daemon.New(ctx, cfg, s.out, log)
	if err != nil {
		return err
	}
	defer d.Close()
	d.ConfigFile, d.Hangups, d.Version = path, hangups, version()
	d.API = listeners(sockets.api)
	for _, socket := range sockets.monitoring { // at most one
		d.Monitoring = socket
	}
	manager := &serviceManager{log: log, predecessor: sockets.predecessor}
	d.Notify = manager.notify

	serving, end := context.WithCancel(ctx)
	var upgrading sync.WaitGroup
	upgrading.Go(func() { upgrade(serving, upgrades, sockets, d, manager) })
	err = d.Serve(ctx, listeners(sockets.ssh)...)
	end()
	upgrading.Wait()
	return err
}

// upgrade hands the gateway over to a successor when it receives a signal. If no successor
// can be started, the gateway goes on. It returns after a hand-over, or when ctx ends.
func upgrade(ctx context.Context, signals <-chan os.Signal, sockets *sockets, d *daemon.Daemon, manager *serviceManager) {
	for {
		select {
		case <-signals:
		case <-ctx.Done():
			return
		}
		if d.Draining() {
			manager.log.Error("the successor was not started, because this gateway drains")
			continue
		}
		manager.log.Info("starting the successor")
		pid, err := sockets.startSuccessor(ctx)
		if err != nil {
			manager.log.Error("the successor did not start; this gateway goes on", "err", err)
			continue
		}
		manager.log.Info("handed over to the successor", "pid", pid)
		manager.handOver(pid)
		d.HandOver()
		return
	}
}
