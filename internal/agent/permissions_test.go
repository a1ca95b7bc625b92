package agent

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// TestPermissions checks that the agent enforces the permissions in a certificate, as it must
// if a gateway does not.
func TestPermissions(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	type request struct {
		kind    string
		payload []byte
	}
	session := map[string]request{
		"pty":   {"pty-req", ssh.Marshal(ptyRequest{Term: "vt100"})},
		"agent": {"auth-agent-req@openssh.com", nil},
		"shell": {"shell", nil},
		"empty": {"exec", ssh.Marshal(commandRequest{""})}, // a login shell, too
		"exec":  {"exec", ssh.Marshal(commandRequest{"true"})},
		"sftp":  {"subsystem", ssh.Marshal(commandRequest{"sftp"})},
		"as a command": {"exec", ssh.Marshal(commandRequest{
			opensshSFTP})},
	}
	every := []string{"pty", "agent", "shell", "empty", "exec", "sftp", "as a command"}
	tests := []struct {
		name    string
		permits func(*identity.Permissions)
		denied  []string // of every
	}{
		{"all", func(*identity.Permissions) {}, nil},
		{"no terminal", func(p *identity.Permissions) { p.PTY = false }, []string{"pty"}},
		{"no agent", func(p *identity.Permissions) { p.AgentForwarding = false }, []string{"agent"}},
		{"no shell", func(p *identity.Permissions) { p.NoShell = true }, []string{"shell", "empty"}},
		{"no commands", func(p *identity.Permissions) { p.NoExec = true }, []string{"exec", "as a command"}},
		{"no sftp", func(p *identity.Permissions) { p.NoSFTP = true }, []string{"sftp"}},
		{"files only", func(p *identity.Permissions) { p.NoShell, p.NoExec = true, true }, []string{"shell", "empty", "exec", "as a command"}},
		{"nothing", func(p *identity.Permissions) { *p = identity.Permissions{NoShell: true, NoExec: true, NoSFTP: true} }, every},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id := alice()
			tt.permits(&id.Permissions)
			c := b.dial(id)
			for _, name := range every {
				ch, reqs, err := c.OpenChannel("session", nil)
				if err != nil {
					t.Fatal(err)
				}
				go ssh.DiscardRequests(reqs)
				ok, err := ch.SendRequest(session[name].kind, true, session[name].payload)
				if err != nil {
					t.Fatal(err)
				}
				want := true
				for _, d := range tt.denied {
					want = want && d != name
				}
				if ok != want {
					t.Errorf("%s: %v", name, ok)
				}
				ch.Close()
			}
		})
	}
}

// TestForwardPermissions is TestPermissions for forwards.
func TestForwardPermissions(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	l := listen(t, "tcp", "127.0.0.1:0")
	defer l.Close()
	here := identity.AddrPort(l.Addr())
	socket := filepath.Join(b.home, "sock")
	ls := listen(t, "unix", socket)
	defer ls.Close()
	tests := []struct {
		name                        string
		permits                     func(*identity.Permissions)
		open, listen, socket, bound bool
	}{
		{"all", func(*identity.Permissions) {}, true, true, true, true},
		{"no forwards", func(p *identity.Permissions) { p.PortForwarding = false }, false, false, false, false},
		{"permitopen", func(p *identity.Permissions) { p.PermitOpen = []string{here.String()} }, true, true, false, true},
		{"permitopen of others", func(p *identity.Permissions) { p.PermitOpen = []string{"127.0.0.1:1"} }, false, true, false, true},
		{"destinations", func(p *identity.Permissions) { p.Destinations = []string{"127.0.0.0/8:*"} }, true, true, false, true},
		{"destinations elsewhere", func(p *identity.Permissions) { p.Destinations = []string{"10.0.0.0/8:*"} }, false, true, false, true},
		{"a host name of this machine", func(p *identity.Permissions) { p.Destinations = []string{"localhost:*"} }, false, true, false, true},
		{"no destination", func(p *identity.Permissions) { p.Destinations = []string{"none"} }, false, true, false, true},
		{"no listener", func(p *identity.Permissions) { p.Listen = []string{"none"} }, true, false, true, false},
		{"permitlisten of others", func(p *identity.Permissions) { p.PermitListen = []string{"localhost:1"} }, true, false, true, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id := alice()
			tt.permits(&id.Permissions)
			c := b.dial(id)
			dial := func(network, addr string) bool {
				conn, err := c.Dial(network, addr)
				if err == nil {
					conn.Close()
				}
				return err == nil
			}
			request := func(kind string, payload any) bool {
				ok, _, err := c.SendRequest(kind, true, ssh.Marshal(payload))
				if err != nil {
					t.Fatal(err)
				}
				return ok
			}
			if got := dial("tcp", here.String()); got != tt.open {
				t.Errorf("direct-tcpip: %v", got)
			}
			if got := dial("tcp", fmt.Sprintf("localhost:%d", here.Port())); tt.name[0] == 'a' && tt.name != "all" && got {
				t.Error("a host name led to this machine")
			}
			if got := dial("unix", socket); got != tt.socket {
				t.Errorf("direct-streamlocal: %v", got)
			}
			if got := request("tcpip-forward", tcpAddr{"localhost", 0}); got != tt.listen {
				t.Errorf("tcpip-forward: %v", got)
			}
			if got := request("streamlocal-forward@openssh.com", streamlocalAddr{strings.ReplaceAll(tt.name, " ", "-")}); got != tt.bound {
				t.Errorf("streamlocal-forward: %v", got)
			}
		})
	}
}

