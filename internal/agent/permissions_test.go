package agent

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// TestPermissions: the agent refuses by itself, from the certificate of the
// login, what this may not do. A client here is a gateway that lets all pass.
func TestPermissions(t *testing.T) {
	b := start(t, nil)
	type ask struct {
		kind    string // of the session request, or of the channel
		payload []byte
	}
	session := map[string]ask{
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
		refused []string // of every
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
			for _, what := range every {
				ch, reqs, err := c.OpenChannel("session", nil)
				if err != nil {
					t.Fatal(err)
				}
				go ssh.DiscardRequests(reqs)
				ok, err := ch.SendRequest(session[what].kind, true, session[what].payload)
				if err != nil {
					t.Fatal(err)
				}
				want := true
				for _, r := range tt.refused {
					want = want && r != what
				}
				if ok != want {
					t.Errorf("%s: %v", what, ok)
				}
				ch.Close()
			}
		})
	}
}

// TestForwardPermissions is the same for forwards.
func TestForwardPermissions(t *testing.T) {
	b := start(t, nil)
	l := listen(t, "tcp", "127.0.0.1:0")
	defer l.Close()
	here := addrPort(l.Addr())
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
		{"a name that stands for this machine", func(p *identity.Permissions) { p.Destinations = []string{"localhost:*"} }, false, true, false, true},
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
				t.Error("a name has led to this machine")
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

// TestFilesOnly: who may only copy files can leave none that is run, wherever her
// shell or the system would run it.
func TestFilesOnly(t *testing.T) {
	b := start(t, nil)
	trap := filepath.Join(b.home, "sprung")
	if err := os.Mkdir(filepath.Join(b.home, ".ssh"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".bashrc", ".profile", ".bash_profile", ".ssh/rc"} {
		if err := os.WriteFile(filepath.Join(b.home, name), []byte("echo "+name+" >>"+trap+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	ran := filepath.Join(t.TempDir(), "ran")
	defer func(before string) { systemRC = before }(systemRC)
	systemRC = filepath.Join(t.TempDir(), "sshrc")
	if err := os.WriteFile(systemRC, []byte("echo system >>"+ran+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	get := func(p identity.Permissions) {
		t.Helper()
		id := alice()
		id.Permissions = p
		// Where SHLVL is not set and standard input is a socket or nothing is
		// known of it, bash takes itself for a child of rshd.
		if out, errs, code := run(t, "pwd\n", "sftp", "-F", b.sshConfig(id), "-b", "-", "bastion"); code != 0 {
			t.Fatalf("sftp: %d\n%s%s", code, out, errs)
		}
	}
	get(identity.Permissions{NoShell: true, NoExec: true})
	if text, err := os.ReadFile(trap); err == nil {
		t.Errorf("it ran %q", text)
	}
	if _, err := os.Stat(ran); err != nil {
		t.Error("the system's rc script has not run")
	}
	get(identity.AllowAll())
	if _, err := os.Stat(trap); err != nil {
		t.Error("nothing would have sprung the trap anyway")
	}

	// The same for a command that is forced, which is a whole command line.
	os.Remove(trap)
	id := alice()
	id.Permissions = identity.Permissions{NoShell: true, NoExec: true, ForceCommand: "cd / && pwd"}
	ch, reqs, err := b.dial(id).OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	ch.SendRequest("subsystem", true, ssh.Marshal(commandRequest{"sftp"}))
	if out, _ := io.ReadAll(ch); string(out) != "/\n" {
		t.Errorf("the forced command says %q", out)
	}
	if text, err := os.ReadFile(trap); err == nil {
		t.Errorf("it ran %q", text)
	}
}

// TestInternalSFTP: a forced internal-sftp may have options of sftp-server(8),
// whichever server there is.
func TestInternalSFTP(t *testing.T) {
	for name, command := range servers(t) {
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
				t.Errorf("an option that is none: %s", out)
			}
			if out, code := sftp("internal-sftpd", "pwd\n"); code == 0 {
				t.Errorf("another command: %s", out)
			}
		})
	}
}

// servers returns the commands of OpenSSH's server and of ours.
func servers(t *testing.T) map[string]string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // others run it, too
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "bastion-agent")
	if out, err := exec.Command("go", "build", "-o", binary, "../../cmd/bastion-agent").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return map[string]string{"openssh": opensshSFTP, "own": binary + " sftp-server"}
}

// TestSFTPIsNoShell: by the files of /proc a client of either server can write
// neither into its memory nor into that of another of its processes.
func TestSFTPIsNoShell(t *testing.T) {
	for name, command := range servers(t) {
		t.Run(name, func(t *testing.T) {
			args := strings.Fields(command)
			cmd := exec.Command(args[0], args[1:]...)
			cmd.Dir = "/"
			if os.Geteuid() == 0 { // root may always
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
