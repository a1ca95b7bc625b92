package fargate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// seeds is how often each fault is tried, with other delays and chances.
func seeds() uint64 {
	if raceEnabled {
		return 10
	}
	return 20
}

// safe is a source of chance that many goroutines may use.
type safe struct {
	mu     sync.Mutex
	source rand.Source
}

func (s *safe) Uint64() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.source.Uint64()
}

// perSeed runs a test in a bubble for each seed; the life of tasks is different in
// each.
func perSeed(t *testing.T, test func(t *testing.T, w *world, rng *rand.Rand)) {
	t.Helper()
	forSeeds(t, seeds(), test)
}

func forSeeds(t *testing.T, n uint64, test func(t *testing.T, w *world, rng *rand.Rand)) {
	t.Helper()
	for seed := range n {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.end()
				rng := rand.New(&safe{source: rand.NewPCG(seed, 1)})
				upTo := func(d time.Duration) func() time.Duration { return awsfake.Between(rng, 0, d) }
				w.cloud.Times = awsfake.Times{
					Provisioning: upTo(10 * time.Second), Pending: upTo(30 * time.Second), Activating: upTo(10 * time.Second),
					Reporting: upTo(5 * time.Second), Deprovisioning: upTo(30 * time.Second),
				}
				w.cloud.MissingFor = upTo(3 * time.Second)()
				w.agents.boot = upTo(3 * time.Second)
				test(t, w, rng)
			})
		})
	}
}

// onCall returns a hook that gives the first n calls of an action a fault.
func onCall(action string, n int, fault awsfake.Fault) func(awsfake.Call) awsfake.Fault {
	return func(c awsfake.Call) awsfake.Fault {
		if c.Action == action && c.N <= n {
			return fault
		}
		return awsfake.Fault{}
	}
}

// TestLostReply: RunTask works, and nobody hears of it.
func TestLostReply(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		w.cloud.OnCall = onCall("ecs:RunTask", 1+rng.IntN(8), awsfake.Fault{LoseReply: true})
		w.gateway(nil).mustLogin(t, "alice")
		w.live("alice")
	})
}

// TestStorms: for a minute AWS answers with nothing but errors.
func TestStorms(t *testing.T) {
	for name, fault := range map[string]awsfake.Fault{"throttled": awsfake.Throttled, "unavailable": awsfake.Unavailable, "broken": awsfake.Broken} {
		t.Run(name, func(t *testing.T) {
			perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
				g := w.gateway(nil)
				began, most := time.Now(), time.Duration(rng.Int64N(int64(time.Minute)))
				w.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
					if time.Since(began) < most && rng.IntN(10) > 0 {
						return fault
					}
					return awsfake.Fault{}
				}
				g.mustLogin(t, "alice")
				w.live("alice")
				if calls := w.calls(0); calls["ecs:RunTask"] > 60 {
					t.Errorf("%d calls of RunTask in a minute", calls["ecs:RunTask"])
				}
			})
		})
	}
}

