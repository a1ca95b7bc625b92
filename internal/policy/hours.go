package policy

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	_ "time/tzdata" // many images have no zoneinfo
)

// Hours are times of the week in a time zone.
type Hours struct {
	days      [7]bool // Sunday first, as in package time
	from, to  int     // minutes since midnight; to is exclusive
	location  *time.Location
	asWritten string
}

var weekdays = []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

// ParseHours parses "DAYS FROM-TO [ZONE]": "mon-fri 07:00-19:00 Europe/Berlin",
// "sat,sun 10:00-16:00", "daily 22:00-06:00". The zone is a name of the IANA Time Zone
// Database; the default is UTC. Hours that span midnight belong to the day on which
// they begin.
func ParseHours(s string) (Hours, error) {
	bad := func(why string) (Hours, error) {
		return Hours{}, fmt.Errorf("%q: %s; write it like mon-fri 07:00-19:00 Europe/Berlin", s, why)
	}
	fields := strings.Fields(s)
	if len(fields) < 2 || len(fields) > 3 {
		return bad("is not days, hours and perhaps a time zone")
	}
	h := Hours{location: time.UTC, asWritten: strings.Join(fields, " ")}
	for _, part := range strings.Split(strings.ToLower(fields[0]), ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		if part == "daily" {
			first, last = "sun", "sat"
		}
		a, b := weekday(first), weekday(last)
		if a < 0 || b < 0 {
			return bad(fmt.Sprintf("%q are no days", part))
		}
		for d := a; ; d = (d + 1) % 7 { // fri-mon spans the end of the week
			h.days[d] = true
			if d == b {
				break
			}
		}
	}
	from, to, ok := strings.Cut(fields[1], "-")
	var errFrom, errTo error
	h.from, errFrom = minutes(from)
	h.to, errTo = minutes(to)
	if !ok || errFrom != nil || errTo != nil || h.from == h.to || h.from == 24*60 {
		return bad(fmt.Sprintf("%q are no hours", fields[1]))
	}
	if len(fields) == 3 {
		// Local depends on the machine.
		loc, err := time.LoadLocation(fields[2])
		if err != nil || fields[2] == "Local" {
			return bad(fmt.Sprintf("%q is not a time zone", fields[2]))
		}
		h.location = loc
	}
	return h, nil
}

func weekday(s string) int {
	for i, name := range weekdays {
		if s == name {
			return i
		}
	}
	return -1
}

// minutes parses a time of day up to 24:00, and returns the minutes since midnight.
func minutes(s string) (int, error) {
	hh, mm, ok := strings.Cut(s, ":")
	h, errH := strconv.ParseUint(hh, 10, 8)
	m, errM := strconv.ParseUint(mm, 10, 8)
	if !ok || len(hh) > 2 || len(mm) != 2 || errH != nil || errM != nil || m > 59 || h*60+m > 24*60 {
		return 0, fmt.Errorf("%q is not a time of day", s)
	}
	return int(h*60 + m), nil
}

// Contain reports whether now is within h.
func (h Hours) Contain(now time.Time) bool {
	now = now.In(h.location)
	at, today := now.Hour()*60+now.Minute(), now.Weekday()
	if h.from < h.to {
		return h.days[today] && h.from <= at && at < h.to
	}
	yesterday := (today + 6) % 7
	return h.days[today] && at >= h.from || h.days[yesterday] && at < h.to
}

// String returns the text that h was parsed from.
func (h Hours) String() string { return h.asWritten }
