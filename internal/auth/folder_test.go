package auth

import (
	"bytes"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestCheckName(t *testing.T) {
	t.Parallel()
	for _, name := range []string{
		"alice", "first.last", "first.m.last", "alice@example.com", "a_b-c", "R2D2", "alice.2", "alice-old", "new", "bak", "old.alice",
		"ellen.key", "anna.lock", "x.12345", strings.Repeat("a", 64),
	} {
		if err := checkName(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{
		"alice.bak", "alice.BAK", "alice.disabled", "alice.old", "alice.orig", "alice.rej", "alice.swp", "alice.rpmsave", "alice.rpmnew",
		"alice.dpkg-old", "alice.dpkg-dist", "alice.dpkg-new", "alice.ucf-dist", "alice.pacsave", "alice.tmp", "alice.pub",
		"alice.bak.1", "alice.old.2", "first.last.bak", "alice.20260101", "alice.2026-01-01", "alice.1764547200",
		"alice~", "#alice#", ".alice.swp", "alice.~1~", "alice (copy)", "alice,v", "-alice", "..", "a..b", "", "a/b", "a b", "é",
		strings.Repeat("a", 65),
	} {
		if checkName(name) == nil {
			t.Errorf("%q is a user", name)
		}
	}
}

func FuzzCheckName(f *testing.F) {
	f.Add("first.last")
	f.Add("alice.bak")
	f.Fuzz(func(t *testing.T, name string) {
		if checkName(name) != nil {
			return
		}
		if filepath.Base(name) != name || name == "." || name == ".." || strings.ContainsAny(name, "\x00+~#/ ") {
			t.Errorf("%q is a user", name)
		}
		if checkName(name+".bak") == nil {
			t.Errorf("%q is a user", name+".bak")
		}
	})
}

// TestBackupFiles: keys in a backup file grant no login, neither for the user whose
// file it was nor for the name of the backup, and the log has it once per change.
func TestBackupFiles(t *testing.T) {
	t.Parallel()
	key, other := edKey(1), edKey(2)
	dir := keysDir(t, "alice", authorized(other), "alice.bak", authorized(key), "bob.disabled", authorized(key))
	principals := keysDir(t, "carol.rpmsave", "carol")
	var log bytes.Buffer
	k := &Keys{Dir: dir, AuthorizedPrincipalsDir: principals, Log: slog.New(slog.NewTextHandler(&log, nil))}
	k.LogMisnamed()
	for range 3 {
		for _, user := range []string{"alice", "alice.bak", "bob", "bob.disabled"} {
			if _, err := k.Authorize(user, key, home, today); err == nil {
				t.Errorf("%s got in", user)
			}
		}
		if _, err := k.Authorize("alice", other, home, today); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"alice.bak", "bob.disabled", "carol.rpmsave"} {
		if n := strings.Count(log.String(), name+": this file is ignored"); n != 1 {
			t.Errorf("%s is logged %d times", name, n)
		}
	}
	replace(t, filepath.Join(dir, "dave~"), "")
	k.Authorize("alice", other, home, today)
	if !strings.Contains(log.String(), "dave~") {
		t.Error("a later file is not logged")
	}
	secrets := keysDir(t, "alice", "nonsense", "bob.old", "nonsense")
	problems := (&TOTP{Dir: secrets}).Problems()
	if len(problems) != 2 || !strings.Contains(problems[1].Error(), "bob.old: this file is ignored") {
		t.Errorf("%v", problems)
	}
}

// TestTooLong: a file that is too long is logged.
func TestTooLong(t *testing.T) {
	t.Parallel()
	key := edKey(1)
	dir := keysDir(t, "alice", authorized(key)+"\n"+strings.Repeat("#", maxFile)+"\n")
	var log bytes.Buffer
	k := &Keys{Dir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))}
	if _, err := k.Authorize("alice", key, home, today); err == nil {
		t.Error("alice got in")
	}
	const want = "longer than 1048576 bytes, so nothing in it counts"
	if problems := Check(dir); len(problems) != 1 || !strings.Contains(problems[0].Error(), want) {
		t.Errorf("%v", problems)
	}
	if !strings.Contains(log.String(), want) {
		t.Errorf("the log has %s", log.String())
	}
}

// TestLinks: a link may lead anywhere, if no other user can have chosen the file.
func TestLinks(t *testing.T) {
	t.Parallel()
	key := edKey(1)
	tests := []struct {
		name    string
		prepare func(t *testing.T, dir, out string) (target string)
		wantErr string
	}{
		{"out of the folder", func(t *testing.T, dir, out string) string {
			replace(t, filepath.Join(out, "keys"), authorized(key))
			return filepath.Join(out, "keys")
		}, ""},
		{"relative", func(t *testing.T, dir, out string) string {
			replace(t, filepath.Join(out, "keys"), authorized(key))
			target, err := filepath.Rel(dir, filepath.Join(out, "keys"))
			if err != nil {
				t.Fatal(err)
			}
			return target
		}, ""},
		{"of links", func(t *testing.T, dir, out string) string {
			replace(t, filepath.Join(out, "keys"), authorized(key))
			symlink(t, ".", filepath.Join(out, "here"))
			symlink(t, filepath.Join(out, "here", "here"), filepath.Join(dir, ".data"))
			return ".data/./keys"
		}, ""},
		{"through a folder of others", func(t *testing.T, dir, out string) string {
			sub := filepath.Join(out, "sub")
			mkdir(t, sub, 0o777)
			mkdir(t, filepath.Join(sub, "deep"), 0o755)
			replace(t, filepath.Join(sub, "deep", "keys"), authorized(key))
			return filepath.Join(sub, "deep", "keys")
		}, "sub: mode 0777 lets others write to it"},
		{"through a sticky folder", func(t *testing.T, dir, out string) string {
			sub := filepath.Join(out, "sub")
			mkdir(t, sub, 0o777|os.ModeSticky)
			replace(t, filepath.Join(sub, "keys"), authorized(key))
			return filepath.Join(sub, "keys")
		}, ""},
		{"to a file that others can write to", func(t *testing.T, dir, out string) string {
			replace(t, filepath.Join(out, "keys"), authorized(key))
			if err := os.Chmod(filepath.Join(out, "keys"), 0o666); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(out, "keys")
		}, "mode 0666 lets others write to it"},
		{"of another", func(t *testing.T, dir, out string) string {
			replace(t, filepath.Join(out, "keys"), authorized(key))
			link := filepath.Join(dir, ".theirs")
			symlink(t, filepath.Join(out, "keys"), link)
			chown(t, link)
			return ".theirs"
		}, ".theirs: belongs to uid 54321"},
		{"through another's folder", func(t *testing.T, dir, out string) string {
			sub := filepath.Join(out, "sub")
			mkdir(t, sub, 0o755)
			replace(t, filepath.Join(sub, "keys"), authorized(key))
			chown(t, sub)
			return filepath.Join(sub, "keys")
		}, "sub: belongs to uid 54321"},
		{"to another's file", func(t *testing.T, dir, out string) string {
			replace(t, filepath.Join(out, "keys"), authorized(key))
			chown(t, filepath.Join(out, "keys"))
			return filepath.Join(out, "keys")
		}, "belongs to uid 54321"},
		{"to a folder", func(t *testing.T, dir, out string) string { return out }, "not a regular file"},
		{"through a file", func(t *testing.T, dir, out string) string {
			replace(t, filepath.Join(out, "keys"), authorized(key))
			return filepath.Join(out, "keys", "more")
		}, "not a directory"},
		{"to itself", func(t *testing.T, dir, out string) string { return "alice" }, "too many levels of symbolic links"},
		{"to nothing", func(t *testing.T, dir, out string) string { return "/nowhere/at/all" }, "no line of alice's"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir, out := keysDir(t), keysDir(t)
			symlink(t, tt.prepare(t, dir, out), filepath.Join(dir, "alice"))
			_, err := (&Keys{Dir: dir}).Authorize("alice", key, home, today)
			if tt.wantErr == "" && err != nil || tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)) {
				t.Errorf("error %v, want %q", err, tt.wantErr)
			}
		})
	}
}

