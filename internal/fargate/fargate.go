// Package fargate runs bastions as AWS Fargate tasks. It implements
// [bastion.Launcher].
//
// A bastion is one ECS task with one essential container, so the task ends when
// the agent in it exits. What the agent has to know (whose it is, which fleet's
// certificates open it, its clocks) are environment variables in the overrides of
// RunTask. Everybody who may call DescribeTasks can read them, and none is secret.
//
// # One task per generation
//
// The client token of a RunTask is made of cluster, deployment, owner and
// generation, and its other parameters depend on the configuration only, and on
// whether this is the second attempt of a start, which does not ask for Spot. So
// whoever launches a generation, however often, is given the same task; if the
// parameters differ, ECS refuses with a conflict that names it. ECS remembers a
// token for an hour after its task has ended, and at most for 24 hours ("Ensuring
// idempotency", Amazon ECS API Reference). It remembers failures too. So a generation that has failed is used up, and [bastion.ErrGone] says so.
//
// # How few calls
//
// A start is one RunTask. All tasks that this process waits for share one
// DescribeTasks a second for each hundred of them. A bastion that runs is connected
// to without asking anybody.
//
// # What goes wrong
//
// ECS reports failure in three ways: an error, a list of failures in a successful
// answer, and a task that stops before it has run. Each ends in one of the
// reasons that package bastion has; see errors.go.
package fargate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go/middleware"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

const (
	// agentPort is where bastion-agent listens if it is told nothing else.
	agentPort = 2022

	// maxReplays bounds how many generations of one owner may have ended in
	// the time that ECS remembers them.
	maxReplays = 200
)

// A Cloud is what the launchers of one gateway share: its way to AWS, and how
// fast it goes. [NewCloud] makes one. It is safe for concurrent use.
type Cloud struct {
	// Log must be set before first use, if at all.
	Log *slog.Logger

	deployment string
	fleetKey   ssh.PublicKey
	ecs        *ecs.Client
	run        *ecs.Client // for RunTask
	ec2        *ec2.Client
	sts        *sts.Client
	pace       *pace

	mu       sync.Mutex
	pollers  map[string]*poller // by cluster
	listings map[string]listing // by cluster
	groups   groups
}

// Load finds the Region and the credentials as all AWS tools do: environment,
// shared files, the role of the task or instance that this runs in. Credentials
// are not asked for before they are needed.
func Load(ctx context.Context) (aws.Config, error) {
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return aws.Config{}, fmt.Errorf("finding the way to AWS: %w", err)
	}
	if cfg.Region == "" {
		return aws.Config{}, errors.New("no AWS Region is configured; set AWS_REGION")
	}
	return cfg, nil
}

// NewCloud returns a Cloud that uses cfg; see [Load]. The deployment tells two
// installations in one account apart: letters, digits, "-" and "_". Agents accept
// the certificates of the CA whose public key is fleetKey.
func NewCloud(cfg aws.Config, deployment string, fleetKey ssh.PublicKey) *Cloud {
	cfg.Retryer = func() aws.Retryer {
		return retry.NewStandard(func(o *retry.StandardOptions) {
			// By default a client that has seen many failures stops
			// repeating. Ours are spread over time by other means.
			o.RateLimiter = ratelimit.None
		})
	}
	cfg.APIOptions = append(slices.Clip(cfg.APIOptions), boundAttempts)
	// RunTask has a pace of its own, which has to hear of each refusal.
	run := cfg.Copy()
	run.Retryer = func() aws.Retryer {
		return retry.NewStandard(func(o *retry.StandardOptions) {
			o.RateLimiter = ratelimit.None
			o.Retryables = append([]retry.IsErrorRetryable{retry.IsErrorRetryableFunc(func(err error) aws.Ternary {
				if throttled(err) {
					return aws.FalseTernary
				}
				return aws.UnknownTernary
			})}, retry.DefaultRetryables...)
		})
	}
	return &Cloud{
		Log:        slog.New(slog.DiscardHandler),
		deployment: deployment,
		fleetKey:   fleetKey,
		ecs:        ecs.NewFromConfig(cfg),
		run:        ecs.NewFromConfig(run),
		ec2:        ec2.NewFromConfig(cfg),
		sts:        sts.NewFromConfig(cfg),
		pace:       newPace(),
		pollers:    map[string]*poller{},
		listings:   map[string]listing{},
	}
}

