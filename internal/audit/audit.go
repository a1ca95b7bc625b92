// Package audit writes the audit log: one line of JSON per event.
//
// These events are written, each with the user, the connection and the time:
//
//   - connections and logins, accepted or refused, with the key or certificate
//   - starts, failures and ends of bastions
//   - sessions, with their command or subsystem, and their recording
//   - file transfers and other changes of files by sftp and scp
//   - forwards and listeners, with their addresses
//   - requests that a key or a role does not permit
//   - self-service keys that users add or remove
//   - starts and stops of the gateway
//
// [Type] lists them, [Event] has the fields, and docs/audit.md documents which event
// has which fields. The schema has a version. Events are never written about the
// content of sessions; see package record.
//
// # Order and durability
//
// [Log.Write] returns when the kernel has the line. So events are in the order of the
// calls, and a killed process loses no event for which Write has returned. If the
// machine loses power, the last seconds of a file may be lost.
//
// A line is written whole or not at all. If the process is killed or the disk fills up
// within a line, the next event begins on a new line.
//
// # When the log cannot be written
//
// If the log fails closed, Write returns an error, the event must not happen, and the
// function of [Log.OnFailure] ends the connections. Otherwise the event happens and is
// counted as lost. In both cases the operator's log has an error, and the next line
// that succeeds has the number of lost events. Write blocks for a few seconds at most.
//
// A gateway that a load balancer has taken out of service has no events to write, so
// its log would fail forever. [Log.Retry] writes one.
package audit

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"sync"
	"time"
)

const (
	// writeTimeout limits the write of an event. A pipe without a reader or a
	// network disk may block longer.
	writeTimeout = 5 * time.Second
	// queueSize is how many events wait while a write blocks. More are lost.
	queueSize = 1024
	// alertInterval is how often a failure that persists is logged.
	alertInterval = time.Minute
)

// ErrStuck is the error if a write of the log blocks.
var ErrStuck = errors.New("the audit log does not accept events")

var errClosed = errors.New("the audit log is closed")

// A Config has the settings of a log. The destination is the first of File, Stdout
// and Syslog that is set.
type Config struct {
	// File is the path of a file. It is created with mode 0600; [Log.Reopen]
	// opens it again.
	File string
	// Stdout is a writer.
	Stdout io.Writer
	// Syslog is a facility of syslog(3). Socket is the path of the daemon's
	// socket; empty means the usual ones.
	Syslog syslog.Priority
	Socket string

	// Reserve is how many bytes of the file system are reserved for File, so that
	// events can be written when the file system is full. Zero means none. If the
	// file system does not support it, a warning is logged.
	Reserve int64

	// FailClosed makes [Log.Write] return the error of a failed write. Otherwise
	// Write counts the event as lost and returns nil.
	FailClosed bool
	// Gateway is the name of this gateway, a field of every event.
	Gateway string
	// Observe, if not nil, is called with every event before it is written, also
	// if the write then fails, and not with a LogResumed. It must not block.
	Observe func(Event)
	Log     *slog.Logger
}

// A Log writes events. Methods are safe for concurrent use. A nil Log discards events.
type Log struct {
	cfg   Config
	sink  sink   // used by run only
	seq   uint64 // used by run only
	queue chan *entry
	done  chan struct{} // closed when run has returned

	mu        sync.Mutex
	closed    bool
	stuck     bool // a write has timed out, and none has succeeded since
	failing   bool
	lost      uint64    // events that no line has counted yet
	written   uint64    // lines, for Stats
	lostEver  uint64    // for Stats
	alerted   time.Time // when the failure was last logged
	onFailure func()
}

// An entry is an event to write, or a request to reopen the sink.
type entry struct {
	event  Event
	reopen bool
	retry  bool       // the event is not lost if the write fails
	size   int        // of the line; set before a value is sent to done
	done   chan error // buffered
}

// weight returns the number of events that are lost if en is not written.
func (en *entry) weight() uint64 {
	if en.retry {
		return 0
	}
	return 1
}

// A sink writes lines, which end with a newline.
type sink interface {
	// write writes the whole line. If it fails, no part of the line remains that a
	// reader could take for an event.
	write(line []byte) error
	reopen() error
	close() error
}

// Open opens a log. The caller closes it.
func Open(cfg Config) (*Log, error) {
	l := &Log{cfg: cfg, queue: make(chan *entry, queueSize), done: make(chan struct{})}
	var err error
	switch {
	case cfg.File != "":
		l.sink, err = openFile(cfg)
	case cfg.Stdout != nil:
		l.sink = &stream{w: cfg.Stdout}
	default:
		l.sink, err = openSyslog(cfg.Socket, cfg.Syslog)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the audit log: %w", err)
	}
	go l.run() // until Close
	return l, nil
}

// OnFailure sets the function that is called when a log that fails closed begins to
// fail. f must end all connections, and must not block.
func (l *Log) OnFailure(f func()) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.onFailure = f
}

// Write writes an event. It blocks until the write has succeeded or failed, for a few
// seconds at most. It returns an error only if the log fails closed; then the event
// must not happen.
func (l *Log) Write(e Event) error {
	_, err := l.Append(e)
	return err
}

// Append is [Log.Write]. It also returns the length of the line, or zero if it was not
// written.
func (l *Log) Append(e Event) (int, error) {
	if l == nil {
		return 0, nil
	}
	return l.append(&entry{event: e, done: make(chan error, 1)})
}

