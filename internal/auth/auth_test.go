package auth

import (
	"crypto/rand"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

var (
	home  = netip.MustParseAddr("192.0.2.7")
	today = time.Date(2026, 6, 15, 12, 0, 0, 0, time.UTC)
)

// keysDir makes a folder of authorized keys; its files are given as name, text.
func keysDir(t *testing.T, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil { // independent of the umask
		t.Fatal(err)
	}
	for i := 0; i < len(files); i += 2 {
		replace(t, filepath.Join(dir, files[i]), files[i+1])
	}
	return dir
}

// replace writes a file as the package's doc asks for.
func replace(t testing.TB, path, text string) {
	t.Helper()
	tmp := filepath.Join(filepath.Dir(path), ".new")
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
}

func lines(s ...string) string { return strings.Join(s, "\n") + "\n" }

func TestAuthorize(t *testing.T) {
	t.Parallel()
	alice, bob, both, stranger := edKey(1), edKey(2), edKey(3), edKey(4)
	dir := keysDir(t,
		"alice", lines(
			"# Alice's keys",
			authorized(alice)+" alice@laptop",
			`from="198.51.100.0/24",command="elsewhere" `+authorized(both),
			`expiry-time="20260101Z",command="earlier" `+authorized(both),
			`restrict,expiry-time="20270101Z",command="now" `+authorized(both),
			authorized(both),
		),
		"bob", lines("shiny "+authorized(bob), authorized(both)),
		"fido", "no-touch-required "+authorized(alice), // no newline at the end
		"a.b_c@d-e", authorized(alice),
	)
	k := &Keys{Dir: dir}
	tests := []struct {
		name, user string
		key        ssh.PublicKey
		from       netip.Addr
		at         time.Time
		line       string // empty: refused
		wantErr    string
	}{
		{name: "plain", user: "alice", key: alice, line: "alice:2"},
		{name: "first line that fits", user: "alice", key: both, line: "alice:5"},
		{name: "from fits", user: "alice", key: both, from: netip.MustParseAddr("198.51.100.1"), line: "alice:3"},
		{name: "from fits, by an IPv6 socket", user: "alice", key: both, from: netip.MustParseAddr("::ffff:198.51.100.1"), line: "alice:3"},
		{name: "not expired", user: "alice", key: both, at: time.Date(2025, 12, 31, 23, 59, 59, 0, time.UTC), line: "alice:4"},
		{name: "not expired at that very second", user: "alice", key: both, at: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), line: "alice:4"},
		{name: "all expired but the last", user: "alice", key: both, at: time.Date(2027, 1, 1, 0, 0, 1, 0, time.UTC), line: "alice:6"},
		{name: "odd name", user: "a.b_c@d-e", key: alice, line: "a.b_c@d-e:1"},
		{name: "FIDO", user: "fido", key: alice, line: "fido:1"},
		{name: "somebody else's key", user: "bob", key: alice, wantErr: "no line of bob's authorized keys has this key"},
		{name: "refused line", user: "bob", key: bob, wantErr: "no line of bob's"},
		{name: "line after a refused one", user: "bob", key: both, line: "bob:2"},
		{name: "stranger's key", user: "alice", key: stranger, wantErr: "no line of alice's"},
		{name: "unknown user", user: "mallory", key: alice, wantErr: "no line of mallory's"},
		{name: "certificate", user: "alice", key: certificate(t, alice), wantErr: "certificate"},
		{name: "other case", user: "Alice", key: alice, wantErr: "no line of Alice's"},
	}
	for _, bad := range []string{"", ".", "..", ".alice", "-alice", "a/b", "../alice", "/etc/passwd", "alice\x00", "alice+prod", "a b", "al\nice",
		"älice", "alice~", "a..b", "a\\b", "$HOME", strings.Repeat("a", 65)} {
		tests = append(tests, struct {
			name, user string
			key        ssh.PublicKey
			from       netip.Addr
			at         time.Time
			line       string
			wantErr    string
		}{name: "user " + fmt.Sprintf("%q", bad), user: bad, key: alice, wantErr: "not a possible user name"})
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			from, at := tt.from, tt.at
			if !from.IsValid() {
				from = home
			}
			if at.IsZero() {
				at = today
			}
			g, err := k.Authorize(tt.user, tt.key, from, at)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Fatalf("error %v, want one with %q", err, tt.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if g.Line != tt.line {
				t.Errorf("granted by %s, want %s", g.Line, tt.line)
			}
		})
	}

	g, err := k.Authorize("alice", both, home, today)
	if err != nil {
		t.Fatal(err)
	}
	if g.PTY || g.ForceCommand != "now" || !g.Expires.Equal(time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)) || g.NoTouchRequired {
		t.Errorf("granted %+v", g)
	}
	if g, err = k.Authorize("fido", alice, home, today); err != nil || !g.NoTouchRequired || !g.PTY {
		t.Errorf("granted %+v, %v", g, err)
	}
	if _, err := k.Authorize("alice", alice, netip.Addr{}, today); err != nil {
		t.Errorf("without an address, by a line that asks for none: %v", err)
	}
}

