package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/console"
	"github.com/sallyport-ssh/sallyport/internal/fargate"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
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
	return serve(ctx, cfg, listeners, s)
}

type checkCmd struct {
	Config string `required:"" placeholder:"FILE" help:"The configuration."`
	AWS    bool   `name:"aws" help:"Ask AWS, too, whether this gateway is permitted what its profiles need. Starts nothing."`
	question
}

// Run reads the configuration and everything it names.
func (c *checkCmd) Run(ctx context.Context, s streams) error {
	cfg, err := config.Load(c.Config)
	if err != nil {
		return err
	}
	problems := authKeys(cfg, nil).Check()
	if cfg.TOTPDir != "" {
		problems = append(problems, (&auth.TOTP{Dir: cfg.TOTPDir}).Problems()...)
	}
	log := slog.New(slog.DiscardHandler)
	if _, err := profiles(cfg, nil, log); err != nil {
		problems = append(problems, err)
	}
	if c.AWS {
		problems = append(problems, checkAWS(ctx, cfg, s.out))
	}
	if err := errors.Join(problems...); err != nil {
		return err
	}
	if c.As != "" || c.From != "" || c.To != "" || c.Profile != "" || len(c.Principal) > 0 || !c.At.IsZero() {
		return c.answer(s.out, c.Config, cfg)
	}
	_, err = fmt.Fprintf(s.out, "%s: ok\n", c.Config)
	return err
}

type totpCmd struct {
	Config string `required:"" placeholder:"FILE" help:"The configuration; it must have totp_dir."`
	User   string `arg:"" help:"Who is to be asked for a code from now on."`
}

// Run makes a secret for a user and prints it as apps want it.
func (c *totpCmd) Run(s streams) error {
	cfg, err := config.Load(c.Config)
	if err != nil {
		return err
	}
	if cfg.TOTPDir == "" {
		return fmt.Errorf("%s: there is no totp_dir; name a folder, and restart the gateway", c.Config)
	}
	text, err := (&auth.TOTP{Dir: cfg.TOTPDir}).Enroll(c.User, "Sallyport")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(s.out, text)
	return err
}

// checkAWS says on out what AWS permits, and returns what it does not.
func checkAWS(ctx context.Context, cfg *config.Gateway, out io.Writer) error {
	cloud, err := newCloud(ctx, cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	kinds, err := profiles(cfg, cloud, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil // said before
	}
	var problems []error
	for _, name := range slices.Sorted(maps.Keys(kinds)) {
		launcher, ok := kinds[name].Launcher.(*fargate.Launcher)
		if !ok {
			continue
		}
		who, findings, err := launcher.Check(ctx)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "profile %s, as %s:\n", name, who)
		for _, f := range findings {
			verdict := "permitted"
			switch {
			case errors.Is(f.Err, bastion.ErrDenied):
				verdict = "MISSING"
			case f.Err != nil:
				verdict = "FAILED"
			case f.Unseen != "":
				verdict = f.Unseen
			}
			fmt.Fprintf(out, "  %-36s %s\n", f.Action, verdict)
			if f.Err != nil {
				problems = append(problems, fmt.Errorf("profile %s: %s: %w", name, f.Action, f.Err))
			}
		}
	}
	return errors.Join(problems...)
}

// newCloud returns the way to AWS, or nil if no profile needs it.
func newCloud(ctx context.Context, cfg *config.Gateway, log *slog.Logger) (*fargate.Cloud, error) {
	for _, p := range cfg.Profiles {
		if p.Launcher != "fargate" {
			continue
		}
		aws, err := fargate.Load(ctx)
		if err != nil {
			return nil, err
		}
		cloud := fargate.NewCloud(aws, cfg.Deployment, cfg.FleetKey.PublicKey())
		cloud.Log = log
		return cloud, nil
	}
	return nil, nil
}

