package fargate

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

func TestUsage(t *testing.T) {
	at := time.Date(2026, 11, 3, 9, 0, 0, 0, time.UTC)
	later := at.Add(time.Hour)
	arm := []types.Attribute{{Name: aws.String("ecs.cpu-architecture"), Value: aws.String("arm64")}}
	for _, tt := range []struct {
		name string
		task types.Task
		want bastion.Usage
	}{
		{"nothing known", types.Task{}, bastion.Usage{Platform: "fargate"}},
		{"task definition", types.Task{Cpu: aws.String("256"), Memory: aws.String("512"), Attributes: arm, CapacityProviderName: aws.String("FARGATE_SPOT")},
			bastion.Usage{Platform: "fargate", CPU: 256, Memory: 512, Architecture: "arm64", Spot: true}},
		{"overrides", types.Task{Cpu: aws.String("256"), Memory: aws.String("512"), EphemeralStorage: &types.EphemeralStorage{SizeInGiB: 21},
			Overrides: &types.TaskOverride{Cpu: aws.String("1024"), Memory: aws.String("2048"), EphemeralStorage: &types.EphemeralStorage{SizeInGiB: 40}}},
			bastion.Usage{Platform: "fargate", CPU: 1024, Memory: 2048, EphemeralStorage: 40}},
		{"other overrides", types.Task{Cpu: aws.String("256"), Memory: aws.String("512"), EphemeralStorage: &types.EphemeralStorage{SizeInGiB: 21}, Overrides: &types.TaskOverride{}},
			bastion.Usage{Platform: "fargate", CPU: 256, Memory: 512, EphemeralStorage: 21}},
		{"not a number", types.Task{Cpu: aws.String(".25 vCPU"), Memory: aws.String("-1")}, bastion.Usage{Platform: "fargate"}},
		{"still deprovisioning", types.Task{PullStartedAt: &at, ExecutionStoppedAt: &later}, bastion.Usage{Platform: "fargate", From: at, Until: later}},
		{"stopping, with its sessions", types.Task{PullStartedAt: &at, StoppingAt: &later}, bastion.Usage{Platform: "fargate", From: at}},
	} {
		if got := usage(tt.task); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

// TestUsageEvents: the events of a bastion have its size when it starts, and when it
// has ended the times between which Fargate bills it, within one sweep.
func TestUsageEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		var mu sync.Mutex
		var events []bastion.Event
		ledger := &bastion.Memory{}
		gateway := func() gateway {
			g := account.dialer(ledger, nil)
			g.Event = func(e bastion.Event) {
				mu.Lock()
				defer mu.Unlock()
				events = append(events, e)
			}
			return g
		}
		one, two := gateway(), gateway()
		sweep := func(wantKinds ...bastion.EventKind) {
			t.Helper()
			if err := one.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			if err := two.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			var kinds []bastion.EventKind
			for _, e := range events {
				kinds = append(kinds, e.Kind)
			}
			if !slices.Equal(kinds, wantKinds) {
				t.Fatalf("events %v, want %v", kinds, wantKinds)
			}
		}

		launched := time.Now()
		one.mustLogin(t, "alice")
		idleSince := time.Now()
		time.Sleep(time.Minute) // ECS lists it
		sweep(bastion.Launching, bastion.Started)
		size := bastion.Usage{Platform: "fargate", CPU: 256, Memory: 512, Architecture: "x86_64"}
		if e := events[1]; e.Task.Usage != size || e.MaxLife != 12*time.Hour {
			t.Errorf("started: %+v, maximum life %v", e.Task.Usage, e.MaxLife)
		}

		account.agents.idle()
		time.Sleep(2 * time.Minute)
		sweep(bastion.Launching, bastion.Started, bastion.Ended)
		ended := events[2].Task.Usage
		// The pull of the image begins 17 s after the launch.
		if from := ended.From.Sub(launched.Add(17 * time.Second)); from.Abs() > time.Second {
			t.Errorf("billed from %v after the pull", from)
		}
		if ended.Until.Before(idleSince.Add(time.Minute)) || ended.Until.After(time.Now()) {
			t.Errorf("billed until %v, the agent became idle at %v", ended.Until, idleSince)
		}
		ended.From, ended.Until = time.Time{}, time.Time{}
		if ended != size {
			t.Errorf("ended: %+v", ended)
		}
		sweep(bastion.Launching, bastion.Started, bastion.Ended)
	})
}
