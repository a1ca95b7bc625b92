package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/local"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
	"github.com/sallyport-ssh/sallyport/internal/wire"
)

type serveCmd struct {
	Config string `required:"" placeholder:"FILE" help:"The configuration."`
}

// Run serves until SIGTERM or SIGINT.
func (c *serveCmd) Run(ctx context.Context, s streams) error {
	cfg, err := config.Load(c.Config)
	if err != nil {
		return err
	}
	var listeners []net.Listener
	for _, addr := range cfg.Listen {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		defer ln.Close()
		listeners = append(listeners, ln)
	}
	return serve(ctx, cfg, listeners, s.err)
}

type checkCmd struct {
	Config string `required:"" placeholder:"FILE" help:"The configuration."`
}

// Run reads the configuration and everything it names.
func (c *checkCmd) Run(s streams) error {
	cfg, err := config.Load(c.Config)
	if err != nil {
		return err
	}
	problems := auth.Check(cfg.AuthorizedKeysDir)
	if _, err := profiles(cfg, slog.New(slog.DiscardHandler)); err != nil {
		problems = append(problems, err)
	}
	if err := errors.Join(problems...); err != nil {
		return err
	}
	_, err = fmt.Fprintf(s.out, "%s: ok\n", c.Config)
	return err
}

// serve runs a gateway on the listeners, which it closes, until ctx ends.
func serve(ctx context.Context, cfg *config.Gateway, listeners []net.Listener, stderr io.Writer) error {
	log := oplog.New(stderr)
	kinds, err := profiles(cfg, log)
	if err != nil {
		return err
	}
	dialer := &bastion.Dialer{
		Ledger:   &bastion.Memory{},
		Profiles: kinds,
		FleetKey: cfg.FleetKey,
		WrapConn: func(nc net.Conn) net.Conn { return wire.New(nc) },
		Log:      log,
	}
	if err := dialer.Adopt(ctx); err != nil {
		return err
	}
	keys := &auth.Keys{Dir: cfg.AuthorizedKeysDir, Log: log}
	server := &gateway.Server{
		HostKeys:             cfg.HostKeys,
		Authorize:            keys.Authorize,
		Dial:                 dialer.Dial,
		LoginGraceTime:       cfg.LoginGraceTime,
		MaxStartups:          gateway.Startups(cfg.MaxStartups),
		PerSourceMaxStartups: cfg.PerSourceMaxStartups,
		MaxAuthTries:         cfg.MaxAuthTries,
		MaxSessions:          cfg.MaxSessions,
		MaxConnections:       cfg.MaxConnectionsPerUser,
		ClientAliveInterval:  cfg.ClientAliveInterval,
		ClientAliveCountMax:  cfg.ClientAliveCountMax,
		Drain:                cfg.Drain,
		Ciphers:              cfg.Ciphers,
		MACs:                 cfg.MACs,
		KexAlgorithms:        cfg.KexAlgorithms,
		VersionAddendum:      cfg.VersionAddendum,
		Banner:               cfg.Banner,
		Log:                  log,
	}

	ballast := make([]byte, ballastSize)
	defer runtime.KeepAlive(ballast)

	for _, ln := range listeners {
		log.Info("listening", "addr", ln.Addr().String())
	}
	go returnMemory(ctx)
	err = server.Serve(ctx, listeners...)

	// A start that is interrupted here would have to be begun anew by the next
	// gateway.
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), max(cfg.Drain, time.Second))
	defer cancel()
	if waitErr := dialer.Wait(bounded); waitErr != nil {
		log.Warn("bastions are still starting", "err", waitErr)
	}
	log.Info("stopped")
	return err
}

// profiles makes the configured kinds of bastions.
func profiles(cfg *config.Gateway, log *slog.Logger) (map[string]bastion.Profile, error) {
	kinds := make(map[string]bastion.Profile)
	for name, p := range cfg.Profiles {
		if os.Geteuid() != 0 && p.Local.Account == "" {
			return nil, fmt.Errorf("profile %s: this gateway does not run as root, so every user would get the account that it runs as, which can read the fleet key; if that is meant, name the account in profiles.%s.local.account", name, name)
		}
		agent := p.Local.Agent
		if agent == "" {
			self, err := os.Executable()
			if err != nil {
				return nil, err
			}
			agent = filepath.Join(filepath.Dir(self), "bastion-agent")
		}
		if _, err := os.Stat(agent); err != nil {
			return nil, fmt.Errorf("profile %s: the program that is to run in its bastions: %w (it belongs beside the gateway; profiles.%s.local.agent can name another place)", name, err, name)
		}
		kinds[name] = bastion.Profile{
			Launcher: &local.Launcher{
				Dir:         filepath.Join(cfg.StateDir, "bastions"),
				Agent:       agent,
				FleetKey:    cfg.FleetKey.PublicKey(),
				Account:     p.Local.Account,
				AcceptEnv:   p.Local.AcceptEnv,
				MaxSessions: cfg.MaxSessions,
				Log:         log,
			},
			Idle:         p.Idle,
			MaxLife:      p.MaxLife,
			StartTimeout: p.StartTimeout,
		}
	}
	return kinds, nil
}

// ballastSize is of memory that is never touched, and so costs none, but that the
// garbage collector counts as in use. It collects when the heap has doubled; that
// of a gateway is a few MiB, and package ssh allocates each packet, so without it
// a busy connection would cause a hundred collections a second.
const ballastSize = 32 << 20

// returnMemory gives memory back to the system now and then. After a burst the
// runtime keeps about as much as it used then, which is a lot to hold for
// connections that have fallen silent; and the stacks that their key exchanges
// have grown are halved by each collection. More than one a minute would cost an
// idle gateway with thousands of connections more than all else it does.
func returnMemory(ctx context.Context) {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			debug.FreeOSMemory()
		case <-ctx.Done():
			return
		}
	}
}
