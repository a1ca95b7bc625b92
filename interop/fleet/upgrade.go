package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"
)

// upgrade replaces one gateway after the other, under load: SIGUSR2 has it start a
// successor, which gets its sockets, see docs/adr/0016. No login may be refused. Sessions
// go on at the old process; those that are still open at the end of drain end then, and
// none before.
func (f *fleet) upgrade(ctx context.Context) error {
	defer f.watch(ctx)()
	loading, stopLoad := context.WithCancel(ctx)
	defer stopLoad()
	load := newLoad(f)
	var running sync.WaitGroup
	running.Go(func() { load.run(loading) })
	defer running.Wait()
	defer stopLoad()

	pause := max(3*time.Second, f.time/20)
	var draining sync.WaitGroup
	defer draining.Wait()
	for _, g := range f.gateways[1:] {
		if !sleep(ctx, pause) {
			return nil
		}
		if err := load.awaitStaying(ctx, g.number); err != nil {
			return err
		}
		fault := f.begin(upgraded, g.number)
		old, err := g.handOver(ctx)
		if err != nil {
			return err
		}
		f.blame.spare(fault, time.Now())
		f.results.add(f.results.Counts, "upgrades", 1)
		draining.Go(func() {
			if err := old.endWithin(drain + patience); err != nil {
				f.results.violate(failedGateways, "after the upgrade: %v\n%s", err, old.tail())
			}
			f.blame.end(fault, time.Now())
		})
	}
	draining.Wait()
	sleep(ctx, pause)
	stopLoad()
	running.Wait()
	return f.finish(ctx)
}

// begin enters a fault, until it is ended, and prints it.
func (f *fleet) begin(k *kind, gateway int) *fault {
	fault := f.blame.begin(k, gateway, time.Now().Add(k.delay))
	fmt.Fprintf(os.Stderr, "%s %v\n", time.Now().UTC().Format(time.TimeOnly), fault)
	return fault
}
