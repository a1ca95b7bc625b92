package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// endOfDrain is the only effect of an upgrade: sessions that are still open when drain
// is over end. No login may be refused, and no session may end before.
var endOfDrain = &kind{"open at the end of drain", false, true, drain}

// upgrade replaces one gateway after the other, under load: SIGTERM to the old process,
// and a start of its successor at the same address when drain_delay is over.
func (f *fleet) upgrade(ctx context.Context) error {
	defer f.watch(ctx)()
	loading, stopLoad := context.WithCancel(ctx)
	defer stopLoad()
	var load sync.WaitGroup
	load.Go(func() { newLoad(f).run(loading) })
	pause := max(5*time.Second, f.time/20)
	for _, g := range f.gateways[1:] {
		if !sleep(ctx, pause) {
			break
		}
		if err := f.replace(ctx, g); err != nil {
			return err
		}
	}
	sleep(ctx, pause)
	stopLoad()
	load.Wait()
	return f.finish(ctx)
}

// replace replaces the process of a gateway.
func (f *fleet) replace(ctx context.Context, g *gateway) error {
	fmt.Fprintf(os.Stderr, "%s %s: upgrade\n", time.Now().UTC().Format(time.TimeOnly), g)
	old := g.terminate()
	ends := f.blame.begin(endOfDrain, g.number, time.Now().Add(drainDelay+drain))
	awaitClosed(ctx, g.addr) // the successor waits for the port, for three seconds only
	if err := g.start(); err != nil {
		return err
	}
	if err := g.ready(ctx); err != nil {
		return err
	}
	if err := old.endWithin(drainDelay + drain + patience); err != nil {
		f.results.violate(failedGateways, "after SIGTERM: %v\n%s", err, old.tail())
	}
	f.blame.end(ends, time.Now())
	f.results.add(f.results.Counts, "upgrades", 1)
	return nil
}

// awaitClosed returns when nothing listens at the address, or ctx has ended.
func awaitClosed(ctx context.Context, addr string) {
	for {
		c, err := net.DialTimeout("tcp", addr, 5*time.Second)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
		if err == nil {
			c.Close()
		}
		if !sleep(ctx, 50*time.Millisecond) {
			return
		}
	}
}
