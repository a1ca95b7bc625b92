package console

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/sallyport-ssh/sallyport/internal/audit"
)

// FuzzParse: each line is parsed, or refused with a text without control characters. A
// parsed line, formatted and parsed again, is the same call.
func FuzzParse(f *testing.F) {
	for _, line := range []string{
		"status", "status --json", "  stop  prod --yes", "stop -y alice+prod", "log -n 3", "log --last 99999999999999999999", "log --last",
		"kick", "kick a b", "drain now", "help --yes", "", " \t\v", "nonsense", "\x1b[2J", "stop \xff", "kick \u202e", "whoami --", "kick -", "sessions --json --json",
		strings.Repeat("x", 5000), "keys", "keys add", "keys  add --json  from=\"a  b\" ssh-ed25519 AAAA x y", "keys remove SHA256:abcd --yes", "keys list --json", "keys add add",
		"revoke bob --for 3d --reason lost  laptop -y --stop --yes", "revoke bob --reason --yes", "revoke bob --for", "revoke bob --for 1s", "revoke --for 99999999d bob", "permit", "revoked bob --json", "stop --stop",
	} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		c, err := parse(line)
		if err != nil {
			var misused usageError
			if !errors.As(err, &misused) {
				t.Fatalf("%q: %T", line, err)
			}
			checkSanitized(t, err.Error())
			return
		}
		if len(c.args) > c.maxArgs || len(c.args) < c.minArgs || c.yes && !c.asks || c.last < 0 || c.last > 0 && !c.command.last ||
			(c.lasts != 0 || c.reason != "" || c.stop) && !c.revokes || c.lasts != 0 && c.lasts < time.Minute || len(c.reason) > maxReason {
			t.Fatalf("%q: %+v", line, c)
		}
		again := append([]string{c.name}, c.args...)
		if c.json {
			again = append(again, "--json")
		}
		if c.yes {
			again = append(again, "--yes")
		}
		if c.last > 0 {
			again = append(again, "--last", fmt.Sprint(c.last))
		}
		if c.lasts > 0 {
			again = append(again, "--for", c.lasts.String())
		}
		if c.reason != "" {
			again = append(again, "--reason", c.reason)
		}
		if c.stop {
			again = append(again, "--stop")
		}
		d, err := parse(strings.Join(again, " "))
		if err != nil || d.name != c.name || !slices.Equal(d.args, c.args) || d.json != c.json || d.yes != c.yes || d.last != c.last || d.lasts != c.lasts || d.reason != c.reason || d.stop != c.stop {
			t.Fatalf("%q and %q: %+v, %+v, %v", line, again, c, d, err)
		}
	})
}

func checkSanitized(t *testing.T, text string) {
	t.Helper()
	if !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsGraphic(r) }) {
		t.Errorf("control characters in %q", text)
	}
}

// FuzzOutput formats arbitrary text for terminals, without control characters, and as JSON,
// which must decode to the same text.
func FuzzOutput(f *testing.F) {
	for _, text := range []string{"plain", "\x1b[31m", "\u009b31m", "\x7f", "\u202etxt.exe", "\xff\xfe", "ü", "日本", "\U000e0001", "\"\\\n\t", strings.Repeat("é", 200), "\u2028"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		shown := sanitize(text)
		checkSanitized(t, shown)
		if utf8.RuneCountInString(shown) > maxText+3 {
			t.Errorf("%d characters", utf8.RuneCountInString(shown))
		}
		raw, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		out := EscapeJSON(raw)
		checkSanitized(t, string(out))
		var before, after string
		if json.Unmarshal(raw, &before); json.Unmarshal(out, &after) != nil || before != after {
			t.Errorf("%q became %q", before, after)
		}
		checkSanitized(t, strings.ReplaceAll(row(Connection{ClientVersion: "SSH-2.0-" + text, ID: text, Profile: text, Client: text, Gateway: text}, true), "\t", " "))
		checkSanitized(t, sanitize(Event{Command: text, Rule: text}.Text()))
	})
}

func TestParseKeys(t *testing.T) {
	for _, tt := range []struct {
		line, name, rest string
		json             bool
	}{
		{`keys add`, "keys add", "", false},
		{`keys add --json`, "keys add", "", true},
		{`  keys   add  from="10.0.0.1",command="a  add  b" ssh-ed25519 AAAA my  laptop`, "keys add", `from="10.0.0.1",command="a  add  b" ssh-ed25519 AAAA my  laptop`, false},
		{`keys add --json ssh-rsa AAAA --yes`, "keys add", "ssh-rsa AAAA --yes", true},
		{`keys list --json`, "keys list", "", true},
	} {
		c, err := parse(tt.line)
		if err != nil || c.name != tt.name || c.rest != tt.rest || c.json != tt.json {
			t.Errorf("%q: %q, rest %q, JSON %v, %v", tt.line, c.name, c.rest, c.json, err)
		}
	}
	for _, line := range []string{"keys", "keys remove", "keys remove a b", "keys list all", "keys nonsense", "keysadd x"} {
		if c, err := parse(line); err == nil {
			t.Errorf("%q is taken for %+v", line, c)
		}
	}
}

