package agent

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// TestOtherAccount checks that an agent that runs as root does nothing as root for its user.
// An agent of another user must refuse to run as a third one.
func TestOtherAccount(t *testing.T) {
	if os.Getuid() != 0 {
		other := Account{Name: "other", UID: uint32(os.Getuid()) + 1, Home: "/"}
		if err := other.check(); err == nil {
			t.Error("check accepts the account of another user")
		}
		return
	}
	added := sshtest.NewAccount(t)
	other, err := LookupAccount(added.Name)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "agent-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	other.Home = filepath.Join(dir, "home")
	for _, d := range []string{dir, other.Home} {
		os.MkdirAll(d, 0o755)
		os.Chmod(d, 0o755)
	}
	os.Chown(other.Home, int(other.UID), int(other.GID))
	secret := filepath.Join(dir, "secret")
	l := listen(t, "unix", secret)
	defer l.Close()
	os.Chmod(secret, 0o700)

	b := start(t, func(s *Server) { s.Account = other })
	c := b.dial(alice())
	ids := fmt.Sprintf("%d %d %d\n", other.UID, other.GID, other.GID)
	if got := output(t, c, `echo $(id -u) $(id -g) $(id -G)`); got != ids {
		t.Errorf("a session has ids %q, want %q", got, ids)
	}
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	s.RequestPty("vt100", 24, 80, ssh.TerminalModes{ssh.ONLCR: 0})
	if out, err := s.Output(`stat -c '%U %G %a' $(tty); id -u; ls -l /proc/self/fd | grep -cE 'socket|anon_inode|ptmx'; ls /root 2>&1 >/dev/null | wc -l`); err != nil || string(out) != fmt.Sprintf("%s tty 620\n%d\n0\n1\n", other.Name, other.UID) {
		t.Errorf("with a terminal: %q, %v", out, err)
	}

	// Files are created and accessed as the user, and connections have her credentials.
	if _, err := c.Dial("unix", secret); err == nil || !strings.Contains(err.Error(), "Permission denied") {
		t.Errorf("connecting to root's socket: %v", err)
	}
	forward := func(path string) bool {
		ok, _, err := c.SendRequest("streamlocal-forward@openssh.com", true, ssh.Marshal(streamlocalAddr{path}))
		if err != nil {
			t.Fatal(err)
		}
		return ok
	}
	if forward("/root/agent-test") || forward(dir+"/agent-test") {
		t.Error("listening in root's directory")
	}
	if !forward("sock") {
		t.Fatal("not listening in the home directory")
	}
	var st unix.Stat_t
	if err := unix.Stat(other.Home+"/sock", &st); err != nil || st.Uid != other.UID || st.Gid != other.GID || st.Mode&0o777 != 0o600 {
		t.Errorf("socket: uid %d gid %d mode %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	if ok, _, _ := c.SendRequest("tcpip-forward", true, ssh.Marshal(tcpAddr{"localhost", 80})); ok {
		t.Error("a privileged port was granted")
	}

	peer := listen(t, "unix", filepath.Join(dir, "peer"))
	defer peer.Close()
	os.Chmod(filepath.Join(dir, "peer"), 0o777)
	conn, err := c.Dial("unix", filepath.Join(dir, "peer"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	accepted, err := peer.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	raw, _ := accepted.(*net.UnixConn).SyscallConn()
	raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil || cred.Uid != other.UID || cred.Gid != other.GID {
			t.Errorf("the peer is %+v, %v", cred, err)
		}
	})

	// TCP sockets, listening or not, belong to the user.
	web := listen(t, "tcp", "127.0.0.1:0")
	defer web.Close()
	to, err := c.Dial("tcp", web.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	came, err := web.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer came.Close()
	if got := socketUID(t, identity.AddrPort(came.RemoteAddr())); got != other.UID {
		t.Errorf("the socket of a forward belongs to user %d", got)
	}
	remote, err := c.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer remote.Close()
	if got := socketUID(t, identity.AddrPort(remote.Addr())); got != other.UID {
		t.Errorf("the listener of a remote forward belongs to user %d", got)
	}
	if os.Geteuid() != 0 {
		t.Error("the process is not root any more")
	}
}

// socketUID returns the user id that owns the TCP socket with a local address.
func socketUID(t *testing.T, local netip.AddrPort) uint32 {
	t.Helper()
	// Connections in TIME_WAIT have no owner.
	out, err := exec.Command("ss", "-Htane", "exclude", "time-wait", "src", local.String()).Output()
	if err != nil || len(out) == 0 {
		t.Fatalf("no socket at %s: %v", local, err)
	}
	_, text, _ := strings.Cut(string(out), " uid:") // which ss leaves out for root
	var uid uint32
	fmt.Sscan(text, &uid)
	return uid
}

// TestStartAs starts a program as another account. It must get the given arguments and
// environment, byte for byte, and none of root's rights; start must return errors.
func TestStartAs(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	games := Account{UID: 5, GID: 60, Groups: []uint32{60, 5}}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	start := func(path, dir string) (*process, error) {
		return Login{Account: games}.start(command{
			path: path,
			argv: []string{"-name", "-c", `pwd; echo $(id -ru) $(id -rg) $(id -G); grep CapPrm /proc/self/status
				test ! -e /proc/$$/fd/3 -a ! -e /proc/$$/fd/4 || echo descriptors; env | grep -v -e ^PATH= -e ^PWD= -e ^OLDPWD= -e ^SHLVL= -e ^_=; printf "%s" "$0"`, "\xff\n\""},
			env: []string{"A=\xfe b", "EMPTY="}, dir: dir, files: [3]*os.File{r, w, w},
		})
	}
	for name, tt := range map[string]struct {
		path, dir string
		want      error
	}{
		"no such program":     {"/no/such", "/", syscall.ENOENT},
		"not a program":       {"/etc/passwd", "/", syscall.EACCES},
		"a directory of root": {"/bin/sh", "/root", syscall.EACCES},
	} {
		if _, err := start(tt.path, tt.dir); err != tt.want {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	p, err := start("/bin/sh", "/tmp")
	if err != nil {
		t.Fatal(err)
	}
	if status := p.wait(); status.ExitStatus() != 0 {
		t.Errorf("the program ended with %v", status)
	}
	w.Close()
	out, err := io.ReadAll(r)
	const want = "/tmp\n5 60 60 5\nCapPrm:\t0000000000000000\nA=\xfe b\nEMPTY=\n\xff\n\""
	if string(out) != want || err != nil {
		t.Errorf("got  %q, %v\nwant %q", out, err, want)
	}
}

// TestImpersonate checks that impersonate does not change the ids of the main thread, which
// are those of the process.
func TestImpersonate(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	ids := func() string {
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		_, ids, _ := strings.Cut(string(status), "\nUid:")
		ids, _, _ = strings.Cut(ids, "\n")
		return ids
	}
	before := ids()
	games := Account{UID: 5, GID: 60}
	for range 200 {
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				err := games.impersonate(func() error {
					if os.Geteuid() != 5 {
						return errors.New("not as the account")
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if got := ids(); got != before {
			t.Fatalf("the process has the ids%s, want%s", got, before)
		}
	}
}

// TestAgentOtherAccount connects to a forwarded agent as another account, after the user has
// made the socket accessible to all. Only the user and root may be answered.
func TestAgentOtherAccount(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	b := start(t, nil)
	c := b.dial(alice())
	go func() {
		for nc := range c.HandleChannelOpen("auth-agent@openssh.com") {
			if ch, reqs, err := nc.Accept(); err == nil {
				go ssh.DiscardRequests(reqs)
				io.WriteString(ch, "hello")
				ch.Close()
			}
		}
	}()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := s.SendRequest("auth-agent-req@openssh.com", true, nil); !ok || err != nil {
		t.Fatal(ok, err)
	}
	out, err := s.Output("chmod 711 $(dirname $SSH_AUTH_SOCK) && chmod 666 $SSH_AUTH_SOCK && echo -n $SSH_AUTH_SOCK")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		account Account
		want    string
	}{{Account{}, "hello"}, {Account{UID: 5, GID: 60}, ""}} {
		var conn net.Conn
		if err := tt.account.impersonate(func() (err error) { conn, err = net.Dial("unix", string(out)); return err }); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); string(got) != tt.want || err != nil {
			t.Errorf("user %d received %q, %v; want %q", tt.account.UID, got, err, tt.want)
		}
		conn.Close()
	}
}

// TestNologin creates /etc/nologin. Sessions of all accounts but root must show it and end,
// and all other requests must fail.
func TestNologin(t *testing.T) {
	added := sshtest.NewAccount(t)
	if err := os.WriteFile("/etc/nologin", []byte("Back at noon.\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.Remove("/etc/nologin")
	for _, name := range []string{added.Name, "root"} {
		a, err := LookupAccount(name)
		if err != nil {
			t.Fatal(err)
		}
		b := start(t, func(s *Server) {
			s.Account = a
			s.LookupLogin = func() (Login, error) {
				login, _, err := LookupLogin(a, time.Now())
				return login, err
			}
		})
		stdout, stderr, code := run(t, "", "ssh", "-F", b.sshConfig(alice()), "bastion", "id -u")
		if name == "root" {
			if stdout != "0\n" || code != 0 {
				t.Errorf("root: %q, %q, %d", stdout, stderr, code)
			}
			continue
		}
		if stdout != "" || stderr != "Back at noon.\n" || code != 254 {
			t.Errorf("%q, %q, %d", stdout, stderr, code)
		}
		c := b.dial(alice())
		for kind, payload := range map[string]any{
			"tcpip-forward": tcpAddr{"localhost", 0}, "streamlocal-forward@openssh.com": streamlocalAddr{added.Home + "/sock"},
		} {
			if ok, _, err := c.SendRequest(kind, true, ssh.Marshal(payload)); ok || err != nil {
				t.Errorf("%s: %v, %v", kind, ok, err)
			}
		}
		for _, network := range []string{"tcp", "unix"} {
			if _, err := c.Dial(network, map[string]string{"tcp": b.addr, "unix": "/x"}[network]); err == nil || !strings.Contains(err.Error(), "Back at noon.") {
				t.Errorf("forward to %s: %v", network, err)
			}
		}
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		for _, kind := range []string{"auth-agent-req@openssh.com", "x11-req"} {
			if ok, err := s.SendRequest(kind, true, ssh.Marshal(struct {
				Single           bool
				Protocol, Cookie string
				Screen           uint32
			}{false, "MIT-MAGIC-COOKIE-1", "00112233445566778899aabbccddeeff", 0})); ok || err != nil {
				t.Errorf("%s: %v, %v", kind, ok, err)
			}
		}
	}
}

// TestResourceLimits checks that a session has the limits of limits.conf(5) and the account's
// current groups.
func TestResourceLimits(t *testing.T) {
	added := sshtest.NewAccount(t)
	a, err := LookupAccount(added.Name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("/etc/security/limits.d", 0o755); err != nil {
		t.Fatal(err)
	}
	file := "/etc/security/limits.d/" + a.Name + ".conf"
	if err := os.WriteFile(file, []byte(a.Name+" hard nofile 321\n"+a.Name+" - nonewprivs 1\n@audio - priority 5\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(file)
	b := start(t, func(s *Server) {
		s.Account = a
		s.LookupLogin = func() (Login, error) {
			login, problems, err := LookupLogin(a, time.Now())
			if len(problems) > 0 {
				t.Error(problems)
			}
			return login, err
		}
	})
	out, err := exec.Command("nice").Output() // of this process
	if err != nil {
		t.Fatal(err)
	}
	const command = "ulimit -Hn; test $(ulimit -Sn) -le 321 && echo soft; nice; grep NoNewPrivs /proc/self/status"
	if got := output(t, b.dial(alice()), command); got != "321\nsoft\n"+string(out)+"NoNewPrivs:\t1\n" {
		t.Errorf("%q", got)
	}
	if err := sshtest.Run("usermod", "-a", "-G", "audio", a.Name); err != nil {
		t.Fatal(err)
	}
	if got := output(t, b.dial(alice()), command+"; id -Gn"); got != "321\nsoft\n5\nNoNewPrivs:\t1\n"+a.Name+" audio\n" {
		t.Errorf("%q", got)
	}
}
