package fargate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// TestGatewayKilled kills the gateway during each call of a launch, with the call
// carried out or not. Its successor continues the same launch, with one task.
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
					forSeeds(t, seeds()/2, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
						killGateway(t, account, rng, action, kind == "folder", isolate)
					})
				})
			}
		}
	}
}

func killGateway(t *testing.T, account *fakeAccount, rng *rand.Rand, action string, onDisk, isolate bool) {
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
		g := account.dialer(mortalLedger{ledger, life}, configure)
		g.Profiles["default"] = bastion.Profile{Launcher: mortal{g.launcher, life}, ProfileOptions: bastion.ProfileOptions{Idle: time.Minute, MaxLife: time.Hour, StartTimeout: 5 * time.Minute}}
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
	account.cloud.Set(func() {
		account.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
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
		if action != "later" && action != "ecs:DescribeTasks" && account.calls(0)[action] == 0 {
			t.Errorf("no call of %s", action)
		}
		kill()
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	account.cloud.Set(func() { account.cloud.OnCall = nil })
	time.Sleep(time.Duration(rng.Int64N(int64(10 * time.Second))))
	second, end := start(t.Context())
	defer end()
	second.mustLogin(t, "alice")
	account.live("alice")
	if err := second.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	account.live("alice")
	if isolate {
		account.checkGroup(second, "alice")
	}
	first.Wait(t.Context())
}

// mortalLedger is the ledger of a gateway that is killed when life ends: from then
// on, Swap fails.
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

// mortal is the launcher of a gateway that is killed when life ends: from then on,
// each call fails.
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

// TestAgentKilled: if an agent is killed, its connections close at once. The next
// login starts another bastion, within seconds after ECS reports the task as stopped.
func TestAgentKilled(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		g := account.gateway(nil)
		conn, err := g.Dial(t.Context(), identity.Identity{User: "alice", Profile: "default", ConnID: "c1"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			for {
				if _, err := conn.ReadPacket(); err != nil {
					break
				}
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
		account.agents.mu.Lock()
		victim := account.agents.containers[0]
		account.agents.mu.Unlock()
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
		account.live("alice")
	})
}