// attemptTimeout bounds each attempt of a call. AWS answers within a second or two,
// and what it does not answer is best asked again: all calls may be repeated.
const attemptTimeout = 10 * time.Second

// boundAttempts has the attempts of a call end after attemptTimeout. The SDK bounds
// nothing but the time to connect, and would wait for an answer for as long as
// the context allows.
func boundAttempts(stack *middleware.Stack) error {
	return stack.Finalize.Insert(middleware.FinalizeMiddlewareFunc("BoundAttempts",
		func(ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler) (middleware.FinalizeOutput, middleware.Metadata, error) {
			bounded, cancel := context.WithTimeout(ctx, attemptTimeout)
			defer cancel()
			out, metadata, err := next.HandleFinalize(bounded, in)
			if err != nil && bounded.Err() != nil && ctx.Err() == nil {
				err = errNoAnswer{}
			}
			return out, metadata, err
		}), "Retry", middleware.After)
}

// errNoAnswer is an error that the SDK's retryer takes for a timeout of the network.
type errNoAnswer struct{}

func (errNoAnswer) Error() string { return fmt.Sprintf("no answer within %v", attemptTimeout) }
func (errNoAnswer) Timeout() bool { return true }

// A Launcher runs the bastions of one profile. Set the fields before first use.
type Launcher struct {
	Cloud *Cloud
	// Profile is the name of the profile.
	Profile string

	// Cluster is the name or ARN of the ECS cluster.
	Cluster string
	// TaskDefinition is "family:revision" or its ARN. It should have a
	// revision: without one, the next to be registered is used at once.
	TaskDefinition string
	// Container is the name of the container in it that runs the agent.
	Container string
	// Account is the account in the image that sessions run as.
	Account string
	// Subnets is where bastions may be, at most 16, best in several zones.
	// Each generation of a bastion is asked for in the next one, so that no
	// room in one zone is followed by an attempt in another, if neighbours in
	// the list are in different zones.
	Subnets []string
	// SecurityGroups is what every bastion belongs to, at most five; none
	// means the default group of the VPC. With Isolate at most four.
	SecurityGroups []string
	// PublicIP gives each bastion a public address, and connects to that.
	PublicIP bool
	// Spot asks for Fargate Spot first, and for on-demand when there is none.
	Spot bool
	// CPU (units of 1/1024 vCPU), Memory (MiB), EphemeralStorage (GiB) and
	// TaskRole (an ARN) replace what the task definition says; zero values
	// leave it.
	CPU, Memory, EphemeralStorage int
	TaskRole                      string
	// PlatformVersion is of Fargate; empty means LATEST.
	PlatformVersion string
	// Isolate, if not nil, gives each owner a security group of her own.
	Isolate *Isolation
	// AcceptEnv are patterns of the environment variables clients may set;
	// empty means none.
	AcceptEnv []string
	// MaxSessions is how many sessions one connection may have open; zero
	// leaves it to the agent.
	MaxSessions int

	breaker breaker
	vpc     vpc // of the subnets; for Isolate
}

// Launch implements [bastion.Launcher]. It returns as soon as the task has an
// address; the agent listens there some seconds later.
//
// A gateway that was restarted begins to count generations anew. So if ECS
// answers with a task that had ended before the call, the next generation is
// launched instead, as long as it takes.
func (l *Launcher) Launch(ctx context.Context, want bastion.Launch) (bastion.Task, error) {
	renewed := false
	// The second attempt of a start that was admitted is its fallback.
	admitted := want.Attempt > 0
	for range maxReplays {
		group, release, err := l.group(ctx, want.Owner)
		if err != nil {
			return bastion.Task{Generation: want.Generation}, err
		}
		task, err := l.launch(ctx, want, group, &admitted)
		release()
		switch {
		case errors.Is(err, errReplayed):
			want.Generation++
			continue
		case group != "" && !renewed && errors.Is(err, bastion.ErrConfig) && strings.Contains(err.Error(), group):
			// Another gateway, or a person, has deleted it.
			renewed = true
			l.forgetGroup(want.Owner)
			continue
		case admitted && l.spot(want) && errors.Is(err, bastion.ErrQuota):
			// Spot's vCPU quota is another than on-demand's ("AWS Fargate
			// service quotas", Amazon ECS Developer Guide). The breaker, which
			// does not admit, speaks of the latter.
			l.Cloud.Log.Warn("the quota of Spot is used up; trying on demand", "owner", want.Owner, "generation", want.Generation, "err", err)
			want.Attempt++
			if errors.Is(err, bastion.ErrGone) {
				want.Generation++
			}
			continue
		}
		return task, err
	}
	return bastion.Task{Generation: want.Generation}, fmt.Errorf("%d bastions of %s have ended within the hours that ECS remembers them", maxReplays, want.Owner)
}