// TestDiesInEachState: a launch that fails is tried once more, with another
// generation in another zone, where that may help; otherwise the user is told.
func TestDiesInEachState(t *testing.T) {
	for _, tt := range []struct {
		fate  awsfake.Fate
		want  error
		tries int
	}{
		{awsfake.Fate{Failure: awsfake.NoCapacity}, bastion.ErrCapacity, 2},
		{awsfake.Fate{Failure: awsfake.NoVCPU}, bastion.ErrQuota, 1},
		{awsfake.Fate{FailIn: "PROVISIONING", Reason: awsfake.NoENI}, bastion.ErrPlatform, 2},
		{awsfake.Fate{FailIn: "PENDING", Reason: awsfake.NoImage}, bastion.ErrImage, 1},
		{awsfake.Fate{FailIn: "PENDING", Reason: awsfake.NoSecrets}, bastion.ErrSecrets, 1},
		{awsfake.Fate{FailIn: "PENDING", Reason: awsfake.NoLogGroup}, bastion.ErrConfig, 1},
		{awsfake.Fate{FailIn: "ACTIVATING", Reason: "CannotStartContainerError: something"}, bastion.ErrGone, 2},
		{awsfake.Fate{FailIn: "RUNNING", Reason: "Essential container in task exited"}, bastion.ErrGone, 2},
	} {
		t.Run(tt.fate.Failure+tt.fate.FailIn+tt.fate.Reason, func(t *testing.T) {
			perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
				w.agents.set(func() { w.agents.boot = func() time.Duration { return time.Minute } }) // none comes up before its fate
				g := w.gateway(nil)
				var subnets []string
				w.cloud.OnLaunch = func(l awsfake.Launch) awsfake.Fate {
					subnets = append(subnets, l.Subnet)
					return tt.fate
				}
				_, err := g.login(t.Context(), "alice")
				w.must(err, tt.want)
				if len(subnets) != tt.tries {
					t.Fatalf("launched in %v, want %d launches", subnets, tt.tries)
				}
				if tt.tries > 1 && subnets[0] == subnets[1] {
					t.Errorf("both attempts in %s", subnets[0])
				}
				w.live()
				// Once that is over, the next login gets a bastion.
				w.cloud.Set(func() { w.cloud.OnLaunch = nil })
				w.agents.set(func() { w.agents.boot = func() time.Duration { return time.Second } })
				if task := g.mustLogin(t, "alice"); task.Generation != int64(tt.tries)+1 {
					t.Errorf("generation %d", task.Generation)
				}
				w.live("alice")
			})
		})
	}
}

// TestSpotQuota: the quota of Spot is used up, which ECS may say in three ways; the
// bastion is started on demand, unless that quota is used up as well.
func TestSpotQuota(t *testing.T) {
	for name, fate := range map[string]awsfake.Fate{
		"failure": {Failure: awsfake.NoVCPU},
		"stopped": {FailIn: "PROVISIONING", Reason: awsfake.NoVCPU},
		"error":   {},
	} {
		t.Run(name, func(t *testing.T) {
			perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
				g := w.gateway(func(l *Launcher) { l.Spot = true })
				both := false
				var spot []bool
				w.cloud.OnLaunch = func(l awsfake.Launch) awsfake.Fate {
					spot = append(spot, l.Spot)
					if l.Spot || both {
						return fate
					}
					return awsfake.Fate{}
				}
				w.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
					if name == "error" && c.Action == "ecs:RunTask" && (c.N == 1 || both) {
						return awsfake.Fault{Status: 400, Code: "ClientException", Message: awsfake.NoVCPU}
					}
					return awsfake.Fault{}
				}
				g.mustLogin(t, "alice")
				w.live("alice")
				if n := len(spot); spot[n-1] || n > 2 || w.calls(0)["ecs:RunTask"] != 2 {
					t.Errorf("launched with Spot %v, in %d calls", spot, w.calls(0)["ecs:RunTask"])
				}
				w.cloud.Set(func() { both, spot = true, nil })
				_, err := g.login(t.Context(), "bob")
				w.must(err, bastion.ErrQuota)
				if n := w.calls(0)["ecs:RunTask"]; n != 4 {
					t.Errorf("%d calls, want two for each of the two", n)
				}
				w.live("alice")
			})
		})
	}
}

// TestGatewayKilled kills the gateway at each call of a launch, which may be carried
// out or not. Its successor finishes the same launch, and there is one task.
func TestGatewayKilled(t *testing.T) {
	for _, action := range []string{
		"ec2:DescribeSubnets", "ec2:DescribeSecurityGroups", "ec2:CreateSecurityGroup", "ec2:RevokeSecurityGroupEgress",
		"ec2:AuthorizeSecurityGroupIngress", "ec2:AuthorizeSecurityGroupEgress", "ecs:RunTask", "ecs:DescribeTasks", "later",
	} {
		for _, kind := range []string{"memory", "folder"} {
			for _, isolate := range []bool{true, false} {
				if !isolate && strings.HasPrefix(action, "ec2:") {
					continue
				}
				name := fmt.Sprintf("%s, %s, isolate %v", action, kind, isolate)
				t.Run(name, func(t *testing.T) {
					forSeeds(t, seeds()/2, func(t *testing.T, w *world, rng *rand.Rand) {
						killGateway(t, w, rng, action, kind == "folder", isolate)
					})
				})
			}
		}
	}
}

