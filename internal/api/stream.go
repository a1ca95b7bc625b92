package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/console"
)

// This file answers with events as they happen: Server-Sent Events, WHATWG HTML, section 9.2.

const (
	streamType = "text/event-stream"
	// heartbeat is the interval of comments, which keep proxies from closing a stream
	// without events.
	heartbeat = 15 * time.Second
	// streamRetry is the time after which a client is told to connect again.
	streamRetry = 4 * time.Second
)

var (
	errNoEvents       = &problem{404, "no-events", "This gateway keeps no audit log, so it has no events."}
	errTooManyStreams = &problem{429, "too-many-streams", "Too many streams of events are open. End one of yours, or try again later."}

	errClientLeft = errors.New("the client has closed the stream")
	errSlow       = errors.New("the client does not read the stream")
)

// acceptsStream reports whether an Accept header (RFC 9110, section 12.5.1) names the type of
// a stream. Wildcards mean the list.
func acceptsStream(headers []string) bool {
	for _, item := range strings.Split(strings.Join(headers, ","), ",") {
		name, params, err := mime.ParseMediaType(item)
		if err != nil || name != streamType {
			continue
		}
		quality, err := strconv.ParseFloat(params["q"], 64)
		return err != nil || quality > 0
	}
	return false
}

// stream sends the caller's events until the client leaves or does not read for
// writeTimeout, the login is no longer permitted, or the gateway drains. It begins after
// the event of the header Last-Event-ID, or with the last n events.
func (q *request) stream(n int) error {
	feed, err := q.caller().Follow(q.Header.Get("Last-Event-ID"), n)
	switch {
	case errors.Is(err, console.ErrNoEvents):
		return errNoEvents
	case errors.Is(err, console.ErrTooManyFeeds):
		return errTooManyStreams
	case err != nil:
		return err
	}
	defer feed.Close()
	q.call.Answered(http.StatusOK)
	q.call.Streams()
	h := q.w.Header()
	h.Set("Content-Type", streamType)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Accel-Buffering", "no") // nginx would collect the events
	q.w.WriteHeader(http.StatusOK)
	if q.Method == http.MethodHead {
		return nil
	}
	// After the header, a failure cannot be a problem any more.
	catchPanic(q.call, func() error { q.sendEvents(feed); return nil })
	return nil
}

func (q *request) sendEvents(feed *console.Feed) {
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	text := fmt.Appendf(nil, "retry: %d\n\n", streamRetry.Milliseconds())
	for {
		if err := q.send(text); err != nil {
			q.call.StreamEnded("client", err)
			return
		}
		select {
		case <-feed.Woken():
			text = eventsText(feed)
		case line := <-q.call.Notices(): // such as why the gateway is about to close the connection
			text = eventText("notice", "", noticeJSON{line})
		case <-beat.C:
			text = []byte(":\n\n")
		case <-q.server.draining:
			q.send(eventText("notice", "", noticeJSON{"The gateway is going down for maintenance. Connect again."}))
			q.call.StreamEnded("gateway", errDraining)
			return
		case <-q.Context().Done():
			q.call.StreamEnded("client", errClientLeft)
			return
		}
	}
}

// noticeJSON is the data of a notice, which is for the user.
type noticeJSON struct {
	Text string `json:"text"`
}

// eventsText returns the new events of a feed. They are a few hundred KiB at most.
func eventsText(feed *console.Feed) []byte {
	var text []byte
	events, missed := feed.Next()
	if missed {
		text = eventText("missed", "", struct{}{})
	}
	for _, e := range events {
		text = append(text, eventText("", feed.ID(e), e)...)
	}
	return text
}

// eventText returns an event with a value in JSON, which is one line.
func eventText(name, id string, data any) []byte {
	var text bytes.Buffer
	if name != "" {
		fmt.Fprintf(&text, "event: %s\n", name)
	}
	if id != "" {
		fmt.Fprintf(&text, "id: %s\n", id)
	}
	text.WriteString("data: ")
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(data); err != nil {
		panic(err) // all values are of this module
	}
	text.WriteByte('\n')
	return console.EscapeJSON(text.Bytes())
}

// send writes to the stream, for writeTimeout at most.
func (q *request) send(text []byte) error {
	client := http.NewResponseController(q.w)
	client.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := q.w.Write(text)
	if err == nil {
		err = client.Flush()
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errSlow
	case err != nil:
		return errClientLeft
	}
	return nil
}
