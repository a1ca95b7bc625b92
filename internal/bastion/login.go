package bastion

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/tracing"
	"github.com/sallyport-ssh/sallyport/internal/transport"
	"github.com/sallyport-ssh/sallyport/internal/userauth"
)

const (
	// handshakeTimeout limits one attempt's TCP connect, and then its SSH
	// handshake and login.
	handshakeTimeout = 10 * time.Second

	// answerTimeout is how long a running bastion may leave connections
	// unanswered. An agent closes its listener before it exits, and ECS reports
	// RUNNING for some seconds longer. It also exceeds the 30 seconds for which an
	// agent keeps a connection without a sign of life.
	answerTimeout = 45 * time.Second

	// silence is how long the first attempt may take until the user is told that
	// she has to wait.
	silence = 5 * time.Second

	// redialPause is the time between two attempts to connect to a task, and
	// alivePause between two calls of Launcher.Alive meanwhile.
	redialPause, alivePause = 100 * time.Millisecond, time.Second
)

var (
	// errAgentClosed says that the agent accepted a connection and sent
	// something, or closed the connection. An overloaded agent does so, and an
	// attacker can overload it, so it is no reason to stop the bastion.
	errAgentClosed = errors.New("the agent broke off the login")

	// errLoginDenied says that the bastion has the right host key and does not
	// accept the certificate.
	errLoginDenied = errors.New("the bastion refuses the fleet's certificate (it may know another fleet key, or its clock may be wrong)")
)

// A Conn is a logged-in connection to a bastion. The owner of the Conn closes it.
type Conn struct {
	*transport.Conn

	Owner Owner
	Task  Task // with the host key it has shown
	// Started reports whether this Dial started the bastion.
	Started bool

	conns *connections // has it until Close; may be nil
}

// Close closes the connection, after written data has been sent, which may take a
// second.
func (c *Conn) Close() error {
	if c.conns != nil {
		c.conns.remove(c)
	}
	return c.Conn.Close()
}

// connections are the open connections to bastions, by task ID, from the moment
// that the agent has proven its host key. The zero value is ready for use.
type connections struct {
	mu     sync.Mutex
	byTask map[string]map[*Conn]struct{}
	// refused are the tasks that this gateway is about to stop.
	refused  map[string]refusal
	refusals uint64 // so far
}

// A refusal is kept for refusalTime, which exceeds the duration of a stop.
type refusal struct {
	number uint64
	at     time.Time
}

const refusalTime = time.Hour

// add counts c until it is closed. It returns false if the task is refused.
func (cs *connections) add(c *Conn) bool {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if _, ok := cs.refused[c.Task.ID]; ok {
		return false
	}
	c.conns = cs
	if cs.byTask == nil {
		cs.byTask = map[string]map[*Conn]struct{}{}
	}
	if cs.byTask[c.Task.ID] == nil {
		cs.byTask[c.Task.ID] = map[*Conn]struct{}{}
	}
	cs.byTask[c.Task.ID][c] = struct{}{}
	return true
}

func (cs *connections) remove(c *Conn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	delete(cs.byTask[c.Task.ID], c)
	if len(cs.byTask[c.Task.ID]) == 0 {
		delete(cs.byTask, c.Task.ID)
	}
}

// exist reports whether there are connections to a task.
func (cs *connections) exist(taskID string) bool {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return len(cs.byTask[taskID]) > 0
}

// refuse rejects new connections to a task until accept is called with the number
// that it returns, or a later one. Open connections stay.
func (cs *connections) refuse(taskID string) (number uint64) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(cs.refused, func(_ string, r refusal) bool { return now.Sub(r.at) > refusalTime })
	if cs.refused == nil {
		cs.refused = map[string]refusal{}
	}
	cs.refusals++
	cs.refused[taskID] = refusal{cs.refusals, now}
	return cs.refusals
}

// lastRefusal returns the number of the last refusal of any task. A caller of accept
// that relies on the ledger calls it before it reads the ledger.
func (cs *connections) lastRefusal() uint64 {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.refusals
}

