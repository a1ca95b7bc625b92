package sallyport_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"
)

// markdown reads every Markdown file of the tree. Keys are slash-separated
// paths, relative to the root.
func markdown(t *testing.T) map[string]string {
	files := map[string]string{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && strings.HasPrefix(d.Name(), ".") {
			return fs.SkipDir
		}
		if filepath.Ext(path) != ".md" {
			return nil
		}
		text, err := os.ReadFile(path)
		files[filepath.ToSlash(path)] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// prose returns the lines of a Markdown text that are outside of code blocks.
func prose(text string) []string {
	var lines []string
	inCode := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			inCode = !inCode
		} else if !inCode {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// anchors returns the fragments of a page: one for each heading, as GitHub makes
// them, and one for each <a id="...">.
func anchors(text string) map[string]bool {
	ids := map[string]bool{}
	for _, line := range prose(text) {
		for _, m := range anchorID.FindAllStringSubmatch(line, -1) {
			ids[m[1]] = true
		}
		level := len(line) - len(strings.TrimLeft(line, "#"))
		if level == 0 || level > 6 {
			continue
		}
		id := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, strings.TrimSpace(line[level:]))
		ids[id] = true
	}
	return ids
}

var (
	anchorID   = regexp.MustCompile(`<a id="([^"]+)">`)
	inlineCode = regexp.MustCompile("`[^`]*`")
	link       = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	imageSrc   = regexp.MustCompile(`src="([^"]+)"`)
)

// links returns the targets of the links and images in a Markdown text.
func links(text string) []string {
	var targets []string
	for _, line := range prose(text) {
		line = inlineCode.ReplaceAllString(line, "")
		for _, re := range []*regexp.Regexp{link, imageSrc} {
			for _, m := range re.FindAllStringSubmatch(line, -1) {
				targets = append(targets, m[1])
			}
		}
	}
	return targets
}

// TestLinks checks that each relative link of the documentation leads to a file
// of the tree, and its fragment to a heading.
func TestLinks(t *testing.T) {
	files := markdown(t)
	for from, text := range files {
		for _, target := range links(text) {
			if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			path, fragment, _ := strings.Cut(target, "#")
			to := from
			if path != "" {
				to = filepath.ToSlash(filepath.Join(filepath.Dir(from), path))
			}
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s links to %s: there is no %s", from, target, to)
				continue
			}
			if fragment != "" && !anchors(files[to])[fragment] {
				t.Errorf("%s links to %s: %s has no such heading", from, target, to)
			}
		}
	}
}

// TestIndex checks that docs/README.md links to every page below docs.
func TestIndex(t *testing.T) {
	files := markdown(t)
	listed := map[string]bool{"docs/README.md": true}
	for _, target := range links(files["docs/README.md"]) {
		path, _, _ := strings.Cut(target, "#")
		listed[filepath.ToSlash(filepath.Join("docs", path))] = true
	}
	for path := range files {
		if strings.HasPrefix(path, "docs/") && !listed[path] {
			t.Errorf("docs/README.md does not link to %s", path)
		}
	}
}

// TestTroubleshooting compares docs/troubleshooting.md with the code, both ways:
// each sentence of internal/gateway/messages.go and each warning or error of the
// operator's log has a row, and the first column of each row is text of the code.
func TestTroubleshooting(t *testing.T) {
	page, err := os.ReadFile("docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	var rows []string // first columns
	for _, m := range regexp.MustCompile("(?m)^\\| `?(.*?)`? \\| .* \\|.*\\|$").FindAllStringSubmatch(string(page), -1) {
		if first := m[1]; first != "message" && first != "reason" && first != "record" && first != "---" {
			rows = append(rows, first)
		}
	}
	if len(rows) < 100 {
		t.Fatalf("found %d rows", len(rows))
	}

	var texts []string // every string constant of the shipped code
	for _, dir := range []string{"cmd", "internal"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.IsDir() && (d.Name() == "awsfake" || d.Name() == "sshtest") {
				return fs.SkipDir
			}
			if filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
				return nil
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.BasicLit:
					if n.Kind == token.STRING {
						text := constant(n)
						texts = append(texts, text)
						if filepath.ToSlash(path) == "internal/gateway/messages.go" {
							checkSentence(t, rows, text)
						}
					}
				case *ast.CallExpr:
					checkRecord(t, rows, path, n)
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}

	inCode := func(s string) bool {
		return slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(text, s) })
	}
	for _, row := range rows {
		for part := range strings.SplitSeq(row, "…") {
			part = strings.TrimSpace(part)
			if inCode(part) {
				continue
			}
			for _, sentence := range sentences(part) {
				if !inCode(sentence) {
					t.Errorf("docs/troubleshooting.md has %q, and the code does not", sentence)
				}
			}
		}
	}
}

