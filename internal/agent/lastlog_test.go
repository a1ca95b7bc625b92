package agent

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestLastlog checks that logins are stored in the lastlog file, that lastlog(8) can read them,
// and that the next bastion shows them.
func TestLastlog(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	file := filepath.Join(root, "var/log/lastlog")
	etc := filepath.Join(root, "etc")
	for _, dir := range []string{filepath.Dir(file), etc} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	change := func(s *Server) { s.Lastlog = file }

	b := start(t, change)
	greeting(t, b)
	if _, err := os.Stat(file); err == nil {
		t.Fatal("the lastlog file was created")
	}
	if got := greeting(t, b); !strings.Contains(got, "Last login: ") {
		t.Errorf("without a file the second login is greeted with %q", got)
	}

	nowhere := start(t, func(s *Server) { s.Lastlog = os.DevNull })
	greeting(t, nowhere)
	if got := greeting(t, nowhere); !strings.Contains(got, "Last login: ") {
		t.Errorf("with a file that keeps nothing the second login is greeted with %q", got)
	}

	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := start(t, change).dial(alice()).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RequestPty("vt100", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	line, err := s.Output("tty")
	if err != nil {
		t.Fatal(err)
	}
	if got := greeting(t, start(t, change)); !strings.Contains(got, "Last login: ") || !strings.Contains(got, " from 127.0.0.1\r\n") {
		t.Errorf("after a command with a terminal, to another bastion, the login is greeted with %q", got)
	}

	if _, err := exec.LookPath("lastlog"); err != nil || os.Getuid() != 0 {
		t.Skip("the rest needs lastlog(8), and root for it to look at another file")
	}
	if err := os.WriteFile(filepath.Join(etc, "passwd"), []byte("root:x:0:0::/root:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, errs, code := run(t, "", "lastlog", "-R", root, "-u", "0")
	_, terminal, _ := strings.Cut(strings.TrimSpace(string(line)), "/dev/")
	if code != 0 || !strings.Contains(out, terminal) || !strings.Contains(out, " 127.0.0.1 ") || !strings.Contains(out, time.Now().Format(" 2006")) {
		t.Errorf("lastlog shows %q, %q, exit %d; want terminal %s", out, errs, code, terminal)
	}
}
