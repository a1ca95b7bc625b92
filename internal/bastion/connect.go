package bastion

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
)

// A Conn is a logged-in connection to a bastion. The owner of the Conn must
// serve Chans and Reqs until they are closed, and close it.
type Conn struct {
	ssh.Conn
	// Net is the stream under it, as WrapConn made it.
	Net   net.Conn
	Chans <-chan ssh.NewChannel
	Reqs  <-chan *ssh.Request

	Owner Owner
	Task  Task // with the host key it has shown
	// Started says that this Dial has started it.
	Started bool

	dialer *Dialer // that remembers it; nil if none does
}

// Close implements [ssh.Conn].
func (c *Conn) Close() error {
	if d := c.dialer; d != nil {
		d.mu.Lock()
		delete(d.conns[c.Task.ID], c)
		if len(d.conns[c.Task.ID]) == 0 {
			delete(d.conns, c.Task.ID)
		}
		d.mu.Unlock()
	}
	return c.Conn.Close()
}

// remember has c counted among the connections to its task until it is closed.
func (d *Dialer) remember(c *Conn) {
	c.dialer = d
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conns == nil {
		d.conns = map[string]map[*Conn]struct{}{}
	}
	if d.conns[c.Task.ID] == nil {
		d.conns[c.Task.ID] = map[*Conn]struct{}{}
	}
	d.conns[c.Task.ID][c] = struct{}{}
}

// heard returns how often something has been read on each connection to a task.
func (d *Dialer) heard(taskID string) map[*Conn]uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	heard := map[*Conn]uint64{}
	for c := range d.conns[taskID] {
		heard[c] = 0
		if stream, ok := c.Net.(interface{ Heard() uint64 }); ok {
			heard[c] = stream.Heard()
		}
	}
	return heard
}

// heardSince reports whether something has come from the task, on any connection
// to it, since heard returned what is given.
func (d *Dialer) heardSince(taskID string, before map[*Conn]uint64) bool {
	for c, now := range d.heard(taskID) {
		if then, known := before[c]; !known || now != then {
			return true
		}
	}
	return false
}

// reach connects to a task that ought to run, and keeps trying for the time
// given. The error wraps ErrGone if the task has ended.
//
// The launcher is asked whether the task lives only when it does not answer at
// once, and beside the attempts to connect: its answer may take a second, and
// what ends these attempts is that the task has ended. Silence is called once,
// when it has not answered at once.
func (d *Dialer) reach(ctx context.Context, launcher Launcher, owner Owner, task Task, id identity.Identity, within time.Duration, silence func()) (*Conn, error) {
	const retry, askEvery = 100 * time.Millisecond, time.Second
	until := time.Now().Add(within)
	trying, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	silent := make(chan struct{}) // closed when it does not answer at once
	var asking sync.WaitGroup
	defer asking.Wait()
	defer stop(nil)
	asking.Go(func() {
		select {
		case <-silent:
		case <-time.After(askEvery):
		case <-trying.Done():
		}
		for trying.Err() == nil {
			if gone := d.alive(trying, launcher, owner, task.ID); errors.Is(gone, ErrGone) {
				stop(gone)
			}
			sleep(trying, askEvery)
		}
	})

	for first := true; ; first = false {
		conn, err := d.connect(trying, owner, task, id)
		if err == nil {
			return conn, nil
		}
		switch gone := context.Cause(trying); {
		case errors.Is(gone, ErrGone):
			return nil, gone
		case gone != nil:
			return nil, fmt.Errorf("%w: %w", gone, err)
		}
		if errors.Is(err, ErrHostKey) || errors.Is(err, errRefused) {
			// A task that is dead explains it: its address belongs to somebody
			// else by now.
			if gone := d.alive(ctx, launcher, owner, task.ID); errors.Is(gone, ErrGone) {
				return nil, gone
			}
		}
		if errors.Is(err, ErrHostKey) {
			d.Log.Error("SOMETHING ELSE ANSWERS IN PLACE OF A BASTION: it shows another host key; not logging in to it",
				"owner", owner, "task", task.ID, "addr", task.Addr, "err", err)
			return nil, err
		}
		if errors.Is(err, errRefused) {
			return nil, err
		}
		if time.Now().After(until) {
			if ours(err) {
				return nil, err
			}
			return nil, fmt.Errorf("%w: %w", ErrNoAnswer, err)
		}
		if first {
			close(silent)
			silence()
		}
		sleep(trying, retry) // its end is noticed by the next attempt
	}
}

// alive is launcher.Alive, in which a panic is not known either.
func (d *Dialer) alive(ctx context.Context, launcher Launcher, owner Owner, taskID string) (err error) {
	defer func() {
		if p := recover(); p != nil {
			d.Log.Error("panic", "in", "alive", "panic", p, "stack", string(debug.Stack()))
			err = errors.New("asking whether it lives failed")
		}
	}()
	return launcher.Alive(ctx, owner, taskID)
}

// ours reports whether it is for want of something on this machine that a
// connection could not be made.
func ours(err error) bool {
	for _, want := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL, syscall.ENETUNREACH} {
		if errors.Is(err, want) {
			return true
		}
	}
	return false
}

