// Package local runs bastions as bastion-agent processes on this machine. It
// implements [bastion.Launcher].
//
// # One agent per owner
//
// Each owner has a folder in [Launcher.Dir]. A launch holds a lock on its file
// launch.lock, so several gateways of one machine may share a Dir. An agent holds a
// lock on agent.lock: it inherits the locked file, and the kernel releases the lock
// when the process ends. A process ID would prove less, since it can be reused.
//
// # If the gateway is killed
//
// A launch writes the task's ID to task.json, starts the agent, and adds the agent's
// address and host key when the agent has reported them. If the gateway is killed
// before that, no gateway has ever connected to the agent; the next launch finds
// agent.lock held and no address, and kills it. If the gateway is killed later, the
// agent runs on, in a session (setsid(2)) of its own, and the next launch returns it.
//
// # Sockets
//
// An agent listens on a Unix socket in its owner's folder, which only the gateway's
// account may enter. So no other account of the machine can connect to an agent and
// overload it. If the gateway does not run as root, all sessions run in its own
// account; they can connect to the socket, as they can kill the agent.
//
// Agents of versions that listened on a TCP port are not adopted; the next launch
// kills them, like those without an address.
package local

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/account"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/unixsock"
)

const (
	// stopGrace is the time between SIGTERM and SIGKILL, for an agent's sessions
	// to end.
	stopGrace = 10 * time.Second
	// killGrace is the time within which a killed process must end.
	killGrace = 5 * time.Second
	// poll is the time between two checks of a lock.
	poll = 20 * time.Millisecond
)

// A Launcher starts bastion-agent processes on this machine.
type Launcher struct {
	// Dir holds a folder for each owner. It is made if missing, accessible to
	// the gateway's own account only.
	Dir string
	// FleetKeys are the public keys of the CA whose certificates agents accept.
	FleetKeys []ssh.PublicKey
	Options
	// MaxSessions is how many sessions one connection may have open, and
	// MaxChannels how many channels of all kinds; zero leaves it to the agent.
	MaxSessions, MaxChannels int
	Log                      *slog.Logger

	grace time.Duration // replaces stopGrace if not zero, in tests
}

// Options are the settings of a profile of local bastions. Package config reads
// them from the configuration file, where they have the same names in snake_case.
type Options struct {
	// Agent is the path of the bastion-agent program.
	Agent string
	// Account is the account of the sessions of all users. If it is empty, a
	// gateway that runs as root uses the account with the user's name, which
	// must exist and must not be root's; any other gateway can only use its
	// own account, for all users.
	Account string
	// AcceptEnv are patterns of the environment variables clients may set;
	// empty means none.
	AcceptEnv []string
}

// Launch implements [bastion.Launcher]. If the owner has a live agent, of any
// generation, Launch returns that one. Otherwise, the new generation exceeds all
// earlier ones of the owner, across restarts. If ctx ends first, Launch kills the
// agent that it has started.
func (l *Launcher) Launch(ctx context.Context, want bastion.Launch) (bastion.Task, error) {
	account, err := l.AccountOf(want.Owner.User)
	if err != nil {
		return bastion.Task{}, err
	}
	home, err := l.folder(want.Owner)
	if err != nil {
		return bastion.Task{}, err
	}
	if err := os.MkdirAll(home.path, 0o700); err != nil {
		return bastion.Task{}, err
	}
	unlock, err := home.lock(ctx)
	if err != nil {
		return bastion.Task{}, fmt.Errorf("waiting for another launch: %w", err)
	}
	defer unlock()

	alive, err := home.agentLives()
	if err != nil {
		return bastion.Task{}, err
	}
	last, err := home.read()
	if errors.Is(err, errGarbage) {
		l.Log.Warn("task file is invalid; starting over", "owner", want.Owner, "err", err)
	} else if err != nil {
		return bastion.Task{}, err
	}
	if alive && last.Addr != "" {
		return last.task(), nil
	}
	if alive {
		l.Log.Warn("killing a bastion that a gateway left half started, or that an older version started", "owner", want.Owner, "task", last.ID)
		if err := home.killOrphan(ctx); err != nil {
			return bastion.Task{}, err
		}
	}

	next := taskFile{Generation: max(want.Generation, last.Generation+1)}
	next.ID = home.newID(next.Generation)
	if err := home.write(next); err != nil {
		return bastion.Task{}, err
	}
	agent, err := l.start(ctx, home, next.ID, account, want)
	if err != nil {
		return bastion.Task{}, fmt.Errorf("starting %s: %w", l.Agent, err)
	}
	next.report, err = agent.awaitReport(ctx)
	if want := unixsock.Prefix + home.socket(next.ID); err == nil && next.Addr != want {
		err = fmt.Errorf("it listens at %s, not at %s", next.Addr, want)
	}
	if err == nil {
		err = home.write(next)
	}
	if err != nil {
		agent.kill()
		return bastion.Task{}, fmt.Errorf("waiting for %s to be ready: %w%s", l.Agent, err, home.logTail())
	}
	l.Log.Info("bastion process started", "owner", want.Owner, "task", next.ID, "pid", agent.cmd.Process.Pid, "account", account)
	return next.task(), nil
}

