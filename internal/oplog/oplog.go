// Package oplog makes the operator's log: JSON lines, whose length strangers do
// not decide.
package oplog

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
)

const (
	// maxValue is how much of a value is kept. User names, commands and host
	// names come from clients, who may make them 256 KiB long.
	maxValue = 2 << 10
	// maxStack is that for stacks, which are ours.
	maxStack = 16 << 10
)

// New returns a logger that writes JSON lines to w.
func New(w io.Writer) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{ReplaceAttr: clip}))
}

// clip shortens what is too long and says by how much.
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