func killGateway(t *testing.T, w *world, rng *rand.Rand, action string, onDisk, isolate bool) {
	configure := func(*Launcher) {}
	if isolate {
		configure = isolated
	}
	dying, kill := context.WithCancel(t.Context())
	defer kill()
	dir := t.TempDir()
	start := func(life context.Context) (gateway, func() error) {
		var ledger bastion.Ledger = &bastion.Memory{}
		end := func() error { return nil }
		if onDisk {
			folder, err := bastion.OpenFolder(dir, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			ledger, end = folder, folder.Close
		}
		g := w.dialer(mortalLedger{ledger, life}, configure)
		g.Profiles["default"] = bastion.Profile{Launcher: mortal{g.launcher, life}, Idle: time.Minute, MaxLife: time.Hour, StartTimeout: 5 * time.Minute}
		if err := g.Adopt(t.Context()); err != nil {
			t.Fatal(err)
		}
		return g, end
	}
	first, end := start(dying)
	last := 1
	switch action {
	case "ecs:DescribeTasks":
		last += rng.IntN(30)
	case "ec2:DescribeSecurityGroups":
		last += rng.IntN(2)
	}
	w.cloud.Set(func() {
		w.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
			if c.Action != action || c.N != last {
				return awsfake.Fault{}
			}
			kill()
			if rng.IntN(2) == 0 {
				return awsfake.Fault{LoseReply: true} // carried out
			}
			return awsfake.Fault{LoseReply: true, Status: http.StatusInternalServerError, Code: "InternalError"}
		}
	})
	go first.login(dying, "alice")
	select {
	case <-dying.Done():
	case <-time.After(time.Duration(rng.Int64N(int64(time.Minute)))):
		if action != "later" && action != "ecs:DescribeTasks" && w.calls(0)[action] == 0 {
			t.Errorf("no call of %s", action)
		}
		kill()
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	w.cloud.Set(func() { w.cloud.OnCall = nil })
	time.Sleep(time.Duration(rng.Int64N(int64(10 * time.Second))))
	second, end := start(t.Context())
	defer end()
	second.mustLogin(t, "alice")
	w.live("alice")
	if err := second.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	w.live("alice")
	if isolate {
		w.checkGroup(second, "alice")
	}
	first.Wait(t.Context())
}

// mortalLedger is the ledger of a process that ends.
type mortalLedger struct {
	bastion.Ledger
	life context.Context
}

func (m mortalLedger) Swap(ctx context.Context, owner bastion.Owner, old, new bastion.Entry) (bastion.Entry, error) {
	if m.life.Err() != nil {
		return bastion.Entry{}, errDead
	}
	return m.Ledger.Swap(ctx, owner, old, new)
}

// mortal is the launcher of a process that ends: from then on it does nothing.
type mortal struct {
	*Launcher
	life context.Context
}

var errDead = errors.New("this process is dead")

func (m mortal) Launch(ctx context.Context, l bastion.Launch) (bastion.Task, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.life, cancel)()
	task, err := m.Launcher.Launch(ctx, l)
	if m.life.Err() != nil {
		return bastion.Task{}, errDead
	}
	return task, err
}

func (m mortal) Stop(ctx context.Context, o bastion.Owner, id string) error {
	if m.life.Err() != nil {
		return errDead
	}
	return m.Launcher.Stop(ctx, o, id)
}

func (m mortal) Alive(ctx context.Context, o bastion.Owner, id string) error {
	if m.life.Err() != nil {
		return errDead
	}
	return m.Launcher.Alive(ctx, o, id)
}

// TestAgentKilled: who is in it is thrown out at once, and the next login gets
// another bastion, within seconds of ECS noticing it.
func TestAgentKilled(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		g := w.gateway(nil)
		conn, err := g.Dial(t.Context(), identity.Identity{User: "alice", Profile: "default", ConnID: "c1"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(conn.Reqs) // ends with the connection
		ended := make(chan struct{})
		go func() {
			for range conn.Chans {
			}
			close(ended)
		}()
		time.Sleep(time.Duration(rng.Int64N(int64(time.Hour))))
		select {
		case <-ended:
			t.Fatal("the connection has ended by itself")
		default:
		}
		killed := time.Now()
		w.agents.mu.Lock()
		victim := w.agents.containers[0]
		w.agents.mu.Unlock()
		victim.stop()
		<-ended
		if took := time.Since(killed); took > time.Second {
			t.Errorf("thrown out after %v", took)
		}
		notices := time.Duration(rng.Int64N(int64(20 * time.Second)))
		time.AfterFunc(notices, func() { victim.exit(137) })
		if task := g.mustLogin(t, "alice"); task.Generation != 2 {
			t.Errorf("generation %d", task.Generation)
		}
		w.live("alice")
	})
}

