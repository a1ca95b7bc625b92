package main

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestParseSettings(t *testing.T) {
	tests := []struct {
		name, file string
		options    []string
		want       settings // nil: an error
	}{
		{"the first counts", "Port 1\n\tPort 2\nBanner a\nBanner b\n", nil, settings{"port": {"1", "2"}, "banner": {"a"}}},
		{"options before the file", "Banner a\n", []string{"Banner=b"}, settings{"banner": {"b"}}},
		{"both ways to write it", "# no\nCiphers=x\nMACs  \"y\"\n", nil, settings{"ciphers": {"x"}, "macs": {"y"}}},
		{"match", "Banner a\nMatch User me\nBanner b\nMatch user other\nBanner c\n", nil, settings{"banner": {"b"}}},
		{"match all", "Banner a\nMatch all\nBanner b\n", nil, settings{"banner": {"b"}}},
		{"another match", "Match Address 127.0.0.1\n", nil, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseSettings([]byte(tt.file), tt.options, "me")
			if (err != nil) != (tt.want == nil) || err == nil && !maps.EqualFunc(got, tt.want, slices.Equal) {
				t.Errorf("parseSettings = %v, %v; want %v", got, err, tt.want)
			}
		})
	}
}

func TestForcedOptions(t *testing.T) {
	const key = "ssh-ed25519 AAAA me@here"
	tests := []struct {
		name string
		forced
		line, want string
	}{
		{"nothing", forced{}, key, key},
		{"command", forced{command: `say "x"`}, key, `command="say \"x\"" ` + key},
		{"command before the key's", forced{command: "a"}, `no-pty,command="b \"c, d\" e" ` + key, `no-pty,command="a" ` + key},
		{"permitopen", forced{permitOpen: []string{"h:1", "h:2"}}, key, `permitopen="h:1",permitopen="h:2" ` + key},
		{"no forwarding", forced{tcpForwarding: "no"}, "restrict,port-forwarding " + key, "restrict,port-forwarding,no-port-forwarding " + key},
		{"not local", forced{tcpForwarding: "remote"}, `permitopen="h:1" ` + key, `permitopen="127.0.0.1:1" ` + key},
		{"not remote", forced{tcpForwarding: "local"}, `permitopen="h:1" ` + key, `permitopen="h:1",permitlisten="127.0.0.1:1" ` + key},
		{"type", forced{keyTypes: []string{"ssh-ed*"}}, key, key},
		{"other type", forced{keyTypes: []string{"rsa-sha2-256"}}, key, "# not an accepted type: ssh-ed25519"},
		{"RSA", forced{keyTypes: []string{"rsa-sha2-256"}}, "ssh-rsa AAAA", "ssh-rsa AAAA"},
		{"two lists", forced{permitOpen: []string{"h:1"}}, `permitopen="h:2" ` + key, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.apply(tt.line)
			if got != tt.want || (err != nil) != (tt.want == "") {
				t.Errorf("apply = %q, %v; want %q", got, err, tt.want)
			}
		})
	}
}

// TestUnknownOption: no test of the suite may pass because the shim ignored its option.
func TestUnknownOption(t *testing.T) {
	_, err := translate(writeConfig(t, "ChannelTimeout session:*=1\n"), t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "channeltimeout") {
		t.Errorf("translate = %v, want it to name the option", err)
	}
}

func writeConfig(t *testing.T, text string) call {
	file := filepath.Join(t.TempDir(), "sshd_config")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return call{config: file, inetd: true}
}
