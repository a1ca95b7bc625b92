package auth

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// script makes a program, which must not be one others can write.
func script(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	os.Chmod(dir, 0o755)
	os.Chmod(filepath.Dir(dir), 0o755) // independent of the umask
	path := filepath.Join(dir, "keys")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	os.Chmod(path, 0o755)
	return path
}

func me(t *testing.T) string {
	t.Helper()
	u, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	return u.Username
}

func TestCommand(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "out")
	program := script(t, `
echo "$#|$1|$2|$3|$4|$PWD|$(env | sort | grep -v '^\(PWD\|_\|SHLVL\|OLDPWD\)=' | tr '\n' ' ')" >>`+out+`
ls -l /proc/$$/fd/0 | grep -q /dev/null && echo stdin is null >>`+out+`
[ "$1" = alice ] && echo 'restrict `+authorized(edKey(1))+`' && echo '`+authorized(edKey(2))+`'
echo noise >&2
exit 0
`)
	k := &Keys{Dir: keysDir(t, "alice", authorized(edKey(3))), Command: []string{program}, CommandUser: me(t)}
	g, err := k.Authorize("alice", edKey(1), home, today)
	if err != nil || g.PTY || g.Source != "authorized_keys_command" || g.Line != "authorized_keys_command alice:1" || g.Key == "" {
		t.Errorf("%+v, %v", g, err)
	}
	if g, err := k.Authorize("alice", edKey(2), home, today); err != nil || g.Line != "authorized_keys_command alice:2" {
		t.Errorf("%+v, %v", g, err)
	}
	if _, err := k.Authorize("bob", edKey(1), home, today); err == nil {
		t.Error("bob was let in")
	}
	// The folder has this key, so nothing was asked.
	asked := readLines(t, out)
	if g, err := k.Authorize("alice", edKey(3), home, today); err != nil || g.Line != "alice:1" || len(readLines(t, out)) != len(asked) {
		t.Errorf("%+v, %v", g, err)
	}
	u, _ := user.Current()
	want := fmt.Sprintf("1|alice||||/|HOME=%s LANG=C.UTF-8 LOGNAME=%s PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin USER=%[2]s ", u.HomeDir, u.Username)
	if len(asked) != 4 || asked[0] != want || asked[1] != "stdin is null" || !strings.HasPrefix(asked[2], "1|bob|") {
		t.Errorf("it saw\n%s\nwant\n%s", strings.Join(asked, "\n"), want)
	}

	// An authority in the output is trusted for the principals of its line only.
	trusting := script(t, `echo 'cert-authority,principals="ops" `+authorized(edKey(9))+`'`)
	k = &Keys{Dir: k.Dir, Command: []string{trusting}, CommandUser: me(t)}
	cert := sign(t, func(c *ssh.Certificate) { c.ValidPrincipals = []string{"ops", "admins"} })
	if g, err := k.Authorize("alice", cert, home, today); err != nil || !slices.Equal(g.RolePrincipals, []string{"ops"}) {
		t.Errorf("%+v, %v", g, err)
	}

	// Tokens, and characters with a meaning in a shell.
	os.Remove(out)
	k = &Keys{Dir: k.Dir, Command: []string{program, "%u;$(id)", "%t", "%f %%u", "%k"}, CommandUser: me(t)}
	k.Authorize("a.b@c", edKey(1), home, today)
	asked = readLines(t, out)
	wantArgs := "4|a.b@c;$(id)|ssh-ed25519|SHA256:"
	if len(asked) == 0 || !strings.HasPrefix(asked[0], wantArgs) || !strings.Contains(asked[0], " %u|"+strings.Fields(plain)[1]+"|/|") {
		t.Errorf("it saw %q", asked)
	}
}

func readLines(t *testing.T, path string) []string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.FieldsFunc(string(data), func(r rune) bool { return r == '\n' })
}

func TestCommandRefused(t *testing.T) {
	t.Parallel()
	good := script(t, "echo '"+authorized(edKey(1))+"'")
	changed := func(change func(path string) error) string {
		path := script(t, "echo '"+authorized(edKey(1))+"'")
		if err := change(path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	tests := []struct {
		name    string
		args    []string
		user    string
		wantErr string
	}{
		{"good", []string{good}, me(t), ""},
		{"by a link", []string{changed(func(p string) error {
			if err := os.Rename(p, p+"2"); err != nil {
				return err
			}
			return os.Symlink(p+"2", p)
		})}, me(t), ""},
		{"relative", []string{"keys"}, me(t), "not an absolute path"},
		{"nowhere", []string{"/nowhere/keys"}, me(t), "no such file"},
		{"no program", []string{changed(func(p string) error { return os.Chmod(p, 0o644) })}, me(t), "not a program"},
		{"a folder", []string{filepath.Dir(good)}, me(t), "not a program"},
		{"of everybody", []string{changed(func(p string) error { return os.Chmod(p, 0o757) })}, me(t), "mode 0757 lets others write to it"},
		{"in a folder of everybody", []string{changed(func(p string) error { return os.Chmod(filepath.Dir(p), 0o777) })}, me(t), "mode 0777 lets others write to it"},
		{"without a user", []string{good}, "", "no authorized_keys_command_user"},
		{"of an unknown user", []string{good}, "nobody-of-that-name", "authorized_keys_command_user"},
		{"fails", []string{script(t, "echo '"+authorized(edKey(1))+"'; exit 3")}, me(t), "exit status 3"},
		{"dies", []string{script(t, "echo '"+authorized(edKey(1))+"'; kill -9 $$")}, me(t), "signal: killed"},
		{"prints too much", []string{script(t, "echo '"+authorized(edKey(1))+"'; exec yes")}, me(t), "prints more than 131072 bytes"},
		{"unknown token", []string{good, "%h"}, me(t), "unknown token %h"},
		{"half a token", []string{good, "%"}, me(t), "ends in %"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k := &Keys{Dir: keysDir(t), Command: tt.args, CommandUser: tt.user}
			_, err := k.Authorize("alice", edKey(1), home, today)
			if tt.wantErr == "" && err != nil || tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)) {
				t.Errorf("error %v, want %q", err, tt.wantErr)
			}
		})
	}
	if os.Geteuid() == 0 {
		path := changed(func(p string) error { return os.Chown(p, 12345, -1) })
		if err := checkPath(path); err == nil || !strings.Contains(err.Error(), "belongs to uid 12345") {
			t.Errorf("a program of another user: %v", err)
		}
	}
}

