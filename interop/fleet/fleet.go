package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

const (
	// shortIdle is the gateways' setting idle. It is short, because this machine runs
	// all bastions.
	shortIdle = 15 * time.Second
	// agentPort is bastion-agent's.
	agentPort = 2022
	// drainDelay is the gateways' setting. The balancer notices within two seconds that
	// /readyz fails; a machine under load needs longer.
	drainDelay = 8 * time.Second
	// drain is the gateways' setting.
	drain = 20 * time.Second
	// startTimeout is the gateways' setting.
	startTimeout = 4 * time.Minute
	// sweepInterval is the longest time between two sweeps of a gateway, and
	// orphanAge the age from which on it stops a task that the table does not have.
	sweepInterval, orphanAge = 11 * time.Minute, 10 * time.Minute
)

// A fleet is three gateways with everything that they need.
type fleet struct {
	options
	*spawner
	abort    context.CancelCauseFunc
	idle     time.Duration
	keep     bool // the folder, at the end
	results  *results
	blame    blame
	gateways [gateways + 1]*gateway // from 1
	balancer *balancer

	hostKey ssh.PublicKey
	keys    []ssh.Signer // of users

	table *table         // nil with moto
	cloud *awsfake.Cloud // nil with moto
	aws   replies
	// probes are URLs of the services, see watchLoad.
	probes []string

	definition    string
	subnets       []string
	securityGroup string
	// tasks returns all tasks that the platform knows.
	tasks func() []awsfake.Task
	live  atomic.Int32 // tasks, at the last look

	judging    sync.Mutex // guards the next one
	judgements []func()   // failures to be judged, see settle

	background sync.WaitGroup
	closers    []func() // in the order of their use; called in reverse
}

// newFleet starts everything, and waits for the gateways. Abort is called if something ends
// on which the run depends.
func newFleet(ctx context.Context, abort context.CancelCauseFunc, p part, o options, s *spawner) (f *fleet, err error) {
	f = &fleet{options: o, spawner: s, abort: abort, idle: shortIdle, results: newResults(o)}
	defer func() {
		if err != nil {
			f.keep = true
			f.close()
		}
	}()
	if f.dir == "" {
		f.dir, err = os.MkdirTemp("", "sallyport-fleet-"+p.name+"-")
	} else {
		f.keep = true
		if f.dir, err = filepath.Abs(filepath.Join(f.dir, p.name)); err == nil {
			err = os.MkdirAll(f.dir, 0o755)
		}
	}
	if err != nil {
		return f, err
	}
	environ, err := p.aws(ctx, f)
	if err != nil {
		return f, err
	}
	if err := f.writeKeys(); err != nil {
		return f, err
	}
	for i := 1; i <= gateways; i++ {
		g := &gateway{fleet: f, number: i, environ: environ, addr: fmt.Sprintf("%s:%d", gatewayAddr(i), sshPort)}
		f.gateways[i] = g
		if err := g.configure(); err != nil {
			return f, err
		}
		if err := g.listenToStates(); err != nil {
			return f, err
		}
	}
	out, err := f.gateways[1].command("ledger", "create-table").CombinedOutput()
	if err != nil {
		return f, fmt.Errorf("creating the table: %w\n%s", err, out)
	}
	for _, g := range f.gateways[1:] {
		f.closers = append(f.closers, g.kill)
		if err := g.start(); err != nil {
			return f, err
		}
	}
	if f.balancer, err = startBalancer(s, f.dir); err != nil {
		return f, err
	}
	f.closers = append(f.closers, f.balancer.close)
	f.depend(f.balancer.process)
	for _, g := range f.gateways[1:] {
		if err := g.ready(ctx); err != nil {
			return f, err
		}
	}
	return f, greeting(ctx, f.balancer.addr)
}

// depend ends the run if the process ends before close kills it.
func (f *fleet) depend(p *process) {
	closing := make(chan struct{})
	f.background.Go(func() {
		select {
		case <-p.done:
			f.abort(fmt.Errorf("%s has ended: %v\n%s", p.name, p.state, p.tail()))
		case <-closing:
		}
	})
	f.closers = append(f.closers, func() { close(closing); p.kill() })
}

