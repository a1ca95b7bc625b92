package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/dynamo"
	"github.com/sallyport-ssh/sallyport/internal/fargate"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/local"
	"github.com/sallyport-ssh/sallyport/internal/record"
)

// parts are made of one reading of the configuration; a reload replaces them.
type parts struct {
	cfg      *config.Gateway
	profiles map[string]bastion.Profile
	keys     *auth.Keys
	totp     *auth.TOTP // nil: no user is asked for a code
}

// assemble makes the parts of a gateway that cfg describes. Parts that cfg does not
// change are taken from before, which may be nil: launchers, key sources and used
// codes have state. cloud is for profiles on Fargate; table, which may be nil, is
// shared with other gateways.
func assemble(cfg *config.Gateway, cloud *fargate.Cloud, table *dynamo.Table, before *parts, log *slog.Logger) (*parts, error) {
	profiles, err := newProfiles(cfg, cloud, log)
	if err != nil {
		return nil, err
	}
	next := &parts{cfg: cfg, profiles: profiles, keys: newKeys(cfg, log)}
	if cfg.TOTPDir != "" {
		next.totp = &auth.TOTP{Dir: cfg.TOTPDir}
		if table != nil {
			next.totp.Codes = table
		}
		for _, problem := range next.totp.Problems() {
			log.Warn("totp_dir: ignoring a file", "err", problem)
		}
	}
	if err := next.keys.MakeOwn(); err != nil {
		return nil, err
	}
	if before == nil {
		next.keys.LogMisnamed()
		return next, nil
	}
	for name, profile := range profiles {
		if sameLauncher(name, cfg, before.cfg) {
			profile.Launcher = before.profiles[name].Launcher
			profiles[name] = profile
		}
	}
	if cfg.AuthorizedKeysDir == before.cfg.AuthorizedKeysDir && reflect.DeepEqual(cfg.Auth, before.cfg.Auth) {
		next.keys = before.keys
	} else {
		next.keys.LogMisnamed()
	}
	if next.totp != nil && before.totp != nil && next.totp.Dir == before.totp.Dir {
		next.totp = before.totp
	}
	return next, nil
}

// sameLauncher reports whether a and b describe the launcher of a profile alike.
// It compares every setting that newProfiles passes to a launcher.
func sameLauncher(profile string, a, b *config.Gateway) bool {
	p, ok := a.Profiles[profile]
	q, known := b.Profiles[profile]
	sameKey := func(k, l ssh.PublicKey) bool { return string(k.Marshal()) == string(l.Marshal()) }
	return ok && known && p.Launcher == q.Launcher && reflect.DeepEqual(p.Local, q.Local) && reflect.DeepEqual(p.Fargate, q.Fargate) &&
		a.MaxSessions == b.MaxSessions && a.MaxChannels == b.MaxChannels &&
		slices.EqualFunc(a.FleetPublicKeys(), b.FleetPublicKeys(), sameKey)
}

// newCloud returns access to AWS, or nil if no profile needs it.
func newCloud(ctx context.Context, cfg *config.Gateway, observed observer, log *slog.Logger) (*fargate.Cloud, error) {
	for _, p := range cfg.Profiles {
		if p.Launcher != "fargate" {
			continue
		}
		aws, err := fargate.Load(ctx, observed)
		if err != nil {
			return nil, err
		}
		cloud := fargate.NewCloud(aws, cfg.Deployment)
		cloud.Log = log
		return cloud, nil
	}
	return nil, nil
}

// newTable returns the table that is shared with other gateways, or nil.
func newTable(ctx context.Context, cfg *config.Gateway, observed observer) (*dynamo.Table, error) {
	if cfg.Ledger.Table == "" {
		return nil, nil
	}
	aws, err := fargate.Load(ctx, observed)
	if err != nil {
		return nil, err
	}
	return dynamo.New(aws, cfg.Ledger.Table, cfg.Deployment), nil
}

