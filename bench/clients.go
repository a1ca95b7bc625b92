package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"
)

// A client is one connection with one session that runs cat. To a gateway it is
// equal to the stock client, of which ten thousand would not fit on a small
// machine.
type client struct {
	conn *ssh.Client
	in   io.WriteCloser
	out  io.Reader
}

// memory measures the memory of an idle connection with one open session: of the
// gateway, the growth of its process; of sshd, the processes of the connection.
// Only private memory counts: the memory that the end of the process would free.
func (b *bench) memory(ctx context.Context) ([]row, error) {
	warm, err := b.openClients(ctx, b.gateway, users) // starts all bastions, too
	defer func() { closeClients(warm) }()
	if err != nil {
		return nil, err
	}
	before, err := b.settled(ctx, b.gateway.pid)
	if err != nil {
		return nil, err
	}
	held, err := b.openClients(ctx, b.gateway, b.clients)
	defer func() { closeClients(held) }()
	if err != nil {
		return nil, err
	}
	after, err := b.settled(ctx, b.gateway.pid)
	if err != nil {
		return nil, err
	}
	if err := aliveClients(held); err != nil {
		return nil, err
	}
	b.log.Info("gateway memory", "before_KiB", before, "after_KiB", after, "connections", len(held))

	atSSHD, err := b.openClients(ctx, b.sshd, b.sshdClients)
	defer func() { closeClients(atSSHD) }()
	if err != nil {
		return nil, err
	}
	var sshd float64
	for _, pid := range descendants(b.sshd.pid) {
		// The session's command is not part of the server.
		if name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(name) != "sshd\n" {
			continue
		}
		kib, err := privateKiB(pid)
		if err != nil {
			return nil, fmt.Errorf("memory of sshd: %w", err)
		}
		sshd += kib
	}
	return []row{{
		What: "private memory per idle connection with a session", Goal: "<= 24 KiB", Unit: "KiB",
		Sallyport: samples{(after - before) / float64(len(held))},
		SSHD:      samples{sshd / float64(len(atSSHD))},
		Note:      fmt.Sprintf("gateway alone, %d connections; sshd, %d", len(held), len(atSSHD)),
	}}, nil
}

// settled returns the lowest private memory of a process during b.settle, in KiB.
func (b *bench) settled(ctx context.Context, pid int) (float64, error) {
	lowest := math.Inf(1)
	for deadline := time.Now().Add(b.settle); ; {
		kib, err := privateKiB(pid)
		if err != nil {
			return 0, fmt.Errorf("memory of the gateway: %w", err)
		}
		lowest = min(lowest, kib)
		if !time.Now().Before(deadline) {
			return lowest, nil
		}
		if err := sleep(ctx, time.Second); err != nil {
			return 0, err
		}
	}
}

// idle opens many connections, leaves them idle, and then reports how many are
// alive, and the CPU time and memory that the gateway used meanwhile.
func (b *bench) idle(ctx context.Context) ([]row, error) {
	began := time.Now()
	n, missing, err := b.fitIdle()
	if err != nil {
		return nil, err
	}
	held, err := b.openClients(ctx, b.gateway, n)
	defer func() { closeClients(held) }()
	if err != nil {
		return nil, err
	}
	b.log.Info("idle connections are open", "connections", len(held), "took", time.Since(began).Round(time.Millisecond))
	if err := sleep(ctx, 5*time.Second); err != nil { // for the garbage of the logins
		return nil, err
	}
	cpu0, err := cpuSeconds(b.gateway.pid)
	if err != nil {
		return nil, err
	}
	began = time.Now()
	if err := sleep(ctx, b.settings.idle); err != nil {
		return nil, err
	}
	cpu1, err := cpuSeconds(b.gateway.pid)
	if err != nil {
		return nil, err
	}
	percent := 100 * (cpu1 - cpu0) / time.Since(began).Seconds()
	kib, err := privateKiB(b.gateway.pid)
	if err != nil {
		return nil, err
	}
	alive := 0
	var died error
	for _, c := range held {
		if err := c.alive(); err != nil {
			died = err
		} else {
			alive++
		}
	}
	if died != nil {
		b.log.Error("a connection is dead", "err", died)
	}
	note := fmt.Sprintf("%d connections for %v%s", len(held), b.settings.idle, missing)
	return []row{
		{What: "idle connections alive at the end", Goal: "all", Unit: fmt.Sprintf("of %d", len(held)), Sallyport: samples{float64(alive)}, Note: note},
		{What: "gateway CPU while idle", Goal: "< 5 %", Unit: "% of a core", Sallyport: samples{percent}, Note: note},
		{What: "gateway memory while idle", Goal: "< 400 MiB", Unit: "MiB private", Sallyport: samples{kib / 1024}, Note: note},
	}, nil
}