// TestStoppedFromOutside: by hand, by the retirement of a host, by Spot.
func TestStoppedFromOutside(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		g := w.gateway(nil)
		g.mustLogin(t, "alice")
		time.Sleep(time.Duration(rng.Int64N(int64(3 * time.Hour))))
		w.cloud.StopAll("SpotInterruption", "Your Spot Task was interrupted.")
		time.Sleep(time.Duration(rng.Int64N(int64(3 * time.Hour)))) // long after, ECS has forgotten it
		if task := g.mustLogin(t, "alice"); task.Generation != 2 {
			t.Errorf("generation %d", task.Generation)
		}
		w.live("alice")
	})
}

// TestNoAddress: the start is given up in time, and what was started is stopped.
func TestNoAddress(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		g := w.gateway(nil)
		w.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate { return awsfake.Fate{NoAddress: true} }
		began := time.Now()
		_, err := g.login(t.Context(), "alice")
		w.must(err, bastion.ErrTimeout)
		if took := time.Since(began); took > 6*time.Minute {
			t.Errorf("gave up after %v", took)
		}
		w.live()
		w.cloud.Set(func() { w.cloud.OnLaunch = nil })
		g.mustLogin(t, "alice")
		w.live("alice")
	})
}

// TestNobodyListens: as TestNoAddress, but the address is there.
func TestNobodyListens(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		g := w.gateway(nil)
		w.agents.set(func() { w.agents.boot = func() time.Duration { return time.Hour } })
		_, err := g.login(t.Context(), "alice")
		w.must(err, bastion.ErrTimeout)
		w.live()
	})
}

// TestWrongHostKey: something else has taken the bastion's address. Nobody is led
// to it, and the task is stopped.
func TestWrongHostKey(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		g := w.gateway(nil)
		g.mustLogin(t, "alice")
		other := testKey(t)
		w.agents.set(func() { w.agents.shows = func(string) ssh.Signer { return other } })
		_, err := g.login(t.Context(), "alice")
		w.must(err, bastion.ErrHostKey)
		w.live()
		w.agents.set(func() { w.agents.shows = nil })
		if task := g.mustLogin(t, "alice"); task.Generation != 2 {
			t.Errorf("generation %d", task.Generation)
		}
	})
}

// TestStaleList: a gateway that starts adopts what the listing shows, and what it
// does not show is found by its token.
func TestStaleList(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		w.cloud.ListLag = 3 * time.Second
		first := w.gateway(nil)
		ctx, cancel := context.WithCancel(t.Context())
		var task bastion.Task
		if rng.IntN(2) == 0 {
			task = first.mustLogin(t, "alice")
		} else {
			go first.login(ctx, "alice")
			time.Sleep(time.Duration(rng.Int64N(int64(5 * time.Second))))
		}
		second := w.gateway(nil)
		if got := second.mustLogin(t, "alice"); task.ID != "" && got.ID != task.ID {
			t.Errorf("got %s, want %s", got.ID, task.ID)
		}
		w.live("alice")
		cancel()
		first.Wait(t.Context())
	})
}

// TestRestart: a gateway that is restarted knows nothing of the generations that
// there were, and still starts one task.
func TestRestart(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		for range 1 + rng.IntN(5) {
			w.gateway(func(l *Launcher) {
				l.MaxSessions = rng.IntN(3) // another configuration each time
			}).mustLogin(t, "alice")
			w.live("alice")
			if rng.IntN(2) == 0 {
				w.cloud.StopAll("EssentialContainerExited", "Essential container in task exited")
			}
			time.Sleep(time.Duration(rng.Int64N(int64(40 * time.Minute))))
		}
		w.gateway(nil).mustLogin(t, "alice")
		w.live("alice")
	})
}

