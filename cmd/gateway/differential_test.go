package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// TestDifferential does the same through a gateway and with OpenSSH's sshd, as
// the same account of this machine, and wants the same bytes on both streams
// and the same exit status.
func TestDifferential(t *testing.T) {
	t.Parallel()
	differentials(t, testDifferential)
}

// differentials runs a test with sessions of the account that runs it, and, as root,
// with sessions of another account.
func differentials(t *testing.T, test func(*testing.T, *differential)) {
	t.Run("own account", func(t *testing.T) { test(t, newDifferential(t)) })
	t.Run("another account", func(t *testing.T) {
		a := sshtest.NewAccount(t)
		w := newDifferentialOf(t, a.Name)
		// ssh runs as root; the sessions have these folders for their files.
		for _, dir := range w.folders() {
			if err := os.Chown(dir, int(a.UID), int(a.GID)); err != nil {
				t.Fatal(err)
			}
		}
		test(t, w)
	})
}

func testDifferential(t *testing.T, w *differential) {
	tests := []struct {
		name    string
		before  []string // options, before the host
		command string
		stdin   string
		// person, if not empty, is for program pty, on whose terminal ssh runs then.
		person string
		// program runs in place of ssh -F CONFIG [before] HOST command; HOST
		// and CONFIG are replaced in it.
		program string
	}{
		{name: "true", command: "true"},
		{name: "exit 7", command: "exit 7"},
		{name: "exit 255", command: "exit 255"},
		{name: "not found", command: "no-such-command-at-all"},
		{name: "not executable", command: "/etc/passwd"},
		{name: "a folder", command: "/tmp"},
		{name: "syntax error", command: "if then"},
		{name: "killed by TERM", command: "kill -TERM $$; sleep 10"},
		{name: "killed by KILL", command: "echo before; kill -KILL $$"},
		{name: "killed by USR1", before: []string{"-o", "LogLevel=ERROR"}, command: "kill -USR1 $$"},
		{name: "killed by a signal without a name in SSH", command: "kill -STKFLT $$"},
		{name: "child killed", command: "sh -c 'kill -SEGV $$'; echo $?"},
		{name: "environment", before: []string{"-o", "SendEnv=LANG", "-o", "SendEnv=LC_*"}, command: "env"},
		{name: "environment of a terminal", before: []string{"-tt"}, command: "env"},
		{name: "environment of a login shell", before: []string{"-T"}, stdin: "export -p\n"},
		{name: "variables that are not accepted", before: []string{"-o", "SetEnv=NOT_THIS=x"}, command: `echo "[$NOT_THIS]"`},
		{name: "many variables", before: many("SetEnv=LC_%d=x", 100), command: "env | grep -c ^LC_"},
		{name: "shell flags", command: `echo "$0 $- $#"; shopt -p login_shell; set -o`},
		{name: "login shell flags", before: []string{"-T"}, stdin: "echo \"$0 $- $#\"; shopt -p login_shell; exit 3\n"},
		{name: "login shell dies", before: []string{"-T"}, stdin: "echo x; kill -9 $$\n"},
		{name: "empty command", command: "", before: []string{"-T"}, stdin: "echo from stdin\n"},
		{name: "command line of the shell", command: "tr '\\0' '|' </proc/$$/cmdline; cat /proc/$$/comm"},
		{name: "folder, umask", command: "pwd; umask; ls -ld ."},
		{name: "soft limits", command: "ulimit -a"},
		{name: "hard limits", command: "ulimit -Ha"},
		{name: "locale", before: []string{"-o", "SetEnv=LC_ALL=C.UTF-8"}, command: "locale"},
		{name: "open files", command: "ls -l /proc/self/fd"},
		{name: "open files of a terminal", before: []string{"-tt"}, command: "ls /proc/self/fd; ls -l /proc/$$/fd"},
		{name: "kind of standard files", command: "for i in 0 1 2; do stat -L -c %F /proc/self/fd/$i; done"},
		{name: "reopened standard files", command: "echo a >/dev/stdout; echo b >/dev/stderr; cat /dev/stdin", stdin: "c\n"},
		{name: "reopened standard files of another program", command: "bash /dev/stdin A", stdin: "echo arg=$1; tee /dev/stderr </etc/hostname; install -m 600 /proc/self/fd/0 copy && rm copy\n"},
		{name: "owner of standard files", command: "stat -L -c '%U %G %a' /dev/stdin /dev/stdout /dev/stderr"},
		{name: "who", command: "id; cat /proc/self/status | grep -E 'Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:'"},
		{name: "signals", command: "grep -E 'Sig(Blk|Ign|Cgt)' /proc/self/status"},
		{name: "session leader", command: `set -- $(ps -o pid=,pgid=,sid=,tpgid= -p $$); test $1 = $2 && test $2 = $3 && echo leads; echo $4`},
		{name: "session leader on a terminal", before: []string{"-tt"}, command: `set -- $(ps -o pid=,pgid=,sid=,tpgid= -p $$); test $1 = $2 && test $2 = $3 && test $3 = $4 && echo leads`},
		{name: "priority", command: "nice; cat /proc/self/oom_score_adj /proc/self/coredump_filter; chrt -p 0"},
		{name: "broken pipe", command: `yes | head -n 1; echo ${PIPESTATUS[@]}`},
		{name: "sort", command: "sort", stdin: "b\na\nc\n"},
		{name: "binary both ways", command: "cat", stdin: strings.Repeat("\x00\x01\xff\xfe\r\n\r\x1b~.", 100_000)},
		{name: "reads a part", command: "head -c 5; echo; echo end", stdin: strings.Repeat("0123456789", 10_000)},
		{name: "reads nothing", command: "echo end", stdin: strings.Repeat("0123456789", 500_000)},
		{name: "no input", before: []string{"-n"}, command: "cat; echo end"},
		{name: "closes its input", command: "exec <&-; sleep 0.1; echo end", stdin: "x"},
		{name: "much output", command: "seq 300000"},
		{name: "much on both", command: "seq 60000; seq 60000 >&2"},
		{name: "one stream into the other", command: "for i in $(seq 500); do echo o$i; echo e$i >&2; done 2>&1"},
		{name: "output after closing one", command: "exec >&-; sleep 0.1; echo tail >&2; exit 4"},
		{name: "closes both", command: "exec >&- 2>&-; sleep 0.2; exit 4"},
		{name: "background job with the output", command: "(sleep 0.3; echo late) & echo soon; exit 2"},
		{name: "background job without", command: "sleep 30 >/dev/null 2>&1 <&- & echo soon; disown; exit 2"},
		{name: "long command", command: "echo " + strings.Repeat("0123456789", 10_000) + " | wc -c"},
		{name: "bytes in a command", command: "printf %s 'ä\tö\n\x01\x7f' \"$(printf '\\303')\"; echo '$HOME' \\\\"},
		{name: "tilde and globs", command: "echo ~ ~root /etc/host*"},
		{name: "exit trap", command: "trap 'echo bye' EXIT; exit 6"},

		{name: "terminal without one", command: "tty; test -t 0 || echo none"},
		{name: "terminal", before: []string{"-tt"}, command: "stty -a; echo $TERM"},
		{name: "terminal, exit status", before: []string{"-tt"}, command: "echo out; echo err >&2; exit 9"},
		{name: "terminal, killed", before: []string{"-tt"}, command: "kill -9 $$"},
		{name: "terminal, much output", before: []string{"-tt"}, command: "seq 50000"},
		{name: "terminal, background job", before: []string{"-tt"}, command: "sleep 30 & echo over"},
		{name: "terminal, end of input", before: []string{"-tt"}, command: "cat", stdin: "line\n\x04"},
		{name: "terminal of a person", before: []string{"-t"}, command: "stty -a; tty >/dev/null && echo yes; exit 5", person: "\n"},
		{name: "permissions of the terminal", before: []string{"-tt"}, command: "stat -c '%a %U %G' $(tty)"},
		{name: "interactive", person: "expect [$#] \ntype exit\n"},
		{name: "interactive, end of input", person: "expect [$#] \ntype ^D\n"},
		{name: "interrupt", before: []string{"-t"}, command: "perl -e '$| = 1; print \"ready\\n\"; sleep 60'; echo $?", person: "expect ready\ntype ^C\n"},
		{name: "interrupt caught", before: []string{"-t"}, command: "trap 'exit 3' INT; echo ready; while :; do sleep 0.1; done", person: "expect ready\ntype ^C\n"},
		{name: "quit", before: []string{"-t"}, command: "ulimit -c 0; exec perl -e '$| = 1; print \"ready\\n\"; sleep 60'", person: "expect ready\ntype ^\\\n"},

		{name: "signal is told", program: "ssh -v -F CONFIG HOST 'kill -USR1 $$' 2>&1 | grep -a 'rtype exit'"},
		{name: "status is told", program: "ssh -v -F CONFIG HOST 'exit 3' 2>&1 | grep -a 'rtype exit'"},
		{name: "agent", before: []string{"-A", "-o", "IdentityAgent=SSH_AUTH_SOCK"}, command: `echo $SSH_AUTH_SOCK; stat -c '%F %U' $SSH_AUTH_SOCK; stat -c '%a %U' ${SSH_AUTH_SOCK%/*}; ssh-add -l | wc -l`},
		{name: "listening on a port", before: []string{"-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1"}, command: "echo listens"},
		{name: "listening on a socket that is there", before: []string{"-R", "/etc/hostname:127.0.0.1:1"}, command: "echo goes on"},
		{name: "subsystem that there is not", before: []string{"-s"}, command: "nothing"},
		{name: "forward to a port that is closed", before: []string{"-W", "127.0.0.1:1"}},
		{name: "forward to a name that is unknown", before: []string{"-W", "no-such-host.invalid:1"}},
		{name: "output that is read late and in part", program: "ssh -F CONFIG HOST 'yes; echo $? >DIR.tmp/yes' | (sleep 1; head -n 2); until test -s DIR.tmp/yes; do sleep 0.1; done; cat DIR.tmp/yes"},
		{name: "client dies", program: leave("-T", 15)},
		{name: "client with a terminal dies", program: leave("-tt", 200)},
		{name: "sftp", program: "sftp -q -F CONFIG -b batch HOST:DIR"},
		{name: "sftp, what fails", program: "sftp -q -F CONFIG -b fails HOST:DIR"},
		{name: "sftp, what the server can do", program: "sftp -v -v -F CONFIG -b /dev/null HOST 2>&1 | grep -a 'Server supports\\|Remote version'"},
		{name: "scp, missing", program: "scp -F CONFIG HOST:/no/such/file ."},
		{name: "old scp, missing", program: "scp -O -F CONFIG HOST:/no/such/file ."},
		{name: "old scp, onto a folder that is not there", program: "scp -O -F CONFIG batch HOST:/no/such/folder/"},
		{name: "rsync, missing", program: "rsync -a -e 'ssh -F CONFIG' HOST:/no/such/file ."},
		{name: "git, missing", program: "env GIT_SSH_COMMAND='ssh -F CONFIG' git ls-remote HOST:/no/such/repo"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			run := func(host string) string {
				args := append([]string{"ssh", "-F", w.env.path("ssh_config")}, tt.before...)
				args = append(args, host)
				if tt.command != "" || tt.name == "empty command" {
					args = append(args, tt.command)
				}
				if tt.program != "" {
					args = []string{"sh", "-c", strings.NewReplacer("CONFIG", w.env.path("ssh_config"), "HOST", host, "DIR", w.env.path(host)).Replace(tt.program)}
				}
				if tt.person != "" {
					file := filepath.Join(t.TempDir(), "person")
					if err := os.WriteFile(file, []byte(tt.person), 0o600); err != nil {
						t.Fatal(err)
					}
					args = append([]string{"pty", file}, args...)
				}
				return blur(w.run(t, args, tt.stdin))
			}
			want := run("sshd")
			got := run("gateway")
			if got != want {
				t.Errorf("through the gateway:\n%s\nwith sshd:\n%s\nfirst difference: %s", excerpt(got), excerpt(want), difference(got, want))
			}
		})
	}
}

