package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

// A row is one line of the table: a thing measured on both servers, or on the
// gateway alone.
type row struct {
	What string
	// Goal is what Sallyport is to reach, in words; empty for figures that only
	// explain another.
	Goal string `json:",omitempty"`
	Unit string
	// Sallyport and SSHD are the samples in Unit, in the order they were
	// taken. SSHD is nil if sshd was not measured.
	Sallyport, SSHD samples
	// Note says what else a reader must know, such as the ciphers.
	Note string `json:",omitempty"`
}

// ratio is Sallyport's median to sshd's, or "" if there is none.
func (r row) ratio() string {
	if len(r.SSHD) == 0 || r.SSHD.median() == 0 {
		return ""
	}
	return fmt.Sprintf("%.2f x", r.Sallyport.median()/r.SSHD.median())
}

type samples []float64

func (s samples) median() float64 {
	sorted := slices.Sorted(slices.Values(s))
	switch n := len(sorted); {
	case n == 0:
		return 0
	case n%2 == 1:
		return sorted[n/2]
	default:
		return (sorted[n/2-1] + sorted[n/2]) / 2
	}
}

// String gives the median, and the extremes if there is more than one sample.
func (s samples) String() string {
	switch len(s) {
	case 0:
		return ""
	case 1:
		return number(s[0])
	default:
		return fmt.Sprintf("%s (%s-%s)", number(s.median()), number(slices.Min(s)), number(slices.Max(s)))
	}
}

// number formats v with three significant digits or all of its integer part.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

// A report is everything a run found.
type report struct {
	Machine string
	Rows    []row
}

func (r report) plain(w io.Writer) error {
	fmt.Fprintln(w, r.Machine)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "what\tgoal\tratio\tSallyport\tsshd\tunit\t")
	for _, row := range r.Rows {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", row.What, row.Goal, row.ratio(), row.Sallyport, row.SSHD, row.Unit, row.Note)
	}
	return t.Flush()
}

func (r report) markdown(w io.Writer) error {
	var out bytes.Buffer
	fmt.Fprintf(&out, "%s. Medians, with the extremes in parentheses.\n\n", r.Machine)
	fmt.Fprintln(&out, "| what | goal | Sallyport / sshd | Sallyport | sshd | unit | |")
	fmt.Fprintln(&out, "| --- | --- | --- | --- | --- | --- | --- |")
	for _, row := range r.Rows {
		fmt.Fprintf(&out, "| %s | %s | %s | %s | %s | %s | %s |\n", row.What, row.Goal, row.ratio(), row.Sallyport, row.SSHD, row.Unit, row.Note)
	}
	_, err := out.WriteTo(w)
	return err
}

func (r report) writeJSON(file string) error {
	out, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(out, '\n'), 0o644)
}

// machine describes what the figures were taken on.
func machine(ctx context.Context) string {
	model := "unknown CPU"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	// ssh -V writes to standard error.
	ssh, _ := exec.CommandContext(ctx, "ssh", "-V").CombinedOutput()
	return fmt.Sprintf("%d x %s, Linux %s, %s, %s", runtime.NumCPU(), model,
		cmp.Or(strings.TrimSpace(string(kernel)), "unknown"), runtime.Version(), strings.TrimSpace(string(ssh)))
}