// TestRememberedFailure: ECS answers a token for which there was no room with the
// same failure for a day. A gateway with its ledger on disk does not ask again.
func TestRememberedFailure(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		dir := t.TempDir()
		open := func() (*bastion.Folder, gateway) {
			ledger, err := bastion.OpenFolder(dir, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			g := w.dialer(ledger, nil)
			if err := g.Adopt(t.Context()); err != nil {
				t.Fatal(err)
			}
			return ledger, g
		}
		ledger, g := open()
		w.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate { return awsfake.Fate{Failure: awsfake.NoCapacity} }
		_, err := g.login(t.Context(), "alice")
		w.must(err, bastion.ErrCapacity)
		ledger.Close()
		w.cloud.Set(func() { w.cloud.OnLaunch = nil })
		ledger, g = open()
		task := g.mustLogin(t, "alice")
		ledger.Close()
		time.Sleep(time.Duration(rng.Int64N(int64(time.Hour))))

		// Nor does it take another host key than before.
		ledger, g = open()
		defer ledger.Close()
		other := testKey(t)
		w.agents.set(func() { w.agents.shows = func(string) ssh.Signer { return other } })
		_, err = g.login(t.Context(), "alice")
		w.must(err, bastion.ErrHostKey)
		w.live()
		w.agents.set(func() { w.agents.shows = nil })
		if again := g.mustLogin(t, "alice"); again.Generation != task.Generation+1 {
			t.Errorf("generation %d after %d", again.Generation, task.Generation)
		}
	})
}

// TestClockSkew: the clocks of AWS, gateway and agent differ. AWS refuses signatures
// of another time, and the SDK learns the right one from the refusal. Agents
// take the gateway's certificates, which are good from a minute before they are
// made until two minutes after. No bastion is stopped before its time, or later.
func TestClockSkew(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		w.cloud.ClockOffset = time.Duration(rng.Int64N(int64(2*time.Hour))) - time.Hour
		w.agents.skew = time.Duration(rng.Int64N(int64(3*time.Minute-4*time.Second))) - time.Minute + 2*time.Second
		g := w.gateway(nil)
		g.mustLogin(t, "alice")
		g.launch(t, "bob")
		owner := bastion.Owner{User: "bob", Profile: "default"}
		if _, err := g.Ledger.Swap(t.Context(), owner, bastion.Entry{}, bastion.Entry{Generation: 2, State: bastion.Idle}); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		for _, step := range []struct {
			at   time.Duration
			live []string
		}{
			{5 * time.Second, []string{"alice", "bob"}},
			{9 * time.Minute, []string{"alice", "bob"}},
			{11 * time.Minute, []string{"alice"}},
			{12 * time.Hour, []string{"alice"}},
			{12*time.Hour + 17*time.Minute, nil},
		} {
			time.Sleep(time.Until(began.Add(step.at)))
			if err := g.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			w.live(step.live...)
		}
	})
}

// TestManyUsers: 200 users connect at once, and 20 launches a second are allowed.
func TestManyUsers(t *testing.T) {
	forSeeds(t, seeds()/4, func(t *testing.T, w *world, rng *rand.Rand) {
		w.cloud.Buckets = map[string]awsfake.Bucket{"launch": {Burst: 20, Rate: 20}, "modify": {Burst: 100, Rate: 40}, "read": {Burst: 100, Rate: 20}}
		g := w.gateway(nil)
		var users sync.WaitGroup
		var want []string
		for i := range 200 {
			want = append(want, user(i))
			users.Go(func() {
				if _, err := g.login(t.Context(), user(i)); err != nil {
					t.Error(err)
				}
			})
		}
		users.Wait()
		w.live(want...)
	})
}