// accept ends the refusal of a task, unless it has a later number than last. Call it
// if the task was not stopped, or if the ledger has the task as Running and was read
// after the refusal.
func (cs *connections) accept(taskID string, last uint64) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if r, ok := cs.refused[taskID]; ok && r.number <= last {
		delete(cs.refused, taskID)
	}
}

// received returns the number of bytes received on each connection to a task.
func (cs *connections) received(taskID string) map[*Conn]uint64 {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	received := map[*Conn]uint64{}
	for c := range cs.byTask[taskID] {
		received[c] = c.Received()
	}
	return received
}

// receivedSince reports whether anything has been received from the task, on any
// connection, since before was returned by received.
func (cs *connections) receivedSince(taskID string, before map[*Conn]uint64) bool {
	for c, now := range cs.received(taskID) {
		if then, known := before[c]; !known || now != then {
			return true
		}
	}
	return false
}

// dialAndPin connects to the task of a Running entry. If the entry has no host key,
// it pins the one that the task has shown.
func (b *bastion) dialAndPin(ctx context.Context, entry Entry, id identity.Identity, onSilence func()) (*Conn, error) {
	conn, err := b.dial(ctx, entry.Task, id, answerTimeout, onSilence)
	if err != nil {
		return nil, err
	}
	if entry.Task.HostKey == nil {
		if _, err := b.setRunning(ctx, entry, conn.Task); err != nil {
			conn.Close()
			return nil, err
		}
	}
	return conn, nil
}

// dial connects to a task and logs in as id, with attempts for the time given. It
// calls onSilence, once, if the first attempt fails or takes longer than silence: the
// kernel accepts connections for an agent that is stopped. The call may be on another
// goroutine, and has returned when dial returns. The error wraps ErrGone if the task
// has ended.
//
// The launcher is asked whether the task runs only if the task does not answer at
// once, and concurrently with the attempts, since its answer may take a second.
func (b *bastion) dial(ctx context.Context, task Task, id identity.Identity, within time.Duration, onSilence func()) (_ *Conn, err error) {
	ctx, end := tracing.Start(ctx, "handshake", "task", task.ID)
	defer func() { end(err) }()
	until := time.Now().Add(within)
	trying, cancel := context.WithCancelCause(ctx) // ends, too, if the task has ended
	silent := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() { b.cancelIfGone(trying, cancel, task.ID, silent) })
	onSilence = sync.OnceFunc(onSilence)
	watching.Go(func() {
		select {
		case <-time.After(silence):
			onSilence()
		case <-trying.Done():
		}
	})
	defer watching.Wait()
	defer cancel(nil)

	answered := false
	for first := true; ; first = false {
		conn, err := b.login(trying, task, id)
		if err == nil {
			return conn, nil
		}
		answered = answered || errors.Is(err, errAgentClosed)
		switch cause := context.Cause(trying); {
		case errors.Is(cause, ErrGone):
			return nil, cause
		case cause != nil:
			return nil, fmt.Errorf("%w: %w", cause, err)
		}
		if errors.Is(err, ErrHostKey) || errors.Is(err, errLoginDenied) {
			// If the task has ended, its address may be another's by now.
			if gone := b.alive(ctx, task.ID); errors.Is(gone, ErrGone) {
				return nil, gone
			}
		}
		if errors.Is(err, ErrHostKey) {
			b.log.Error("WRONG HOST KEY: another server answers at the address of a bastion; not logging in to it",
				"task", task.ID, "addr", task.Addr, "err", err)
			return nil, err
		}
		if errors.Is(err, errLoginDenied) || errors.Is(err, ErrConflict) {
			return nil, err
		}
		if time.Now().After(until) {
			if isLocalError(err) {
				return nil, err
			}
			if answered && !errors.Is(err, errAgentClosed) {
				err = fmt.Errorf("%w; before that: %w", err, errAgentClosed)
			}
			return nil, fmt.Errorf("%w: %w", ErrNoAnswer, err)
		}
		if first {
			close(silent)
			onSilence()
		}
		sleep(trying, redialPause) // the next attempt notices its end
	}
}

