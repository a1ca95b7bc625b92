package fargate

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/smithy-go"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPace()
		began := time.Now()
		var calls sync.WaitGroup
		for range 1000 {
			calls.Go(func() {
				if err := p.wait(t.Context()); err != nil {
					t.Error(err)
				}
				p.record(nil)
			})
		}
		calls.Wait()
		if took := time.Since(began); took < 44*time.Second || took > 46*time.Second {
			t.Errorf("1000 launches took %v, want 45 s", took)
		}

		// Refusals slow it down, also for those who wait already; and it
		// recovers.
		time.Sleep(time.Minute)
		for range 100 {
			p.wait(t.Context())
		}
		refused := &smithy.GenericAPIError{Code: "ThrottlingException", Message: "Rate exceeded"}
		for range 20 {
			calls.Go(func() { p.wait(t.Context()) })
		}
		for range 3 {
			time.Sleep(1100 * time.Millisecond)
			p.record(refused)
			p.record(refused) // at the same time: counts once
		}
		calls.Wait()
		if got := p.limiter.Limit(); got != 2.5 {
			t.Errorf("after three rounds of refusals: %v a second, want 2.5", got)
		}
		for range 200 {
			p.record(nil)
		}
		if got := p.limiter.Limit(); got < 19 || got > launchRate {
			t.Errorf("after 200 successes: %v a second", got)
		}
		for range 20 {
			time.Sleep(2 * time.Second)
			p.record(refused)
		}
		if got := p.limiter.Limit(); got != slowest {
			t.Errorf("after nothing but refusals: %v a second", got)
		}
	})
}

func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b breaker
		full := fmt.Errorf("%w: %w", bastion.ErrGone, bastion.ErrCapacity)
		for i := range breakAfter {
			if err := b.closed(); err != nil {
				t.Fatalf("after %d failures: %v", i, err)
			}
			b.record(full)
			b.record(errors.New("something else")) // says nothing about room
		}
		if err := b.closed(); !errors.Is(err, bastion.ErrCapacity) {
			t.Fatalf("not open after %d failures: %v", breakAfter, err)
		}
		// One at a time tries again, and the pauses grow.
		tries := 0
		for began := time.Now(); time.Since(began) < 10*time.Minute; time.Sleep(100 * time.Millisecond) {
			if b.closed() != nil {
				continue
			}
			tries++
			if err := b.closed(); err == nil {
				t.Fatal("two try at the same time")
			}
			b.record(full)
		}
		if tries < 9 || tries > 18 {
			t.Errorf("%d tries in ten minutes", tries)
		}
		time.Sleep(2 * breakMax)
		if err := b.closed(); err != nil {
			t.Fatal(err)
		}
		b.record(nil)
		for range 100 {
			if err := b.closed(); err != nil {
				t.Fatalf("open after a success: %v", err)
			}
		}
		// The one that tries may never tell.
		for range breakAfter {
			b.record(full)
		}
		time.Sleep(breakMax)
		if err := b.closed(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(tryFor)
		if err := b.closed(); err != nil {
			t.Errorf("blocked by one that is silent: %v", err)
		}
	})
}