func many(format string, n int) (args []string) {
	for i := range n {
		args = append(args, "-o", fmt.Sprintf(format, i))
	}
	return args
}

// leave kills a client and says which of the processes that it has started live
// on: with nohup, in the background, in the background and deaf to SIGHUP, the
// command itself. It waits for the end of that one for so many tenths of a second.
func leave(terminal string, tenths int) string {
	return fmt.Sprintf(`ssh %[1]s -F CONFIG HOST 'nohup sleep 600 >/dev/null 2>&1 & a=$!
		sleep 600 & b=$!
		(trap "" HUP; exec sleep 600) & echo $a $b $! $$ >DIR.tmp/pids%[1]s.new
		mv DIR.tmp/pids%[1]s.new DIR.tmp/pids%[1]s
		exec sleep 600' </dev/null >/dev/null 2>&1 & client=$!
	until test -s DIR.tmp/pids%[1]s; do sleep 0.1; done
	read a b c command <DIR.tmp/pids%[1]s
	for p in $a $b $c $command; do until test "$(ps -o comm= -p $p)" = sleep; do sleep 0.1; done; done
	kill -9 $client
	lives() { case $(ps -o stat= -p $1) in "" | Z*) false ;; esac; }
	for i in $(seq %[2]d); do lives $command || break; sleep 0.1; done
	sleep 0.5
	for p in $a $b $c $command; do lives $p && echo lives && kill -9 $p || echo dead; done`, terminal, tenths)
}

