// Package cost prices the bastions in audit logs.
//
// [Log.Read] collects the bastions of any number of files, in any order, by their
// tasks: several gateways, and a gateway and its successor, write events of the same
// bastion. [Log.Report] adds up their hours and prices within a period.
//
// A bastion on Fargate is billed per second, for at least a minute, from the pull of
// its image until it has stopped ("AWS Fargate Pricing"). An event that was written
// when ECS still knew the ended task has both times. Otherwise, a bastion counts from
// the beginning of its start until a gateway has stopped it, has found it ended, or
// its maximum life is over. If the files have no start or no end, it counts from the
// beginning or until the end of the files, within its maximum life. Such a bastion is
// an estimate, and is counted as one.
//
// Memory is bounded by the number of bastions, see maxRuns, and not by that of
// events.
package cost

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	// minimum is the time for which a bastion is billed at least, and step that to
	// which the time is rounded up ("AWS Fargate Pricing").
	minimum = time.Minute
	step    = time.Second

	// maxDays limits a report by days.
	maxDays = 3700
)

// By is what a Report is grouped by.
type By string

const (
	ByUser    By = "user"
	ByProfile By = "profile"
	ByDay     By = "day" // in UTC
)

// A Report is the cost of bastions.
type Report struct {
	By By `json:"by"`
	// Since and Until limit the period. Events are from a part of it.
	Since    time.Time `json:"since"`
	Until    time.Time `json:"until"`
	Region   string    `json:"region"`
	Currency string    `json:"currency"`
	AsOf     string    `json:"prices_as_of"`
	Groups   []Group   `json:"groups"`
	Total    Group     `json:"total"`
	// BadLines is the number of lines that were not counted, and Lost that of
	// events that gateways could not write.
	BadLines int    `json:"bad_lines"`
	Lost     uint64 `json:"lost_events"`
}

// A Group is a line of a Report: a user, a profile or a day.
type Group struct {
	Name      string  `json:"name,omitempty"`
	Bastions  int     `json:"bastions"`
	Hours     float64 `json:"hours"`
	VCPUHours float64 `json:"vcpu_hours"`
	GBHours   float64 `json:"gb_hours"`
	Cost      float64 `json:"cost"`
	// Estimated is the number of bastions whose start or end is not in the files,
	// Unpriced that of those whose size is not, and Local that of processes of the
	// gateway's machine. The latter two have hours only.
	Estimated int `json:"estimated"`
	Unpriced  int `json:"unpriced"`
	Local     int `json:"local"`
}

// Report returns the cost within a period. A zero since or until is that of the
// events.
func (l *Log) Report(since, until time.Time, by By, prices Prices) (Report, error) {
	if l.first.IsZero() {
		return Report{}, errors.New("there are no events in the files")
	}
	rep := Report{
		By: by, Since: since, Until: until, Region: prices.Region, Currency: prices.Currency, AsOf: prices.AsOf(),
		BadLines: l.badLines, Lost: l.lost,
	}
	if rep.Since.IsZero() {
		rep.Since = l.first
	}
	if rep.Until.IsZero() {
		rep.Until = l.last
	}
	if by == ByDay && rep.Until.Sub(rep.Since) > maxDays*24*time.Hour {
		return Report{}, fmt.Errorf("the events are of more than %d days; limit them", maxDays)
	}
	groups := map[string]*Group{}
	for _, r := range l.runs {
		start, end, estimated := r.interval(l.first, l.last)
		// Without a period, a bastion counts as a whole, also before the first
		// event: that is the end of its start.
		if !since.IsZero() {
			start = later(start, since)
		}
		if !until.IsZero() {
			end = earlier(end, until)
		}
		if !start.Before(end) {
			continue
		}
		rep.Total.add(r, start, end, estimated, prices)
		for name, part := range split(r, start, end, by) {
			g := groups[name]
			if g == nil {
				g = &Group{Name: name}
				groups[name] = g
			}
			g.add(r, part[0], part[1], estimated, prices)
		}
	}
	for _, g := range groups {
		rep.Groups = append(rep.Groups, g.rounded())
	}
	rep.Total = rep.Total.rounded()
	slices.SortFunc(rep.Groups, func(a, b Group) int {
		if by != ByDay {
			if c := cmp.Or(cmp.Compare(b.Cost, a.Cost), cmp.Compare(b.Hours, a.Hours)); c != 0 {
				return c
			}
		}
		return cmp.Compare(a.Name, b.Name)
	})
	return rep, nil
}

// split returns the parts of a bastion's time by the group to which they belong.
func split(r *run, start, end time.Time, by By) map[string][2]time.Time {
	switch by {
	case ByUser:
		return map[string][2]time.Time{r.user: {start, end}}
	case ByProfile:
		return map[string][2]time.Time{r.profile: {start, end}}
	}
	days := map[string][2]time.Time{}
	for at := start.UTC(); at.Before(end); {
		next := time.Date(at.Year(), at.Month(), at.Day()+1, 0, 0, 0, 0, time.UTC)
		days[at.Format(time.DateOnly)] = [2]time.Time{at, earlier(next, end)}
		at = next
	}
	return days
}

func (g *Group) add(r *run, start, end time.Time, estimated bool, prices Prices) {
	g.Bastions++
	hours := end.Sub(start).Hours()
	g.Hours += hours
	if estimated {
		g.Estimated++
	}
	switch {
	case r.size.platform == "local":
		g.Local++
	case !r.size.known():
		g.Unpriced++
	default:
		g.VCPUHours += hours * r.size.vcpus()
		g.GBHours += hours * r.size.gigabytes()
		g.Cost += hours * prices.perHour(r.size)
	}
}

func (g Group) rounded() Group {
	g.Hours, g.VCPUHours, g.GBHours, g.Cost = round(g.Hours), round(g.VCPUHours), round(g.GBHours), round(g.Cost)
	return g
}

// interval returns the time for which a bastion is billed, given the times of the
// first and the last event, and whether that is an estimate.
func (r *run) interval(first, last time.Time) (start, end time.Time, estimated bool) {
	start, end = r.from, r.until
	if start.IsZero() {
		start = r.started
	}
	if end.IsZero() {
		end = r.stopped
	}
	if start.IsZero() {
		start, estimated = first, true
		if !end.IsZero() && r.maxLife > 0 {
			start = later(start, end.Add(-r.maxLife))
		}
	}
	if end.IsZero() {
		end, estimated = last, true
		if !r.ended.IsZero() {
			end = r.ended
		}
		if r.maxLife > 0 {
			end = earlier(end, start.Add(r.maxLife))
		}
	}
	ran := max(end.Sub(start), 0)
	if r.size.platform != "local" {
		ran = max((ran + step - 1).Truncate(step), minimum)
	}
	return start, start.Add(ran), estimated
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