// serve runs a gateway on the listeners, which it closes, until ctx ends.
func serve(ctx context.Context, cfg *config.Gateway, listeners []net.Listener, s streams) error {
	log := oplog.New(s.err)
	// The first of all, since until then it would end the process.
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	ctx, drain := context.WithCancel(ctx)
	defer drain()
	cloud, err := newCloud(ctx, cfg, log)
	if err != nil {
		return err
	}
	kinds, err := profiles(cfg, cloud, log)
	if err != nil {
		return err
	}
	recent := &console.Recent{}
	events, err := openAudit(cfg, s.out, recent.Add, log)
	if err != nil {
		return err
	}
	defer events.Close()
	if err := events.Write(audit.Event{Type: audit.GatewayStarted}); err != nil {
		return err
	}
	// What runs on this machine can be found by looking. What runs elsewhere is
	// to be remembered across a restart, with the host keys it has shown.
	var ledger bastion.Ledger = &bastion.Memory{}
	if cloud != nil {
		folder, err := bastion.OpenFolder(filepath.Join(cfg.StateDir, "ledger"), log)
		if err != nil {
			return err
		}
		defer folder.Close()
		ledger = folder
	}
	dialer := &bastion.Dialer{
		Ledger:   ledger,
		Profiles: kinds,
		FleetKey: cfg.FleetKey,

		StartsPerUser: bastion.StartRate(cfg.StartsPerUser),

		WrapConn: func(nc net.Conn) net.Conn { return wire.New(nc) },
		Log:      log,
		Event:    func(e bastion.Event) { events.Write(bastionEvent(e)) },
	}
	switch err := dialer.Adopt(ctx); {
	case errors.Is(err, bastion.ErrConfig): // which time does not mend
		return err
	case err != nil:
		log.Error("cannot adopt all bastions that run; trying again soon", "err", err)
	}
	var loops sync.WaitGroup // what goes on beside the connections
	untilEnd, end := context.WithCancel(context.WithoutCancel(ctx))
	defer func() { drain(); end(); loops.Wait() }()
	loops.Go(func() { tidy(ctx, dialer, log) })
	loops.Go(func() { returnMemory(ctx) })
	loops.Go(func() { reopenOnHangup(untilEnd, hangups, events, log) }) // while it drains, too
	keys := authKeys(cfg, log)
	server := &gateway.Server{
		HostKeys:             cfg.HostKeys,
		Authorize:            keys.Authorize,
		Recheck:              keys.Recheck,
		Roles:                cfg.Roles,
		Dial:                 dialer.Dial,
		LoginGraceTime:       cfg.LoginGraceTime,
		MaxStartups:          gateway.Startups(cfg.MaxStartups),
		PerSourceMaxStartups: cfg.PerSourceMaxStartups,
		ProxyProtocolFrom:    cfg.ProxyProtocolFrom,
		MaxAuthTries:         cfg.MaxAuthTries,
		MaxSessions:          cfg.MaxSessions,
		MaxConnections:       cfg.MaxConnectionsPerUser,
		MaxMemory:            cmp.Or(cfg.MaxMemory, memoryBudget()) + ballastSize,
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

	if cfg.TOTPDir != "" {
		server.SecondFactor = &auth.TOTP{Dir: cfg.TOTPDir}
	}
	server.PerSourceNetBlockSize = gateway.NetBlockSize(cfg.PerSourceNetBlockSize)
	server.PerSourcePenalties = gateway.Penalties(cfg.PerSourcePenalties)
	server.PerSourcePenaltyExempt = cfg.PerSourcePenaltyExemptList
	server.Audit = events
	events.OnFailure(server.AuditFailed)
	server.Recordings, server.Record = recordings(cfg)
	server.RecordingsOptional = cfg.Recordings.OnError == config.Continue

	desk := &console.Console{
		Gateway:     server,
		Bastions:    dialer,
		Audit:       events,
		Drain:       drain,
		DrainTime:   cfg.Drain,
		MaxSessions: cfg.MaxSessions,
		Log:         log,
	}
	if cfg.Roles != nil {
		desk.Roles = func(id identity.Identity) ([]string, bool) { return id.Permissions.Roles, id.Permissions.Admin }
	}
	if events != nil { // else nothing feeds it
		desk.Recent = recent
	}
	server.Console = desk.Serve

	ballast := make([]byte, ballastSize)
	defer runtime.KeepAlive(ballast)

	for _, ln := range listeners {
		log.Info("listening", "addr", ln.Addr().String())
	}
	drained, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	context.AfterFunc(ctx, func() { time.AfterFunc(max(cfg.Drain, time.Second), cancel) })
	err = server.Serve(ctx, listeners...)
	drain() // in case that a listener has failed

	// A start that is interrupted here would have to be begun anew by the next
	// gateway. It gets what the connections have left of the time.
	if waitErr := dialer.Wait(drained); waitErr != nil {
		log.Warn("bastions are still starting", "err", waitErr)
	}
	events.Write(audit.Event{Type: audit.GatewayStopped})
	log.Info("stopped")
	return err
}

// tidy finds what has no use any more, and ends it, until ctx ends. It begins
// soon after the start: a listing of ECS may be late, and what the first one has
// missed is adopted then.
func tidy(ctx context.Context, dialer *bastion.Dialer, log *slog.Logger) {
	for wait := 10 * time.Second; ; wait = 9*time.Minute + rand.N(2*time.Minute) {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		err := safely(func() error {
			err := dialer.Sweep(ctx)
			var launchers []*fargate.Launcher
			for _, profile := range dialer.Profiles {
				if launcher, ok := profile.Launcher.(*fargate.Launcher); ok {
					launchers = append(launchers, launcher)
				}
			}
			if len(launchers) > 0 {
				err = errors.Join(err, launchers[0].Cloud.Sweep(ctx, launchers...))
			}
			return err
		})
		if err != nil && ctx.Err() == nil {
			log.Error("cannot tidy up everything; trying again in ten minutes", "err", err)
		}
	}
}

// safely calls what, and returns a panic in it as an error: what is done now and
// then, for nobody in particular, must not end everybody's connections.
func safely(what func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return what()
}

// authKeys is by what users get in; log may be nil.
func authKeys(cfg *config.Gateway, log *slog.Logger) *auth.Keys {
	return &auth.Keys{
		Dir:                     cfg.AuthorizedKeysDir,
		TrustedUserCAKeys:       cfg.TrustedUserCAKeys,
		AuthorizedPrincipalsDir: cfg.AuthorizedPrincipalsDir,
		RevokedKeys:             cfg.RevokedKeys,
		Command:                 cfg.AuthorizedKeysCommand,
		CommandUser:             cfg.AuthorizedKeysCommandUser,
		URL:                     cfg.AuthorizedKeysURL,
		LookupTimeout:           cfg.AuthorizedKeysTimeout,
		LookupCache:             cfg.AuthorizedKeysCache,
		LookupStale:             cfg.AuthorizedKeysStale,
		Log:                     log,
	}
}

// profiles makes the configured kinds of bastions. The cloud is for those on
// Fargate.
func profiles(cfg *config.Gateway, cloud *fargate.Cloud, log *slog.Logger) (map[string]bastion.Profile, error) {
	kinds := make(map[string]bastion.Profile)
	for name, p := range cfg.Profiles {
		if p.Launcher == "fargate" {
			kinds[name] = bastion.Profile{
				Launcher:     onFargate(name, p.Fargate, cloud, cfg.MaxSessions),
				Idle:         p.Idle,
				MaxLife:      p.MaxLife,
				StartTimeout: p.StartTimeout,
			}
			continue
		}
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

func onFargate(name string, f config.Fargate, cloud *fargate.Cloud, maxSessions int) *fargate.Launcher {
	l := &fargate.Launcher{
		Cloud:            cloud,
		Profile:          name,
		Cluster:          f.Cluster,
		TaskDefinition:   f.TaskDefinition,
		Container:        f.Container,
		Account:          f.Account,
		Subnets:          f.Subnets,
		SecurityGroups:   f.SecurityGroups,
		PublicIP:         f.PublicIP,
		Spot:             f.Spot,
		CPU:              f.CPU,
		Memory:           f.Memory,
		EphemeralStorage: f.EphemeralStorage,
		TaskRole:         f.TaskRole,
		PlatformVersion:  f.PlatformVersion,
		AcceptEnv:        f.AcceptEnv,
		MaxSessions:      maxSessions,
	}
	if f.Isolate {
		l.Isolate = &fargate.Isolation{Ingress: f.IngressFrom}
		for _, r := range f.Egress {
			l.Isolate.Egress = append(l.Isolate.Egress, fargate.Rule{Protocol: r.Protocol, From: int32(r.From), To: int32(r.To), Peer: r.Peer})
		}
	}
	return l
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
