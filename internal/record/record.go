// Package record writes what happens on a terminal into a file as it happens,
// and plays such files. The format is asciicast v2, a header and a line of JSON
// for each event, as asciinema has it.
//
// What is recorded is what the client was sent, and, if asked for, what it sent.
// JSON holds text, so bytes that are not UTF-8 become U+FFFD.
package record

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// A Header is the first line of a recording.
type Header struct {
	Version   int               `json:"version"` // 2
	Width     int               `json:"width"`
	Height    int               `json:"height"`
	Timestamp int64             `json:"timestamp,omitempty"` // of the start, in seconds since 1970
	Command   string            `json:"command,omitempty"`   // empty: a shell
	Title     string            `json:"title,omitempty"`
	Env       map[string]string `json:"env,omitempty"`

	// These are ours; players pass over them.
	User    string `json:"user,omitempty"`
	Profile string `json:"profile,omitempty"`
	Conn    string `json:"conn,omitempty"`
	Channel int    `json:"channel"`
}

// A Store is a folder of recordings: one folder for each user, in it one for
// each day (UTC), in it one file for each session, called CONN-CHANNEL.cast.
// Folders have mode 0700 and files 0600.
type Store struct {
	Dir string
	// MaxSize bounds each recording, in bytes; zero means 100 MiB. What comes
	// after that is not recorded; a marker says so.
	MaxSize int64
}

const (
	maxSizeDefault = 100 << 20
	// reserve is kept for the marker at the end, in bytes.
	reserve = 256
	// maxText bounds a piece of output, so that readers may bound lines. A byte
	// takes up to six in JSON.
	maxText = 32 << 10
	// maxSide bounds the size of a terminal. RFC 4254, section 6.2, has 32 bits
	// for it; players allocate by it.
	maxSide = 10_000
	// maxField bounds what strangers put into the header, in bytes.
	maxField = 4 << 10
)

// ErrFull says that a recording has reached its maximum size.
var ErrFull = errors.New("the recording has reached its maximum size")

// A Recording is a file that is being written. Methods are safe for concurrent
// use. After an error nothing more is written, and all return that error.
type Recording struct {
	// Path is the file's.
	Path string

	began   time.Time
	maxSize int64

	mu     sync.Mutex
	f      *os.File
	size   int64
	err    error
	halves map[string][]byte // of each stream: the beginning of a character whose rest is to come
}

// Create begins a recording; the caller closes it. Version and Timestamp of the
// header are set here.
func (s *Store) Create(h Header) (*Recording, error) {
	now := time.Now()
	h.Version, h.Timestamp = 2, now.Unix()
	h.Width, h.Height = min(max(h.Width, 0), maxSide), min(max(h.Height, 0), maxSide)
	h.Command, h.Title = clip(h.Command), clip(h.Title)
	env := make(map[string]string)
	for name, value := range h.Env {
		env[name] = clip(value)
	}
	h.Env = env

	dir := filepath.Join(s.Dir, folder(h.User), now.UTC().Format(time.DateOnly))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the folder of a recording: %w", err)
	}
	path := filepath.Join(dir, fmt.Sprintf("%s-%d.cast", folder(h.Conn), h.Channel))
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("making a recording: %w", err)
	}
	r := &Recording{Path: path, began: now, maxSize: s.MaxSize, f: f, halves: make(map[string][]byte)}
	if r.maxSize == 0 {
		r.maxSize = maxSizeDefault
	}
	if err := r.line(h); err != nil {
		f.Close()
		os.Remove(path)
		return nil, err
	}
	return r, nil
}

// folder makes a name fit for a path, and different names different ones.
func folder(name string) string {
	var b strings.Builder
	for i, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_', c == '@', c == '-', c == '.' && i > 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02x", c)
		}
	}
	if b.Len() == 0 {
		return "%"
	}
	return b.String()
}

func clip(s string) string {
	if len(s) <= maxField {
		return s
	}
	return fmt.Sprintf("%s... (%d bytes more)", strings.ToValidUTF8(s[:maxField], ""), len(s)-maxField)
}

// Output records what the client is sent; stderr is a stream of its own, so that
// characters that come in pieces are put together right.
func (r *Recording) Output(p []byte, stderr bool) error {
	if stderr {
		return r.text("o", "stderr", p)
	}
	return r.text("o", "stdout", p)
}

// Input records what the client sends: what is typed, passwords too.
func (r *Recording) Input(p []byte) error { return r.text("i", "stdin", p) }

// Resize records that the window has another size now.
func (r *Recording) Resize(columns, rows int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.event("r", fmt.Sprintf("%dx%d", min(max(columns, 0), maxSide), min(max(rows, 0), maxSide)))
}

// Err returns the error after which nothing more was written; nil if there was
// none.
func (r *Recording) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// Close ends the recording, and returns what Err does. It may be called once.
func (r *Recording) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, stream := range []string{"stdout", "stderr", "stdin"} {
		if rest := r.halves[stream]; len(rest) > 0 {
			delete(r.halves, stream)
			code := "o"
			if stream == "stdin" {
				code = "i"
			}
			r.event(code, string(rest))
		}
	}
	err := r.err
	if closeErr := r.f.Close(); err == nil && closeErr != nil {
		err = fmt.Errorf("recording: %w", closeErr)
	}
	r.err = os.ErrClosed
	return err
}

// text records a piece of a stream. What may be the beginning of a character is
// kept for the next piece.
func (r *Recording) text(code, stream string, p []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return r.err
	}
	if half := r.halves[stream]; len(half) > 0 {
		p = append(half, p...)
		delete(r.halves, stream)
	}
	for len(p) > 0 {
		piece := p[:min(len(p), maxText)]
		whole := len(piece) - incomplete(piece)
		if whole == 0 { // so it is all there is
			r.halves[stream] = append([]byte(nil), piece...)
			return nil
		}
		if err := r.event(code, string(piece[:whole])); err != nil {
			return err
		}
		p = p[whole:]
	}
	return nil
}

// incomplete returns how many bytes at the end of p may be the beginning of a
// character.
func incomplete(p []byte) int {
	for n := 1; n <= min(len(p), utf8.UTFMax-1); n++ {
		if last := p[len(p)-n:]; utf8.RuneStart(last[0]) {
			if utf8.FullRune(last) {
				return 0
			}
			return n
		}
	}
	return 0
}

// event writes an event; r.mu is held.
func (r *Recording) event(code, text string) error {
	return r.line(r.stamp(code, text))
}

func (r *Recording) stamp(code, text string) []any {
	return []any{json.Number(fmt.Sprintf("%.6f", time.Since(r.began).Seconds())), code, text}
}

// encode returns v as a line.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return b.Bytes(), err
}

// line writes a line, whole or not at all.
func (r *Recording) line(v any) error {
	if r.err != nil {
		return r.err
	}
	data, err := encode(v)
	if err != nil {
		r.err = err
		return err
	}
	full := r.size+int64(len(data)) > r.maxSize-reserve
	if full {
		data, _ = encode(r.stamp("m", fmt.Sprintf("recording ends here: it has reached its maximum size of %d bytes", r.maxSize)))
	}
	n, err := r.f.Write(data)
	r.size += int64(n)
	switch {
	case err != nil:
		if n > 0 { // nobody else writes to it
			r.f.Truncate(r.size - int64(n))
		}
		r.err = fmt.Errorf("recording: %w", err)
	case full:
		r.err = ErrFull
	}
	return r.err
}
