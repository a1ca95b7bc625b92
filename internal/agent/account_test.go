package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

func TestFindAccount(t *testing.T) {
	const passwd = "root:x:0:0:root:/root:/bin/bash\nbad:x:a:0::/:\nshort:x:1\nalice:x:1000:1001:Alice,,,:/home/alice:/bin/zsh\n"
	got, ok := findAccount([]byte(passwd), "alice")
	if want := (Account{Name: "alice", UID: 1000, GID: 1001, Home: "/home/alice", Shell: "/bin/zsh"}); !ok || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, name := range []string{"", "bad", "short", "x", "nobody:"} {
		if a, ok := findAccount([]byte(passwd), name); ok {
			t.Errorf("%q: %v", name, a)
		}
		if a, err := LookupAccount("no-such-" + name); err == nil {
			t.Errorf("LookupAccount: %v", a)
		}
	}
	if a, err := LookupAccount("root"); err != nil || a.UID != 0 || a.Home == "" {
		t.Errorf("root: %v, %v", a, err)
	}
}

// TestOtherAccount holds that an agent that runs as root does nothing for its
// user as root. As another user there is nothing to hold, except that the agent
// refuses to run for somebody else.
func TestOtherAccount(t *testing.T) {
	games, err := LookupAccount("games") // Debian's base-passwd has it
	if err != nil {
		t.Fatal(err)
	}
	games.Shell = "/bin/bash"
	if os.Getuid() != 0 {
		if err := games.check(); err == nil {
			t.Error("an agent of another user would serve games")
		}
		return
	}
	dir, err := os.MkdirTemp("/tmp", "agent-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	games.Home = filepath.Join(dir, "home")
	for _, d := range []string{dir, games.Home} {
		os.MkdirAll(d, 0o755)
		os.Chmod(d, 0o755)
	}
	os.Chown(games.Home, int(games.UID), int(games.GID))
	secret := filepath.Join(dir, "secret")
	l := listen(t, "unix", secret)
	defer l.Close()
	os.Chmod(secret, 0o700)

	b := start(t, func(s *Server) { s.Account = games })
	c := b.dial(alice())
	ids := fmt.Sprintf("%d %d %d\n", games.UID, games.GID, games.GID)
	if got := output(t, c, `echo $(id -u) $(id -g) $(id -G)`); got != ids {
		t.Errorf("a session has ids %q, want %q", got, ids)
	}
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	s.RequestPty("vt100", 24, 80, ssh.TerminalModes{ssh.ONLCR: 0})
	if out, err := s.Output(`stat -c '%U %G %a' $(tty); id -u; ls -l /proc/self/fd | grep -cE 'socket|anon_inode|ptmx'; ls /root 2>&1 >/dev/null | wc -l`); err != nil || string(out) != "games tty 620\n5\n0\n1\n" {
		t.Errorf("with a terminal: %q, %v", out, err)
	}

	// Files that the agent makes are the user's, those it cannot reach stay
	// out of reach, and who connects is the user too.
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
	if err := unix.Stat(games.Home+"/sock", &st); err != nil || st.Uid != games.UID || st.Gid != games.GID || st.Mode&0o777 != 0o600 {
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
		if err != nil || cred.Uid != games.UID || cred.Gid != games.GID {
			t.Errorf("the peer is %+v, %v", cred, err)
		}
	})

	// So are the sockets of TCP forwards, those that listen too.
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
	if got := socketUID(t, addrPort(came.RemoteAddr())); got != games.UID {
		t.Errorf("a forward is made by user %d", got)
	}
	remote, err := c.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer remote.Close()
	if got := socketUID(t, addrPort(remote.Addr())); got != games.UID {
		t.Errorf("user %d listens for a remote forward", got)
	}
	if os.Geteuid() != 0 {
		t.Error("the agent itself is not root any more")
	}
}

