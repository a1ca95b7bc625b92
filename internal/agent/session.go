package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/mux"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

const (
	// maxEnv and maxEnvBytes limit the variables that a client may set for one session.
	// sshd has the same maxEnv.
	maxEnv      = 128
	maxEnvBytes = 64 << 10
)

// A session is a "session" channel: at most one terminal and one process (RFC 4254
// section 6).
type session struct {
	c  *conn
	ch *mux.Channel

	// The fields up to noSignals belong to the goroutine that handles requests. started is
	// set by shell, exec or subsystem, and the requests before those set the others.
	env      []string
	envBytes int
	x11      *x11
	started  bool
	// noSignals is set if the client did not choose the program. It may not send signals
	// to it then, as in sshd.
	noSignals bool

	// stdout and stderr are the output of the process. stderr is nil with a terminal.
	stdout, stderr *outStream
	// delivered is closed when both have been copied to the client, or need not be.
	delivered chan struct{}
	// eow is closed when the client has sent eow@openssh.com: it does not read standard
	// output any more. clientClosed is closed when the client has closed the channel or
	// has disconnected.
	eow, clientClosed chan struct{}
	// done is closed when the client has the exit status and we have closed the channel,
	// or when the client has closed it first.
	done chan struct{}

	mu  sync.Mutex
	tty *terminal // nil without pty-req
	// ourFiles are our ends of the process's pipes, or the master of the terminal.
	ourFiles []*os.File
	// undelivered is the number of outputs that are still being copied.
	undelivered int
	proc        *process // nil before it has started
	// terminated is set when the bastion ends, and detached when the client has closed
	// the channel. The process, or the files, may come later than that.
	terminated, detached bool
}

// session serves one session channel until both sides have closed it. The process may
// continue after that.
func (c *conn) session(nc *mux.NewChannel) {
	s := &session{
		c:            c,
		delivered:    make(chan struct{}),
		eow:          make(chan struct{}),
		clientClosed: make(chan struct{}),
		done:         make(chan struct{}),
	}
	if !c.add(s) {
		nc.Reject(sshmsg.ConnectFailed, "open failed") // sshd's answer beyond MaxSessions
		return
	}
	defer c.remove(s)
	ch, err := nc.Accept(0)
	if err != nil {
		close(s.done)
		return
	}
	s.ch = ch
	for req := range ch.Requests() {
		ok, start := s.request(req)
		req.Reply(ok, nil)
		if start != nil {
			start() // after the reply, which must precede the output
		}
	}
	// The client has closed the channel, or has disconnected.
	s.detach()
	if !s.started {
		ch.Close()
		close(s.done)
	}
	<-s.done
	if s.tty != nil {
		s.tty.close()
	}
	if s.x11 != nil {
		s.x11.close()
	}
}

// request handles one channel request without blocking for long. If start is not nil, the
// caller must call it after the reply.
func (s *session) request(req *mux.Request) (ok bool, start func()) {
	if !s.started {
		switch req.Type {
		case "pty-req":
			return s.requestTerminal(req.Payload), nil
		case "env":
			return s.requestEnv(req.Payload), nil
		case "x11-req":
			return s.c.denied == "" && s.requestX11(req.Payload), nil
		case "auth-agent-req@openssh.com", "agent-req":
			return s.c.denied == "" && s.c.forwardAgent(), nil
		case "shell":
			if !s.mayRun(req) {
				return false, nil
			}
			return s.requestStart("", false)
		case "exec":
			command, err := parseCommand(req.Payload)
			if err != nil || !s.mayRun(req) {
				return false, nil
			}
			// As in sshd, an empty command is a login shell.
			return s.requestStart(command, false)
		case "subsystem":
			name, err := parseCommand(req.Payload)
			if err != nil || name != "sftp" || len(s.c.server.SFTP) == 0 || !s.mayRun(req) {
				return false, nil
			}
			return s.requestStart(shellWords(s.c.server.SFTP), true)
		}
	}
	switch req.Type {
	case "window-change":
		return s.requestResize(req.Payload), nil
	case "signal":
		return s.requestSignal(req.Payload), nil
	case "break":
		return s.requestBreak(req.Payload), nil
	case "eow@openssh.com":
		return s.stopOutput(), nil
	}
	return false, nil
}

