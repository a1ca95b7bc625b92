// Package local runs bastions as bastion-agent processes on this machine. It
// implements [bastion.Launcher].
//
// # One agent per owner
//
// Each owner has a folder in [Launcher.Dir]. Whoever launches holds a lock on
// the file launch.lock in it for that long, so any number of gateways on one
// machine may share a Dir. An agent holds a lock on agent.lock for as long as it
// lives: it inherits the locked file, and the kernel gives the lock up when the
// process ends, however it ends. A process id proves nothing like that, since
// another process may have it by now.
//
// # What a crash leaves behind
//
// The file task.json names the task before its agent is started, and gets the
// agent's address and host key when the agent has reported them. A gateway that
// is killed in between leaves an agent that nobody has ever connected to; the
// next launch finds that the lock is held and the address is not known, and
// kills it. Any other agent survives its gateway: it is in a session of its own.
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

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

const (
	// stopGrace is how long an agent has between SIGTERM and SIGKILL, for its
	// sessions to end.
	stopGrace = 10 * time.Second
	// killGrace is how long the kernel may take to end a killed process.
	killGrace = 5 * time.Second
	// poll is the time between two looks at a lock somebody else holds.
	poll = 20 * time.Millisecond
)

// A Launcher starts bastion-agent processes on this machine.
type Launcher struct {
	// Dir holds a folder for each owner. It is made if missing, for the
	// gateway's own user only.
	Dir string
	// Agent is the path of the bastion-agent program.
	Agent string
	// FleetKey is the public key of the CA whose certificates agents accept.
	FleetKey ssh.PublicKey
	// Account is the account that everybody's sessions run in. If it is
	// empty, a gateway that runs as root uses the account named like the
	// user, which must exist and must not be root's; any other gateway can
	// only use its own account, for everybody.
	Account string
	// AcceptEnv are patterns of the environment variables clients may set;
	// empty means none.
	AcceptEnv []string
	// MaxSessions is how many sessions one connection may have open; zero
	// leaves it to the agent.
	MaxSessions int
	Log         *slog.Logger

	grace time.Duration // in place of stopGrace if not zero; tests are in a hurry
}

// Launch implements [bastion.Launcher]. It never starts a second agent for an
// owner who has a live one, of whatever generation, and returns that one
// instead; otherwise the generation is later than all the owner had, across
// restarts. When ctx ends first, what was started is killed.
func (l *Launcher) Launch(ctx context.Context, want bastion.Launch) (bastion.Task, error) {
	account, err := l.account(want.Owner.User)
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
		l.Log.Warn("cannot tell what was started before; starting over", "owner", want.Owner, "err", err)
	} else if err != nil {
		return bastion.Task{}, err
	}
	if alive && last.Addr != "" {
		return last.task(), nil
	}
	if alive {
		l.Log.Warn("killing a bastion that a gateway left behind half started", "owner", want.Owner, "task", last.ID)
		if err := home.killOrphan(ctx); err != nil {
			return bastion.Task{}, err
		}
	}

	next := record{Generation: max(want.Generation, last.Generation+1)}
	next.ID = home.newID(next.Generation)
	if err := home.write(next); err != nil {
		return bastion.Task{}, err
	}
	agent, err := l.start(home, next.ID, account, want)
	if err != nil {
		return bastion.Task{}, fmt.Errorf("starting %s: %w", l.Agent, err)
	}
	next.ready, err = agent.awaitReady(ctx)
	if err == nil {
		err = home.write(next)
	}
	if err != nil {
		agent.kill()
		return bastion.Task{}, fmt.Errorf("waiting for %s to be ready: %w%s", l.Agent, err, home.lastWords())
	}
	l.Log.Info("bastion process started", "owner", want.Owner, "task", next.ID, "pid", agent.cmd.Process.Pid, "account", account)
	return next.task(), nil
}

// account returns the account that user's sessions run in.
func (l *Launcher) account(name string) (string, error) {
	if l.Account != "" {
		return l.Account, nil
	}
	if os.Geteuid() != 0 {
		me, err := user.Current()
		if err != nil {
			return "", fmt.Errorf("finding the gateway's own account: %w", err)
		}
		return me.Username, nil
	}
	const remedy = "create it, or name one account for all bastions in the profile's local.account"
	found, err := user.Lookup(name)
	if unknown := (user.UnknownUserError)(""); errors.As(err, &unknown) {
		return "", fmt.Errorf("%w: the gateway runs as root, so %q needs an account of that name: %s", bastion.ErrNoAccount, name, remedy)
	}
	if err != nil {
		return "", fmt.Errorf("looking up the account %q: %w", name, err)
	}
	if found.Uid == "0" {
		return "", fmt.Errorf("%w: the account %q is root's: %s", bastion.ErrNoAccount, name, remedy)
	}
	return found.Username, nil
}

// An agent is a process that this one has started.
type agent struct {
	cmd    *exec.Cmd
	report *os.File      // where it says that it is ready
	exited chan struct{} // closed when it has been reaped
}

