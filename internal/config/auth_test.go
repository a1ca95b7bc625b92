package config

import (
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestAuthValues(t *testing.T) {
	dir := site(t)
	tests := []struct {
		in   string
		want func(*Auth)
	}{
		{"trusted_user_ca_keys: fleet_key.pub", func(a *Auth) { a.TrustedUserCAKeys = []string{filepath.Join(dir, "fleet_key.pub")} }},
		{"trusted_user_ca_keys: [fleet_key.pub, /dev/../" + filepath.Join(dir, "ssh_host_rsa_key.pub") + "]\nauthorized_principals_dir: authorized_keys.d", func(a *Auth) {
			a.TrustedUserCAKeys = []string{filepath.Join(dir, "fleet_key.pub"), filepath.Join(dir, "ssh_host_rsa_key.pub")}
			a.AuthorizedPrincipalsDir = filepath.Join(dir, "authorized_keys.d")
		}},
		{"revoked_keys: banner.txt", func(a *Auth) { a.RevokedKeys = filepath.Join(dir, "banner.txt") }},
		{"revoked_keys: none\nauthorized_keys_command: none\nauthorized_keys_url: none", func(a *Auth) {}},
		{"authorized_keys_command: /bin/keys\nauthorized_keys_command_user: nobody", func(a *Auth) {
			a.AuthorizedKeysCommand, a.AuthorizedKeysCommandUser = []string{"/bin/keys"}, "nobody"
		}},
		{`authorized_keys_command: '/bin/keys  "a b" c\ d e''f'' %u%%%t%k%f'` + "\nauthorized_keys_command_user: nobody", func(a *Auth) {
			a.AuthorizedKeysCommand, a.AuthorizedKeysCommandUser = []string{"/bin/keys", "a b", "c d", "ef", "%u%%%t%k%f"}, "nobody"
		}},
		{`authorized_keys_command: [/bin/my keys, 'a "b']` + "\nauthorized_keys_command_user: nobody", func(a *Auth) {
			a.AuthorizedKeysCommand, a.AuthorizedKeysCommandUser = []string{"/bin/my keys", `a "b`}, "nobody"
		}},
		{"authorized_keys_url: https://github.com/%u.keys", func(a *Auth) { a.AuthorizedKeysURL = "https://github.com/%u.keys" }},
		{"authorized_keys_url: http://[::1]:80/?u=%u", func(a *Auth) { a.AuthorizedKeysURL = "http://[::1]:80/?u=%u" }},
		{"authorized_keys_timeout: 1s\nauthorized_keys_cache: 2s\nauthorized_keys_stale: 1d", func(a *Auth) {
			a.AuthorizedKeysTimeout, a.AuthorizedKeysCache, a.AuthorizedKeysStale = time.Second, 2*time.Second, 24*time.Hour
		}},
	}
	for _, tt := range tests {
		got, err := parse([]byte(required+tt.in), "g.yaml", dir, nil, nil)
		if err != nil {
			t.Errorf("%s: %v", tt.in, err)
			continue
		}
		want := defaultAuth()
		tt.want(&want)
		if !reflect.DeepEqual(got.Auth, want) {
			t.Errorf("%s\n got %+v\nwant %+v", tt.in, got.Auth, want)
		}
	}
}

func TestAuthMistakes(t *testing.T) {
	dir := site(t)
	tests := []struct{ in, want string }{
		{"trusted_user_ca_keys: nowhere.pub", "no such file"},
		{"trusted_user_ca_keys: []", "the list is empty"},
		{"trusted_user_ca_keys: authorized_keys.d", "not a regular file"},
		{"authorized_principals_dir: authorized_keys.d", "does nothing without trusted_user_ca_keys"},
		{"revoked_keys: nowhere", "no such file"},
		{"authorized_keys_command: keys\nauthorized_keys_command_user: nobody", "not an absolute path"},
		{"authorized_keys_command: /bin/keys", "g.yaml:4: authorized_keys_command: needs authorized_keys_command_user"},
		{"authorized_keys_command_user: nobody", "there is no authorized_keys_command"},
		{"authorized_keys_command: /bin/keys %h\nauthorized_keys_command_user: nobody", "have no home"},
		{"authorized_keys_command: /bin/keys 100%\nauthorized_keys_command_user: nobody", "after % there can be"},
		{"authorized_keys_command: '/bin/keys \"a'\nauthorized_keys_command_user: nobody", "a quote is not closed"},
		{"authorized_keys_command: ' '\nauthorized_keys_command_user: nobody", "the command is empty"},
		{"authorized_keys_command_user: a/b", "not the name of an account"},
		{"authorized_keys_url: http://github.com/%u.keys", "must begin with https://"},
		{"authorized_keys_url: https://github.com/keys", "has no %u"},
		{"authorized_keys_url: https://github.com/keys#%u", "has a fragment"},
		{"authorized_keys_url: https://%u.example.com/%u", "not a URL"},
		{"authorized_keys_url: https://me:secret@example.com/%u", "has a user or password"},
		{"authorized_keys_url: github.com/%u.keys", "not a URL"},
		{"authorized_keys_timeout: 2m", "the most is 1m0s"},
		{"authorized_keys_cache: 10m\nauthorized_keys_stale: 5m", "is shorter than authorized_keys_cache"},
		{"drain: 1m\nauthorized_keys_cache: 1h", "g.yaml:5: authorized_keys_stale: 10m0s is shorter than authorized_keys_cache, 1h0m0s"},
	}
	for _, tt := range tests {
		_, err := parse([]byte(required+tt.in), "g.yaml", dir, nil, nil)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want one with %q", tt.in, err, tt.want)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the mistake has the secret in it", tt.in)
		}
	}
}

// FuzzSplitArgs splits arguments that were quoted and joined.
func FuzzSplitArgs(f *testing.F) {
	for _, s := range []string{"", "/bin/keys %u", `a "b c" 'd e'`, `a\ b \"c\"`, `"a`, `'' ""`, "a\t\tb\\"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		args, err := splitArgs(line)
		if err != nil {
			return
		}
		quoted := make([]string, len(args))
		for i, arg := range args {
			quoted[i] = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(arg) + `"`
		}
		again, err := splitArgs(strings.Join(quoted, " "))
		if err != nil || len(again) != len(args) || len(args) > 0 && !reflect.DeepEqual(again, args) {
			t.Fatalf("%q is %q, and then %q, %v", line, args, again, err)
		}
	})
}