// errRefused says that a bastion is what it should be, and does not let us in.
var errRefused = errors.New("the bastion refuses the fleet's certificate (it may know another fleet key, or its clock may be wrong)")

// connect makes one connection to task and logs in as id.
func (d *Dialer) connect(ctx context.Context, owner Owner, task Task, id identity.Identity) (*Conn, error) {
	c, err := d.dialTCP(ctx, task.Addr)
	if err != nil {
		return nil, err
	}
	login, err := sshca.Sign(d.FleetKey, id, cmp.Or(task.Principal, task.ID), time.Now())
	if err != nil {
		c.Close()
		return nil, err
	}
	var mismatch error
	config := &ssh.ClientConfig{
		Config: ssh.Config{
			KeyExchanges: []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519},
			Ciphers:      []string{ssh.CipherAES128GCM},
			// Never: golang.org/x/crypto/ssh deadlocks for good when its own
			// side starts a rekey under load.
			RekeyThreshold: 1 << 50,
		},
		User:              id.User,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(login)},
		HostKeyAlgorithms: []string{ssh.KeyAlgoED25519},
		ClientVersion:     "SSH-2.0-Sallyport",
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			if task.HostKey == nil {
				task.HostKey = key // first contact; the caller pins it
			} else if !equal(key, task.HostKey) {
				mismatch = fmt.Errorf("%w: want %s, got %s", ErrHostKey,
					ssh.FingerprintSHA256(task.HostKey), ssh.FingerprintSHA256(key))
				return mismatch
			}
			return nil
		},
	}

	// Package ssh knows neither deadlines nor contexts.
	c.SetDeadline(time.Now().Add(handshakeTimeout))
	stop := context.AfterFunc(ctx, func() { c.Close() })
	conn, chans, reqs, err := ssh.NewClientConn(c, task.Addr, config)
	if err != nil {
		stop()
		if mismatch != nil {
			return nil, mismatch
		}
		// Package ssh has no type for this one.
		if strings.Contains(err.Error(), "ssh: unable to authenticate") {
			return nil, fmt.Errorf("%w: %w", errRefused, err)
		}
		return nil, fmt.Errorf("connecting to %s: %w", task.Addr, err)
	}
	if stream, ok := c.(interface{ Carries(ssh.Conn) }); ok {
		stream.Carries(conn)
	}
	out := &Conn{Conn: conn, Net: c, Chans: chans, Reqs: reqs, Owner: owner, Task: task}
	if !stop() {
		out.hangUp()
		return nil, context.Cause(ctx)
	}
	c.SetDeadline(time.Time{})
	return out, nil
}

// dialTCP makes a TCP connection. What asks for one of a machine that is just
// coming up is not refused but lost, and asked again after a second, then two,
// then four: so there are several attempts under way, and the first that is
// heard wins. When there are maxAttempts, the oldest but the very first, which a
// slow network may need, makes room for the next: a thousand people may be waiting
// for machines that are coming up.
func (d *Dialer) dialTCP(ctx context.Context, addr string) (net.Conn, error) {
	const again = 200 * time.Millisecond // until the next attempt
	dial := d.NetDial
	if dial == nil {
		// Package net sets TCP_NODELAY by itself. A bastion whose network
		// vanished is noticed within two minutes.
		dial = (&net.Dialer{KeepAliveConfig: net.KeepAliveConfig{
			Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4,
		}}).DialContext
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	const maxAttempts = 5
	type outcome struct {
		conn net.Conn
		err  error // nil, too, of an attempt that has made room
	}
	outcomes := make(chan outcome)
	pending := 0
	var cancels []context.CancelFunc // of the latest attempts
	attempt := func() {
		if len(cancels) == maxAttempts {
			cancels[1]()
			cancels = slices.Delete(cancels, 1, 2)
		}
		one, cancel := context.WithCancel(ctx)
		cancels = append(cancels, cancel)
		pending++
		go func() { // the loops below wait for it
			c, err := dial(one, "tcp", addr)
			if one.Err() != nil && ctx.Err() == nil {
				err = nil
			}
			outcomes <- outcome{c, err}
		}()
	}
	attempt()
	tick := time.NewTicker(again)
	defer tick.Stop()
	var first outcome
	for first.conn == nil && first.err == nil {
		select {
		case first = <-outcomes:
			pending--
		case <-tick.C:
			attempt()
		}
	}
	cancel()
	for ; pending > 0; pending-- {
		if late := <-outcomes; late.conn != nil {
			late.conn.Close()
		}
	}
	if first.err != nil {
		return nil, first.err
	}
	if d.WrapConn != nil {
		return d.WrapConn(first.conn), nil
	}
	return first.conn, nil
}

// hangUp closes a connection that nobody serves.
func (c *Conn) hangUp() {
	c.Close()
	var drained sync.WaitGroup
	drained.Go(func() { ssh.DiscardRequests(c.Reqs) })
	for range c.Chans {
	}
	drained.Wait()
}

func equal(a, b ssh.PublicKey) bool { return bytes.Equal(a.Marshal(), b.Marshal()) }
