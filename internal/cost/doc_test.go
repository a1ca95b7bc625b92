package cost

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// A page is docs/cost.md or README.md, checked against the table of prices.
type page struct {
	t      *testing.T
	file   string
	values map[string]float64 // prices and assumptions
	totals map[string][]float64
	// checked counts the figures that were compared.
	checked int
}

var users = []float64{5, 50, 500}

// TestDocument calculates every figure of docs/cost.md, and those of README.md that
// refer to it: rows with an expression in their second column, rows of totals, and
// rows that begin with a link to a section, which repeat its total.
func TestDocument(t *testing.T) {
	doc := page{t: t, file: "../../docs/cost.md", values: map[string]float64{}, totals: map[string][]float64{}}
	text := content(t, doc.file)
	prices := DefaultPrices()
	for name, p := range prices.Prices {
		doc.values[name] = p.Price
	}
	doc.assumptions(text)
	doc.prices(text, prices)
	doc.figures(text)
	if doc.checked < 120 {
		t.Errorf("%s: %d figures were compared", doc.file, doc.checked)
	}
	readme := page{t: t, file: "../../README.md", values: doc.values, totals: doc.totals}
	readme.figures(content(t, readme.file))
	if hours := fmt.Sprintf("the %g hours", doc.values["hours"]); !strings.Contains(content(t, readme.file), hours) {
		t.Errorf("%s does not have %q", readme.file, hours)
	}
	if readme.checked < 6 {
		t.Errorf("%s: %d figures were compared", readme.file, readme.checked)
	}
}

func content(t *testing.T, file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// cells returns the cells of a row of a table; nil if the line is none.
func cells(line string) []string {
	line = strings.TrimSpace(line)
	if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "| ---") {
		return nil
	}
	var all []string
	for cell := range strings.SplitSeq(strings.Trim(line, "|"), "|") {
		all = append(all, strings.TrimSpace(cell))
	}
	return all
}

// code returns the content of a cell that is code, or "".
func code(cell string) string {
	if len(cell) > 2 && cell[0] == '`' && strings.IndexByte(cell[1:], '`') == len(cell)-2 {
		return cell[1 : len(cell)-1]
	}
	return ""
}

// section returns the lines of a section.
func section(text, heading string) []string {
	_, rest, _ := strings.Cut(text, "\n"+heading+"\n")
	body, _, _ := strings.Cut(rest, "\n## ")
	return strings.Split(body, "\n")
}

// assumptions reads the table of assumptions, and compares those that are intervals of
// the code.
func (p *page) assumptions(text string) {
	for _, line := range section(text, "## Assumptions") {
		row := cells(line)
		if len(row) != 3 || code(row[0]) == "" || code(row[0]) == "users" {
			continue
		}
		value, err := strconv.ParseFloat(row[1], 64)
		if err != nil {
			value, err = evaluate(code(row[1]), p.values)
		}
		if err != nil {
			p.t.Errorf("%s: %v", line, err)
		}
		p.values[code(row[0])] = value
	}
	for _, c := range []struct{ name, file, pattern string }{
		{"beats", "../daemon/fleet.go", `beatInterval = (\d+) \* time.Second`},
		{"sweeps", "../daemon/periodic.go", `wait = (9)\*time\.Minute \+ rand\.N\(2\*time\.Minute\)`},
		{"start_reads", "../bastion/start_test.go", `const startReads, startWrites = (\d+), \d+ `},
		{"start_writes", "../bastion/start_test.go", `const startReads, startWrites = \d+, (\d+) `},
		{"idle", "../config/config.go", `Idle: +(15) \* time\.Minute`},
	} {
		m := regexp.MustCompile(c.pattern).FindStringSubmatch(content(p.t, c.file))
		if m == nil {
			p.t.Errorf("%s has no %s", c.file, c.pattern)
			continue
		}
		n, _ := strconv.ParseFloat(m[1], 64)
		want := map[string]float64{"beats": 3600 / n, "sweeps": 60 / (n + 1), "start_reads": n, "start_writes": n, "idle": n / 60}[c.name]
		if p.values[c.name] != want {
			p.t.Errorf("%s: %s is %v, and %v in %s", p.file, c.name, p.values[c.name], want, c.file)
		}
	}
}