func certificate(t *testing.T, key ssh.PublicKey) ssh.PublicKey {
	t.Helper()
	ca, err := ssh.ParsePrivateKey(keygen(t, "-t", "ed25519"))
	if err != nil {
		t.Fatal(err)
	}
	cert := &ssh.Certificate{Key: key, CertType: ssh.UserCert, ValidPrincipals: []string{"alice"}, ValidBefore: ssh.CertTimeInfinity}
	if err := cert.SignCert(rand.Reader, ca); err != nil {
		t.Fatal(err)
	}
	return cert
}

// keygen returns the private key that the real ssh-keygen makes.
func keygen(t *testing.T, args ...string) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key")
	out, err := exec.Command("ssh-keygen", append(args, "-q", "-N", "", "-f", path)...).CombinedOutput()
	if err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	priv, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return priv
}

// TestKeygenKeys authorizes keys of the real ssh-keygen.
func TestKeygenKeys(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"-t", "ed25519"}, {"-t", "ecdsa"}, {"-t", "ecdsa", "-b", "521"}, {"-t", "rsa", "-b", "2048"}} {
		signer, err := ssh.ParsePrivateKey(keygen(t, args...))
		if err != nil {
			t.Fatal(err)
		}
		k := &Keys{Dir: keysDir(t, "alice", "restrict,pty "+authorized(signer.PublicKey())+" a comment\n")}
		if g, err := k.Authorize("alice", signer.PublicKey(), home, today); err != nil || !g.PTY || g.PortForwarding {
			t.Errorf("%v: %+v, %v", args, g, err)
		}
	}
}

// TestGrantIsTheCallers changes a grant, and looks at the next one.
func TestGrantIsTheCallers(t *testing.T) {
	t.Parallel()
	key := edKey(1)
	k := &Keys{Dir: keysDir(t, "alice", `permitopen="db:1",permitlisten="1",environment="A=1" `+authorized(key))}
	settle(t, k, "alice")
	for range 2 {
		g, err := k.Authorize("alice", key, home, today)
		if err != nil {
			t.Fatal(err)
		}
		if g.PermitOpen[0] != "db:1" || g.PermitListen[0] != "1" || g.Environment[0] != "A=1" {
			t.Fatalf("granted %+v", g)
		}
		g.PermitOpen[0], g.PermitListen[0], g.Environment[0] = "x", "x", "x"
	}
}

// TestUnknownUsersUseNoMemory authorizes many users that do not exist.
func TestUnknownUsersUseNoMemory(t *testing.T) {
	t.Parallel()
	k := &Keys{Dir: keysDir(t), Log: slog.New(slog.DiscardHandler)}
	for i := range 100 {
		if _, err := k.Authorize(fmt.Sprint("user", i), edKey(1), home, today); err == nil {
			t.Fatal("let in")
		}
	}
	if len(k.keys.files)+len(k.lastReported) != 0 {
		t.Errorf("%d files and %d messages are remembered", len(k.keys.files), len(k.lastReported))
	}
}

