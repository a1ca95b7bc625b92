package record

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// An Event is something that happened on a recorded terminal.
type Event struct {
	// At is when, since the beginning. It never goes back.
	At time.Duration
	// Code is "o" for output, "i" for input, "r" for a new size of the window,
	// "m" for a marker, or something that is not known here.
	Code string
	Text string
}

// ErrTorn says that a recording breaks off within an event: whoever wrote it was
// killed, or it is still being written.
var ErrTorn = errors.New("the recording breaks off")

const (
	// maxRecorded bounds a line of a recording. Ours are far shorter.
	maxRecorded = 1 << 20
	// maxSeconds bounds the time of an event, far from where durations
	// overflow: some 30 years.
	maxSeconds = 1e9
)

// A Reader reads a recording. It needs memory for one event at a time.
type Reader struct {
	// Header is the recording's.
	Header Header

	r    *bufio.Reader
	line int
	last time.Duration
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
	// First the version alone, since other versions have other fields.
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

// Next returns the next event; [io.EOF] when there are no more, and ErrTorn when
// the file ends within one.
func (r *Reader) Next() (Event, error) {
	for {
		line, whole, err := r.next()
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
			return Event{}, ErrTorn
		case err != nil:
			return Event{}, fmt.Errorf("line %d of the recording: %w", r.line, err)
		case len(fields) != given:
			return Event{}, fmt.Errorf("line %d of the recording: not an event of time, code and text", r.line)
		case seconds < 0 || seconds > maxSeconds:
			return Event{}, fmt.Errorf("line %d of the recording: %g is no time in seconds", r.line, seconds)
		}
		r.last = max(r.last, time.Duration(seconds*float64(time.Second)))
		e.At = r.last
		return e, nil
	}
}

// next returns the next line; whole says that it ends with a newline.
func (r *Reader) next() (line []byte, whole bool, err error) {
	r.line++
	for {
		part, err := r.r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > maxRecorded:
			return nil, false, fmt.Errorf("line %d of the recording is longer than %d bytes", r.line, maxRecorded)
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

// A Player plays recordings. The zero value plays at the pace they were made.
type Player struct {
	// Speed is how many times as fast as it was; zero means once.
	Speed float64
	// IdleLimit cuts pauses, in the time of the recording; zero means that
	// none is cut.
	IdleLimit time.Duration
	// Pause stops the play when something is received, and the next time lets
	// it go on; it may be nil.
	Pause <-chan struct{}
}

// Play writes what r's terminal showed to w, as it showed it, until the end or
// until ctx ends, whose cause it then returns. ErrTorn comes after all there is
// has been played.
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
		// Waiting for a moment, and not for a time, lets no delay add up.
		due = due.Add(time.Duration(min(float64(pause)/speed, maxSeconds*float64(time.Second))))
		if due, err = p.wait(ctx, due); err != nil {
			return err
		}
		if _, err := io.WriteString(w, e.Text); err != nil {
			return err
		}
	}
}

// wait returns at due, which it may have to put off.
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
