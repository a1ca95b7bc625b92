package config

import (
	"net/netip"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/api"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/tracing"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

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
		{"ledger: {dynamodb: {table: sally-port.1}}\nprofiles: {default: {launcher: fargate, fargate: {cluster: c, task_definition: d:1, subnets: [subnet-1]}}}", func(g *Gateway) {
			g.Ledger.Table = "sally-port.1"
			p := g.Profiles["default"]
			p.Launcher = "fargate"
			p.Fargate.Cluster, p.Fargate.TaskDefinition, p.Fargate.Subnets = "c", "d:1", []string{"subnet-1"}
			g.Profiles["default"] = p
		}},
		{"advertise: 10.0.1.7:22", func(g *Gateway) { g.Advertise = "10.0.1.7:22" }},
		{`advertise: "[2001:db8::1]:2222"`, func(g *Gateway) { g.Advertise = "[2001:db8::1]:2222" }},
		{"api: {listen: [127.0.0.1:80, 'localhost:81', '[::1]:0'], ssh_address: 'ssh.example:22'}", func(g *Gateway) {
			g.API.Listen, g.API.SSHAddress = []string{"127.0.0.1:80", "localhost:81", "[::1]:0"}, "ssh.example:22"
		}},
		{"api: {listen: 127.0.0.1:80, operator_token: token, oidc: {issuer: 'https://id.example', audience: a, user_claim: sub, principals_claim: groups}}", func(g *Gateway) {
			g.API.Listen = []string{"127.0.0.1:80"}
			g.API.OperatorToken = api.HashToken(strings.Repeat("x", 32))
			g.API.OIDC = api.OIDC{Issuer: "https://id.example", Audience: "a", UserClaim: "sub", PrincipalsClaim: "groups"}
		}},
		{"api: {listen: :80, plain_http: true, names: [Gateway.example, 10.0.0.1, '2001:db8::1']}", func(g *Gateway) {
			g.API.Listen, g.API.PlainHTTP, g.API.Names = []string{":80"}, true, []string{"gateway.example", "10.0.0.1", "2001:db8::1"}
		}},
		{"monitoring: {listen: 10.0.0.1:9222}", func(g *Gateway) { g.Monitoring.Listen = "10.0.0.1:9222" }},
		{"tracing: {endpoint: \"http://127.0.0.1:4318\"}", func(g *Gateway) {
			g.Tracing.Options = tracing.Options{Endpoint: "http://127.0.0.1:4318/v1/traces", Sample: 1}
		}},
		{"tracing: {endpoint: \"https://collector/own/path\", sample: 0.25}", func(g *Gateway) {
			g.Tracing.Options = tracing.Options{Endpoint: "https://collector/own/path", Sample: 0.25}
		}},
		{"tracing: {endpoint: \"http://collector:4318/\", plain_http: true}", func(g *Gateway) {
			g.Tracing = Tracing{Options: tracing.Options{Endpoint: "http://collector:4318/v1/traces", Sample: 1}, PlainHTTP: true}
		}},
		{"login_grace_time: 120", func(g *Gateway) { g.LoginGraceTime = 2 * time.Minute }},
		{"login_grace_time: 1m30s", func(g *Gateway) { g.LoginGraceTime = 90 * time.Second }},
		{"drain: 0", func(g *Gateway) { g.Drain = 0 }},
		{"drain_delay: 45s", func(g *Gateway) { g.DrainDelay = 45 * time.Second }},
		{"drain: 1w2d3h", func(g *Gateway) { g.Drain = (9*24 + 3) * time.Hour }},
		{"task_protection: 8h", func(g *Gateway) { g.TaskProtection = 8 * time.Hour }},
		{"task_protection: none", func(g *Gateway) {}},
		{"drain: 1.5h", func(g *Gateway) { g.Drain = 90 * time.Minute }},
		{"max_startups: 20", func(g *Gateway) { g.MaxStartups = gateway.Startups{Start: 20, Rate: 100, Full: 20} }},
		{`max_startups: "5:50:60"`, func(g *Gateway) { g.MaxStartups = gateway.Startups{Start: 5, Rate: 50, Full: 60} }},
		{"client_alive_interval: 0", func(g *Gateway) { g.ClientAliveInterval = 0 }},
		{"client_alive_interval: 0s", func(g *Gateway) { g.ClientAliveInterval = 0 }},
		{"client_alive_interval: 15", func(g *Gateway) { g.ClientAliveInterval = 15 * time.Second }},
		{"tcp_keep_alive: no", func(g *Gateway) { g.DisableTCPKeepAlive = true }},
		{"per_source_max_startups: 5", func(g *Gateway) { g.PerSourceMaxStartups = 5 }},
		{"per_source_net_block_size: 24", func(g *Gateway) { g.PerSourceNetBlockSize.IPv4 = 24 }},
		{"per_source_net_block_size: 0:128", func(g *Gateway) { g.PerSourceNetBlockSize = gateway.NetBlockSize{IPv6: 128} }},
		{"per_source_penalties: none", func(g *Gateway) { g.PerSourcePenalties = gateway.Penalties{} }},
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
		{"starts_per_user: 5/1d", func(g *Gateway) { g.StartsPerUser = bastion.StartRate{Starts: 5, Per: 24 * time.Hour} }},
		{"log_per_user: 5m/1d", func(g *Gateway) { g.LogPerUser = gateway.LogLimit{Bytes: 5 << 20, Per: 24 * time.Hour} }},
		{"log_per_user: none", func(g *Gateway) { g.LogPerUser = gateway.LogLimit{} }},
		{"starts_per_user: none", func(g *Gateway) { g.StartsPerUser = bastion.StartRate{} }},
		{"kex_algorithms: +ecdh-sha2-nistp256,diffie-hellman-group14-sha256", func(g *Gateway) {
			g.KexAlgorithms = []string{"+ecdh-sha2-nistp256", "diffie-hellman-group14-sha256"}
		}},
		{"kex_algorithms: [^ecdh-sha2-nistp256, ecdh-sha2-nistp384]", func(g *Gateway) { g.KexAlgorithms = []string{"^ecdh-sha2-nistp256", "ecdh-sha2-nistp384"} }},
		{"macs: -*-etm@openssh.com", func(g *Gateway) { g.MACs = []string{"-*-etm@openssh.com"} }},
		{"ciphers: aes192-ctr", func(g *Gateway) { g.Ciphers = []string{"aes192-ctr"} }},
		{"kex_algorithms: [diffie-hellman-group14-sha256]", func(g *Gateway) { g.KexAlgorithms = []string{"diffie-hellman-group14-sha256"} }},
		{"rekey_limit: 1G", func(g *Gateway) { g.RekeyBytes = 1 << 30 }},
		{"rekey_limit: 16 1h", func(g *Gateway) { g.RekeyBytes, g.RekeyInterval = 16, time.Hour }},
		{"rekey_limit: default 1w", func(g *Gateway) { g.RekeyInterval = 7 * 24 * time.Hour }},
		{"rekey_limit: 64G none", func(g *Gateway) { g.RekeyBytes = 64 << 30 }},
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
		{"profiles: {default: {gateway_ports: clientspecified, stream_local_bind_unlink: yes, stream_local_bind_mask: 0111}}", func(g *Gateway) {
			p := defaultProfile()
			p.Forwarding = bastion.Forwarding{GatewayPorts: "clientspecified", StreamLocalBindUnlink: true, StreamLocalBindMask: "0111"}
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
			got, err := parse([]byte(required+tt.in+"\n"), "g.yaml", dir, nil, nil)
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

// TestAlgorithms wants every algorithm that the configuration takes to be
// implemented.
func TestAlgorithms(t *testing.T) {
	if err := transport.CheckAlgorithms(&transport.Config{KexAlgorithms: kexes, Ciphers: ciphers, MACs: macs}); err != nil {
		t.Error(err)
	}
}
