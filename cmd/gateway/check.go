package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/daemon"
)

type checkCmd struct {
	Config string `default:"/etc/sallyport/gateway.yaml" placeholder:"FILE" help:"The configuration file, or ssm:NAME or secretsmanager:NAME (default /etc/sallyport/gateway.yaml)."`
	AWS    bool   `name:"aws" help:"Also ask AWS whether this gateway has the permissions that its profiles need. Starts nothing."`
	question
}

// Run reads the configuration and the files that it names.
func (c *checkCmd) Run(ctx context.Context, s streams) error {
	// The caller may have no access to the state_dir.
	copies, err := os.MkdirTemp("", "sallyport-check-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(copies)
	cfg, err := daemon.LoadConfig(ctx, c.Config, copies)
	if err != nil {
		return err
	}
	if err := daemon.MakeCopies(ctx, cfg); err != nil {
		return err
	}
	problems := daemon.Check(cfg)
	if c.AWS {
		problems = append(problems, checkAWS(ctx, cfg, s.out))
	}
	if problems = slices.DeleteFunc(problems, func(err error) bool { return err == nil }); len(problems) > 0 {
		return config.Mistakes(problems)
	}
	if c.As != "" || c.From != "" || c.To != "" || c.Profile != "" || len(c.Principal) > 0 || !c.At.IsZero() {
		if err := c.answer(s.out, c.Config, cfg); err != nil {
			return err
		}
		// The answer stays yes, because the gateway may run on another machine.
		if err := daemon.CheckAccount(cfg, cmp.Or(c.Profile, "default"), c.As); err != nil {
			fmt.Fprintf(s.out, "note: on this machine: %v\n", err)
		}
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Profiles)) {
		if cfg.Profiles[name].Local.Account == "" {
			continue // each user has an account of her own; --as tells
		}
		if err := daemon.CheckAccount(cfg, name, ""); err != nil {
			fmt.Fprintf(s.out, "%s: profiles.%s: note: on this machine: %v\n", c.Config, name, err)
		}
	}
	if cfg.TOTPRequired {
		without, err := (&auth.TOTP{Dir: cfg.TOTPDir}).Without(cfg.AuthorizedKeysDir)
		if err != nil {
			return err
		}
		if len(without) > 0 {
			fmt.Fprintf(s.out, "%s: totp: required: refused, since they have no secret in totp_dir: %s\n", c.Config, strings.Join(without, ", "))
		}
	}
	_, err = fmt.Fprintf(s.out, "%s: ok\n", c.Config)
	return err
}

// checkAWS writes to out which calls AWS permits, and returns an error for those
// that it does not.
func checkAWS(ctx context.Context, cfg *config.Gateway, out io.Writer) error {
	launchers, err := daemon.FargateLaunchers(ctx, cfg)
	if err != nil {
		return err
	}
	table, err := daemon.Table(ctx, cfg)
	if err != nil {
		return err
	}
	users, err := auth.Users(cfg.AuthorizedKeysDir)
	if err != nil {
		return err
	}
	var problems []error
	if table != nil {
		verdict := "permitted"
		if err := table.Check(ctx); err != nil {
			verdict = "FAILED"
			problems = append(problems, fmt.Errorf("ledger: %w", err))
		}
		fmt.Fprintf(out, "ledger, table %s:\n  %-36s %s\n", cfg.Ledger.Table, "dynamodb:*Item, Query, DescribeTable", verdict)
	}
	for _, name := range slices.Sorted(maps.Keys(launchers)) {
		who, findings, err := launchers[name].Check(ctx, users)
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
