package sshtest

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"testing"
)

// StartSSHD starts OpenSSH's sshd with a configuration file, which must have it listen
// at addr, and returns when it does. sshd runs in the directory /, with the PATH of the
// test and env as its environment. It is killed when the test ends, and its log is shown
// if the test has failed.
func StartSSHD(t testing.TB, config, addr string, env ...string) {
	t.Helper()
	if os.Geteuid() == 0 {
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // Debian's privilege separation directory
			t.Fatal(err)
		}
	}
	// sshd, unlike a Go program, leaves signals ignored that are ignored when it starts.
	cmd := exec.Command("env", "--default-signal", "/usr/sbin/sshd", "-D", "-e", "-f", config)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("sshd's log:\n%s", log.String())
		}
	})
	Eventually(t, "sshd listens at "+addr, func() bool {
		nc, err := net.Dial("tcp", addr)
		if err == nil {
			nc.Close()
		}
		return err == nil
	})
}

// FreeAddr returns an address of the loopback interface on which nothing listens. The
// kernel may give its port to another program at any time.
func FreeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