// blurs replaces output that differs from one run to the next.
var blurs = []struct {
	what *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`(?m)^((?:declare -x )?SSH_C(?:LIENT|ONNECTION))=.*$`), "$1=..."},
	{regexp.MustCompile(`/dev/pts/\d+|pts/\d+`), "/dev/pts/N"},
	{regexp.MustCompile(`(pipe|socket):\[\d+\]`), "$1:[N]"},
	{regexp.MustCompile(`/proc/\d+`), "/proc/N"},
	{regexp.MustCompile(`pid \d+`), "pid N"},
	{regexp.MustCompile(`bash: line 1: +\d+ `), "bash: line 1: N "},
	{regexp.MustCompile(`/(sshd|gateway)\b`), "/HOST"}, // their folders
	{regexp.MustCompile(`Allocated port \d+`), "Allocated port N"},
	{regexp.MustCompile(`/tmp/ssh-[0-9A-Za-z]+/agent\.\d+`), "/tmp/ssh-XXXXXXXXXX/agent.N"},
	{regexp.MustCompile(`(Connection to|Connection closed by) 127\.\d+\.\d+\.\d+`), "$1 HOST"},
	// ls -l of files that exist during the session.
	{regexp.MustCompile(`(?m)^([lrwxd-]{10} .*) \w{3} [ \d]\d \d\d:\d\d `), "$1 TIME "},
	{regexp.MustCompile(`(?m)^total \d+`), "total N"},
	// sshd's is about the account, ours about the bastion, which is new.
	{regexp.MustCompile(`(?m)^Last login: .*\r\n`), ""},
}

