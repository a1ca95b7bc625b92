package fargate

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// Fargate launches 20 on-demand tasks per second in an account and Region, with a
// burst of 100 ("AWS Fargate throttling quotas", Amazon ECS Developer Guide). It
// rejects more, and they must be retried, so it is better to wait here.
const (
	launchRate    rate.Limit = 20
	launchBurst              = 100
	minLaunchRate rate.Limit = 1
)

// A pace limits the rate of RunTask calls. ECS throttles them all the same if other
// programs of the account start tasks, or if the account has a lower quota. The
// rate is then halved, and grows again with each call that is not throttled.
type pace struct {
	limiter *rate.Limiter
	// queue is held by the first launch that has not called RunTask yet, and
	// next by the one that waits for the limiter. The others have no reservation
	// from the limiter yet, so that a change of the rate applies to them.
	queue, next chan struct{}

	mu     sync.Mutex
	halved time.Time
}

func newPace() *pace {
	return &pace{limiter: rate.NewLimiter(launchRate, launchBurst), queue: make(chan struct{}, 1), next: make(chan struct{}, 1)}
}

// enqueue blocks until the caller is the first that has not called RunTask yet, in
// the order of the calls of enqueue. The caller must call leave after its wait.
func (p *pace) enqueue(ctx context.Context) (leave func(), err error) {
	select {
	case p.queue <- struct{}{}:
		return func() { <-p.queue }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// wait blocks until the caller may call RunTask. Retries call wait without enqueue,
// so that launches in progress finish before new ones start.
func (p *pace) wait(ctx context.Context) error {
	select {
	case p.next <- struct{}{}:
		defer func() { <-p.next }()
		return p.limiter.Wait(ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// observe adjusts the rate to the result of a call.
func (p *pace) observe(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	switch limit := p.limiter.Limit(); {
	case err == nil:
		p.limiter.SetLimitAt(now, min(launchRate, limit+1/limit)) // increases by one per second, each second
	case throttled(err) && now.Sub(p.halved) > time.Second: // once for calls that were throttled together
		p.halved = now
		p.limiter.SetLimitAt(now, max(minLaunchRate, limit/2))
		// The rest of the burst would be throttled, too.
		p.limiter.ReserveN(now, max(0, int(p.limiter.TokensAt(now))))
	}
}

// A breaker is a circuit breaker for a Region without capacity. Without it, each
// waiting user would cause two RunTask calls per attempt.
//
// A subnet, which is in one zone, can lack capacity while another has some, and Spot
// can while on-demand does not; the second attempt of a launch tries the other. So
// the breaker opens when no subnet has on-demand capacity.
type breaker struct {
	mu       sync.Mutex
	failures map[string]int // by subnet, since the last success in any of them
	pauses   int            // in a row
	until    time.Time      // end of the pause
	probing  time.Time      // when the single launch after the pause was admitted
	cause    error
}

const (
	// openAfter is the number of launches in a row without capacity, in each
	// subnet, that opens the breaker.
	openAfter = 4
	// firstPause is the time without launches after that. It doubles, up to
	// maxPause, while there still is no capacity.
	firstPause, maxPause = 5 * time.Second, time.Minute
	// probeTimeout is the time after which another launch probes, if the first
	// has no result.
	probeTimeout = 30 * time.Second
)

// admit returns an error while the breaker is open, except to one launch at a time
// after the pause. It must be called once per start: the admitted one must be able
// to retry.
func (b *breaker) admit(subnets []string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	switch {
	case !b.full(subnets):
		return nil
	case now.Before(b.until):
		return fmt.Errorf("no attempt before %s: %w", b.until.Format(time.TimeOnly), b.cause)
	case now.Sub(b.probing) < probeTimeout:
		return fmt.Errorf("no attempt while another launch probes: %w", b.cause)
	}
	b.probing = now
	return nil
}

func (b *breaker) full(subnets []string) bool {
	for _, s := range subnets {
		if b.failures[s] < openAfter {
			return false
		}
	}
	return true
}

// observe enters the result of an attempt in one of the subnets.
func (b *breaker) observe(subnets []string, subnet string, spot bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failures == nil {
		b.failures = map[string]int{}
	}
	var kind error
	switch {
	case err == nil:
		clear(b.failures)
		b.pauses = 0
		return
	case spot:
		return
	case errors.Is(err, bastion.ErrQuota): // of the account, so there is no second attempt
		kind = bastion.ErrQuota
		for _, s := range subnets {
			b.failures[s]++
		}
	case errors.Is(err, bastion.ErrCapacity):
		kind = bastion.ErrCapacity
		b.failures[subnet]++
	default:
		return
	}
	// Without ErrGone, since the error is for launches of other generations.
	b.cause = fmt.Errorf("%w: %v", kind, err)
	now := time.Now()
	// Launches that were in progress when it opened do not prolong the pause.
	if b.full(subnets) && !now.Before(b.until) {
		pause := min(maxPause, firstPause<<min(b.pauses, 10))
		b.pauses++
		b.until, b.probing = now.Add(pause*3/4+rand.N(pause/2)), time.Time{}
	}
}

// backoff returns the time before the nth retry.
func backoff(n int) time.Duration {
	d := min(10*time.Second, 250*time.Millisecond<<min(n, 10))
	return d/2 + rand.N(d/2)
}

// sleep waits for d, or returns the cause of ctx's end.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
