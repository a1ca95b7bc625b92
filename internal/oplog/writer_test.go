package oplog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A sink is a writer that may block or fail.
type sink struct {
	bytes.Buffer
	stuck chan struct{} // Write waits until it is closed, unless it is nil
	room  int           // bytes accepted before writes fail; negative means no limit
}

func (s *sink) Write(p []byte) (int, error) {
	if s.stuck != nil {
		<-s.stuck
	}
	if s.room < 0 || len(p) <= s.room {
		s.room -= min(len(p), max(s.room, 0))
		return s.Buffer.Write(p)
	}
	n, _ := s.Buffer.Write(p[:s.room])
	s.room = 0
	return n, errors.New("broken pipe")
}

// lines returns the written lines; a record of lost records is "lost N".
func (s *sink) lines() []string {
	var all []string
	for line := range strings.Lines(s.String()) {
		line = strings.TrimSuffix(line, "\n")
		var r struct {
			Msg   string
			Count int
		}
		if json.Unmarshal([]byte(line), &r) == nil && r.Msg == "log records lost" {
			line = fmt.Sprint("lost ", r.Count)
		}
		all = append(all, line)
	}
	return all
}

func TestWriterKeepsOrder(t *testing.T) {
	s := &sink{room: -1}
	w := NewWriter(s)
	var want strings.Builder
	for i := range 1000 {
		fmt.Fprintf(w, "%d\n", i)
		fmt.Fprintf(&want, "%d\n", i)
	}
	w.Close()
	if s.String() != want.String() {
		t.Errorf("got %q", s.lines())
	}
	w.Close()
	if n, err := w.Write([]byte("late")); n != 4 || err != nil {
		t.Errorf("Write after Close returned %d, %v", n, err)
	}
}

// TestWriterStuckReader writes to a log whose reader blocks: the caller does not wait,
// and the log later has the number of lost records in their place.
func TestWriterStuckReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{room: -1, stuck: make(chan struct{})}
		w := NewWriter(s)
		w.Write([]byte("first\n"))
		synctest.Wait()
		record := []byte(strings.Repeat("x", maxQueue/4-1) + "\n")
		for range 4 + 7 {
			w.Write(record)
		}
		close(s.stuck)
		synctest.Wait()
		w.Write([]byte("last\n"))
		w.Close()

		got := s.lines()
		if len(got) != 7 || got[0] != "first" || got[4] != string(record[:len(record)-1]) || got[5] != "lost 7" || got[6] != "last" {
			t.Errorf("%d lines, which end with %.40q", len(got), got[max(0, len(got)-2):])
		}
	})
}

func TestWriterCloseGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{room: -1, stuck: make(chan struct{})}
		w := NewWriter(s)
		w.Write([]byte("x\n"))
		start := time.Now()
		w.Close()
		if took := time.Since(start); took != closeTimeout {
			t.Errorf("Close took %v", took)
		}
		close(s.stuck)
	})
}

// TestWriterErrors writes to a disk that is full and later has space again.
func TestWriterErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{room: 9}
		w := NewWriter(s)
		for _, record := range []string{"one\n", "two, torn\n", "three\n", "four\n"} {
			w.Write([]byte(record))
			synctest.Wait()
		}
		s.room = -1
		w.Write([]byte("five\n"))
		w.Close()
		if got := fmt.Sprintf("%q", s.lines()); got != `["one" "two, " "lost 3" "five"]` {
			t.Errorf("got %s", got)
		}
	})
}

// TestWriterHugeRecord writes a record that is longer than the queue to an empty one:
// it is not lost.
func TestWriterHugeRecord(t *testing.T) {
	s := &sink{room: -1}
	w := NewWriter(s)
	w.Write(make([]byte, 2*maxQueue))
	w.Close()
	if s.Len() != 2*maxQueue {
		t.Errorf("%d bytes written", s.Len())
	}
}
