package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

func TestEnvironment(t *testing.T) {
	t.Parallel()
	b := start(t, func(s *Server) { s.TZ = "Asia/Tokyo" })
	id := alice()
	id.Permissions.Environment = []string{"FROM_KEY=yes"}
	c := b.dial(id)
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	s.Setenv("LANG", "xx_YY")
	if err := s.Setenv("EVIL", "1"); err == nil {
		t.Error("EVIL was accepted")
	}
	out, err := s.Output("env")
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		got[name] = value
	}
	local := c.LocalAddr().String()
	host, port, _ := strings.Cut(local, ":")
	_, serverPort, _ := strings.Cut(b.addr, ":")
	for name, want := range map[string]string{
		"LANG": "xx_YY", "USER": "alice", "LOGNAME": "alice", "HOME": b.home, "SHELL": "/bin/bash",
		"MAIL": "/var/mail/alice", "TZ": "Asia/Tokyo", "FROM_KEY": "yes", "EVIL": "", "SSH_TTY": "", "SSH_ORIGINAL_COMMAND": "",
		"SSH_CONNECTION": host + " " + port + " 127.0.0.1 " + serverPort,
		"SSH_CLIENT":     host + " " + port + " " + serverPort,
	} {
		if got[name] != want {
			t.Errorf("%s=%q, want %q", name, got[name], want)
		}
		delete(got, name)
	}
	for _, name := range []string{"PATH", "PWD", "SHLVL", "_"} {
		delete(got, name)
	}
	if len(got) > 0 {
		t.Errorf("variables of the agent's own environment: %v", got)
	}
}

// TestNoEnvironment checks that an agent without AcceptEnv rejects even LANG.
func TestNoEnvironment(t *testing.T) {
	t.Parallel()
	b := start(t, func(s *Server) { s.AcceptEnv = nil })
	s, err := b.dial(alice()).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Setenv("LANG", "C"); err == nil {
		t.Error("LANG was accepted")
	}
}

// greeting returns the output of an interactive shell that exits at once.
func greeting(t *testing.T, b *testBastion) string {
	t.Helper()
	s, err := b.dial(alice()).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s.Stdout = &out
	s.Stdin = strings.NewReader("exit\n")
	if err := s.RequestPty("vt100", 24, 80, ssh.TerminalModes{ssh.ECHO: 0}); err != nil {
		t.Fatal(err)
	}
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	s.Wait()
	return out.String()
}

// TestGreeting checks the line about the last login, and that .hushlogin removes it.
func TestGreeting(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	if got := greeting(t, b); strings.Contains(got, "Last login") {
		t.Errorf("the first login is greeted with %q", got)
	}
	if got := greeting(t, b); !strings.Contains(got, "Last login: ") || !strings.Contains(got, " from 127.0.0.1\r\n") {
		t.Errorf("the second login is greeted with %q", got)
	}
	if err := os.WriteFile(filepath.Join(b.home, ".hushlogin"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := greeting(t, b); strings.Contains(got, "Last login") {
		t.Errorf("with .hushlogin the login is greeted with %q", got)
	}
}

func TestRC(t *testing.T) {
	t.Parallel()
	b := start(t, nil)
	if err := os.Mkdir(filepath.Join(b.home, ".ssh"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.home, ".ssh/rc"), []byte("echo rc in $PWD as $USER\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := output(t, b.dial(alice()), "echo main"), "rc in "+b.home+" as alice\nmain\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	id := alice()
	id.Permissions.UserRC = false
	if got := output(t, b.dial(id), "echo main"); got != "main\n" {
		t.Errorf("without permission: got %q", got)
	}
}
