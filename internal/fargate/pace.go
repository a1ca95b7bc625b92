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

// Fargate starts 20 on-demand tasks a second in an account and Region, and a
// hundred at once after a pause ("AWS Fargate throttling quotas", Amazon ECS
// Developer Guide). Who asks for more is refused and must ask again, so it is
// better to wait here.
const (
	launchRate  rate.Limit = 20
	launchBurst            = 100
	slowest     rate.Limit = 1
)

// A pace spreads RunTask calls over time. When ECS says that there are too many
// all the same, because other gateways, or others in the account, start tasks
// too, or because the account's quota is another, it halves, and grows again with
// each call that is heard.
type pace struct {
	limiter *rate.Limiter
	// queue is held by the first of those who have not called yet, next by the
	// one that waits for the limiter. Others that wait are not on the
	// limiter's books yet, so that a new pace counts for them.
	queue, next chan struct{}

	mu     sync.Mutex
	halved time.Time
}

func newPace() *pace {
	return &pace{limiter: rate.NewLimiter(launchRate, launchBurst), queue: make(chan struct{}, 1), next: make(chan struct{}, 1)}
}

// enqueue blocks until the caller is the first of those who have not called yet,
// in the order of the calls. He has to leave once he has had his turn.
func (p *pace) enqueue(ctx context.Context) (leave func(), err error) {
	select {
	case p.queue <- struct{}{}:
		return func() { <-p.queue }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// wait blocks until it is the caller's turn. Who has to call again waits here
// without queueing again, so that what was begun comes to an end before more is
// begun.
func (p *pace) wait(ctx context.Context) error {
	select {
	case p.next <- struct{}{}:
		defer func() { <-p.next }()
		return p.limiter.Wait(ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// record adjusts the pace to how a call went.
func (p *pace) record(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	switch limit := p.limiter.Limit(); {
	case err == nil:
		p.limiter.SetLimitAt(now, min(launchRate, limit+1/limit)) // one a second more, each second
	case throttled(err) && now.Sub(p.halved) > time.Second: // once for calls that were refused together
		p.halved = now
		p.limiter.SetLimitAt(now, max(slowest, limit/2))
		// What is left of the burst would only be refused too.
		p.limiter.ReserveN(now, max(0, int(p.limiter.TokensAt(now))))
	}
}

// A breaker keeps launches away from a Region that is full. Without it every user
// who waits would ask ECS again and again for what it does not have.
//
// A subnet, which is in one zone, can be full while the others are not, and Spot
// while on-demand is not; the second attempt of a launch finds out. So the breaker
// opens when there is no on-demand capacity in any of the subnets.
type breaker struct {
	mu       sync.Mutex
	failures map[string]int // by subnet, since the last success anywhere
	pauses   int            // in a row
	until    time.Time      // nothing is tried before
	trying   time.Time      // since when a single launch tries, after that
	cause    error
}

const (
	// breakAfter is how many launches in a row may find no room in a subnet.
	breakAfter = 4
	// breakFirst is how long nothing is tried then; it doubles up to breakMax
	// while there still is no room.
	breakFirst, breakMax = 5 * time.Second, time.Minute
	// tryFor is how long the one that tries may take to find out.
	tryFor = 30 * time.Second
)

// admit returns an error while nothing is to be tried. To be asked once for each
// launch: the one that tries must not be kept from going on.
func (b *breaker) admit(subnets []string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	switch {
	case !b.full(subnets):
		return nil
	case now.Before(b.until):
		return fmt.Errorf("not tried before %s: %w", b.until.Format(time.TimeOnly), b.cause)
	case now.Sub(b.trying) < tryFor:
		return fmt.Errorf("not tried while another launch tries: %w", b.cause)
	}
	b.trying = now
	return nil
}

func (b *breaker) full(subnets []string) bool {
	for _, s := range subnets {
		if b.failures[s] < breakAfter {
			return false
		}
	}
	return true
}

// record takes note of how an attempt ended that was made in one of the subnets.
func (b *breaker) record(subnets []string, subnet string, spot bool, err error) {
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
	// Not ErrGone: the task that found no room is gone, and that says nothing about
	// the generation of whoever is turned away.
	b.cause = fmt.Errorf("%w: %v", kind, err)
	now := time.Now()
	// Those that were under way when it opened say nothing new.
	if b.full(subnets) && !now.Before(b.until) {
		pause := min(breakMax, breakFirst<<min(b.pauses, 10))
		b.pauses++
		b.until, b.trying = now.Add(pause*3/4+rand.N(pause/2)), time.Time{}
	}
}

// backoff is how long to wait before the nth repetition.
func backoff(n int) time.Duration {
	d := min(10*time.Second, 250*time.Millisecond<<min(n, 10))
	return d/2 + rand.N(d/2)
}

// sleep waits, or returns the cause of ctx's end.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
