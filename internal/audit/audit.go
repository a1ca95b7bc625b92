// Package audit writes down who did what when: one line of JSON for each event,
// in a schema that is documented (docs/audit.md) and has a version.
//
// # Order and durability
//
// [Log.Write] returns when the line has been handed to the system, so what
// follows an event in the program follows it in the log, and a process that is
// killed loses nothing it has gone on from. A machine that loses its power may
// lose the last seconds of a file, as with any log.
//
// A line is written whole or not at all. If the process is killed, or the disk
// fills up, in the middle of one, the next begins on a line of its own.
//
// # When it cannot be written
//
// Either everything ends that would go on unseen (fail closed), or things go on
// and events are counted; the operator's log is loud in both cases, and the
// next line that succeeds says how many are missing. Nothing ever waits for
// longer than a few seconds.
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
	// patience is how long an event may take to be written before the log
	// counts as failed: a pipe that nobody reads, a network disk that is away.
	patience = 5 * time.Second
	// queued is how many events wait for a log that is stuck. More are lost.
	queued = 1024
	// loudEvery is how often the operator is told of the same trouble.
	loudEvery = time.Minute
)

// ErrStuck says that the log takes nothing.
var ErrStuck = errors.New("the audit log takes no events")

var errClosed = errors.New("the audit log has ended")

// A Config says where events go.
type Config struct {
	// File is the path of a file. It is made with mode 0600, and opened anew
	// by [Log.Reopen].
	File string
	// Stdout, if not nil and File is empty, is written to.
	Stdout io.Writer
	// Syslog, if neither is set, is the facility to send to; Socket is the
	// path of the daemon's, empty for the usual ones.
	Syslog syslog.Priority
	Socket string

	// FailClosed makes [Log.Write] report what could not be written. Without
	// it that is counted, and things go on.
	FailClosed bool
	// Gateway is the name of this one, as in every event.
	Gateway string
	// Also, if not nil, is told of every event, before it is written and also
	// if it cannot be. It must not block.
	Also func(Event)
	Log  *slog.Logger
}

// A Log writes events. Methods are safe for concurrent use; a nil Log is one
// that keeps nothing.
type Log struct {
	cfg   Config
	sink  sink // belongs to run
	seq   uint64
	queue chan *entry
	ended chan struct{} // closed when run has returned

	mu      sync.Mutex
	closed  bool
	stuck   bool // somebody has waited in vain, and nothing was written since
	failing bool
	lost    uint64    // not yet told of in a line
	said    time.Time // when the operator was last told
	failed  func()
}

// An entry waits to be written; or for the log to be opened anew.
type entry struct {
	event  Event
	reopen bool
	done   chan error // has room
}

// A sink takes lines. They end with a newline.
type sink interface {
	// write writes all of line, or nothing that a reader would take for one.
	write(line []byte) error
	reopen() error
	close() error
}

// Open opens a log. The caller closes it.
func Open(cfg Config) (*Log, error) {
	l := &Log{cfg: cfg, queue: make(chan *entry, queued), ended: make(chan struct{})}
	var err error
	switch {
	case cfg.File != "":
		l.sink, err = openFile(cfg.File)
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

// OnFailure has f called whenever the log begins to fail, if it is to fail
// closed: f must end what may not go on unseen, and must not block.
func (l *Log) OnFailure(f func()) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = f
}

// Write writes an event, and blocks until that is done or has failed: for some
// seconds at most. It returns an error only if the log is to fail closed; what
// the event tells of must not happen then.
func (l *Log) Write(e Event) error {
	if l == nil {
		return nil
	}
	e.Version, e.Gateway = Version, l.cfg.Gateway
	e.Time = time.Now().UTC().Truncate(time.Microsecond)
	if l.cfg.Also != nil {
		l.cfg.Also(e)
	}
	if err := l.wait(&entry{event: e, done: make(chan error, 1)}); err != nil && l.cfg.FailClosed {
		return fmt.Errorf("writing to the audit log: %w", err)
	}
	return nil
}

// Reopen opens the file anew, after it was moved away: what was written before
// the call is in the old file, what comes after it in the new one. If that
// fails the old one stays in use. For a syslog it connects again.
func (l *Log) Reopen() error {
	if l == nil {
		return nil
	}
	if err := l.wait(&entry{reopen: true, done: make(chan error, 1)}); err != nil {
		return fmt.Errorf("opening the audit log anew: %w", err)
	}
	return nil
}

// Close writes what waits, and ends the log; later events are lost.
func (l *Log) Close() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	again := l.closed
	l.closed = true
	if !again {
		close(l.queue)
	}
	l.mu.Unlock()
	select {
	case <-l.ended:
		return l.sink.close()
	case <-time.After(patience):
		return ErrStuck
	}
}

// wait queues en and waits until it is done.
func (l *Log) wait(en *entry) error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		l.cfg.Log.Warn("an event after the end of the audit log", "event", string(en.event.Type))
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
		l.lose(ErrStuck, 1)
		return ErrStuck
	case stuck: // it stays in the queue, in case that comes to life again
		return ErrStuck
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case err := <-en.done:
		return err
	case <-timer.C:
		l.mu.Lock()
		l.stuck = true
		l.mu.Unlock()
		l.lose(fmt.Errorf("%w for %v", ErrStuck, patience), 0)
		return ErrStuck
	}
}

// run writes what is queued, in order.
func (l *Log) run() {
	defer close(l.ended)
	for en := range l.queue {
		if en.reopen {
			en.done <- l.sink.reopen()
			continue
		}
		en.done <- l.write(en.event)
	}
}

func (l *Log) write(e Event) error {
	l.mu.Lock()
	e.Lost = l.lost
	l.mu.Unlock()
	e.Seq = l.seq + 1
	line, err := e.line()
	if err == nil {
		err = l.sink.write(line)
	}
	if err != nil {
		l.lose(err, 1)
		return err
	}
	l.seq++
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost -= e.Lost
	l.stuck = false
	if l.failing {
		l.failing = false
		l.said = time.Time{}
		l.cfg.Log.Warn("the audit log is written again", "lost", e.Lost)
	}
	return nil
}

// lose counts n events that could not be written, and sees to it that somebody
// knows.
func (l *Log) lose(why error, n uint64) {
	l.mu.Lock()
	l.lost += n
	first := !l.failing
	l.failing = true
	failed := l.failed
	if now := time.Now(); first || now.Sub(l.said) >= loudEvery {
		l.said = now
		then := "connections go on without it"
		if l.cfg.FailClosed {
			then = "connections end, and nobody can log in"
		}
		l.cfg.Log.Error("THE AUDIT LOG CANNOT BE WRITTEN: "+then, "err", why, "lost", l.lost)
	}
	l.mu.Unlock()
	if first && failed != nil && l.cfg.FailClosed {
		failed()
	}
}
