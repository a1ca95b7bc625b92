package agent

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Files that sshd and login(1) know.
const (
	environmentFile = "/etc/environment"
	motdFile        = "/etc/motd"
	userRC          = ".ssh/rc" // in the home directory
	xauthPath       = "/usr/bin/xauth"
)

// systemRC is what runs before a session of who has no rc script of her own. A
// variable for tests.
var systemRC = "/etc/ssh/sshrc"

// environ is an environment in which a later value replaces an earlier one.
type environ struct {
	vars []string
	at   map[string]int
}

func (e *environ) set(name, value string) {
	if e.at == nil {
		e.at = make(map[string]int)
	}
	if i, ok := e.at[name]; ok {
		e.vars[i] = name + "=" + value
		return
	}
	e.at[name] = len(e.vars)
	e.vars = append(e.vars, name+"="+value)
}

// setAll sets NAME=value pairs.
func (e *environ) setAll(pairs []string) {
	for _, p := range pairs {
		if name, value, ok := strings.Cut(p, "="); ok && name != "" && !strings.ContainsRune(p, 0) {
			e.set(name, value)
		}
	}
}

// environment is what sshd's do_setup_env makes: the machine's defaults, what
// the client may set, the account, what the key says, the connection.
func (s *session) environment(l launch) []string {
	a := s.c.server.Account
	var env environ
	env.set("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/games")
	if a.UID == 0 {
		env.set("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	if text, err := os.ReadFile(environmentFile); err == nil {
		env.setAll(parseEnvironment(string(text)))
	}
	env.setAll(s.env)
	env.set("USER", a.Name)
	env.set("LOGNAME", a.Name)
	env.set("HOME", a.Home)
	env.set("MAIL", "/var/mail/"+a.Name)
	env.set("SHELL", a.shell())
	if tz := s.c.server.TZ; tz != "" {
		env.set("TZ", tz)
	}
	if s.tty != nil {
		env.set("TERM", s.tty.term)
	}
	if s.x11 != nil {
		env.set("DISPLAY", s.x11.display())
	}
	if path := s.c.agentPath(); path != "" {
		env.set("SSH_AUTH_SOCK", path)
	}
	env.setAll(s.c.id.Permissions.Environment)

	client, server := s.c.id.Client, s.c.id.Server
	if client.IsValid() && server.IsValid() {
		env.set("SSH_CLIENT", fmt.Sprintf("%s %d %d", client.Addr(), client.Port(), server.Port()))
		env.set("SSH_CONNECTION", fmt.Sprintf("%s %d %s %d", client.Addr(), client.Port(), server.Addr(), server.Port()))
	}
	if s.tty != nil {
		env.set("SSH_TTY", s.tty.name())
	}
	if l.original != "" {
		env.set("SSH_ORIGINAL_COMMAND", l.original)
	}
	return env.vars
}

// parseEnvironment reads /etc/environment as pam_env does: NAME=value lines,
// "export " and one pair of quotes allowed, # for comments.
func parseEnvironment(text string) []string {
	var pairs []string
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimPrefix(strings.TrimSpace(line), "export ")
		name, value, ok := strings.Cut(line, "=")
		if !ok || name == "" || strings.ContainsAny(name, " \t") {
			continue
		}
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		pairs = append(pairs, name+"="+value)
	}
	return pairs
}

// quick says that there is nothing to prepare before the process starts.
func (s *session) quick(l launch) bool {
	return s.rc(l) == "" && s.x11 == nil && !s.greets(l)
}

// greets says whether the session gets the message of the day: an interactive
// login does, unless ~/.hushlogin is there.
func (s *session) greets(l launch) bool {
	if l.command != "" || s.tty == nil {
		return false
	}
	_, err := os.Stat(filepath.Join(s.c.server.Account.Home, ".hushlogin"))
	return err != nil
}

// rc returns the script that runs before the session: the user's, or else the
// system's, or "" (sshd(8), SSHRC).
func (s *session) rc(l launch) string {
	if _, err := os.Stat(filepath.Join(s.c.server.Account.Home, userRC)); err == nil && !l.subsystem && s.c.id.Permissions.UserRC {
		return userRC
	}
	if _, err := os.Stat(systemRC); err == nil {
		return systemRC
	}
	return ""
}

// prepare greets an interactive session, with the login before it, and runs the
// rc script or, where there is none, xauth. The scripts write to the session's
// own files.
func (s *session) prepare(l launch, last login) {
	if s.greets(l) {
		if motd, err := os.Open(motdFile); err == nil {
			io.Copy(l.files[1], io.LimitReader(motd, 64<<10))
			motd.Close()
		}
		if !last.at.IsZero() {
			fmt.Fprintln(l.files[1], last)
		}
	}
	cmd := command{env: s.environment(l), dir: s.c.server.Account.Home}
	var stdin string
	if rc := s.rc(l); rc != "" {
		cmd.path, cmd.argv = "/bin/sh", []string{"sh", rc}
		if rc == userRC { // as sshd, so that it finds what the shell sets
			cmd.path, cmd.argv = s.commandLine("/bin/sh " + rc)
		}
		if s.x11 != nil {
			stdin = s.x11.protocol + " " + s.x11.cookie + "\n"
		}
	} else if s.x11 != nil {
		cmd.path, cmd.argv = xauthPath, []string{xauthPath, "-q", "-"}
		stdin = s.x11.xauthCommands()
	} else {
		return
	}
	if err := s.runFirst(cmd, stdin, l); err != nil {
		s.c.log.Warn("preparing a session", "command", cmd.argv, "err", err)
	}
}

// runFirst runs a command with the session's output, and waits for it.
func (s *session) runFirst(cmd command, stdin string, l launch) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	cmd.files = [3]*os.File{r, l.files[1], l.files[2]}
	proc, err := s.c.server.start(cmd)
	r.Close()
	if err != nil {
		return err
	}
	s.setProcess(proc)
	defer s.setProcess(nil)
	io.WriteString(w, stdin) // less than a pipe holds
	w.Close()
	<-proc.ended
	return nil
}