// prices compares the table of prices.
func (p *page) prices(text string, prices Prices) {
	seen := map[string]bool{}
	for _, line := range section(text, "## Prices") {
		row := cells(line)
		if len(row) != 5 || code(row[0]) == "" {
			continue
		}
		name := code(row[0])
		seen[name] = true
		known, ok := prices.Prices[name]
		if want := []string{fmt.Sprint(known.Price), known.Unit, known.Page, known.AsOf}; !ok || strings.Join(row[1:], "|") != strings.Join(want, "|") {
			p.t.Errorf("%s: the price %s is %q, want %q", p.file, name, row[1:], want)
		}
	}
	for name := range prices.Prices {
		if !seen[name] {
			p.t.Errorf("%s has no price %s", p.file, name)
		}
	}
}

var sectionLink = regexp.MustCompile(`^\[.*\]\((?:docs/cost\.md)?#([a-z0-9-]+)\)$`)

// figures compares the rows with figures.
func (p *page) figures(text string) {
	// The summary comes before the sections that it repeats, so these are first.
	for _, repeats := range []bool{false, true} {
		anchor := ""
		var sums []float64
		for line := range strings.Lines(text) {
			if heading, ok := strings.CutPrefix(strings.TrimSpace(line), "## "); ok {
				anchor = strings.ReplaceAll(strings.ToLower(strings.ReplaceAll(heading, ",", "")), " ", "-")
			}
			row := cells(line)
			if row == nil {
				sums = nil
				continue
			}
			link := sectionLink.FindStringSubmatch(row[0])
			switch {
			case repeats && link != nil && len(row) >= 4:
				totals := p.totals[link[1]]
				if totals == nil {
					p.t.Errorf("%s: there is no total in #%s", p.file, link[1])
					continue
				}
				p.compare(line, row[1:4], totals, "%.0f")
			case repeats:
			case len(row) > 2 && code(row[1]) != "" && anchor != "assumptions":
				columns := users
				if len(row) == 3 {
					columns = []float64{1}
				}
				var values []float64
				for i, n := range columns {
					p.values["users"] = n
					value, err := evaluate(code(row[1]), p.values)
					if err != nil {
						p.t.Errorf("%s: %v", line, err)
						return
					}
					values = append(values, value)
					if sums == nil {
						sums = make([]float64, len(columns))
					}
					sums[i] += value
				}
				p.compare(line, row[2:], values, "%.2f")
			case row[0] == "**total**":
				p.totals[anchor] = sums
				p.compare(line, row[2:], sums, "%.2f")
			}
		}
	}
}

// compare compares the figures of a row.
func (p *page) compare(line string, got []string, want []float64, format string) {
	var figures []string
	for _, value := range want {
		figures = append(figures, thousands(fmt.Sprintf(format, value+1e-9))) // 4.675 is 4.68
	}
	p.checked += len(figures)
	if strings.Join(got, " | ") != strings.Join(figures, " | ") {
		p.t.Errorf("%s: %s\nwant | %s |", p.file, strings.TrimSpace(line), strings.Join(figures, " | "))
	}
}

// thousands puts commas into a number of more than three digits before the point.
func thousands(s string) string {
	whole, fraction, point := strings.Cut(s, ".")
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if point {
		return whole + "." + fraction
	}
	return whole
}

// evaluate evaluates an expression of numbers, names, + - * /, min and ceil.
func evaluate(text string, values map[string]float64) (float64, error) {
	expr, err := parser.ParseExpr(text)
	if err != nil {
		return 0, err
	}
	var eval func(e ast.Expr) float64
	eval = func(e ast.Expr) float64 {
		switch e := e.(type) {
		case *ast.BasicLit:
			x, parseErr := strconv.ParseFloat(e.Value, 64)
			if parseErr != nil {
				err = parseErr
			}
			return x
		case *ast.Ident:
			x, ok := values[e.Name]
			if !ok {
				err = fmt.Errorf("there is no %s", e.Name)
			}
			return x
		case *ast.ParenExpr:
			return eval(e.X)
		case *ast.BinaryExpr:
			x, y := eval(e.X), eval(e.Y)
			switch e.Op {
			case token.ADD:
				return x + y
			case token.SUB:
				return x - y
			case token.MUL:
				return x * y
			case token.QUO:
				return x / y
			}
		case *ast.CallExpr:
			name, _ := e.Fun.(*ast.Ident)
			switch {
			case name != nil && name.Name == "min" && len(e.Args) == 2:
				return min(eval(e.Args[0]), eval(e.Args[1]))
			case name != nil && name.Name == "ceil" && len(e.Args) == 1:
				return math.Ceil(eval(e.Args[0]))
			}
		}
		err = fmt.Errorf("%s: not understood", text)
		return 0
	}
	return eval(expr), err
}
