package agent

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// Files of sshd and login(1).
const (
	motdFile  = "/etc/motd"
	userRC    = ".ssh/rc"        // in the home directory
	systemRC  = "/etc/ssh/sshrc" // runs before the sessions of users without an rc script
	xauthPath = "/usr/bin/xauth"
)

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

func (e *environ) unset(name string) {
	i, ok := e.at[name]
	if !ok {
		return
	}
	e.vars = slices.Delete(e.vars, i, i+1)
	delete(e.at, name)
	for name, at := range e.at {
		if at > i {
			e.at[name] = at - 1
		}
	}
}

// setAll sets NAME=value pairs.
func (e *environ) setAll(pairs []string) {
	for _, p := range pairs {
		if name, value, ok := strings.Cut(p, "="); ok && name != "" && !strings.ContainsRune(p, 0) {
			e.set(name, value)
		}
	}
}

// changesCommand reports whether a variable can make a program, or the shell that starts it,
// run or load other code. If a command is forced, the client may not set such a variable,
// even if a pattern in accept_env matches it. The names are those that sudo(8) removes, and
// those of Node and Git.
func changesCommand(name, value string) bool {
	if strings.HasPrefix(value, "()") { // a function, in old shells
		return true
	}
	return slices.ContainsFunc(commandVariables, func(pattern string) bool { return policy.Match(pattern, name) })
}

var commandVariables = []string{
	"PATH", "IFS", "CDPATH", "ENV", "BASH_ENV", "BASH_FUNC_*", "BASHOPTS", "SHELLOPTS", "PS4", "GLOBIGNORE", "ZDOTDIR", "FPATH", "NULLCMD", "READNULLCMD", "TMPPREFIX",
	"LD_*", "GLIBC_TUNABLES", "GCONV_PATH", "LOCPATH", "NLSPATH", "LOCALDOMAIN", "RES_OPTIONS", "HOSTALIASES", "NIS_PATH",
	"KRB5_CONFIG*", "KRB5_KTNAME", "TERMINFO", "TERMINFO_DIRS", "TERMPATH", "TERMCAP",
	"PERL*", "PYTHON*", "RUBYLIB", "RUBYOPT", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "NODE_OPTIONS", "NODE_PATH", "LUA_*",
	"GIT_CONFIG*", "GIT_SSH*", "GIT_EXEC_PATH", "GIT_TEMPLATE_DIR", "GIT_PROXY_COMMAND", "GIT_EXTERNAL_DIFF", "GIT_ASKPASS", "SSH_ASKPASS", "EDITOR", "VISUAL", "*PAGER", "LESSOPEN", "LESSCLOSE",
	"RSYNC_*", "HOME", "SHELL",
}

// environment returns the variables of a session, in the order of sshd's do_setup_env: the
// defaults, the container's, the client's, the account's, the login's, the key's, PAM's and
// the connection's. A later one replaces an earlier one.
//
// If the login may only copy files, the sftp server gets the variables of the account and
// the connection only. Otherwise the client could have the server load one of her files,
// with LD_PRELOAD. (sshd's internal-sftp executes no program.)
func (s *session) environment(l launch) []string {
	a := s.c.login.Account
	var env environ
	env.set("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/games")
	if a.UID == 0 {
		env.set("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	if !l.filesOnly {
		env.setAll(s.c.server.Environment)
		env.setAll(s.env)
	}
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
	if !l.filesOnly {
		env.setAll(s.c.id.Permissions.Environment)
		files := s.c.server.environmentFiles
		if files == nil {
			files = environmentFiles
		}
		env.setAll(pamEnvironment(files))
	}

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

// startsAtOnce reports whether prepare has nothing to do.
func (s *session) startsAtOnce(l launch) bool {
	return s.rcScript(l) == "" && s.x11 == nil && !s.showsMOTD(l)
}

// showsMOTD reports whether the session shows the message of the day: an interactive login
// does, unless ~/.hushlogin exists.
func (s *session) showsMOTD(l launch) bool {
	if l.command != "" || s.tty == nil {
		return false
	}
	_, err := os.Stat(filepath.Join(s.c.login.Account.Home, ".hushlogin"))
	return err != nil
}

// rcScript returns the script that runs before the session (sshd(8), SSHRC): the user's, or
// the system's, or "".
func (s *session) rcScript(l launch) string {
	if !l.subsystem && !l.filesOnly && s.c.id.Permissions.UserRC {
		if _, err := os.Stat(filepath.Join(s.c.login.Account.Home, userRC)); err == nil {
			return userRC
		}
	}
	rc := cmp.Or(s.c.server.systemRC, systemRC)
	if _, err := os.Stat(rc); err == nil {
		return rc
	}
	return ""
}

// prepare shows the message of the day and the last login to an interactive session. Then it
// runs the rc script, or xauth if there is no script, with the session's own output.
func (s *session) prepare(l launch, last terminalLogin) {
	if s.showsMOTD(l) {
		if motd, err := os.Open(motdFile); err == nil {
			io.Copy(l.files[1], io.LimitReader(motd, 64<<10))
			motd.Close()
		}
		if !last.at.IsZero() {
			fmt.Fprintln(l.files[1], last)
		}
	}
	cmd := command{env: s.environment(l), dir: s.c.login.Account.Home}
	var stdin string
	if rc := s.rcScript(l); rc != "" {
		cmd.path, cmd.argv = "/bin/sh", []string{"sh", rc}
		if rc == userRC { // as in sshd, so that the shell's start-up files apply
			cmd.path = s.c.login.Account.shell()
			cmd.argv = []string{filepath.Base(cmd.path), "-c", "/bin/sh " + rc}
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
	if err := s.runBefore(cmd, stdin, l); err != nil {
		s.c.log.Warn("preparing a session failed", "command", cmd.argv, "err", err)
	}
}

// runBefore runs a command with the session's output, and waits for its end.
func (s *session) runBefore(cmd command, stdin string, l launch) error {
	fds, err := s.c.login.Account.pipe()
	if err != nil {
		return err
	}
	r, w := os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe")
	defer w.Close()
	cmd.files = [3]*os.File{r, l.files[1], l.files[2]}
	proc, err := s.c.start(cmd)
	r.Close()
	if err != nil {
		return err
	}
	s.setProcess(proc)
	defer s.setProcess(nil)
	io.WriteString(w, stdin) // does not block: less than a pipe buffers
	w.Close()
	<-proc.ended
	return nil
}
