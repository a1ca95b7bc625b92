package config

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// certify makes a certificate of a key of the test folder, called NAME-cert.pub.
func certify(t *testing.T, dir, key string, args ...string) {
	t.Helper()
	args = append([]string{"-q", "-s", filepath.Join(dir, "other_ed25519_key"), "-I", "test"}, args...)
	if out, err := exec.Command("ssh-keygen", append(args, filepath.Join(dir, key+".pub"))...).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
}

func TestHostCertificates(t *testing.T) {
	dir := t.TempDir()
	for _, key := range []string{"host", "other_ed25519_key", "user", "nameless", "stranger", "fleet", "old"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key)).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	certify(t, dir, "host", "-h", "-n", "gw.example.com")
	certify(t, dir, "old", "-h", "-n", "gw.example.com", "-V", "20200101:20200102")
	certify(t, dir, "user", "-n", "alice")
	certify(t, dir, "nameless", "-h")
	certify(t, dir, "stranger", "-h", "-n", "gw.example.com")
	tests := []struct{ in, want string }{
		{"host-cert.pub", ""},
		{"[host-cert.pub, old-cert.pub]", ""},
		{"host.pub", `g.yaml:4: host_certificates: DIR/host.pub: is a public key and no certificate; name the file that ends in -cert.pub`},
		{"host", `g.yaml:4: host_certificates: DIR/host: is not a certificate; name the file that ends in -cert.pub`},
		{"nowhere", `g.yaml:4: host_certificates: DIR/nowhere: no such file or directory`},
		{"user-cert.pub", `g.yaml:4: host_certificates: DIR/user-cert.pub: is a certificate for a user; make it with ssh-keygen -h`},
		{"nameless-cert.pub", `g.yaml:4: host_certificates: DIR/nameless-cert.pub: names no host, so OpenSSH accepts it for every host; name the hosts with ssh-keygen -n HOST`},
		{"stranger-cert.pub", `g.yaml:4: host_certificates: DIR/stranger-cert.pub: is for the key SHA256:`},
	}
	for _, tt := range tests {
		text := "host_keys: [host, user, nameless, old]\nfleet_key: fleet\nauthorized_keys_dir: .\nhost_certificates: " + tt.in + "\n"
		g, err := parse([]byte(text), "g.yaml", dir, nil, nil)
		if tt.want == "" {
			if err != nil {
				t.Errorf("%s: %v", tt.in, err)
				continue
			}
			problems := g.CertificateProblems(time.Now())
			if old := strings.Contains(tt.in, "old"); old != (len(problems) == 1 && strings.Contains(problems[0].Error(), "has expired on 2020-01-0")) {
				t.Errorf("%s: problems %v", tt.in, problems)
			}
			continue
		}
		if err == nil || !strings.HasPrefix(err.Error(), strings.ReplaceAll(tt.want, "DIR", dir)) {
			t.Errorf("%s: got\n%v\nwant\n%s", tt.in, err, tt.want)
		}
	}
}

// TestReload: only changes that require a restart are mistakes.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	for _, key := range []string{"host", "fleet", "fleet2", "fleet3", "fleet4"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key)).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	const base = "host_keys: host\nauthorized_keys_dir: .\n"
	running, err := parse([]byte(base+"fleet_key: fleet\n"), "g.yaml", dir, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	const restart = "cannot be changed while the gateway runs; restart it"
	tests := []struct{ in, want string }{
		{"fleet_key: [fleet2, fleet]", ""},
		{"fleet_key: [fleet, fleet2, fleet3, fleet4]", "g.yaml:3: fleet_key: 4 keys; the most is 3"},
		{"fleet_key: fleet\nbanner: none\nroles: {r: {users: x}}\nprofiles: {default: {idle: 5m}, big: {}}\nmax_sessions: 9", ""},
		{"fleet_key: fleet\nlisten: :2222\nstate_dir: /var/lib/sallyport\ndeployment: default\naudit: {to: none}", ""},
		{"fleet_key: fleet\nlisten: :2223", "g.yaml:4: listen: " + restart},
		{"fleet_key: fleet\nstate_dir: x", "g.yaml:4: state_dir: " + restart},
		{"fleet_key: fleet\ndeployment: x", "g.yaml:4: deployment: " + restart},
		{"fleet_key: fleet\nledger: {dynamodb: {table: abc}}", "g.yaml:4: ledger: " + restart},
		{"fleet_key: fleet\napi: {listen: 127.0.0.1:80}", "g.yaml:4: api: " + restart},
		{"fleet_key: fleet\nmonitoring: {listen: :9222}", "g.yaml:4: monitoring: " + restart},
		{"fleet_key: fleet\ntracing: {endpoint: \"http://127.0.0.1:4318\"}", "g.yaml:4: tracing: " + restart},
		{"fleet_key: fleet\naudit: {on_error: continue}", "g.yaml:4: audit: " + restart},
		{"fleet_key: fleet\nprofiles: {big: {launcher: fargate, fargate: {cluster: c, task_definition: d:1, subnets: [subnet-1]}}}",
			"g.yaml:4: profiles: the first profile on Fargate needs a restart of the gateway"},
		{"fleet_key: fleet\nprofiles: {default: {launcher: fargate, fargate: {cluster: c, task_definition: d:1, subnets: [subnet-1]}}}",
			"g.yaml:4: profiles.default.launcher: " + restart},
	}
	for _, tt := range tests {
		_, err := parse([]byte(base+tt.in+"\n"), "g.yaml", dir, nil, running)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.in, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: got %v, want %s", tt.in, err, tt.want)
		}
	}
}

