package daemon

import (
	"context"
	"log/slog"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/dynamo"
	"github.com/sallyport-ssh/sallyport/internal/fargate"
)

// Check returns the mistakes in the files and programs that a configuration names.
// It starts nothing.
func Check(cfg *config.Gateway) []error {
	problems := newKeys(cfg, nil).Check()
	problems = append(problems, cfg.CertificateProblems(time.Now())...)
	if cfg.TOTPDir != "" {
		problems = append(problems, (&auth.TOTP{Dir: cfg.TOTPDir}).Problems()...)
	}
	if _, err := newProfiles(cfg, nil, slog.New(slog.DiscardHandler)); err != nil {
		problems = append(problems, err)
	}
	return problems
}

// CheckAccount returns an error if local bastions of a profile have no account on this
// machine for the sessions of a user.
func CheckAccount(cfg *config.Gateway, profile, user string) error {
	if p := cfg.Profiles[profile]; p.Launcher != "fargate" {
		_, err := p.Local.AccountOf(user)
		return err
	}
	return nil
}

// Table returns the table that the configuration shares with other gateways, or nil.
// It makes no call.
func Table(ctx context.Context, cfg *config.Gateway) (*dynamo.Table, error) {
	return newTable(ctx, cfg, nil)
}

// FargateLaunchers returns the launchers of the profiles on Fargate, by the names of
// these. They are for [fargate.Launcher.Check].
func FargateLaunchers(ctx context.Context, cfg *config.Gateway) (map[string]*fargate.Launcher, error) {
	cloud, err := newCloud(ctx, cfg, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	launchers := make(map[string]*fargate.Launcher)
	for name, p := range cfg.Profiles {
		if p.Launcher == "fargate" {
			launchers[name] = newFargate(name, cfg, cloud)
		}
	}
	return launchers, nil
}
