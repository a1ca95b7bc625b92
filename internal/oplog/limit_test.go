package oplog

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

// TestLimit logs ten times as much as is permitted, and wants the lines and the
// numbers of those that were dropped to add up.
func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 64 << 10
		var b bytes.Buffer
		log := slog.New(Limit{Bytes: limit, Per: time.Hour}.Handler(New(&b).Handler())).With("conn", "x")
		const records = 10_000
		for i := range records {
			log.Info("session", "command", "true", "n", i)
			if i%1000 == 0 {
				time.Sleep(time.Minute)
			}
		}
		if b.Len() > 2*limit {
			t.Errorf("%d bytes were logged, want %d at most", b.Len(), limit)
		}
		before := b.Len()
		log.Error("panic")
		if b.Len() == before {
			t.Error("an error was dropped")
		}
		for range 10 {
			log.Info("dropped")
		}
		time.Sleep(time.Hour)
		log.Info("last")
		sum := 0
		for line := range bytes.Lines(b.Bytes()) {
			var l struct {
				Not int `json:"not_logged"`
			}
			if err := json.Unmarshal(line, &l); err != nil {
				t.Fatal(err)
			}
			sum += 1 + l.Not
		}
		if sum != records+12 {
			t.Errorf("the lines tell of %d records, want %d", sum, records+12)
		}
	})
}