func (l *Log) append(en *entry) (int, error) {
	en.event.Version, en.event.Gateway = Version, l.cfg.Gateway
	en.event.Time = time.Now().UTC().Truncate(time.Microsecond)
	if l.cfg.Observe != nil && !en.retry {
		l.cfg.Observe(en.event)
	}
	if err := l.wait(en); err != nil {
		if l.cfg.FailClosed {
			return 0, fmt.Errorf("writing to the audit log: %w", err)
		}
		return 0, nil
	}
	return en.size, nil
}

// Blocks reports whether the log fails closed and fails at present, so that no user can
// log in.
func (l *Log) Blocks() bool {
	if l == nil || !l.cfg.FailClosed {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failing
}

// Retry tries to end a failure: if the log fails, it writes a LogResumed. It blocks as
// Write does.
func (l *Log) Retry() {
	if l == nil {
		return
	}
	l.mu.Lock()
	// If a write is stuck, the queued events are the retry.
	needed := l.failing && !l.stuck && !l.closed
	l.mu.Unlock()
	if needed {
		l.append(&entry{event: Event{Type: LogResumed}, retry: true, done: make(chan error, 1)})
	}
}

// Stats are numbers of a [Log], for metrics.
type Stats struct {
	// Queued is the number of events that wait to be written, at most 1,024.
	Queued int
	// Written and Lost count events since Open.
	Written, Lost uint64
	// Failing says that the last write has failed.
	Failing bool
	// Free is the result of [Log.Free].
	Free int64
}

// Stats returns the present numbers. It does not wait for a write.
func (l *Log) Stats() Stats {
	s := Stats{Free: l.Free()}
	if l == nil {
		return s
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s.Queued, s.Written, s.Lost, s.Failing = len(l.queue), l.written, l.lostEver, l.failing
	return s
}

// Free returns how many bytes can still be written, including the reserve; -1 if that
// is unknown, as with syslog. The result may be a second old.
func (l *Log) Free() int64 {
	if l == nil {
		return -1
	}
	f, ok := l.sink.(*file)
	if !ok {
		return -1
	}
	return f.free()
}

// Reopen opens File again, after log rotation has renamed it. Events before the call
// are in the old file, later ones in the new file. If Reopen fails, the old file stays
// in use. For syslog it connects again.
func (l *Log) Reopen() error {
	if l == nil {
		return nil
	}
	if err := l.wait(&entry{reopen: true, done: make(chan error, 1)}); err != nil {
		return fmt.Errorf("reopening the audit log: %w", err)
	}
	return nil
}

// Close writes the queued events and closes the log. Later events are lost.
func (l *Log) Close() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.queue)
	}
	l.mu.Unlock()
	select {
	case <-l.done:
		return l.sink.close()
	case <-time.After(writeTimeout):
		return ErrStuck
	}
}

// wait queues en and waits for its result.
func (l *Log) wait(en *entry) error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		l.cfg.Log.Warn("an event after the audit log was closed", "event", string(en.event.Type))
		return errClosed
	}
	full := false
	select {
	case l.queue <- en:
	default:
		full = true
	}
	stuck := l.stuck
	l.mu.Unlock()
	switch {
	case full && en.reopen:
		return ErrStuck
	case full:
		l.recordFailure(ErrStuck, en.weight())
		return ErrStuck
	case stuck: // the event stays in the queue, and is written if the log recovers
		return ErrStuck
	}
	timer := time.NewTimer(writeTimeout)
	defer timer.Stop()
	select {
	case err := <-en.done:
		return err
	case <-timer.C:
		l.mu.Lock()
		l.stuck = true
		l.mu.Unlock()
		l.recordFailure(fmt.Errorf("%w for %v", ErrStuck, writeTimeout), 0)
		return ErrStuck
	}
}

// run writes the queued events in order.
func (l *Log) run() {
	defer close(l.done)
	for en := range l.queue {
		if en.reopen {
			en.done <- l.sink.reopen()
			continue
		}
		size, err := l.write(en)
		en.size = size
		en.done <- err
	}
}

func (l *Log) write(en *entry) (int, error) {
	e := en.event
	l.mu.Lock()
	e.Lost = l.lost
	l.mu.Unlock()
	e.Seq = l.seq + 1
	line, err := e.line()
	if err == nil {
		err = l.sink.write(line)
	}
	if err != nil {
		l.recordFailure(err, en.weight())
		return 0, err
	}
	l.seq++
	l.mu.Lock()
	defer l.mu.Unlock()
	l.written++
	l.lost -= e.Lost
	l.stuck = false
	if l.failing {
		l.failing = false
		l.alerted = time.Time{}
		l.cfg.Log.Warn("the audit log is written again", "lost", e.Lost)
	}
	return len(line), nil
}

// recordFailure counts n lost events and logs the failure. If it is the first one and
// the log fails closed, it calls onFailure.
func (l *Log) recordFailure(why error, n uint64) {
	l.mu.Lock()
	l.lost += n
	l.lostEver += n
	first := !l.failing
	l.failing = true
	onFailure := l.onFailure
	if now := time.Now(); first || now.Sub(l.alerted) >= alertInterval {
		l.alerted = now
		consequence := "connections continue without it"
		if l.cfg.FailClosed {
			consequence = "connections end, and logins are refused"
		}
		l.cfg.Log.Error("THE AUDIT LOG CANNOT BE WRITTEN: "+consequence, "err", why, "lost", l.lost)
	}
	l.mu.Unlock()
	if first && onFailure != nil && l.cfg.FailClosed {
		onFailure()
	}
}
