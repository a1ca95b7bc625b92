package fargate

import (
	"context"
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

// TestQueue: who has called before goes first, and one who leaves without a call
// uses up no turn.
func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPace()
		p.limiter.SetBurst(1)
		p.wait(t.Context())
		began := time.Now()
		var order []string
		var mu sync.Mutex
		var calls sync.WaitGroup
		done := func(who string) {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, who)
		}
		for range 5 {
			calls.Go(func() {
				leave, err := p.enqueue(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				defer leave()
				p.wait(t.Context())
				done("new")
			})
		}
		for range 1000 {
			calls.Go(func() {
				leave, err := p.enqueue(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				leave()
			})
		}
		synctest.Wait()
		for range 5 {
			calls.Go(func() { p.wait(t.Context()); done("again") })
		}
		calls.Wait()
		if got := fmt.Sprint(order); got != "[new again again again again again new new new new]" {
			t.Errorf("order %v", got)
		}
		if took := time.Since(began); took > 510*time.Millisecond {
			t.Errorf("ten calls took %v, want half a second", took)
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		leave, err := p.enqueue(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.enqueue(ended); err == nil {
			t.Error("queued though nobody waits")
		}
		leave()
	})
}

func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b breaker
		zones := []string{"a", "b"}
		full := fmt.Errorf("%w: %w", bastion.ErrGone, bastion.ErrCapacity)
		admit := func() error { return b.admit(zones) }
		// One zone that is full, or Spot in all, is not the Region.
		for range 100 {
			b.record(zones, "a", false, full)
			b.record(zones, "a", true, full)
			b.record(zones, "b", true, full)
			b.record(zones, "b", true, bastion.ErrQuota)
		}
		for i := range breakAfter {
			if err := admit(); err != nil {
				t.Fatalf("after %d failures: %v", i, err)
			}
			b.record(zones, "b", false, full)
			b.record(zones, "b", false, errors.New("something else")) // says nothing about room
		}
		if err := admit(); !errors.Is(err, bastion.ErrCapacity) || errors.Is(err, bastion.ErrGone) {
			t.Fatalf("not open after %d failures: %v", breakAfter, err)
		}
		// Those that were under way do not make the pause longer.
		for range 100 {
			b.record(zones, "a", false, full)
		}
		time.Sleep(breakFirst * 3 / 2)
		// One at a time tries again, and the pauses grow.
		tries := 0
		for began := time.Now(); time.Since(began) < 10*time.Minute; time.Sleep(100 * time.Millisecond) {
			if admit() != nil {
				continue
			}
			tries++
			if err := admit(); err == nil {
				t.Fatal("two try at the same time")
			}
			b.record(zones, "a", false, full)
		}
		if tries < 9 || tries > 18 {
			t.Errorf("%d tries in ten minutes", tries)
		}
		time.Sleep(2 * breakMax)
		if err := admit(); err != nil {
			t.Fatal(err)
		}
		b.record(zones, "b", true, nil)
		for range 100 {
			if err := admit(); err != nil {
				t.Fatalf("open after a success: %v", err)
			}
		}
		// The quota is one of the whole account.
		for range breakAfter {
			b.record(zones, "a", false, bastion.ErrQuota)
		}
		if err := admit(); !errors.Is(err, bastion.ErrQuota) {
			t.Fatalf("not open although the quota is used up: %v", err)
		}
		// The one that tries may never tell.
		time.Sleep(breakMax)
		if err := admit(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(tryFor)
		if err := admit(); err != nil {
			t.Errorf("blocked by one that is silent: %v", err)
		}
	})
}
