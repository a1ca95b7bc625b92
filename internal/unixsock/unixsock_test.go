package unixsock

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestMain makes the test binary a program that connects to a socket.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "connect" {
		c, err := net.Dial("unix", os.Args[2])
		if err != nil {
			os.Exit(3)
		}
		if n, _ := c.Read(make([]byte, 1)); n == 0 {
			os.Exit(4) // the listener has closed the connection
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestLongPath listens and connects at a path that is longer than sun_path.
func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 50), strings.Repeat("x", 129))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "1-00c0ffee.sock")
	for range 2 { // the second time, there is the socket of a process that was killed
		l, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		if l.Addr().String() != "unix:"+path {
			t.Errorf("listens at %s", l.Addr())
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", info, err)
		}
		accepted := make(chan error, 1)
		go func() {
			c, err := l.Accept()
			if err == nil {
				_, err = c.Write([]byte("hello"))
				c.Close()
			}
			accepted <- err
		}()
		c, err := Dial(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(c); string(text) != "hello" {
			t.Errorf("read %q, %v", text, err)
		}
		c.Close()
		if err := <-accepted; err != nil {
			t.Error(err)
		}
		if err := l.UnixListener.Close(); err != nil { // as SIGKILL does, without unlinking
			t.Fatal(err)
		}
		l.dir.Close()
		if _, err := Dial(t.Context(), path); !errors.Is(err, syscall.ECONNREFUSED) || strings.Contains(err.Error(), "/proc") {
			t.Errorf("Dial without a listener: %v", err)
		}
	}
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
	if _, err := Dial(t.Context(), path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Dial after Close: %v", err)
	}
}

// TestOtherAccounts connects as another account. The mode of the socket must refuse it, and
// SO_PEERCRED if the mode has been changed.
func TestOtherAccounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir, err := os.MkdirTemp("", "unixsock") // other accounts cannot enter t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755)
	path := filepath.Join(dir, "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Write([]byte("x"))
			c.Close()
		}
	}()
	program := filepath.Join(dir, "connect")
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	connect := func(uid uint32) int {
		t.Helper()
		cmd := exec.Command(program, "connect", path)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		cmd.Run()
		return cmd.ProcessState.ExitCode()
	}
	const other = 54321 // a user id needs no account
	if status := connect(0); status != 0 {
		t.Errorf("own account: exit status %d", status)
	}
	if status := connect(other); status != 3 {
		t.Errorf("another account, mode 0600: exit status %d", status)
	}
	os.Chmod(path, 0o777)
	if status := connect(other); status != 4 {
		t.Errorf("another account, mode 0777: exit status %d", status)
	}
}

func TestPath(t *testing.T) {
	for addr, want := range map[string]string{
		"unix:/run/a.sock": "/run/a.sock", "unix:/": "", "unix:a": "", "unix:": "", "unix:/a/../b": "", "unix:/a\x00b": "",
		"127.0.0.1:22": "", "/run/a.sock": "",
	} {
		if got, ok := Path(addr); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %t", addr, got, ok)
		}
	}
}
