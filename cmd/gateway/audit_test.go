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

// schema is what docs/audit.md says: the fields of each event, and whether they
// must be there.
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
// Each line of the file is an event and some of its fields, in the order of the
// log:
//
//	exec conn=1 command="exit 7" seconds=~\d
//
// Connections are numbered as they come. What begins with ~ is a regular
// expression. Events that belong to no connection are left out, unless "all" is
// given. Beyond that every line of the log must be as docs/audit.md says. It
// waits for events that are still to come.
func (w *world) events(ts *testscript.TestScript, args []string) {
	if len(args) < 1 {
		ts.Fatalf("usage: events FILE [all]")
	}
	known, err := schema()
	ts.Check(err)
	want := strings.Split(strings.TrimSpace(ts.ReadFile(args[0])), "\n")
	all := len(args) > 1
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		log, err := os.ReadFile(w.path("audit.log"))
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
		}
		events = append(events, e)
	}
	return events, nil
}

var wantField = regexp.MustCompile(`([a-z_]+)=("(?:[^"\\]|\\.)*"|\S*)`)

// compare says what is wrong; "" if nothing is.
func compare(got []map[string]any, want []string) string {
	for i, line := range want {
		name, rest, _ := strings.Cut(line, " ")
		if i >= len(got) {
			return fmt.Sprintf("event %d is missing: %s", i+1, line)
		}
		if got[i]["event"] != name {
			return fmt.Sprintf("event %d is %v, want %s", i+1, got[i], line)
		}
		for _, m := range wantField.FindAllStringSubmatch(rest, -1) {
			value := m[2]
			if unquoted, err := strconv.Unquote(value); err == nil {
				value = unquoted
			}
			is := ""
			if v := got[i][m[1]]; v != nil {
				is = fmt.Sprint(v)
			}
			if pattern, ok := strings.CutPrefix(value, "~"); ok {
				if !regexp.MustCompile("^(?:" + pattern + ")$").MatchString(is) {
					return fmt.Sprintf("event %d, %s: %s is %q, want %s", i+1, name, m[1], is, m[2])
				}
			} else if is != value {
				return fmt.Sprintf("event %d, %s: %s is %q, want %s", i+1, name, m[1], is, m[2])
			}
		}
	}
	if len(got) > len(want) {
		return fmt.Sprintf("event %d is too many: %v", len(want)+1, got[len(want)])
	}
	return ""
}