// TestCommandAsAnother runs it as an account that can do nothing.
func TestCommandAsAnother(t *testing.T) {
	t.Parallel()
	other := sshtest.NewAccount(t)
	who := strings.Join([]string{other.Name, other.Home, other.Name}, " ")
	k := &Keys{Dir: keysDir(t), Command: []string{script(t, `[ "$(id -un) $HOME $USER" = "`+who+`" ] && echo '`+authorized(edKey(1))+"'")}, CommandUser: other.Name}
	if _, err := k.Authorize("alice", edKey(1), home, today); err != nil {
		t.Error(err)
	}
}

// TestCommandIsKilled is about programs that do not end, and those that leave
// others behind.
func TestCommandIsKilled(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, text string
		killed     bool // because of the time it takes
	}{
		{"hangs", "sleep 1000 & echo $! >$1; wait", true},
		{"hangs and is deaf", "trap '' TERM HUP INT; sleep 1000 & echo $! >$1; wait", true},
		{"closes its output and hangs", "sleep 1000 & echo $! >$1; exec >&-; wait", true},
		{"leaves a child with its output", "sleep 1000 & echo $! >$1", true},
		{"leaves a child without", "sleep 1000 >/dev/null & echo $! >$1", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			pidFile := filepath.Join(t.TempDir(), "pid")
			k := &Keys{Command: []string{script(t, tt.text), pidFile}, CommandUser: me(t)}
			ctx := t.Context()
			if tt.killed {
				ctx = whenWritten(ctx, pidFile)
			}
			_, err := k.runCommand(ctx, "alice", edKey(1), answer{})
			if killed := err != nil && strings.Contains(err.Error(), "exceeded the timeout"); killed != tt.killed {
				t.Errorf("error %v", err)
			}
			pid, err := strconv.Atoi(strings.TrimSpace(strings.Join(readLines(t, pidFile), "")))
			if err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(time.Minute); alive(pid); time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					syscall.Kill(pid, syscall.SIGKILL)
					t.Fatal("its child lives on")
				}
			}
		})
	}
}

// whenWritten returns a context that ends when there is a line in a file: a timeout
// for a program that has come as far as that, however slow the machine is.
func whenWritten(ctx context.Context, file string) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	go func() { // ends with the test at the latest
		defer cancel()
		for ctx.Err() == nil {
			if text, _ := os.ReadFile(file); strings.HasSuffix(string(text), "\n") {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	return ctx
}

// alive reports whether the process runs. A zombie does not.
func alive(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	return fields[0] != "Z"
}

// TestCommandEscapes is about a child that has left the process group with the
// output open: it cannot be killed with the group, and must not block the lookup.
func TestCommandEscapes(t *testing.T) {
	t.Parallel()
	pidFile := filepath.Join(t.TempDir(), "pid")
	k := &Keys{Command: []string{script(t, "setsid sleep 1000 & echo $! >"+pidFile)}, CommandUser: me(t)}
	_, err := k.runCommand(whenWritten(t.Context(), pidFile), "alice", edKey(1), answer{})
	if err == nil || !strings.Contains(err.Error(), "exceeded the timeout") {
		t.Error(err)
	}
	if pid, err := strconv.Atoi(strings.Join(readLines(t, pidFile), "")); err == nil {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

func TestNeedsKey(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]bool{"": false, "%u": false, "%%k": false, "%k": true, "%%%k": true, "a%tb": true, "%f": true} {
		if got := needsKey([]string{"/bin/x", args}); got != want {
			t.Errorf("%q: %v", args, got)
		}
	}
	// One answer for all keys means one question.
	out := filepath.Join(t.TempDir(), "out")
	program := script(t, "echo $1 >>"+out)
	for _, tt := range []struct {
		arg  string
		want []string
	}{{"%u", []string{"alice"}}, {"%f", []string{Fingerprint(edKey(1)), Fingerprint(edKey(2))}}} {
		os.Remove(out)
		k := &Keys{Dir: keysDir(t), Command: []string{program, tt.arg}, CommandUser: me(t)}
		for _, seed := range []byte{1, 2, 1, 2} {
			k.Authorize("alice", edKey(seed), home, today)
		}
		if got := readLines(t, out); !slices.Equal(got, tt.want) {
			t.Errorf("%s: asked %q, want %q", tt.arg, got, tt.want)
		}
	}
}