// mayRun reports whether the login permits a shell, exec or subsystem request.
func (s *session) mayRun(req *mux.Request) bool {
	p := s.c.id.Permissions
	return policy.MayRequest(p, req.Type, req.Payload) == nil && (s.tty != nil || policy.MayRunWithoutPTY(p, req.Type, req.Payload) == nil)
}

func (s *session) requestTerminal(payload []byte) bool {
	if s.tty != nil || !s.c.id.Permissions.PTY {
		return false
	}
	r, err := parsePTYRequest(payload)
	if err != nil {
		return false
	}
	tty, err := s.c.login.Account.openTerminal(r)
	if err != nil {
		s.c.log.Warn("opening a terminal failed", "err", err)
		return false
	}
	s.mu.Lock()
	s.tty = tty
	s.mu.Unlock()
	return true
}

func (s *session) requestEnv(payload []byte) bool {
	name, value, err := parseEnvRequest(payload)
	if err != nil || len(s.env) >= maxEnv || s.envBytes+len(name)+len(value) > maxEnvBytes {
		return false
	}
	if !slices.ContainsFunc(s.c.server.AcceptEnv, func(pattern string) bool { return policy.Match(pattern, name) }) {
		return false
	}
	if s.c.id.Permissions.ForceCommand != "" && changesCommand(name, value) {
		return false
	}
	s.envBytes += len(name) + len(value)
	s.env = append(s.env, name+"="+value)
	return true
}

func (s *session) requestResize(payload []byte) bool {
	r, err := sshmsg.ParseWindowChange(payload)
	return s.tty != nil && err == nil && s.tty.resize(r) == nil
}

func (s *session) requestBreak(payload []byte) bool {
	_, err := sshmsg.ParseBreak(payload)
	return s.tty != nil && err == nil && s.tty.sendBreak() == nil
}

func (s *session) requestSignal(payload []byte) bool {
	name, err := parseCommand(payload)
	if err != nil || s.noSignals {
		return false
	}
	sig, ok := signalByName(name)
	s.mu.Lock()
	proc := s.proc
	s.mu.Unlock()
	return ok && proc != nil && proc.signal(sig) == nil
}

// requestStart decides which program to run; the command "" is a login shell. The caller has
// checked the request against the login's permissions.
//
// As in sshd, a forced internal-sftp serves the sftp subsystem and denies other requests. A
// login that may only copy files never gets a shell, because a shell would run start-up
// files from the home directory, which the user can write.
func (s *session) requestStart(command string, subsystem bool) (ok bool, start func()) {
	l := launch{command: command, subsystem: subsystem}
	p := s.c.id.Permissions
	args, forcedSFTP := policy.ForcedSFTP(p)
	if p.ForceCommand != "" {
		l.command, l.original = p.ForceCommand, command
	}
	switch {
	case forcedSFTP && !subsystem:
		l.filesOnly, l.argv = true, nil
	case policy.FilesOnly(p):
		l.filesOnly, l.argv = true, slices.Concat(s.c.server.SFTP, args)
	}
	s.noSignals = p.ForceCommand != "" || subsystem
	child, err := s.openFiles()
	if err != nil {
		s.c.log.Error("creating pipes for a session failed", "err", err)
		return false, nil
	}
	l.files = child
	s.started = true
	return true, func() { s.start(l) }
}

// A launch describes the program of a session.
type launch struct {
	// command is for the shell's -c; empty means a login shell.
	command string
	// original is the client's command, if another one is forced.
	original  string
	subsystem bool
	// filesOnly means that no shell runs. argv is the sftp server; if it is nil, the
	// session ends with the message sftpOnly.
	filesOnly bool
	argv      []string
	// files are the process's standard input, output and error. startProcess closes
	// them.
	files [3]*os.File
}