// TestFullRegion: when there is no room, many users who wait do not ask as often,
// and all are told why.
func TestFullRegion(t *testing.T) {
	many := 300
	if raceEnabled {
		many = 100
	}
	forSeeds(t, seeds()/5, func(t *testing.T, w *world, rng *rand.Rand) {
		g := w.gateway(nil)
		w.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate { return awsfake.Fate{Failure: awsfake.NoCapacity} }
		began := time.Now()
		var users sync.WaitGroup
		for i := range many {
			users.Go(func() {
				for time.Since(began) < 10*time.Minute { // patient as people are
					_, err := g.login(t.Context(), user(i))
					if !errors.Is(err, bastion.ErrCapacity) {
						t.Errorf("%s: %v", user(i), err)
					}
					time.Sleep(20 * time.Second)
				}
			})
		}
		users.Wait()
		// What the buckets let through at once may be under way before the first
		// answer, and has a second attempt each; then it is now and then.
		if calls := w.calls(0)["ecs:RunTask"]; calls > 2*launchBurst+40 {
			t.Errorf("%d calls of RunTask in ten minutes", calls)
		} else {
			t.Logf("%d calls of RunTask for %d logins in ten minutes", calls, many*30)
		}
		// Room comes back, and all get in.
		w.cloud.Set(func() { w.cloud.OnLaunch = nil })
		for i := range many {
			users.Go(func() {
				for range 30 {
					if _, err := g.login(t.Context(), user(i)); err == nil {
						return
					}
					time.Sleep(20 * time.Second)
				}
				t.Errorf("%s did not get in again", user(i))
			})
		}
		users.Wait()
	})
}

// TestDenied: each permission that is missing ends in the same reason, at once.
func TestDenied(t *testing.T) {
	for _, action := range []string{"ecs:RunTask", "iam:PassRole", "ecs:TagResource", "ecs:DescribeTasks"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.end()
			g := w.gateway(nil)
			w.cloud.Deny(action, true)
			began := time.Now()
			_, err := g.login(t.Context(), "alice")
			w.must(err, bastion.ErrDenied)
			if !strings.Contains(err.Error(), action) {
				t.Errorf("%s: the operator is not told: %v", action, err)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("%s: took %v", action, took)
			}
			w.live()
			w.cloud.Deny(action, false)
			g.mustLogin(t, "alice")
		})
	}
}

// TestWrongConfiguration: what the profile names does not exist.
func TestWrongConfiguration(t *testing.T) {
	for name, change := range map[string]func(*Launcher){
		"task definition": func(l *Launcher) { l.TaskDefinition = "other:1" },
		"subnet":          func(l *Launcher) { l.Subnets = []string{"subnet-12345678"} },
		"security group":  func(l *Launcher) { l.SecurityGroups = []string{"sg-12345678"} },
		"container":       func(l *Launcher) { l.Container = "other" },
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.end()
			before := 0
			g := w.gateway(change)
			before = len(w.cloud.Calls())
			_, err := g.login(t.Context(), "alice")
			w.must(err, bastion.ErrConfig)
			if calls := w.calls(before); calls["ecs:RunTask"] != 1 {
				t.Errorf("%s: %v", name, calls)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.dialer(&bastion.Memory{}, func(l *Launcher) { l.Cluster = "other" })
		w.must(g.Adopt(t.Context()), bastion.ErrConfig)
		_, err := g.login(t.Context(), "alice")
		w.must(err, bastion.ErrConfig)
	})
}

// TestSweep: what a gateway left behind is stopped, what is in use is not.
func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.gateway(nil)
		g.mustLogin(t, "alice")
		// A task of bob's that the ledger takes for ended, as after a
		// gateway that was cut off from AWS.
		lost, err := g.launcher.Launch(t.Context(), bastion.Launch{Owner: bastion.Owner{User: "bob", Profile: "default"}, Generation: 1})
		if err != nil {
			t.Fatal(err)
		}
		owner := bastion.Owner{User: "bob", Profile: "default"}
		if _, err := g.Ledger.Swap(t.Context(), owner, bastion.Entry{}, bastion.Entry{Generation: 2, State: bastion.Idle}); err != nil {
			t.Fatal(err)
		}
		if err := g.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		w.live("alice", "bob")
		time.Sleep(11 * time.Minute)
		if err := g.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		w.live("alice")
		if err := g.launcher.Alive(t.Context(), owner, lost.ID); !errors.Is(err, bastion.ErrGone) {
			t.Errorf("the task of nobody: %v", err)
		}
		time.Sleep(12*time.Hour + 10*time.Minute) // the agents of this world do not end by themselves
		if err := g.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		w.live()
		if task := g.mustLogin(t, "alice"); task.Generation != 2 {
			t.Errorf("generation %d", task.Generation)
		}
	})
}