// launch is Launch for one generation, which the task has also if it comes with an
// error. The error is errReplayed if the generation's task had ended before.
func (l *Launcher) launch(ctx context.Context, want bastion.Launch, group string, admitted *bool) (bastion.Task, error) {
	in := l.request(want, group)
	started, err := l.runTask(ctx, in, admitted)
	if err == nil && !alive(started) {
		err = errReplayed
	}
	if err != nil {
		return bastion.Task{Generation: want.Generation}, err
	}
	task, err := l.awaitAddress(ctx, aws.ToString(started.TaskArn))
	task.Generation = want.Generation
	task.Principal = l.token(want.Owner, want.Generation)
	l.record(in, err)
	return task, err
}

// errReplayed says that RunTask answered with what became of the same request
// long ago.
var errReplayed = errors.New("the task of this generation has ended before")

// runTask sends the request until it is answered or ctx ends.
func (l *Launcher) runTask(ctx context.Context, in *ecs.RunTaskInput, admitted *bool) (types.Task, error) {
	var last error
	for retry := 1; ; retry++ {
		if err := l.turn(ctx, admitted); err != nil {
			return types.Task{}, errors.Join(err, last)
		}
		out, err := l.Cloud.run.RunTask(ctx, in)
		l.Cloud.pace.record(err)
		switch {
		case err == nil && len(out.Tasks) > 0:
			l.Cloud.poller(l.Cluster).launched(aws.ToString(out.Tasks[0].TaskArn))
			l.Cloud.outdate(l.Cluster)
			return out.Tasks[0], nil
		case err == nil:
			// ECS remembers this answer, so the generation is used up.
			err := failure(out.Failures)
			l.record(in, err)
			return types.Task{}, fmt.Errorf("RunTask in cluster %s, subnets %v: %w: %w", l.Cluster, subnets(in), bastion.ErrGone, err)
		}
		if ids, ok := conflict(err); ok {
			return l.existing(ctx, in, ids)
		}
		if !transient(err) {
			err = classify(err)
			l.record(in, err)
			return types.Task{}, fmt.Errorf("RunTask in cluster %s: %w", l.Cluster, err)
		}
		last = fmt.Errorf("RunTask in cluster %s: %w", l.Cluster, classify(err))
		// The token makes repeating it harmless, even if it was carried out.
		if sleep(ctx, backoff(retry)) != nil {
			return types.Task{}, last
		}
	}
}

// turn blocks until RunTask may be called. A launch asks the breaker once, when it
// has come to the head of the queue: while it queued, others may have learned that
// there is no room, and one that is turned away uses up no turn.
func (l *Launcher) turn(ctx context.Context, admitted *bool) error {
	if !*admitted {
		leave, err := l.Cloud.pace.enqueue(ctx)
		if err != nil {
			return fmt.Errorf("%w: %w", bastion.ErrBusy, err)
		}
		defer leave()
		if err := l.breaker.admit(l.Subnets); err != nil {
			return err
		}
		*admitted = true
	}
	if err := l.Cloud.pace.wait(ctx); err != nil {
		return fmt.Errorf("%w: %w", bastion.ErrBusy, err)
	}
	return nil
}

// record tells the breaker how the request ended.
func (l *Launcher) record(in *ecs.RunTaskInput, err error) {
	l.breaker.record(l.Subnets, subnets(in)[0], len(in.CapacityProviderStrategy) > 0, err)
}

// existing returns the task that an earlier request with the same token, but
// other parameters, has started: by a gateway with another configuration, or
// when this one had another.
func (l *Launcher) existing(ctx context.Context, in *ecs.RunTaskInput, arns []string) (types.Task, error) {
	if len(arns) == 0 { // it failed
		return types.Task{}, errReplayed
	}
	l.Cloud.poller(l.Cluster).launched(arns[0])
	task, err := l.find(ctx, arns[0])
	switch {
	case errors.Is(err, bastion.ErrGone):
		return types.Task{}, errReplayed
	case err != nil:
		return types.Task{}, fmt.Errorf("asking for the task that was started with other parameters: %w", err)
	case environment(task, envPrincipal) != aws.ToString(in.ClientToken):
		return types.Task{}, fmt.Errorf("%w: the client token of this generation belongs to task %s, which is none of ours", bastion.ErrConfig, arns[0])
	case !alive(task):
		return types.Task{}, errReplayed
	}
	return task, nil
}