// AccountOf returns the account of a user's sessions. The error wraps
// [bastion.ErrNoAccount] if this machine does not have it.
func (o Options) AccountOf(name string) (string, error) {
	if o.Account != "" {
		found, err := account.Lookup(o.Account)
		if errors.Is(err, account.ErrUnknown) {
			return "", fmt.Errorf("%w: the account %q, which the profile's local.account names, does not exist", bastion.ErrNoAccount, o.Account)
		}
		if err != nil {
			return "", fmt.Errorf("looking up the account %q: %w", o.Account, err)
		}
		if uid := os.Geteuid(); uid != 0 && int(found.UID) != uid {
			return "", fmt.Errorf("%w: the gateway does not run as root, so it can use its own account only, and not %q of the profile's local.account", bastion.ErrNoAccount, o.Account)
		}
		return o.Account, nil
	}
	if os.Geteuid() != 0 {
		me, err := user.Current()
		if err != nil {
			return "", fmt.Errorf("finding the gateway's own account: %w", err)
		}
		return me.Username, nil
	}
	const remedy = "create it, or name one account for all bastions in the profile's local.account"
	found, err := account.Lookup(name)
	if errors.Is(err, account.ErrUnknown) {
		return "", fmt.Errorf("%w: the gateway runs as root, so %q needs an account of that name: %s", bastion.ErrNoAccount, name, remedy)
	}
	if err != nil {
		return "", fmt.Errorf("looking up the account %q: %w", name, err)
	}
	if found.UID == 0 {
		return "", fmt.Errorf("%w: the account %q is root's: %s", bastion.ErrNoAccount, name, remedy)
	}
	return found.Name, nil
}

// An agent is a child process.
type agent struct {
	cmd    *exec.Cmd
	report *os.File      // pipe on which it reports that it listens
	exited chan struct{} // closed when it has been reaped
}