// TestSecrets: keys and certificates may be references; a mistake has the line.
func TestSecrets(t *testing.T) {
	dir := t.TempDir()
	for _, key := range []string{"host", "fleet", "other_ed25519_key"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key)).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	certify(t, dir, "host", "-h", "-n", "gw.example.com")
	read := func(file string) string {
		text, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	host, fleet := read("host"), read("fleet")
	stored := map[string]string{
		"ssm:/sallyport/host_key":  host,
		"secretsmanager:fleet":     strings.TrimSpace(fleet), // as $(cat FILE) stores it
		"ssm:certificate":          read("host-cert.pub"),
		"ssm:public":               read("host.pub"),
		"ssm:json":                 `{"key":"` + host + `"}`,
		"secretsmanager:truncated": fleet[:200],
		"secretsmanager:long":      fleet + strings.Repeat("x", maxKey),
		"secretsmanager:empty":     "",
	}
	unencrypted := map[string]bool{"ssm:certificate": true, "ssm:plain": true}
	stored["ssm:plain"] = host
	secrets := func(reference string) ([]byte, bool, error) {
		text, ok := stored[reference]
		if !ok {
			return nil, false, errors.New("does not exist; create it")
		}
		return []byte(text), !unencrypted[reference], nil
	}

	tests := []struct{ host, fleet, want string }{
		{"[ssm:/sallyport/host_key]", "secretsmanager:fleet", ""},
		{"host", "[secretsmanager:fleet]", ""},
		{"[ssm:/sallyport/host_key, host]", "fleet", "g.yaml:1: host_keys: the same key is listed twice"},
		{"ssm:nowhere", "fleet", "g.yaml:1: host_keys: ssm:nowhere: does not exist; create it"},
		{"arn:aws:ssm:eu-west-1:123456789012:parameter/x", "fleet", "g.yaml:1: host_keys: arn:aws:ssm:eu-west-1:123456789012:parameter/x: write ssm: or secretsmanager: before an ARN"},
		{"ssm:plain", "fleet", "g.yaml:1: host_keys: ssm:plain: a private key is stored unencrypted; store it as a SecureString, and replace the key if others may have read it"},
		{"ssm:public", "fleet", "g.yaml:1: host_keys: ssm:public: is a public key; the private one is the file without .pub"},
		{"ssm:json", "fleet", "g.yaml:1: host_keys: ssm:json: is not a private key in a known format"},
		{"host", "secretsmanager:truncated", "g.yaml:2: fleet_key: secretsmanager:truncated: is not a private key in a known format"},
		{"host", "secretsmanager:long", "g.yaml:2: fleet_key: secretsmanager:long: longer than 65536 bytes"},
		{"host", "secretsmanager:empty", "g.yaml:2: fleet_key: secretsmanager:empty: is not a private key in a known format"},
		{"host", "ssm:/sallyport/host_key", "g.yaml:2: fleet_key: is also a host key; a key that signs logins to bastions must have no other use"},
	}
	for _, tt := range tests {
		text := "host_keys: " + tt.host + "\nfleet_key: " + tt.fleet + "\nauthorized_keys_dir: .\n"
		if tt.want == "" {
			text += "host_certificates: ssm:certificate\n"
		}
		g, err := parse([]byte(text), "g.yaml", dir, &AWS{Secret: secrets}, nil)
		switch {
		case tt.want == "" && (err != nil || len(g.HostKeys) != 1 || len(g.FleetKeys) != 1 || len(g.HostCertificates) != 1):
			t.Errorf("%s, %s: %v", tt.host, tt.fleet, err)
		case tt.want != "" && (err == nil || err.Error() != tt.want):
			t.Errorf("%s, %s: got\n%v\nwant\n%s", tt.host, tt.fleet, err, tt.want)
		}
	}
	_, err := parse([]byte("host_keys: host\nfleet_key: ssm:x\nauthorized_keys_dir: .\n"), "g.yaml", dir, nil, nil)
	if want := "g.yaml:2: fleet_key: ssm:x: texts in AWS cannot be used here; name a file"; err == nil || err.Error() != want {
		t.Errorf("without a reader: %v, want %s", err, want)
	}
}
