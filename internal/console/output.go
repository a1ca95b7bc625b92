package console

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// writeJSON writes v as one line of JSON.
func (s *session) writeJSON(v any) error { return writeJSON(s.out, v) }

func writeJSON(to io.Writer, v any) error {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("encoding an answer: %w", err)
	}
	_, err := to.Write(EscapeJSON(buf.Bytes()))
	return err
}

// EscapeJSON escapes the characters of valid JSON that could control a terminal. Package
// json escapes neither DEL and the C1 controls nor the marks that reverse text. They only
// occur in strings.
func EscapeJSON(text []byte) []byte {
	var out []byte
	for _, r := range string(text) {
		switch {
		case r == '\n' || unicode.IsGraphic(r):
			out = utf8.AppendRune(out, r)
		case r <= 0xffff:
			out = fmt.Appendf(out, `\u%04x`, r)
		default:
			high, low := utf16.EncodeRune(r)
			out = fmt.Appendf(out, `\u%04x\u%04x`, high, low)
		}
	}
	return out
}

// table writes the table that f writes to w, with tabs between columns.
func (s *session) table(f func(w *tabwriter.Writer)) error { return table(s.out, f) }

func table(to io.Writer, f func(w *tabwriter.Writer)) error {
	var text bytes.Buffer
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	f(w)
	w.Flush()
	_, err := io.WriteString(to, wrap(text.String()))
	return err
}

// tableWidth is the maximum width of a table, in columns.
const tableWidth = 80

// wrap breaks lines that are wider than tableWidth, at a blank if possible, and indents
// the continuation lines.
func wrap(text string) string {
	const indent = "    "
	var out strings.Builder
	for line := range strings.Lines(text) {
		rest := []rune(strings.TrimRight(line, " \n"))
		for len(rest) > tableWidth {
			at := tableWidth
			for i := tableWidth; i > tableWidth/2; i-- {
				if rest[i] == ' ' {
					at = i
					break
				}
			}
			out.WriteString(strings.TrimRight(string(rest[:at]), " ") + "\n")
			rest = []rune(indent + strings.TrimLeft(string(rest[at:]), " "))
		}
		out.WriteString(string(rest) + "\n")
	}
	return out.String()
}

// maxText is the length to which sanitize clips a text, in characters, and maxSentence
// that of a sentence with untrusted words in it.
const maxText, maxSentence = 80, 400

// sanitize makes untrusted text safe for a terminal: it clips it to maxText, and replaces
// line ends, control characters and marks that reverse text by question marks.
func sanitize(text string) string { return sanitizeTo(text, maxText) }

func sanitizeTo(text string, most int) string {
	var b strings.Builder
	n := 0
	for _, r := range text {
		if n++; n > most {
			b.WriteString("...")
			break
		}
		if r == utf8.RuneError || !unicode.IsGraphic(r) {
			r = '?'
		}
		b.WriteRune(r)
	}
	return b.String()
}

// age returns the time since a moment, or "-" for the zero time.
func age(since time.Time) string {
	if since.IsZero() {
		return "-"
	}
	return shortDuration(time.Since(since))
}

// ageOf is age for a time of JSON output, which may be nil.
func ageOf(since *time.Time) string {
	if since == nil {
		return "-"
	}
	return age(*since)
}

// shortDuration formats a duration with its two largest units.
func shortDuration(d time.Duration) string {
	d = max(d, 0).Round(time.Second)
	days, hours, minutes, seconds := d/(24*time.Hour), d/time.Hour%24, d/time.Minute%60, d/time.Second%60
	switch {
	case days > 0:
		return fmt.Sprintf("%dd%dh", days, hours)
	case hours > 0:
		return fmt.Sprintf("%dh%dm", hours, minutes)
	case minutes > 0:
		return fmt.Sprintf("%dm%ds", minutes, seconds)
	}
	return fmt.Sprintf("%ds", seconds)
}

// size formats a number of bytes.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d", n)
	}
	value, unit := float64(n)/1024, 0
	for value >= 1024 {
		value /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f%c", value, units[unit])
}

// jsonTime returns a time for JSON: in UTC, and nil for the zero time.
func jsonTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC().Truncate(time.Second)
	return &t
}