// socketUID says who made the TCP socket with a local address, as the kernel's
// table has it (proc_pid_net(5)).
func socketUID(t *testing.T, local netip.AddrPort) uint32 {
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	ip := local.Addr().As4()
	want := fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(ip[:]), local.Port())
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 7 && f[1] == want {
			uid, err := strconv.ParseUint(f[7], 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			return uint32(uid)
		}
	}
	t.Fatalf("no socket at %s (%s) in\n%s", local, want, table)
	return 0
}

// TestBecome: a program that is started as another account gets what it was given,
// byte for byte, and nothing of root's; one that cannot be started is told of.
func TestBecome(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can start programs as somebody else")
	}
	games := Account{UID: 5, GID: 60, Groups: []uint32{60, 5}}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	start := func(path, dir string) (*process, error) {
		return games.start(command{
			path: path,
			argv: []string{"-name", "-c", `pwd; echo $(id -ru) $(id -rg) $(id -G); grep CapPrm /proc/self/status
				test ! -e /proc/$$/fd/3 -a ! -e /proc/$$/fd/4 || echo descriptors; env | grep -v -e ^PATH= -e ^PWD= -e ^OLDPWD= -e ^SHLVL= -e ^_=; printf "%s" "$0"`, "\xff\n\""},
			env: []string{"A=\xfe b", "EMPTY="}, dir: dir, files: [3]*os.File{r, w, w},
		})
	}
	for what, tt := range map[string]struct {
		path, dir string
		want      error
	}{
		"no such program":   {"/no/such", "/", syscall.ENOENT},
		"not a program":     {"/etc/passwd", "/", syscall.EACCES},
		"a folder of roots": {"/bin/sh", "/root", syscall.EACCES},
	} {
		if _, err := start(tt.path, tt.dir); err != tt.want {
			t.Errorf("%s: %v, want %v", what, err, tt.want)
		}
	}
	p, err := start("/bin/sh", "/tmp")
	if err != nil {
		t.Fatal(err)
	}
	if status := p.wait(); status.ExitStatus() != 0 {
		t.Errorf("it ended with %v", status)
	}
	w.Close()
	out, err := io.ReadAll(r)
	const want = "/tmp\n5 60 60 5\nCapPrm:\t0000000000000000\nA=\xfe b\nEMPTY=\n\xff\n\""
	if string(out) != want || err != nil {
		t.Errorf("got  %q, %v\nwant %q", out, err, want)
	}
}

// TestProcessStaysRoots: whatever is done as the account, the process, which is
// what its main thread is, has root's ids.
func TestProcessStaysRoots(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can do things as somebody else")
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
				err := games.do(func() error {
					if os.Geteuid() != 5 {
						return errors.New("not the account")
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
			t.Fatalf("the process has the ids%s, and had%s", got, before)
		}
	}
}

// TestAgentOfAnother: a forwarded agent answers nobody but the user and root,
// even if she has opened its socket to everybody.
func TestAgentOfAnother(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can connect as somebody else")
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
		if err := tt.account.do(func() (err error) { conn, err = net.Dial("unix", string(out)); return err }); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); string(got) != tt.want || err != nil {
			t.Errorf("user %d was told %q, %v; want %q", tt.account.UID, got, err, tt.want)
		}
		conn.Close()
	}
}

// TestReapOrphans runs a child that leaves an orphan to this process, as it
// would to process 1.
func TestReapOrphans(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	b := start(t, nil)
	c := b.dial(alice())
	var orphan int
	fmt.Sscan(output(t, c, "setsid sh -c 'exit 0' >/dev/null 2>&1 & echo $!"), &orphan)
	eventually(t, "orphan reaped", func() bool {
		if err := reapOrphans(); err != nil {
			t.Fatal(err)
		}
		return unix.Kill(orphan, 0) == unix.ESRCH
	})
	// Children that somebody waits for keep their status.
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 20 {
			s, err := c.NewSession()
			if err != nil {
				t.Error(err)
				return
			}
			if exit, ok := s.Run("exit 7").(*ssh.ExitError); !ok || exit.ExitStatus() != 7 {
				t.Error("lost an exit status")
			}
		}
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
			reapOrphans()
		}
	}
}
