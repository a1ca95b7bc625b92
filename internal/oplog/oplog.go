// Package oplog makes the operator's log: JSON lines, whose length and number clients
// cannot drive up, and whose reader cannot block the process.
package oplog

import (
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"strings"
)

const (
	// maxValue limits a value, in bytes. User names, commands and host names come
	// from clients and may have 256 KiB.
	maxValue = 2 << 10
	// maxStack limits stack traces, which do not come from clients.
	maxStack = 16 << 10
)

// New returns a logger that writes JSON lines to w.
func New(w io.Writer) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{ReplaceAttr: clip}))
}

// clip shortens a value that exceeds its limit, and appends the number of bytes cut.
func clip(_ []string, a slog.Attr) slog.Attr {
	var text string
	switch v := a.Value.Any().(type) {
	case string:
		text = v
	case error:
		text = v.Error()
	default:
		return a
	}
	limit := maxValue
	if a.Key == "stack" {
		limit = maxStack
	}
	if len(text) > limit {
		text = fmt.Sprintf("%s... (%d bytes more)", strings.ToValidUTF8(text[:limit], ""), len(text)-limit)
	}
	return slog.String(a.Key, text)
}

// Panic logs a recovered panic with its stack. The deferred function that recovered p
// calls it. In names the code that panicked.
func Panic(log *slog.Logger, in string, p any) {
	log.Error("panic", "in", in, "panic", p, "stack", string(debug.Stack()))
}
