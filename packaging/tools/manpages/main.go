// Command manpages writes the manual pages of Sallyport: gateway(8) and bastion-agent(8)
// from packaging/man and the commands that the programs print, and gateway.yaml(5) from
// docs/configuration.md.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/cpuguy83/go-md2man/v2/md2man"
)

func main() {
	tree := flag.String("tree", ".", "the root of the source tree")
	bin := flag.String("bin", "bin", "the folder with programs for this machine")
	out := flag.String("out", ".", "the folder for the pages")
	version := flag.String("version", "", "the version, for the footer")
	date := flag.String("date", "", "the date, for the footer")
	flag.Parse()
	commands := func(program string) (string, error) {
		list := exec.Command(filepath.Join(*bin, program), "manual")
		list.Stderr = os.Stderr
		text, err := list.Output()
		return string(text), err
	}
	if err := run(*tree, *out, *version, *date, commands); err != nil {
		fmt.Fprintln(os.Stderr, "manpages:", err)
		os.Exit(1)
	}
}

// place is the line of a page of packaging/man that the commands replace.
const place = "<!-- commands -->\n"

// run writes the pages into the folder out. commands returns the commands of a program, in
// Markdown.
func run(tree, out, version, date string, commands func(program string) (string, error)) error {
	// ofProgram completes the page of a program.
	ofProgram := func(program string) func(string) (string, error) {
		return func(text string) (string, error) {
			list, err := commands(program)
			if err != nil {
				return "", err
			}
			if !strings.Contains(text, place) {
				return "", fmt.Errorf("there is no line %q", strings.TrimSpace(place))
			}
			return strings.Replace(text, place, list, 1), nil
		}
	}
	for _, page := range []struct {
		name, section, source string
		convert               func(string) (string, error)
	}{
		{"gateway", "8", "packaging/man/gateway.8.md", ofProgram("gateway")},
		{"bastion-agent", "8", "packaging/man/bastion-agent.8.md", ofProgram("bastion-agent")},
		{"gateway.yaml", "5", "docs/configuration.md", configuration},
	} {
		source, err := os.ReadFile(filepath.Join(tree, page.source))
		if err != nil {
			return err
		}
		text, err := page.convert(string(source))
		if err != nil {
			return fmt.Errorf("%s: %w", page.source, err)
		}
		title := fmt.Sprintf("%% \"%s\" \"%s\" \"%s\" \"Sallyport %s\" \"Sallyport\"\n\n", strings.ToUpper(page.name), page.section, date, version)
		file := filepath.Join(out, page.name+"."+page.section)
		if err := os.WriteFile(file, []byte(roff(title+text)), 0o644); err != nil {
			return err
		}
	}
	return nil
}

var bold = regexp.MustCompile(`\\fB.*?\\f[PR]`)

// roff renders a page. md2man writes backslashes and hyphens in a form that roff may
// show as other characters, so that a copied option does not work.
func roff(markdown string) string {
	text := string(md2man.Render([]byte(markdown)))
	text = strings.ReplaceAll(text, `\\`, `\e`)
	text = bold.ReplaceAllStringFunc(text, func(s string) string {
		return strings.ReplaceAll(s, "-", `\-`)
	})
	return strings.TrimLeft(text, "\n")
}

var link = regexp.MustCompile(`\[([^\]]+)\]\(([^)]+)\)`)

const (
	head = `# NAME

gateway.yaml - configuration of the Sallyport SSH gateway

# DESCRIPTION
`
	tail = `# SEE ALSO

**gateway**(8), **bastion-agent**(8), **sshd_config**(5), and the pages named here, in */usr/share/doc/sallyport-gateway*.
`
)

// configuration returns docs/configuration.md as a manual page.
func configuration(text string) (string, error) {
	text, ok := strings.CutPrefix(text, "# Configuration\n")
	text, _, ok2 := strings.Cut(text, "\n## More\n")
	before, rest, ok3 := strings.Cut(text, "```yaml\n")
	example, after, ok4 := strings.Cut(rest, "```\n")
	if !ok || !ok2 || !ok3 || !ok4 {
		return "", fmt.Errorf("the page has another structure: there is no heading Configuration, no example, or no heading More")
	}
	var b strings.Builder
	b.WriteString(head)
	b.WriteString(prose(before))
	b.WriteString("# SETTINGS\n\n```\n" + narrow(example) + "```\n")
	b.WriteString(prose(after))
	b.WriteString("\n" + tail)
	return b.String(), nil
}

// prose replaces links to other pages by their names, makes headings of the second level
// sections of the page, and tables lists, because tables with sentences in their cells do
// not fit into a terminal. Blocks of code stay as they are.
func prose(text string) string {
	var b strings.Builder
	inCode := false
	var header []string // of the table that the last line belongs to
	for line := range strings.Lines(text) {
		fence := strings.HasPrefix(line, "```")
		if fence {
			inCode = !inCode
		}
		if inCode || fence {
			b.WriteString(line)
			continue
		}
		if heading, ok := strings.CutPrefix(line, "## "); ok {
			line = "# " + heading
		}
		line = link.ReplaceAllStringFunc(line, plainLink)
		if !strings.HasPrefix(line, "| ") {
			header = nil
			b.WriteString(line)
			continue
		}
		switch cells := cellsOf(line); {
		case header == nil:
			header = cells
		case strings.HasPrefix(cells[0], "---"):
		default:
			b.WriteString(listItem(header, cells))
		}
	}
	return b.String()
}

// cellsOf returns the cells of a row of a table.
func cellsOf(row string) []string {
	cells := strings.Split(strings.Trim(strings.TrimSpace(row), "|"), "|")
	for i, c := range cells {
		cells[i] = strings.TrimSpace(c)
	}
	return cells
}

// listItem returns a row of a table as an item of a list of definitions: the first cell,
// and the others after the headings of their columns.
func listItem(header, cells []string) string {
	var parts []string
	for i, c := range cells[1:] {
		if c != "" {
			parts = append(parts, header[i+1]+": "+c)
		}
	}
	return cells[0] + "\n: " + strings.Join(parts, "; ") + "\n\n"
}

// plainLink returns a link as text; a link to a web page stays one.
func plainLink(s string) string {
	m := link.FindStringSubmatch(s)
	text, target := m[1], m[2]
	page, _, _ := strings.Cut(target, "#")
	switch {
	case strings.Contains(target, "://"):
		return s
	case page == "":
		return text
	case page == text:
		return "*" + page + "*"
	}
	return text + " (*" + page + "*)"
}

// width is that of code in a terminal of 80 columns, beside the margin of man(1).
const width = 72

// narrow moves comments that do not fit into the width to lines of their own, below the
// setting that they describe.
func narrow(yaml string) string {
	var b strings.Builder
	for line := range strings.Lines(yaml) {
		line = strings.TrimRight(line, "\n")
		i := strings.LastIndex(line, " # ")
		if len(line) <= width || i < 0 {
			b.WriteString(line + "\n")
			continue
		}
		setting, comment := strings.TrimRight(line[:i], " "), line[i+3:]
		indent := setting[:len(setting)-len(strings.TrimLeft(setting, " "))]
		b.WriteString(setting + "\n")
		for _, part := range wrap(comment, width-len(indent)-10) {
			b.WriteString(indent + "        # " + part + "\n")
		}
	}
	return b.String()
}

// wrap splits text at spaces into lines of at most n bytes, if its words are that short.
func wrap(text string, n int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		switch {
		case line == "":
			line = word
		case len(line)+1+len(word) <= n:
			line += " " + word
		default:
			lines = append(lines, line)
			line = word
		}
	}
	return append(lines, line)
}
