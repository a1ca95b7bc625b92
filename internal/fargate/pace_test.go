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
				p.observe(nil)
			})
		}
		calls.Wait()
		if took := time.Since(began); took < 44*time.Second || took > 46*time.Second {
			t.Errorf("1000 launches took %v, want 45 s", took)
		}

		// A throttled call lowers the rate, also for calls of wait that block
		// already. Successful calls raise it again.
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
			p.observe(refused)
			p.observe(refused) // within a second of the last: no effect
		}
		calls.Wait()
		if got := p.limiter.Limit(); got != 2.5 {
			t.Errorf("after three throttled calls: %v a second, want 2.5", got)
		}
		for range 200 {
			p.observe(nil)
		}
		if got := p.limiter.Limit(); got < 19 || got > launchRate {
			t.Errorf("after 200 successes: %v a second", got)
		}
		for range 20 {
			time.Sleep(2 * time.Second)
			p.observe(refused)
		}
		if got := p.limiter.Limit(); got != minLaunchRate {
			t.Errorf("after throttled calls only: %v a second", got)
		}
	})
}

// TestQueue: a retry, which calls wait without enqueue, is served before new
// launches. A launch that leaves the queue before wait uses no token of the limiter.
func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPace()
		p.limiter.SetBurst(1)
		p.wait(t.Context())
		began := time.Now()
		var order []string
		var mu sync.Mutex
		var calls sync.WaitGroup
		done := func(kind string) {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, kind)
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
			t.Error("enqueue succeeded with an ended context")
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
		// Failures in one zone only, or of Spot only, do not open the breaker.
		for range 100 {
			b.observe(zones, "a", false, full)
			b.observe(zones, "a", true, full)
			b.observe(zones, "b", true, full)
			b.observe(zones, "b", true, bastion.ErrQuota)
		}
		for i := range openAfter {
			if err := admit(); err != nil {
				t.Fatalf("after %d failures: %v", i, err)
			}
			b.observe(zones, "b", false, full)
			b.observe(zones, "b", false, errors.New("something else")) // not about capacity: not counted
		}
		if err := admit(); !errors.Is(err, bastion.ErrCapacity) || errors.Is(err, bastion.ErrGone) {
			t.Fatalf("not open after %d failures: %v", openAfter, err)
		}
		// Failures of launches admitted earlier do not lengthen the pause.
		for range 100 {
			b.observe(zones, "a", false, full)
		}
		time.Sleep(firstPause * 3 / 2)
		// After a pause, one probe at a time is admitted, and each failure
		// lengthens the pause.
		tries := 0
		for began := time.Now(); time.Since(began) < 10*time.Minute; time.Sleep(100 * time.Millisecond) {
			if admit() != nil {
				continue
			}
			tries++
			if err := admit(); err == nil {
				t.Fatal("two probes at the same time")
			}
			b.observe(zones, "a", false, full)
		}
		if tries < 9 || tries > 18 {
			t.Errorf("%d probes in ten minutes, want 9 to 18", tries)
		}
		time.Sleep(2 * maxPause)
		if err := admit(); err != nil {
			t.Fatal(err)
		}
		b.observe(zones, "b", true, nil)
		for range 100 {
			if err := admit(); err != nil {
				t.Fatalf("open after a success: %v", err)
			}
		}
		// The quota holds for all zones, so failures in one open the breaker.
		for range openAfter {
			b.observe(zones, "a", false, bastion.ErrQuota)
		}
		if err := admit(); !errors.Is(err, bastion.ErrQuota) {
			t.Fatalf("not open although the quota is used up: %v", err)
		}
		// If the result of a probe is never observed, another is admitted after
		// probeTimeout.
		time.Sleep(maxPause)
		if err := admit(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(probeTimeout)
		if err := admit(); err != nil {
			t.Errorf("blocked by a probe without a result: %v", err)
		}
	})
}