// TestGroups: a security group for each user is made once, used again, brought to
// its rules, and deleted an hour after its last use.
func TestGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		isolate := func(l *Launcher) {
			l.Isolate = &Isolation{Ingress: []string{awsfake.SecurityGroup, "10.9.0.0/16"}, Egress: []Rule{{"tcp", 443, 443, "0.0.0.0/0"}, {"-1", -1, -1, "fd00::/8"}}}
		}
		ledger := &bastion.Memory{} // as one that two gateways share
		g := w.dialer(ledger, isolate)
		before := len(w.cloud.Calls())
		g.mustLogin(t, "alice")
		if calls := w.calls(before); calls["ec2:CreateSecurityGroup"] != 1 {
			t.Errorf("first start: %v", calls)
		}
		w.cloud.StopAll("EssentialContainerExited", "")
		before = len(w.cloud.Calls())
		g.mustLogin(t, "alice")
		if calls := w.calls(before); len(calls) != 2 || calls["ecs:RunTask"] != 1 {
			t.Errorf("second start: %v", calls)
		}

		// Another gateway finds it, and changes its rules to what it was told.
		other := w.dialer(ledger, func(l *Launcher) {
			isolate(l)
			l.Isolate.Egress[0].Peer = "10.0.0.0/8"
		})
		w.cloud.StopAll("EssentialContainerExited", "")
		before = len(w.cloud.Calls())
		other.mustLogin(t, "alice")
		calls := w.calls(before)
		if calls["ec2:CreateSecurityGroup"] != 0 || calls["ec2:RevokeSecurityGroupEgress"] != 1 || calls["ec2:AuthorizeSecurityGroupEgress"] != 1 || calls["ec2:AuthorizeSecurityGroupIngress"] != 0 {
			t.Errorf("with another rule: %v", calls)
		}

		// In use, it stays; when its owner has had no bastion for an hour, and
		// its network interface is gone, it goes.
		sweep := func(groups int) {
			t.Helper()
			if err := other.launcher.Cloud.Sweep(t.Context(), other.launcher); err != nil {
				t.Error(err)
			}
			if left := w.groups(); len(left) != groups {
				t.Errorf("left: %v", left)
			}
		}
		sweep(1)
		time.Sleep(2 * time.Hour)
		sweep(1)
		w.cloud.Set(func() { w.cloud.Times.Deprovisioning = awsfake.Fixed(2 * time.Hour) }) // an interface that does not go
		w.cloud.StopAll("EssentialContainerExited", "")
		time.Sleep(10 * time.Second)
		sweep(1)
		time.Sleep(groupIdle)
		sweep(1) // DependencyViolation
		time.Sleep(2 * time.Hour)
		sweep(0)
		// A gateway that has it in mind still finds out.
		g.mustLogin(t, "alice")
		other.mustLogin(t, "alice")
		w.live("alice")
	})
}

// TestGroupFaults: all calls about groups fail now and then. Whenever a bastion
// runs, its group has the rules that are configured.
func TestGroupFaults(t *testing.T) {
	perSeed(t, func(t *testing.T, w *world, rng *rand.Rand) {
		w.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
			if !strings.HasPrefix(c.Action, "ec2:") {
				return awsfake.Fault{}
			}
			switch rng.IntN(3) {
			case 0:
				return awsfake.Fault{LoseReply: true}
			case 1:
				return awsfake.ThrottledEC2
			}
			return awsfake.Fault{}
		}
		g := w.gateway(isolated)
		for range 40 {
			if _, err := g.login(t.Context(), "alice"); err == nil {
				break
			}
			w.live()
		}
		w.cloud.Set(func() { w.cloud.OnCall = nil })
		g.mustLogin(t, "alice")
		w.checkGroup(g, "alice")
	})
}

