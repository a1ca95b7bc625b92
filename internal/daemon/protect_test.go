package daemon

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/ecstask"
)

// TestProtectTask: a task is protected while it has connections, and the protection
// is renewed, unless a deployment waits.
func TestProtectTask(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log lockedBuffer
		d := &Daemon{log: slog.New(slog.NewTextHandler(&log, nil))}
		d.cfg.Store(&config.Gateway{TaskProtection: time.Hour})
		var connections atomic.Int32
		var mu sync.Mutex // guards calls and refuse
		var calls []time.Duration
		var refuse error
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			d.protectTask(ctx, protector{
				connections: func() int { return int(connections.Load()) },
				protect: func(_ context.Context, d time.Duration) error {
					mu.Lock()
					defer mu.Unlock()
					calls = append(calls, d)
					return refuse
				},
			})
		}()
		after := func(wait time.Duration, want ...time.Duration) {
			t.Helper()
			time.Sleep(wait)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(calls, want) {
				t.Errorf("calls after %v: %v, want %v", wait, calls, want)
			}
			calls = nil
		}
		refusing := func(err error) {
			mu.Lock()
			defer mu.Unlock()
			refuse = err
		}
		after(10 * time.Minute)
		connections.Store(3)
		after(6*time.Second, time.Hour)
		after(2*time.Minute, time.Hour, time.Hour)
		connections.Store(0)
		after(6*time.Second, 0)
		after(10 * time.Minute)
		connections.Store(1)
		after(6*time.Second, time.Hour)

		// A failure is repeated every minute, and logged once.
		refusing(errors.New("not authorized"))
		after(3*time.Minute, time.Hour, time.Hour, time.Hour)
		if n := strings.Count(log.String(), "cannot protect this task"); n != 1 {
			t.Errorf("%d records:\n%s", n, log.String())
		}
		refusing(ecstask.ErrBlocked)
		after(2*time.Minute, time.Hour, time.Hour)
		if n := strings.Count(log.String(), "a deployment waits"); n != 1 || strings.Count(log.String(), "WARN") != 1 {
			t.Errorf("%d records:\n%s", n, log.String())
		}
		// What was set before still has to end.
		refusing(nil)
		connections.Store(0)
		after(6*time.Second, 0)

		// Without the setting nothing is called, but a protection ends.
		connections.Store(1)
		after(6*time.Second, time.Hour)
		d.cfg.Store(&config.Gateway{})
		after(10*time.Minute, 0)
		cancel()
		<-done
	})
}
