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
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// A fakeAccount is an AWS account, its network, and the gateways that use it, all in
// a bubble of synctest.
type fakeAccount struct {
	t      testing.TB
	cloud  *awsfake.Cloud
	agents *agents
	fleet  ssh.Signer
	last   gateway // that was made
}

func newFakeAccount(t testing.TB) *fakeAccount {
	account := &fakeAccount{t: t, agents: newAgents(t), fleet: sshtest.NewKey(t)}
	account.cloud = awsfake.New(account.agents)
	// As reported of real tasks.
	account.cloud.Times = awsfake.Times{
		Provisioning:   awsfake.Fixed(4 * time.Second),
		Pending:        awsfake.Fixed(13 * time.Second),
		Activating:     awsfake.Fixed(3 * time.Second),
		Reporting:      awsfake.Fixed(2 * time.Second),
		Deprovisioning: awsfake.Fixed(10 * time.Second),
	}
	account.cloud.MissingFor = time.Second
	account.cloud.ListLag = 3 * time.Second
	account.cloud.Duplicates = true
	account.agents.boot = func() time.Duration { return 500 * time.Millisecond }
	return account
}

// end waits until all agents have exited, while the last gateway sweeps. The test
// fails if a resource is left then, or if an owner ever had two live tasks.
func (account *fakeAccount) end() {
	account.cloud.Set(func() {
		account.cloud.OnCall, account.cloud.OnLaunch, account.cloud.Policy, account.cloud.Buckets = nil, nil, nil, nil
	})
	account.cloud.Permit()
	account.agents.idle()
	for _, wait := range []time.Duration{20 * time.Minute, 13 * time.Hour, 2 * groupIdle, 2 * groupIdle} {
		time.Sleep(wait)
		if account.last.launcher != nil {
			if err := account.last.Sweep(context.Background()); err != nil {
				account.t.Log("the last sweep: ", err)
			}
		}
	}
	for _, v := range account.cloud.Violations() {
		account.t.Error(v)
	}
	for _, left := range account.cloud.Left() {
		account.t.Error("left: ", left)
	}
	account.cloud.Close()
	account.agents.serving.Wait()
	time.Sleep(2 * pollTimeout) // pollers end some time after their last caller
}

// A gateway is one process with a ledger in memory.
type gateway struct {
	*bastion.Dialer
	launcher *Launcher
}

// gateway starts one; configure may change its launcher.
func (account *fakeAccount) gateway(configure func(*Launcher)) gateway {
	account.t.Helper()
	g := account.dialer(&bastion.Memory{}, configure)
	if err := g.Adopt(account.t.Context()); err != nil {
		account.t.Fatal(err)
	}
	return g
}

func (account *fakeAccount) dialer(ledger bastion.Ledger, configure func(*Launcher)) gateway {
	log := slog.New(slog.NewTextHandler(account.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	cloud := NewCloud(account.cloud.Config(), "prod")
	cloud.Log = log
	l := &Launcher{
		Cloud: cloud, Profile: "default", FleetKeys: []ssh.PublicKey{account.fleet.PublicKey()},
		Options: Options{
			Cluster: awsfake.Cluster, TaskDefinition: awsfake.TaskDefinition, Container: "bastion", Account: "bastion",
			Subnets: awsfake.Subnets, SecurityGroups: []string{awsfake.SecurityGroup},
		},
	}
	if configure != nil {
		configure(l)
	}
	account.last = gateway{launcher: l, Dialer: &bastion.Dialer{
		Ledger: ledger,
		Settings: bastion.Settings{
			Profiles:  map[string]bastion.Profile{l.Profile: {Launcher: l, ProfileOptions: bastion.ProfileOptions{Idle: 15 * time.Minute, MaxLife: 12 * time.Hour, StartTimeout: 5 * time.Minute}}},
			FleetKeys: []ssh.Signer{account.fleet},
		},
		Log:     log,
		NetDial: account.agents.dial,
	}}
	g := account.last
	g.AfterSweep = func(ctx context.Context, owners map[bastion.Owner]bool) error {
		return cloud.DeleteUnusedGroups(ctx, owners, map[string]bastion.Launcher{l.Profile: l})
	}
	return g
}

// login connects a user and closes the connection.
func (g gateway) login(ctx context.Context, user string) (bastion.Task, error) {
	conn, err := g.Dial(ctx, identity.Identity{User: user, Profile: "default", ConnID: "c1"}, nil)
	if err != nil {
		return bastion.Task{}, err
	}
	conn.Close()
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

// isolated gives each owner of a launcher a security group.
func isolated(l *Launcher) {
	l.Isolate = &Isolation{Ingress: []string{awsfake.SecurityGroup}, Egress: []Rule{{"tcp", 443, 443, "10.0.0.0/8"}}}
}

// calls returns the number of calls since the one with index from, by action.
func (account *fakeAccount) calls(from int) map[string]int {
	counts := map[string]int{}
	for _, c := range account.cloud.Calls()[from:] {
		counts[c.Action]++
	}
	return counts
}

// live checks the owners of live tasks.
func (account *fakeAccount) live(want ...string) {
	account.t.Helper()
	for i := range want {
		want[i] += "+default"
	}
	slices.Sort(want)
	if got := account.cloud.Live(); !slices.Equal(got, want) {
		account.t.Errorf("live tasks of %v, want %v", got, want)
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

// idle makes all agents exit, and those that start later, as after their idle timeout.
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
func (account *fakeAccount) must(err, want error) {
	account.t.Helper()
	if !errors.Is(err, want) {
		account.t.Errorf("got %v, want %v", err, want)
	}
}

func user(i int) string { return fmt.Sprintf("user%d", i) }
