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
	// turn is held by the one that waits for the limiter. Others that wait
	// are not on the limiter's books yet, so that a new pace counts for them.
	turn chan struct{}

	mu     sync.Mutex
	halved time.Time
}

func newPace() *pace {
	return &pace{limiter: rate.NewLimiter(launchRate, launchBurst), turn: make(chan struct{}, 1)}
}

// wait blocks until it is the caller's turn, in the order of the calls.
func (p *pace) wait(ctx context.Context) error {
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
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
type breaker struct {
	mu       sync.Mutex
	failures int       // in a row
	until    time.Time // nothing is tried before
	trying   time.Time // since when a single launch tries, after that
	cause    error
}

const (
	// breakAfter is how many launches in a row may find no room: with the
	// retry in another zone, those of two users.
	breakAfter = 4
	// breakFirst is how long nothing is tried then; it doubles up to breakMax
	// while there still is no room.
	breakFirst, breakMax = 5 * time.Second, time.Minute
	// tryFor is how long the one that tries may take to find out.
	tryFor = 30 * time.Second
)

// closed returns an error while nothing is to be tried.
func (b *breaker) closed() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	switch {
	case b.failures < breakAfter:
		return nil
	case now.Before(b.until):
		return fmt.Errorf("not tried before %s: %w", b.until.Format(time.TimeOnly), b.cause)
	case now.Sub(b.trying) < tryFor:
		return fmt.Errorf("not tried while another launch tries: %w", b.cause)
	}
	b.trying = now
	return nil
}

// record takes note of how a launch ended.
func (b *breaker) record(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case err == nil:
		b.failures = 0
	case errors.Is(err, bastion.ErrCapacity), errors.Is(err, bastion.ErrQuota):
		b.failures++
		b.cause = err
		b.trying = time.Time{}
		if over := b.failures - breakAfter; over >= 0 {
			pause := min(breakMax, breakFirst<<min(over, 10))
			b.until = time.Now().Add(pause*3/4 + rand.N(pause/2))
		}
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
