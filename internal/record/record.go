// Package record records terminal sessions, and plays recordings.
//
// A recording has the output of a session and, if the caller records it, the input. It
// is written while the session runs. The format is asciicast v2 of asciinema: a header,
// and a line of JSON for each event. JSON holds text, so bytes that are not UTF-8
// become U+FFFD.
//
// [Store.Create] begins a recording. [Open] and [Player] play one.
//
// # Parts
//
// If a file reaches the maximum size, the recording continues in another file, its next
// part: CONN-CHANNEL.cast, CONN-CHANNEL.2.cast and so on, in one folder. Each part is
// an asciicast that can be played by itself, so its times begin at zero. The header has
// the number of the part and its offset in the recording.
package record

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
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
	Timestamp int64             `json:"timestamp,omitempty"` // start time, in seconds since 1970
	Command   string            `json:"command,omitempty"`   // empty for a shell
	Title     string            `json:"title,omitempty"`
	Env       map[string]string `json:"env,omitempty"`

	// Extensions of the format, which players ignore.
	User    string `json:"user,omitempty"`
	Profile string `json:"profile,omitempty"`
	Conn    string `json:"conn,omitempty"`
	Channel int    `json:"channel"`
	// Part is the number of the part; 0 means 1. Offset is the time between the
	// starts of the first part and of this one, in seconds.
	Part   int     `json:"part,omitempty"`
	Offset float64 `json:"offset,omitempty"`
	// NoTerminal is set for a session without a terminal. Then the size is a
	// default, and the output has CR LF in place of LF, like that of a terminal.
	NoTerminal bool `json:"no_terminal,omitempty"`
}

// A Store is a folder of recordings. It has a folder for each user, in that a folder
// for each day (UTC), and in that the files of each session: CONN-CHANNEL.cast, and
// CONN-CHANNEL.N.cast for part N. Folders have mode 0700, files 0600.
type Store struct {
	Dir string
	// MaxSize limits each file, in bytes; zero means 100 MiB.
	MaxSize int64
	// MaxPerUser limits all files in a user's folder, in bytes, including those of
	// other gateways. Zero means no limit.
	MaxPerUser int64

	mu    sync.Mutex
	users map[string]*usage
	space func() int64 // replaces that of the file system in tests
}

const (
	defaultMaxSize = 100 << 20
	// markerSpace is reserved for the marker at the end of a file, in bytes.
	markerSpace = 512
	// maxText limits the text of an event, so that readers can limit lines. A byte
	// may become six in JSON.
	maxText = 32 << 10
	// maxSide limits the width and height of a terminal. RFC 4254 section 6.2 has 32
	// bits for each, and players allocate memory for them.
	maxSide = 10_000
	// maxField limits values from clients in the header, in bytes.
	maxField = 4 << 10
)

// A Recording is a recording that is being written. Methods are safe for concurrent
// use. After an error nothing more is written, and all methods return that error.
type Recording struct {
	// Path is the path of the first part.
	Path string

	began   time.Time
	maxSize int64
	usage   *usage

	mu        sync.Mutex
	header    Header    // of the current part
	partBegan time.Time // start of the current part
	f         *os.File
	size      int64 // of f
	err       error
	partial   map[string][]byte // by stream: the first bytes of an incomplete character
	cr        map[string]bool   // by stream: the last byte was CR
}

// Create begins a recording, which the caller closes. It sets Version and Timestamp of
// the header.
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

	usage := s.usageOf(h.User)
	if err := usage.check(0); err != nil {
		return nil, err
	}
	dir := filepath.Join(s.Dir, pathElement(h.User), now.UTC().Format(time.DateOnly))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("creating the folder of a recording: %w", err)
	}
	path := filepath.Join(dir, fmt.Sprintf("%s-%d.cast", pathElement(h.Conn), h.Channel))
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("creating a recording: %w", err)
	}
	usage.addFile()
	r := &Recording{
		Path: path, began: now, partBegan: now, maxSize: s.MaxSize, usage: usage, header: h, f: f,
		partial: make(map[string][]byte), cr: make(map[string]bool),
	}
	if r.maxSize == 0 {
		r.maxSize = defaultMaxSize
	}
	if err := r.writeLine(h); err != nil {
		f.Close()
		os.Remove(path)
		return nil, err
	}
	return r, nil
}

// partPath returns the path of a part of the recording with the first part at path.
func partPath(path string, part int) string {
	if part <= 1 {
		return path
	}
	return fmt.Sprintf("%s.%d.cast", strings.TrimSuffix(path, ".cast"), part)
}

// firstPath is the inverse of partPath.
func firstPath(path string, part int) string {
	if part <= 1 {
		return path
	}
	return strings.TrimSuffix(path, fmt.Sprintf(".%d.cast", part)) + ".cast"
}