// constant returns the value of a string literal.
func constant(lit *ast.BasicLit) string {
	text, _ := strconv.Unquote(lit.Value)
	return text
}

// sentences splits a text after each period and semicolon, because the code
// composes texts of such parts.
func sentences(text string) []string {
	var parts []string
	for _, part := range regexp.MustCompile(`[^.;]+[.;]*`).FindAllString(text, -1) {
		parts = append(parts, strings.Trim(part, " .;"))
	}
	return parts
}

// checkSentence requires a row for a text of messages.go. Parts of fewer than
// four words are glue between others.
func checkSentence(t *testing.T, rows []string, text string) {
	for _, part := range regexp.MustCompile(`%[a-z]`).Split(text, -1) {
		part = strings.TrimSpace(part)
		if len(strings.Fields(part)) < 4 {
			continue
		}
		if !slices.ContainsFunc(rows, func(row string) bool { return strings.Contains(row, part) }) {
			t.Errorf("docs/troubleshooting.md has no row for this text of messages.go: %q", part)
		}
	}
}

// checkRecord requires a row for the message of a call of Warn or Error of a
// logger.
func checkRecord(t *testing.T, rows []string, path string, call *ast.CallExpr) {
	fun, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || (fun.Sel.Name != "Warn" && fun.Sel.Name != "Error") || len(call.Args) == 0 {
		return
	}
	arg := call.Args[0]
	if sum, ok := arg.(*ast.BinaryExpr); ok {
		arg = sum.X
	}
	lit, ok := arg.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return
	}
	record := strings.TrimRight(constant(lit), ": ")
	if !slices.Contains(rows, record) {
		t.Errorf("docs/troubleshooting.md has no row for the record %q of %s", record, path)
	}
}

// TestArchitecture checks docs/architecture.md: each function of its table is in
// the file beside it, and each package of the tree has a line.
func TestArchitecture(t *testing.T) {
	text, err := os.ReadFile("docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for line := range strings.Lines(string(text)) {
		m := regexp.MustCompile(`^\|.*\| \[[^\]]+\]\(\.\./([^)]+\.go)\) \|$`).FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		rows++
		code, err := os.ReadFile(m[1])
		if err != nil {
			t.Error(err)
			continue
		}
		column := strings.Split(line, "|")[2]
		for _, name := range regexp.MustCompile("`([A-Za-z.]+)`").FindAllStringSubmatch(column, -1) {
			bare := name[1][strings.LastIndex(name[1], ".")+1:]
			if !regexp.MustCompile(`(?m)^(func (\([^)]*\) )?|type |\t)` + bare + `\b`).Match(code) {
				t.Errorf("docs/architecture.md: %s has no %s", m[1], name[1])
			}
		}
	}
	if rows < 10 {
		t.Errorf("docs/architecture.md: %d rows with a function and a file", rows)
	}
	for pkg := range mayImport {
		if !strings.Contains(string(text), "`"+pkg+"`") {
			t.Errorf("docs/architecture.md has no line for %s", pkg)
		}
	}
}
