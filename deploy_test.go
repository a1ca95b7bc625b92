package sallyport_test

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the tables of deploy/terraform/README.md")

// TestTerraformReadme compares the tables of the module's README with its variables and
// outputs: go test . -run TestTerraformReadme -update writes them.
func TestTerraformReadme(t *testing.T) {
	const readme = "deploy/terraform/README.md"
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	const begin, end = "<!-- BEGIN_TF_DOCS -->\n", "<!-- END_TF_DOCS -->"
	before, rest, ok := strings.Cut(string(text), begin)
	_, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		t.Fatalf("%s has no place for the tables", readme)
	}
	want := before + begin + terraformTables(t) + end + after
	if *update {
		if err := os.WriteFile(readme, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if string(text) != want {
		t.Errorf("%s does not have the variables and outputs of the module; run go test . -run TestTerraformReadme -update", readme)
	}
}

// terraformTables returns the tables in the form of terraform-docs.
func terraformTables(t *testing.T) string {
	var b strings.Builder
	b.WriteString("## Inputs\n\n| Name | Description | Type | Default | Required |\n| --- | --- | --- | --- | :---: |\n")
	variables := terraformBlocks(t, "deploy/terraform/variables.tf", "variable")
	if len(variables) < 10 {
		t.Fatalf("%d variables", len(variables))
	}
	for _, v := range variables {
		kind, _, multiline := strings.Cut(v.arguments["type"], "\n")
		if multiline {
			kind += "…}))"
		}
		value, isOptional := v.arguments["default"]
		required := "no"
		if !isOptional {
			value, required = "n/a", "yes"
		} else {
			value = "`" + value + "`"
		}
		fmt.Fprintf(&b, "| %s | %s | `%s` | %s | %s |\n", v.name, v.description(t), kind, value, required)
	}
	b.WriteString("\n## Outputs\n\n| Name | Description |\n| --- | --- |\n")
	for _, o := range terraformBlocks(t, "deploy/terraform/outputs.tf", "output") {
		fmt.Fprintf(&b, "| %s | %s |\n", o.name, o.description(t))
	}
	return b.String()
}

// A terraformBlock is a variable or an output.
type terraformBlock struct {
	name      string
	arguments map[string]string // as written
}

func (b terraformBlock) description(t *testing.T) string {
	text := strings.ReplaceAll(strings.Trim(b.arguments["description"], `"`), `\"`, `"`)
	if text == "" || strings.Contains(text, "|") {
		t.Errorf("%s: description %q", b.name, text)
	}
	return text
}

// terraformBlocks returns the blocks of one kind in a file that terraform fmt has
// formatted, sorted by name.
func terraformBlocks(t *testing.T, path, kind string) []terraformBlock {
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var all []terraformBlock
	for _, m := range regexp.MustCompile(`(?ms)^`+kind+` "(\w+)" \{\n(.*?)^\}`).FindAllStringSubmatch(string(text), -1) {
		block := terraformBlock{m[1], map[string]string{}}
		// An argument ends at the next one, or at a nested block.
		for _, a := range regexp.MustCompile(`(?ms)^  (\w+) += (.*?)\n(?:  \S|\z)`).FindAllStringSubmatch(separated(m[2]), -1) {
			block.arguments[a[1]] = a[2]
		}
		all = append(all, block)
	}
	slices.SortFunc(all, func(a, b terraformBlock) int { return strings.Compare(a.name, b.name) })
	return all
}

// separated doubles the first line of each argument and block, because matches do not
// overlap.
func separated(body string) string {
	return regexp.MustCompile(`(?m)^  [a-z]`).ReplaceAllString(body, "  -\n$0")
}