// newProfiles makes the profiles with their launchers.
func newProfiles(cfg *config.Gateway, cloud *fargate.Cloud, log *slog.Logger) (map[string]bastion.Profile, error) {
	profiles := make(map[string]bastion.Profile)
	for name, p := range cfg.Profiles {
		profile := bastion.Profile{ProfileOptions: p.ProfileOptions}
		if p.Launcher == "fargate" {
			profile.Launcher = newFargate(name, cfg, cloud)
		} else {
			launcher, err := newLocal(name, cfg, log)
			if err != nil {
				return nil, err
			}
			profile.Launcher = launcher
		}
		profiles[name] = profile
	}
	return profiles, nil
}

// makeStateDir makes the state_dir, and returns an error if this process cannot write to
// it. A gateway without local bastions may need none.
func makeStateDir(cfg *config.Gateway) error {
	for name, p := range cfg.Profiles {
		if p.Launcher == "fargate" {
			continue
		}
		err := os.MkdirAll(cfg.StateDir, 0o700)
		if err == nil {
			err = os.NewSyscallError("access", unix.Access(cfg.StateDir, unix.W_OK|unix.X_OK))
		}
		if err != nil {
			return fmt.Errorf("state_dir %s, which the bastions of profile %s need: %w", cfg.StateDir, name, err)
		}
		return nil
	}
	return nil
}

func newFargate(profile string, cfg *config.Gateway, cloud *fargate.Cloud) *fargate.Launcher {
	return &fargate.Launcher{
		Cloud:       cloud,
		Profile:     profile,
		FleetKeys:   cfg.FleetPublicKeys(),
		Options:     cfg.Profiles[profile].Fargate,
		MaxSessions: cfg.MaxSessions,
		MaxChannels: cfg.MaxChannels,
	}
}

func newLocal(profile string, cfg *config.Gateway, log *slog.Logger) (*local.Launcher, error) {
	options := cfg.Profiles[profile].Local
	if os.Geteuid() != 0 && options.Account == "" {
		return nil, fmt.Errorf("profile %s: this gateway does not run as root, so every user would get the account that it runs as, which can read the fleet key; if that is meant, name the account in profiles.%s.local.account", profile, profile)
	}
	if options.Agent == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		options.Agent = filepath.Join(filepath.Dir(self), "bastion-agent")
	}
	if _, err := os.Stat(options.Agent); err != nil {
		return nil, fmt.Errorf("profile %s: the program that is to run in its bastions: %w (it belongs beside the gateway; profiles.%s.local.agent can name another place)", profile, err, profile)
	}
	return &local.Launcher{
		Dir:         filepath.Join(cfg.StateDir, "bastions"),
		FleetKeys:   cfg.FleetPublicKeys(),
		Options:     options,
		MaxSessions: cfg.MaxSessions,
		MaxChannels: cfg.MaxChannels,
		Log:         log,
	}, nil
}

// newKeys makes the sources of keys. log may be nil.
func newKeys(cfg *config.Gateway, log *slog.Logger) *auth.Keys {
	keys := &auth.Keys{
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
	if cfg.SelfServiceKeys {
		keys.SelfService = filepath.Join(cfg.StateDir, "keys.d")
	}
	return keys
}

func (p *parts) dialerSettings() bastion.Settings {
	return bastion.Settings{Profiles: p.profiles, FleetKeys: p.cfg.FleetKeys, StartsPerUser: p.cfg.StartsPerUser}
}

func (p *parts) serverSettings() gateway.Settings {
	recordings := p.cfg.Recordings
	if recordings.Dir == "" {
		recordings.Dir = filepath.Join(p.cfg.StateDir, "recordings")
	}
	s := gateway.Settings{
		Options:            p.cfg.Options,
		Authorize:          p.keys.Authorize,
		Recheck:            p.keys.Recheck,
		Record:             func(id identity.Identity) identity.Record { return p.cfg.Profiles[id.Profile].Record },
		Recordings:         &record.Store{Dir: recordings.Dir, MaxSize: recordings.MaxSize, MaxPerUser: recordings.MaxPerUser},
		RecordingsOptional: recordings.OnError == config.Continue,
	}
	if p.totp != nil {
		s.SecondFactor, s.SecondFactorRequired = p.totp, p.cfg.TOTPRequired
	}
	return s
}
