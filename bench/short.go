package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
)

// short opens and closes many connections, each with a session, and reports how
// many descriptors and how much memory the gateway has then that it did not have
// after the first of them.
func (b *bench) short(ctx context.Context) ([]row, error) {
	const atOnce = 16
	connect := func(n int) error {
		g, ctx := errgroup.WithContext(ctx)
		for range atOnce {
			g.Go(func() error {
				for range n / atOnce {
					clients, err := b.openClients(ctx, b.gateway, 1)
					closeClients(clients)
					if err != nil {
						return err
					}
				}
				return nil
			})
		}
		return g.Wait()
	}
	measure := func() (descriptors, kib float64, err error) {
		if kib, err = b.settled(ctx, b.gateway.pid); err != nil {
			return 0, 0, err
		}
		files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", b.gateway.pid))
		if err != nil {
			return 0, 0, fmt.Errorf("descriptors of the gateway: %w", err)
		}
		return float64(len(files)), kib, nil
	}
	if err := connect(max(b.shortConnections/20, atOnce)); err != nil { // caches, pools and threads
		return nil, err
	}
	files0, kib0, err := measure()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := connect(b.shortConnections); err != nil {
		return nil, err
	}
	b.log.Info("short connections have ended", "connections", b.shortConnections, "took", time.Since(began).Round(time.Second))
	files1, kib1, err := measure()
	if err != nil {
		return nil, err
	}
	note := fmt.Sprintf("after %d connections with a session each, %d at once", b.shortConnections, atOnce)
	return []row{
		{What: "descriptors that the gateway keeps of short connections", Goal: "0", Unit: "", Sallyport: samples{files1 - files0}, Note: note},
		{What: "memory that it keeps of them", Goal: "0", Unit: "MiB private", Sallyport: samples{(kib1 - kib0) / 1024}, Note: note},
	}, nil
}
