// Command notices writes the licences of the modules that programs are linked with, and
// that of Go, to standard output: a copy of a static binary has to come with them.
//
//	notices PACKAGE ...
//
// Packages are named as for go list, whose environment (GOOS, GOARCH, CGO_ENABLED)
// applies.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

func main() {
	text, err := notices(os.Args[1:])
	if err == nil {
		_, err = os.Stdout.Write(text)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "notices:", err)
		os.Exit(1)
	}
}

// A module is a module as go list prints it.
type module struct {
	Path, Version, Dir string
	Main               bool
}

func notices(packages []string) ([]byte, error) {
	modules, err := modulesOf(packages)
	if err != nil {
		return nil, err
	}
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return nil, err
	}
	modules = append([]module{{Path: "the Go standard library", Dir: strings.TrimSpace(string(root))}}, modules...)
	owners := map[string][]string{} // the files of each text
	var texts []string              // in the order of their first file
	for _, m := range modules {
		licences, err := licencesOf(m)
		if err != nil {
			return nil, err
		}
		for _, l := range licences {
			if owners[l.text] == nil {
				texts = append(texts, l.text)
			}
			owners[l.text] = append(owners[l.text], l.file)
		}
	}
	var b bytes.Buffer
	for _, text := range texts {
		fmt.Fprintf(&b, "%s\n%s\n\n%s\n\n", strings.Repeat("=", 78), strings.Join(owners[text], "\n"), text)
	}
	return b.Bytes(), nil
}

// modulesOf returns the modules, other than the main one, that have a package which the
// packages import, directly or not. Standard packages have no module.
func modulesOf(packages []string) ([]module, error) {
	list := exec.Command("go", append([]string{"list", "-deps", "-json=Module"}, packages...)...)
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	seen := map[string]module{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var pkg struct{ Module *module }
		if err := dec.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		if pkg.Module != nil && !pkg.Module.Main {
			seen[pkg.Module.Path] = *pkg.Module
		}
	}
	var all []module
	for _, m := range seen {
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b module) int { return cmp.Compare(a.Path, b.Path) })
	return all, nil
}

var name = regexp.MustCompile(`(?i)^(licen[cs]e|copying|notice|patents)([.-].*)?$`)

// A licence is a text, and its file as module, version and name.
type licence struct{ file, text string }

// licencesOf returns the licences in the root of a module. A module without one is an
// error.
func licencesOf(m module) ([]licence, error) {
	entries, err := os.ReadDir(m.Dir)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.Path, err)
	}
	var all []licence
	for _, e := range entries {
		if e.IsDir() || !name.MatchString(e.Name()) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(m.Dir, e.Name()))
		if err != nil {
			return nil, err
		}
		file := strings.Join(strings.Fields(m.Path+" "+m.Version+" "+e.Name()), " ")
		all = append(all, licence{file, string(bytes.TrimSpace(text))})
	}
	if all == nil {
		return nil, fmt.Errorf("%s: there is no licence in %s", m.Path, m.Dir)
	}
	return all, nil
}