func symlink(t *testing.T, target, link string) {
	t.Helper()
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
}

func mkdir(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// chown gives a file, or a link, to another user.
func chown(t *testing.T, path string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := os.Lchown(path, 54321, 54321); err != nil {
		t.Fatal(err)
	}
}

// TestSecretVolume reads keys as Kubernetes mounts a Secret: read-only, with a
// folder of mode 1777, files that lead through a link ..data, and an update that
// exchanges that link.
func TestSecretVolume(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	const mark = "SALLYPORT_TEST_MOUNTS"
	if os.Getenv(mark) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestSecretVolume$", "-test.v")
		cmd.Env = append(os.Environ(), mark+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		if err != nil && len(out) == 0 {
			t.Skipf("no namespace of mounts: %v", err)
		}
		if err != nil || bytes.Contains(out, []byte("--- SKIP")) {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		t.Skip(err)
	}
	kubelet, dir := t.TempDir(), t.TempDir()
	if err := syscall.Mount("secret", kubelet, "tmpfs", 0, "mode=1777"); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { syscall.Unmount(kubelet, syscall.MNT_DETACH) })
	old, key := edKey(1), edKey(2)
	mkdir(t, filepath.Join(kubelet, "..1"), 0o755)
	replace(t, filepath.Join(kubelet, "..1", "alice"), authorized(old))
	os.Chmod(filepath.Join(kubelet, "..1", "alice"), 0o644)
	symlink(t, "..1", filepath.Join(kubelet, "..data"))
	symlink(t, "..data/alice", filepath.Join(kubelet, "alice"))

	k := &Keys{Dir: kubelet}
	if _, err := k.Authorize("alice", old, home, today); err == nil || !strings.Contains(err.Error(), "mode 1777 lets others write to it") {
		t.Errorf("where others can write: %v", err)
	}
	if err := syscall.Mount(kubelet, dir, "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	if err := syscall.Mount("", dir, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	k = &Keys{Dir: dir}
	g, err := k.Authorize("alice", old, home, today)
	if err != nil {
		t.Fatalf("on the read-only mount: %v", err)
	}
	if problems := Check(dir); len(problems) > 0 {
		t.Errorf("check: %v", problems)
	}

	mkdir(t, filepath.Join(kubelet, "..2"), 0o755)
	replace(t, filepath.Join(kubelet, "..2", "alice"), authorized(key))
	symlink(t, "..2", filepath.Join(kubelet, "..data_tmp"))
	if err := os.Rename(filepath.Join(kubelet, "..data_tmp"), filepath.Join(kubelet, "..data")); err != nil {
		t.Fatal(err)
	}
	os.RemoveAll(filepath.Join(kubelet, "..1"))
	if _, err := k.Authorize("alice", key, home, today); err != nil {
		t.Errorf("after an update: %v", err)
	}
	if _, err := k.Recheck("alice", old, home, today, g); err == nil {
		t.Error("the old key is still good")
	}
}
