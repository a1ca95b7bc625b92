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

// A row is one line of the table: a quantity of both servers, or of the gateway
// alone.
type row struct {
	What string
	// Goal is Sallyport's target, as text; empty for figures that only explain
	// another.
	Goal string `json:",omitempty"`
	Unit string
	// Sallyport and SSHD are the samples in Unit, in the order they were
	// taken. SSHD is nil if sshd was not measured.
	Sallyport, SSHD samples
	// Note is further information for the reader, such as the ciphers.
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

func (s samples) mean() float64 {
	var sum float64
	for _, v := range s {
		sum += v
	}
	return sum / float64(max(len(s), 1))
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

// A report is the result of a run.
type report struct {
	Machine string
	// Load is the load average of the last minute before and after the run: a
	// busy machine slows both servers down, but not always equally.
	Load string
	Args []string // of the command
	Rows []row
}

func (r report) plain(w io.Writer) error {
	fmt.Fprintf(w, "%s. %s\n", r.Machine, r.Load)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "what\tgoal\tratio\tSallyport\tsshd\tunit\t")
	for _, row := range r.Rows {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", row.What, row.Goal, row.ratio(), row.Sallyport, row.SSHD, row.Unit, row.Note)
	}
	return t.Flush()
}

func (r report) markdown(w io.Writer) error {
	var out bytes.Buffer
	fmt.Fprintf(&out, "%s. %s. Medians, with the extremes in parentheses.\n\n", r.Machine, r.Load)
	fmt.Fprintln(&out, "| what | goal | Sallyport / sshd | Sallyport | sshd | unit | |")
	fmt.Fprintln(&out, "| --- | --- | --- | --- | --- | --- | --- |")
	for _, row := range r.Rows {
		fmt.Fprintf(&out, "| %s | %s | %s | %s | %s | %s | %s |\n", row.What, row.Goal, row.ratio(), row.Sallyport, row.SSHD, row.Unit, row.Note)
	}
	_, err := out.WriteTo(w)
	return err
}

// compare prints the change since an earlier report: of the ratio to sshd if there
// is one, because it depends less on the machine, otherwise of the median.
func (r report) compare(w io.Writer, earlier report) error {
	fmt.Fprintf(w, "Against an earlier run: %s. %s\n", earlier.Machine, earlier.Load)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "what\tearlier\tnow\tchange\t")
	for _, now := range r.Rows {
		i := slices.IndexFunc(earlier.Rows, func(e row) bool { return e.What == now.What && e.Unit == now.Unit })
		if i < 0 {
			continue
		}
		before, after, unit := earlier.Rows[i].Sallyport.median(), now.Sallyport.median(), now.Unit
		if sshdBefore, sshdNow := earlier.Rows[i].SSHD.median(), now.SSHD.median(); sshdBefore > 0 && sshdNow > 0 {
			before, after, unit = before/sshdBefore, after/sshdNow, "x"
		}
		change := "" // undefined if the earlier figure is 0
		if before > 0 {
			change = fmt.Sprintf("%+.0f %%", 100*(after/before-1))
		}
		fmt.Fprintf(t, "%s\t%s %s\t%s %s\t%s\t\n", now.What, number(before), unit, number(after), unit, change)
	}
	return t.Flush()
}

// maxSaved is the maximum number of samples per row in a file.
const maxSaved = 100

// writeJSON writes the report to a file. Of more than maxSaved samples it writes
// the minimum, the median and the maximum.
func (r report) writeJSON(file string) error {
	r.Rows = slices.Clone(r.Rows)
	for i := range r.Rows {
		row := &r.Rows[i]
		for _, s := range []*samples{&row.Sallyport, &row.SSHD} {
			if len(*s) > maxSaved {
				*s = samples{slices.Min(*s), s.median(), slices.Max(*s)}
			}
		}
	}
	out, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(out, '\n'), 0o644)
}

// readReport reads a report that writeJSON has written.
func readReport(file string) (r report, err error) {
	in, err := os.ReadFile(file)
	if err != nil {
		return report{}, err
	}
	if err := json.Unmarshal(in, &r); err != nil {
		return report{}, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}

// loadAverage returns the load average of the last minute (proc_loadavg(5)).
func loadAverage() string {
	line, _ := os.ReadFile("/proc/loadavg")
	one, _, _ := strings.Cut(string(line), " ")
	return cmp.Or(one, "unknown")
}

// machine describes the machine of the measurements.
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
