package cost

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"time"
	"unique"

	"github.com/sallyport-ssh/sallyport/internal/audit"
)

const (
	// maxRuns limits the bastions of a Log: some 200 MB of memory.
	maxRuns = 250_000
	// maxLine limits a line, in bytes. Package audit writes shorter ones.
	maxLine = 64 << 10
	// maxName limits the names of users, profiles, platforms and architectures, in bytes.
	// Gateways have shorter ones.
	maxName = 256
	// maxSeconds limits durations in events.
	maxSeconds = 10 * 365 * 24 * 3600
	// maxSize limits the numbers of a size.
	maxSize = 1 << 30
)

// A Log collects the bastions in audit logs. The zero value is empty.
type Log struct {
	// OnBad, if not nil, is called with each line that is not counted.
	OnBad func(file string, line int, why error)

	limit       int                        // replaces maxRuns if not zero; tests set it
	runs        map[[sha256.Size]byte]*run // by the hash of the task
	first, last time.Time                  // of all events
	badLines    int
	lost        uint64
}

// A run is a bastion as its events describe it. Zero times are unknown.
type run struct {
	user, profile string
	size          size
	maxLife       time.Duration
	from, until   time.Time // between which the platform bills it
	started       time.Time // when its start began
	stopped       time.Time // when a gateway stopped it
	ended         time.Time // when a gateway found it ended
}

// Read reads a log, which may be compressed by gzip. A line that is no event is
// counted, and the rest is read. It returns an error if r cannot be read to its end;
// the lines before that count.
func (l *Log) Read(file string, r io.Reader) error {
	in := bufio.NewReaderSize(r, maxLine)
	if magic, _ := in.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		unzip, err := gzip.NewReader(in)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		in = bufio.NewReaderSize(unzip, maxLine)
	}
	for n := 1; ; n++ {
		text, err := in.ReadSlice('\n')
		long := false
		for errors.Is(err, bufio.ErrBufferFull) {
			long = true
			_, err = in.ReadSlice('\n')
		}
		if err != nil && err != io.EOF {
			return fmt.Errorf("%s: after line %d: %w", file, n, err)
		}
		why := error(nil)
		if long {
			why = fmt.Errorf("longer than %d bytes", maxLine)
		} else if text = bytes.TrimSpace(text); len(text) > 0 {
			why = l.add(text)
		}
		if errors.Is(why, errTooMany) {
			return fmt.Errorf("%s: line %d: %w", file, n, why)
		}
		if why != nil {
			l.badLines++
			if l.OnBad != nil {
				l.OnBad(file, n, why)
			}
		}
		if err == io.EOF {
			return nil
		}
	}
}

var errTooMany = fmt.Errorf("more than %d bastions; read fewer files", maxRuns)

// An event has the fields of audit.Event that count. The others are not parsed.
type event struct {
	Version int        `json:"v"`
	Time    time.Time  `json:"time"`
	Lost    uint64     `json:"lost"`
	Type    audit.Type `json:"event"`

	User    string `json:"user"`
	Profile string `json:"profile"`
	Task    string `json:"task"`

	Took    float64 `json:"took"`
	MaxLife float64 `json:"max_life"`

	Platform     string    `json:"platform"`
	Capacity     string    `json:"capacity"`
	Architecture string    `json:"architecture"`
	CPU          int       `json:"cpu"`
	Memory       int       `json:"memory"`
	Storage      int       `json:"ephemeral_storage"`
	RanFrom      time.Time `json:"ran_from"`
	RanUntil     time.Time `json:"ran_until"`
}

// add adds a line.
func (l *Log) add(text []byte) error {
	var e event
	if err := json.Unmarshal(text, &e); err != nil {
		return err
	}
	switch {
	case e.Version != audit.Version:
		return fmt.Errorf("version %d of the audit log is not known", e.Version)
	case e.Time.IsZero() || e.Type == "":
		return errors.New("an event without time or type")
	}
	for _, at := range []time.Time{e.Time, e.RanFrom, e.RanUntil} {
		// Durations between others might overflow.
		if year := at.UTC().Year(); !at.IsZero() && (year < 2000 || year > 2200) {
			return fmt.Errorf("an event of the year %d", year)
		}
	}
	var seen bool
	switch e.Type {
	case audit.BastionStarted, audit.BastionAdopted, audit.BastionJoined, audit.BastionEnded, audit.BastionStopped:
		seen = true
	case audit.BastionFailed:
		seen = e.Task != "" // else nothing was launched
	}
	if seen {
		if err := l.addBastion(e); err != nil {
			return err
		}
	}
	if l.first.IsZero() || e.Time.Before(l.first) {
		l.first = e.Time
	}
	l.last = later(l.last, e.Time)
	l.lost += e.Lost
	return nil
}

// addBastion adds an event of a bastion.
func (l *Log) addBastion(e event) error {
	if e.User == "" || e.Profile == "" || e.Task == "" {
		return fmt.Errorf("a %s event without user, profile or task", e.Type)
	}
	if max(len(e.User), len(e.Profile), len(e.Platform), len(e.Architecture)) > maxName {
		return fmt.Errorf("a %s event with a name of more than %d bytes", e.Type, maxName)
	}
	id := sha256.Sum256([]byte(e.Task))
	r := l.runs[id]
	if r == nil {
		if len(l.runs) >= cmp.Or(l.limit, maxRuns) {
			return errTooMany
		}
		if l.runs == nil {
			l.runs = map[[sha256.Size]byte]*run{}
		}
		r = &run{user: unique.Make(e.User).Value(), profile: unique.Make(e.Profile).Value()}
		l.runs[id] = r
	}
	r.addUsage(e)
	switch e.Type {
	case audit.BastionStarted, audit.BastionFailed:
		// Of several gateways that waited for a start, one has begun it.
		if began := e.Time.Add(-duration(e.Took)); r.started.IsZero() || began.Before(r.started) {
			r.started = began
		}
	case audit.BastionStopped:
		r.stopped = earliest(r.stopped, e.Time)
	case audit.BastionEnded:
		r.ended = earliest(r.ended, e.Time)
	}
	return nil
}

// addUsage adds the size and the times of an event.
func (r *run) addUsage(e event) {
	if life := duration(e.MaxLife); life > 0 {
		r.maxLife = life
	}
	// The launch of a task, in an event of a running one, is before the pull of its
	// image, from which on it is billed.
	r.from = later(r.from, e.RanFrom)
	r.until = later(r.until, e.RanUntil)
	next := size{
		platform: unique.Make(e.Platform).Value(), architecture: unique.Make(e.Architecture).Value(), spot: e.Capacity == "spot",
		cpu: clamp(e.CPU), memory: clamp(e.Memory), storage: clamp(e.Storage),
	}
	// Another gateway that waited for the start knows no size.
	if r.size.platform == "" {
		r.size = next
	}
}

// earliest returns the earlier of two times; a is zero if there is none yet.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() {
		return b
	}
	return earlier(a, b)
}

// duration returns seconds as a duration; zero if they are out of range.
func duration(seconds float64) time.Duration {
	if !(seconds > 0) || seconds > maxSeconds {
		return 0
	}
	return time.Duration(math.Round(seconds * float64(time.Second)))
}

func clamp(n int) int { return min(max(n, 0), maxSize) }
