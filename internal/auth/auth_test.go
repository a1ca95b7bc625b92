package auth

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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
	if err := os.Chmod(dir, 0o755); err != nil { // whatever the umask
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
				t.Errorf("let in by %s, want %s", g.Line, tt.line)
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

// TestKeygenKeys lets in by what the real ssh-keygen writes.
func TestKeygenKeys(t *testing.T) {
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

// settle makes the cached file look as if it had been read long after its last
// change, as it is in real life; the tests have no time to wait.
func settle(t *testing.T, k *Keys, user string) {
	t.Helper()
	if _, err := k.file(user); err != nil {
		t.Fatal(err)
	}
	k.keys.mu.Lock()
	defer k.keys.mu.Unlock()
	k.keys.files[user].readAt = time.Now().Add(2 * settled)
}

func TestChanges(t *testing.T) {
	one, two := edKey(1), edKey(2)
	dir := keysDir(t, "alice", authorized(one))
	path := filepath.Join(dir, "alice")
	k := &Keys{Dir: dir}
	may := func(want ...bool) {
		t.Helper()
		for i, key := range []ssh.PublicKey{one, two} {
			if _, err := k.Authorize("alice", key, home, today); (err == nil) != want[i] {
				t.Errorf("key %d: %v", i+1, err)
			}
		}
	}
	may(true, false)

	t.Run("same length, inode and times, right after the read", func(t *testing.T) {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(authorized(two)), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil {
			t.Fatal(err)
		}
		may(false, true)
	})
	t.Run("renamed over a settled file", func(t *testing.T) {
		settle(t, k, "alice")
		cached, err := k.file("alice")
		if err != nil {
			t.Fatal(err)
		}
		if again, err := k.file("alice"); err != nil || again != cached {
			t.Errorf("a settled file was read again (%v)", err)
		}
		replace(t, path, authorized(one))
		may(true, false)
	})
	t.Run("locked away after it was cached", func(t *testing.T) {
		settle(t, k, "alice")
		may(true, false)
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
		may(false, false)
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		may(true, false)
	})
	t.Run("removed", func(t *testing.T) {
		settle(t, k, "alice")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		may(false, false)
		if len(k.keys.files) != 0 {
			t.Errorf("%d users are remembered", len(k.keys.files))
		}
	})
	t.Run("folder removed", func(t *testing.T) {
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Authorize("alice", one, home, today); err == nil || !strings.Contains(err.Error(), "opening the authorized keys") {
			t.Errorf("error %v", err)
		}
	})
}

// TestStrangersLeaveNothing asks for many users who do not exist.
func TestStrangersLeaveNothing(t *testing.T) {
	k := &Keys{Dir: keysDir(t), Log: slog.New(slog.DiscardHandler)}
	for i := range 100 {
		if _, err := k.Authorize(fmt.Sprint("user", i), edKey(1), home, today); err == nil {
			t.Fatal("let in")
		}
	}
	if len(k.keys.files)+len(k.said) != 0 {
		t.Errorf("%d files and %d messages are remembered", len(k.keys.files), len(k.said))
	}
}

func TestWhoMayWrite(t *testing.T) {
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
		{"folder of the group", func(dir, file string) error { return os.Chmod(dir, 0o775) }, "mode 0775 lets others write to it; nobody gets in by it until chmod go-w"},
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
		{"a link out of the folder", func(dir, file string) error { os.Remove(file); return os.Symlink("/etc/passwd", file) }, "escapes"},
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

func TestCheckOwner(t *testing.T) {
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
		err := tt.s.checkOwner("keys")
		if tt.wantErr == "" && err != nil || tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)) {
			t.Errorf("%+v: error %v, want %q", tt.s, err, tt.wantErr)
		}
	}
}

