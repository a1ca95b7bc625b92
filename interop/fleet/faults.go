package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// maxFaulty is the number of gateways that have a fault at the same time. So the
// balancer always has one that works.
const maxFaulty = gateways - 1

// faults is the run: users log in while gateways fail. The last part of the time is
// calm, so that all effects of faults have to end.
func (f *fleet) faults(ctx context.Context) error {
	defer f.watch(ctx)()
	loading, stopLoad := context.WithTimeout(ctx, f.time)
	defer stopLoad()
	var trouble sync.WaitGroup
	var failed error
	kinds := []*kind{killed, paused, drained, cutTable, cutAWS, cutBastions, cutGateways, slowReplies, lostReplies}
	trouble.Go(func() { failed = f.inject(ctx, kinds, f.time*4/5, min(time.Minute, f.time/6)) })
	newLoad(f).run(loading)
	trouble.Wait()
	if failed != nil || ctx.Err() != nil {
		return failed
	}
	return f.finish(ctx)
}

// finish follows the load: the gateways have to work and the tasks to end.
func (f *fleet) finish(ctx context.Context) error {
	f.checkGateways(ctx)
	f.awaitEnds(ctx)
	f.endGateways()
	f.settle()
	for name, n := range f.blame.count() {
		f.results.add(f.results.Faults, name, n)
	}
	if f.cloud != nil {
		for name, n := range f.table.calls() {
			f.results.add(f.results.Counts, "calls of DynamoDB: "+name, n)
		}
		for action, n := range f.awsCalls() {
			f.results.add(f.results.Counts, "calls of AWS: "+action, n)
		}
	}
	return f.readLogs()
}

// inject begins a fault of one of the kinds every few seconds, none longer than the
// longest, and returns when the time is over and all faults have ended.
func (f *fleet) inject(ctx context.Context, kinds []*kind, d, longest time.Duration) error {
	rng := rand.New(rand.NewPCG(f.results.Seed, 1))
	until := time.Now().Add(d)
	var deck []*kind
	var mu sync.Mutex
	var errs []error
	faulty := map[int]bool{} // gateways; 0 is AWS
	var running sync.WaitGroup
	defer running.Wait()
	for {
		if !sleep(ctx, 2*time.Second+time.Duration(rng.Int64N(int64(4*time.Second)))) || time.Now().After(until) {
			break
		}
		if len(deck) == 0 { // each kind once, before any of them again
			for _, i := range rng.Perm(len(kinds)) {
				deck = append(deck, kinds[i])
			}
		}
		k := deck[0]
		ofAWS := k == slowReplies || k == lostReplies
		// Most faults are short, so that many logins have no fault of their gateway.
		length := 2*time.Second + time.Duration(rng.Int64N(int64(8*time.Second)))
		if rng.IntN(5) == 0 {
			length = 10*time.Second + time.Duration(rng.Int64N(int64(50*time.Second)))
		}
		length = min(length, longest, time.Until(until)) // may be negative

		mu.Lock()
		var free []int
		for n := range gateways + 1 {
			if !faulty[n] && ofAWS == (n == 0) {
				free = append(free, n)
			}
		}
		stop := len(errs) > 0
		busy := len(free) <= gateways-maxFaulty && !ofAWS || len(free) == 0
		var number int
		if !busy {
			number = free[rng.IntN(len(free))]
			faulty[number] = true
		}
		mu.Unlock()
		if stop {
			break
		}
		if busy {
			continue
		}
		deck = deck[1:]
		running.Go(func() {
			err := f.fail(ctx, k, number, length)
			mu.Lock()
			defer mu.Unlock()
			delete(faulty, number)
			if err != nil && ctx.Err() == nil {
				errs = append(errs, err)
			}
		})
	}
	running.Wait()
	return errors.Join(errs...)
}

