package bastion

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// A fakeLauncher runs tasks with real SSH servers in them, on a network in memory.
// It implements Launcher with only the guarantees in its documentation, and fails the
// test if an owner ever has two live tasks.
type fakeLauncher struct {
	t     testing.TB
	fleet ssh.Signer
	key   ssh.Signer // of all agents, to save time

	boot    time.Duration // from Launch until the agent listens
	noKey   bool          // Launch does not know the host key
	usage   Usage         // of ended tasks; zero: not known
	onceGen bool          // launching an ended generation again fails with ErrGone, as on ECS

	// onLaunch, if not nil, decides whether a Launch starts a task, and the
	// error of the Launch. With both start and an error, the reply is lost. It
	// may block.
	onLaunch func(ctx context.Context, l Launch) (start bool, err error)
	// onAlive, if not nil, may fail an Alive.
	onAlive func() error
	// onList, if not nil, may delay and fail a List.
	onList func(ctx context.Context) error
	// onStop, if not nil, may delay a Stop, and fail it; the task ends even if
	// it fails.
	onStop func() error
	// onDial, if not nil, runs before each connection attempt.
	onDial func(task *fakeTask) error

	mu       sync.Mutex
	tasks    []*fakeTask
	launches int // calls of Launch
	lookups  int // calls of Alive and List
	stops    int
	servers  sync.WaitGroup
}

type fakeTask struct {
	Task
	owner    Owner
	listens  time.Time
	dead     bool
	shows    ssh.Signer // the host key, if not the launcher's
	fleet    ssh.PublicKey
	mute     bool // accepts connections and sends nothing
	hangsUp  bool // accepts connections and closes them
	closing  bool // has agreed to stop
	conns    []net.Conn
	open     int      // logged-in connections
	logins   []string // key ids
	rejected int
}

func newFakeLauncher(t testing.TB) *fakeLauncher {
	return &fakeLauncher{t: t, fleet: sshtest.NewKey(t), key: sshtest.NewKey(t), boot: 5 * time.Second, onceGen: true}
}

func (fake *fakeLauncher) Launch(ctx context.Context, l Launch) (Task, error) {
	fake.mu.Lock()
	fake.launches++
	fake.mu.Unlock()
	start, fault := true, error(nil)
	if fake.onLaunch != nil {
		start, fault = fake.onLaunch(ctx, l)
	}
	var task *fakeTask
	err := fault
	if start {
		var launchErr error
		if task, launchErr = fake.launch(l); launchErr != nil {
			err = launchErr
		}
	}
	if err != nil {
		return Task{}, err
	}
	return task.Task, nil
}

func (fake *fakeLauncher) launch(l Launch) (*fakeTask, error) {
	fake.mu.Lock()
	defer fake.mu.Unlock()
	var live *fakeTask
	for _, task := range fake.tasks {
		if task.owner == l.Owner && task.Generation == l.Generation {
			if task.dead && fake.onceGen {
				return nil, fmt.Errorf("launching %s: %w", task.ID, ErrGone)
			}
			if !task.dead {
				return task, nil
			}
		}
		if task.owner == l.Owner && !task.dead {
			live = task
		}
	}
	if live != nil {
		fake.t.Errorf("launching generation %d of %s while %s is alive", l.Generation, l.Owner, live.ID)
	}
	task := &fakeTask{owner: l.Owner, listens: time.Now().Add(fake.boot), fleet: fake.fleet.PublicKey()}
	task.Task = Task{
		ID:         fmt.Sprintf("%s-%d-%d", l.Owner, l.Generation, len(fake.tasks)),
		Generation: l.Generation,
		Addr:       fmt.Sprintf("task:%d", len(fake.tasks)),
	}
	if !fake.noKey {
		task.HostKey = fake.key.PublicKey()
	}
	fake.tasks = append(fake.tasks, task)
	return task, nil
}

func (fake *fakeLauncher) Alive(_ context.Context, owner Owner, id string) error {
	if fake.onAlive != nil {
		if err := fake.onAlive(); err != nil {
			return err
		}
	}
	fake.mu.Lock()
	defer fake.mu.Unlock()
	fake.lookups++
	for _, task := range fake.tasks {
		if task.owner == owner && task.ID == id && !task.dead {
			return nil
		}
	}
	if fake.usage != (Usage{}) {
		return &GoneError{TaskID: id, Why: errors.New("it has exited"), Usage: fake.usage}
	}
	return fmt.Errorf("task %s: %w", id, ErrGone)
}

