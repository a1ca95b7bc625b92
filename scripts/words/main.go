// Command words counts some words in the comments and the prose of this
// repository:
//
//	go run ./scripts/words [-a] [-l] [PATH ...]
//
// A sentence of technical English has an identifier or a term of the field as its
// subject. One that begins with a relative pronoun usually hides that subject, so
// CONTRIBUTING.md permits few of the words below. The limit is per file, and a
// tripwire only: a file within it may still read badly.
//
// Comments are counted in Go, shell, YAML, Python and the like, prose in
// Markdown without its code. For each file above the limit, the highest rate
// first, it prints the number of these words, the number of all words, and the
// rate per 1,000. The exit status is 1 if there is such a file. PATHs are files
// or folders; without any, the current folder is searched.
package main

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"go/scanner"
	"go/token"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// counted are the words, in lower case.
var counted = []string{"what", "whatever", "who", "whoever", "whom"}

const (
	// limit is per 1,000 words.
	limit = 3.0
	// tolerated occurrences are within the limit even in a short file.
	tolerated = 1
)

func main() {
	all := flag.Bool("a", false, "print all files with such a word, not only those above the limit")
	lines := flag.Bool("l", false, "print the lines with such a word, too")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), `usage: words [-a] [-l] [PATH ...]

Counts %s in the comments and the prose of
files. Exits with status 1 if a file has more than %d of them and more than %g
per 1,000 words.

`, strings.Join(counted, ", "), tolerated, limit)
		flag.PrintDefaults()
	}
	flag.Parse()
	paths := flag.Args()
	if len(paths) == 0 {
		paths = []string{"."}
	}
	files, err := search(paths)
	if err != nil {
		fmt.Fprintln(os.Stderr, "words:", err)
		os.Exit(2)
	}
	if report(os.Stdout, files, *all, *lines) {
		os.Exit(1)
	}
}

// A file is the count of one file.
type file struct {
	path  string
	count int // of the counted words
	words int
	lines []line // with a counted word
}

type line struct {
	number int
	text   string
}

// rate is per 1,000 words.
func (f *file) rate() float64 { return 1000 * float64(f.count) / float64(max(f.words, 1)) }

func (f *file) aboveLimit() bool { return f.count > tolerated && f.rate() > limit }

// search counts the words of all files at or below the paths. Hidden folders,
// bin, and the inputs of fuzz tests are skipped.
func search(paths []string) ([]*file, error) {
	var files []*file
	for _, root := range paths {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			name := d.Name()
			if d.IsDir() {
				hidden := strings.HasPrefix(name, ".") && path != root
				if hidden || name == "bin" || name == "fuzz" {
					return filepath.SkipDir
				}
				return nil
			}
			if !d.Type().IsRegular() {
				return nil
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if f := count(path, data); f != nil {
				files = append(files, f)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return files, nil
}

// report prints the files above the limit, or all with a counted word, and
// reports whether there is one above it.
func report(w io.Writer, files []*file, all, lines bool) bool {
	slices.SortFunc(files, func(a, b *file) int {
		return cmp.Or(cmp.Compare(b.rate(), a.rate()), cmp.Compare(a.path, b.path))
	})
	failed := 0
	for _, f := range files {
		if f.aboveLimit() {
			failed++
		} else if !all || f.count == 0 {
			continue
		}
		fmt.Fprintf(w, "%-50s %3d of %5d words, %5.1f per 1,000\n", f.path, f.count, f.words, f.rate())
		for _, l := range f.lines {
			if lines {
				fmt.Fprintf(w, "\t%s:%d: %s\n", f.path, l.number, l.text)
			}
		}
	}
	if failed > 0 {
		fmt.Fprintf(w, "%d files have more than %g per 1,000 words of: %s\n", failed, limit, strings.Join(counted, ", "))
	}
	return failed > 0
}

// count counts the words of a file. It returns nil for a file of an unknown kind.
func count(path string, data []byte) *file {
	extract := extractor(path, data)
	if extract == nil {
		return nil
	}
	f := &file{path: path}
	for _, l := range extract(data) {
		found := 0
		for _, word := range wordPattern.FindAllString(l.text, -1) {
			f.words++
			word, _, _ = strings.Cut(strings.ToLower(word), "'") // without a suffix such as 's
			if slices.Contains(counted, word) {
				found++
			}
		}
		if found > 0 {
			f.count += found
			f.lines = append(f.lines, line{l.number, strings.TrimSpace(l.text)})
		}
	}
	return f
}

var wordPattern = regexp.MustCompile(`[A-Za-z]+('[A-Za-z]+)*`)

// extractor returns the function that finds the comments or the prose in files of
// this kind, or nil.
func extractor(path string, data []byte) func([]byte) []line {
	switch filepath.Ext(path) {
	case ".go":
		return goComments
	case ".md":
		return markdownProse
	case ".sh", ".yaml", ".yml", ".txtar", ".sed", ".py", ".php":
		return hashComments
	case ".c", ".h", ".s", ".js", ".java", ".mod":
		return slashComments
	}
	switch name := filepath.Base(path); {
	case name == "Makefile", name == "Dockerfile", bytes.HasPrefix(data, []byte("#!")):
		return hashComments
	}
	return nil
}

// goComments returns the comments of Go source, without directives such as
// //go:build.
func goComments(src []byte) []line {
	fset := token.NewFileSet()
	file := fset.AddFile("", fset.Base(), len(src))
	var s scanner.Scanner
	s.Init(file, src, nil, scanner.ScanComments)
	var lines []line
	for {
		pos, tok, text := s.Scan()
		switch {
		case tok == token.EOF:
			return lines
		case tok != token.COMMENT, strings.HasPrefix(text, "//go:"):
			continue
		}
		first := file.Line(pos)
		for i, l := range strings.Split(text, "\n") {
			lines = append(lines, line{first + i, l})
		}
	}
}

var codeSpan = regexp.MustCompile("`[^`]*`")

// markdownProse returns the text without fenced blocks and code spans.
func markdownProse(src []byte) []line {
	fenced := false
	return selectLines(src, func(text string) string {
		if strings.HasPrefix(strings.TrimSpace(text), "```") {
			fenced = !fenced
			return ""
		}
		if fenced {
			return ""
		}
		return codeSpan.ReplaceAllString(text, "")
	})
}

var hashComment = regexp.MustCompile(`(^|\s)#([^!].*)$`)

// hashComments returns comments from # to the end of the line. A # within quotes
// is taken for one too, which is harmless here.
func hashComments(src []byte) []line {
	return selectLines(src, func(text string) string {
		if m := hashComment.FindStringSubmatch(text); m != nil {
			return m[2]
		}
		return ""
	})
}

var slashComment = regexp.MustCompile(`(^|\s)//(.*)$`)

// slashComments returns comments from // to the end of the line, and those between
// /* and */.
func slashComments(src []byte) []line {
	block := false
	return selectLines(src, func(text string) string {
		if before, rest, begins := strings.Cut(text, "/*"); begins && !block && !strings.Contains(before, "//") {
			block, text = true, rest
		}
		if block {
			comment, _, ends := strings.Cut(text, "*/")
			block = !ends
			return comment
		}
		if m := slashComment.FindStringSubmatch(text); m != nil {
			return m[2]
		}
		return ""
	})
}

// selectLines returns the part of each line that keep returns, if any.
func selectLines(src []byte, keep func(text string) string) []line {
	var lines []line
	number := 0
	for text := range strings.Lines(string(src)) {
		number++
		if kept := keep(strings.TrimRight(text, "\n")); kept != "" {
			lines = append(lines, line{number, kept})
		}
	}
	return lines
}