func TestIsCopyID(t *testing.T) {
	for command, want := range map[string]bool{
		// ssh-copy-id of OpenSSH 9.2, 8.2 and 6.6.
		`exec sh -c 'cd; umask 077; mkdir -p ".ssh" && { [ -z ` + "`tail -1c .ssh/authorized_keys 2>/dev/null`" + ` ] || echo >> ".ssh/authorized_keys" || exit 1; } && cat >> ".ssh/authorized_keys" || exit 1; if type restorecon >/dev/null 2>&1; then restorecon -F ".ssh" ".ssh/authorized_keys"; fi'`: true,
		`exec sh -c 'cd ; umask 077 ; mkdir -p .ssh && { [ -z ` + "`tail -1c .ssh/authorized_keys 2>/dev/null`" + ` ] || echo >> .ssh/authorized_keys ; } && cat >> .ssh/authorized_keys || exit 1 ; if type restorecon >/dev/null 2>&1 ; then restorecon -F .ssh .ssh/authorized_keys ; fi'`:               true,
		`exec sh -c 'cd ; umask 077 ; mkdir -p .ssh && cat >> .ssh/authorized_keys || exit 1 ; if type restorecon >/dev/null 2>&1 ; then restorecon .ssh .ssh/authorized_keys ; fi'`:                                                                                                                        true,
		`cat .ssh/authorized_keys`: false,
		`exec sh -c 'cd; ls'`:      false,
	} {
		if isCopyID(command) != want {
			t.Errorf("%v for %s", !want, command)
		}
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 59*time.Second + 600*time.Millisecond: "1m0s", 61 * time.Second: "1m1s",
		3*time.Hour + 5*time.Minute: "3h5m", 50 * time.Hour: "2d2h",
	} {
		if got := shortDuration(d); got != want {
			t.Errorf("shortDuration(%v) = %s, want %s", d, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0", 1023: "1023", 1024: "1.0K", 1536 << 10: "1.5M", 1<<63 - 1: "8.0E"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %s, want %s", n, got, want)
		}
	}
}

// TestRecent: refused logins of unknown users are not kept, and those of known users do not
// evict other events.
func TestRecent(t *testing.T) {
	r := &Recent{}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	add := func(user string, kind audit.Type, from string) {
		at = at.Add(time.Second)
		r.Add(audit.Event{Time: at, Type: kind, User: user, Client: netip.MustParseAddrPort(from + ":22"), Command: strings.Repeat("x", 1<<10), Reason: "arn:secret"})
	}
	add("alice", audit.LoginRefused, "192.0.2.1")
	add("", audit.Connection, "192.0.2.1")
	if got := r.of("alice"); len(got) != 0 || len(r.users) != 0 {
		t.Errorf("before the first login: %+v", got)
	}
	add("alice", audit.Login, "192.0.2.2")
	for i := range 1000 {
		add("alice", audit.LoginRefused, fmt.Sprintf("198.51.100.%d", i%100))
	}
	got := r.of("alice")
	if len(got) != 1+recentRefusals || got[0].Type != audit.Login || got[1].Times != 1 && got[1].Times != 10 {
		t.Errorf("%d events: %+v", len(got), got[:2])
	}
	if text, _ := json.Marshal(got); strings.Contains(string(text), "secret") || len(got[0].Command) != recentText {
		t.Errorf("kept %s", text)
	}
	for range 1000 {
		add("alice", audit.Exec, "192.0.2.2")
	}
	if got := r.of("alice"); len(got) != recentEvents+recentRefusals {
		t.Errorf("%d events", len(got))
	}
	for i := range 2 * recentUsers {
		add(fmt.Sprintf("user%d", i), audit.Login, "192.0.2.3")
	}
	if len(r.users) != recentUsers || len(r.of("alice")) != 0 || len(r.of(fmt.Sprintf("user%d", 2*recentUsers-1))) != 1 {
		t.Errorf("%d users", len(r.users))
	}
}

func TestVisibleTask(t *testing.T) {
	for id, want := range map[string]string{
		"": "",
		"arn:aws:ecs:eu-west-1:123456789012:task/sallyport/0123456789abcdef0123456789abcdef": "0123456789abcdef0123456789abcdef",
		"alice-default-1": "alice-default-1",
	} {
		if got := Visible(audit.Event{Task: id}).Task; got != want {
			t.Errorf("%q is shown as %q, want %q", id, got, want)
		}
	}
}

// TestHelpFits: no line of help is wrapped.
func TestHelpFits(t *testing.T) {
	for _, c := range commands() {
		if n := len(fmt.Sprintf("  %-*s  %s", maxUsage, "", c.help)); n > tableWidth && !c.private {
			t.Errorf("%s: the help is %d columns wide", c.name, n)
		}
	}
}
