package bastion

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
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

// A world holds tasks with real SSH servers in them, on a network in memory. It
// implements Launcher as the contract says and no better, and fails the test if
// an owner ever has two live tasks.
type world struct {
	t     testing.TB
	fleet ssh.Signer
	key   ssh.Signer // of all agents, to save time

	boot    time.Duration // from Launch until the agent listens
	noKey   bool          // Launch does not know the host key
	onceGen bool          // a generation that was launched and has ended is burnt, as on ECS

	// onLaunch, if not nil, decides what becomes of a Launch: whether a task
	// is started, and what the caller is told. Both, because a reply can be
	// lost after the task has started. It may block.
	onLaunch func(ctx context.Context, l Launch) (start bool, err error)
	// onAlive, if not nil, may fail an Alive.
	onAlive func() error
	// onList, if not nil, may delay and fail a List.
	onList func(ctx context.Context) error
	// onStop, if not nil, may delay a Stop, and fail it; the task ends all the
	// same.
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
	shows    ssh.Signer // the host key, if not the world's
	fleet    ssh.PublicKey
	mute     bool // accepts connections and says nothing
	conns    []net.Conn
	logins   []string // key ids
	rejected int
}

func newWorld(t testing.TB) *world {
	return &world{t: t, fleet: newKey(t), key: newKey(t), boot: 5 * time.Second, onceGen: true}
}

func newKey(t testing.TB) ssh.Signer {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromSigner(priv)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (w *world) Launch(ctx context.Context, l Launch) (Task, error) {
	w.mu.Lock()
	w.launches++
	w.mu.Unlock()
	start, fault := true, error(nil)
	if w.onLaunch != nil {
		start, fault = w.onLaunch(ctx, l)
	}
	var task *fakeTask
	err := fault
	if start {
		var launchErr error
		if task, launchErr = w.launch(l); launchErr != nil {
			err = launchErr
		}
	}
	if err != nil {
		return Task{}, err
	}
	return task.Task, nil
}

func (w *world) launch(l Launch) (*fakeTask, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var live *fakeTask
	for _, task := range w.tasks {
		if task.owner == l.Owner && task.Generation == l.Generation {
			if task.dead && w.onceGen {
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
		w.t.Errorf("launching generation %d of %s while %s is alive", l.Generation, l.Owner, live.ID)
	}
	task := &fakeTask{owner: l.Owner, listens: time.Now().Add(w.boot), fleet: w.fleet.PublicKey()}
	task.Task = Task{
		ID:         fmt.Sprintf("%s-%d-%d", l.Owner, l.Generation, len(w.tasks)),
		Generation: l.Generation,
		Addr:       fmt.Sprintf("task:%d", len(w.tasks)),
	}
	if !w.noKey {
		task.HostKey = w.key.PublicKey()
	}
	w.tasks = append(w.tasks, task)
	return task, nil
}

func (w *world) Alive(_ context.Context, owner Owner, id string) error {
	if w.onAlive != nil {
		if err := w.onAlive(); err != nil {
			return err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lookups++
	for _, task := range w.tasks {
		if task.owner == owner && task.ID == id && !task.dead {
			return nil
		}
	}
	return fmt.Errorf("task %s: %w", id, ErrGone)
}

func (w *world) Stop(_ context.Context, owner Owner, id string) error {
	w.mu.Lock()
	w.stops++
	w.mu.Unlock()
	var err error
	if w.onStop != nil {
		err = w.onStop()
	}
	w.killIf(func(task *fakeTask) bool { return task.owner == owner && task.ID == id })
	return err
}

func (w *world) List(ctx context.Context) ([]OwnedTask, error) {
	if w.onList != nil {
		if err := w.onList(ctx); err != nil {
			return nil, err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lookups++
	var out []OwnedTask
	for _, task := range w.tasks {
		if !task.dead {
			out = append(out, OwnedTask{Owner: task.owner, Task: task.Task, Started: task.listens.Add(-w.boot)})
		}
	}
	return out, nil
}

// killIf ends the live tasks that match and returns their number.
func (w *world) killIf(match func(*fakeTask) bool) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, task := range w.tasks {
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
func (w *world) end() {
	w.killIf(func(*fakeTask) bool { return true })
	w.servers.Wait()
}

func (w *world) task(i int) *fakeTask {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if i >= len(w.tasks) {
		w.t.Fatalf("%d tasks were started, want more than %d", len(w.tasks), i)
	}
	return w.tasks[i]
}

func (w *world) counts() (launches, tasks, live int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, task := range w.tasks {
		if !task.dead {
			live++
		}
	}
	return w.launches, len(w.tasks), live
}

var errConnRefused = errors.New("connection refused")

func (w *world) netDial(ctx context.Context, network, addr string) (net.Conn, error) {
	w.mu.Lock()
	var task *fakeTask
	for _, t := range w.tasks {
		if t.Addr == addr {
			task = t
		}
	}
	w.mu.Unlock()
	if w.onDial != nil {
		if err := w.onDial(task); err != nil {
			return nil, err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if task == nil || task.dead || time.Now().Before(task.listens) {
		return nil, errConnRefused
	}
	near, far := sshtest.Pipe()
	task.conns = append(task.conns, far)
	w.servers.Go(func() { w.serve(task, far) })
	return near, nil
}

func (w *world) serve(task *fakeTask, c net.Conn) {
	defer c.Close()
	if task.mute {
		io.Copy(io.Discard, c)
		return
	}
	config := &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			id, err := sshca.Verifier{Fleet: task.fleet, Principal: task.ID, Now: time.Now}.Verify(key)
			w.mu.Lock()
			defer w.mu.Unlock()
			if err != nil {
				task.rejected++
				return nil, err
			}
			task.logins = append(task.logins, id.ConnID)
			return &ssh.Permissions{}, nil
		},
	}
	config.AddHostKey(w.key)
	if task.shows != nil {
		config.AddHostKey(task.shows) // replaces the other
	}
	conn, chans, reqs, err := ssh.NewServerConn(c, config)
	if err != nil {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { ssh.DiscardRequests(reqs) })
	for ch := range chans {
		ch.Reject(ssh.Prohibited, "")
	}
	wg.Wait()
	conn.Close()
}