// fail has one fault, and returns when it has ended. A gateway that does not recover
// is a broken promise.
func (f *fleet) fail(ctx context.Context, k *kind, number int, length time.Duration) error {
	fault := f.blame.begin(k, number, time.Now().Add(k.delay))
	fmt.Fprintf(os.Stderr, "%s %v, %v\n", time.Now().UTC().Format(time.TimeOnly), fault, length.Round(time.Second))
	defer func() { f.blame.end(fault, time.Now()) }()
	g := f.gateways[number]
	switch k {
	case killed:
		g.kill()
		sleep(ctx, length)
		if err := g.start(); err != nil {
			return err
		}
	case drained:
		p := g.terminate()
		f.blame.spare(fault, time.Now().Add(drainDelay))
		if err := p.endWithin(drainDelay + drain + patience); err != nil {
			f.results.violate(failedGateways, "after SIGTERM: %v\n%s", err, p.tail())
		}
		if err := g.start(); err != nil {
			return err
		}
	case paused:
		p := g.current()
		p.signal(syscall.SIGSTOP)
		sleep(ctx, length)
		p.signal(syscall.SIGCONT)
	case slowReplies:
		f.table.slow.Store(2000)
		f.aws.slow.Store(3000)
		sleep(ctx, length)
		f.table.slow.Store(0)
		f.aws.slow.Store(0)
	case lostReplies:
		f.table.lossy.Store(10)
		f.aws.lossy.Store(10)
		sleep(ctx, length)
		f.table.lossy.Store(0)
		f.aws.lossy.Store(0)
	default:
		targets := f.targets(k, number)
		if err := cut(number, targets); err != nil {
			return err
		}
		sleep(ctx, length)
		if err := heal(number, targets); err != nil {
			return err
		}
	}
	if g == nil || ctx.Err() != nil {
		return nil
	}
	if err := g.ready(ctx); err != nil && ctx.Err() == nil {
		f.results.violate(failedGateways, "after the fault %q: %v", k.name, err)
	}
	return nil
}

// checkGateways logs in by each gateway, past the balancer. All faults have ended.
func (f *fleet) checkGateways(ctx context.Context) {
	for i := 1; i <= gateways; i++ {
		s, err := f.open(ctx, i-1, i)
		if err == nil {
			s.hold(ctx, 0)
		} else if ctx.Err() == nil {
			f.judgeRefusal(failedGateways, i-1, err)
		}
	}
}

// endGateways drains all gateways, which have no connections.
func (f *fleet) endGateways() {
	var ending sync.WaitGroup
	for _, g := range f.gateways[1:] {
		ending.Go(func() {
			p := g.terminate()
			if err := p.endWithin(drainDelay + drain + patience); err != nil {
				f.results.violate(failedGateways, "at the end: %v\n%s", err, p.tail())
			}
		})
	}
	ending.Wait()
}

// readLogs counts the errors in the gateways' logs. A panic is a broken promise.
func (f *fleet) readLogs() error {
	files, err := os.ReadDir(f.dir)
	if err != nil {
		return err
	}
	for _, file := range files {
		if !strings.HasPrefix(file.Name(), "gateway") || !strings.HasSuffix(file.Name(), ".log") {
			continue
		}
		log, err := os.Open(f.path(file.Name()))
		if err != nil {
			return err
		}
		lines := bufio.NewScanner(log)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var record struct{ Level, Msg string }
			if json.Unmarshal(lines.Bytes(), &record) != nil {
				// The runtime's own report of a crash. A record may also be cut off
				// by a kill.
				if slices.ContainsFunc([]string{"panic: ", "fatal error: "}, func(s string) bool { return strings.HasPrefix(lines.Text(), s) }) {
					f.results.violate(failedGateways, "%s has %q", file.Name(), lines.Text())
				}
				continue
			}
			if record.Level == "ERROR" {
				f.results.add(f.results.Errors, record.Msg, 1)
			}
			if record.Msg == "panic" {
				f.results.violate(failedGateways, "%s: %s", file.Name(), lines.Text())
			}
		}
		err = lines.Err()
		log.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", file.Name(), err)
		}
	}
	return nil
}
