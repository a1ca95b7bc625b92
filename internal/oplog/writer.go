package oplog

import (
	"bytes"
	"io"
	"sync"
	"time"
)

const (
	// maxQueue limits the records that wait during a write, in bytes. The write may
	// have as many again.
	maxQueue = 1 << 20
	// closeTimeout is the timeout of Close.
	closeTimeout = time.Second
)

// A Writer writes records to another writer in its own goroutine, so that a slow,
// blocked or closed reader of the log never blocks the caller. Records beyond the
// queue, and those whose write fails, are lost; when writing works again, a record
// has their number.
//
// A write to standard output or standard error whose reader is gone also raises
// SIGPIPE, which ends a Go program that has not called [os/signal.Notify] for it.
// Commands must do that themselves.
type Writer struct {
	to   io.Writer
	wake chan struct{} // has room for one; closed by Close
	done chan struct{} // closed when run returns

	mu     sync.Mutex
	closed bool
	queue  [][]byte
	size   int // bytes in queue
	lost   int // records refused since queue was last taken

	// Used by the goroutine only.
	owed int  // records lost and not yet reported
	torn bool // the last write ended within a record
}

// NewWriter returns a Writer to w, which nothing else should write to until Close
// has returned. The Writer does not close w.
func NewWriter(w io.Writer) *Writer {
	lw := &Writer{to: w, wake: make(chan struct{}, 1), done: make(chan struct{})}
	// Close waits for the goroutine, but not for long: a write that blocks
	// cannot be interrupted.
	go lw.run()
	return lw
}

// Write copies p, which is one record. It does not block and returns no error. It may
// be called concurrently; records after Close are lost.
func (w *Writer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.closed:
	case w.size > 0 && w.size+len(p) > maxQueue:
		w.lost++
	default:
		w.queue = append(w.queue, bytes.Clone(p))
		w.size += len(p)
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
	return len(p), nil
}

// Close waits until all records have been written, for one second at most. Programs
// call it before they exit. Further calls have no effect.
func (w *Writer) Close() {
	w.mu.Lock()
	if !w.closed {
		w.closed = true
		close(w.wake)
	}
	w.mu.Unlock()
	timeout := time.NewTimer(closeTimeout)
	defer timeout.Stop()
	select {
	case <-w.done:
	case <-timeout.C:
	}
}

func (w *Writer) run() {
	defer close(w.done)
	for open := true; open; {
		_, open = <-w.wake
		w.mu.Lock()
		queue, lost := w.queue, w.lost
		w.queue, w.size, w.lost = nil, 0, 0
		w.mu.Unlock()

		ok := true
		for _, record := range queue {
			if w.report(); w.owed > 0 {
				w.owed++
				ok = false
				continue
			}
			if ok = w.write(record); !ok {
				w.owed++
			}
		}
		w.owed += lost
		if ok {
			w.report()
		}
	}
}

// report writes the number of lost records, if there are any.
func (w *Writer) report() {
	if w.owed == 0 {
		return
	}
	var line bytes.Buffer
	New(&line).Warn("log records lost", "count", w.owed)
	if w.write(line.Bytes()) {
		w.owed = 0
	}
}

func (w *Writer) write(record []byte) bool {
	if w.torn {
		record = append([]byte("\n"), record...)
	}
	n, err := w.to.Write(record)
	if err == nil {
		w.torn = false
	} else if n > 0 {
		w.torn = true
	}
	return err == nil
}
