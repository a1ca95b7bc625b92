package agent

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/runas"
)

// A process is a child that leads a session and a process group of its own.
//
// It is not an os.Process, because waiting for that blocks a thread, and because os.Process
// cannot signal a group safely: once the child has been reaped, another group may have the
// same number.
type process struct {
	pid   int
	pidfd *os.File // nil if the kernel has no pidfd

	// ended is closed when the process has been reaped. status is set before.
	ended  chan struct{}
	status unix.WaitStatus

	mu     sync.Mutex
	reaped bool
	// terminated is set by terminate.
	terminated bool
	// grace is the time between SIGHUP and SIGKILL. expired is closed after SIGKILL.
	grace   time.Duration
	expired chan struct{}
	kill    *time.Timer
}

// A command is a program to start.
type command struct {
	path  string
	argv  []string
	env   []string
	dir   string
	files [3]*os.File
	tty   bool // files[0] becomes the controlling terminal
}

// children are the pids of the children that this package waits for, so that ReapOrphans
// leaves them alone. The lock is held for reading while a child is started.
var children struct {
	sync.RWMutex
	pids sync.Map // int -> struct{}
}

// start starts a command as the account and with its limits. The caller must call wait.
func (l Login) start(cmd command) (*process, error) {
	pidfd := -1
	attr := syscall.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: true, Setctty: cmd.tty, PidFD: &pidfd}}
	for _, f := range cmd.files {
		attr.Files = append(attr.Files, f.Fd())
	}
	var pid int
	var err error
	program := runas.Program{
		User: runas.User{UID: l.Account.UID, GID: l.Account.GID, Groups: l.Account.Groups},
		Dir:  cmd.dir, Path: cmd.path, Argv: cmd.argv, Env: cmd.env,
		Limits: l.Limits, Login: true,
	}
	err = program.Start(context.Background(), func(path string, argv []string, files [2]*os.File) error {
		attr.Dir, attr.Env = "/", []string{}
		attr.Files = append(attr.Files, files[0].Fd(), files[1].Fd())
		pid, err = forkExec(path, argv, &attr)
		return err
	})
	runtime.KeepAlive(cmd.files)
	if err != nil {
		if pid > 0 {
			unix.Wait4(pid, nil, 0, nil)
			children.pids.Delete(pid)
		}
		if pidfd >= 0 {
			unix.Close(pidfd)
		}
		return nil, err
	}
	p := &process{pid: pid, ended: make(chan struct{}), expired: make(chan struct{}), grace: hangupGrace}
	if pidfd >= 0 {
		unix.SetNonblock(pidfd, true) // package os polls only non-blocking files
		p.pidfd = os.NewFile(uintptr(pidfd), "pidfd")
	}
	return p, nil
}

// forkExec is [syscall.ForkExec], and adds the child to children.
func forkExec(path string, argv []string, attr *syscall.ProcAttr) (pid int, err error) {
	children.RLock()
	defer children.RUnlock()
	pid, err = syscall.ForkExec(path, argv, attr)
	if err == nil {
		children.pids.Store(pid, struct{}{})
	}
	return pid, err
}

// wait waits for the process, reaps it and returns its status. It is called once.
//
// If the process has been terminated, wait leaves it a zombie until its process group is
// empty or has been killed. Until then the number of the group cannot be reused.
func (p *process) wait() unix.WaitStatus {
	p.waitExit()
	p.mu.Lock()
	terminated := p.terminated
	p.mu.Unlock()
	if terminated {
		p.waitGroup()
	}

	var status unix.WaitStatus
	p.mu.Lock()
	defer p.mu.Unlock()
	// A tracer of the process must wait for it before its parent can. Poll, so that the
	// lock is not held while the tracer does not.
	for pause := time.Millisecond; ; pause = min(2*pause, time.Second) {
		pid, err := unix.Wait4(p.pid, &status, unix.WNOHANG, nil)
		if pid == p.pid || err != nil && err != unix.EINTR {
			break
		}
		p.mu.Unlock()
		time.Sleep(pause)
		p.mu.Lock()
	}
	children.pids.Delete(p.pid)
	p.reaped = true
	if p.kill != nil {
		p.kill.Stop()
	}
	if p.pidfd != nil {
		p.pidfd.Close()
	}
	return status
}

