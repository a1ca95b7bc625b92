package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// echo answers every connection to l with "hello ", the data that it receives, and EOF.
func echo(t testing.TB, l net.Listener) {
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.WriteString(c, "hello ")
				io.Copy(c, c)
			}()
		}
	}()
}

func listen(t testing.TB, network, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// ask sends text and EOF, and checks the answer of echo.
func ask(t testing.TB, c net.Conn, text string) {
	t.Helper()
	defer c.Close()
	go func() {
		io.WriteString(c, text)
		c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "hello "+text {
		t.Errorf("got %d bytes, err %v; want %d", len(got), err, len("hello "+text))
	}
}

// master starts an OpenSSH client without a session, and stops it when the test ends.
func master(t testing.TB, config string, options ...string) {
	t.Helper()
	control := filepath.Join(t.TempDir(), "c")
	stdout, stderr, code := run(t, "", "ssh", append([]string{"-F", config, "-fNM", "-S", control, "-o", "ExitOnForwardFailure=yes"}, append(options, "bastion")...)...)
	if code != 0 {
		t.Fatalf("ssh %q: %s%s", options, stdout, stderr)
	}
	t.Cleanup(func() { run(t, "", "ssh", "-F", config, "-S", control, "-O", "exit", "bastion") })
}

func freePort(t testing.TB) string {
	t.Helper()
	l := listen(t, "tcp", "127.0.0.1:0")
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func TestForwardsWithOpenSSH(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	config := b.sshConfig(alice())
	target := listen(t, "tcp", "127.0.0.1:0")
	echo(t, target)
	dir := t.TempDir()
	sock := filepath.Join(dir, "target")
	echo(t, listen(t, "unix", sock))
	local, remote, socks := freePort(t), freePort(t), freePort(t)
	master(t, config,
		"-L", "127.0.0.1:"+local+":"+target.Addr().String(),
		"-R", remote+":"+target.Addr().String(),
		"-D", "127.0.0.1:"+socks,
		"-L", dir+"/l:"+sock,
		"-R", dir+"/r:"+sock)

	big := strings.Repeat("0123456789", 300_000)
	for _, to := range []struct{ network, addr string }{
		{"tcp", "127.0.0.1:" + local}, {"tcp", "127.0.0.1:" + remote}, {"tcp", "[::1]:" + remote},
		{"unix", dir + "/l"}, {"unix", dir + "/r"},
	} {
		for _, text := range []string{"", "x", big} {
			c, err := net.Dial(to.network, to.addr)
			if err != nil {
				t.Fatal(err)
			}
			ask(t, c, text)
		}
	}
	if info, err := os.Stat(dir + "/r"); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the remote socket: %v, %v", info, err)
	}

	c, err := net.Dial("tcp", "127.0.0.1:"+socks)
	if err != nil {
		t.Fatal(err)
	}
	addr := target.Addr().(*net.TCPAddr)
	c.Write(append([]byte{4, 1, byte(addr.Port >> 8), byte(addr.Port)}, append(addr.IP.To4(), 0)...)) // SOCKS4
	io.ReadFull(c, make([]byte, 8))
	ask(t, c, "through SOCKS")
}

// TestRemoteForward checks the port that is allocated and reported, canceling, and the removal
// of sockets.
func TestRemoteForward(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	c := b.dial(alice())
	forward := func(kind, host string, port uint32) (bool, uint32) {
		t.Helper()
		ok, reply, err := c.SendRequest(kind, true, ssh.Marshal(tcpAddr{host, port}))
		if err != nil {
			t.Fatal(err)
		}
		if len(reply) == 4 {
			port = binary.BigEndian.Uint32(reply)
		}
		return ok, port
	}
	offers := c.HandleChannelOpen("forwarded-tcpip")
	for _, host := range []string{"", "*", "localhost", "0.0.0.0", "127.0.0.1"} {
		ok, port := forward("tcpip-forward", host, 0)
		if !ok || port == 0 {
			t.Fatalf("%q: %v, port %d", host, ok, port)
		}
		if again, _ := forward("tcpip-forward", host, port); again {
			t.Errorf("%q: port %d was forwarded twice", host, port)
		}
		if other, _ := forward("cancel-tcpip-forward", "other", port); other {
			t.Errorf("%q: canceled with another host", host)
		}
		if done, _ := forward("cancel-tcpip-forward", host, port); !done {
			t.Errorf("%q: not canceled", host)
		}
		// Another program may have got the port since, but only the agent offers the
		// connection to this client.
		if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			select {
			case offer := <-offers:
				offer.Reject(ssh.Prohibited, "")
				t.Errorf("%q: port %d still open", host, port)
			case <-time.After(time.Second):
			}
			conn.Close()
		}
	}
	if ok, _ := forward("tcpip-forward", "localhost", 70000); ok {
		t.Error("port 70000 was forwarded")
	}

	path := filepath.Join(t.TempDir(), "s")
	unixForward := func(kind string) bool {
		ok, _, _ := c.SendRequest(kind, true, ssh.Marshal(streamlocalAddr{path}))
		return ok
	}
	if !unixForward("streamlocal-forward@openssh.com") || unixForward("streamlocal-forward@openssh.com") {
		t.Error("a socket was not forwarded, or twice")
	}
	if !unixForward("cancel-streamlocal-forward@openssh.com") || !unixForward("streamlocal-forward@openssh.com") {
		t.Error("a socket was not canceled, or not forwarded again")
	}
	c.Close()
	sshtest.Eventually(t, "the socket has been removed", func() bool { _, err := os.Stat(path); return os.IsNotExist(err) })
}

func TestForwardRules(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	target := listen(t, "tcp", "127.0.0.1:0")
	echo(t, target)
	port := uint32(target.Addr().(*net.TCPAddr).Port)
	sock := filepath.Join(t.TempDir(), "s")
	echo(t, listen(t, "unix", sock))
	var closed uint32
	fmt.Sscan(freePort(t), &closed)

	none := alice()
	none.Permissions.PortForwarding = false
	some := alice()
	some.Permissions.PermitOpen = []string{fmt.Sprintf("127.0.0.1:%d", port)}
	some.Permissions.PermitListen = []string{"localhost:*"}
	free, no, limited := b.dial(alice()), b.dial(none), b.dial(some)

	tcp := func(host string, port uint32) []byte { return ssh.Marshal(directTCP{host, port, "127.0.0.1", 1}) }
	unixSock := ssh.Marshal(directStreamlocal{Path: sock})
	for _, tt := range []struct {
		name    string
		client  *ssh.Client
		kind    string
		payload []byte
		want    string
	}{
		{"free", free, "direct-tcpip", tcp("127.0.0.1", port), ""},
		{"free, socket", free, "direct-streamlocal@openssh.com", unixSock, ""},
		{"refused", free, "direct-tcpip", tcp("127.0.0.1", closed), "connect failed: Connection refused"},
		{"no socket", free, "direct-streamlocal@openssh.com", ssh.Marshal(directStreamlocal{Path: sock + "x"}), "connect failed: No such file or directory"},
		{"abstract name", free, "direct-streamlocal@openssh.com", ssh.Marshal(directStreamlocal{Path: "@x"}), "connect failed: No such file or directory"},
		{"tun", free, "tun@openssh.com", make([]byte, 8), "administratively prohibited: open failed"},
		{"unknown", free, "unknown@example.com", nil, "unknown channel type: open failed"},
		{"garbage", free, "direct-tcpip", []byte{1, 2}, "administratively prohibited: open failed"},
		{"huge port", free, "direct-tcpip", tcp("127.0.0.1", port+65536), "administratively prohibited: open failed"},
		{"not permitted", no, "direct-tcpip", tcp("127.0.0.1", port), "administratively prohibited: port forwarding is not permitted for this key"},
		{"not permitted, socket", no, "direct-streamlocal@openssh.com", unixSock, "administratively prohibited: port forwarding is not permitted for this key"},
		{"permitopen", limited, "direct-tcpip", tcp("127.0.0.1", port), ""},
		{"permitopen, other", limited, "direct-tcpip", tcp("localhost", port), fmt.Sprintf("administratively prohibited: permitopen of this key does not permit localhost:%d", port)},
		{"permitopen, socket", limited, "direct-streamlocal@openssh.com", unixSock, "administratively prohibited: permitopen of this key does not permit Unix sockets"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ch, reqs, err := tt.client.OpenChannel(tt.kind, tt.payload)
			got := ""
			if err != nil {
				e := err.(*ssh.OpenChannelError)
				got = e.Reason.String() + ": " + e.Message
			} else {
				go ssh.DiscardRequests(reqs)
				ch.Close()
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	for _, tt := range []struct {
		name   string
		client *ssh.Client
		kind   string
		want   bool
		body   any
	}{
		{"permitlisten", limited, "tcpip-forward", true, tcpAddr{"localhost", 0}},
		{"permitlisten, other", limited, "tcpip-forward", false, tcpAddr{"*", 0}},
		{"permitlisten, socket", limited, "streamlocal-forward@openssh.com", false, streamlocalAddr{sock + "l"}},
		{"none", no, "tcpip-forward", false, tcpAddr{"localhost", 0}},
		{"none, socket", no, "streamlocal-forward@openssh.com", false, streamlocalAddr{sock + "l"}},
		{"keepalive", free, "keepalive@openssh.com", false, streamlocalAddr{}},
		{"hostkeys", free, "hostkeys-prove-00@openssh.com", false, streamlocalAddr{}},
	} {
		if ok, _, err := tt.client.SendRequest(tt.kind, true, ssh.Marshal(tt.body)); ok != tt.want || err != nil {
			t.Errorf("%s: %v, %v", tt.name, ok, err)
		}
	}
}

// TestClientClosesForward closes a forward whose target sends nothing. The target must get the
// client's data and EOF.
func TestClientClosesForward(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	l := listen(t, "tcp", "127.0.0.1:0")
	defer l.Close()
	c, err := b.dial(alice()).Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	target, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	io.WriteString(c, "last words")
	c.Close()
	if got, err := io.ReadAll(target); string(got) != "last words" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestAgentForwarding(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	c := b.dial(alice())
	var mu sync.Mutex
	opens := 0
	go func() {
		for nc := range c.HandleChannelOpen("auth-agent@openssh.com") {
			ch, reqs, err := nc.Accept()
			if err != nil {
				return
			}
			go ssh.DiscardRequests(reqs)
			mu.Lock()
			opens++
			mu.Unlock()
			go func() { io.WriteString(ch, "hello "); io.Copy(ch, ch); ch.CloseWrite(); ch.Close() }()
		}
	}()
	sockets := make(map[string]bool)
	for range 2 {
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := s.SendRequest("auth-agent-req@openssh.com", true, nil); !ok || err != nil {
			t.Fatal(ok, err)
		}
		out, err := s.Output("stat -c '%a' $SSH_AUTH_SOCK $(dirname $SSH_AUTH_SOCK); echo $SSH_AUTH_SOCK")
		if err != nil || !strings.HasPrefix(string(out), "600\n700\n") {
			t.Fatalf("%q, %v", out, err)
		}
		sockets[strings.TrimPrefix(strings.TrimSpace(string(out)), "600\n700\n")] = true
	}
	if len(sockets) != 1 {
		t.Errorf("one connection has the sockets %v", sockets)
	}
	for sock := range sockets {
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				conn, err := net.Dial("unix", sock)
				if err != nil {
					t.Error(err)
					return
				}
				ask(t, conn, strings.Repeat(fmt.Sprint(i), 1000))
			})
		}
		wg.Wait()
		c.Close()
		sshtest.Eventually(t, "the directory of the agent socket has been removed", func() bool { _, err := os.Stat(filepath.Dir(sock)); return os.IsNotExist(err) })
	}
	if opens != 20 {
		t.Errorf("%d channels, want 20", opens)
	}
}

// TestAgentWithOpenSSH lists the keys of an ssh-agent in a session.
func TestAgentWithOpenSSH(t *testing.T) {
	b := start(t, nil)
	config := b.sshConfig(alice())
	sock := filepath.Join(t.TempDir(), "agent")
	out, _, code := run(t, "", "ssh-agent", "-a", sock)
	if code != 0 {
		t.Fatal(out)
	}
	var pid int
	fmt.Sscanf(out[strings.Index(out, "SSH_AGENT_PID="):], "SSH_AGENT_PID=%d", &pid)
	defer unix.Kill(pid, unix.SIGTERM)
	t.Setenv("SSH_AUTH_SOCK", sock)
	key := filepath.Join(filepath.Dir(config), "id")
	if out, errs, code := run(t, "", "ssh-add", "-q", key); code != 0 {
		t.Fatal(out, errs)
	}
	want, _, _ := run(t, "", "ssh-add", "-L")
	if got, errs, _ := run(t, "", "ssh", "-F", config, "-A", "bastion", "ssh-add -L"); got != want {
		t.Errorf("got %q, %q\nwant %q", got, errs, want)
	}
}

// TestListenAny checks that listenAny tries another port if one is in use on any address.
func TestListenAny(t *testing.T) {
	inUse := 3
	listen := func(network, addr string) (net.Listener, error) {
		if host, port, _ := net.SplitHostPort(addr); host == "::1" {
			if inUse--; inUse >= 0 {
				return nil, &net.OpError{Op: "listen", Err: syscall.EADDRINUSE}
			}
			network, addr = "tcp4", net.JoinHostPort("127.0.0.2", port) // the machine may not have IPv6
		}
		return net.Listen(network, addr)
	}
	l, port, err := listenAny([]string{"127.0.0.1", "::1"}, listen)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	if len(l.socks) != 2 || port == 0 {
		t.Errorf("%d listeners, port %d", len(l.socks), port)
	}
	inUse = 1000
	if _, _, err := listenAny([]string{"127.0.0.1", "::1"}, listen); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("if all ports are in use: %v", err)
	}
}

func TestSFTPAndSCP(t *testing.T) {
	t.Parallel()
	for name, command := range sftpCommands(t) {
		t.Run(name, func(t *testing.T) {
			b := start(t, func(s *Server) { s.SFTP = command })
			config := b.sshConfig(alice())
			dir := t.TempDir()
			want := bytes.Repeat([]byte("0123456789abcdef"), 1<<17+3)
			if err := os.WriteFile(dir+"/up", want, 0o640); err != nil {
				t.Fatal(err)
			}
			batch := fmt.Sprintf("put %[1]s/up up\nchmod 600 up\nmkdir d\nrename up d/x\nls -l d\nget d/x %[1]s/down\n", dir)
			if out, errs, code := run(t, batch, "sftp", "-F", config, "-b", "-", "bastion"); code != 0 {
				t.Fatalf("sftp: %d\n%s%s", code, out, errs)
			}
			for _, args := range [][]string{{"-O"}, {"-s"}} { // the old protocol, and sftp's
				os.Remove(dir + "/down2")
				args = append(args, "-F", config, "bastion:d/x", dir+"/down2")
				if out, errs, code := run(t, "", "scp", args...); code != 0 {
					t.Fatalf("scp %v: %d\n%s%s", args, code, out, errs)
				}
				if got, _ := os.ReadFile(dir + "/down2"); !bytes.Equal(got, want) {
					t.Errorf("scp %v: got %d bytes, want %d", args, len(got), len(want))
				}
			}
			if got, _ := os.ReadFile(dir + "/down"); !bytes.Equal(got, want) {
				t.Errorf("sftp: got %d bytes, want %d", len(got), len(want))
			}
			if got, _ := os.ReadFile(b.home + "/d/x"); !bytes.Equal(got, want) {
				t.Errorf("on the bastion: %d bytes, want %d", len(got), len(want))
			}
		})
	}
}
