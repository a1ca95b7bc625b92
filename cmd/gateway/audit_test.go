package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// schema reads docs/audit.md. It returns the fields of each event, and whether they are
// required.
func schema() (map[string]map[string]bool, error) {
	doc, err := os.ReadFile("../../docs/audit.md")
	if err != nil {
		return nil, err
	}
	common := map[string]bool{"v": true, "seq": true, "time": true, "gateway": true, "event": true, "lost": false}
	events := make(map[string]map[string]bool)
	row := regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\| ([a-z_\\[\\] ]*)\\| [^|]*\\|$")
	for _, m := range row.FindAllStringSubmatch(string(doc), -1) {
		fields := make(map[string]bool)
		for name, must := range common {
			fields[name] = must
		}
		for _, name := range strings.Fields(m[2]) {
			bare := strings.Trim(name, "[]")
			fields[bare] = bare == name
		}
		events[m[1]] = fields
	}
	if len(events) < 20 {
		return nil, fmt.Errorf("docs/audit.md: a table with %d events", len(events))
	}
	return events, nil
}

// events holds audit.log against a file:
//
//	events FILE [all]
//
// Each line of the file is an event and some of its fields:
//
//	exec conn=1 command="exit 7" seconds=~\d
//
// The events of one channel, and those of a connection without a channel, must be in
// the order of the file; the next connection may begin before the last event of the
// one before.
//
// Connections are numbered in their order. A value that begins with ~ is a regular
// expression. Events that belong to no connection are left out, unless "all" is
// given. Beyond that every line of the log must be as docs/audit.md says. It
// waits for events that are still to come.
func (env *scriptEnv) events(ts *testscript.TestScript, args []string) {
	if len(args) < 1 {
		ts.Fatalf("usage: events FILE [all]")
	}
	known, err := schema()
	ts.Check(err)
	want := strings.Split(strings.TrimSpace(ts.ReadFile(args[0])), "\n")
	all := len(args) > 1
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		log, err := os.ReadFile(env.path("audit.log"))
		ts.Check(err)
		got, err := readEvents(log, known)
		if err != nil {
			ts.Fatalf("%v\nin\n%s", err, log)
		}
		if !all {
			got = slices.DeleteFunc(got, func(e map[string]any) bool { return e["conn"] == nil })
		}
		problem := compare(got, want)
		if problem == "" {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s\nin\n%s", problem, log)
		}
	}
}

// readEvents reads a log, in which every line must be as it should.
func readEvents(log []byte, known map[string]map[string]bool) ([]map[string]any, error) {
	var events []map[string]any
	conns := make(map[any]int)
	stages := make(map[any]string)
	for line := range bytes.Lines(log) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			return nil, fmt.Errorf("half a line: %s", line)
		}
		var e map[string]any
		dec := json.NewDecoder(bytes.NewReader(line))
		dec.UseNumber()
		if err := dec.Decode(&e); err != nil {
			return nil, fmt.Errorf("%v: %s", err, line)
		}
		name, _ := e["event"].(string)
		fields := known[name]
		if fields == nil {
			return nil, fmt.Errorf("docs/audit.md does not know %q", name)
		}
		for field := range e {
			if _, ok := fields[field]; !ok {
				return nil, fmt.Errorf("docs/audit.md knows no %s of %s", field, name)
			}
		}
		for field, must := range fields {
			if e[field] == nil && must {
				return nil, fmt.Errorf("there is no %s in %s", field, line)
			}
		}
		if conn := e["conn"]; conn != nil {
			if conns[conn] == 0 {
				conns[conn] = len(conns) + 1
			}
			e["conn"] = conns[conn]
			if err := inTurn(e, stages); err != nil {
				return nil, fmt.Errorf("%v: %s", err, line)
			}
		}
		events = append(events, e)
	}
	return events, nil
}

// inTurn says whether an event comes when one of its connection may: "connection"
// is the first, "end" is the last, and all that is done comes after
// "bastion-joined". Stages are the latest of these, by connection.
func inTurn(e map[string]any, stages map[any]string) error {
	conn, stage := e["conn"], stages[e["conn"]]
	switch e["event"] {
	case "connection":
		if stage != "" {
			return fmt.Errorf("a connection begins twice")
		}
		stages[conn] = "connection"
	case "bastion-joined", "end":
		if stage == "" || stage == e["event"] || stage == "end" {
			return fmt.Errorf("after %q", stage)
		}
		stages[conn] = e["event"].(string)
	default:
		if stage == "" || stage == "end" || e["channel"] != nil && stage != "bastion-joined" {
			return fmt.Errorf("after %q", stage)
		}
	}
	return nil
}

var wantField = regexp.MustCompile(`([a-z_]+)=("(?:[^"\\]|\\.)*"|\S*)`)

// compare returns a description of the first difference, or "".
func compare(got []map[string]any, want []string) string {
	type stream struct{ conn, channel any }
	taken := make([]bool, len(got))
	for _, line := range want {
		// Any event may be next that no other of its own stream must precede.
		next := -1
		var problems []string
		behind := make(map[stream]bool)
		for i, e := range got {
			of := stream{e["conn"], e["channel"]}
			if taken[i] || behind[of] {
				continue
			}
			behind[of] = true
			problem := differs(e, line)
			if problem == "" {
				next = i
				break
			}
			problems = append(problems, problem)
		}
		if next < 0 {
			return fmt.Sprintf("there is no\n\t%s\nwhat may be next is\n\t%s", line, strings.Join(problems, "\n\t"))
		}
		taken[next] = true
	}
	if i := slices.Index(taken, false); i >= 0 {
		return fmt.Sprintf("event %d is too many: %v", i+1, got[i])
	}
	return ""
}

// differs says why an event is not the one of the line; "" if it is.
func differs(e map[string]any, line string) string {
	name, rest, _ := strings.Cut(line, " ")
	if e["event"] != name {
		return fmt.Sprintf("%v: not %s", e, name)
	}
	for _, m := range wantField.FindAllStringSubmatch(rest, -1) {
		value := m[2]
		if unquoted, err := strconv.Unquote(value); err == nil {
			value = unquoted
		}
		is := ""
		if v := e[m[1]]; v != nil {
			is = fmt.Sprint(v)
		}
		same := is == value
		if pattern, ok := strings.CutPrefix(value, "~"); ok {
			same = regexp.MustCompile("^(?:" + pattern + ")$").MatchString(is)
		}
		if !same {
			return fmt.Sprintf("%v: %s is %q, want %s", e, m[1], is, m[2])
		}
	}
	return ""
}