// cancelIfGone asks the launcher, until ctx ends, whether the task runs, and
// cancels with the launcher's error if the task has ended. It begins when silent is
// closed, and after a second in any case.
func (b *bastion) cancelIfGone(ctx context.Context, cancel context.CancelCauseFunc, taskID string, silent <-chan struct{}) {
	select {
	case <-silent:
	case <-time.After(alivePause):
	case <-ctx.Done():
	}
	for ctx.Err() == nil {
		if err := b.alive(ctx, taskID); errors.Is(err, ErrGone) {
			cancel(err)
		}
		sleep(ctx, alivePause)
	}
}

// isLocalError reports whether a connection failed for lack of resources of this
// machine: descriptors, memory, ports, routes.
func isLocalError(err error) bool {
	for _, errno := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL, syscall.ENETUNREACH} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// login makes one connection to a task and logs in as id. The connection is counted
// in conns, which may refuse it.
func (b *bastion) login(ctx context.Context, task Task, id identity.Identity) (*Conn, error) {
	return b.loginAs(ctx, task, id, b.conns.add)
}

// loginAs is login with another count: admit is called once the agent has proven
// its host key, and may refuse the connection.
func (b *bastion) loginAs(ctx context.Context, task Task, id identity.Identity, admit func(*Conn) bool) (*Conn, error) {
	nc, err := dialAddr(ctx, b.netDial, task.Addr)
	if err != nil {
		return nil, err
	}
	// In this order, since the bastion may trust only one of the keys.
	var certificates []ssh.Signer
	for _, fleetKey := range b.fleetKeys {
		certificate, err := sshca.Sign(fleetKey, id, cmp.Or(task.Principal, task.ID), time.Now())
		if err != nil {
			nc.Close()
			return nil, err
		}
		certificates = append(certificates, certificate)
	}
	c := transport.NewClient(nc, &transport.Config{
		Version: "SSH-2.0-Sallyport",
		// The agent has both; AES-GCM is the cheapest per byte.
		Ciphers: []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM},
		HostKey: func(key ssh.PublicKey) error {
			if task.HostKey == nil {
				task.HostKey = key // first contact; the caller pins it
			} else if !equal(key, task.HostKey) {
				return fmt.Errorf("%w: want %s, got %s", ErrHostKey,
					ssh.FingerprintSHA256(task.HostKey), ssh.FingerprintSHA256(key))
			}
			return nil
		},
	})
	nc.SetDeadline(time.Now().Add(handshakeTimeout))
	stop := context.AfterFunc(ctx, func() { c.Close() })
	conn := &Conn{Conn: c, Owner: b.owner}
	if err = c.Handshake(); err == nil {
		conn.Task = task // with the host key
		if admit(conn) {
			err = userauth.Client(c, id.User, nil, certificates...)
		} else {
			err = fmt.Errorf("%w: task %s is being stopped", ErrConflict, task.ID)
		}
	}
	if err != nil {
		stop()
		conn.Close()
		switch {
		case errors.Is(err, ErrHostKey), errors.Is(err, ErrConflict):
			return nil, err
		case errors.Is(err, userauth.ErrDenied):
			return nil, fmt.Errorf("%w: %w", errLoginDenied, err)
		case ctx.Err() == nil && (c.Received() > 0 || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)):
			err = fmt.Errorf("%w: %w", errAgentClosed, err)
		}
		return nil, fmt.Errorf("connecting to %s: %w", task.Addr, err)
	}
	if !stop() {
		conn.Close()
		return nil, context.Cause(ctx)
	}
	nc.SetDeadline(time.Time{})
	return conn, nil
}

func equal(a, b ssh.PublicKey) bool { return bytes.Equal(a.Marshal(), b.Marshal()) }