// close ends everything, and removes the folder unless keep is set.
func (f *fleet) close() {
	for i := len(f.closers) - 1; i >= 0; i-- {
		f.closers[i]()
	}
	f.background.Wait()
	if f.keep && f.dir != "" {
		fmt.Fprintf(os.Stderr, "fleet: logs are in %s\n", f.dir)
	} else {
		os.RemoveAll(f.dir)
	}
}

func (f *fleet) path(elem ...string) string {
	return filepath.Join(append([]string{f.dir}, elem...)...)
}

func userName(i int) string { return fmt.Sprintf("user%d", i) }

// writeKeys generates the keys of the gateways and the users.
func (f *fleet) writeKeys() error {
	if err := os.MkdirAll(f.path("keys"), 0o755); err != nil {
		return err
	}
	generate := func(file string) (ssh.Signer, error) {
		private, err := newKey()
		if err != nil {
			return nil, err
		}
		block, err := ssh.MarshalPrivateKey(private, "")
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			return nil, err
		}
		return ssh.NewSignerFromSigner(private)
	}
	host, err := generate(f.path("host_key"))
	if err != nil {
		return err
	}
	f.hostKey = host.PublicKey()
	if _, err := generate(f.path("fleet_key")); err != nil {
		return err
	}
	known := fmt.Sprintf("[%s]:%d %s", balancerAddr, sshPort, ssh.MarshalAuthorizedKey(f.hostKey))
	if err := os.WriteFile(f.path("known_hosts"), []byte(known), 0o644); err != nil {
		return err
	}
	for i := range f.users {
		key, err := generate(f.path(userName(i)))
		if err != nil {
			return err
		}
		f.keys = append(f.keys, key)
		if err := os.WriteFile(f.path("keys", userName(i)), ssh.MarshalAuthorizedKey(key.PublicKey()), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// newKey generates a private key.
func newKey() (ed25519.PrivateKey, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	return private, err
}

// awaitPort returns when the address accepts connections.
func awaitPort(ctx context.Context, addr string) error {
	for deadline := time.Now().Add(patience); ; {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			return c.Close()
		}
		if time.Now().After(deadline) {
			return err
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
}

// greeting returns when an SSH server answers at the address.
func greeting(ctx context.Context, addr string) error {
	var last error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if last = greets(addr); last == nil {
			return nil
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
	return fmt.Errorf("no SSH server answers at %s: %w", addr, last)
}

func greets(addr string) error {
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	hello := make([]byte, 4)
	if _, err := io.ReadFull(c, hello); err != nil {
		return err
	}
	if string(hello) != "SSH-" {
		return fmt.Errorf("greeted with %q", hello)
	}
	return nil
}

// sleep waits, and returns false if ctx ends before.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// A gateway is one of the three, and the processes that it has had.
type gateway struct {
	*fleet
	number  int
	environ []string
	addr    string

	// notified is the socket at which the gateway tells its states, as to systemd, and
	// mainPID gets the process IDs that it reports after hand-overs.
	notified *net.UnixConn
	mainPID  chan int

	mu        sync.Mutex
	process   *process
	processes int
	expected  bool // its end
}

func (g *gateway) String() string { return namespaceOf(g.number) }

// configure writes the configuration. All differ in address and state_dir only.
func (g *gateway) configure() error {
	f := g.fleet
	me, err := user.Current()
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`listen: "%s"
host_keys: [host_key]
fleet_key: fleet_key
authorized_keys_dir: keys
state_dir: %s.state
deployment: fleet
ledger: {dynamodb: {table: sallyport}}
proxy_protocol_from: [%s]
monitoring: {listen: "%s:%d"}
# A machine that is slow has many connections in their handshakes.
max_startups: 4000
per_source_max_startups: none
starts_per_user: 1000/1h
drain_delay: %s
drain: %s
profiles:
  default:
    launcher: fargate
    idle: %s
    max_life: 2h
    start_timeout: %s
    fargate:
      cluster: %s
      task_definition: %s
      account: %s
      subnets: [%s]
      security_groups: [%s]
`, g.addr, g, balancerAddr, gatewayAddr(g.number), monitoringPort, drainDelay, drain, g.idle, startTimeout, awsfake.Cluster, f.definition, me.Username,
		strings.Join(f.subnets, ", "), f.securityGroup)
	return os.WriteFile(g.config(), []byte(config), 0o644)
}

func (g *gateway) config() string { return g.path(g.String() + ".yaml") }

// command returns a command of the gateway's program, in its namespace.
func (g *gateway) command(args ...string) *exec.Cmd {
	args = append(args, "--config", g.config())
	program, _ := filepath.Abs(filepath.Join(g.bin, "gateway"))
	cmd := exec.Command("ip", append([]string{"netns", "exec", g.String(), program}, args...)...)
	cmd.Env = append(os.Environ(), g.environ...)
	return cmd
}

// start starts a process.
func (g *gateway) start() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.processes++
	p, err := g.spawner.start(g.dir, fmt.Sprintf("%s-%d", g, g.processes), g.command("serve"))
	if err != nil {
		return err
	}
	g.follow(p)
	return nil
}

// follow makes p the gateway's process, and watches for its end. The caller holds mu.
func (g *gateway) follow(p *process) {
	g.process, g.expected = p, false
	g.background.Go(func() {
		<-p.done
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.process == p && !g.expected {
			g.results.violate(failedGateways, "%s has ended by itself: %v\n%s", p.name, p.state, p.tail())
		}
	})
}

// listenToStates opens the socket for the gateway's states, see sd_notify(3).
func (g *gateway) listenToStates() (err error) {
	addr := &net.UnixAddr{Net: "unixgram", Name: g.path(g.String() + ".notify")}
	os.Remove(addr.Name) // of an earlier run
	if g.notified, err = net.ListenUnixgram(addr.Net, addr); err != nil {
		return err
	}
	g.closers = append(g.closers, func() { g.notified.Close() })
	g.environ = append(slices.Clip(g.environ), "NOTIFY_SOCKET="+addr.Name)
	g.mainPID = make(chan int)
	closed := make(chan struct{})
	g.closers = append(g.closers, func() { close(closed) })
	g.background.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, err := g.notified.Read(buf)
			if err != nil {
				return
			}
			for line := range strings.Lines(string(buf[:n])) {
				value, ok := strings.CutPrefix(strings.TrimSpace(line), "MAINPID=")
				if pid, err := strconv.Atoi(value); ok && err == nil {
					select {
					case g.mainPID <- pid:
					case <-closed:
					}
				}
			}
		}
	})
	return nil
}

