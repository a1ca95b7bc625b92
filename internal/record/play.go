package record

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// An Event is an event of a recording.
type Event struct {
	// At is the time since the beginning of the recording. It never decreases.
	At time.Duration
	// Code is "o" for output, "i" for input, "r" for a new size of the terminal, "m"
	// for a marker. Other codes are possible.
	Code string
	Text string
}

// ErrTruncated is the error if a recording ends within an event, because its writer was
// killed or is still writing.
var ErrTruncated = errors.New("the recording is truncated")

const (
	// maxLine limits a line of a recording, in bytes. Lines of this package are
	// much shorter.
	maxLine = 1 << 20
	// maxSeconds limits the time of an event to some 30 years, so that durations do
	// not overflow.
	maxSeconds = 1e9
)

// A Reader reads a recording. It has one event in memory at a time.
type Reader struct {
	// Header is the header of the first part that is read.
	Header Header

	r    *bufio.Reader
	line int
	last time.Duration

	// Open sets these fields.
	first string        // path of the recording's first part
	f     *os.File      // the current part
	part  Header        // of the current part
	shift time.Duration // is added to the times of the current part
}

// Open opens a recording at the part at path. The Reader continues with the later parts
// as if they were one file. The caller closes it.
func Open(path string) (*Reader, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	r, err := NewReader(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	r.f, r.part = f, r.Header
	r.first = firstPath(path, max(r.Header.Part, 1))
	return r, nil
}

// Close closes the file, if [Open] returned the Reader.
func (r *Reader) Close() error {
	if r.f == nil {
		return nil
	}
	return r.f.Close()
}

// nextPart continues with the next part. It returns false if there is none.
func (r *Reader) nextPart() (bool, error) {
	if r.first == "" {
		return false, nil
	}
	part := max(r.part.Part, 1) + 1
	path := partPath(r.first, part)
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	next, err := NewReader(f)
	if err == nil && (next.Header.Part != part || next.Header.Conn != r.Header.Conn || next.Header.Channel != r.Header.Channel) {
		err = errors.New("not the next part of this recording")
	}
	if err != nil {
		f.Close()
		return false, fmt.Errorf("%s: %w", path, err)
	}
	r.f.Close()
	r.f, r.part, r.r, r.line = f, next.Header, next.r, next.line
	if offset := next.Header.Offset - r.Header.Offset; offset > 0 && offset < maxSeconds {
		r.shift = time.Duration(offset * float64(time.Second))
	}
	return true, nil
}

// NewReader reads the header from r.
func NewReader(r io.Reader) (*Reader, error) {
	reader := &Reader{r: bufio.NewReaderSize(r, 64<<10)}
	line, _, err := reader.next()
	if errors.Is(err, io.EOF) {
		return nil, errors.New("not a recording: the file is empty")
	}
	if err != nil {
		return nil, err
	}
	// The version first, because other versions have other fields.
	var version struct{ Version json.Number }
	if err := json.Unmarshal(line, &version); err != nil || version.Version == "" {
		return nil, errors.New("not a recording: the first line is not the header of an asciicast")
	}
	if version.Version != "2" {
		return nil, fmt.Errorf("an asciicast of version %.8s; only version 2 can be played", version.Version)
	}
	if err := json.Unmarshal(line, &reader.Header); err != nil {
		return nil, fmt.Errorf("the header of the recording: %w", err)
	}
	return reader, nil
}

// Next returns the next event. The error is [io.EOF] at the end, and ErrTruncated if the
// file ends within an event.
func (r *Reader) Next() (Event, error) {
	for {
		line, whole, err := r.next()
		if errors.Is(err, io.EOF) {
			if more, nextErr := r.nextPart(); more || nextErr != nil {
				err = nextErr
				if more {
					continue
				}
			}
		}
		if err != nil {
			return Event{}, err
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		var seconds float64
		var e Event
		fields := []any{&seconds, &e.Code, &e.Text}
		given := len(fields)
		err = json.Unmarshal(line, &fields)
		switch {
		case err != nil && !whole:
			return Event{}, ErrTruncated
		case err != nil:
			return Event{}, fmt.Errorf("line %d of the recording: %w", r.line, err)
		case len(fields) != given:
			return Event{}, fmt.Errorf("line %d of the recording: not an event of time, code and text", r.line)
		case seconds < 0 || seconds > maxSeconds:
			return Event{}, fmt.Errorf("line %d of the recording: %g is no time in seconds", r.line, seconds)
		}
		r.last = max(r.last, min(r.shift+time.Duration(seconds*float64(time.Second)), maxSeconds*time.Second))
		e.At = r.last
		return e, nil
	}
}

// next returns the next line. whole reports whether it ends with a newline.
func (r *Reader) next() (line []byte, whole bool, err error) {
	r.line++
	for {
		part, err := r.r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > maxLine:
			return nil, false, fmt.Errorf("line %d of the recording is longer than %d bytes", r.line, maxLine)
		case err == nil:
			return line, true, nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF) && len(line) > 0:
			return line, false, nil
		default:
			return nil, false, err
		}
	}
}

// A Player plays recordings. The zero value plays at the original speed.
type Player struct {
	// Speed is a factor of the original speed; zero means 1.
	Speed float64
	// IdleLimit limits the time between two events, before Speed is applied; zero
	// means no limit.
	IdleLimit time.Duration
	// Pause pauses and resumes the player alternately with each received value. It
	// may be nil.
	Pause <-chan struct{}
}

// Play writes the output in r to w, with the recorded timing. It returns at the end of
// the recording, or when ctx ends with the cause of ctx. If the recording is truncated,
// Play returns ErrTruncated after the last whole event.
func (p *Player) Play(ctx context.Context, w io.Writer, r *Reader) error {
	speed := p.Speed
	if speed == 0 {
		speed = 1
	}
	var at time.Duration
	due := time.Now()
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if e.Code != "o" {
			continue
		}
		pause := e.At - at
		at = e.At
		if p.IdleLimit > 0 {
			pause = min(pause, p.IdleLimit)
		}
		// Wait until a point in time, not for a duration, so that delays do not add
		// up.
		due = due.Add(time.Duration(min(float64(pause)/speed, maxSeconds*float64(time.Second))))
		if due, err = p.wait(ctx, due); err != nil {
			return err
		}
		if _, err := io.WriteString(w, e.Text); err != nil {
			return err
		}
	}
}

// wait waits until due. It returns the later time if the player was paused.
func (p *Player) wait(ctx context.Context, due time.Time) (time.Time, error) {
	timer := time.NewTimer(time.Until(due))
	defer timer.Stop()
	select {
	case <-timer.C:
		return due, context.Cause(ctx)
	case <-ctx.Done():
		return due, context.Cause(ctx)
	case <-p.Pause:
	}
	began := time.Now()
	select {
	case <-p.Pause:
		return p.wait(ctx, due.Add(time.Since(began)))
	case <-ctx.Done():
		return due, context.Cause(ctx)
	}
}