func blur(text string) string {
	// Of much output only the end may need it: the last message of ssh.
	from := max(0, len(text)-16<<10)
	rest := text[from:]
	for _, b := range blurs {
		rest = b.what.ReplaceAllString(rest, b.with)
	}
	return text[:from] + rest
}

func excerpt(text string) string {
	if len(text) > 3000 {
		return text[:3000] + "..."
	}
	return text
}

func difference(a, b string) string {
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	from := max(0, n-40)
	return fmt.Sprintf("%q, sshd: %q", a[from:min(len(a), n+80)], b[from:min(len(b), n+80)])
}

// A differential compares the gateway of env with a private sshd, which ssh_config
// calls "sshd".
type differential struct {
	env *scriptEnv
}

// newDifferential starts both, for the account of this process.
func newDifferential(t *testing.T) *differential {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	return newDifferentialOf(t, me.Username)
}

func newDifferentialOf(t *testing.T, account string) *differential {
	w := &differential{newScriptEnv(t.TempDir())}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// The account reads keys there, and sessions write.
	check(os.Chmod(filepath.Dir(w.env.dir), 0o755))
	check(w.env.prepare(account))
	// These limits are not under test, and there are many connections at once.
	w.env.settings["max_startups"] = "1000"
	w.env.settings["per_source_max_startups"] = "none"
	// The comparisons may have to wait for other tests.
	w.env.settings["default.idle"] = "1h"
	// With SHLVL set bash does not read ~/.bashrc for a command, which may do
	// anything on the machine that runs this.
	w.env.settings["default.local.accept_env"] = "[LANG, LC_*, SHLVL]"
	check(w.env.writeConfig())
	t.Cleanup(func() { w.env.end(t) })
	check(w.env.startGateway())
	check(w.startSSHD(t))

	for name, text := range map[string]string{
		"batch": "put batch copy\nget copy back\nls -1\nmkdir dir\nrename copy dir/copy\nln -s dir/copy link\nls -1 dir\nchmod 600 dir/copy\nls -ln dir\nrm link\nrm dir/copy\nrmdir dir\ndf\npwd\n",
		"fails": "-get nothing\n-put batch none/none\n-mkdir /proc/x\n-rm none\n-rmdir none\n-rename none other\n-chmod 600 none\n-ls none\n-cd none\n-ln -s x /proc/x\npwd\n",
	} {
		text = strings.ReplaceAll(text, "df\n", "")
		text = strings.ReplaceAll(text, "get copy back", "get copy /dev/null")
		check(os.WriteFile(w.env.path(name), []byte(text), 0o600))
	}
	agent := exec.Command("ssh-agent", "-D", "-a", w.env.path("agent.sock"))
	check(agent.Start())
	t.Cleanup(func() { agent.Process.Kill(); agent.Wait() })
	for _, dir := range w.folders() {
		check(os.Mkdir(dir, 0o700))
	}
	warm := w.run(t, []string{"ssh", "-F", w.env.path("ssh_config"), "gateway", "true"}, "")
	if !strings.Contains(warm, "Starting your bastion") {
		t.Fatalf("first login: %s", warm)
	}
	return w
}

