package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/sallyport-ssh/sallyport/internal/cost"
)

type costCmd struct {
	Since      string   `placeholder:"TIME" help:"Count from this time on: a date in UTC, or a time in RFC 3339 (default: the first event)."`
	Until      string   `placeholder:"TIME" help:"Count until this time, which is not included: the first of a month for the month before (default: the last event)."`
	By         cost.By  `enum:"user,profile,day" default:"user" help:"Group by user, profile or day (in UTC)."`
	JSON       bool     `name:"json" help:"Print JSON."`
	Prices     string   `placeholder:"FILE" help:"Take the prices from a file, in the form of --show-prices. It needs only those that differ."`
	ShowPrices bool     `help:"Print the built-in prices, with their sources."`
	Files      []string `arg:"" optional:"" name:"FILE" placeholder:"FILE" help:"Audit logs of all gateways, in any order, also compressed by gzip; - is standard input."`
}

// Help implements [kong.HelpProvider].
func (costCmd) Help() string {
	return `The cost is that of vCPU, memory and disk on Fargate. Bastions whose start or end is not in the files are estimated, and marked. docs/cost.md has the rules.`
}

// maxBadLines is how many bad lines are reported one by one.
const maxBadLines = 20

// Run prices the bastions in audit logs.
func (c *costCmd) Run(s streams) error {
	if c.ShowPrices {
		_, err := s.out.Write(cost.Builtin())
		return err
	}
	if len(c.Files) == 0 {
		return errors.New("name an audit log, or - for standard input")
	}
	since, err := parseTime("--since", c.Since)
	if err != nil {
		return err
	}
	until, err := parseTime("--until", c.Until)
	if err != nil {
		return err
	}
	if !since.IsZero() && !until.IsZero() && !since.Before(until) {
		return errors.New("--until must be after --since")
	}
	prices, err := c.prices()
	if err != nil {
		return err
	}
	bad := 0
	log := &cost.Log{OnBad: func(file string, line int, why error) {
		if bad++; bad <= maxBadLines {
			fmt.Fprintf(s.err, "%s:%d: not counted: %s\n", file, line, printable(why.Error()))
		}
	}}
	var problems []error
	for _, file := range c.Files {
		problems = append(problems, readLog(log, file))
	}
	if bad > maxBadLines {
		fmt.Fprintf(s.err, "%d more lines were not counted\n", bad-maxBadLines)
	}
	report, err := log.Report(since, until, c.By, prices)
	if err != nil {
		// A file that cannot be read is the reason that there are no events.
		return cmp.Or(errors.Join(problems...), err)
	}
	if c.JSON {
		out := json.NewEncoder(s.out)
		out.SetIndent("", "  ")
		err = out.Encode(report)
	} else {
		err = printCost(s.out, report)
	}
	return errors.Join(append(problems, err)...)
}

// prices returns the prices to use.
func (c *costCmd) prices() (cost.Prices, error) {
	if c.Prices == "" {
		return cost.DefaultPrices(), nil
	}
	file, err := os.Open(c.Prices)
	if err != nil {
		return cost.Prices{}, err
	}
	defer file.Close()
	prices, err := cost.ReadPrices(file)
	if err != nil {
		return cost.Prices{}, fmt.Errorf("%s: %w", c.Prices, err)
	}
	return prices, nil
}

func readLog(log *cost.Log, path string) error {
	if path == "-" {
		return log.Read("standard input", os.Stdin)
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	return log.Read(path, file)
}

// parseTime parses a date or a time; the zero time if text is empty.
func parseTime(flag, text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%s %q: write 2026-11-01 or 2026-11-01T08:00:00Z", flag, text)
}

// printCost prints a report as a table.
func printCost(w io.Writer, r cost.Report) error {
	const layout = "2006-01-02 15:04"
	var b strings.Builder
	fmt.Fprintf(&b, "Bastions from %s to %s UTC. Prices of %s in %s, as of %s.\n\n",
		r.Since.UTC().Format(layout), r.Until.UTC().Format(layout), printable(r.Region), printable(r.Currency), printable(r.AsOf))
	width := len("total")
	for i, g := range r.Groups {
		r.Groups[i].Name = printable(g.Name)
		width = max(width, len([]rune(r.Groups[i].Name)))
	}
	fmt.Fprintf(&b, "%-*s %9s %11s %11s\n", width, r.By, "bastions", "hours", "cost")
	r.Total.Name = "total"
	for _, g := range append(r.Groups, r.Total) {
		fmt.Fprintf(&b, "%-*s %9d %11.2f %11.2f%s\n", width, g.Name, g.Bastions, g.Hours, g.Cost, marks(g))
	}
	for _, note := range []struct {
		mark string
		n    int
		text string
	}{
		{"*", r.Total.Estimated, "estimated: their start or end is not in the files"},
		{"?", r.Total.Unpriced, "without a price: their size is not in the files"},
		{"l", r.Total.Local, "processes of the gateway's machine, which cost nothing more"},
	} {
		if note.n > 0 {
			fmt.Fprintf(&b, "\n%s bastions %s: %d", note.mark, note.text, note.n)
		}
	}
	if r.Total.Estimated+r.Total.Unpriced+r.Total.Local > 0 {
		b.WriteString("\n")
	}
	if r.BadLines > 0 || r.Lost > 0 {
		fmt.Fprintf(&b, "\nNot counted: bad lines: %d; events that a gateway could not write: %d\n", r.BadLines, r.Lost)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// marks returns the marks of a line.
func marks(g cost.Group) string {
	text := ""
	if g.Estimated > 0 {
		text += " *"
	}
	if g.Unpriced > 0 {
		text += " ?"
	}
	if g.Local > 0 {
		text += " l"
	}
	return text
}

// printable replaces characters that could have an effect on the terminal: a log may
// have been changed.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}