// start starts an agent for the task id. The caller holds launch.lock.
func (l *Launcher) start(home folder, id, account string, want bastion.Launch) (*agent, error) {
	program, err := filepath.Abs(l.Agent)
	if err != nil {
		return nil, err
	}
	life, err := home.takeAgentLock()
	if err != nil {
		return nil, err
	}
	defer life.Close() // the agent's copy keeps the lock
	// The last words of an agent that died are worth a look.
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

	// Everybody on the machine can read a command line: nothing in it is
	// secret.
	cmd := exec.Command(program, "serve",
		"--listen", "127.0.0.1:0",
		"--owner", want.Owner.User,
		"--account", account,
		"--fleet-key", strings.TrimSpace(string(ssh.MarshalAuthorizedKey(l.FleetKey))),
		"--principal", id,
		"--idle", want.Idle.String(),
		"--max-life", want.MaxLife.String(),
		"--accept-env", cmp.Or(strings.Join(l.AcceptEnv, ","), "none"),
		"--ready-fd", "3", // ExtraFiles[0]
		"--lock-fd", "4",
	)
	if l.MaxSessions > 0 {
		cmd.Args = append(cmd.Args, "--max-sessions", strconv.Itoa(l.MaxSessions))
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
	// Neither the end of the gateway nor a Ctrl-C at its terminal is the
	// agent's end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		report.Close()
		return nil, err
	}
	a := &agent{cmd: cmd, report: report, exited: make(chan struct{})}
	// This goroutine lives as long as the agent, and nobody waits for it: it
	// keeps the process from staying behind as a zombie. If the gateway ends
	// first, that is for init to do.
	go func() {
		err := cmd.Wait()
		l.Log.Info("bastion process ended", "owner", want.Owner, "task", id, "pid", cmd.Process.Pid, "state", cmd.ProcessState.String(), "err", err)
		close(a.exited)
	}()
	return a, nil
}

// awaitReady returns what the agent reports when it has begun to listen.
func (a *agent) awaitReady(ctx context.Context) (ready, error) {
	defer a.report.Close()
	stop := context.AfterFunc(ctx, func() { a.report.SetReadDeadline(time.Now()) })
	defer stop()
	line, err := bufio.NewReader(io.LimitReader(a.report, maxFile)).ReadBytes('\n')
	switch {
	case ctx.Err() != nil:
		return ready{}, context.Cause(ctx)
	case err == io.EOF && len(line) == 0:
		return ready{}, errors.New("it ended, or closed its end of the pipe, without a word")
	case err != nil:
		return ready{}, err
	}
	return parseReady(line)
}

// kill ends the agent and whatever is in its process group.
func (a *agent) kill() {
	select {
	case <-a.exited: // the group's number may be another's by now
	default:
		syscall.Kill(-a.cmd.Process.Pid, syscall.SIGKILL)
		<-a.exited
	}
}

// lastWords returns the end of the agent's log, for the operator.
func (f folder) lastWords() string {
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

// taskLives is Alive. The lock is looked at before the name: a name read first
// could be that of the dead task whose successor holds the lock.
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
		return fmt.Errorf("task %s, in whose place runs %s: %w", taskID, last.ID, bastion.ErrGone)
	}
	return nil
}

// List implements [bastion.Launcher]. Folders that make no sense are logged and
// left out.
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
			continue // not ours
		}
		alive, err := home.agentLives()
		var last record
		if err == nil && alive {
			last, err = home.read()
		}
		if err != nil {
			l.Log.Warn("cannot tell whether a bastion runs", "owner", owner, "err", err)
		}
		if last.Addr != "" {
			tasks = append(tasks, bastion.OwnedTask{Owner: owner, Task: last.task()})
		}
	}
	return tasks, nil
}

// Stop implements [bastion.Launcher]: it asks the agent to end, and after ten
// seconds kills it. A task that has ended, or whose place another has taken, is
// left alone.
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

// killOrphan ends an agent that nobody can know. The caller holds launch.lock.
func (f folder) killOrphan(ctx context.Context) error {
	ours := func(id string) bool { return strings.HasPrefix(id, f.idPrefix()) }
	// More than once: it may still be between fork and exec, and not be
	// recognisable yet.
	done, err := await(ctx, killGrace, func() (bool, error) {
		alive, err := f.agentLives()
		if err == nil && alive {
			err = f.signal(ours, syscall.SIGKILL)
		}
		return !alive, err
	})
	if !done && err == nil {
		err = errors.New("something that is not a bastion-agent holds its lock")
	}
	if err != nil {
		return fmt.Errorf("killing an agent left behind in %s: %w", f.path, err)
	}
	return nil
}

// await calls done every now and then until it returns true or an error, for
// the time given.
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

// signal sends sig to the agents of the tasks whose ID matches: to the process
// alone if it is to end by itself, to its whole group if it is killed. A process
// counts as an agent if it was started with that ID and has the owner's
// agent.lock open; there is a handle on it before it is looked at, so it cannot
// be confused with a later one of the same process id.
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

// principal returns the task ID a process was started with, if it is an agent.
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
