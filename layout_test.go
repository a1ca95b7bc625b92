package sallyport_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/sallyport-ssh/sallyport/"

// mayImport says which packages of ours a package of ours may import. Imports
// point one way: the commands know everything; the gateway knows whom it joins;
// what can stand alone does.
var mayImport = map[string][]string{
	"cmd/gateway":       {"internal/audit", "internal/auth", "internal/bastion", "internal/become", "internal/config", "internal/console", "internal/fargate", "internal/gateway", "internal/identity", "internal/local", "internal/oplog", "internal/policy", "internal/record", "internal/wire"},
	"cmd/bastion-agent": {"internal/agent", "internal/become", "internal/oplog", "internal/sshca"},
	"internal/gateway":  {"internal/audit", "internal/auth", "internal/bastion", "internal/identity", "internal/policy", "internal/record", "internal/relay", "internal/wire"},
	"internal/console":  {"internal/audit", "internal/bastion", "internal/gateway", "internal/identity"},
	"internal/local":    {"internal/bastion"},
	"internal/fargate":  {"internal/bastion"},
	"internal/bastion":  {"internal/identity", "internal/sshca"},
	"internal/agent":    {"internal/become", "internal/identity", "internal/policy", "internal/sshca", "internal/wire"},
	"internal/relay":    {"internal/identity", "internal/policy"},
	"internal/sshca":    {"internal/identity"},
	"internal/auth":     {"internal/become", "internal/identity"},
	"internal/become":   {},
	"internal/policy":   {"internal/identity"},
	"internal/identity": {}, // plain data
	"internal/audit":    {},
	"internal/record":   {},
	"internal/config":   {"internal/identity", "internal/policy"},
	"internal/oplog":    {},
	"internal/wire":     {},
	"internal/awsfake":  {}, // for tests only: nothing that is shipped imports it
	"internal/sshtest":  {}, // for tests only: nothing that is shipped imports it
}

// TestImports holds the tree against that table. Tools and tests may import
// what they like.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", "./cmd/...", "./internal/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var pkg struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		seen++
		name := strings.TrimPrefix(pkg.ImportPath, module)
		allowed, known := mayImport[name]
		if !known {
			t.Errorf("%s is not in the table: say what it may import", name)
		}
		for _, imported := range pkg.Imports {
			if ours, ok := strings.CutPrefix(imported, module); ok && known && !slices.Contains(allowed, ours) {
				t.Errorf("%s imports %s", name, ours)
			}
		}
	}
	if seen == 0 {
		t.Error("no packages found")
	}
}