// TestFilesOnly logs in with a role, or a forced internal-sftp, that permits only file
// transfers. No file of the user may be run: not by a shell's start-up, not by the dynamic
// linker, not as an rc script.
func TestFilesOnly(t *testing.T) {
	t.Parallel()
	everything := identity.AllowAll()
	everything.Environment = []string{"BASH_ENV=.bashrc", "ENV=.bashrc", "LD_PRELOAD=./lib.so"}
	forced := everything
	forced.ForceCommand = "internal-sftp"
	withOption := everything
	withOption.ForceCommand = "internal-sftp\t-P\tremove"
	role := everything
	role.NoShell, role.NoExec = true, true

	for name, command := range sftpCommands(t) {
		for _, shell := range []string{"/bin/bash", "/bin/sh", "/usr/bin/zsh"} {
			if _, err := os.Stat(shell); err != nil || name == "own" && shell != "/bin/bash" {
				continue
			}
			b := start(t, func(s *Server) {
				s.SFTP, s.Account.Shell, s.AcceptEnv = command, shell, []string{"*"}
				setTrap(t, s.Account.Home)
			})
			executed := func() string {
				traces, _ := os.ReadFile(filepath.Join(b.home, "ran"))
				os.Remove(filepath.Join(b.home, "ran"))
				return string(traces)
			}
			get := func(p identity.Permissions, args ...string) (out string, code int) {
				id := alice()
				id.Permissions = p
				config := b.sshConfig(id)
				// Without SHLVL, bash reads ~/.bashrc even for a command.
				args = append([]string{"-F", config, "-o", "SetEnv=BASH_ENV=" + b.home + "/.bashrc LD_PRELOAD=" + b.home + "/lib.so ENV=" + b.home + "/.bashrc ZDOTDIR=" + b.home}, args...)
				program, input := args[len(args)-1], ""
				if program == "sftp" {
					input = "pwd\n"
				}
				out, errs, code := run(t, input, program, args[:len(args)-1]...)
				return out + errs, code
			}
			for kind, p := range map[string]identity.Permissions{"role": role, "forced": forced, "options": withOption} {
				if name == "own" && kind == "options" {
					continue // has no -P
				}
				out, code := get(p, "-b", "-", "bastion", "sftp")
				if code != 0 || !strings.Contains(out, b.home) {
					t.Errorf("%s, %s, %s: sftp: %d %s", name, shell, kind, code, out)
				}
				if ran := executed(); ran != "" {
					t.Errorf("%s, %s, %s: it ran %q", name, shell, kind, ran)
				}
			}
			for _, args := range [][]string{{"bastion", "ssh"}, {"bastion", "id", "ssh"}, {"bastion", opensshSFTP, "ssh"}, {"bastion", "internal-sftp", "ssh"}} {
				if out, code := get(forced, args...); code != 1 || !strings.HasPrefix(out, strings.TrimSpace(sftpOnly)) {
					t.Errorf("%s, %s, forced: ssh %q: %d %q", name, shell, args, code, out)
				}
				if ran := executed(); ran != "" {
					t.Errorf("%s, %s, forced: ssh %q ran %q", name, shell, args, ran)
				}
			}
			if get(identity.AllowAll(), "bastion", "true", "ssh"); shell != "/bin/sh" && executed() == "" {
				t.Errorf("%s: the trap does not work", shell)
			}
		}
	}
}

