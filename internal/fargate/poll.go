package fargate

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

const (
	// pollEvery is the time between two DescribeTasks.
	pollEvery = time.Second
	// pollTimeout bounds one of them.
	pollTimeout = 10 * time.Second
	// describeMax is how many tasks one of them may name (API_DescribeTasks).
	describeMax = 100
)

// A poller asks ECS about tasks, on behalf of all who want to know, with one
// call a second for each hundred tasks.
type poller struct {
	ecs     *ecs.Client
	cluster string
	log     *slog.Logger

	mu       sync.Mutex
	asked    map[string][]chan<- answer // by ARN; those of the next turn
	turning  bool                       // a goroutine serves them
	last     time.Time                  // turn
	absences map[string]absence         // of tasks that are missing
	launches map[string]time.Time       // when this process was told of tasks that are new
}

type answer struct {
	task types.Task
	// missing says that ECS does not know the task, and gone that it has not
	// for so long that it never will.
	missing, gone bool
	err           error
}

// An absence is how often in a row ECS has said that it does not know a task.
type absence struct {
	answers int
	last    time.Time
}

const (
	// missingFor is how long ECS may not know a task that it has just started.
	missingFor = time.Minute
	// missingAnswers is how many answers in a row say of any other task that
	// it is gone. One that another gateway has just launched is known by then.
	missingAnswers = 5
)

// launched takes note of a task that ECS may not know yet.
func (p *poller) launched(arn string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for old, at := range p.launches {
		if now.Sub(at) > missingFor {
			delete(p.launches, old)
		}
	}
	p.launches[arn] = now
}

// poller returns that of a cluster.
func (c *Cloud) poller(cluster string) *poller {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.pollers[cluster]
	if p == nil {
		p = &poller{ecs: c.ecs, cluster: cluster, log: c.Log, asked: map[string][]chan<- answer{}, absences: map[string]absence{}, launches: map[string]time.Time{}}
		c.pollers[cluster] = p
	}
	return p
}

// ask returns what ECS says of the task at the next turn, which begins within a
// second.
func (p *poller) ask(ctx context.Context, arn string) (answer, error) {
	reply := make(chan answer, 1)
	p.mu.Lock()
	p.asked[arn] = append(p.asked[arn], reply)
	if !p.turning {
		p.turning = true
		// It ends when nobody asks any more; each call in it is bounded.
		go p.serve()
	}
	p.mu.Unlock()
	select {
	case a := <-reply:
		return a, a.err
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	}
}

// serve takes turns until nobody asks.
func (p *poller) serve() {
	for {
		p.mu.Lock()
		if len(p.asked) == 0 {
			p.turning = false
			p.mu.Unlock()
			return
		}
		wait := time.Until(p.last.Add(pollEvery))
		p.mu.Unlock()
		time.Sleep(wait)

		p.mu.Lock()
		asked := p.asked
		p.asked = map[string][]chan<- answer{}
		p.last = time.Now()
		p.mu.Unlock()
		p.turn(asked)
	}
}

// turn answers those who have asked.
func (p *poller) turn(asked map[string][]chan<- answer) {
	var calls sync.WaitGroup
	for some := range slices.Chunk(slices.Sorted(maps.Keys(asked)), describeMax) {
		calls.Go(func() {
			for arn, a := range p.describe(some) {
				for _, reply := range asked[arn] {
					reply <- a
				}
			}
		})
	}
	calls.Wait()
}

// describe returns an answer for each of the tasks.
func (p *poller) describe(arns []string) map[string]answer {
	ctx, cancel := context.WithTimeout(context.Background(), pollTimeout)
	defer cancel()
	out, err := p.ecs.DescribeTasks(ctx, &ecs.DescribeTasksInput{Cluster: &p.cluster, Tasks: arns})
	answers := make(map[string]answer, len(arns))
	// One that ECS takes for no task of the cluster spoils the answer for all:
	// "Invalid identifier: Identifier is for cluster X. Your cluster is Y".
	if hasCode(err, "InvalidParameterException") {
		if len(arns) == 1 {
			answers[arns[0]] = answer{err: fmt.Errorf("task %s: %w: DescribeTasks in cluster %s: %w", arns[0], bastion.ErrGone, p.cluster, err)}
			return answers
		}
		half := len(arns) / 2
		answers = p.describe(arns[:half])
		maps.Copy(answers, p.describe(arns[half:]))
		return answers
	}
	if err != nil {
		err = fmt.Errorf("DescribeTasks in cluster %s: %w", p.cluster, classify(err))
		p.log.Warn("cannot tell how bastions are", "tasks", len(arns), "err", err)
		for _, arn := range arns {
			answers[arn] = answer{err: err}
		}
		return answers
	}
	for _, task := range out.Tasks {
		answers[aws.ToString(task.TaskArn)] = answer{task: task}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for _, arn := range arns {
		if _, ok := answers[arn]; ok {
			delete(p.absences, arn)
			continue
		}
		a := p.absences[arn]
		if now.Sub(a.last) > missingFor {
			a.answers = 0 // that was about another time
		}
		a.answers, a.last = a.answers+1, now
		p.absences[arn] = a
		gone := a.answers >= missingAnswers && now.Sub(p.launches[arn]) > missingFor
		answers[arn] = answer{missing: true, gone: gone}
	}
	for arn, a := range p.absences { // nobody asks for these any more
		if now.Sub(a.last) > missingFor {
			delete(p.absences, arn)
		}
	}
	return answers
}
