package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestPages renders the pages of the tree. gateway.yaml(5) must have every line of text
// of docs/configuration.md, and no link of Markdown.
func TestPages(t *testing.T) {
	dir := t.TempDir()
	commands := func(program string) (string, error) {
		return "\n### **" + program + " serve**\n\n**--config**=*FILE*\n: The file.\n", nil
	}
	if err := run("../../..", dir, "v1.2.3", "2026-12-01", commands); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"gateway.8", "bastion-agent.8", "gateway.yaml.5"} {
		page, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		text := string(page)
		if !regexp.MustCompile(`(?m)^\.TH "` + strings.ToUpper(name[:len(name)-2]) + `" "[58]" "2026-12-01" "Sallyport v1.2.3"`).MatchString(text) {
			t.Errorf("%s has no title", name)
		}
		program, _, _ := strings.Cut(name, ".")
		if program = strings.ReplaceAll(program, "-", `\-`); strings.HasSuffix(name, ".8") && !strings.Contains(text, ".SS \\fB"+program+" serve\\fP\n") {
			t.Errorf("%s has no commands", name)
		}
		if strings.Contains(text, "](") || strings.Contains(text, "```") || strings.Contains(text, "<!--") {
			t.Errorf("%s contains Markdown", name)
		}
	}
	source, err := os.ReadFile("../../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(dir, "gateway.yaml.5"))
	if err != nil {
		t.Fatal(err)
	}
	have := words(string(page))
	settings := 0
	for _, m := range regexp.MustCompile(`(?m)^(?:# )? *([a-z_]+):`).FindAllStringSubmatch(string(source), -1) {
		settings++
		if !have[m[1]] {
			t.Errorf("gateway.yaml(5) has no %s", m[1])
		}
	}
	if settings < 100 {
		t.Errorf("docs/configuration.md has %d settings", settings)
	}
	for _, m := range regexp.MustCompile(`(?m)^## (.*)$`).FindAllStringSubmatch(string(source), -1) {
		if m[1] != "More" && !strings.Contains(string(page), ".SH "+m[1]+"\n") {
			t.Errorf("gateway.yaml(5) has no section %q", m[1])
		}
	}
}

func words(text string) map[string]bool {
	all := map[string]bool{}
	for _, w := range regexp.MustCompile(`[a-z_]+`).FindAllString(text, -1) {
		all[w] = true
	}
	return all
}

func TestNarrow(t *testing.T) {
	long := "    connect_by: private       # or public, for a gateway outside of the VPC; needs assign_public_ip\n"
	want := "    connect_by: private\n            # or public, for a gateway outside of the VPC; needs\n            # assign_public_ip\n"
	if got := narrow("a: 1 # short\n" + long); got != "a: 1 # short\n"+want {
		t.Errorf("got\n%s", got)
	}
}

func TestTable(t *testing.T) {
	got := prose("text\n\n| client | setting | keys |\n| --- | --- | --- |\n| a | `b` | |\n| c | d | e |\n\nmore\n")
	if want := "text\n\na\n: setting: `b`\n\nc\n: setting: d; keys: e\n\n\nmore\n"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestPlainLink(t *testing.T) {
	for in, want := range map[string]string{
		"[roles.md](roles.md)":                   "*roles.md*",
		"[roles](roles.md)":                      "roles (*roles.md*)",
		"[reload](operations.md#reload)":         "reload (*operations.md*)",
		"[connections end](#when-a-key-is-gone)": "connections end",
		"[AWS](https://aws.amazon.com/x)":        "[AWS](https://aws.amazon.com/x)",
	} {
		if got := plainLink(in); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}
