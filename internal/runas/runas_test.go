package runas

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/account"
)

// TestMain makes the test binary two other programs: the one that changes its user, and,
// with "report", one that prints its own credentials, limits and files.
func TestMain(m *testing.M) {
	Init()
	if len(os.Args) > 1 && os.Args[1] == "report" {
		json.NewEncoder(os.Stdout).Encode(newReport())
		os.Exit(0)
	}
	if len(os.Args) > 1 && os.Args[1] == "leave-keyring" {
		if err := LeaveKeyring(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		json.NewEncoder(os.Stdout).Encode(newReport())
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A report describes the process that makes it.
type report struct {
	UIDs, GIDs, Groups string // of /proc/self/status
	Caps               []string
	NoNewPrivs         string
	LoginUID           string
	Args, Env          []string
	Dir                string
	Files              []string // descriptors from Start that are still open, and their targets
	OpenFiles, Core    syscall.Rlimit
	Nice               int
	Keyring            int
}

func newReport() report {
	status, _ := os.ReadFile("/proc/self/status")
	r := report{Args: os.Args, Env: os.Environ()}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		switch {
		case name == "Uid":
			r.UIDs = value
		case name == "Gid":
			r.GIDs = value
		case name == "Groups":
			r.Groups = value
		case name == "NoNewPrivs":
			r.NoNewPrivs = value
		case strings.HasPrefix(name, "Cap") && name != "CapBnd":
			r.Caps = append(r.Caps, value)
		}
	}
	login, _ := os.ReadFile("/proc/self/loginuid")
	r.LoginUID = strings.TrimSpace(string(login))
	r.Dir, _ = os.Getwd()
	for fd := 3; fd < 100; fd++ {
		to, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		if strings.HasPrefix(to, "/memfd:") || strings.HasPrefix(to, "pipe:") { // as Start makes
			r.Files = append(r.Files, fmt.Sprint(fd, " ", to))
		}
	}
	// From a child, since a Go program raises its own soft limit.
	out, _ := exec.Command("/bin/sh", "-c", "ulimit -Sn; ulimit -Hn").Output()
	fmt.Sscan(string(out), &r.OpenFiles.Cur, &r.OpenFiles.Max)
	syscall.Getrlimit(syscall.RLIMIT_CORE, &r.Core)
	nice, _ := unix.Getpriority(unix.PRIO_PROCESS, 0)
	r.Nice = 20 - nice
	r.Keyring, _ = unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
	return r
}

// program copies the test binary to a path where every user can execute it.
func program(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "runas-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	var text []byte
	if err == nil {
		text, err = os.ReadFile(self)
	}
	path := filepath.Join(dir, "program")
	if err == nil {
		err = os.WriteFile(path, text, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// fork returns a function for Start, and the command that it starts. The command's output
// goes to out. Descriptors 3 and 4 would leak into the program if Start did not close them.
func fork(out *os.File) (func(string, []string, [2]*os.File) error, *exec.Cmd) {
	cmd := &exec.Cmd{}
	return func(path string, argv []string, files [2]*os.File) error {
		cmd.Path, cmd.Args, cmd.Env, cmd.ExtraFiles = path, argv, []string{}, files[:]
		cmd.Stdout, cmd.Stderr = out, os.Stderr
		return cmd.Start()
	}, cmd
}

// runReport runs p, which must be the test binary with the argument "report".
func runReport(t *testing.T, p Program) report {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	start, cmd := fork(w)
	err = p.Start(t.Context(), start)
	w.Close()
	if err != nil {
		if cmd.Process != nil {
			cmd.Wait()
		}
		t.Fatal(err)
	}
	var got report
	if err := json.NewDecoder(r).Decode(&got); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	return got
}

// me returns a user that this process may run programs as: another one if it is root, or
// itself.
func me() User {
	if os.Geteuid() == 0 {
		return User{UID: 23456, GID: 23457, Groups: []uint32{23457, 23458, 4}}
	}
	return User{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
}

func TestProgram(t *testing.T) {
	path := program(t)
	u := me()
	p := Program{
		User: u, Dir: "/tmp", Path: path,
		Argv:  []string{"-name", "report", "\xff\n\"", ""},
		Env:   []string{"A=\xfe b", "EMPTY="},
		Login: true,
	}
	got := runReport(t, p)
	same := func(id uint32) string { return strings.Join(slices.Repeat([]string{fmt.Sprint(id)}, 4), "\t") }
	if got.UIDs != same(u.UID) || got.GIDs != same(u.GID) {
		t.Errorf("uids %s, gids %s", got.UIDs, got.GIDs)
	}
	if os.Geteuid() == 0 {
		if got.Groups != "4 23457 23458" {
			t.Errorf("groups %s", got.Groups)
		}
		// The kernel may be built without audit, or a container may forbid the change.
		if got.LoginUID != fmt.Sprint(u.UID) && got.LoginUID != newReport().LoginUID {
			t.Errorf("login uid %s", got.LoginUID)
		}
	}
	for _, set := range got.Caps {
		if strings.Trim(set, "0") != "" {
			t.Errorf("capabilities %v", got.Caps)
		}
	}
	if got.NoNewPrivs != "0" {
		t.Error("no_new_privs is set: sudo would not work")
	}
	if len(got.Files) > 0 {
		t.Errorf("descriptors %q", got.Files)
	}
	// JSON cannot carry invalid UTF-8. A test in package agent, with a shell, checks
	// those bytes.
	if len(got.Args) != 4 || got.Args[0] != "-name" || got.Args[3] != "" || len(got.Env) != 2 || got.Env[1] != "EMPTY=" {
		t.Errorf("arguments %q, environment %q", got.Args, got.Env)
	}
	if got.Dir != "/tmp" {
		t.Errorf("working directory %s", got.Dir)
	}
	if mine := newReport(); got.OpenFiles != mine.OpenFiles || got.Core != mine.Core || got.Nice != mine.Nice {
		t.Errorf("limits %+v %+v %d; this process has %+v %+v %d", got.OpenFiles, got.Core, got.Nice, mine.OpenFiles, mine.Core, mine.Nice)
	}
}

func TestLimits(t *testing.T) {
	got := runReport(t, Program{User: me(), Path: program(t), Argv: []string{"x", "report"}, Limits: account.Limits{
		Resources: []account.Limit{
			{Resource: unix.RLIMIT_NOFILE, Soft: 50, SetSoft: true, Hard: 60, SetHard: true},
			// A hard limit of 0 is a limit. A soft limit is lowered to the hard one.
			{Resource: unix.RLIMIT_CORE, Soft: 7, SetSoft: true, Hard: 0, SetHard: true},
		},
		Priority: 3, SetPriority: true,
		NoNewPrivs: true,
	}})
	if want := (syscall.Rlimit{Cur: 50, Max: 60}); got.OpenFiles != want {
		t.Errorf("files: %+v, want %+v", got.OpenFiles, want)
	}
	if got.Core != (syscall.Rlimit{}) {
		t.Errorf("core: %+v", got.Core)
	}
	if got.Nice != 3 || got.NoNewPrivs != "1" {
		t.Errorf("nice %d, no_new_privs %s", got.Nice, got.NoNewPrivs)
	}
}

// TestKeyring checks that each program has a session keyring of its own.
func TestKeyring(t *testing.T) {
	mine, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, true)
	if err != nil {
		t.Skip("there are no keyrings: ", err)
	}
	p := Program{User: me(), Path: program(t), Argv: []string{"x", "report"}}
	one, two := runReport(t, p).Keyring, runReport(t, p).Keyring
	if one == 0 || one == mine || one == two || two == mine {
		t.Errorf("session keyrings %d and %d; this process has %d", one, two, mine)
	}
	out, err := exec.Command(p.Path, "leave-keyring").Output()
	var left report
	if err == nil {
		err = json.Unmarshal(out, &left)
	}
	if err != nil || left.Keyring == mine || slices.Contains(left.Env, "SALLYPORT_KEYRING_LEFT=1") || !reflect.DeepEqual(left.Args, []string{p.Path, "leave-keyring"}) {
		t.Errorf("after LeaveKeyring: %+v, %v", left, err)
	}
}

func TestFailures(t *testing.T) {
	root := os.Geteuid() == 0
	if !root {
		p := Program{User: User{UID: 1<<31 - 2}, Path: "/bin/true", Argv: []string{"true"}}
		start, cmd := fork(nil)
		if err := p.Start(t.Context(), start); err != syscall.EPERM {
			t.Errorf("another user: %v", err)
		}
		cmd.Wait()
	}
	for name, tt := range map[string]struct {
		path, dir string
		want      error
	}{
		"no such program":     {"/no/such", "/", syscall.ENOENT},
		"not a program":       {"/etc/passwd", "/", syscall.EACCES},
		"no such directory":   {"/bin/true", "/no/such", syscall.ENOENT},
		"a directory of root": {"/bin/true", "/proc/1/fd", syscall.EACCES},
	} {
		p := Program{User: me(), Path: tt.path, Dir: tt.dir, Argv: []string{"x"}}
		start, cmd := fork(nil)
		if err := p.Start(t.Context(), start); err != tt.want {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
		// The child exits by itself.
		if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 127 {
			t.Errorf("%s: the child ended with %v", name, err)
		}
	}
	errFork := errors.New("cannot fork")
	err := Program{User: me()}.Start(t.Context(), func(string, []string, [2]*os.File) error { return errFork })
	if err != errFork {
		t.Errorf("%v, want %v", err, errFork)
	}
}

// TestStoppedChild stops the child before it has executed its program, as its user may do.
// The end of the context must end Start, and the child must still run its program when it
// is continued.
func TestStoppedChild(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	errStopped := errors.New("the child is stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	start, cmd := fork(w)
	p := Program{User: me(), Path: "/bin/echo", Argv: []string{"echo", "here"}}
	err = p.Start(ctx, func(path string, argv []string, files [2]*os.File) error {
		if err := start(path, argv, files); err != nil {
			return err
		}
		// In time: the Go runtime of the child has not started yet.
		if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			return err
		}
		for !strings.Contains(state(cmd.Process.Pid), "T") {
			time.Sleep(time.Millisecond)
		}
		time.AfterFunc(10*time.Millisecond, func() { cancel(errStopped) })
		return nil
	})
	w.Close()
	if err != errStopped {
		t.Errorf("%v, want %v", err, errStopped)
	}
	cmd.Process.Signal(syscall.SIGCONT)
	if out, err := io.ReadAll(r); string(out) != "here\n" || err != nil {
		t.Errorf("%q, %v", out, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// state returns the state of a process: R, S, T and so on (proc(5)).
func state(pid int) string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.SplitN(rest, " ", 2)[0]
}

// TestKilledChild kills the child before it has executed its program. Start returns nil;
// the wait status has the signal.
func TestKilledChild(t *testing.T) {
	start, cmd := fork(nil)
	err := Program{User: me(), Path: "/bin/true", Argv: []string{"true"}}.Start(t.Context(), func(path string, argv []string, files [2]*os.File) error {
		err := start(path, argv, files)
		if err == nil {
			err = cmd.Process.Kill()
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if cmd.Wait(); cmd.ProcessState.ExitCode() != -1 {
		t.Errorf("the child ended with %v", cmd.ProcessState)
	}
}

// TestOwnership checks that the files in /proc of the program belong to the user, so that
// gdb(1) can trace it.
func TestOwnership(t *testing.T) {
	u := me()
	start, cmd := fork(nil)
	if err := (Program{User: u, Path: "/bin/sleep", Argv: []string{"sleep", "600"}}).Start(t.Context(), start); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	if info, err := os.Stat(fmt.Sprintf("/proc/%d/mem", cmd.Process.Pid)); err != nil || info.Sys().(*syscall.Stat_t).Uid != u.UID {
		t.Errorf("%+v, %v", info, err)
	}
}
