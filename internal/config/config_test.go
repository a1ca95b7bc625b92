package config

import (
	"bytes"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/fargate"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

// site is a folder with all that a configuration may name.
func site(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	keys, err := siteKeys()
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range keys {
		write(t, filepath.Join(dir, name), data, 0o600)
	}
	write(t, filepath.Join(dir, "open_key"), read(t, filepath.Join(dir, "fleet_key")), 0o640)
	write(t, filepath.Join(dir, "garbage_key"), []byte("-----BEGIN PRIVATE KEY-----\nhunter2\n"), 0o600)
	write(t, filepath.Join(dir, "public_key"), read(t, filepath.Join(dir, "fleet_key.pub")), 0o600)
	write(t, filepath.Join(dir, "token"), []byte(strings.Repeat("x", 32)+"\n"), 0o600)
	write(t, filepath.Join(dir, "big"), bytes.Repeat([]byte("x"), 200<<10), 0o600)
	write(t, filepath.Join(dir, "banner.txt"), []byte("Keep out.\n"), 0o644)
	write(t, filepath.Join(dir, "latin1.txt"), []byte("Gr\xfc\xdfe\n"), 0o644)
	if err := os.Mkdir(filepath.Join(dir, "authorized_keys.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// siteKeys makes the keys of every site, by the name of their file: once,
// because RSA and passphrases take their time.
var siteKeys = sync.OnceValues(func() (map[string][]byte, error) {
	dir, err := os.MkdirTemp("", "keys")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	keys := map[string][]byte{}
	for name, args := range map[string][]string{
		"ssh_host_ed25519_key": {"-t", "ed25519", "-N", ""},
		"other_ed25519_key":    {"-t", "ed25519", "-N", ""},
		"fleet_key":            {"-t", "ed25519", "-N", ""},
		"locked_key":           {"-t", "ed25519", "-N", "secret words", "-a", "1"},
		"ssh_host_rsa_key":     {"-t", "rsa", "-b", "2048", "-N", ""},
		"weak_rsa_key":         {"-t", "rsa", "-b", "1024", "-N", ""},
	} {
		path := filepath.Join(dir, name)
		if out, err := exec.Command("ssh-keygen", append(args, "-q", "-f", path)...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ssh-keygen %v: %w\n%s", args, err, out)
		}
		for _, name := range []string{name, name + ".pub"} {
			if keys[name], err = os.ReadFile(filepath.Join(dir, name)); err != nil {
				return nil, err
			}
		}
	}
	return keys, nil
})

func read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func write(t testing.TB, path string, data []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // independent of the umask
		t.Fatal(err)
	}
}

// types returns the keys' types, and forgets the keys.
func types(g *Gateway) (hostKeys []string, fleetKey string) {
	for _, k := range g.HostKeys {
		hostKeys = append(hostKeys, k.PublicKey().Type())
	}
	fleetKey = g.FleetKeys[0].PublicKey().Type()
	g.HostKeys, g.FleetKeys = nil, nil
	return hostKeys, fleetKey
}

// TestExample loads the file that the documentation shows. All but what it has
// to say is the defaults, so both are held together here.
func TestExample(t *testing.T) {
	dir := site(t)
	path := filepath.Join(dir, "gateway.yaml")
	write(t, path, read(t, "testdata/gateway.yaml"), 0o644)
	got, err := Load(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	hostKeys, fleetKey := types(got)
	if want := []string{"ssh-ed25519", "ssh-rsa"}; !reflect.DeepEqual(hostKeys, want) || fleetKey != "ssh-ed25519" {
		t.Errorf("host keys %v, fleet key %v", hostKeys, fleetKey)
	}
	want := Defaults()
	want.Digest = got.Digest
	want.AuthorizedKeysDir = filepath.Join(dir, "authorized_keys.d")
	big, build := defaultProfile(), defaultProfile()
	big.Launcher = "fargate"
	big.Fargate = fargate.Options{
		Cluster: "sallyport", TaskDefinition: "sallyport-bastion:7", UserTaskDefinitions: "sallyport-user-%u", Container: "bastion", Account: "bastion", Groups: []string{"sudo"},
		Subnets: []string{"subnet-0a1b2c3d", "subnet-4e5f6a7b"}, SecurityGroups: []string{"sg-0123abcd"},
		CPU: 1024, Memory: 2048, EphemeralStorage: 50,
		TaskRole: "arn:aws:iam::123456789012:role/bastion-big", PlatformVersion: "1.4.0",
		AssignPublicIP: true, Spot: true, AcceptEnv: big.Fargate.AcceptEnv,
		Isolate: &fargate.Isolation{
			Ingress: []string{"sg-9876fedc"},
			Egress:  []fargate.Rule{{Protocol: "tcp", From: 443, To: 443, Peer: "0.0.0.0/0"}, {Protocol: "-1", From: -1, To: -1, Peer: "10.0.0.0/8"}},
		},
	}
	build.Idle, build.MaxLife = 2*time.Hour, 24*time.Hour
	build.Local.Account, build.Local.Agent = "builder", "/usr/lib/sallyport/bastion-agent"
	want.Profiles["big"], want.Profiles["build"] = big, build
	if !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
	if !bytes.Contains(read(t, "../../docs/configuration.md"), read(t, "testdata/gateway.yaml")) {
		t.Error("docs/configuration.md shows another example")
	}
}

const required = "host_keys: ssh_host_ed25519_key\nfleet_key: fleet_key\nauthorized_keys_dir: authorized_keys.d\n"

// TestRelativeFolder loads a file by a relative path from another folder.
func TestRelativeFolder(t *testing.T) {
	dir := site(t)
	write(t, filepath.Join(dir, "g.yaml"), []byte(required+"state_dir: ../state\n"), 0o644)
	t.Chdir(filepath.Join(dir, "authorized_keys.d"))
	g, err := Load("../g.yaml", nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(filepath.Dir(dir), "state"); g.StateDir != want {
		t.Errorf("state_dir is %s, want %s", g.StateDir, want)
	}
}

// TestRSASignsWithSHA2Only uses the loaded keys.
func TestRSASignsWithSHA2Only(t *testing.T) {
	dir := site(t)
	g, err := parse([]byte("host_keys: [ssh_host_rsa_key]\nfleet_key: fleet_key\nauthorized_keys_dir: .\n"), "g.yaml", dir, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	key := g.HostKeys[0].(ssh.MultiAlgorithmSigner)
	if got, want := key.Algorithms(), []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}; !reflect.DeepEqual(got, want) {
		t.Errorf("offers %v, want %v", got, want)
	}
	if sig, err := key.SignWithAlgorithm(rand.Reader, []byte("x"), ssh.KeyAlgoRSA); err == nil {
		t.Errorf("signed with %s", sig.Format)
	}
	if _, err := key.SignWithAlgorithm(rand.Reader, []byte("x"), ssh.KeyAlgoRSASHA256); err != nil {
		t.Error(err)
	}
}

// TestMistakes holds every message to the letter. The text under test stands
// before the required keys, so its lines count from 1.
func TestMistakes(t *testing.T) {
	dir := site(t)
	tests := []struct{ in, want string }{
		// The form of the file.
		{"listen: [", `g.yaml:3: not valid YAML: `},
		{"\tlisten: x", "g.yaml:1: not valid YAML: found character that cannot start any token; indent with spaces and not with tabs, and quote values that begin with %, @ or `"},
		{"drain 1s", `g.yaml:2: not valid YAML: mapping values are not allowed in this context; the line before may lack its colon, and a value with a colon and a space needs quotes`},
		{"listen: x\ndrain 1s", `g.yaml:3: not valid YAML: could not find expected ':'; the line before may lack its colon, or the space behind it`},
		{"--- # one\nlisten: :1\n--- # two", `g.yaml:3: not valid YAML: a second document; there may be only one`},
		{"HostKeys: x", `g.yaml:1: HostKeys: unknown key; do you mean host_keys?`},
		{"max-session: 1", `g.yaml:1: max-session: unknown key; do you mean max_sessions?`},
		{"permit_root_login: no", `g.yaml:1: permit_root_login: unknown key`},
		{"drain: 1s\ndrain: 2s", `g.yaml:2: drain: given twice; the first is in line 1`},
		{"drain:", `g.yaml:1: drain: has no value`},
		{"drain: [1s]", `g.yaml:1: drain: must be a single value`},
		{"drain:\n  - 1s", `g.yaml:1: drain: must be a single value`},
		{"profiles: x", `g.yaml:1: profiles: must have keys and values under it`},
		{"profiles:\n  default: [x]", `g.yaml:2: profiles.default: must have keys and values under it`},
		{"profiles:\n  default:\n    idel: 1m", `g.yaml:3: profiles.default.idel: unknown key; do you mean idle?`},
		{"profiles:\n  default:\n    local:\n      shell: zsh", `g.yaml:4: profiles.default.local.shell: unknown key`},
		{"profiles:\n  a: &a {idle: 1h}\n  b:\n    <<: *a", `g.yaml:4: profiles.b.<<: merging is not supported; write the values out, or use an alias for one value`},
		{"? [a]\n: b", `g.yaml:1: ?: a key must be a word`},
		{"listen: &a [*a]", `g.yaml:1: listen: must be a single value`},

		// Addresses.
		{"listen: 2222", `g.yaml:1: listen: "2222" is not an address; write it like :2222`},
		{"listen: gateway", `g.yaml:1: listen: "gateway" is not an address; write it like :2222, 10.0.0.1:22 or [::1]:22`},
		{"listen: ::1:22", `g.yaml:1: listen: "::1:22" is not an address; write it like :2222, 10.0.0.1:22 or [::1]:22`},
		{"listen: :ssh", `g.yaml:1: listen: ":ssh": "ssh" is not a port; write a number up to 65535`},
		{"listen: :65536", `g.yaml:1: listen: ":65536": "65536" is not a port; write a number up to 65535`},
		{"listen: 'a b:1'", `g.yaml:1: listen: "a b:1": "a b" is not a host`},
		{"listen:\n- :1\n- :2\n- :1", `g.yaml:4: listen: ":1" is listed twice`},
		{"listen: []", `g.yaml:1: listen: the list is empty`},
		{"listen:\n- :1\n-", `g.yaml:3: listen: the list has an empty entry`},
		{"listen: {a: b}", `g.yaml:1: listen: must be a list, or a single value`},

		// Durations and numbers.
		{"profiles:\n  default:\n    idle: 15 minutes", `g.yaml:3: profiles.default.idle: "15 minutes" is not a duration; write it like 15m`},
		{"drain: -1s", `g.yaml:1: drain: "-1s" is not a duration; write it like 15m`},
		{"drain: 1d-1h", `g.yaml:1: drain: "1d-1h" is not a duration; write it like 15m`},
		{"drain: 1h1d", `g.yaml:1: drain: "1h1d" is not a duration; write it like 15m`},
		{"drain: 1.5", `g.yaml:1: drain: "1.5" is not a duration; write it like 15m`},
		{`drain: ""`, `g.yaml:1: drain: "" is not a duration; write it like 15m`},
		{"drain: 9999w", `g.yaml:1: drain: "9999w" is too long; the most is 10 years`},
		{"drain: 4294967295", `g.yaml:1: drain: "4294967295" is too long; the most is 10 years`},
		{"login_grace_time: 0", `g.yaml:1: login_grace_time: "0" is too short; the least is 1s`},
		{"client_alive_interval: 10ms", `g.yaml:1: client_alive_interval: "10ms" is too short; the least is 1s`},
		{"max_sessions: 0", `g.yaml:1: max_sessions: "0" is not a whole number from 1 to 10000`},
		{"max_channels: 0", `g.yaml:1: max_channels: "0" is not a whole number from 1 to 100000`},
		{"max_auth_tries: six", `g.yaml:1: max_auth_tries: "six" is not a whole number from 1 to 100`},
		{"max_connections_per_user: 1e3", `g.yaml:1: max_connections_per_user: "1e3" is not a whole number from 1 to 1000000`},
		{"client_alive_count_max: 0", `g.yaml:1: client_alive_count_max: "0" is not a whole number from 1 to 1000`},
		{"per_source_max_startups: 0", `g.yaml:1: per_source_max_startups: "0" is not a whole number from 1 to 1000000`},
		{"max_startups: 10:30", `g.yaml:1: max_startups: "10:30" is not start:rate:full; write it like 10:30:100, or as one number`},
		{"max_startups: a:b:c", `g.yaml:1: max_startups: "a:b:c" is not start:rate:full; write it like 10:30:100, or as one number`},
		{"max_startups: 10:0:100", `g.yaml:1: max_startups: "10:0:100" is not start:rate:full; write it like 10:30:100, or as one number`},
		{"max_startups: 10:101:100", `g.yaml:1: max_startups: "10:101:100": the rate is in percent, and 101 is more than 100`},
		{"max_startups: 100:30:10", `g.yaml:1: max_startups: "100:30:10": start (100) is greater than full (10)`},

		// Networks.
		{"proxy_protocol_from: 0.0.0.0/0", `g.yaml:1: proxy_protocol_from: 0.0.0.0/0 includes every client, so any client could claim any address; name the balancers only`},
		{"proxy_protocol_from: balancer", `g.yaml:1: proxy_protocol_from: "balancer" is neither an address nor a network; write it like 10.0.0.0/8`},
		{"per_source_penalty_exempt_list: [10.0.0.0/8, 10.0.0.1/8]", `g.yaml:1: per_source_penalty_exempt_list: "10.0.0.1/8": the network is 10.0.0.0/8; write that, or a single address`},
		{"per_source_net_block_size: 33", `g.yaml:1: per_source_net_block_size: "33" is not the bits of a network; write it like 32:64, up to 32 for IPv4 and 128 for IPv6`},
		{"per_source_net_block_size: 0:0", `g.yaml:1: per_source_net_block_size: "0:0" makes one source of all addresses, so that one client could cause all others to be rejected`},
		{"per_source_net_block_size: 32:+64", `g.yaml:1: per_source_net_block_size: "32:+64" is not the bits of a network; write it like 32:64, up to 32 for IPv4 and 128 for IPv6`},
		{"per_source_penalties: no", `g.yaml:1: per_source_penalties: "no" is not a penalty; write it like authfail:5s. There are `},
		{"per_source_penalties: invaliduser:5s", `g.yaml:1: per_source_penalties: "invaliduser:5s" is not a penalty; write it like authfail:5s. There are `},
		{"per_source_penalties: refuseconnection:10s", `g.yaml:1: per_source_penalties: refuseconnection: the gateway has no such penalty: it never rejects an address because a role does not permit a login; leave it out`},
		{"per_source_penalties: authfail:5s authfail:6s", `g.yaml:1: per_source_penalties: authfail is given twice`},
		{"per_source_penalties: max:2d", `g.yaml:1: per_source_penalties: "max:2d": "2d" is not a duration of a day at most; write it like 90s`},
		{"per_source_penalties: max-sources4:0", `g.yaml:1: per_source_penalties: "max-sources4:0": "0" is not a whole number from 1 to 1000000`},
		{"per_source_penalties: overflow:deny", `g.yaml:1: per_source_penalties: "overflow:deny": there are permissive and deny-all`},
		{"per_source_penalties: max:10s", `g.yaml:1: per_source_penalties: max (10s) is shorter than min (15s), so that no penalty would have an effect; write none for no penalties`},
		{`per_source_penalties: " "`, `g.yaml:1: per_source_penalties: is empty; write none for no penalties`},
		{"ledger: {dynamodb: {table: x/y}}", `g.yaml:1: ledger.dynamodb.table: "x/y" is not the name of a table; write 3 to 255 letters, digits, -, _ and .`},
		{"ledger: {dynamodb: {}}", `g.yaml:1: ledger.dynamodb: names no table`},
		{"ledger: {}", `g.yaml:1: ledger: names no ledger; write dynamodb: {table: NAME}, or leave ledger out for a folder in state_dir`},
		{"ledger: {redis: x}", `g.yaml:1: ledger.redis: `},
		{"api: {}", `g.yaml:1: api: names no address; write listen: ":8443", or leave api out`},
		{"monitoring: {listen: :2222}", `g.yaml:1: monitoring.listen: :2222 is also the address of listen`},
		{"listen: [:22, '[::1]:80']\nmonitoring: {listen: '[::1]:80'}", `g.yaml:2: monitoring.listen: [::1]:80 is also the address of listen`},
		{"api: {listen: 127.0.0.1:80}\nmonitoring: {listen: 127.0.0.1:80}", `g.yaml:2: monitoring.listen: 127.0.0.1:80 is also the address of api`},
		{"api: {listen: :8443}", `g.yaml:1: api: needs tls, with certificate and key, for addresses of other machines; plain_http: true permits them without, behind a proxy that ends TLS`},
		{"api: {listen: [127.0.0.1:80, 10.0.0.1:80]}", `g.yaml:1: api: needs tls, with certificate and key, for addresses of other machines; `},
		{"api: {listen: :80, plain_http: true}", `g.yaml:1: api: plain_http needs names, the host names by which clients call`},
		{"api: {listen: :80, plain_http: true, names: 'a.example:80'}", `g.yaml:1: api.names: "a.example:80" is not the name or the address of a host; write it without a port`},
		{"api: {listen: :80, tls: {key: fleet_key}}", `g.yaml:1: api.tls: needs certificate and key, the paths of two PEM files`},
		{"api: {listen: :80, tls: {certificate: none.pem, key: fleet_key}}", `g.yaml:1: api.tls.certificate: `},
		{"api: {listen: :80, tls: {certificate: fleet_key.pub, key: open_key}}", `g.yaml:1: api.tls.key: `},
		{"api: {listen: :80, tls: {certificate: fleet_key.pub, key: garbage_key}}", `g.yaml:1: api.tls.certificate: DIR/fleet_key.pub with the key DIR/garbage_key: tls: `},
		{"api: {listen: 127.0.0.1:80, ssh_address: ':22'}", `g.yaml:1: api.ssh_address: ":22" names no host; `},
		{"api: {listen: 127.0.0.1:80, operator_token: open_key}", `g.yaml:1: api.operator_token: `},
		{"api: {listen: 127.0.0.1:80, operator_token: garbage_key}", `g.yaml:1: api.operator_token: `},
		{"api: {listen: 127.0.0.1:80, oidc: {issuer: 'https://id.example', audience: a}}", `g.yaml:1: api.oidc: needs user_claim`},
		{"api: {listen: 127.0.0.1:80, oidc: {issuer: 'http://id.example', audience: a, user_claim: sub}}", `g.yaml:1: api.oidc.issuer: "http://id.example" is not a URL that begins with https://`},
		{"api: {listen: 127.0.0.1:80, port: 22}", `g.yaml:1: api.port: unknown key`},
		{"monitoring: {}", `g.yaml:1: monitoring: names no address; write listen: 127.0.0.1:9222, or leave monitoring out`},
		{"tracing: {sample: 0.5}", `g.yaml:1: tracing: names no collector; write endpoint: http://127.0.0.1:4318, or leave tracing out`},
		{"tracing: {endpoint: 127.0.0.1:4318}", `g.yaml:1: tracing.endpoint: "127.0.0.1:4318" is not a URL like http://127.0.0.1:4318`},
		{"tracing: {endpoint: \"ftp://127.0.0.1\"}", `g.yaml:1: tracing.endpoint: "ftp://127.0.0.1" is not a URL like http://127.0.0.1:4318`},
		{"tracing: {endpoint: \"https://a:b@collector\"}", `g.yaml:1: tracing.endpoint: may not have a password; collectors with one need a collector of yours between`},
		{"tracing: {endpoint: \"http://collector:4318\"}", `g.yaml:1: tracing: sends the names of users to another machine without TLS; write https://, or permit it with plain_http: true`},
		{"tracing: {endpoint: \"https://collector\", sample: 0}", `g.yaml:1: tracing.sample: "0" is not a number above 0 and up to 1, such as 0.1`},
		{"tracing: {endpoint: \"https://collector\", sample: .nan}", `g.yaml:1: tracing.sample: ".nan" is not a number above 0 and up to 1, such as 0.1`},
		{"tracing: {endpoint: \"https://collector\", headers: {}}", `g.yaml:1: tracing.headers: unknown key`},
		{"monitoring: {listen: 9222}", `g.yaml:1: monitoring.listen: "9222" is not an address; write it like :9222`},
		{"monitoring: {listen: :9222, path: /}", `g.yaml:1: monitoring.path: unknown key`},
		{"ledger: {dynamodb: {table: abc}}", `g.yaml:1: ledger: is shared by several gateways, but bastions of the profile default are processes on this one's machine; give it launcher: fargate`},
		{"advertise: gateway-a", `g.yaml:1: advertise: "gateway-a" is not an address; write it like :2222, 10.0.0.1:22 or [::1]:22`},
		{`advertise: ":2222"`, `g.yaml:1: advertise: ":2222" names no host; write the address at which other gateways reach this one`},
		{"advertise: 0.0.0.0:2222", `g.yaml:1: advertise: "0.0.0.0:2222" names no host; write the address at which other gateways reach this one`},
		{"advertise: gateway-a:0", `g.yaml:1: advertise: "gateway-a:0" names no port; write that of a listener`},
		{"starts_per_user: 10", `g.yaml:1: starts_per_user: "10" is not a number of starts in a time; write it like 30/1h, with at most 1000 starts in at most a week`},
		{"starts_per_user: 0/1h", `g.yaml:1: starts_per_user: "0/1h" is not a number of starts in a time; write it like 30/1h, with at most 1000 starts in at most a week`},

		// Algorithms.
		{"ciphers: [aes128-ctr, chacha20-poly1305@openssh.com]", `g.yaml:1: ciphers: "chacha20-poly1305@openssh.com" is not a cipher that is offered here; there are aes128-gcm@openssh.com, aes256-gcm@openssh.com, aes256-ctr, aes192-ctr, aes128-ctr`},
		{"ciphers:\n- aes128-ctr\n- aes128-ctr", `g.yaml:3: ciphers: "aes128-ctr" is listed twice`},
		{"kex_algorithms: +ecdh-sha2-nistp999", `g.yaml:1: kex_algorithms: "ecdh-sha2-nistp999" is not a key exchange that is offered here; there are mlkem768x25519-sha256, `},
		{"kex_algorithms: ecdh-sha2-nistp256,+ecdh-sha2-nistp384", `g.yaml:1: kex_algorithms: "+ecdh-sha2-nistp384" is not a key exchange that is offered here; there are mlkem768x25519-sha256, `},
		{"macs: +hmac-sha2-256,hmac-sha2-256", `g.yaml:1: macs: "hmac-sha2-256" is listed twice`},
		{"macs: -hmac-*", `g.yaml:1: macs: leaves no MAC to offer; list the algorithms to offer`},
		{"ciphers: -*-gcm@openssh.com", `g.yaml:1: ciphers: leaves no cipher to offer; list the algorithms to offer`},
		{"kex_algorithms: +", `g.yaml:1: kex_algorithms: "" is not a key exchange that is offered here; there are mlkem768x25519-sha256, `},
		{"macs: hmac-sha1", `g.yaml:1: macs: "hmac-sha1" is not a MAC that is offered here; there are hmac-sha2-256-etm@openssh.com, hmac-sha2-512-etm@openssh.com, hmac-sha2-256, hmac-sha2-512`},
		{"kex_algorithms: diffie-hellman-group14-sha1", `g.yaml:1: kex_algorithms: "diffie-hellman-group14-sha1" is not a key exchange that is offered here; there are mlkem768x25519-sha256, `},

		// Names and texts.
		{"deployment: a/b", `g.yaml:1: deployment: "a/b" is not a name; write 1 to 32 letters, digits, - and _, a letter or digit first`},
		{"rekey_limit: 15", `g.yaml:1: rekey_limit: "15" is not default or a size from 16 bytes to 64G`},
		{"rekey_limit: 65G", `g.yaml:1: rekey_limit: "65G" is not default or a size from 16 bytes to 64G`},
		{"rekey_limit: none 1h", `g.yaml:1: rekey_limit: "none" is not default or a size from 16 bytes to 64G`},
		{"rekey_limit: 1G 100ms", `g.yaml:1: rekey_limit: "100ms" is not none or a duration of at least 1s`},
		{"rekey_limit: 1G 1h 1h", `g.yaml:1: rekey_limit: "1G 1h 1h" is not a limit for keys; write it like 1G, 1G 1h or default 1h`},
		{`version_addendum: "a\nb"`, `g.yaml:1: version_addendum: must be at most 128 printable ASCII characters`},
		{"profiles:\n  a b: {}", `g.yaml:2: profiles.a b: "a b" is not a name for a profile; write 1 to 32 letters, digits, - and _, a letter or digit first`},
		{"profiles: {ctl: {}}", `g.yaml:1: profiles.ctl: the name ctl is reserved for the console`},
		{"profiles:\n  big:\n    launcher: fargate", `g.yaml:2: profiles.big: the launcher fargate needs the key fargate with at least cluster, task_definition and subnets`},
		{"profiles:\n  big:\n    fargate: {cluster: c, task_definition: 'td:1', subnets: [subnet-0a1b2c3d]}", `g.yaml:2: profiles.big: the key fargate has no effect without launcher: fargate`},
		{"profiles:\n  big:\n    launcher: docker", `g.yaml:3: profiles.big.launcher: "docker" is not a launcher; there are local and fargate`},
		{"profiles:\n  big:\n    idle: 2d", `g.yaml:2: profiles.big: max_life (12h0m0s) is shorter than idle (48h0m0s)`},
		{"profiles: {a: {gateway_ports: maybe}}", `g.yaml:1: profiles.a.gateway_ports: "maybe" is not a value of GatewayPorts; there are no, yes and clientspecified`},
		{"profiles: {a: {stream_local_bind_mask: '0999'}}", `g.yaml:1: profiles.a.stream_local_bind_mask: "0999" is not a umask; write three octal digits, as in 0177`},
		{"profiles: {a: {local: {account: 'a:b'}}}", `g.yaml:1: profiles.a.local.account: "a:b" is not the name of an account`},
		{"profiles: {a: {local: {agent: ''}}}", `g.yaml:1: profiles.a.local.agent: the path is empty`},
		{"profiles: {a: {local: {accept_env: [LANG, 'A=B']}}}", `g.yaml:1: profiles.a.local.accept_env: "A=B" is not a pattern for names of variables; write it like LC_*`},
		{"profiles: {a: {local: {accept_env: '*'}}}", `g.yaml:1: profiles.a.local.accept_env: "*" permits clients to set LD_PRELOAD, which bypasses command= in authorized keys`},
		{"profiles: {a: {local: {accept_env: 'BASH_*'}}}", `g.yaml:1: profiles.a.local.accept_env: "BASH_*" permits clients to set BASH_ENV, which bypasses command= in authorized keys`},

		// Files.
		{"state_dir: ~/state", `g.yaml:1: state_dir: "~/state": ~ is not expanded here; write the path out`},
		{`state_dir: "a\0b"`, `g.yaml:1: state_dir: the path contains a NUL byte`},
		{"banner: nowhere", `g.yaml:1: banner: DIR/nowhere: no such file or directory`},
		{"banner: latin1.txt", `g.yaml:1: banner: DIR/latin1.txt: not UTF-8 text`},
		{"banner: big", `g.yaml:1: banner: DIR/big: longer than 131072 bytes`},
		{"banner: .", `g.yaml:1: banner: DIR: not a regular file`},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			_, err := parse([]byte(tt.in+"\n"+required), "g.yaml", dir, nil, nil)
			if err == nil {
				t.Fatal("no mistake was found")
			}
			got := strings.ReplaceAll(err.Error(), dir, "DIR")
			// Messages of package yaml, and long lists, are compared by
			// their beginning.
			if got != tt.want && !(strings.HasSuffix(tt.want, " ") && strings.HasPrefix(got, tt.want)) {
				t.Errorf("\n got %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestKeyMistakes(t *testing.T) {
	dir := site(t)
	tests := []struct{ hostKeys, fleetKey, keysDir, want string }{
		{"nowhere", "fleet_key", ".", `g.yaml:1: host_keys: DIR/nowhere: no such file or directory`},
		{"[]", "fleet_key", ".", `g.yaml:1: host_keys: the list is empty`},
		{".", "fleet_key", ".", `g.yaml:1: host_keys: DIR: not a regular file`},
		{"big", "fleet_key", ".", `g.yaml:1: host_keys: DIR/big: longer than 65536 bytes`},
		{"open_key", "fleet_key", ".", `g.yaml:1: host_keys: DIR/open_key: mode 0640 gives others access to it; chmod 600 it`},
		{"garbage_key", "fleet_key", ".", `g.yaml:1: host_keys: DIR/garbage_key: is not a private key in a known format`},
		{"fleet_key.pub", "fleet_key", ".", `g.yaml:1: host_keys: DIR/fleet_key.pub: is a public key; the private one is the file without .pub`},
		{"public_key", "fleet_key", ".", `g.yaml:1: host_keys: DIR/public_key: is a public key; the private one is the file without .pub`},
		{"locked_key", "fleet_key", ".", `g.yaml:1: host_keys: DIR/locked_key: has a passphrase, which a server cannot type; remove it with ssh-keygen -p`},
		{"weak_rsa_key", "fleet_key", ".", `g.yaml:1: host_keys: DIR/weak_rsa_key: is an RSA key that is not of 2048 to 8192 bits`},
		{"[ssh_host_ed25519_key, other_ed25519_key, ssh_host_ed25519_key]", "fleet_key", ".", `g.yaml:1: host_keys: the same key is listed twice`},
		{"ssh_host_ed25519_key", "ssh_host_ed25519_key", ".", `g.yaml:2: fleet_key: is also a host key; a key that signs logins to bastions must have no other use`},
		{"ssh_host_ed25519_key", "[fleet_key, ssh_host_ed25519_key]", ".", `g.yaml:2: fleet_key: is also a host key; a key that signs logins to bastions must have no other use`},
		{"ssh_host_ed25519_key", "[fleet_key, fleet_key]", ".", `g.yaml:2: fleet_key: the same key is listed twice`},
		{"ssh_host_ed25519_key", "fleet_key", "nowhere", `g.yaml:3: authorized_keys_dir: DIR/nowhere: no such file or directory`},
		{"ssh_host_ed25519_key", "fleet_key", "banner.txt", `g.yaml:3: authorized_keys_dir: DIR/banner.txt is not a folder`},
	}
	for _, tt := range tests {
		t.Run(tt.hostKeys+" "+tt.fleetKey+" "+tt.keysDir, func(t *testing.T) {
			text := "host_keys: " + tt.hostKeys + "\nfleet_key: " + tt.fleetKey + "\nauthorized_keys_dir: " + tt.keysDir + "\n"
			_, err := parse([]byte(text), "g.yaml", dir, nil, nil)
			if err == nil {
				t.Fatal("no mistake was found")
			}
			if got := strings.ReplaceAll(err.Error(), dir, "DIR"); got != tt.want {
				t.Errorf("\n got %s\nwant %s", got, tt.want)
			}
		})
	}
}

// TestAllMistakesAtOnce loads testdata/mistakes.yaml, which has many.
func TestAllMistakesAtOnce(t *testing.T) {
	_, err := Load("testdata/mistakes.yaml", nil)
	if err == nil {
		t.Fatal("no mistake was found")
	}
	want := strings.TrimSpace(string(read(t, "testdata/mistakes.txt")))
	if got := err.Error(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestEmptyFile names all that is required, and nothing else.
func TestEmptyFile(t *testing.T) {
	const want = `g.yaml: authorized_keys_dir is missing; name the folder with one authorized_keys file per user
g.yaml: fleet_key is missing; name a private key that only gateways have; make one with ssh-keygen -t ed25519 -N "" -f FILE
g.yaml: host_keys is missing; name at least one private key; make one with ssh-keygen -t ed25519 -N "" -f FILE`
	for _, text := range []string{"", "\n", "# nothing\n", "---\n", "{}", "null", "---\n...\n"} {
		if _, err := parse([]byte(text), "g.yaml", "/", nil, nil); err == nil || err.Error() != want {
			t.Errorf("%q: got\n%v\nwant\n%s", text, err, want)
		}
	}
}

func TestLoadReadsFilesOnly(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "big.yaml"), bytes.Repeat([]byte("#"), maxFile+1), 0o644)
	for name, want := range map[string]string{
		"nowhere.yaml": "no such file",
		".":            "not a regular file",
		"big.yaml":     "longer than 1048576 bytes",
	} {
		if _, err := Load(filepath.Join(dir, name), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one with %q", name, err, want)
		}
	}
}

// TestDefaultsAreFresh changes one set of defaults, and looks at the next.
func TestDefaultsAreFresh(t *testing.T) {
	g := Defaults()
	g.Listen[0] = "none"
	g.Profiles["default"].Local.AcceptEnv[0] = "X"
	delete(g.Profiles, "default")
	if next := Defaults(); next.Listen[0] != ":2222" || next.Profiles["default"].Local.AcceptEnv[0] != "LANG" {
		t.Errorf("%+v", next)
	}
}

// TestKeygenFormats parses keys that the real ssh-keygen writes.
func TestKeygenFormats(t *testing.T) {
	dir := t.TempDir()
	for name, args := range map[string][]string{
		"openssh": {"-t", "ed25519"},
		"pkcs1":   {"-t", "rsa", "-b", "2048", "-m", "PEM"},
		"sec1":    {"-t", "ecdsa", "-m", "PEM"},
		"pkcs8":   {"-t", "ecdsa", "-m", "PKCS8"},
	} {
		args = append(args, "-q", "-N", "", "-f", filepath.Join(dir, name))
		if out, err := exec.Command("ssh-keygen", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		data := read(t, filepath.Join(dir, name))
		if block, _ := pem.Decode(data); block == nil || (block.Type == "OPENSSH PRIVATE KEY") != (name == "openssh") {
			t.Fatalf("ssh-keygen did not write %s", name)
		}
		if _, err := parsePrivateKey(data); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	dir := site(f)
	example := read(f, "testdata/gateway.yaml")
	for _, s := range []string{
		"", string(example), required, required + "profiles: {a: {idle: 1d}}", "a: &a [*a]", "&a {profiles: *a}", "<<: {}", "? {a: b}\n: c",
		"--- x\n--- y", "listen: [:1, :2]", "max_startups: 1:2:3", "per_source_net_block_size: 1:2", "per_source_penalties: [a:1s b, max:0]", "starts_per_user: 1/1s", "proxy_protocol_from: [::1, 1.2.3.4]", "\xff\xfe", "profiles:\n  <<: *x", "!!binary x", "- a", required + "drain: !!float 1",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		// Paths of the machine that runs the test are none of its business.
		if bytes.ContainsAny(data, "/\\") || bytes.Contains(data, []byte("..")) {
			return
		}
		g, err := parse(data, "g.yaml", dir, nil, nil)
		if err != nil {
			if g != nil {
				t.Error("a configuration beside an error")
			}
			for line := range strings.SplitSeq(err.Error(), "\n") {
				if !strings.HasPrefix(line, "g.yaml:") {
					t.Errorf("a mistake without its place: %q", line)
				}
			}
			return
		}
		p, ok := g.Profiles["default"]
		if !ok || p.Launcher != "local" || p.Idle < time.Second || p.MaxLife < p.Idle || p.StartTimeout < time.Second {
			t.Errorf("default profile %+v", p)
		}
		if len(g.Listen) == 0 || len(g.HostKeys) == 0 || len(g.FleetKeys) == 0 || g.AuthorizedKeysDir == "" || g.StateDir == "" || g.Deployment == "" ||
			g.LoginGraceTime < time.Second || g.MaxStartups.Start < 1 || g.MaxStartups.Full < g.MaxStartups.Start || g.MaxAuthTries < 1 ||
			g.MaxSessions < 1 || g.MaxChannels < 1 || g.MaxConnectionsPerUser < 1 || g.ClientAliveInterval < 0 || g.ClientAliveInterval > 0 && g.ClientAliveInterval < time.Second || g.ClientAliveCountMax < 1 || g.Drain < 0 ||
			g.PerSourcePenalties != (gateway.Penalties{}) && (g.PerSourcePenalties.Max < g.PerSourcePenalties.Min || g.PerSourcePenalties.MaxSources4 < 1 || g.PerSourcePenalties.MaxSources6 < 1) ||
			g.PerSourceNetBlockSize.IPv4 < 0 || g.PerSourceNetBlockSize.IPv4 > 32 || g.PerSourceNetBlockSize.IPv6 < 0 || g.PerSourceNetBlockSize.IPv6 > 128 ||
			g.StartsPerUser.Starts > 0 && g.StartsPerUser.Per <= 0 {
			t.Errorf("not usable: %+v", g)
		}
	})
}
