package config

import (
	"bytes"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
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
	if err := os.Chmod(path, mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
}

// types returns the keys' types, and forgets the keys.
func types(g *Gateway) (hostKeys []string, fleetKey string) {
	for _, k := range g.HostKeys {
		hostKeys = append(hostKeys, k.PublicKey().Type())
	}
	fleetKey = g.FleetKey.PublicKey().Type()
	g.HostKeys, g.FleetKey = nil, nil
	return hostKeys, fleetKey
}

// TestExample loads the file that the documentation shows. All but what it has
// to say is the defaults, so both are held together here.
func TestExample(t *testing.T) {
	dir := site(t)
	path := filepath.Join(dir, "gateway.yaml")
	write(t, path, read(t, "testdata/gateway.yaml"), 0o644)
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	hostKeys, fleetKey := types(got)
	if want := []string{"ssh-ed25519", "ssh-rsa"}; !reflect.DeepEqual(hostKeys, want) || fleetKey != "ssh-ed25519" {
		t.Errorf("host keys %v, fleet key %v", hostKeys, fleetKey)
	}
	want := Defaults()
	want.AuthorizedKeysDir = filepath.Join(dir, "authorized_keys.d")
	fargate := defaultFargate()
	fargate.Cluster, fargate.TaskDefinition = "sallyport", "sallyport-bastion:7"
	fargate.Subnets, fargate.SecurityGroups = []string{"subnet-0a1b2c3d", "subnet-4e5f6a7b"}, []string{"sg-0123abcd"}
	fargate.CPU, fargate.Memory, fargate.EphemeralStorage = 1024, 2048, 50
	fargate.TaskRole, fargate.PlatformVersion = "arn:aws:iam::123456789012:role/bastion-big", "1.4.0"
	fargate.PublicIP, fargate.Spot, fargate.Isolate = true, true, true
	fargate.IngressFrom = []string{"sg-9876fedc"}
	fargate.Egress = []EgressRule{{"tcp", 443, 443, "0.0.0.0/0"}, {"-1", -1, -1, "10.0.0.0/8"}}
	want.Profiles["big"] = Profile{
		Launcher: "fargate", Idle: 15 * time.Minute, MaxLife: 12 * time.Hour, StartTimeout: 5 * time.Minute,
		Local: defaultProfile().Local, Fargate: fargate,
	}
	want.Profiles["build"] = Profile{
		Launcher: "local", Idle: 2 * time.Hour, MaxLife: 24 * time.Hour, StartTimeout: 5 * time.Minute, Fargate: defaultFargate(),
		Local: Local{Account: "builder", Agent: "/usr/lib/sallyport/bastion-agent", AcceptEnv: defaultProfile().Local.AcceptEnv},
	}
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
	g, err := Load("../g.yaml")
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
	g, err := parse([]byte("host_keys: [ssh_host_rsa_key]\nfleet_key: fleet_key\nauthorized_keys_dir: .\n"), "g.yaml", dir)
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

func TestValues(t *testing.T) {
	dir := site(t)
	tests := []struct {
		in   string
		want func(*Gateway)
	}{
		{"", func(g *Gateway) {}},
		{"listen: 127.0.0.1:0", func(g *Gateway) { g.Listen = []string{"127.0.0.1:0"} }},
		{`listen: [":22", "[::1]:2222"]`, func(g *Gateway) { g.Listen = []string{":22", "[::1]:2222"} }},
		{"state_dir: state/here", func(g *Gateway) { g.StateDir = filepath.Join(dir, "state/here") }},
		{"state_dir: /a/../b/", func(g *Gateway) { g.StateDir = "/b" }},
		{"deployment: 2026-prod_A", func(g *Gateway) { g.Deployment = "2026-prod_A" }},
		{"login_grace_time: 120", func(g *Gateway) { g.LoginGraceTime = 2 * time.Minute }},
		{"login_grace_time: 1m30s", func(g *Gateway) { g.LoginGraceTime = 90 * time.Second }},
		{"drain: 0", func(g *Gateway) { g.Drain = 0 }},
		{"drain: 1w2d3h", func(g *Gateway) { g.Drain = (9*24 + 3) * time.Hour }},
		{"drain: 1.5h", func(g *Gateway) { g.Drain = 90 * time.Minute }},
		{"max_startups: 20", func(g *Gateway) { g.MaxStartups = MaxStartups{20, 100, 20} }},
		{`max_startups: "5:50:60"`, func(g *Gateway) { g.MaxStartups = MaxStartups{5, 50, 60} }},
		{"per_source_max_startups: 5", func(g *Gateway) { g.PerSourceMaxStartups = 5 }},
		{"per_source_net_block_size: 24", func(g *Gateway) { g.PerSourceNetBlockSize.IPv4 = 24 }},
		{"per_source_net_block_size: 0:128", func(g *Gateway) { g.PerSourceNetBlockSize = NetBlockSize{0, 128} }},
		{"per_source_penalties: none", func(g *Gateway) { g.PerSourcePenalties = Penalties{} }},
		{"per_source_penalties: authfail:10s  max:1h30m min:0", func(g *Gateway) {
			g.PerSourcePenalties.AuthFail, g.PerSourcePenalties.Max, g.PerSourcePenalties.Min = 10*time.Second, 90*time.Minute, 0
		}},
		{"per_source_penalties: [noauth:0, crash:3 max-sources4:10, max-sources6:20]", func(g *Gateway) {
			p := &g.PerSourcePenalties
			p.NoAuth, p.Crash, p.MaxSources4, p.MaxSources6 = 0, 3*time.Second, 10, 20
		}},
		{"per_source_penalties: overflow:deny-all", func(g *Gateway) { g.PerSourcePenalties.DenyAll4, g.PerSourcePenalties.DenyAll6 = true, true }},
		{"per_source_penalties: overflow6:permissive overflow:deny-all", func(g *Gateway) { g.PerSourcePenalties.DenyAll4 = true }},
		{"per_source_penalty_exempt_list: [10.0.0.0/8, 2001:db8::1]", func(g *Gateway) {
			g.PerSourcePenaltyExemptList = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::1/128")}
		}},
		{"proxy_protocol_from: 10.0.1.0/24", func(g *Gateway) { g.ProxyProtocolFrom = []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24")} }},
		{"proxy_protocol_from: none", func(g *Gateway) {}},
		{"starts_per_user: 5/1d", func(g *Gateway) { g.StartsPerUser = StartRate{5, 24 * time.Hour} }},
		{"starts_per_user: none", func(g *Gateway) { g.StartsPerUser = StartRate{} }},
		{"ciphers: aes192-ctr", func(g *Gateway) { g.Ciphers = []string{"aes192-ctr"} }},
		{"kex_algorithms: [diffie-hellman-group-exchange-sha256]", func(g *Gateway) { g.KexAlgorithms = []string{"diffie-hellman-group-exchange-sha256"} }},
		{"version_addendum: Example Corp", func(g *Gateway) { g.VersionAddendum = "Example Corp" }},
		{"banner: banner.txt", func(g *Gateway) { g.Banner = "Keep out.\n" }},
		{"profiles:", func(g *Gateway) {}},
		{"profiles: {prod: }", func(g *Gateway) { g.Profiles["prod"] = defaultProfile() }},
		{"profiles: {default: {idle: 1d, max_life: 2d, local: }}", func(g *Gateway) {
			p := defaultProfile()
			p.Idle, p.MaxLife = 24*time.Hour, 48*time.Hour
			g.Profiles["default"] = p
		}},
		{"profiles: {default: {local: {accept_env: []}}}", func(g *Gateway) {
			p := defaultProfile()
			p.Local.AcceptEnv = nil
			g.Profiles["default"] = p
		}},
		{"profiles:\n  a: &x {idle: 1h}\n  b: *x", func(g *Gateway) {
			p := defaultProfile()
			p.Idle = time.Hour
			g.Profiles["a"], g.Profiles["b"] = p, p
		}},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			got, err := parse([]byte(required+tt.in+"\n"), "g.yaml", dir)
			if err != nil {
				t.Fatal(err)
			}
			types(got)
			want := Defaults()
			want.AuthorizedKeysDir = filepath.Join(dir, "authorized_keys.d")
			tt.want(want)
			if !reflect.DeepEqual(got, want) {
				t.Errorf("\n got %+v\nwant %+v", got, want)
			}
		})
	}
}

// TestMistakes holds every message to the letter. The text under test stands
// before what is required, so its lines count from 1.
func TestMistakes(t *testing.T) {
	dir := site(t)
	tests := []struct{ in, want string }{
		// The form of the file.
		{"listen: [", `g.yaml:3: not valid YAML: `},
		{"\tlisten: x", `g.yaml:1: not valid YAML: `},
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
		{"max_auth_tries: six", `g.yaml:1: max_auth_tries: "six" is not a whole number from 1 to 100`},
		{"max_memory: 10M", `g.yaml:1: max_memory: "10M" is not a size from 67108864 to 1099511627776 bytes; write it like 100M`},
		{"max_connections_per_user: 1e3", `g.yaml:1: max_connections_per_user: "1e3" is not a whole number from 1 to 1000000`},
		{"client_alive_count_max: 0", `g.yaml:1: client_alive_count_max: "0" is not a whole number from 1 to 1000`},
		{"per_source_max_startups: 0", `g.yaml:1: per_source_max_startups: "0" is not a whole number from 1 to 1000000`},
		{"max_startups: 10:30", `g.yaml:1: max_startups: "10:30" is not start:rate:full; write it like 10:30:100, or as one number`},
		{"max_startups: a:b:c", `g.yaml:1: max_startups: "a:b:c" is not start:rate:full; write it like 10:30:100, or as one number`},
		{"max_startups: 10:0:100", `g.yaml:1: max_startups: "10:0:100" is not start:rate:full; write it like 10:30:100, or as one number`},
		{"max_startups: 10:101:100", `g.yaml:1: max_startups: "10:101:100": the rate is in percent, and 101 is more than 100`},
		{"max_startups: 100:30:10", `g.yaml:1: max_startups: "100:30:10": start (100) is greater than full (10)`},

		// Networks.
		{"proxy_protocol_from: 0.0.0.0/0", `g.yaml:1: proxy_protocol_from: 0.0.0.0/0 is everybody, so anybody could claim to come from any address; name the balancers only`},
		{"proxy_protocol_from: balancer", `g.yaml:1: proxy_protocol_from: "balancer" is neither an address nor a network; write it like 10.0.0.0/8`},
		{"per_source_penalty_exempt_list: [10.0.0.0/8, 10.0.0.1/8]", `g.yaml:1: per_source_penalty_exempt_list: "10.0.0.1/8": the network is 10.0.0.0/8; an address in the middle of it is usually a slip`},
		{"per_source_net_block_size: 33", `g.yaml:1: per_source_net_block_size: "33" is not the bits of a network; write it like 32:64, up to 32 for IPv4 and 128 for IPv6`},
		{"per_source_net_block_size: 0:0", `g.yaml:1: per_source_net_block_size: "0:0" makes one source of all addresses, so that a stranger could have everybody turned away`},
		{"per_source_net_block_size: 32:+64", `g.yaml:1: per_source_net_block_size: "32:+64" is not the bits of a network; write it like 32:64, up to 32 for IPv4 and 128 for IPv6`},
		{"per_source_penalties: no", `g.yaml:1: per_source_penalties: "no" is not a penalty; write it like authfail:5s. There are `},
		{"per_source_penalties: invaliduser:5s", `g.yaml:1: per_source_penalties: "invaliduser:5s" is not a penalty; write it like authfail:5s. There are `},
		{"per_source_penalties: authfail:5s authfail:6s", `g.yaml:1: per_source_penalties: authfail is given twice`},
		{"per_source_penalties: max:2d", `g.yaml:1: per_source_penalties: "max:2d": "2d" is not a duration of a day at most; write it like 90s`},
		{"per_source_penalties: max-sources4:0", `g.yaml:1: per_source_penalties: "max-sources4:0": "0" is not a whole number from 1 to 1000000`},
		{"per_source_penalties: overflow:deny", `g.yaml:1: per_source_penalties: "overflow:deny": there are permissive and deny-all`},
		{"per_source_penalties: max:10s", `g.yaml:1: per_source_penalties: max (10s) is shorter than min (15s), so that no penalty would ever count; write none for no penalties`},
		{`per_source_penalties: " "`, `g.yaml:1: per_source_penalties: is empty; write none for no penalties`},
		{"starts_per_user: 10", `g.yaml:1: starts_per_user: "10" is not a number of starts in a time; write it like 30/1h, with at most 1000 starts in at most a week`},
		{"starts_per_user: 0/1h", `g.yaml:1: starts_per_user: "0/1h" is not a number of starts in a time; write it like 30/1h, with at most 1000 starts in at most a week`},

		// Algorithms.
		{"ciphers: [aes128-ctr, chacha20-poly1305@openssh.com]", `g.yaml:1: ciphers: "chacha20-poly1305@openssh.com" is not a cipher that is offered here; there are aes128-gcm@openssh.com, aes256-gcm@openssh.com, aes256-ctr, aes192-ctr, aes128-ctr`},
		{"ciphers:\n- aes128-ctr\n- aes128-ctr", `g.yaml:3: ciphers: "aes128-ctr" is listed twice`},
		{"macs: hmac-sha1", `g.yaml:1: macs: "hmac-sha1" is not a MAC that is offered here; there are hmac-sha2-256-etm@openssh.com, hmac-sha2-512-etm@openssh.com, hmac-sha2-256, hmac-sha2-512`},
		{"kex_algorithms: diffie-hellman-group14-sha1", `g.yaml:1: kex_algorithms: "diffie-hellman-group14-sha1" is not a key exchange that is offered here; there are mlkem768x25519-sha256, `},

		// Names and texts.
		{"deployment: a/b", `g.yaml:1: deployment: "a/b" is not a name; write 1 to 32 letters, digits, - and _, a letter or digit first`},
		{`version_addendum: "a\nb"`, `g.yaml:1: version_addendum: must be at most 128 printable ASCII characters`},
		{"profiles:\n  a b: {}", `g.yaml:2: profiles.a b: "a b" is not a name for a profile; write 1 to 32 letters, digits, - and _, a letter or digit first`},
		{"profiles: {ctl: {}}", `g.yaml:1: profiles.ctl: the name ctl is taken: it is how users reach their console`},
		{"profiles:\n  big:\n    launcher: fargate", `g.yaml:2: profiles.big: the launcher fargate needs the key fargate, with at least cluster, task_definition and subnets`},
		{"profiles:\n  big:\n    launcher: docker", `g.yaml:3: profiles.big.launcher: "docker" is not a launcher; there are local and fargate`},
		{"profiles:\n  big:\n    idle: 2d", `g.yaml:2: profiles.big: max_life (12h0m0s) is shorter than idle (48h0m0s)`},
		{"profiles: {a: {local: {account: 'a:b'}}}", `g.yaml:1: profiles.a.local.account: "a:b" is not the name of an account`},
		{"profiles: {a: {local: {agent: ''}}}", `g.yaml:1: profiles.a.local.agent: the path is empty`},
		{"profiles: {a: {local: {accept_env: [LANG, 'A=B']}}}", `g.yaml:1: profiles.a.local.accept_env: "A=B" is not a pattern for names of variables; write it like LC_*`},
		{"profiles: {a: {local: {accept_env: '*'}}}", `g.yaml:1: profiles.a.local.accept_env: "*" lets clients set LD_PRELOAD, and with it get around command= in authorized keys`},
		{"profiles: {a: {local: {accept_env: 'BASH_*'}}}", `g.yaml:1: profiles.a.local.accept_env: "BASH_*" lets clients set BASH_ENV, and with it get around command= in authorized keys`},

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
			_, err := parse([]byte(tt.in+"\n"+required), "g.yaml", dir)
			if err == nil {
				t.Fatal("no mistake was found")
			}
			got := strings.ReplaceAll(err.Error(), dir, "DIR")
			// What comes from package yaml, and long lists, are compared by
			// their beginning.
			if got != tt.want && !(strings.HasSuffix(tt.want, " ") && strings.HasPrefix(got, tt.want)) {
				t.Errorf("\n got %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestFargateMistakes(t *testing.T) {
	dir := site(t)
	const start = "profiles:\n  f:\n    launcher: fargate\n    fargate:\n      "
	good := []string{"cluster: c", "task_definition: d:1", "subnets: [subnet-1]"}
	tests := []struct{ in, want string }{
		{"cluster: a b", `g.yaml:5: profiles.f.fargate.cluster: "a b" is not the name or ARN of a cluster`},
		{"task_definition: bastion", `g.yaml:5: profiles.f.fargate.task_definition: "bastion" has no revision; write it like bastion:7, so that a new revision is not used before it is meant to`},
		{"task_definition: arn:aws:ecs:eu-west-1:123456789012:task-definition/b", `g.yaml:5: profiles.f.fargate.task_definition: "arn:aws:ecs:eu-west-1:123456789012:task-definition/b" has no revision; write it like arn:aws:ecs:eu-west-1:123456789012:task-definition/b:7, so that a new revision is not used before it is meant to`},
		{"subnets: [vpc-1]", `g.yaml:5: profiles.f.fargate.subnets: "vpc-1" is not the id of a subnet`},
		{"subnets: [" + strings.Repeat("subnet-1, ", 17) + "]", `g.yaml:5: profiles.f.fargate.subnets: there are 17, and may be 16`},
		{"security_groups: [sg-1, sg-2, sg-3, sg-4, sg-5, sg-6]", `g.yaml:5: profiles.f.fargate.security_groups: there are 6, and may be 5`},
		{"public_ip: maybe", `g.yaml:5: profiles.f.fargate.public_ip: "maybe" is neither true nor false`},
		{"capacity: cheap", `g.yaml:5: profiles.f.fargate.capacity: "cheap" is neither on-demand nor spot`},
		{"cpu: 300", `g.yaml:5: profiles.f.fargate.cpu: Fargate has no size with cpu 300; there are 256, 512, 1024, 2048, 4096, 8192, 16384 and 32768`},
		{"cpu: 256\n      memory: 4096", `g.yaml:4: profiles.f.fargate: Fargate has no size with cpu 256 and memory 4096`},
		{"task_role: bastion", `g.yaml:5: profiles.f.fargate.task_role: "bastion" is not the ARN of a role`},
		{"isolate: true", `g.yaml:4: profiles.f.fargate: isolate needs ingress_from: the security groups or networks of the gateways, which nobody else may connect from`},
		{"egress: all 0.0.0.0/0", `g.yaml:4: profiles.f.fargate: ingress_from and egress are of the groups that isolate: true makes; without it, write these rules into security_groups`},
		{"isolate: true\n      ingress_from: 10.0.0.1/8", `g.yaml:6: profiles.f.fargate.ingress_from: "10.0.0.1/8" has bits set after its length; do you mean 10.0.0.0/8?`},
		{"isolate: true\n      ingress_from: gateway", `g.yaml:6: profiles.f.fargate.ingress_from: "gateway" is neither a network, like 10.0.0.0/8, nor the id of a security group`},
		{"isolate: true\n      ingress_from: sg-1\n      security_groups: [sg-1, sg-2, sg-3, sg-4, sg-5]", `g.yaml:4: profiles.f.fargate: isolate adds a security group to security_groups, and there may be 5 in all`},
		{"isolate: true\n      ingress_from: sg-1\n      egress: [tcp https 10.0.0.0/8]", `g.yaml:7: profiles.f.fargate.egress: "tcp https 10.0.0.0/8" is not a rule; write it like "tcp 443 10.0.0.0/8", "udp 1000-2000 sg-0123abcd" or "all 0.0.0.0/0"`},
		{"isolate: true\n      ingress_from: sg-1\n      egress: [tcp 2-1 10.0.0.0/8]", `g.yaml:7: profiles.f.fargate.egress: "tcp 2-1 10.0.0.0/8" is not a rule; write it like "tcp 443 10.0.0.0/8", "udp 1000-2000 sg-0123abcd" or "all 0.0.0.0/0"`},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			text := start + tt.in
			for _, line := range good {
				if key, _, _ := strings.Cut(line, ":"); !strings.HasPrefix(tt.in, key+":") {
					text += "\n      " + line
				}
			}
			_, err := parse([]byte(text+"\n"+required), "g.yaml", dir)
			if err == nil {
				t.Fatal("no mistake was found")
			}
			// One value that is wrong can make others so, which are after it.
			if first, _, _ := strings.Cut(err.Error(), "\n"); first != tt.want && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("\n got %s\nwant %s", err, tt.want)
			}
		})
	}
	if _, err := parse([]byte("profiles:\n  f:\n    launcher: fargate\n    fargate: {account: x}\n"+required), "g.yaml", dir); err == nil ||
		strings.Count(err.Error(), "is missing") != 3 {
		t.Errorf("with all that is required missing: %v", err)
	}
}

func TestEgress(t *testing.T) {
	for in, want := range map[string]EgressRule{
		"tcp 443 10.0.0.0/8":   {"tcp", 443, 443, "10.0.0.0/8"},
		"udp 1000-2000 sg-1":   {"udp", 1000, 2000, "sg-1"},
		"tcp 10.1.2.3":         {"tcp", 0, 65535, "10.1.2.3/32"},
		"icmp fd00::/8":        {"icmp", -1, -1, "fd00::/8"},
		"all pl-12ab":          {"-1", -1, -1, "pl-12ab"},
		" all   0.0.0.0/0 ":    {"-1", -1, -1, "0.0.0.0/0"},
		"tcp 443 FD00:0::/112": {"tcp", 443, 443, "fd00::/112"},
	} {
		if got, err := parseEgress(in); err != nil || got != want {
			t.Errorf("%q: got %+v, %v", in, got, err)
		}
	}
}

func TestKeyMistakes(t *testing.T) {
	dir := site(t)
	tests := []struct{ hostKeys, fleetKey, keysDir, want string }{
		{"nowhere", "fleet_key", ".", `g.yaml:1: host_keys: DIR/nowhere: no such file or directory`},
		{"[]", "fleet_key", ".", `g.yaml:1: host_keys: the list is empty`},
		{".", "fleet_key", ".", `g.yaml:1: host_keys: DIR: not a regular file`},
		{"big", "fleet_key", ".", `g.yaml:1: host_keys: DIR/big: longer than 65536 bytes`},
		{"open_key", "fleet_key", ".", `g.yaml:1: host_keys: DIR/open_key: mode 0640 lets others at a private key; chmod 600 it`},
		{"garbage_key", "fleet_key", ".", `g.yaml:1: host_keys: DIR/garbage_key: is not a private key in a format that is known`},
		{"public_key", "fleet_key", ".", `g.yaml:1: host_keys: DIR/public_key: is a public key; name the private one, without .pub`},
		{"locked_key", "fleet_key", ".", `g.yaml:1: host_keys: DIR/locked_key: has a passphrase, which nobody is there to type; take it off with ssh-keygen -p`},
		{"weak_rsa_key", "fleet_key", ".", `g.yaml:1: host_keys: DIR/weak_rsa_key: is an RSA key that is not of 2048 to 8192 bits`},
		{"[ssh_host_ed25519_key, other_ed25519_key]", "fleet_key", ".", `g.yaml:1: host_keys: a second ssh-ed25519 key (the first is in line 1); clients are shown one of each type`},
		{"ssh_host_ed25519_key", "ssh_host_ed25519_key", ".", `g.yaml:2: fleet_key: is a host key as well; who signs logins to bastions must do nothing else`},
		{"ssh_host_ed25519_key", "[a, b]", ".", `g.yaml:2: fleet_key: must be a single value`},
		{"ssh_host_ed25519_key", "fleet_key", "nowhere", `g.yaml:3: authorized_keys_dir: DIR/nowhere: no such file or directory`},
		{"ssh_host_ed25519_key", "fleet_key", "banner.txt", `g.yaml:3: authorized_keys_dir: DIR/banner.txt is not a folder`},
	}
	for _, tt := range tests {
		t.Run(tt.hostKeys+" "+tt.fleetKey+" "+tt.keysDir, func(t *testing.T) {
			text := "host_keys: " + tt.hostKeys + "\nfleet_key: " + tt.fleetKey + "\nauthorized_keys_dir: " + tt.keysDir + "\n"
			_, err := parse([]byte(text), "g.yaml", dir)
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
	_, err := Load("testdata/mistakes.yaml")
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
		if _, err := parse([]byte(text), "g.yaml", "/"); err == nil || err.Error() != want {
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
		if _, err := Load(filepath.Join(dir, name)); err == nil || !strings.Contains(err.Error(), want) {
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

// TestKeygenFormats parses what the real ssh-keygen writes.
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
		g, err := parse(data, "g.yaml", dir)
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
		if len(g.Listen) == 0 || len(g.HostKeys) == 0 || g.FleetKey == nil || g.AuthorizedKeysDir == "" || g.StateDir == "" || g.Deployment == "" ||
			g.LoginGraceTime < time.Second || g.MaxStartups.Start < 1 || g.MaxStartups.Full < g.MaxStartups.Start || g.MaxAuthTries < 1 ||
			g.MaxSessions < 1 || g.MaxConnectionsPerUser < 1 || g.ClientAliveInterval < time.Second || g.ClientAliveCountMax < 1 || g.Drain < 0 ||
			g.PerSourcePenalties != (Penalties{}) && (g.PerSourcePenalties.Max < g.PerSourcePenalties.Min || g.PerSourcePenalties.MaxSources4 < 1 || g.PerSourcePenalties.MaxSources6 < 1) ||
			g.PerSourceNetBlockSize.IPv4 < 0 || g.PerSourceNetBlockSize.IPv4 > 32 || g.PerSourceNetBlockSize.IPv6 < 0 || g.PerSourceNetBlockSize.IPv6 > 128 ||
			g.StartsPerUser.Starts > 0 && g.StartsPerUser.Per <= 0 {
			t.Errorf("not usable: %+v", g)
		}
	})
}
