package fargate

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

// seeds is the number of runs of each test with random delays and faults.
func seeds() uint64 {
	if raceEnabled {
		return 10
	}
	return 20
}

// crowdSeeds is the number of seeds for tests with hundreds of users. It is smaller,
// because each run has hundreds of random delays.
func crowdSeeds() uint64 { return seeds() / 10 }

// safe is a random source for concurrent use.
type safe struct {
	mu     sync.Mutex
	source rand.Source
}

func (s *safe) Uint64() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.source.Uint64()
}

// perSeed runs a test in a synctest bubble for each seed, with random delays of the
// tasks' states.
func perSeed(t *testing.T, test func(t *testing.T, account *fakeAccount, rng *rand.Rand)) {
	t.Helper()
	forSeeds(t, seeds(), test)
}

func forSeeds(t *testing.T, n uint64, test func(t *testing.T, account *fakeAccount, rng *rand.Rand)) {
	t.Helper()
	for seed := range n {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				account := newFakeAccount(t)
				defer account.end()
				rng := rand.New(&safe{source: rand.NewPCG(seed, 1)})
				upTo := func(d time.Duration) func() time.Duration { return awsfake.Between(rng, 0, d) }
				account.cloud.Times = awsfake.Times{
					Provisioning: upTo(10 * time.Second), Pending: upTo(30 * time.Second), Activating: upTo(10 * time.Second),
					Reporting: upTo(5 * time.Second), Deprovisioning: upTo(30 * time.Second),
				}
				account.cloud.MissingFor = upTo(3 * time.Second)()
				account.agents.boot = upTo(3 * time.Second)
				test(t, account, rng)
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