// fitIdle returns the number of connections that the idle section can open: each
// takes two of the gateway's descriptors. If that is less than b.idleClients,
// missing is the reason, as text for a note.
func (b *bench) fitIdle() (n int, missing string, err error) {
	const others = 200 // listeners, logs, files read at a login
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, "", fmt.Errorf("reading the limit of open files: %w", err)
	}
	n = min(b.idleClients, (int(limit.Cur)-others)/2)
	if n < b.idleClients {
		missing = fmt.Sprintf(", not %d: the limit of open files is %d", b.idleClients, limit.Cur)
	}
	return n, missing, nil
}

// openClients opens n connections, each with a session; at the gateway they
// belong to all users in turn. With an error it returns those opened so far.
func (b *bench) openClients(ctx context.Context, s server, n int) ([]*client, error) {
	pem, err := os.ReadFile(b.key)
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", b.key, err)
	}
	public, err := os.ReadFile(b.path(s.name + "_key.pub"))
	if err != nil {
		return nil, err
	}
	hostKey, _, _, _, err := ssh.ParseAuthorizedKey(public)
	if err != nil {
		return nil, fmt.Errorf("%s_key.pub: %w", s.name, err)
	}
	var (
		mu   sync.Mutex
		open []*client
	)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range n {
		g.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			config := &ssh.ClientConfig{
				User:            s.user,
				Auth:            []ssh.AuthMethod{ssh.PublicKeys(key)},
				HostKeyCallback: ssh.FixedHostKey(hostKey),
				Timeout:         30 * time.Second,
			}
			if s.name == b.gateway.name {
				config.User = userName(i % users)
			}
			c, err := openClient(s.addr, config)
			if err != nil {
				return fmt.Errorf("connection %d of %d to %s as %s: %w\n%s", i+1, n, s.name, config.User, err, b.logOf(s.name))
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			return nil
		})
	}
	err = g.Wait()
	return open, err
}

func openClient(addr string, config *ssh.ClientConfig) (*client, error) {
	conn, err := ssh.Dial("tcp", addr, config)
	if err != nil {
		return nil, err
	}
	c := &client{conn: conn}
	session, err := conn.NewSession()
	if err == nil {
		c.in, err = session.StdinPipe()
	}
	if err == nil {
		c.out, err = session.StdoutPipe()
	}
	if err == nil {
		err = session.Start("exec cat")
	}
	if err == nil {
		err = c.alive() // cat runs
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

// alive sends a keepalive to the server and a byte to cat, and waits for both
// replies.
func (c *client) alive() (err error) {
	// A connection that does not answer in time is dead.
	const patience = 30 * time.Second
	timer := time.AfterFunc(patience, func() { c.conn.Close() })
	defer func() {
		if !timer.Stop() && err != nil {
			err = fmt.Errorf("no answer in %v: %w", patience, err)
		}
	}()
	if _, _, err = c.conn.SendRequest("keepalive@openssh.com", true, nil); err != nil {
		return fmt.Errorf("keepalive: %w", err)
	}
	var back [1]byte
	if _, err = c.in.Write([]byte{'x'}); err != nil {
		return fmt.Errorf("writing to the session: %w", err)
	}
	if _, err = io.ReadFull(c.out, back[:]); err != nil {
		return fmt.Errorf("reading from the session: %w", err)
	}
	return nil
}

func aliveClients(clients []*client) error {
	var errs []error
	for _, c := range clients {
		errs = append(errs, c.alive())
	}
	return errors.Join(errs...)
}

func closeClients(clients []*client) {
	for _, c := range clients {
		c.conn.Close()
	}
}

// sleep waits for d. If ctx ends first, it returns its cause.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
