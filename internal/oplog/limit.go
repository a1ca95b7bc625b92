package oplog

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// A Limit bounds the bytes that are logged, so that a client that causes records
// cannot fill a disk with them. Records beyond it are dropped; the next one that is
// logged has their number in not_logged. Errors are always logged.
type Limit struct {
	// Bytes may be logged at once, and again within each Per. Records are counted
	// before they are clipped.
	Bytes int
	Per   time.Duration
}

// Handler returns a handler that passes records to h within the limit. Handlers
// derived from it (WithAttrs, WithGroup) share its limit.
func (l Limit) Handler(h slog.Handler) slog.Handler {
	return &limited{Handler: h, bucket: &bucket{Limit: l}}
}

type limited struct {
	slog.Handler
	*bucket
}

// Handle implements [slog.Handler].
func (h *limited) Handle(ctx context.Context, r slog.Record) error {
	dropped, ok := h.take(Size(r), time.Now(), r.Level >= slog.LevelError)
	if !ok {
		return nil
	}
	if dropped > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("not_logged", dropped))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements [slog.Handler].
func (h *limited) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &limited{h.Handler.WithAttrs(attrs), h.bucket}
}

// WithGroup implements [slog.Handler].
func (h *limited) WithGroup(name string) slog.Handler {
	return &limited{h.Handler.WithGroup(name), h.bucket}
}

// A bucket is a leaky bucket, empty at first.
type bucket struct {
	Limit
	mu      sync.Mutex
	used    float64 // bytes that have not leaked away
	at      time.Time
	dropped int // since the last record
}

// take counts a record of n bytes and reports whether it may be logged. dropped is the
// number of records before it that were not.
func (b *bucket) take(n int, now time.Time, always bool) (dropped int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used = max(b.used-now.Sub(b.at).Seconds()*float64(b.Bytes)/b.Per.Seconds(), 0)
	b.at = now
	if !always && b.used+float64(n) > float64(b.Bytes) {
		b.dropped++
		return 0, false
	}
	b.used += float64(n)
	dropped, b.dropped = b.dropped, 0
	return dropped, true
}

// Size returns the approximate size of a record, in bytes, in a log made by [New].
func Size(r slog.Record) int {
	const fixed = 200 // time, level, and the attributes of the logger
	n := fixed + len(r.Message)
	r.Attrs(func(a slog.Attr) bool {
		n += len(a.Key) + 16
		switch v := a.Value.Any().(type) {
		case string:
			n += min(len(v), maxValue)
		case error:
			n += min(len(v.Error()), maxValue)
		}
		return true
	})
	return n
}