// awaitAddress returns when the task has an address. The task that comes with an
// error has its ID only.
func (l *Launcher) awaitAddress(ctx context.Context, arn string) (bastion.Task, error) {
	unknown := bastion.Task{ID: arn}
	for {
		task, err := l.describe(ctx, arn)
		switch {
		case ctx.Err() != nil:
			return unknown, fmt.Errorf("waiting for the address of task %s: %w", arn, context.Cause(ctx))
		case errors.Is(err, bastion.ErrGone), errors.Is(err, bastion.ErrDenied):
			return unknown, err
		case err != nil:
			continue // the poller has logged it, and sets the pace
		case !alive(task):
			return unknown, fmt.Errorf("task %s: %w: %w", arn, bastion.ErrGone, stopped(task))
		}
		addrs, err := l.addresses(ctx, []types.Task{task})
		switch addr := addrs[arn]; {
		case addr != "":
			return bastion.Task{ID: arn, Addr: addr}, nil
		case errors.Is(err, bastion.ErrDenied):
			return unknown, err
		case err != nil:
			l.Cloud.Log.Warn("cannot tell the address of a bastion", "task", arn, "err", err)
		}
	}
}

// addresses returns where the agents of those tasks that have an address will
// listen, by the task's ARN.
func (l *Launcher) addresses(ctx context.Context, tasks []types.Task) (map[string]string, error) {
	addrs := map[string]string{}
	interfaces := map[string]string{} // ARN by interface
	for _, task := range tasks {
		arn := aws.ToString(task.TaskArn)
		v4, v6, eni := attachment(task)
		switch host := cmp.Or(v4, v6); {
		case l.PublicIP && eni != "":
			interfaces[eni] = arn
		case !l.PublicIP && host != "":
			addrs[arn] = net.JoinHostPort(host, strconv.Itoa(agentPort))
		}
	}
	for some := range slices.Chunk(slices.Sorted(maps.Keys(interfaces)), describeMax) {
		// By the parameter NetworkInterfaceIds, one that is gone would be an
		// error for all; a filter passes over it.
		out, err := l.Cloud.ec2.DescribeNetworkInterfaces(ctx, &ec2.DescribeNetworkInterfacesInput{
			Filters: []ec2types.Filter{{Name: aws.String("network-interface-id"), Values: some}},
		})
		if err != nil {
			return addrs, fmt.Errorf("DescribeNetworkInterfaces: %w", classify(err))
		}
		for _, i := range out.NetworkInterfaces {
			if i.Association != nil && aws.ToString(i.Association.PublicIp) != "" {
				addrs[interfaces[aws.ToString(i.NetworkInterfaceId)]] = net.JoinHostPort(*i.Association.PublicIp, strconv.Itoa(agentPort))
			}
		}
	}
	return addrs, nil
}

// attachment returns what is known of a task's network interface.
func attachment(task types.Task) (v4, v6, eni string) {
	for _, a := range task.Attachments {
		// Events call the type "eni".
		if t := aws.ToString(a.Type); t != "ElasticNetworkInterface" && t != "eni" {
			continue
		}
		for _, detail := range a.Details {
			switch aws.ToString(detail.Name) {
			case "privateIPv4Address":
				v4 = aws.ToString(detail.Value)
			case "privateIPv6Address":
				v6 = aws.ToString(detail.Value)
			case "networkInterfaceId":
				eni = aws.ToString(detail.Value)
			}
		}
	}
	return v4, v6, eni
}

// Alive implements [bastion.Launcher].
func (l *Launcher) Alive(ctx context.Context, _ bastion.Owner, taskID string) error {
	task, err := l.find(ctx, taskID)
	if err != nil {
		return err
	}
	if !alive(task) {
		return fmt.Errorf("task %s: %w: %w", taskID, bastion.ErrGone, stopped(task))
	}
	return nil
}

// alive reports whether a task is meant to run. One that was told to stop may
// still be doing so for two minutes.
func alive(t types.Task) bool {
	switch aws.ToString(t.LastStatus) {
	case "DEACTIVATING", "STOPPING", "DEPROVISIONING", "STOPPED", "DELETED":
		return false
	}
	return aws.ToString(t.DesiredStatus) != "STOPPED"
}