// setTrap writes files to a home directory that append their name to the file "ran" when they
// are run.
func setTrap(t *testing.T, home string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(home, ".ssh"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".bashrc", ".profile", ".bash_profile", ".zshenv", ".zshrc", ".ssh/rc"} {
		text := "echo " + name + " >>" + home + "/ran\n"
		if err := os.WriteFile(filepath.Join(home, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(home, ".ssh/environment"), []byte("BASH_ENV="+home+"/.bashrc\nLD_PRELOAD="+home+"/lib.so\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestFilesOnlyEnvironment checks that the sftp server of a login that may only copy files gets
// no variables from the client, the key or a file.
func TestFilesOnlyEnvironment(t *testing.T) {
	t.Parallel()
	dump, rc := filepath.Join(t.TempDir(), "env"), filepath.Join(t.TempDir(), "sshrc")
	b := start(t, func(s *Server) {
		s.SFTP = []string{"/bin/sh", "-c", "env >" + dump + ".new; mv " + dump + ".new " + dump + "; ls -l /proc/$$/fd | wc -l"}
		s.AcceptEnv, s.systemRC = []string{"*"}, rc
	})
	id := alice()
	id.Permissions.ForceCommand = "internal-sftp"
	id.Permissions.Environment = []string{"LD_PRELOAD=/x", "FROM_KEY=x"}
	ran := filepath.Join(t.TempDir(), "ran")
	if err := os.WriteFile(rc, []byte("echo system $LD_AUDIT >>"+ran+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, "", "ssh", "-F", b.sshConfig(id), "-o", "SetEnv=LD_AUDIT=/x FROM_CLIENT=x PATH=/x", "-s", "bastion", "sftp")
	env, err := os.ReadFile(dump)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(env)) {
		name, _, _ := strings.Cut(line, "=")
		switch name {
		case "PATH", "USER", "LOGNAME", "HOME", "MAIL", "SHELL", "SSH_CLIENT", "SSH_CONNECTION", "SSH_ORIGINAL_COMMAND", "PWD", "OLDPWD", "SHLVL", "_":
			if !strings.Contains(line, "/x") {
				continue
			}
		}
		t.Errorf("the server's environment has %s", line)
	}
	if text, err := os.ReadFile(ran); err != nil || string(text) != "system\n" {
		t.Errorf("the system's rc script left %q, %v", text, err)
	}
}

// TestForcedCommandEnvironment checks that with a forced command the client cannot set
// variables that run another command, even if accept_env matches them.
func TestForcedCommandEnvironment(t *testing.T) {
	t.Parallel()
	b := start(t, func(s *Server) { s.AcceptEnv = []string{"*"} })
	setTrap(t, b.home)
	id := alice()
	id.Permissions.ForceCommand = "env"
	set := "SetEnv=BASH_ENV=" + b.home + "/.bashrc LD_PRELOAD=/x PATH=/x PERL5OPT=-Mx GIT_SSH_COMMAND=x GIT_PROTOCOL=version=2 LC_ALL=C SHLVL=1 OLD=()"
	out, errs, code := run(t, "", "ssh", "-F", b.sshConfig(id), "-o", set, "bastion")
	if code != 0 || !strings.Contains(out, "GIT_PROTOCOL=version=2\n") || !strings.Contains(out, "LC_ALL=C\n") {
		t.Errorf("%d %s%s", code, out, errs)
	}
	for _, name := range []string{"BASH_ENV", "LD_PRELOAD", "PATH=/x", "PERL5OPT", "GIT_SSH_COMMAND", "OLD"} {
		if strings.Contains("\n"+out, "\n"+name) {
			t.Errorf("the forced command has %s", name)
		}
	}
	out, _, _ = run(t, "", "ssh", "-F", b.sshConfig(alice()), "-o", set, "bastion", "/usr/bin/env")
	if !strings.Contains(out, "PERL5OPT=-Mx\n") {
		t.Errorf("without a forced command accept_env does not apply: %s", out)
	}
}

func TestShellWords(t *testing.T) {
	words := []string{"/usr/lib/x", "a b", "", "it's", "$HOME", "-R", "\n", "é"}
	out, err := exec.Command("sh", "-c", `printf '%s|' `+shellWords(words)).Output()
	if want := strings.Join(words, "|") + "|"; err != nil || string(out) != want {
		t.Errorf("%q, %v", out, err)
	}
	if got := shellWords([]string{opensshSFTP}); got != opensshSFTP {
		t.Errorf("quoted without need: %q", got)
	}
}

// TestInternalSFTP checks that a forced internal-sftp may have options of sftp-server(8), with
// OpenSSH's server and with our own.
func TestInternalSFTP(t *testing.T) {
	t.Parallel()
	for name, command := range sftpCommands(t) {
		t.Run(name, func(t *testing.T) {
			b := start(t, func(s *Server) { s.SFTP = command })
			if err := os.Mkdir(filepath.Join(b.home, "in"), 0o700); err != nil {
				t.Fatal(err)
			}
			sftp := func(forced, batch string) (string, int) {
				id := alice()
				id.Permissions.ForceCommand = forced
				out, errs, code := run(t, batch, "sftp", "-q", "-F", b.sshConfig(id), "-b", "-", "bastion")
				return out + errs, code
			}
			if out, code := sftp("internal-sftp", "mkdir made\n"); code != 0 {
				t.Errorf("plain: %d %s", code, out)
			}
			if out, code := sftp("internal-sftp -R", "mkdir refused\n"); code == 0 {
				t.Errorf("-R: %s", out)
			}
			if out, code := sftp("internal-sftp -R -d in", "pwd\n"); code != 0 || !strings.Contains(out, b.home+"/in\n") {
				t.Errorf("-d: %d %s", code, out)
			}
			if out, code := sftp("internal-sftp -u 077", "mkdir private\n"); code != 0 {
				t.Errorf("-u: %d %s", code, out)
			} else if st, err := os.Stat(filepath.Join(b.home, "private")); err != nil || st.Mode().Perm() != 0o700 {
				t.Errorf("-u 077 makes %v, %v", st.Mode(), err)
			}
			if out, code := sftp("internal-sftp --nonsense", "pwd\n"); code == 0 {
				t.Errorf("an unknown option: %s", out)
			}
			// sshd before 9.9 does not accept a tab before -R, and would ignore it.
			if out, code := sftp("internal-sftp\t-R", "mkdir refused\n"); code == 0 {
				t.Errorf("a tab and -R: %s", out)
			}
			if out, code := sftp("internal-sftpd", "pwd\n"); code == 0 {
				t.Errorf("another command: %s", out)
			}
		})
	}
}

// sftpCommands returns the commands of OpenSSH's sftp server and of our own.
func sftpCommands(t *testing.T) map[string][]string {
	t.Helper()
	binary, err := bastionAgent()
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]string{"openssh": {opensshSFTP}, "own": {binary, "sftp-server"}}
}

// bastionAgent builds bastion-agent, once for all tests. Every account can execute it.
var bastionAgent = sync.OnceValues(func() (string, error) {
	binary := filepath.Join(binaries, "bastion-agent")
	return binary, sshtest.Run("go", "build", "-o", binary, "../../cmd/bastion-agent")
})

// TestSFTPProcMem checks that a client of either server cannot write to the server's memory
// through /proc, and so run code.
func TestSFTPProcMem(t *testing.T) {
	t.Parallel()
	for name, command := range sftpCommands(t) {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(command[0], command[1:]...)
			cmd.Dir = "/"
			if os.Geteuid() == 0 { // root may always write
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			}
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer in.Close()
			c, err := sftp.NewClientPipe(out, in)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Stat("/proc/self/status"); err != nil {
				t.Fatal(err)
			}
			for _, file := range []string{"/proc/self/mem", "/proc/thread-self/mem", fmt.Sprintf("/proc/%d/mem", cmd.Process.Pid)} {
				if f, err := c.OpenFile(file, os.O_RDWR); err == nil {
					f.Close()
					t.Errorf("%s can be opened for writing", file)
				}
			}
		})
	}
}

func TestSFTPCommand(t *testing.T) {
	dir := t.TempDir()
	data, program := filepath.Join(dir, "data"), filepath.Join(dir, "sftp-server")
	if err := errors.Join(os.WriteFile(data, nil, 0o644), os.WriteFile(program, nil, 0o755)); err != nil {
		t.Fatal(err)
	}
	fallback := []string{"agent", "sftp-server"}
	for _, tt := range []struct{ places, want []string }{
		{[]string{dir, data, filepath.Join(dir, "none"), program}, []string{program}},
		{[]string{dir, data, filepath.Join(dir, "none")}, fallback},
	} {
		if got := sftpCommand(tt.places, fallback); !slices.Equal(got, tt.want) {
			t.Errorf("%q: %q, want %q", tt.places, got, tt.want)
		}
	}
}
