package config

import (
	"errors"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"
)

// TestCopies: settings that are references have the paths of copies.
func TestCopies(t *testing.T) {
	dir := t.TempDir()
	for _, key := range []string{"host", "fleet"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key)).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	const base = "host_keys: host\nfleet_key: fleet\n"
	const all = base + `authorized_keys_dir: ssm:/sp/users
authorized_principals_dir: ssm:/sp/principals
totp_dir: ssm:/sp/totp
trusted_user_ca_keys: [ssm:/sp/ca, secretsmanager:ca]
revoked_keys: ssm:/sp/revoked
`
	aws := &AWS{Secret: func(string) ([]byte, bool, error) { return nil, false, errors.New("not read by Load") }}
	g, err := parse([]byte(all+"state_dir: s\n"), "g.yaml", dir, aws, nil)
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(dir, "s/aws", name) }
	want := []Copy{
		{"ssm:/sp/users", at("authorized_keys_dir"), true, false, "g.yaml:3: authorized_keys_dir"},
		{"ssm:/sp/principals", at("authorized_principals_dir"), true, false, "g.yaml:4: authorized_principals_dir"},
		{"ssm:/sp/totp", at("totp_dir"), true, true, "g.yaml:5: totp_dir"},
		{"ssm:/sp/ca", at("trusted_user_ca_keys"), false, false, "g.yaml:6: trusted_user_ca_keys"},
		{"secretsmanager:ca", at("trusted_user_ca_keys.2"), false, false, "g.yaml:6: trusted_user_ca_keys"},
		{"ssm:/sp/revoked", at("revoked_keys"), false, false, "g.yaml:7: revoked_keys"},
	}
	if !reflect.DeepEqual(g.Copies, want) {
		t.Errorf("got  %+v\nwant %+v", g.Copies, want)
	}
	paths := append([]string{g.AuthorizedKeysDir, g.AuthorizedPrincipalsDir, g.TOTPDir}, append(g.TrustedUserCAKeys, g.RevokedKeys)...)
	for i, c := range want {
		if paths[i] != c.Path {
			t.Errorf("%s is at %s, and its setting is %s", c.Reference, c.Path, paths[i])
		}
	}
	if c, ok := g.CopyAt(g.TOTPDir); !ok || c.Reference != "ssm:/sp/totp" {
		t.Errorf("totp_dir is %+v, %v", c, ok)
	}
	if _, ok := g.CopyAt(dir); ok {
		t.Error("a folder is a copy")
	}
	if got, want := g.Copies[0].Mistake(errors.New("is denied")).Error(), "g.yaml:3: authorized_keys_dir: ssm:/sp/users: is denied"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}

	aws.Copies = "/tmp/check"
	if g, err = parse([]byte(all), "g.yaml", dir, aws, nil); err != nil || g.Copies[0].Path != "/tmp/check/authorized_keys_dir" {
		t.Errorf("copies elsewhere: %v, %v", g, err)
	}
	aws.Copies = ""
	if g, err = parse([]byte(all), "g.yaml", dir, aws, nil); err != nil || g.Copies[0].Path != "/var/lib/sallyport/aws/authorized_keys_dir" {
		t.Errorf("default: %v, %v", g, err)
	}

	for _, tt := range []struct {
		aws  *AWS
		in   string
		want string
	}{
		{aws, "ssm:users", "g.yaml:3: authorized_keys_dir: ssm:users: is not a path of parameters; write ssm:/NAME, as in ssm:/sallyport/users"},
		{aws, "secretsmanager:users", "g.yaml:3: authorized_keys_dir: secretsmanager:users: is not a path of parameters; write ssm:/NAME, as in ssm:/sallyport/users"},
		{nil, "ssm:/users", "g.yaml:3: authorized_keys_dir: ssm:/users: texts in AWS cannot be used here; name a file"},
	} {
		_, err := parse([]byte(base+"authorized_keys_dir: "+tt.in), "g.yaml", dir, tt.aws, nil)
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s: got %v, want %s", tt.in, err, tt.want)
		}
	}
}

// TestConfigInAWS: the file itself may be in AWS, without relative paths.
func TestConfigInAWS(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, "host")).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	stored := map[string]string{
		"ssm:/sp/gateway.yaml":     "host_keys: ssm:/sp/host\nfleet_key: " + siteKey(t, dir) + "\nauthorized_keys_dir: ssm:/sp/users\nbanner: ssm:banner\n",
		"secretsmanager:relative":  "host_keys: host\nfleet_key: ssm:/sp/host\nauthorized_keys_dir: users\nstate_dir: .\n",
		"secretsmanager:malformed": "a: [",
		"ssm:/sp/host":             string(read(t, filepath.Join(dir, "host"))),
		"ssm:banner":               "Keep out.\n",
	}
	aws := &AWS{Secret: func(reference string) ([]byte, bool, error) {
		text, ok := stored[reference]
		if !ok {
			return nil, false, errors.New("does not exist")
		}
		return []byte(text), reference != "ssm:banner", nil
	}}
	g, err := Load("ssm:/sp/gateway.yaml", aws)
	if err != nil || len(g.HostKeys) != 1 || len(g.Copies) != 1 || g.Banner != "Keep out.\n" {
		t.Errorf("%+v, %v", g, err)
	}
	const relative = " is relative to the folder of the configuration, which is not a file; write an absolute path\n"
	for reference, want := range map[string]string{
		"ssm:nowhere": "reading the configuration: ssm:nowhere: does not exist",
		"secretsmanager:relative": `secretsmanager:relative:1: host_keys: "host"` + relative +
			`secretsmanager:relative:3: authorized_keys_dir: "users"` + relative +
			`secretsmanager:relative:4: state_dir: "."` + relative[:len(relative)-1],
	} {
		if _, err := Load(reference, aws); err == nil || err.Error() != want {
			t.Errorf("%s: got\n%v\nwant\n%s", reference, err, want)
		}
	}
	if _, err := Load("secretsmanager:malformed", aws); err == nil {
		t.Error("no mistake in malformed YAML")
	}
}

// siteKey returns the path of a private key.
func siteKey(t *testing.T, dir string) string {
	path := filepath.Join(dir, "fleet")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	return path
}