// describe returns the task as ECS sees it, at the next turn of the poller. The
// error wraps errMissing if ECS does not know it, and ErrGone, too, once it can be
// sure to be none that was just launched.
func (l *Launcher) describe(ctx context.Context, arn string) (types.Task, error) {
	// The configuration named another cluster once.
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

// find is describe until ECS knows the task, or is sure not to.
func (l *Launcher) find(ctx context.Context, arn string) (types.Task, error) {
	for {
		task, err := l.describe(ctx, arn)
		if !errors.Is(err, errMissing) || errors.Is(err, bastion.ErrGone) {
			return task, err
		}
	}
}

// Stop implements [bastion.Launcher]. For a second or so after RunTask, ECS may say
// that there is no such task; so it has to say so for as long as it takes to be
// sure.
func (l *Launcher) Stop(ctx context.Context, _ bastion.Owner, taskID string) error {
	cluster := cmp.Or(clusterOf(taskID), l.Cluster) // it may be in one that the configuration named before
	for try := 1; ; try++ {
		_, err := l.Cloud.ecs.StopTask(ctx, &ecs.StopTaskInput{
			Cluster: &cluster,
			Task:    &taskID,
			Reason:  aws.String("stopped by sallyport"),
		})
		if err == nil {
			l.Cloud.outdate(l.Cluster)
			return nil
		}
		if hasCode(err, "ClusterNotFoundException") && cluster != l.Cluster {
			return nil // it was deleted, which it can be once no task is in it
		}
		if !notFound(err) {
			return fmt.Errorf("StopTask %s: %w", taskID, classify(err))
		}
		switch task, err := l.describe(ctx, taskID); {
		case errors.Is(err, bastion.ErrGone), err == nil && !alive(task):
			return nil
		case err != nil && !errors.Is(err, errMissing) && try >= missingAnswers:
			return fmt.Errorf("StopTask %s: %w; asking for it: %w", taskID, errMissing, err)
		}
	}
}

// List implements [bastion.Launcher]. ECS may be some seconds late, and say the
// same twice.
func (l *Launcher) List(ctx context.Context) ([]bastion.OwnedTask, error) {
	tasks, err := l.Cloud.list(ctx, l.Cluster)
	tasks = slices.DeleteFunc(tasks, func(t types.Task) bool {
		return environment(t, envProfile) != l.Profile || environment(t, envOwner) == "" || !alive(t)
	})
	addrs, addrErr := l.addresses(ctx, tasks)
	err = errors.Join(err, addrErr)
	var found []bastion.OwnedTask
	for _, task := range tasks {
		generation, genErr := strconv.ParseInt(environment(task, envGeneration), 10, 64)
		if genErr != nil {
			continue // not ours, whatever it says
		}
		life, _ := time.ParseDuration(environment(task, envMaxLife))
		arn := aws.ToString(task.TaskArn)
		if aws.ToString(task.LastStatus) != "RUNNING" {
			// It has an address long before anybody listens there, and is
			// still being started for as long.
			delete(addrs, arn)
		}
		found = append(found, bastion.OwnedTask{
			Owner:   bastion.Owner{User: environment(task, envOwner), Profile: l.Profile},
			Task:    bastion.Task{ID: arn, Principal: environment(task, envPrincipal), Generation: generation, Addr: addrs[arn]},
			Started: aws.ToTime(task.CreatedAt),
			MaxLife: life,
		})
	}
	return found, err
}

// A listing is what ECS has said of a cluster at some moment.
type listing struct {
	at    time.Time
	tasks []types.Task
}

// listingFor is how long a listing is as good as a new one: long enough for the
// profiles of a gateway, of which each wants to see its own tasks. ECS itself may
// be later.
const listingFor = time.Second

// outdate has the next list ask ECS, since this process has changed what it says.
func (c *Cloud) outdate(cluster string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.listings, cluster)
}

// list returns the tasks of this deployment that ECS says are to run, with
// CreatedAt by the clock of this machine.
func (c *Cloud) list(ctx context.Context, cluster string) ([]types.Task, error) {
	c.mu.Lock()
	last := c.listings[cluster]
	c.mu.Unlock()
	if time.Since(last.at) < listingFor {
		return slices.Clone(last.tasks), nil
	}
	seen := map[string]bool{}
	var arns []string
	// ListTasks takes no other filter beside startedBy, and by default gives
	// those only that are to run.
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
		// AWS's clock and this one may differ, by more than a bastion may
		// be too old.
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
