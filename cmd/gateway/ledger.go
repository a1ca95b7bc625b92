package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/daemon"
	"github.com/sallyport-ssh/sallyport/internal/dynamo"
)

type ledgerCmd struct {
	CreateTable createTableCmd `cmd:"" help:"Create the DynamoDB table that the configuration names, if it does not exist."`
	Copy        copyLedgerCmd  `cmd:"" help:"Copy the ledger of a single gateway from its state_dir to the table."`
}

// sharedTable returns the table that a configuration names.
func sharedTable(ctx context.Context, path string) (*config.Gateway, *dynamo.Table, error) {
	cfg, err := daemon.LoadConfig(ctx, path, "")
	if err != nil {
		return nil, nil, err
	}
	table, err := daemon.Table(ctx, cfg)
	if err == nil && table == nil {
		err = fmt.Errorf("%s: names no table; write ledger: {dynamodb: {table: NAME}}", path)
	}
	return cfg, table, err
}

type createTableCmd struct {
	Config string `default:"/etc/sallyport/gateway.yaml" placeholder:"FILE" help:"The configuration; it must have ledger (default /etc/sallyport/gateway.yaml)."`
}

// Run creates the table.
func (c *createTableCmd) Run(ctx context.Context, s streams) error {
	cfg, table, err := sharedTable(ctx, c.Config)
	if err != nil {
		return err
	}
	if err := table.Create(ctx); err != nil {
		return err
	}
	_, err = fmt.Fprintf(s.out, "table %s: ready\n", cfg.Ledger.Table)
	return err
}

type copyLedgerCmd struct {
	Config string `default:"/etc/sallyport/gateway.yaml" placeholder:"FILE" help:"The new configuration; it must have ledger, and the old state_dir (default /etc/sallyport/gateway.yaml)."`
}

// Run copies the entries of the folder that the table does not have. The gateway
// that uses the folder may run: bastions that it starts meanwhile are adopted by
// the gateways that use the table.
func (c *copyLedgerCmd) Run(ctx context.Context, s streams) error {
	cfg, table, err := sharedTable(ctx, c.Config)
	if err != nil {
		return err
	}
	folder, err := bastion.OpenFolder(filepath.Join(cfg.StateDir, "ledger"), slog.New(slog.NewTextHandler(s.err, nil)))
	if err != nil {
		return err
	}
	defer folder.Close()
	entries, err := folder.Entries()
	if err != nil {
		return err
	}
	copied := 0
	for owner, entry := range entries {
		now, err := table.Get(ctx, owner)
		if err != nil {
			return err
		}
		if now.Generation >= entry.Generation {
			continue
		}
		_, err = table.Swap(ctx, owner, now, bastion.Entry{
			Generation: entry.Generation, State: entry.State, Task: entry.Task, Since: entry.Since, Nonce: rand.Text(),
		})
		switch {
		case errors.Is(err, bastion.ErrConflict): // a gateway that uses the table was first
		case err != nil:
			return err
		default:
			copied++
		}
	}
	_, err = fmt.Fprintf(s.out, "copied %d of %d entries to the table %s\n", copied, len(entries), cfg.Ledger.Table)
	return err
}