// start starts an agent for the task id. The caller holds launch.lock.
func (l *Launcher) start(ctx context.Context, home folder, id, account string, want bastion.Launch) (*agent, error) {
	program, err := filepath.Abs(l.Agent)
	if err != nil {
		return nil, err
	}
	life, err := home.takeAgentLock(ctx)
	if err != nil {
		return nil, err
	}
	defer life.Close() // the agent's copy keeps the lock
	if err := home.removeSockets(); err != nil {
		return nil, err
	}
	// Keep the log of the last agent, for the operator.
	err = os.Rename(home.file("agent.log"), home.file("agent.log.1"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	log, err := os.OpenFile(home.file("agent.log"), os.O_CREATE|os.O_TRUNC|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	report, reportEnd, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer reportEnd.Close()

	// A command line is visible to all accounts; it has no secrets.
	cmd := exec.Command(program, "serve",
		"--listen", unixsock.Prefix+home.socket(id),
		"--owner", want.Owner.User,
		"--account", account,
		"--fleet-key", sshca.FormatKeys(l.FleetKeys),
		"--principal", id,
		"--idle", want.Idle.String(),
		"--max-life", want.MaxLife.String(),
		"--accept-env", cmp.Or(strings.Join(l.AcceptEnv, ","), "none"),
		"--ready-fd", "3", // ExtraFiles[0]
		"--lock-fd", "4",
	)
	for _, f := range want.Forwarding.Flags() {
		cmd.Args = append(cmd.Args, "--"+f[0]+"="+f[1])
	}
	if l.MaxSessions > 0 {
		cmd.Args = append(cmd.Args, "--max-sessions", strconv.Itoa(l.MaxSessions))
	}
	if l.MaxChannels > 0 {
		cmd.Args = append(cmd.Args, "--max-channels", strconv.Itoa(l.MaxChannels))
	}
	cmd.ExtraFiles = []*os.File{reportEnd, life}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	// The gateway's environment may hold its credentials.
	cmd.Env = []string{}
	for _, name := range []string{"PATH", "TZ", "LANG"} {
		if value, ok := os.LookupEnv(name); ok {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	// The end of the gateway, or Ctrl-C at its terminal, must not end the agent.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		report.Close()
		return nil, err
	}
	a := &agent{cmd: cmd, report: report, exited: make(chan struct{})}
	// This goroutine outlives the call: it reaps the process. If the gateway
	// ends first, init does that.
	go func() {
		err := cmd.Wait()
		l.Log.Info("bastion process ended", "owner", want.Owner, "task", id, "pid", cmd.Process.Pid, "state", cmd.ProcessState.String(), "err", err)
		close(a.exited)
	}()
	return a, nil
}

// awaitReport returns the agent's report when it listens.
func (a *agent) awaitReport(ctx context.Context) (report, error) {
	defer a.report.Close()
	stop := context.AfterFunc(ctx, func() { a.report.SetReadDeadline(time.Now()) })
	defer stop()
	line, err := bufio.NewReader(io.LimitReader(a.report, maxFile)).ReadBytes('\n')
	switch {
	case ctx.Err() != nil:
		return report{}, context.Cause(ctx)
	case err == io.EOF && len(line) == 0:
		return report{}, errors.New("it ended, or closed its end of the pipe, without a report")
	case err != nil:
		return report{}, err
	}
	return parseReport(line)
}

// kill ends the agent and its process group.
func (a *agent) kill() {
	select {
	case <-a.exited: // the group ID may have been reused
	default:
		syscall.Kill(-a.cmd.Process.Pid, syscall.SIGKILL)
		<-a.exited
	}
}

// logTail returns the end of the agent's log, for the operator.
func (f folder) logTail() string {
	log, err := os.ReadFile(f.file("agent.log"))
	if log = bytes.TrimSpace(log); err != nil || len(log) == 0 {
		return ""
	}
	return fmt.Sprintf("; its log ends with %q", log[max(0, len(log)-500):])
}

// Alive implements [bastion.Launcher].
func (l *Launcher) Alive(_ context.Context, owner bastion.Owner, taskID string) error {
	home, err := l.folder(owner)
	if err != nil {
		return err
	}
	return home.taskLives(taskID)
}

// taskLives is Alive. It checks the lock before the ID, because an ID that is read
// first could be that of a dead task whose successor holds the lock.
func (f folder) taskLives(taskID string) error {
	alive, err := f.agentLives()
	if err != nil {
		return err
	}
	if !alive {
		return fmt.Errorf("task %s: %w", taskID, bastion.ErrGone)
	}
	last, err := f.read()
	if err != nil {
		return err
	}
	if last.ID != taskID {
		return fmt.Errorf("task %s, replaced by %s: %w", taskID, last.ID, bastion.ErrGone)
	}
	return nil
}

// List implements [bastion.Launcher]. Folders that cannot be read are logged and left
// out.
func (l *Launcher) List(context.Context) ([]bastion.OwnedTask, error) {
	entries, err := os.ReadDir(l.Dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var tasks []bastion.OwnedTask
	for _, entry := range entries {
		name, profile, ok := strings.Cut(entry.Name(), "+")
		owner := bastion.Owner{User: name, Profile: profile}
		home, err := l.folder(owner)
		if !ok || !entry.IsDir() || err != nil {
			continue // not an owner's folder
		}
		alive, err := home.agentLives()
		var last taskFile
		if err == nil && alive {
			last, err = home.read()
		}
		if err != nil {
			l.Log.Warn("cannot find out whether a bastion runs", "owner", owner, "err", err)
		}
		if last.Addr != "" {
			tasks = append(tasks, bastion.OwnedTask{Owner: owner, Task: last.task()})
		}
	}
	return tasks, nil
}

// Stop implements [bastion.Launcher]: it sends SIGTERM to the agent, and after ten
// seconds SIGKILL. It does nothing if the task has ended or was replaced.
func (l *Launcher) Stop(ctx context.Context, owner bastion.Owner, taskID string) error {
	home, err := l.folder(owner)
	if err != nil {
		return err
	}
	is := func(id string) bool { return id == taskID }
	gone := func() (bool, error) {
		err := home.taskLives(taskID)
		if errors.Is(err, bastion.ErrGone) {
			return true, nil
		}
		return false, err
	}
	if done, err := gone(); done || err != nil {
		return err
	}
	if err := home.signal(is, syscall.SIGTERM); err != nil {
		return fmt.Errorf("stopping %s: %w", taskID, err)
	}
	done, err := await(ctx, cmp.Or(l.grace, stopGrace), gone)
	if done || err != nil {
		return err
	}
	l.Log.Warn("bastion ignores SIGTERM; killing it", "owner", owner, "task", taskID)
	if err := home.signal(is, syscall.SIGKILL); err != nil {
		return fmt.Errorf("killing %s: %w", taskID, err)
	}
	if done, err = await(ctx, killGrace, gone); !done && err == nil {
		err = fmt.Errorf("task %s does not end when killed", taskID)
	}
	return err
}

// killOrphan kills an agent whose address was never stored. The caller holds
// launch.lock.
func (f folder) killOrphan(ctx context.Context) error {
	owners := func(id string) bool { return strings.HasPrefix(id, f.idPrefix()) }
	// Repeatedly, since an agent between fork and exec is not recognised.
	done, err := await(ctx, killGrace, func() (bool, error) {
		alive, err := f.agentLives()
		if err == nil && alive {
			err = f.signal(owners, syscall.SIGKILL)
		}
		return !alive, err
	})
	if !done && err == nil {
		err = errors.New("a process that is not a bastion-agent holds its lock")
	}
	if err != nil {
		return fmt.Errorf("killing the orphaned agent in %s: %w", f.path, err)
	}
	return nil
}

// await calls done every poll until it returns true or an error, or until the time
// given has passed.
func await(ctx context.Context, within time.Duration, done func() (bool, error)) (bool, error) {
	until := time.Now().Add(within)
	for {
		if ok, err := done(); ok || err != nil {
			return ok, err
		}
		if time.Now().After(until) {
			return false, nil
		}
		select {
		case <-time.After(poll):
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

// signal sends sig to the agents of the tasks whose ID matches, and SIGKILL also to
// their process groups. A process is an agent if it was started with such an ID and
// has the owner's agent.lock open. signal has a handle on the process (pidfd) before
// it checks that, so that the process ID cannot be reused in between.
func (f folder) signal(match func(id string) bool, sig syscall.Signal) error {
	lock, err := os.Stat(f.file("agent.lock"))
	if err != nil {
		return err
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, proc := range procs {
		pid, err := strconv.Atoi(proc.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		p, err := os.FindProcess(pid)
		if err != nil {
			continue
		}
		if match(principal(pid)) && hasOpen(pid, lock) {
			err = p.Signal(sig)
			if err == nil && sig == syscall.SIGKILL {
				syscall.Kill(-pid, sig)
			}
		}
		p.Release()
		if err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
	}
	return nil
}

// principal returns the task ID in the command line of an agent; empty for other
// processes.
func principal(pid int) string {
	cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	args := strings.Split(string(cmdline), "\x00")
	for i, arg := range args[:len(args)-1] {
		if arg == "--principal" {
			return args[i+1]
		}
	}
	return ""
}

// hasOpen reports whether a process has the file open.
func hasOpen(pid int, file os.FileInfo) bool {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, _ := os.ReadDir(dir)
	for _, fd := range fds {
		if open, err := os.Stat(filepath.Join(dir, fd.Name())); err == nil && os.SameFile(open, file) {
			return true
		}
	}
	return false
}
