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

// mayImport lists the packages of this module that each of its packages may import.
// Imports point one way, from the commands down.
var mayImport = map[string][]string{
	"cmd/gateway":        {"internal/api", "internal/auth", "internal/bastion", "internal/config", "internal/console", "internal/cost", "internal/daemon", "internal/durable", "internal/dynamo", "internal/identity", "internal/manpage", "internal/oplog", "internal/policy", "internal/record", "internal/runas"},
	"internal/daemon":    {"internal/api", "internal/audit", "internal/auth", "internal/bastion", "internal/config", "internal/console", "internal/dynamo", "internal/ecstask", "internal/fargate", "internal/gateway", "internal/identity", "internal/local", "internal/metrics", "internal/oplog", "internal/record", "internal/revoked", "internal/secrets", "internal/sshca", "internal/tracing"},
	"internal/metrics":   {"internal/audit", "internal/bastion", "internal/gateway"}, // reads their counts
	"cmd/bastion-agent":  {"internal/agent", "internal/manpage", "internal/oplog", "internal/runas", "internal/sftp", "internal/sshca", "internal/unixsock"},
	"internal/gateway":   {"internal/audit", "internal/auth", "internal/bastion", "internal/identity", "internal/oplog", "internal/policy", "internal/record", "internal/relay", "internal/sshmsg", "internal/tracing", "internal/transfer", "internal/transport", "internal/userauth"},
	"internal/api":       {"internal/audit", "internal/auth", "internal/bastion", "internal/console", "internal/gateway", "internal/identity", "internal/userauth"},
	"internal/console":   {"internal/audit", "internal/auth", "internal/bastion", "internal/gateway", "internal/identity", "internal/mux", "internal/oplog", "internal/revoked", "internal/sshmsg"},
	"internal/local":     {"internal/account", "internal/bastion", "internal/durable", "internal/sshca", "internal/unixsock"},
	"internal/fargate":   {"internal/bastion", "internal/sshca", "internal/tracing"},
	"internal/bastion":   {"internal/durable", "internal/identity", "internal/oplog", "internal/sshca", "internal/sshmsg", "internal/tracing", "internal/transport", "internal/unixsock", "internal/userauth"},
	"internal/agent":     {"internal/account", "internal/identity", "internal/mux", "internal/oplog", "internal/policy", "internal/runas", "internal/sshca", "internal/sshmsg", "internal/transport", "internal/unixsock", "internal/userauth"},
	"internal/relay":     {"internal/identity", "internal/oplog", "internal/policy", "internal/sshmsg"},
	"internal/sshca":     {"internal/identity"},
	"internal/auth":      {"internal/account", "internal/identity", "internal/policy", "internal/runas"},
	"internal/runas":     {"internal/account"}, // sets an account's limits
	"internal/account":   {},
	"internal/policy":    {"internal/identity", "internal/sshmsg"},
	"internal/identity":  {}, // plain data
	"internal/audit":     {},
	"internal/cost":      {"internal/audit"},
	"internal/record":    {},
	"internal/transfer":  {},
	"internal/config":    {"internal/api", "internal/bastion", "internal/ecstask", "internal/fargate", "internal/gateway", "internal/identity", "internal/local", "internal/policy", "internal/tracing"}, // reads their settings
	"internal/oplog":     {},
	"internal/tracing":   {},
	"internal/sftp":      {},
	"internal/unixsock":  {},
	"internal/durable":   {},
	"internal/revoked":   {"internal/durable"},
	"internal/sshmsg":    {},
	"internal/transport": {},
	"internal/userauth":  {"internal/sshmsg", "internal/transport"},
	"internal/mux":       {"internal/sshmsg"},
	"internal/dynamo":    {"internal/bastion"},
	"internal/secrets":   {},
	"internal/ecstask":   {},
	"internal/awsfake":   {},                     // for tests only
	"internal/sshtest":   {"internal/transport"}, // for tests only
	"internal/manpage":   {},
}

// TestImports compares the imports with mayImport, tests and tools excepted.
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
