package fargate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// Alive implements [bastion.Launcher].
func (l *Launcher) Alive(ctx context.Context, _ bastion.Owner, taskID string) error {
	task, err := l.find(ctx, taskID)
	if err != nil {
		return err
	}
	if !alive(task) {
		return &bastion.GoneError{TaskID: taskID, Why: stopReason(task), Usage: usage(task)}
	}
	return nil
}

// alive reports whether a task runs or is being started. A task that was told to
// stop may take two minutes to do so; it is not alive.
func alive(t types.Task) bool {
	switch aws.ToString(t.LastStatus) {
	case "DEACTIVATING", "STOPPING", "DEPROVISIONING", "STOPPED", "DELETED":
		return false
	}
	return aws.ToString(t.DesiredStatus) != "STOPPED"
}

// describe returns the task from the poller's next poll. The error wraps errMissing
// if ECS does not know the task, and also ErrGone if the task cannot have been
// launched just now.
func (l *Launcher) describe(ctx context.Context, arn string) (types.Task, error) {
	// The ledger may have a task from an earlier configuration.
	if cluster := clusterOf(arn); cluster != "" && cluster != shortName(l.Cluster) {
		return types.Task{}, fmt.Errorf("task %s: %w: it is in another cluster than %s", arn, bastion.ErrGone, l.Cluster)
	}
	a, err := l.Cloud.poller(l.Cluster).ask(ctx, arn)
	switch {
	case err != nil:
		return types.Task{}, err
	case a.missing && a.gone:
		return types.Task{}, fmt.Errorf("task %s: %w: %w", arn, errMissing, bastion.ErrGone)
	case a.missing:
		return types.Task{}, fmt.Errorf("task %s: %w", arn, errMissing)
	}
	return a.task, nil
}

var errMissing = errors.New("ECS does not know it")

// find repeats describe until ECS knows the task, or the task is gone.
func (l *Launcher) find(ctx context.Context, arn string) (types.Task, error) {
	for {
		task, err := l.describe(ctx, arn)
		if !errors.Is(err, errMissing) || errors.Is(err, bastion.ErrGone) {
			return task, err
		}
	}
}

// Stop implements [bastion.Launcher]. For about a second after RunTask, ECS may
// answer that there is no such task; so Stop repeats the call until the task is
// known to be gone.
func (l *Launcher) Stop(ctx context.Context, _ bastion.Owner, taskID string) error {
	cluster := cmp.Or(clusterOf(taskID), l.Cluster) // the task may be from an earlier configuration
	for try := 1; ; try++ {
		_, err := l.Cloud.ecs.StopTask(ctx, &ecs.StopTaskInput{
			Cluster: &cluster,
			Task:    &taskID,
			Reason:  aws.String("stopped by sallyport"),
		})
		if err == nil {
			l.Cloud.invalidateListing(l.Cluster)
			return nil
		}
		if hasCode(err, "ClusterNotFoundException") && cluster != l.Cluster {
			return nil // a cluster can be deleted once it has no tasks
		}
		if !notFound(err) {
			return fmt.Errorf("StopTask %s: %w", taskID, classify(err))
		}
		switch task, err := l.describe(ctx, taskID); {
		case errors.Is(err, bastion.ErrGone), err == nil && !alive(task):
			return nil
		case err != nil && !errors.Is(err, errMissing) && try >= missingAnswers:
			return fmt.Errorf("StopTask %s: %w; describing it: %w", taskID, errMissing, err)
		}
	}
}

// List implements [bastion.Launcher]. It returns the tasks of all profiles in the
// cluster, of other profiles without addresses. ECS may be some seconds late.
func (l *Launcher) List(ctx context.Context) ([]bastion.OwnedTask, error) {
	tasks, err := l.Cloud.list(ctx, l.Cluster)
	var own []types.Task
	for _, task := range tasks {
		if alive(task) && environment(task, envProfile) == l.Profile {
			own = append(own, task)
		}
	}
	addrs, addrErr := l.addresses(ctx, own)
	err = errors.Join(err, addrErr)
	var found []bastion.OwnedTask
	for _, task := range tasks {
		owner := bastion.Owner{User: environment(task, envOwner), Profile: environment(task, envProfile)}
		generation, genErr := strconv.ParseInt(environment(task, envGeneration), 10, 64)
		if !alive(task) || owner.User == "" || owner.Profile == "" || environment(task, envPrincipal) == "" || genErr != nil {
			continue // it has ended, or is not a bastion although its startedBy says so
		}
		life, _ := time.ParseDuration(environment(task, envMaxLife))
		arn := aws.ToString(task.TaskArn)
		if aws.ToString(task.LastStatus) != "RUNNING" {
			// A task has an address some seconds before its agent listens. Until
			// then it is being started.
			delete(addrs, arn)
		}
		found = append(found, bastion.OwnedTask{
			Owner:   owner,
			Task:    bastion.Task{ID: arn, Principal: environment(task, envPrincipal), Generation: generation, Addr: addrs[arn], Usage: usage(task)},
			Started: aws.ToTime(task.CreatedAt),
			MaxLife: life,
		})
	}
	return found, err
}

// A listing holds the tasks of a cluster at some moment.
type listing struct {
	at    time.Time
	tasks []types.Task
}

// listingLifetime is how long list returns a listing again: long enough for all
// profiles of a gateway, which list their tasks one after the other. ECS itself may
// be later than that.
const listingLifetime = time.Second

// invalidateListing makes the next list ask ECS, since this process has started or
// stopped a task.
func (c *Cloud) invalidateListing(cluster string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.listings, cluster)
}

// list returns the tasks of this deployment whose desired status is RUNNING, with
// CreatedAt by the clock of this machine.
func (c *Cloud) list(ctx context.Context, cluster string) ([]types.Task, error) {
	c.mu.Lock()
	last := c.listings[cluster]
	c.mu.Unlock()
	if time.Since(last.at) < listingLifetime {
		return slices.Clone(last.tasks), nil
	}
	seen := map[string]bool{}
	var arns []string
	// ListTasks takes no other filter together with startedBy. Its default
	// desired status is RUNNING.
	pages := ecs.NewListTasksPaginator(c.ecs, &ecs.ListTasksInput{Cluster: &cluster, StartedBy: aws.String(c.startedBy())})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, fmt.Errorf("ListTasks in cluster %s: %w", cluster, classify(err))
		}
		for _, arn := range page.TaskArns {
			if !seen[arn] {
				seen[arn] = true
				arns = append(arns, arn)
			}
		}
	}
	var tasks []types.Task
	for some := range slices.Chunk(arns, describeMax) {
		out, err := c.ecs.DescribeTasks(ctx, &ecs.DescribeTasksInput{Cluster: &cluster, Tasks: some})
		if err != nil {
			return tasks, fmt.Errorf("DescribeTasks in cluster %s: %w", cluster, classify(err))
		}
		// The difference between AWS's clock and this one may exceed the grace
		// that Sweep gives to a bastion.
		var ahead time.Duration
		if there, ok := awsmiddleware.GetServerTime(out.ResultMetadata); ok {
			ahead = time.Since(there)
		}
		for _, task := range out.Tasks {
			if task.CreatedAt != nil {
				task.CreatedAt = aws.Time(task.CreatedAt.Add(ahead))
			}
			tasks = append(tasks, task)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.listings[cluster] = listing{time.Now(), tasks}
	return slices.Clone(tasks), nil
}
