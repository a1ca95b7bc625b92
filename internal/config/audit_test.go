package config

import (
	"log/syslog"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// TestAudit reads valid and invalid values of audit, recordings and record.
func TestAudit(t *testing.T) {
	dir := site(t)
	load := func(t *testing.T, text string) (*Gateway, error) {
		path := filepath.Join(dir, "audit.yaml")
		write(t, path, []byte("host_keys: ssh_host_ed25519_key\nfleet_key: fleet_key\nauthorized_keys_dir: authorized_keys.d\n"+text), 0o644)
		return Load(path, nil)
	}
	g, err := load(t, `
audit: {to: ./audit.log, on_error: continue, reserve: 1M, facility: local3, socket: run/log}
recordings: {dir: rec, max_size: 2m, max_per_user: 3G, on_error: continue}
profiles: {default: {record: output}, typed: {record: input}, quiet: {record: none}, all: {record: [exec, transfers, input]}, some: {record: exec}}
`)
	if err != nil {
		t.Fatal(err)
	}
	if want := (Audit{To: filepath.Join(dir, "audit.log"), OnError: Continue, Reserve: 1 << 20, Facility: syslog.LOG_LOCAL3, Socket: filepath.Join(dir, "run/log")}); g.Audit != want {
		t.Errorf("\n got %+v\nwant %+v", g.Audit, want)
	}
	if want := (Recordings{Dir: filepath.Join(dir, "rec"), MaxSize: 2 << 20, MaxPerUser: 3 << 30, OnError: Continue}); g.Recordings != want {
		t.Errorf("\n got %+v\nwant %+v", g.Recordings, want)
	}
	got := []identity.Record{g.Profiles["default"].Record, g.Profiles["typed"].Record, g.Profiles["quiet"].Record, g.Profiles["all"].Record, g.Profiles["some"].Record}
	if want := []identity.Record{identity.RecordOutput, identity.RecordInput, identity.RecordNone, identity.RecordInput | identity.RecordExec | identity.RecordTransfers, identity.RecordExec}; !reflect.DeepEqual(got, want) {
		t.Errorf("record: %v", got)
	}
	for in, want := range map[string]string{
		"audit: {to: sysolg}":                              `audit.to: "sysolg" is not none, stdout, syslog, or a path; for a file of that name write ./sysolg`,
		"audit: {to: no/such/log}":                         "no such file or directory",
		"audit: {to: fleet_key/log}":                       "is not a folder",
		"audit: {on_error: ignore}":                        `audit.on_error: "ignore" is not fail_closed or continue`,
		"profiles: {default: {record: [exec, transfers]}}": "profiles.default: record: transfers is written to the audit log",
		"roles: {copy: {users: alice, record: transfers}}": "roles.copy: record: transfers is written to",
		"audit: {reserve: 1K}":                             `audit.reserve: "1K" is not a size`,
		"log_per_user: 1K/1h":                              `log_per_user: "1K/1h" is not a size in a time`,
		"log_per_user: 100M":                               "is not a size in a time",
		"log_per_user: 100M/1s":                            "is not a size in a time",
		"audit: {facility: kern}":                          `audit.facility: "kern" is not a facility of syslog`,
		"recordings: {max_size: 1}":                        `recordings.max_size: "1" is not a size`,
		"recordings: {max_size: 9999999999999G}":           "is not a size",
		"recordings: {max_size: -5M}":                      "is not a size",
		"recordings: {max_size: \"\"}":                     "is not a size",
		"recordings: {max_size: K}":                        "is not a size",
		"recordings: {folder: x}":                          "recordings.folder: unknown key",
		"profiles: {default: {record: all}}":               `profiles.default.record: "all" is not output, input`,
		"profiles: {default: {record: {a: b}}}":            "must be",
		"profiles: {default: {record: [none]}}":            `"none" is not output`,
		"recordings: {max_per_user: 1K}":                   "is not a size",
	} {
		if _, err := load(t, in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", in, err, want)
		}
	}
}