// start starts the process. finish handles its end in a goroutine.
func (s *session) start(l launch) {
	s.c.log.Info("session", "command", l.command, "original", l.original, "subsystem", l.subsystem, "pty", s.tty != nil)
	var last terminalLogin
	if s.c.denied == "" {
		last = s.updateLastlog()
	}
	if s.c.denied != "" || s.startsAtOnce(l) {
		proc, status := s.startProcess(l)
		s.c.spawn("session", func() { s.finish(proc, status) })
		return
	}
	s.c.spawn("session", func() {
		s.prepare(l, last)
		s.finish(s.startProcess(l))
	})
}

// startProcess starts the program of l and closes l's files. If the login is denied, or the
// program cannot be started, it writes a message to the client, and returns nil and the
// exit status.
func (s *session) startProcess(l launch) (*process, unix.WaitStatus) {
	defer closeAll(l.files[:])
	a := s.c.login.Account
	shell := a.shell()
	cmd := command{
		path:  shell,
		argv:  []string{"-" + path.Base(shell)},
		env:   s.environment(l),
		dir:   a.Home,
		files: l.files,
		tty:   s.tty != nil,
	}
	switch {
	case s.c.denied != "":
		io.WriteString(l.files[2], s.c.denied)
		return nil, exitCode(254) // sshd's status where there is /etc/nologin
	case l.filesOnly && l.argv == nil:
		fmt.Fprint(l.files[1], sftpOnly)
		return nil, exitCode(1)
	case l.filesOnly:
		cmd.path, cmd.argv = l.argv[0], l.argv
	case l.command != "":
		cmd.argv = []string{path.Base(shell), "-c", l.command}
	}
	proc, err := s.c.start(cmd)
	if err != nil && a.impersonate(func() error { _, err := os.Stat(a.Home + "/."); return err }) != nil {
		fmt.Fprintf(l.files[2], "Could not chdir to home directory %s: %s\n", a.Home, errorText(err))
		cmd.dir = "/"
		proc, err = s.c.start(cmd)
	}
	if err != nil {
		s.c.log.Warn("starting a session failed", "program", cmd.path, "err", err)
		if cmd.path == shell && a.hasNoShell() {
			io.WriteString(l.files[2], forwardsOnly)
		} else {
			fmt.Fprintf(l.files[2], "%s: %s\n", cmd.path, errorText(err))
		}
		return nil, exitCode(127)
	}
	s.setProcess(proc)
	return proc, 0
}

// sftpOnly is sshd's answer to a shell or command if the forced command is internal-sftp.
// The exit status is 1.
const sftpOnly = "This service allows sftp connections only.\n"

// forwardsOnly is the answer to a shell, command or subsystem in an image without a shell,
// such as tunnel of images/bastion. The exit status is 127.
const forwardsOnly = "This bastion has no shell and only forwards connections: use ssh with -J or -W, or with -N and -L or -D.\n"

// shellWords quotes words for the shell and joins them.
func shellWords(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = w
		if w == "" || strings.ContainsFunc(w, func(r rune) bool {
			return !strings.ContainsRune("+,-./:=@_", r) && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
		}) {
			quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}

// setProcess sets the process that gets signals. If the session has been terminated before
// that, it terminates the process.
func (s *session) setProcess(proc *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proc = proc
	if proc != nil && s.terminated {
		proc.terminate()
	}
}

// terminate hangs up the terminal and terminates the process. finish still reports the exit
// status and the output.
func (s *session) terminate() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.terminated = true
	if s.proc != nil {
		if s.tty != nil {
			s.tty.hangUp()
		}
		s.proc.terminate()
	}
}

// notify shows a line on the session's terminal, if it has one.
func (s *session) notify(line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tty != nil && s.proc != nil {
		s.tty.notify(line)
	}
}

// errorText returns strerror(3) of the error number in err.
func errorText(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err.Error()
	}
	text := []byte(errno.Error())
	if len(text) > 0 && 'a' <= text[0] && text[0] <= 'z' {
		text[0] -= 'a' - 'A'
	}
	return string(text)
}