// folders are those that sessions write to.
func (w *differential) folders() []string {
	return []string{w.env.path("sshd"), w.env.path("sshd.tmp"), w.env.path("gateway"), w.env.path("gateway.tmp")}
}

func (w *differential) startSSHD(t *testing.T) error {
	keys, err := os.ReadFile(w.env.path("id.pub"))
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`ListenAddress %s:2022
HostKey %s
AuthorizedKeysFile %s
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
MaxStartups 1000
AcceptEnv LANG LC_* SHLVL
X11Forwarding yes
PrintLastLog no
Subsystem sftp /usr/lib/openssh/sftp-server
`, w.env.loop, w.env.path("host_key"), w.env.path("keys"))
	hostKey, err := os.ReadFile(w.env.path("host_key.pub"))
	if err != nil {
		return err
	}
	known, err := os.ReadFile(w.env.path("known_hosts"))
	if err != nil {
		return err
	}
	client, err := os.ReadFile(w.env.path("ssh_config"))
	if err != nil {
		return err
	}
	client = append([]byte(fmt.Sprintf("Host sshd\n  HostName %s\n  Port 2022\n  User %s\n", w.env.loop, w.env.settings["default.local.account"])), client...)
	client = append(client, "  SendEnv SHLVL\n"...)
	if err := errors.Join(
		os.WriteFile(w.env.path("keys"), keys, 0o644),
		os.WriteFile(w.env.path("sshd_config"), []byte(config), 0o600),
		os.WriteFile(w.env.path("known_hosts"), fmt.Appendf(known, "[%s]:2022 %s", w.env.loop, hostKey), 0o600),
		os.WriteFile(w.env.path("ssh_config"), client, 0o600),
	); err != nil {
		return err
	}
	// A session inherits sshd's environment and directory: they are those of an agent.
	sshtest.StartSSHD(t, w.env.path("sshd_config"), net.JoinHostPort(w.env.loop, "2022"))
	return nil
}

// run runs a client and returns all that can be seen of it.
func (w *differential) run(t *testing.T, args []string, stdin string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = w.env.dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + w.env.dir, "TERM=xterm", "LANG=C.UTF-8", "LC_TIME=C", "SHLVL=1", "SSH_AUTH_SOCK=" + w.env.path("agent.sock")}
	cmd.Stdin = strings.NewReader(stdin)
	cmd.WaitDelay = 5 * time.Second // if it is killed, its children hold the pipes
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
	if ctx.Err() != nil {
		t.Errorf("%s did not end", strings.Join(args, " "))
	}
	return fmt.Sprintf("stdout:\n%s\nstderr:\n%s\nstatus: %d\n", stdout.String(), stderr.String(), cmd.ProcessState.ExitCode())
}