// pathElement encodes a name as an element of a path. Different names have different
// encodings.
func pathElement(name string) string {
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

// Output records data that is sent to the client. stderr distinguishes the two streams,
// because a character may be split between two calls for the same stream.
func (r *Recording) Output(p []byte, stderr bool) error {
	if stderr {
		return r.text("o", "stderr", p)
	}
	return r.text("o", "stdout", p)
}

// Input records data that the client sends. It includes passwords.
func (r *Recording) Input(p []byte) error { return r.text("i", "stdin", p) }

// Resize records a new size of the terminal.
func (r *Recording) Resize(columns, rows int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.header.Width, r.header.Height = min(max(columns, 0), maxSide), min(max(rows, 0), maxSide) // for the header of the next part
	return r.event("r", fmt.Sprintf("%dx%d", r.header.Width, r.header.Height))
}

// Parts returns the number of parts.
func (r *Recording) Parts() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return max(r.header.Part, 1)
}

// Err returns the error that ended the recording; nil if there was none.
func (r *Recording) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// Close ends the recording. It returns the same error as Err, and must be called only
// once.
func (r *Recording) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, stream := range []string{"stdout", "stderr", "stdin"} {
		if rest := r.partial[stream]; len(rest) > 0 {
			delete(r.partial, stream)
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

// text records data of a stream. An incomplete character at the end is kept for the
// next call.
func (r *Recording) text(code, stream string, p []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return r.err
	}
	if code == "o" && r.header.NoTerminal {
		p = r.carriageReturns(stream, p)
	}
	if first := r.partial[stream]; len(first) > 0 {
		p = append(first, p...)
		delete(r.partial, stream)
	}
	for len(p) > 0 {
		piece := p[:min(len(p), maxText)]
		whole := len(piece) - incomplete(piece)
		if whole == 0 { // piece is one incomplete character, and all of p
			r.partial[stream] = append([]byte(nil), piece...)
			return nil
		}
		if err := r.event(code, string(piece[:whole])); err != nil {
			return err
		}
		p = p[whole:]
	}
	return nil
}

// carriageReturns inserts a CR before each LF that has none, like the line discipline
// of a terminal (ONLCR). The caller holds r.mu.
func (r *Recording) carriageReturns(stream string, p []byte) []byte {
	out := make([]byte, 0, len(p)+bytes.Count(p, []byte{'\n'}))
	cr := r.cr[stream]
	for _, b := range p {
		if b == '\n' && !cr {
			out = append(out, '\r')
		}
		cr = b == '\r'
		out = append(out, b)
	}
	r.cr[stream] = cr
	return out
}

// incomplete returns the length of an incomplete character at the end of p.
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

// event writes an event, into the next part if the current one is full. The caller
// holds r.mu.
func (r *Recording) event(code, text string) error {
	if r.err != nil {
		return r.err
	}
	data, err := encode(r.timed(code, text))
	if err == nil && r.size+int64(len(data)) > r.maxSize-markerSpace {
		if err = r.nextPart(); err == nil {
			data, err = encode(r.timed(code, text))
		}
	}
	if err != nil {
		r.mark("the recording ends here: it cannot go on in another file")
		r.err = err
		return err
	}
	if err := r.usage.check(int64(len(data))); err != nil {
		r.mark("the recording ends here: " + err.Error())
		r.err = err
		return err
	}
	return r.write(data)
}

// timed returns an event with the current time in the part.
func (r *Recording) timed(code, text string) []any {
	return []any{json.Number(fmt.Sprintf("%.6f", time.Since(r.partBegan).Seconds())), code, text}
}

// encode returns v as a line of JSON.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return b.Bytes(), err
}

// writeLine writes v as a line. The caller holds r.mu, or has the only reference to r.
func (r *Recording) writeLine(v any) error {
	data, err := encode(v)
	if err != nil {
		r.err = err
		return err
	}
	return r.write(data)
}

// mark writes a marker, if the file has space for it. The caller holds r.mu.
func (r *Recording) mark(text string) {
	if data, err := encode(r.timed("m", text)); err == nil && r.size+int64(len(data)) <= r.maxSize {
		r.write(data)
	}
}

// write writes a line, whole or not at all.
func (r *Recording) write(data []byte) error {
	n, err := r.f.Write(data)
	r.size += int64(n)
	r.usage.add(int64(n))
	if err != nil {
		if n > 0 { // there is no other writer
			r.f.Truncate(r.size - int64(n))
		}
		r.err = fmt.Errorf("recording: %w", err)
	}
	return r.err
}

// nextPart begins the next part. The caller holds r.mu.
func (r *Recording) nextPart() error {
	now := time.Now()
	next := r.header
	next.Part = max(r.header.Part, 1) + 1
	next.Timestamp, next.Offset = now.Unix(), math.Round(now.Sub(r.began).Seconds()*1e6)/1e6
	path := partPath(r.Path, next.Part)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("creating the next part of a recording: %w", err)
	}
	r.usage.addFile()
	r.mark("the recording goes on in " + filepath.Base(path))
	r.f.Close()
	r.f, r.size, r.header, r.partBegan = f, 0, next, now
	return r.writeLine(next)
}