func TestWhoMayWrite(t *testing.T) {
	t.Parallel()
	key := edKey(1)
	tests := []struct {
		name    string
		change  func(dir, file string) error
		wantErr string
	}{
		{"as it should be", func(dir, file string) error { return nil }, ""},
		{"readable by all", func(dir, file string) error { return os.Chmod(file, 0o644) }, ""},
		{"file of the group", func(dir, file string) error { return os.Chmod(file, 0o660) }, "mode 0660 lets others write to it"},
		{"file of everybody", func(dir, file string) error { return os.Chmod(file, 0o602) }, "mode 0602 lets others write to it"},
		{"folder of the group", func(dir, file string) error { return os.Chmod(dir, 0o775) }, "mode 0775 lets others write to it; logins that depend on it are refused until chmod go-w"},
		{"folder of everybody", func(dir, file string) error { return os.Chmod(dir, 0o777|os.ModeSticky) }, "mode 1777 lets others write to it"},
		{"a folder", func(dir, file string) error { os.Remove(file); return os.Mkdir(file, 0o700) }, "not a regular file"},
		{"a FIFO", func(dir, file string) error { os.Remove(file); return syscall.Mkfifo(file, 0o600) }, "not a regular file"},
		{"too long", func(dir, file string) error { return os.Truncate(file, maxFile+1) }, "longer than 1048576 bytes"},
		{"a link in the folder", func(dir, file string) error {
			if err := os.Rename(file, filepath.Join(dir, ".data")); err != nil {
				return err
			}
			return os.Symlink(".data", file)
		}, ""},
		{"a link to nothing", func(dir, file string) error { os.Remove(file); return os.Symlink("nothing", file) }, "no line of alice's"},
		{"a link to itself", func(dir, file string) error { os.Remove(file); return os.Symlink("alice", file) }, "alice"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := keysDir(t, "alice", authorized(key))
			if err := tt.change(dir, filepath.Join(dir, "alice")); err != nil {
				t.Fatal(err)
			}
			k := &Keys{Dir: dir}
			_, err := k.Authorize("alice", key, home, today)
			if tt.wantErr == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
				t.Errorf("error %v, want one with %q", err, tt.wantErr)
			}
		})
	}
}

func TestStrictModes(t *testing.T) {
	t.Parallel()
	here, err := os.Open(t.TempDir()) // not on a read-only mount
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	self := uint32(os.Geteuid())
	tests := []struct {
		s       state
		wantErr string
	}{
		{state{uid: 0, mode: 0o644}, ""},
		{state{uid: self, mode: 0o600}, ""},
		{state{uid: self + 12345, mode: 0o600}, fmt.Sprintf("keys: belongs to uid %d, and must belong to root or to uid %d", self+12345, self)},
		{state{uid: 0, mode: 0o620}, "keys: mode 0620 lets others write"},
		{state{uid: self, mode: 0o602}, "keys: mode 0602 lets others write"},
	}
	for _, tt := range tests {
		err := tt.s.checkStrictModes(here, "keys")
		if tt.wantErr == "" && err != nil || tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)) {
			t.Errorf("%+v: error %v, want %q", tt.s, err, tt.wantErr)
		}
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	dir := keysDir(t,
		"alice", lines("# fine", authorized(edKey(1))),
		"bob", lines("", "shiny "+authorized(edKey(1)), authorized(edKey(2)), "agent-forwarding,tunnel=\"1\" "+authorized(edKey(3))),
		"carol~", authorized(edKey(1)),
		"carol.disabled", authorized(edKey(1)),
		"carol.pub", authorized(edKey(1)),
		"first.last", authorized(edKey(1)),
		"dave", authorized(edKey(1)),
		".hidden", "nonsense",
		"erin", "",
	)
	if err := os.Chmod(filepath.Join(dir, "dave"), 0o666); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, err := range Check(dir) {
		got = append(got, strings.TrimPrefix(err.Error(), dir+"/"))
	}
	want := []string{
		`bob:2: option "shiny": unknown; the line is refused`,
		`bob:4: option "tunnel": tunnel devices are not supported; the line is refused`,
		`carol.disabled: this file is ignored: a name with .disabled in it is that of a backup file, not of a user`,
		`carol.pub: this file is ignored: the name of a file is that of its user, here carol, without .pub`,
		`carol~: this file is ignored: not a possible user name: it must be 1 to 64 letters, digits and ._@-, and not begin with . or -`,
		`dave: mode 0666 lets others write to it; logins that depend on it are refused until chmod go-w`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if problems := Check(filepath.Join(dir, "nowhere")); len(problems) != 1 {
		t.Errorf("a folder that is not there: %v", problems)
	}
}

func BenchmarkAuthorize(b *testing.B) {
	dir := b.TempDir()
	os.Chmod(dir, 0o755)
	key := edKey(1)
	replace(b, filepath.Join(dir, "alice"), authorized(key))
	for _, user := range []string{"alice", "nobody"} {
		b.Run(user, func(b *testing.B) {
			k := &Keys{Dir: dir}
			for b.Loop() {
				k.Authorize(user, key, home, today)
			}
		})
	}
}
