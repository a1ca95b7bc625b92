package console

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
)

// adder returns a function that adds events, each a second after the last.
func adder(r *Recent) func(user string, kind audit.Type, from string) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return func(user string, kind audit.Type, from string) {
		at = at.Add(time.Second)
		r.Add(audit.Event{Time: at, Type: kind, User: user, Client: netip.MustParseAddrPort(from + ":22")})
	}
}

// TestFeed: a feed begins where it is asked to, delivers each event once and in order, and
// says if events are missing.
func TestFeed(t *testing.T) {
	r := &Recent{}
	add := adder(r)
	follow := func(after string, n int) *Feed {
		t.Helper()
		f, err := r.follow("alice", after, n)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(f.Close)
		return f
	}
	// want reads the feed, and returns the ID of the last event.
	want := func(f *Feed, wantMissed bool, kinds ...audit.Type) (last string) {
		t.Helper()
		select {
		case <-f.Woken():
		default:
			t.Error("not woken")
		}
		events, missed := f.Next()
		var got []audit.Type
		for _, e := range events {
			got, last = append(got, e.Type), f.ID(e)
		}
		if fmt.Sprint(got) != fmt.Sprint(kinds) || missed != wantMissed {
			t.Errorf("read %v, missed %t; want %v, %t", got, missed, kinds, wantMissed)
		}
		return last
	}
	add("alice", audit.Login, "192.0.2.1")
	add("alice", audit.LoginRefused, "192.0.2.2")
	add("alice", audit.Exec, "192.0.2.1")
	f := follow("", 2)
	want(f, false, audit.LoginRefused, audit.Exec)
	add("bob", audit.Login, "192.0.2.1")
	select {
	case <-f.Woken():
		t.Error("woken by another user's event")
	default:
	}
	add("alice", audit.LoginRefused, "192.0.2.2") // folded with the one before
	last := want(f, false, audit.LoginRefused)
	add("alice", audit.End, "192.0.2.1")
	want(follow(last, 1), false, audit.End)
	want(follow("", 100), false, audit.Login, audit.Exec, audit.LoginRefused, audit.End)
	for _, foreign := range []string{"AAAAAAAAAAAA-1", last + "0", "x", "-", "1"} {
		f := follow(foreign, 1)
		want(f, true, audit.Login, audit.Exec, audit.LoginRefused, audit.End)
		f.Close()
	}

	// More than the history holds: the oldest are missed, by an old reader and a new one
	// that goes on.
	for range recentEvents + 5 {
		add("alice", audit.Exec, "192.0.2.1")
	}
	events, missed := f.Next()
	if len(events) != recentEvents || !missed {
		t.Errorf("%d events, missed %t", len(events), missed)
	}
	if events, missed = f.Next(); len(events) != 0 || missed {
		t.Errorf("then %d events, missed %t", len(events), missed)
	}
	if _, missed := follow(last, 1).Next(); !missed {
		t.Error("a reader that goes on is not told of the gap")
	}
}

// TestFeedsAreBounded: feeds are few, and their histories are not dropped for other users'.
func TestFeedsAreBounded(t *testing.T) {
	r := &Recent{}
	add := adder(r)
	add("alice", audit.Login, "192.0.2.1")
	open := func(user string) (*Feed, error) { return r.follow(user, "", 1) }
	var all []*Feed
	for range maxFeedsPerUser {
		f, err := open("alice")
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, f)
	}
	if _, err := open("alice"); !errors.Is(err, ErrTooManyFeeds) {
		t.Errorf("one too many: %v", err)
	}
	for i := 0; len(all) < maxFeeds; i++ {
		f, err := open(fmt.Sprint("user", i))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, f)
	}
	if _, err := open("bob"); !errors.Is(err, ErrTooManyFeeds) {
		t.Errorf("one too many in all: %v", err)
	}
	for i := range 2 * recentUsers {
		add(fmt.Sprint("other", i), audit.Login, "192.0.2.1")
	}
	if len(r.users) != recentUsers {
		t.Errorf("%d users", len(r.users))
	}
	all[0].Next()
	add("alice", audit.Exec, "192.0.2.1")
	if events, _ := all[0].Next(); len(events) != 1 {
		t.Errorf("after the other users' logins: %v", events)
	}
	for _, f := range all {
		f.Close()
		f.Close() // a second call changes nothing
	}
	if f, err := open("alice"); err != nil || r.feeds != 1 {
		t.Errorf("%v, and %d feeds are open", err, r.feeds)
	} else {
		f.Close()
	}
}