// handOver has the gateway start its successor, as an operator does after the installation
// of a new version, and returns the old process, which drains.
func (g *gateway) handOver(ctx context.Context) (old *process, err error) {
	old = g.current()
	old.signal(syscall.SIGUSR2)
	select {
	case pid := <-g.mainPID:
		g.mu.Lock()
		defer g.mu.Unlock()
		g.processes++
		successor, err := adopt(fmt.Sprintf("%s-%d", g, g.processes), old.log, pid)
		if err != nil {
			return nil, err
		}
		g.follow(successor)
		return old, nil
	case <-old.done:
		return nil, fmt.Errorf("%s: %v at SIGUSR2\n%s", old.name, old.state, old.tail())
	case <-time.After(patience):
		return nil, fmt.Errorf("%s has no successor %v after SIGUSR2\n%s", old.name, patience, old.tail())
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// ready returns when the gateway answers.
func (g *gateway) ready(ctx context.Context) error {
	if err := greeting(ctx, g.addr); err != nil {
		return fmt.Errorf("%s: %w\n%s", g, err, g.current().tail())
	}
	return nil
}

func (g *gateway) current() *process {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.process
}

// expectEnd returns the process, whose end is no violation from now on.
func (g *gateway) expectEnd() *process {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.expected = true
	return g.process
}

// kill ends the gateway at once.
func (g *gateway) kill() {
	if p := g.expectEnd(); p != nil {
		p.kill()
	}
}

// terminate drains the gateway, and returns its process, which has not ended yet.
func (g *gateway) terminate() *process {
	p := g.expectEnd()
	p.signal(syscall.SIGTERM)
	return p
}

// targets are the addresses of a kind of cut.
func (f *fleet) targets(k *kind, gateway int) []string {
	switch k {
	case cutTable:
		return []string{tableAddr}
	case cutAWS:
		return []string{awsAddr}
	case cutBastions:
		return []string{bastionsNet}
	case cutGateways:
		var others []string
		for i := 1; i <= gateways; i++ {
			if i != gateway {
				others = append(others, gatewayAddr(i))
			}
		}
		return others
	}
	panic(errors.New("not a cut: " + k.name))
}
