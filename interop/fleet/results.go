package main

import (
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// The promises. Each is a count that has to be zero.
const (
	lostSessions   = "sessions lost without a fault of their gateway"
	twoTasks       = "owners with two live tasks"
	leftTasks      = "tasks left after idle time and sweep"
	refusedLogins  = "logins refused without a fault of their gateway"
	lostBytes      = "sessions whose echo differs from the input"
	failedGateways = "gateways that failed, panicked or did not recover"
)

var promises = []string{lostSessions, twoTasks, leftTasks, refusedLogins, lostBytes, failedGateways}

// maxDetails is the number of broken promises that are described.
const maxDetails = 100

// results are the counts of a run.
type results struct {
	Machine string   `json:"machine"`
	Args    []string `json:"args"`
	Seed    uint64   `json:"seed"`
	Seconds int      `json:"seconds"`
	// Figures are measurements, with their goals.
	Figures []figure       `json:"figures,omitempty"`
	Broken  map[string]int `json:"broken"` // by promise; all of them
	// Counts are other counts, by name.
	Counts map[string]int `json:"counts"`
	// Faults counts the faults by kind, Refused the logins that a fault explains by
	// the user's sentence, and Lost the sessions that one explains by its kind.
	Faults  map[string]int `json:"faults"`
	Refused map[string]int `json:"refused"`
	Lost    map[string]int `json:"lost"`
	// Errors counts the records of level ERROR in the gateways' logs, by message.
	Errors  map[string]int `json:"errors"`
	Details []string       `json:"details"`

	mu    sync.Mutex
	began time.Time
}

// A figure is a measurement. It breaks no promise, because other programs may use the
// machine, too.
type figure struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Goal  string  `json:"goal"`
}

func newResults(o options) *results {
	r := &results{
		Args: os.Args[1:], Seed: o.seed, Broken: map[string]int{}, Counts: map[string]int{},
		Faults: map[string]int{}, Refused: map[string]int{}, Lost: map[string]int{}, Errors: map[string]int{}, began: time.Now(),
	}
	if r.Seed == 0 {
		r.Seed = rand.Uint64N(1 << 32)
	}
	for _, p := range promises {
		r.Broken[p] = 0
	}
	version, _ := exec.Command("uname", "-sr").Output()
	r.Machine = fmt.Sprintf("%d CPUs, %s, %s", runtime.NumCPU(), strings.TrimSpace(string(version)), runtime.Version())
	return r
}

// violate counts a broken promise, and prints its description.
func (r *results) violate(promise, format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Broken[promise]++
	if len(r.Details) < maxDetails {
		detail := fmt.Sprintf("%s after %v: %s: %s", time.Now().UTC().Format(time.TimeOnly), time.Since(r.began).Round(time.Second), promise, fmt.Sprintf(format, args...))
		r.Details = append(r.Details, detail)
		fmt.Fprintln(os.Stderr, "BROKEN", detail)
	}
}

// add adds to one of the maps of counts.
func (r *results) add(counts map[string]int, name string, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	counts[name] += n
}

// broken reports whether a promise is broken.
func (r *results) broken() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.Broken {
		if n > 0 {
			return true
		}
	}
	return false
}

// print prints a table.
func (r *results) print(w io.Writer) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Seconds = int(time.Since(r.began).Seconds())
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, p := range promises {
		verdict := "ok"
		if r.Broken[p] > 0 {
			verdict = "BROKEN"
		}
		fmt.Fprintf(out, "%s\t%d\t%s\n", p, r.Broken[p], verdict)
	}
	if len(r.Figures) > 0 {
		fmt.Fprintf(out, "\t\t\nfigures:\t\t\n")
	}
	for _, f := range r.Figures {
		fmt.Fprintf(out, "  %s\t%.2f\tgoal: %s\n", f.Name, f.Value, f.Goal)
	}
	for _, section := range []struct {
		title  string
		counts map[string]int
	}{
		{"counts", r.Counts}, {"faults", r.Faults}, {"logins refused during a fault of their gateway", r.Refused},
		{"sessions lost by a fault of their gateway", r.Lost}, {"ERROR records of gateways", r.Errors},
	} {
		if len(section.counts) > 0 {
			fmt.Fprintf(out, "\t\t\n%s:\t\t\n", section.title)
		}
		for _, name := range slices.Sorted(maps.Keys(section.counts)) {
			fmt.Fprintf(out, "  %s\t%d\t\n", name, section.counts[name])
		}
	}
	fmt.Fprintf(out, "\t\t\nseed %d, %d s, %s\t\t\n", r.Seed, r.Seconds, r.Machine)
	return out.Flush()
}
