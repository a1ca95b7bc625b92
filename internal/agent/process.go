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

	"github.com/sallyport-ssh/sallyport/internal/become"
)

// A process is a child that leads a session and process group of its own.
//
// It is not an os.Process: that needs a thread for each child that is waited
// for, and cannot signal a group without the risk that the group's number is
// somebody else's by then.
type process struct {
	pid   int
	pidfd *os.File // nil if the kernel has none

	// ended is closed when the process has been waited for, and status set.
	ended  chan struct{}
	status unix.WaitStatus

	mu     sync.Mutex
	reaped bool
	// hungUp is when hangUp was called; zero if it was not.
	hungUp time.Time
	// expired fires hangupGrace after that.
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

// children has the pids of the processes that are waited for by whoever
// started them. The lock is held for reading while one is started.
var children struct {
	sync.RWMutex
	pids sync.Map // int -> struct{}
}

// start starts a command with the rights of the account. Somebody must wait for
// it.
func (a Account) start(cmd command) (*process, error) {
	pidfd := -1
	attr := syscall.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: true, Setctty: cmd.tty, PidFD: &pidfd}}
	for _, f := range cmd.files {
		attr.Files = append(attr.Files, f.Fd())
	}
	var pid int
	var err error
	if os.Geteuid() == 0 && a.UID != 0 {
		program := become.Program{
			User: become.User{UID: a.UID, GID: a.GID, Groups: a.Groups},
			Dir:  cmd.dir, Path: cmd.path, Argv: cmd.argv, Env: cmd.env,
		}
		err = program.Start(context.Background(), func(path string, argv []string, files [2]*os.File) error {
			attr.Dir, attr.Env = "/", []string{}
			attr.Files = append(attr.Files, files[0].Fd(), files[1].Fd())
			pid, err = forkExec(path, argv, &attr)
			return err
		})
	} else {
		attr.Dir, attr.Env, attr.Sys.Credential = cmd.dir, cmd.env, a.credential()
		pid, err = forkExec(cmd.path, cmd.argv, &attr)
	}
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
	p := &process{pid: pid, ended: make(chan struct{}), expired: make(chan struct{})}
	if pidfd >= 0 {
		unix.SetNonblock(pidfd, true) // or package os would not poll it
		p.pidfd = os.NewFile(uintptr(pidfd), "pidfd")
	}
	return p, nil
}

// forkExec is [syscall.ForkExec], after which the child is among the children.
func forkExec(path string, argv []string, attr *syscall.ProcAttr) (pid int, err error) {
	children.RLock()
	defer children.RUnlock()
	pid, err = syscall.ForkExec(path, argv, attr)
	if err == nil {
		children.pids.Store(pid, struct{}{})
	}
	return pid, err
}

// wait returns when the process has ended, and says how. It is called once.
//
// A process that was hung up takes its group with it: until hangupGrace has
// passed, the pid, which is the group's number too, stays taken as long as the
// group has other members.
func (p *process) wait() unix.WaitStatus {
	p.waitExit()
	p.mu.Lock()
	hungUp := !p.hungUp.IsZero()
	p.mu.Unlock()
	if hungUp {
		p.waitGroup()
	}

	var status unix.WaitStatus
	p.mu.Lock()
	defer p.mu.Unlock()
	// Who traces the process comes first: until he has waited, or has ended,
	// there is nothing to wait for here, and nobody may have to wait for that.
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

// waitExit returns when the process has ended, and leaves it a zombie.
func (p *process) waitExit() {
	if p.pidfd != nil {
		raw, err := p.pidfd.SyscallConn()
		if err == nil {
			// A pidfd gets readable when its process has ended.
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

// waitGroup returns when the group of the process, which has ended, has no
// living member, or has been killed.
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

// groups is which process groups had members that were not zombies, and when. Many
// processes may be waited for at once, and all of /proc is read to tell.
var groups struct {
	sync.Mutex
	at    time.Time
	alive map[string]bool
}

// groupAlive says whether a process group has a member that is not a zombie, or had
// one a moment ago. One that has none gets none any more.
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
		// pid (comm) state ppid pgrp ...; comm may hold anything (proc(5)).
		f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(f) > 2 && f[0] != "Z" && f[0] != "X" {
			alive[f[2]] = true
		}
	}
	return alive
}

// signal sends sig to the process group. It fails once the process has been
// waited for: the number may be another's then.
func (p *process) signal(sig unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return unix.ESRCH
	}
	return unix.Kill(-p.pid, sig)
}

// hangUp tells the process group that the bastion ends, and kills it after
// hangupGrace. What called setsid(2) has left the group and lives on, where there
// is something to live on. It does not wait, and may be called again.
func (p *process) hangUp() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped || !p.hungUp.IsZero() {
		return
	}
	p.hungUp = time.Now()
	unix.Kill(-p.pid, unix.SIGHUP)
	unix.Kill(-p.pid, unix.SIGCONT) // or a stopped one would not hear of it
	p.kill = time.AfterFunc(hangupGrace, func() {
		p.signal(unix.SIGKILL)
		close(p.expired)
	})
}

// ReapOrphans reaps the processes that became children of this one because
// their parents ended before them, as process 1 must, until stop is closed.
// Children of this package's own it leaves to those who wait for them. signals
// must deliver SIGCHLD.
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
	// Nobody forks meanwhile: a child that is not in the list yet is no orphan.
	children.Lock()
	defer children.Unlock()
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
			if _, ours := children.pids.Load(pid); !ours {
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

// signalName returns a signal's name on the wire. Signals without a name there
// get the one sshd uses.
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