// TestRulesFail: a group whose rules could not be made right is not used.
func TestRulesFail(t *testing.T) {
	for _, action := range []string{"RevokeSecurityGroupEgress", "AuthorizeSecurityGroupIngress", "AuthorizeSecurityGroupEgress"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.end()
			g := w.gateway(isolated)
			w.cloud.Deny("ec2:"+action, true)
			for range 3 {
				_, err := g.login(t.Context(), "alice")
				w.must(err, bastion.ErrDenied)
				w.live()
			}
			w.cloud.Deny("ec2:"+action, false)
			g.mustLogin(t, "alice")
			w.checkGroup(g, "alice")
		})
	}
}

// checkGroup fails unless the user has one security group, with the rules of the
// gateway's profile.
func (w *world) checkGroup(g gateway, user string) {
	w.t.Helper()
	out, err := g.launcher.Cloud.ec2.DescribeSecurityGroups(w.t.Context(), &ec2.DescribeSecurityGroupsInput{Filters: []ec2types.Filter{filter("tag:sallyport:user", user)}})
	if err != nil || len(out.SecurityGroups) != 1 {
		w.t.Fatalf("the groups of %s: %+v, %v", user, out, err)
	}
	var ingress []Rule
	for _, peer := range g.launcher.Isolate.Ingress {
		ingress = append(ingress, Rule{"tcp", agentPort, agentPort, peer})
	}
	group := out.SecurityGroups[0]
	if missing, extra := difference(ingress, rules(group.IpPermissions)); missing != nil || extra != nil {
		w.t.Errorf("ingress of %s: missing %v, too many %v", user, missing, extra)
	}
	if missing, extra := difference(g.launcher.Isolate.Egress, rules(group.IpPermissionsEgress)); missing != nil || extra != nil {
		w.t.Errorf("egress of %s: missing %v, too many %v", user, missing, extra)
	}
}

// TestPublicIP connects to the public address, at one call more.
func TestPublicIP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.dialer(&bastion.Memory{}, func(l *Launcher) { l.PublicIP = true })
		g.NetDial = w.agents.dialPublic
		before := len(w.cloud.Calls())
		task := g.mustLogin(t, "alice")
		if calls := w.calls(before); calls["ecs:RunTask"] != 1 || calls["ec2:DescribeNetworkInterfaces"] != 1 {
			t.Errorf("calls %v", calls)
		}
		if !strings.HasPrefix(task.Addr, "203.") {
			t.Errorf("address %s", task.Addr)
		}
		for i := range 150 { // more than one call may ask for
			if _, err := g.launcher.Launch(t.Context(), bastion.Launch{Owner: bastion.Owner{User: user(i), Profile: "default"}, Generation: 1}); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Minute) // until ECS says that they run
		before = len(w.cloud.Calls())
		all, err := g.launcher.List(t.Context())
		if err != nil || len(all) != 151 {
			t.Fatalf("listed %d, %v", len(all), err)
		}
		if calls := w.calls(before); calls["ecs:ListTasks"] != 2 || calls["ecs:DescribeTasks"] != 2 || calls["ec2:DescribeNetworkInterfaces"] != 2 {
			t.Errorf("calls for 151 tasks: %v", calls)
		}
		// An interface goes before its task is seen to stop.
		tasks, err := g.launcher.Cloud.list(t.Context(), g.launcher.Cluster)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range all[75:] {
			w.cloud.Stop(o.Task.ID, "EssentialContainerExited", "")
		}
		time.Sleep(time.Minute)
		addrs, err := g.launcher.addresses(t.Context(), tasks)
		if err != nil || len(addrs) != 75 {
			t.Errorf("%d addresses, %v; want those of 75", len(addrs), err)
		}
		for _, o := range all[:75] {
			if o.Task.Addr == "" || addrs[o.Task.ID] != o.Task.Addr {
				t.Errorf("%s: address %q, and then %q", o.Owner, o.Task.Addr, addrs[o.Task.ID])
			}
		}
		found, err := g.launcher.List(t.Context())
		if err != nil || len(found) != 75 || !slices.ContainsFunc(found, func(o bastion.OwnedTask) bool {
			return o.Owner.User == "alice" && o.Task.Addr == task.Addr && o.Task.Generation == 1
		}) {
			t.Errorf("listed %+v, %v", found, err)
		}
	})
}
