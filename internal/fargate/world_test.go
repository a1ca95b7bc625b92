package fargate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// A world is an AWS account, its network, and the gateways that use it, all in a
// bubble of synctest.
type world struct {
	t      testing.TB
	cloud  *awsfake.Cloud
	agents *agents
	fleet  ssh.Signer
	last   gateway // that was made
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, agents: newAgents(t), fleet: testKey(t)}
	w.cloud = awsfake.New(w.agents)
	// About what is said of real tasks.
	w.cloud.Times = awsfake.Times{
		Provisioning:   awsfake.Fixed(4 * time.Second),
		Pending:        awsfake.Fixed(13 * time.Second),
		Activating:     awsfake.Fixed(3 * time.Second),
		Reporting:      awsfake.Fixed(2 * time.Second),
		Deprovisioning: awsfake.Fixed(10 * time.Second),
	}
	w.cloud.MissingFor = time.Second
	w.cloud.ListLag = 3 * time.Second
	w.cloud.Duplicates = true
	w.agents.boot = func() time.Duration { return 500 * time.Millisecond }
	return w
}

// end lets time pass, in which agents end by themselves and the last gateway sweeps.
// The test fails if anything is left then, or if any owner ever had two tasks.
func (w *world) end() {
	w.cloud.Set(func() { w.cloud.OnCall, w.cloud.OnLaunch, w.cloud.Policy, w.cloud.Buckets = nil, nil, nil, nil })
	w.cloud.Permit()
	w.agents.idle()
	for _, wait := range []time.Duration{20 * time.Minute, 13 * time.Hour, 2 * groupIdle, 2 * groupIdle} {
		time.Sleep(wait)
		if w.last.launcher != nil {
			if err := errors.Join(w.last.Sweep(context.Background()), w.last.launcher.Cloud.Sweep(context.Background(), w.last.launcher)); err != nil {
				w.t.Log("the last sweep: ", err)
			}
		}
	}
	for _, v := range w.cloud.Violations() {
		w.t.Error(v)
	}
	for _, left := range w.cloud.Left() {
		w.t.Error("left: ", left)
	}
	w.cloud.Close()
	w.agents.serving.Wait()
	time.Sleep(2 * pollTimeout) // pollers end when nobody asks any more
}

// A gateway is one process with a ledger in memory.
type gateway struct {
	*bastion.Dialer
	launcher *Launcher
}

// gateway starts one; configure may change its launcher.
func (w *world) gateway(configure func(*Launcher)) gateway {
	w.t.Helper()
	g := w.dialer(&bastion.Memory{}, configure)
	if err := g.Adopt(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	return g
}

func (w *world) dialer(ledger bastion.Ledger, configure func(*Launcher)) gateway {
	log := slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	cloud := NewCloud(w.cloud.Config(), "prod", w.fleet.PublicKey())
	cloud.Log = log
	l := &Launcher{
		Cloud: cloud, Profile: "default",
		Cluster: awsfake.Cluster, TaskDefinition: awsfake.TaskDefinition, Container: "bastion", Account: "bastion",
		Subnets: awsfake.Subnets, SecurityGroups: []string{awsfake.SecurityGroup},
	}
	if configure != nil {
		configure(l)
	}
	w.last = gateway{launcher: l, Dialer: &bastion.Dialer{
		Ledger:   ledger,
		Profiles: map[string]bastion.Profile{"default": {Launcher: l, Idle: 15 * time.Minute, MaxLife: 12 * time.Hour, StartTimeout: 5 * time.Minute}},
		FleetKey: w.fleet,
		Log:      log,
		NetDial:  w.agents.dial,
	}}
	return w.last
}

// login connects a user and hangs up again.
func (g gateway) login(ctx context.Context, user string) (bastion.Task, error) {
	conn, err := g.Dial(ctx, identity.Identity{User: user, Profile: "default", ConnID: "c1"}, nil)
	if err != nil {
		return bastion.Task{}, err
	}
	conn.Close()
	go ssh.DiscardRequests(conn.Reqs) // ends with the connection
	for range conn.Chans {
	}
	return conn.Task, nil
}

func (g gateway) mustLogin(t testing.TB, user string) bastion.Task {
	t.Helper()
	task, err := g.login(t.Context(), user)
	if err != nil {
		t.Fatalf("%s: %v", user, err)
	}
	return task
}

// isolated gives a launcher's users security groups.
func isolated(l *Launcher) {
	l.Isolate = &Isolation{Ingress: []string{awsfake.SecurityGroup}, Egress: []Rule{{"tcp", 443, 443, "10.0.0.0/8"}}}
}

// calls counts those since from, by action.
func (w *world) calls(from int) map[string]int {
	counts := map[string]int{}
	for _, c := range w.cloud.Calls()[from:] {
		counts[c.Action]++
	}
	return counts
}

// live checks who has a task.
func (w *world) live(want ...string) {
	w.t.Helper()
	for i := range want {
		want[i] += "+default"
	}
	slices.Sort(want)
	if got := w.cloud.Live(); !slices.Equal(got, want) {
		w.t.Errorf("live tasks of %v, want %v", got, want)
	}
}

// Start implements awsfake.Backend.
func (a *agents) Start(_, ip string, env map[string]string) (awsfake.Container, error) {
	c := &memContainer{exited: make(chan struct{})}
	c.stop = a.start(ip, env)
	a.mu.Lock()
	a.containers = append(a.containers, c)
	over := a.over
	a.mu.Unlock()
	if over {
		c.exit(0)
	}
	return c, nil
}

// idle has all agents exit, and those to come, as for want of connections.
func (a *agents) idle() {
	a.mu.Lock()
	a.over = true
	containers := slices.Clone(a.containers)
	a.mu.Unlock()
	for _, c := range containers {
		c.exit(0)
	}
}

type memContainer struct {
	stop   func()
	once   sync.Once
	exited chan struct{}
	code   int
}

func (c *memContainer) exit(code int) {
	c.once.Do(func() {
		c.stop()
		c.code = code
		close(c.exited)
	})
}

// Stop implements awsfake.Container.
func (c *memContainer) Stop(kill bool) {
	if kill {
		c.exit(137)
	}
	c.exit(0)
}

func (c *memContainer) Exited() <-chan struct{} { return c.exited }
func (c *memContainer) ExitCode() int           { return c.code }

// must fails unless err wraps want.
func (w *world) must(err, want error) {
	w.t.Helper()
	if !errors.Is(err, want) {
		w.t.Errorf("got %v, want %v", err, want)
	}
}

func user(i int) string { return fmt.Sprintf("user%d", i) }
