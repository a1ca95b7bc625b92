package account

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

func TestMain(m *testing.M) {
	sshtest.PrivateEtc()
	os.Exit(m.Run())
}

func TestFind(t *testing.T) {
	const passwd = "root:x:0:0:root:/root:/bin/bash\nbad:x:a:0::/:\nshort:x:1\nalice:x:1000:1001:Alice,,,:/home/alice:/bin/zsh\n"
	got, ok := find([]byte(passwd), "alice")
	if !ok || got.Name != "alice" || got.UID != 1000 || got.GID != 1001 || got.Home != "/home/alice" || got.Shell != "/bin/zsh" {
		t.Errorf("got %+v", got)
	}
	for _, name := range []string{"", "bad", "short", "x", "nobody:"} {
		if a, ok := find([]byte(passwd), name); ok {
			t.Errorf("%q: %v", name, a)
		}
		if a, err := Lookup("no-such-" + name); !errors.Is(err, ErrUnknown) {
			t.Errorf("%v, %v", a, err)
		}
	}
	for _, name := range []string{"", "-x", "a:b", "a\nb"} {
		if a, err := Lookup(name); !errors.Is(err, ErrUnknown) {
			t.Errorf("%q: %v, %v", name, a, err)
		}
	}
}

func TestLookupGroup(t *testing.T) {
	if gid, err := LookupGroup("audio"); err != nil || gid != 29 { // in each Debian
		t.Errorf("audio: %d, %v", gid, err)
	}
	for _, name := range []string{"", "-x", "a:b", "a\nb", "no-such-group"} {
		if gid, err := LookupGroup(name); err == nil {
			t.Errorf("%q: %d", name, gid)
		}
	}
	const group = "root:x:0:\nbad:x:a:\nshort:x:1\nsudo:x:27:alice,bob"
	if gid, ok := findGroup([]byte(group), "sudo"); !ok || gid != 27 {
		t.Errorf("sudo: %d, %v", gid, ok)
	}
	for _, name := range []string{"", "bad", "short", "alice", "27"} {
		if gid, ok := findGroup([]byte(group), name); ok {
			t.Errorf("%q: %d", name, gid)
		}
	}
}

// TestLookup changes an account. Each lookup must return its current groups, shell and day
// of expiry.
func TestLookup(t *testing.T) {
	added := sshtest.NewAccount(t)
	run := func(name string, args ...string) {
		t.Helper()
		if err := sshtest.Run(name, append(args, added.Name)...); err != nil {
			t.Fatal(err)
		}
	}
	a, err := Lookup(added.Name)
	if err != nil || a.UID != added.UID || a.GID != added.GID || a.Home != added.Home || a.Shell != "/bin/bash" || !slices.Equal(a.Groups, []uint32{added.GID}) {
		t.Fatalf("%+v, %v", a, err)
	}
	if err := a.MayLogin(time.Now()); err != nil {
		t.Error(err)
	}
	run("usermod", "-a", "-G", "audio,video", "-s", "/usr/sbin/nologin")
	if a, err = Lookup(added.Name); err != nil || len(a.Groups) != 3 || a.Shell != "/usr/sbin/nologin" {
		t.Errorf("%+v, %v", a, err)
	}
	run("chage", "-E", "2030-01-02")
	if err := a.MayLogin(time.Date(2030, 1, 1, 23, 59, 59, 0, time.UTC)); err != nil {
		t.Errorf("before its last day: %v", err)
	}
	var denied *DeniedError
	if err := a.MayLogin(time.Date(2030, 1, 2, 0, 0, 0, 0, time.UTC)); !errors.Is(err, ErrExpired) || !errors.As(err, &denied) || denied.Text == "" {
		t.Errorf("on the day: %v", err)
	}
	run("chage", "-E", "0")
	if err := a.MayLogin(time.Now()); !errors.Is(err, ErrExpired) {
		t.Errorf("expired in 1970: %v", err)
	}
	run("chage", "-E", "-1")
	run("usermod", "-L")
	if err := a.MayLogin(time.Now()); err != nil {
		t.Errorf("with a locked password: %v", err)
	}
	run("userdel")
	if _, err := Lookup(added.Name); !errors.Is(err, ErrUnknown) {
		t.Errorf("deleted: %v", err)
	}
}

