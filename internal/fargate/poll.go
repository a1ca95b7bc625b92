package fargate

import (
	"cmp"
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
	// pollEvery is the time between two DescribeTasks of a cluster.
	pollEvery = time.Second
	// pollTimeout limits a DescribeTasks call.
	pollTimeout = 10 * time.Second
	// describeMax is the number of tasks that one call may name
	// (API_DescribeTasks).
	describeMax = 100

	// missingFor is how long ECS may not know a task that it has just started.
	missingFor = time.Minute
	// missingAnswers is the number of answers in a row by which any other task is
	// known to be gone. A task that another gateway has just launched is known to
	// ECS by then.
	missingAnswers = 5
)

// A poller describes the tasks of a cluster for all goroutines that ask, with one
// call a second for each hundred tasks.
type poller struct {
	ecs     *ecs.Client
	cluster string
	every   time.Duration // between two calls
	log     *slog.Logger

	mu       sync.Mutex
	asked    map[string][]chan<- answer // by ARN; for the next poll
	serving  bool                       // a goroutine runs serve
	last     time.Time                  // of the polls
	absences map[string]absence         // of missing tasks, by ARN
	launches map[string]time.Time       // of recently launched tasks, by ARN
}

// An answer is the result of a poll for one task.
type answer struct {
	task types.Task
	// missing says that ECS does not know the task, and gone that it will not
	// know it later either.
	missing, gone bool
	err           error
}

// An absence counts the answers in a row by which ECS does not know a task.
type absence struct {
	answers int
	last    time.Time
}

// expect enters a task that was just launched, which ECS may not know yet.
func (p *poller) expect(arn string) {
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

// poller returns the poller of a cluster.
func (c *Cloud) poller(cluster string) *poller {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.pollers[cluster]
	if p == nil {
		p = &poller{ecs: c.ecs, cluster: cluster, every: cmp.Or(c.pollEvery, pollEvery), log: c.Log, asked: map[string][]chan<- answer{}, absences: map[string]absence{}, launches: map[string]time.Time{}}
		c.pollers[cluster] = p
	}
	return p
}

// ask returns the answer of the next poll, which begins within a second.
func (p *poller) ask(ctx context.Context, arn string) (answer, error) {
	reply := make(chan answer, 1)
	p.mu.Lock()
	p.asked[arn] = append(p.asked[arn], reply)
	if !p.serving {
		p.serving = true
		// It ends when no task is asked for; each call in it has a timeout.
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

// serve polls until no task is asked for.
func (p *poller) serve() {
	for {
		p.mu.Lock()
		if len(p.asked) == 0 {
			p.serving = false
			p.mu.Unlock()
			return
		}
		wait := time.Until(p.last.Add(p.every))
		p.mu.Unlock()
		time.Sleep(wait)

		p.mu.Lock()
		asked := p.asked
		p.asked = map[string][]chan<- answer{}
		p.last = time.Now()
		p.mu.Unlock()
		p.poll(asked)
	}
}

// poll answers asked, which is by ARN.
func (p *poller) poll(asked map[string][]chan<- answer) {
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

// describe returns an answer for each ARN.
func (p *poller) describe(arns []string) map[string]answer {
	ctx, cancel := context.WithTimeout(context.Background(), pollTimeout)
	defer cancel()
	out, err := p.ecs.DescribeTasks(ctx, &ecs.DescribeTasksInput{Cluster: &p.cluster, Tasks: arns})
	answers := make(map[string]answer, len(arns))
	// An ARN of another cluster makes the whole call fail, so it is searched for
	// by bisection:
	// "Invalid identifier: Identifier is for cluster X. Your cluster is Y".
	if hasCode(err, "InvalidParameterException") && !throttled(err) {
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
		p.log.Warn("cannot describe tasks", "tasks", len(arns), "err", err)
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
			a.answers = 0 // these are not in a row
		}
		a.answers, a.last = a.answers+1, now
		p.absences[arn] = a
		gone := a.answers >= missingAnswers && now.Sub(p.launches[arn]) > missingFor
		answers[arn] = answer{missing: true, gone: gone}
	}
	for arn, a := range p.absences { // of tasks that are no longer asked for
		if now.Sub(a.last) > missingFor {
			delete(p.absences, arn)
		}
	}
	return answers
}
