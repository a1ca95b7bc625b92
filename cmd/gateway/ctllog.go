package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"text/tabwriter"
	"time"

	"github.com/tmaxmax/go-sse"

	"github.com/sallyport-ssh/sallyport/internal/console"
)

type ctlLog struct {
	Last   int  `short:"n" default:"20" help:"The number of events."`
	Follow bool `short:"f" help:"Go on with new events until interrupted."`
}

// Run lists the user's events.
func (cmd *ctlLog) Run(ctx context.Context, c *ctlCmd, s streams) error {
	target := fmt.Sprintf("/v1/events?last=%d", cmd.Last)
	if cmd.Follow {
		return (&eventFollower{c: c, target: target, streams: s}).run(ctx)
	}
	answer, err := c.call(ctx, "GET", target, 0)
	if err != nil {
		return err
	}
	var all struct{ Events []console.Event }
	if text, err := c.decode(answer, &all, s); !text {
		return err
	}
	w := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "TIME (UTC)\tID\tFROM\tEVENT")
	for _, e := range all.Events {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", e.Time.UTC().Format(time.DateTime), clean(cmp.Or(e.Conn, "-")), clean(cmp.Or(e.Client, "-")), clean(e.Text()))
	}
	return w.Flush()
}

const (
	// streamSilence is the time without a byte after which a stream counts as broken. The
	// server sends one every 15 seconds.
	streamSilence = 45 * time.Second
	// followAgain is the time before a stream is opened again. After failures in a row it
	// doubles, up to followAgainMax: a gateway with many streams may have been replaced.
	followAgain, followAgainMax = 2 * time.Second, time.Minute
	// maxFollowFailures in a row end the command.
	maxFollowFailures = 10
)

// An eventFollower prints events as they happen. When a stream ends, it opens another one,
// which goes on after the last event.
type eventFollower struct {
	c      *ctlCmd
	target string
	streams
	lastID string
}

// run returns when ctx ends, or a problem is there to stay.
func (f *eventFollower) run(ctx context.Context) error {
	failures := 0
	for {
		opened, err := f.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		refused := (*apiError)(nil)
		lasting := errors.As(err, &refused) && refused.status < 500 && refused.status != http.StatusTooManyRequests || errors.As(err, &unprintable{})
		if opened {
			failures = 0
		}
		switch failures++; {
		case lasting, failures > maxFollowFailures:
			return err
		case !opened && f.lastID == "": // nothing has worked yet
			return err
		case f.c.Code != "":
			return errors.New("the stream of events has ended; start again with a new code")
		}
		select {
		case <-time.After(min(followAgain<<(failures-1), followAgainMax)):
		case <-ctx.Done():
			return nil
		}
	}
}

// follow prints the events of one stream, until it ends. Opened says that there was one.
func (f *eventFollower) follow(ctx context.Context) (opened bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silent := time.AfterFunc(streamSilence, cancel)
	defer silent.Stop()
	header := http.Header{"Accept": {"text/event-stream"}}
	if f.lastID != "" {
		header.Set("Last-Event-ID", f.lastID)
	}
	resp, err := f.c.open(ctx, "GET", f.target, header)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	for event, err := range sse.Read(alarmedReader{resp.Body, silent}, nil) {
		if err != nil {
			return true, fmt.Errorf("the stream of %s: %w", f.c.URL, err)
		}
		if err := f.print(event); err != nil {
			return true, unprintable{err}
		}
		f.lastID = cmp.Or(event.LastEventID, f.lastID)
	}
	return true, nil
}

// An unprintable event could not be printed.
type unprintable struct{ error }

// An alarmedReader defers an alarm with each read that returns data.
type alarmedReader struct {
	io.Reader
	alarm *time.Timer
}

func (r alarmedReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if n > 0 {
		r.alarm.Reset(streamSilence)
	}
	return n, err
}

func (f *eventFollower) print(event sse.Event) error {
	switch event.Type {
	case "missed":
		_, err := fmt.Fprintln(f.err, "gateway: Events are missing here. The audit log has them.")
		return err
	case "notice":
		var notice struct{ Text string }
		if err := json.Unmarshal([]byte(event.Data), &notice); err != nil {
			return err
		}
		_, err := fmt.Fprintln(f.err, "gateway:", clean(notice.Text))
		return err
	case "":
	default: // of a newer gateway
		return nil
	}
	if f.c.JSON {
		_, err := fmt.Fprintln(f.out, clean(event.Data))
		return err
	}
	var e console.Event
	if err := json.Unmarshal([]byte(event.Data), &e); err != nil {
		return fmt.Errorf("an event of %s: %w", f.c.URL, err)
	}
	_, err := fmt.Fprintf(f.out, "%s  %-8s  %-21s  %s\n", e.Time.UTC().Format(time.DateTime), clean(cmp.Or(e.Conn, "-")), clean(cmp.Or(e.Client, "-")), clean(e.Text()))
	return err
}