func (fake *fakeLauncher) Stop(_ context.Context, owner Owner, id string) error {
	fake.mu.Lock()
	fake.stops++
	fake.mu.Unlock()
	var err error
	if fake.onStop != nil {
		err = fake.onStop()
	}
	fake.killIf(func(task *fakeTask) bool { return task.owner == owner && task.ID == id })
	return err
}

func (fake *fakeLauncher) List(ctx context.Context) ([]OwnedTask, error) {
	if fake.onList != nil {
		if err := fake.onList(ctx); err != nil {
			return nil, err
		}
	}
	fake.mu.Lock()
	defer fake.mu.Unlock()
	fake.lookups++
	var out []OwnedTask
	for _, task := range fake.tasks {
		if !task.dead {
			out = append(out, OwnedTask{Owner: task.owner, Task: task.Task, Started: task.listens.Add(-fake.boot)})
		}
	}
	return out, nil
}

// killIf ends the live tasks that match and returns their number.
func (fake *fakeLauncher) killIf(match func(*fakeTask) bool) int {
	fake.mu.Lock()
	defer fake.mu.Unlock()
	n := 0
	for _, task := range fake.tasks {
		if !task.dead && match(task) {
			task.dead = true
			n++
			for _, c := range task.conns {
				c.Close()
			}
		}
	}
	return n
}

// end kills everything and waits for the servers.
func (fake *fakeLauncher) end() {
	fake.killIf(func(*fakeTask) bool { return true })
	fake.servers.Wait()
}

func (fake *fakeLauncher) task(i int) *fakeTask {
	fake.t.Helper()
	fake.mu.Lock()
	defer fake.mu.Unlock()
	if i >= len(fake.tasks) {
		fake.t.Fatalf("%d tasks were started, want more than %d", len(fake.tasks), i)
	}
	return fake.tasks[i]
}

func (fake *fakeLauncher) counts() (launches, tasks, live int) {
	fake.mu.Lock()
	defer fake.mu.Unlock()
	for _, task := range fake.tasks {
		if !task.dead {
			live++
		}
	}
	return fake.launches, len(fake.tasks), live
}

var errConnRefused = errors.New("connection refused")

func (fake *fakeLauncher) netDial(ctx context.Context, network, addr string) (net.Conn, error) {
	fake.mu.Lock()
	var task *fakeTask
	for _, t := range fake.tasks {
		if t.Addr == addr {
			task = t
		}
	}
	fake.mu.Unlock()
	if fake.onDial != nil {
		if err := fake.onDial(task); err != nil {
			return nil, err
		}
	}
	fake.mu.Lock()
	defer fake.mu.Unlock()
	if task == nil || task.dead || task.closing || time.Now().Before(task.listens) {
		return nil, errConnRefused
	}
	near, far := sshtest.Pipe()
	task.conns = append(task.conns, far)
	fake.servers.Go(func() { fake.serve(task, far) })
	return near, nil
}

func (fake *fakeLauncher) serve(task *fakeTask, c net.Conn) {
	defer c.Close()
	fake.mu.Lock()
	mute, hangsUp := task.mute, task.hangsUp
	fake.mu.Unlock()
	if hangsUp {
		return
	}
	if mute {
		io.Copy(io.Discard, c)
		return
	}
	config := &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			id, err := sshca.Verifier{Fleet: []ssh.PublicKey{task.fleet}, Principal: task.ID, Now: time.Now}.Verify(key)
			fake.mu.Lock()
			defer fake.mu.Unlock()
			if err != nil {
				task.rejected++
				return nil, err
			}
			task.logins = append(task.logins, id.ConnID)
			return &ssh.Permissions{}, nil
		},
	}
	config.AddHostKey(fake.key)
	if task.shows != nil {
		config.AddHostKey(task.shows) // replaces the other
	}
	conn, chans, reqs, err := ssh.NewServerConn(c, config)
	if err != nil {
		return
	}
	fake.mu.Lock()
	task.open++
	fake.mu.Unlock()
	defer func() {
		fake.mu.Lock()
		defer fake.mu.Unlock()
		task.open--
	}()
	var wg sync.WaitGroup
	wg.Go(func() {
		for req := range reqs {
			fake.mu.Lock()
			agrees := req.Type == "stop-if-unused@sallyport" && task.open == 1
			task.closing = task.closing || agrees
			fake.mu.Unlock()
			req.Reply(agrees, nil)
		}
	})
	for ch := range chans {
		ch.Reject(ssh.Prohibited, "")
	}
	wg.Wait()
	conn.Close()
}
