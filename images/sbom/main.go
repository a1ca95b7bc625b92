// Sbom lists the contents of an image: its Debian packages, its Go programs, and the
// modules that these are built from. It prints SPDX 2.3 in JSON.
package main

import (
	"bufio"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"
)

func main() {
	var args struct {
		Name    string `required:"" help:"Name of the image."`
		Version string `required:"" help:"Version of the image."`
		Arch    string `required:"" help:"Architecture, as Debian and Go name it."`
		Root    string `arg:"" type:"existingdir" help:"The image's root file system."`
	}
	kong.Parse(&args, kong.Name("sbom"), kong.Description("Prints the software bill of materials of an image, as SPDX."))
	created := time.Now()
	if epoch, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64); err == nil {
		created = time.Unix(epoch, 0)
	}
	doc, err := list(args.Root, args.Name, args.Version, args.Arch, created)
	if err == nil {
		out := json.NewEncoder(os.Stdout)
		out.SetIndent("", " ")
		out.SetEscapeHTML(false)
		err = out.Encode(doc)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

// A document is that of the SPDX specification 2.3, with the fields that are used here.
type document struct {
	SPDXVersion   string         `json:"spdxVersion"`
	DataLicense   string         `json:"dataLicense"`
	ID            string         `json:"SPDXID"`
	Name          string         `json:"name"`
	Namespace     string         `json:"documentNamespace"`
	CreationInfo  creationInfo   `json:"creationInfo"`
	Packages      []pkg          `json:"packages"`
	Relationships []relationship `json:"relationships"`
}

type creationInfo struct {
	Created  string   `json:"created"`
	Creators []string `json:"creators"`
}

type pkg struct {
	ID            string        `json:"SPDXID"`
	Name          string        `json:"name"`
	Version       string        `json:"versionInfo,omitempty"`
	Download      string        `json:"downloadLocation"`
	FilesAnalyzed bool          `json:"filesAnalyzed"`
	Source        string        `json:"sourceInfo,omitempty"`
	Purpose       string        `json:"primaryPackagePurpose,omitempty"`
	References    []externalRef `json:"externalRefs,omitempty"`
}

type externalRef struct {
	Category string `json:"referenceCategory"`
	Type     string `json:"referenceType"`
	Locator  string `json:"referenceLocator"`
}

type relationship struct {
	From string `json:"spdxElementId"`
	Type string `json:"relationshipType"`
	To   string `json:"relatedSpdxElement"`
}

const documentID = "SPDXRef-DOCUMENT"

// list returns the bill of materials of the image with this root file system.
func list(root, name, version, arch string, created time.Time) (*document, error) {
	created = created.UTC().Truncate(time.Second)
	doc := &document{
		SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", ID: documentID, Name: name + " " + arch,
		Namespace:    fmt.Sprintf("https://github.com/sallyport-ssh/sallyport/sbom/%s/%s/%s/%d", url.PathEscape(name), url.PathEscape(version), arch, created.Unix()),
		CreationInfo: creationInfo{Created: created.Format(time.RFC3339), Creators: []string{"Tool: sallyport-sbom"}},
	}
	image := doc.add("", "DESCRIBES", pkg{Name: name, Version: version, Purpose: "CONTAINER"})
	if err := doc.addDebian(root, image); err != nil {
		return nil, err
	}
	if err := doc.addGo(root, image); err != nil {
		return nil, err
	}
	return doc, nil
}

// add adds a package that is in a relationship with another, empty for the document, and
// returns its id.
func (d *document) add(with, relation string, p pkg) string {
	if with == "" {
		with = documentID
	}
	p.ID = fmt.Sprintf("SPDXRef-Package-%d", len(d.Packages))
	p.Download = "NOASSERTION"
	d.Packages = append(d.Packages, p)
	d.Relationships = append(d.Relationships, relationship{with, relation, p.ID})
	return p.ID
}

func purl(locator string) []externalRef {
	return []externalRef{{"PACKAGE-MANAGER", "purl", locator}}
}

// addDebian adds the installed packages of dpkg, if the image has any.
func (d *document) addDebian(root, image string) error {
	status, err := os.Open(filepath.Join(root, "var/lib/dpkg/status"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer status.Close()
	packages, err := stanzas(status)
	if err != nil {
		return fmt.Errorf("%s: %w", status.Name(), err)
	}
	release, err := osRelease(root)
	if err != nil {
		return err
	}
	for _, p := range packages {
		if !strings.HasSuffix(p["Status"], " installed") {
			continue
		}
		source := p["Source"]
		if source == "" {
			source = p["Package"]
		}
		d.add(image, "CONTAINS", pkg{
			Name: p["Package"], Version: p["Version"], Source: "built from the Debian source package " + source,
			References: purl(fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s&distro=%s", url.PathEscape(p["Package"]), url.QueryEscape(p["Version"]), p["Architecture"], release)),
		})
	}
	return nil
}

// stanzas reads a control file of Debian. Continued lines are left out.
func stanzas(r io.Reader) ([]map[string]string, error) {
	var all []map[string]string
	current := map[string]string{}
	end := func() {
		if len(current) > 0 {
			all = append(all, current)
			current = map[string]string{}
		}
	}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		if line == "" {
			end()
			continue
		}
		if name, value, ok := strings.Cut(line, ":"); ok && line[0] != ' ' && line[0] != '\t' {
			current[name] = strings.TrimSpace(value)
		}
	}
	end()
	return all, lines.Err()
}

// osRelease returns the name of the distribution, such as debian-13.
func osRelease(root string) (string, error) {
	text, err := os.ReadFile(filepath.Join(root, "usr/lib/os-release"))
	if err != nil {
		return "", err
	}
	values := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		values[name] = strings.Trim(value, `"`)
	}
	return values["ID"] + "-" + values["VERSION_ID"], nil
}

// addGo adds the Go programs below root, and their modules.
func (d *document) addGo(root, image string) error {
	modules := map[string]string{} // ids by path and version
	return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil || !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0 {
			return err
		}
		build, err := buildinfo.ReadFile(path)
		if err != nil { // not a Go program
			return nil
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		deps := map[string]string{"stdlib": strings.TrimPrefix(build.GoVersion, "go")}
		for _, m := range append([]*debug.Module{&build.Main}, build.Deps...) {
			if m.Replace != nil {
				m = m.Replace
			}
			if m.Path != "" {
				deps[m.Path] = m.Version
			}
		}
		program := d.add(image, "CONTAINS", pkg{Name: "/" + name, Purpose: "APPLICATION", Source: "built from the Go package " + build.Path + " by " + build.GoVersion})
		for _, module := range slices.Sorted(maps.Keys(deps)) {
			key := module + "@" + deps[module]
			if modules[key] == "" {
				p := pkg{Name: module, Version: deps[module]}
				if p.Version != "" && p.Version != "(devel)" {
					p.References = purl("pkg:golang/" + strings.ToLower(module) + "@" + url.QueryEscape(p.Version))
				}
				modules[key] = d.add(program, "STATIC_LINK", p)
				continue
			}
			d.Relationships = append(d.Relationships, relationship{program, "STATIC_LINK", modules[key]})
		}
		return nil
	})
}
