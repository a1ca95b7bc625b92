package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestList lists a root file system with three Debian packages, one of them removed, and
// two Go programs, which are this test.
func TestList(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	write("usr/local/bin/one", string(program), 0o755)
	write("usr/local/bin/two", string(program), 0o755)
	write("usr/local/bin/script", "#!/bin/sh\n", 0o755)
	write("usr/lib/os-release", "ID=debian\nVERSION_ID=\"13\"\n", 0o644)
	write("var/lib/dpkg/status", `Package: libstdc++6
Status: install ok installed
Architecture: amd64
Source: gcc-14
Version: 14.2.0-19
Description: a library
 Version: not this one

Package: git
Status: install ok installed
Architecture: amd64
Version: 1:2.47.3-0+deb13u1

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
`, 0o644)

	doc, err := list(root, "sallyport-bastion", "v1.2.3", "amd64", time.Unix(1800000000, 0))
	if err != nil {
		t.Fatal(err)
	}
	find := func(name string) pkg {
		t.Helper()
		i := slices.IndexFunc(doc.Packages, func(p pkg) bool { return p.Name == name })
		if i < 0 {
			t.Fatalf("%s is not listed", name)
		}
		return doc.Packages[i]
	}
	for name, want := range map[string]string{
		"libstdc++6": "pkg:deb/debian/libstdc++6@14.2.0-19?arch=amd64&distro=debian-13",
		"git":        "pkg:deb/debian/git@1%3A2.47.3-0%2Bdeb13u1?arch=amd64&distro=debian-13",
	} {
		if p := find(name); len(p.References) != 1 || p.References[0].Locator != want {
			t.Errorf("%s: got %+v, want %s", name, p, want)
		}
	}
	if p := find("libstdc++6"); !strings.HasSuffix(p.Source, " gcc-14") {
		t.Errorf("got %+v", p)
	}
	one, two, kong := find("/usr/local/bin/one"), find("/usr/local/bin/two"), find("github.com/alecthomas/kong")
	for _, p := range []pkg{one, two} {
		if !slices.Contains(doc.Relationships, relationship{p.ID, "STATIC_LINK", kong.ID}) {
			t.Errorf("%s does not link %s", p.Name, kong.Name)
		}
	}
	ids, names := map[string]bool{}, map[string]int{}
	for _, p := range doc.Packages {
		if ids[p.ID] {
			t.Errorf("%s is used twice", p.ID)
		}
		ids[p.ID] = true
		names[p.Name]++
	}
	if names["gone"] > 0 || names["/usr/local/bin/script"] > 0 || names["github.com/alecthomas/kong"] != 1 {
		t.Errorf("got %v", names)
	}
	for _, r := range doc.Relationships {
		if !ids[r.To] || !ids[r.From] && r.From != documentID {
			t.Errorf("%+v is of no package", r)
		}
	}
	if text, err := json.Marshal(doc); err != nil || !strings.Contains(string(text), `"created":"2027-01-15T08:00:00Z"`) {
		t.Errorf("got %s, %v", text, err)
	}
}

// TestEmpty lists an image without Debian and without programs.
func TestEmpty(t *testing.T) {
	doc, err := list(t.TempDir(), "x", "v1", "arm64", time.Now())
	if err != nil || len(doc.Packages) != 1 || doc.Relationships[0] != (relationship{documentID, "DESCRIBES", doc.Packages[0].ID}) {
		t.Errorf("got %+v, %v", doc, err)
	}
}
