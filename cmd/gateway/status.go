package main

import (
	"context"

	"github.com/sallyport-ssh/sallyport/internal/daemon"
)

type statusCmd struct {
	Config string `default:"/etc/sallyport/gateway.yaml" placeholder:"FILE" help:"The configuration; it must have ledger (default /etc/sallyport/gateway.yaml)."`
	JSON   bool   `name:"json" help:"Print JSON."`
}

// Run prints the gateways that share the table.
func (c *statusCmd) Run(ctx context.Context, s streams) error {
	cfg, table, err := sharedTable(ctx, c.Config)
	if err != nil {
		return err
	}
	return daemon.PrintFleet(ctx, s.out, cfg, table, c.JSON)
}