func TestCheck(t *testing.T) {
	dir := keysDir(t,
		"alice", lines("# fine", authorized(edKey(1))),
		"bob", lines("", "shiny "+authorized(edKey(1)), authorized(edKey(2)), "verify-required "+authorized(edKey(3))),
		"carol~", authorized(edKey(1)),
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
		`bob:2: option "shiny": not known here, so the line is refused`,
		`bob:4: option "verify-required": cannot be enforced: whether a FIDO key verified its user is not known here, so the line is refused`,
		`carol~: the file's name is not a possible user name, so nobody gets in by it`,
		`dave: mode 0666 lets others write to it; nobody gets in by it until chmod go-w`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if problems := Check(filepath.Join(dir, "nowhere")); len(problems) != 1 {
		t.Errorf("a folder that is not there: %v", problems)
	}
}

// TestLogsOncePerChange counts what the operator reads.
func TestLogsOncePerChange(t *testing.T) {
	var out bytes.Buffer
	dir := keysDir(t, "alice", lines(`environment="TOKEN-X=secret" `+authorized(edKey(1)), authorized(edKey(2))))
	k := &Keys{Dir: dir, Log: slog.New(slog.NewJSONHandler(&out, nil))}
	logged := func() []string {
		t.Helper()
		for range 3 {
			k.Authorize("alice", edKey(2), home, today)
		}
		var texts []string
		for _, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
			if line == "" {
				continue
			}
			var rec struct{ Msg, User, Err string }
			if err := json.Unmarshal([]byte(line), &rec); err != nil {
				t.Fatal(err)
			}
			texts = append(texts, rec.User+": "+strings.ReplaceAll(rec.Err, dir+"/", ""))
		}
		out.Reset()
		return texts
	}
	steps := []struct {
		do   func() error
		want []string
	}{
		{func() error { return nil }, []string{`alice: alice:1: option "environment": a variable's name is made of letters, digits and underscores`}},
		{func() error { return nil }, nil},
		{func() error { replace(t, filepath.Join(dir, "alice"), authorized(edKey(2))); return nil }, nil},
		{func() error { replace(t, filepath.Join(dir, "alice"), "pty"); return nil }, []string{"alice: alice:1: no key after the options"}},
		{func() error { return os.Chmod(filepath.Join(dir, "alice"), 0o666) }, []string{"alice: alice: mode 0666 lets others write to it; nobody gets in by it until chmod go-w"}},
		{func() error { return os.Chmod(dir, 0o775) }, []string{": " + dir + ": mode 0775 lets others write to it; nobody gets in by it until chmod go-w"}},
		{func() error { return os.Chmod(dir, 0o755) }, nil},
		{func() error { return os.Chmod(dir, 0o775) }, []string{": " + dir + ": mode 0775 lets others write to it; nobody gets in by it until chmod go-w"}},
	}
	for i, s := range steps {
		if err := s.do(); err != nil {
			t.Fatal(err)
		}
		if got := logged(); !slices.Equal(got, s.want) {
			t.Errorf("step %d: logged %q, want %q", i, got, s.want)
		}
	}

	// A file full of mistakes does not flood the log.
	replace(t, filepath.Join(dir, "alice"), strings.Repeat("shiny\n", 5000))
	os.Chmod(dir, 0o755)
	if got := logged(); len(got) != 21 {
		t.Errorf("%d records for a file of mistakes", len(got))
	}
}

// TestRewriteDuringLogins changes a file in both ways while many log in by it.
// The key that stays must always be let in when the file is replaced by rename;
// a restriction must never be lost, and a key that is nowhere never be let in,
// in either way.
func TestRewriteDuringLogins(t *testing.T) {
	stays, comes, never := edKey(1), edKey(2), edKey(3)
	restricted := `restrict,command="only this" ` + authorized(stays)
	filler := strings.Repeat(authorized(edKey(9))+" filler\n", 60) // more than one page
	versions := []string{
		filler + restricted + "\n" + authorized(comes) + "\n",
		restricted + " a longer comment\n" + filler + "shiny " + authorized(never) + "\n",
	}
	for name, write := range map[string]func(path, text string) error{
		"rename": func(path, text string) error {
			if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
				return err
			}
			return os.Rename(path+".new", path)
		},
		"in place": func(path, text string) error { return os.WriteFile(path, []byte(text), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := keysDir(t, "alice", versions[0])
			k := &Keys{Dir: dir, Log: slog.New(slog.DiscardHandler)}
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for range 50 {
						g, err := k.Authorize("alice", stays, home, today)
						if err != nil && name == "rename" {
							t.Error(err)
						}
						if err == nil && (g.ForceCommand != "only this" || g.PTY) {
							t.Errorf("a restriction was lost: %+v", g)
						}
						if _, err := k.Authorize("alice", never, home, today); err == nil {
							t.Error("a refused line lets in")
						}
					}
				})
			}
			done := make(chan struct{})
			var writer sync.WaitGroup
			writer.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-done:
						return
					default:
					}
					if err := write(filepath.Join(dir, "alice"), versions[i%2]); err != nil {
						t.Error(err)
						return
					}
				}
			})
			wg.Wait()
			close(done)
			writer.Wait()
		})
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
