package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/policy"
)

const (
	// maxEnv and maxEnvBytes bound what a client may put into a session's
	// environment. 128 is sshd's limit.
	maxEnv      = 128
	maxEnvBytes = 64 << 10
)

// A session is one "session" channel: at most one terminal and one process
// (RFC 4254 section 6).
type session struct {
	c  *conn
	ch ssh.Channel

	// What the requests before shell, exec or subsystem asked for. Used by
	// the goroutine that handles requests, until started is set.
	env      []string
	envBytes int
	x11      *x11
	started  bool
	// fixed says that the client did not choose the program, and may not
	// signal it either.
	fixed bool

	// stdout and stderr are the process's output, before it has started;
	// stderr is nil with a terminal.
	stdout, stderr *outflow
	// delivered is closed when all output has been, as far as it is wanted.
	delivered chan struct{}
	// unread is closed when the client has said that it reads no more of
	// standard output, and gone when it has closed the channel or is gone.
	unread, gone chan struct{}
	// done is closed when the client has been told how the process ended,
	// and the channel is closed from our side; or when there is no client.
	done chan struct{}

	mu  sync.Mutex
	tty *terminal // nil without pty-req
	// ends are our ends of the process's pipes, or the terminal.
	ends []*os.File
	// undelivered is how many outputs are still being copied.
	undelivered int
	proc        *process
	// hungUp says that the process is to get a hangup as soon as there is one,
	// and abandoned that nobody wants its output.
	hungUp, abandoned bool
}