// waitExit blocks until the process has ended, and leaves it a zombie.
func (p *process) waitExit() {
	if p.pidfd != nil {
		raw, err := p.pidfd.SyscallConn()
		if err == nil {
			// A pidfd is readable when its process has ended.
			err = raw.Read(func(fd uintptr) bool {
				fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
				n, err := unix.Poll(fds, 0)
				return n > 0 || err != nil && err != unix.EINTR
			})
		}
		if err == nil {
			return
		}
	}
	for unix.Waitid(unix.P_PID, p.pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
}

// waitGroup blocks until the process group has no living member, or has been killed. The
// process itself has ended.
func (p *process) waitGroup() {
	poll := time.NewTicker(50 * time.Millisecond)
	defer poll.Stop()
	for groupAlive(p.pid) {
		select {
		case <-p.expired:
			return
		case <-poll.C:
		}
	}
}

// groups caches the process groups with living members, because finding them takes a scan
// of /proc, and many processes may be waited for at the same time.
var groups struct {
	sync.Mutex
	at    time.Time
	alive map[string]bool
}

// groupAlive reports whether a process group has, or had 20 ms ago, a member that is not a
// zombie. A group without members cannot get new ones.
func groupAlive(pgid int) bool {
	groups.Lock()
	defer groups.Unlock()
	if time.Since(groups.at) > 20*time.Millisecond {
		groups.alive = aliveGroups()
		groups.at = time.Now()
	}
	return groups.alive[strconv.Itoa(pgid)]
}

func aliveGroups() map[string]bool {
	alive := map[string]bool{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return alive
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue // gone
		}
		// pid (comm) state ppid pgrp ...; comm may contain any byte (proc(5)).
		f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(f) > 2 && f[0] != "Z" && f[0] != "X" {
			alive[f[2]] = true
		}
	}
	return alive
}

// signal sends sig to the process group. It fails once the process has been reaped, because
// another group may have the same number then.
func (p *process) signal(sig unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return unix.ESRCH
	}
	return unix.Kill(-p.pid, sig)
}

// terminate sends SIGHUP to the process group, and SIGKILL after p.grace. A process that has
// called setsid(2) is not in the group. terminate does not block, and may be called again.
func (p *process) terminate() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped || p.terminated {
		return
	}
	p.terminated = true
	unix.Kill(-p.pid, unix.SIGHUP)
	unix.Kill(-p.pid, unix.SIGCONT) // a stopped process handles SIGHUP only when it continues
	p.kill = time.AfterFunc(p.grace, func() {
		p.signal(unix.SIGKILL)
		close(p.expired)
	})
}

// ReapOrphans reaps orphaned processes, which process 1 inherits, until stop is closed. It
// does not reap the children that this package has started, nor children in the session
// of this process: these are programs such as id(1), for which package os/exec waits. All
// others are in sessions of their own, and so are their descendants. signals must deliver
// SIGCHLD.
func ReapOrphans(signals <-chan os.Signal, stop <-chan struct{}) error {
	for {
		if err := reapOrphans(); err != nil {
			return fmt.Errorf("reaping orphans: %w", err)
		}
		select {
		case <-signals:
		case <-stop:
			return nil
		}
	}
}

func reapOrphans() error {
	// No child is started meanwhile, so each child of this package is in the list.
	children.Lock()
	defer children.Unlock()
	own, err := unix.Getsid(0)
	if err != nil {
		return os.NewSyscallError("getsid", err)
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, t := range tasks {
		list, err := os.ReadFile("/proc/self/task/" + t.Name() + "/children")
		if err != nil {
			continue // the thread has ended
		}
		for pid := range strings.FieldsSeq(string(list)) {
			pid, err := strconv.Atoi(pid)
			if err != nil {
				continue
			}
			if _, ours := children.pids.Load(pid); ours {
				continue
			}
			if sid, err := unix.Getsid(pid); err == nil && sid != own {
				unix.Wait4(pid, nil, unix.WNOHANG, nil)
			}
		}
	}
	return nil
}

// signalNames are the names of RFC 4254 section 6.10.
var signalNames = map[unix.Signal]string{
	unix.SIGABRT: "ABRT", unix.SIGALRM: "ALRM", unix.SIGFPE: "FPE", unix.SIGHUP: "HUP",
	unix.SIGILL: "ILL", unix.SIGINT: "INT", unix.SIGKILL: "KILL", unix.SIGPIPE: "PIPE",
	unix.SIGQUIT: "QUIT", unix.SIGSEGV: "SEGV", unix.SIGTERM: "TERM",
	unix.SIGUSR1: "USR1", unix.SIGUSR2: "USR2",
}

// signalName returns the name of a signal in the protocol. For a signal without one it
// returns sshd's substitute.
func signalName(sig unix.Signal) string {
	if name, ok := signalNames[sig]; ok {
		return name
	}
	return "SIG@openssh.com"
}

func signalByName(name string) (unix.Signal, bool) {
	for sig, n := range signalNames {
		if n == name {
			return sig, true
		}
	}
	return 0, false
}
