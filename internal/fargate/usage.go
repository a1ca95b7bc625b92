package fargate

import (
	"cmp"
	"strconv"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// usage returns what Fargate bills for a task: its size, from the beginning of the
// pull of its image until it has stopped (AWS Fargate Pricing). ECS reports both
// times only once they have passed.
func usage(t types.Task) bastion.Usage {
	cpu, memory := aws.ToString(t.Cpu), aws.ToString(t.Memory)
	storage := 0
	if t.EphemeralStorage != nil {
		storage = int(t.EphemeralStorage.SizeInGiB)
	}
	if o := t.Overrides; o != nil {
		cpu, memory = cmp.Or(aws.ToString(o.Cpu), cpu), cmp.Or(aws.ToString(o.Memory), memory)
		if o.EphemeralStorage != nil {
			storage = int(o.EphemeralStorage.SizeInGiB)
		}
	}
	u := bastion.Usage{
		Platform:         "fargate",
		Spot:             aws.ToString(t.CapacityProviderName) == "FARGATE_SPOT",
		CPU:              positive(cpu),
		Memory:           positive(memory),
		EphemeralStorage: storage,
		From:             aws.ToTime(t.PullStartedAt),
	}
	for _, a := range t.Attributes {
		if aws.ToString(a.Name) == "ecs.cpu-architecture" {
			u.Architecture = aws.ToString(a.Value)
		}
	}
	for _, at := range []*time.Time{t.StoppedAt, t.ExecutionStoppedAt} {
		if u.Until.IsZero() {
			u.Until = aws.ToTime(at)
		}
	}
	return u
}

// positive parses a number; zero if it is none.
func positive(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0
	}
	return max(n, 0)
}