// session serves one session channel until both sides have closed it. A process
// that outlives its client is the server's from then on.
func (c *conn) session(nc ssh.NewChannel) {
	s := &session{
		c:         c,
		delivered: make(chan struct{}),
		unread:    make(chan struct{}),
		gone:      make(chan struct{}),
		done:      make(chan struct{}),
	}
	if !c.add(s) {
		nc.Reject(ssh.ConnectionFailed, "open failed") // sshd's words beyond MaxSessions
		return
	}
	defer c.remove(s)
	ch, reqs, err := nc.Accept()
	if err != nil {
		close(s.done)
		return
	}
	s.ch = ch
	for req := range reqs {
		ok, start := s.request(req)
		req.Reply(ok, nil)
		if start != nil {
			start() // after the reply, which must come before any output
		}
	}
	// The client has closed the channel, or is gone.
	s.abandon()
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

// request handles one channel request without blocking for long: package ssh
// stops reading the connection when requests pile up. If start is not nil, it
// is to be called after the reply.
func (s *session) request(req *ssh.Request) (ok bool, start func()) {
	if !s.started {
		switch req.Type {
		case "pty-req":
			return s.requestTerminal(req.Payload), nil
		case "env":
			return s.requestEnv(req.Payload), nil
		case "x11-req":
			return s.requestX11(req.Payload), nil
		case "auth-agent-req@openssh.com", "agent-req":
			return s.c.forwardAgent(), nil
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
			// An empty command is a login shell to sshd too.
			return s.requestStart(command, false)
		case "subsystem":
			name, err := parseCommand(req.Payload)
			if err != nil || name != "sftp" || s.c.server.SFTP == "" || !s.mayRun(req) {
				return false, nil
			}
			return s.requestStart(s.c.server.SFTP, true)
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

// mayRun says whether the login permits what the request wants to run.
func (s *session) mayRun(req *ssh.Request) bool {
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
	tty, err := s.c.server.Account.openTerminal(r)
	if err != nil {
		s.c.log.Warn("no terminal", "err", err)
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
	s.envBytes += len(name) + len(value)
	s.env = append(s.env, name+"="+value)
	return true
}

func (s *session) requestResize(payload []byte) bool {
	var r windowChangeRequest
	return s.tty != nil && ssh.Unmarshal(payload, &r) == nil && s.tty.resize(r) == nil
}

func (s *session) requestBreak(payload []byte) bool {
	var r breakRequest
	return s.tty != nil && ssh.Unmarshal(payload, &r) == nil && s.tty.sendBreak() == nil
}

// stopOutput closes standard output: nobody reads it at the client any more, as
// in "ssh host yes | head", and what still writes shall get SIGPIPE (OpenSSH
// PROTOCOL section 2.1). Without it the command would run, and send, for ever.
//
// What has been read of it may wait for a window that the client does not open
// any more; the end of the session does not wait for that.
func (s *session) stopOutput() bool {
	if s.stdout == nil {
		return false
	}
	select {
	case <-s.unread:
		return true
	default:
		close(s.unread)
	}
	if s.tty == nil {
		s.stdout.from.Close()
	}
	s.stdout.end()
	return true
}

func (s *session) requestSignal(payload []byte) bool {
	name, err := parseCommand(payload)
	if err != nil || s.fixed {
		return false
	}
	sig, ok := signalByName(name)
	s.mu.Lock()
	proc := s.proc
	s.mu.Unlock()
	return ok && proc != nil && proc.signal(sig) == nil
}

// requestStart decides what to run, "" being a login shell.
func (s *session) requestStart(command string, subsystem bool) (ok bool, start func()) {
	l := launch{command: command, subsystem: subsystem}
	if forced := s.c.id.Permissions.ForceCommand; forced != "" {
		l.command, l.original = forced, command
		// As in sshd_config(5), with the options of sftp-server(8).
		if rest, ok := strings.CutPrefix(forced, "internal-sftp"); ok && (rest == "" || rest[0] == ' ') {
			l.command = s.c.server.SFTP + rest
		}
		s.fixed = true
	}
	s.fixed = s.fixed || subsystem
	child, err := s.openFiles()
	if err != nil {
		s.c.log.Error("no pipes for a session", "err", err)
		return false, nil
	}
	l.files = child
	s.started = true
	return true, func() { s.start(l) }
}

// A launch is what a session runs.
type launch struct {
	// command is for the shell's -c; empty means a login shell.
	command string
	// original is what the client asked for, if it got something else.
	original  string
	subsystem bool
	// files are the process's standard input, output and error. They belong
	// to the launch, and are closed once the process has them.
	files [3]*os.File
}

// openFiles connects the channel with what will be the process's standard
// files, and returns those.
func (s *session) openFiles() (child [3]*os.File, err error) {
	if s.tty != nil {
		s.undelivered = 1
		s.stdout = s.copyOut(s.ch, s.tty.master)
		s.copyIn(s.tty.master)
		return [3]*os.File{s.tty.slave, s.tty.slave, s.tty.slave}, nil
	}
	// Pipes and not sockets: /dev/stdin can be opened again, and each stream
	// ends by itself.
	var ours [3]*os.File
	for i := range ours {
		fds := make([]int, 2)
		if err := unix.Pipe2(fds, unix.O_CLOEXEC); err != nil {
			closeAll(ours[:])
			closeAll(child[:])
			return child, os.NewSyscallError("pipe2", err)
		}
		mine, its := fds[0], fds[1]
		if i == 0 {
			mine, its = its, mine
		}
		unix.SetNonblock(mine, true) // for the poller; the process's end blocks
		ours[i], child[i] = os.NewFile(uintptr(mine), "pipe"), os.NewFile(uintptr(its), "pipe")
	}
	s.copyIn(ours[0])
	s.undelivered = 2
	s.stdout = s.copyOut(s.ch, ours[1])
	s.stderr = s.copyOut(s.ch.Stderr(), ours[2])
	return child, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// own makes f one of the session's ends, to be closed when it ends.
func (s *session) own(f *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ends = append(s.ends, f)
	if s.abandoned {
		s.leave(f)
	}
}

// An outflow is a stream of what the process writes, on its way to the client.
type outflow struct {
	s     *session
	from  *os.File
	to    io.Writer
	began atomic.Int64 // when the write under way began, in Unix nanoseconds; 0 if there is none
	once  sync.Once
}

// Write implements [io.Writer].
func (o *outflow) Write(p []byte) (int, error) {
	o.began.Store(time.Now().UnixNano())
	defer o.began.Store(0)
	return o.to.Write(p)
}

// stuck says that the client has not taken a packet for a while.
func (o *outflow) stuck(while time.Duration) bool {
	began := o.began.Load()
	return began != 0 && time.Since(time.Unix(0, began)) > while
}

// end says that nobody has to wait for o any more.
func (o *outflow) end() {
	o.once.Do(func() {
		o.s.mu.Lock()
		defer o.s.mu.Unlock()
		if o.s.undelivered--; o.s.undelivered == 0 {
			close(o.s.delivered)
		}
	})
}

// copyOut carries output to the client until nobody holds the other end any
// more; a terminal says so with EIO, and finish sets a deadline for it. If the
// client does not take the output, whoever writes gets SIGPIPE.
func (s *session) copyOut(to io.Writer, from *os.File) *outflow {
	s.own(from)
	o := &outflow{s: s, from: from, to: to}
	s.c.spawn("session output", func() {
		defer o.end()
		err := copyFrom(o, from)
		if s.tty == nil {
			from.Close()
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			copyRest(o, from)
		}
	})
	return o
}

// copyIn carries the client's input to the process, and its end too.
func (s *session) copyIn(to *os.File) {
	s.own(to)
	s.c.spawn("session input", func() {
		if err := copyTo(to, s.ch); err != nil {
			// The process does not read any more. Tell the client, as sshd
			// does, and keep the window moving.
			s.ch.SendRequest("eow@openssh.com", false, nil)
			if s.tty == nil {
				to.Close()
			}
			io.Copy(io.Discard, s.ch)
			return
		}
		if s.tty == nil {
			to.Close()
		}
	})
}

// start starts the process, and sees to its end in a goroutine.
func (s *session) start(l launch) {
	s.c.log.Info("session", "command", l.command, "original", l.original, "subsystem", l.subsystem, "pty", s.tty != nil)
	last := s.login()
	if s.quick(l) {
		proc := s.startProcess(l)
		s.c.spawn("session", func() { s.finish(proc) })
		return
	}
	s.c.spawn("session", func() {
		s.prepare(l, last)
		s.finish(s.startProcess(l))
	})
}

// startProcess starts what l says, and gives its files up. If that fails, it
// tells the client why and returns nil.
func (s *session) startProcess(l launch) *process {
	defer closeAll(l.files[:])
	a := s.c.server.Account
	shell := a.shell()
	cmd := command{
		path:  shell,
		argv:  []string{"-" + path.Base(shell)},
		env:   s.environment(l),
		dir:   a.Home,
		files: l.files,
		tty:   s.tty != nil,
	}
	if l.command != "" {
		cmd.path, cmd.argv = s.commandLine(l.command)
	}
	proc, err := s.c.server.start(cmd)
	if err != nil && a.do(func() error { _, err := os.Stat(a.Home + "/."); return err }) != nil {
		fmt.Fprintf(l.files[2], "Could not chdir to home directory %s: %s\n", a.Home, errorText(err))
		cmd.dir = "/"
		proc, err = s.c.server.start(cmd)
	}
	if err != nil {
		s.c.log.Warn("session did not start", "shell", shell, "err", err)
		fmt.Fprintf(l.files[2], "%s: %s\n", shell, errorText(err))
		return nil
	}
	s.setProcess(proc)
	return proc
}

// commandLine returns how a command line is run: by the user's shell, unless she
// may only copy files. She could leave one that her shell reads when it begins, as
// bash does; sh reads none.
func (s *session) commandLine(line string) (path string, argv []string) {
	path = s.c.server.Account.shell()
	if p := s.c.id.Permissions; p.NoShell && p.NoExec {
		path = "/bin/sh"
	}
	return path, []string{filepath.Base(path), "-c", line}
}

// setProcess makes proc the one that gets signals and the hangup, which may
// have been due before it was there.
func (s *session) setProcess(proc *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proc = proc
	if proc != nil && s.hungUp {
		proc.hangUp()
	}
}

// finish waits for the process and for the end of its output, and closes the
// channel, in sshd's order: exit-status at once, the rest of the output, EOF,
// close. EOF never comes before exit-status, even if the process closed its
// output long before it ended: a client that closes the channel at EOF would
// not learn the status, since package ssh answers that close by itself.
//
// If the client goes before the process has ended, the process goes on.
func (s *session) finish(proc *process) {
	defer close(s.done)
	status := exitCode(127)
	if proc != nil {
		select {
		case <-proc.ended:
			status = proc.status
		case <-s.gone:
			return // the files are closed by those who copied
		}
	}
	if status.Signaled() {
		s.ch.SendRequest("exit-signal", false, ssh.Marshal(exitSignal{
			Signal: signalName(status.Signal()), CoreDumped: status.CoreDump(),
		}))
	} else {
		s.ch.SendRequest("exit-status", false, ssh.Marshal(exitStatus{uint32(status.ExitStatus())}))
	}
	if s.tty != nil {
		// What the terminal holds now is still sent. Background jobs that
		// hold the terminal do not hold the session, with sshd neither.
		s.tty.master.SetReadDeadline(time.Now())
	}
	if s.awaitOutput() {
		s.ch.CloseWrite()
	}
	s.ch.Close()

	s.mu.Lock()
	defer s.mu.Unlock()
	closeAll(s.ends)
}

// stuckFor is how long a client that reads no more of standard output may take
// for a packet of stderr before it is given up.
const stuckFor = time.Second

// awaitOutput waits until the client has all output. It reports false if the
// client has said that it does not read all: something may then still wait to be
// sent, and there can be no EOF.
func (s *session) awaitOutput() bool {
	select {
	case <-s.delivered:
	case <-s.unread:
		tick := time.NewTicker(stuckFor / 2)
		defer tick.Stop()
		for s.stderr == nil || !s.stderr.stuck(stuckFor) {
			select {
			case <-s.delivered:
				return false
			case <-tick.C:
			}
		}
	}
	select {
	case <-s.unread:
		return false
	default:
		return true
	}
}

func exitCode(code int) unix.WaitStatus { return unix.WaitStatus(code << 8) }

// hangUp hangs up the process, and lets it and its output come to an end.
func (s *session) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hungUp = true
	if s.proc != nil {
		if s.tty != nil {
			s.tty.hangUp()
		}
		s.proc.hangUp()
	}
}

// abandon takes its standard files away from the process of a client that has
// gone. With a terminal that hangs up the line, and the kernel tells whoever is
// in the foreground. Without one a process may not notice before it writes: sshd
// sends no signal, and what was started to outlive a connection does.
func (s *session) abandon() {
	close(s.gone)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.abandoned = true
	for _, f := range s.ends {
		s.leave(f) // ends the copying; who copies closes it
	}
	if s.tty != nil {
		s.tty.master.Close() // the kernel hangs up the line
	}
}

// leave ends the copying of output at once, and that of input when what the
// client sent before it closed the channel has been taken.
func (s *session) leave(f *os.File) {
	f.SetReadDeadline(time.Now())
	f.SetWriteDeadline(time.Now().Add(drainTimeout))
}

// tell shows a line on the session's terminal, if it has one.
func (s *session) tell(line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tty != nil && s.proc != nil {
		s.tty.say(line)
	}
}

// errorText is strerror(3) of what is in err.
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