// TestDirectoryService looks up an account and groups that are in no file of /etc, as a
// build without cgo must, too. libnss-extrausers takes the place of a directory service.
func TestDirectoryService(t *testing.T) {
	if !sshtest.HasPrivateEtc() {
		t.Skip("changes /etc/nsswitch.conf")
	}
	if _, err := os.Stat("/usr/lib/libnss_extrausers.so.2"); err != nil {
		t.Skip("libnss-extrausers is not installed")
	}
	const dir, switches = "/var/lib/extrausers", "/etc/nsswitch.conf"
	before, err := os.ReadFile(switches)
	if err != nil {
		t.Fatal(err)
	}
	if err := sshtest.Run("mount", "-t", "tmpfs", "-o", "mode=755", "test", dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		os.WriteFile(switches, before, 0o644)
		if err := sshtest.Run("umount", dir); err != nil {
			t.Error(err)
		}
	}()
	for file, text := range map[string]string{
		dir + "/passwd": "dir-alice:x:23000:23001::/home/dir-alice:/bin/dash\n",
		dir + "/group":  "dir-alice:x:23001:\ndir-staff:x:23002:dir-alice\n",
		dir + "/shadow": "dir-alice:*:1:0:99999:7::20000:\n",
		switches:        "passwd: files extrausers\ngroup: files extrausers\nshadow: files extrausers\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	a, err := Lookup("dir-alice")
	if err != nil || a.UID != 23000 || a.GID != 23001 || a.Shell != "/bin/dash" || !slices.Equal(a.Groups, []uint32{23001, 23002}) {
		t.Errorf("%+v, %v", a, err)
	}
	if err := a.MayLogin(time.Unix(20000*24*60*60, 0)); !errors.Is(err, ErrExpired) {
		t.Errorf("after its day of expiry: %v", err)
	}
	if err := a.MayLogin(time.Unix(20000*24*60*60-1, 0)); err != nil {
		t.Errorf("before its day of expiry: %v", err)
	}
	if !inGroup("dir-staff", a.Groups) || inGroup("dir-other", a.Groups) {
		t.Error("inGroup does not find the groups of the directory service")
	}
}

func TestNologin(t *testing.T) {
	defer func(shadow string, files []string) { shadowFile, nologinFiles = shadow, files }(shadowFile, nologinFiles)
	dir := t.TempDir()
	shadowFile, nologinFiles = filepath.Join(dir, "shadow"), []string{filepath.Join(dir, "first"), filepath.Join(dir, "nologin")}
	alice, root := Account{Name: "alice", UID: 1000}, Account{Name: "root"}
	if err := alice.MayLogin(time.Now()); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(nologinFiles[1], []byte("Back at noon.\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var denied *DeniedError
	if err := alice.MayLogin(time.Now()); !errors.Is(err, ErrNologin) || !errors.As(err, &denied) || denied.Text != "Back at noon.\n" {
		t.Errorf("%v, %+v", err, denied)
	}
	if err := root.MayLogin(time.Now()); err != nil {
		t.Errorf("root: %v", err)
	}
	if err := os.Mkdir(nologinFiles[0], 0o700); err != nil { // exists, but cannot be read
		t.Fatal(err)
	}
	if err := alice.MayLogin(time.Now()); !errors.Is(err, ErrNologin) || !errors.As(err, &denied) || denied.Text == "" {
		t.Errorf("a file that cannot be read: %v, %+v", err, denied)
	}
}

func TestFindExpiry(t *testing.T) {
	const shadow = "root:*:19000:0:99999:7:::\nalice:!:1:0:99999:7::20000:\nbob:x:1:0:9:7::-1:\ncarol:x:1:0:9:7::soon:\ndave:x:1\nalice:x:1:1:1:1:1:1:\n"
	for name, want := range map[string]int64{"root": -1, "alice": 20000, "bob": -1, "carol": -1, "dave": -1, "": -1} {
		if got, _ := findExpiry([]byte(shadow), name); got != want {
			t.Errorf("%s: %d, want %d", name, got, want)
		}
	}
}

func parse(a Account, text string) (Limits, []string, error) {
	p := limitsParser{account: a, inGroup: func(name string, gids []uint32) bool { return name == "staff" && slices.Contains(gids, 50) }}
	if p.parse("f", text) {
		return Limits{}, p.problems, p.err
	}
	return p.limits(), p.problems, p.err
}

func TestParseLimits(t *testing.T) {
	alice := Account{Name: "alice", UID: 1000, GID: 100, Groups: []uint32{100, 50}}
	root := Account{Name: "root"}
	one := func(resource int, soft, hard int64) []Limit {
		l := Limit{Resource: resource}
		if soft >= 0 {
			l.Soft, l.SetSoft = uint64(soft), true
		}
		if hard >= 0 {
			l.Hard, l.SetHard = uint64(hard), true
		}
		return []Limit{l}
	}
	for _, tt := range []struct {
		text string
		a    Account
		want Limits
	}{
		{"", alice, Limits{}},
		{"# alice hard nproc 1\n\n  \t\n", alice, Limits{}},
		{"alice hard nproc 20 # few\n", alice, Limits{Resources: one(unix.RLIMIT_NPROC, -1, 20)}},
		{"alice\tsoft\tnproc\t20", alice, Limits{Resources: one(unix.RLIMIT_NPROC, 20, -1)}},
		{"* - core 0", alice, Limits{Resources: one(unix.RLIMIT_CORE, 0, 0)}},
		{"* - core 0", root, Limits{}},
		{"@root - core 0\n0:0 - core 0", root, Limits{}},
		{"root - core 0", root, Limits{Resources: one(unix.RLIMIT_CORE, 0, 0)}},
		{"bob - core 0", alice, Limits{}},
		{"@staff hard fsize 3", alice, Limits{Resources: one(unix.RLIMIT_FSIZE, -1, 3072)}},
		{"@adm hard fsize 3", alice, Limits{}},
		{"%staff hard fsize 3", alice, Limits{}},
		// The more specific line applies, then the later one.
		{"alice hard nproc 1\n@staff hard nproc 2\n* hard nproc 3\n", alice, Limits{Resources: one(unix.RLIMIT_NPROC, -1, 1)}},
		{"* hard nproc 3\n@staff hard nproc 2\n", alice, Limits{Resources: one(unix.RLIMIT_NPROC, -1, 2)}},
		{"* hard nproc 3\n* hard nproc 4\n", alice, Limits{Resources: one(unix.RLIMIT_NPROC, -1, 4)}},
		// User and group ids.
		{"1000:1000 soft cpu 2", alice, Limits{Resources: one(unix.RLIMIT_CPU, 120, -1)}},
		{"1000: soft cpu 2", alice, Limits{Resources: one(unix.RLIMIT_CPU, 120, -1)}},
		{":1000 soft cpu 2", alice, Limits{Resources: one(unix.RLIMIT_CPU, 120, -1)}},
		{":1001 soft cpu 2\n1001: soft cpu 3\n: soft cpu 4\n", alice, Limits{}},
		{"@50:60 soft cpu 2", alice, Limits{Resources: one(unix.RLIMIT_CPU, 120, -1)}},
		{"@:51 soft cpu 2", alice, Limits{}},
		// Values.
		{"alice hard stack unlimited", alice, Limits{Resources: []Limit{{Resource: unix.RLIMIT_STACK, Hard: Unlimited, SetHard: true}}}},
		{"alice hard as 18446744073709551615", alice, Limits{Resources: []Limit{{Resource: unix.RLIMIT_AS, Hard: Unlimited, SetHard: true}}}},
		{"alice - nice -5", alice, Limits{Resources: one(unix.RLIMIT_NICE, 25, 25)}},
		{"alice - nice 30", alice, Limits{Resources: one(unix.RLIMIT_NICE, 1, 1)}},
		{"alice - priority 7\nalice - nonewprivs 1", alice, Limits{Priority: 7, SetPriority: true, NoNewPrivs: true}},
		{"* - priority -99\n* - nonewprivs 1\nalice - nonewprivs 0", alice, Limits{Priority: -20, SetPriority: true}},
		// No limits at all.
		{"alice hard nproc 1\nalice -\n@staff hard nproc 5", alice, Limits{}},
		{"* hard nproc 1\n@staff -", alice, Limits{}},
	} {
		got, problems, err := parse(tt.a, tt.text)
		if err != nil || len(problems) > 0 || !slices.Equal(got.Resources, tt.want.Resources) ||
			got.Priority != tt.want.Priority || got.SetPriority != tt.want.SetPriority || got.NoNewPrivs != tt.want.NoNewPrivs {
			t.Errorf("%q for %s:\n got %+v, %q, %v\nwant %+v", tt.text, tt.a.Name, got, problems, err, tt.want)
		}
	}
	for _, text := range []string{"alice hard nproc", "alice", "alice hard nproc 1 2", "alice firm nproc 1", "alice hard procs 1", "alice hard nproc many", "alice hard nproc -2",
		"alice hard maxlogins 3", "alice - priority x", "alice - nonewprivs 2", "* -", "alice hard nproc 99999999999999999999"} {
		if got, problems, err := parse(alice, text); err != nil || len(problems) != 1 || !strings.HasPrefix(problems[0], "f:1: ") || len(got.Resources) > 0 {
			t.Errorf("%q: %+v, %q, %v", text, got, problems, err)
		}
	}
	if _, _, err := parse(alice, "* - chroot /jail"); err == nil {
		t.Error("a chroot for the account was ignored")
	}
	if _, _, err := parse(alice, "bob - chroot /jail"); err != nil {
		t.Errorf("a chroot for another account: %v", err)
	}
}

// TestLimits reads the files in /etc.
func TestLimits(t *testing.T) {
	a, err := Lookup(sshtest.NewAccount(t, "-G", "audio").Name)
	if err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{
		limitsFile:                        "* hard nofile 999\n* hard nproc 77\n",
		"/etc/security/limits.d/a.conf":   "@audio soft nproc 55\n",
		"/etc/security/limits.d/b.conf":   "* hard nproc 66\nx\n",
		"/etc/security/limits.d/c.ignore": "* hard nproc 1\n",
	} {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(file)
	}
	l, problems, err := a.Limits()
	if err != nil || len(problems) != 0 {
		t.Errorf("%q, %v", problems, err)
	}
	var files, procs Limit
	for _, r := range l.Resources {
		switch r.Resource {
		case unix.RLIMIT_NOFILE:
			files = r
		case unix.RLIMIT_NPROC:
			procs = r
		}
	}
	if want := (Limit{unix.RLIMIT_NPROC, 55, 66, true, true}); procs != want {
		t.Errorf("nproc: %+v, want %+v", procs, want)
	}
	// The soft limit must be that of a shell, not the raised one of this Go program.
	if files.Hard != 999 || !files.SetSoft || files.Soft == 0 {
		t.Errorf("nofile: %+v", files)
	}
}

func FuzzParseLimits(f *testing.F) {
	for _, text := range []string{"* hard nproc 1\n@staff - core unlimited\n", "alice -\n", "1:2 soft as -1\n@:5 hard cpu 9", "%x - maxlogins 1", "alice - priority -20\n* - chroot /"} {
		f.Add("alice", uint32(1000), text)
	}
	f.Fuzz(func(t *testing.T, name string, uid uint32, text string) {
		l, _, _ := parse(Account{Name: name, UID: uid, GID: 50}, text)
		for i, r := range l.Resources {
			if r.Resource < 0 || r.Resource > 15 || !r.SetSoft && !r.SetHard || i > 0 && r.Resource <= l.Resources[i-1].Resource {
				t.Errorf("%+v", l.Resources)
			}
			if r.Resource == unix.RLIMIT_NICE && (r.Soft > 40 || r.Hard > 40) {
				t.Errorf("nice: %+v", r)
			}
		}
		if l.Priority < -20 || l.Priority > 19 {
			t.Errorf("priority %d", l.Priority)
		}
	})
}

func FuzzFind(f *testing.F) {
	f.Add("alice:x:1000:1000::/home/alice:/bin/sh\n", "alice")
	f.Add("alice:!:1:0:99999:7::20000:\n", "alice")
	f.Fuzz(func(t *testing.T, text, name string) {
		if a, ok := find([]byte(text), name); ok && a.Name != name {
			t.Errorf("find(%q) = %+v", name, a)
		}
		if day, _ := findExpiry([]byte(text), name); day < -1 {
			t.Errorf("day %d", day)
		}
	})
}
