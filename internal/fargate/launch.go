package fargate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/tracing"
)

// Launch implements [bastion.Launcher]. It returns as soon as the task has an
// address; the agent listens there some seconds later.
//
// A gateway whose ledger was lost counts generations from one again. So if ECS
// answers with a task that ended before the call, Launch launches the next
// generation instead, and so on.
func (l *Launcher) Launch(ctx context.Context, want bastion.Launch) (bastion.Task, error) {
	groupRemade := false
	// The breaker has admitted the start at its first attempt.
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
		case group != "" && !groupRemade && errors.Is(err, bastion.ErrConfig) && strings.Contains(err.Error(), group):
			// Another gateway, or a person, has deleted the group.
			groupRemade = true
			l.forgetGroup(want.Owner)
			continue
		case admitted && l.spot(want) && errors.Is(err, bastion.ErrQuota):
			// Spot and on-demand have separate vCPU quotas ("AWS Fargate
			// service quotas", Amazon ECS Developer Guide). If the breaker has
			// not admitted the launch, the error is about on-demand.
			l.Cloud.Log.Warn("the quota of Spot is used up; trying on-demand", "owner", want.Owner, "generation", want.Generation, "err", err)
			want.Attempt++
			if errors.Is(err, bastion.ErrGone) {
				want.Generation++
			}
			continue
		}
		return task, err
	}
	return bastion.Task{Generation: want.Generation}, fmt.Errorf("more than %d bastions of %s have ended within the time that ECS remembers them", maxReplays, want.Owner)
}

// launch is Launch for one generation. The returned task has the generation also if
// it comes with an error. The error is errReplayed if the generation's task ended
// before the call.
func (l *Launcher) launch(ctx context.Context, want bastion.Launch, group string, admitted *bool) (bastion.Task, error) {
	in := l.request(want, group)
	running, ran := tracing.Start(ctx, "RunTask")
	started, err := l.runTask(running, want.Owner.User, in, admitted)
	ran(err)
	if err == nil && !alive(started) {
		err = errReplayed
	}
	if err != nil {
		return bastion.Task{Generation: want.Generation}, err
	}
	waiting, found := tracing.Start(ctx, "address")
	task, err := l.awaitAddress(waiting, aws.ToString(started.TaskArn))
	found(err)
	task.Generation = want.Generation
	task.Principal = l.token(want.Owner, want.Generation)
	l.observe(in, err)
	return task, err
}

// errReplayed says that ECS replayed the outcome of an earlier RunTask with the same
// token.
var errReplayed = errors.New("the task of this generation has ended before")

// runTask sends the request with the task definition of a user, with retries, until it
// is answered or ctx ends.
func (l *Launcher) runTask(ctx context.Context, user string, in *ecs.RunTaskInput, admitted *bool) (types.Task, error) {
	var last error
	found := false
	for retry := 1; ; retry++ {
		if err := l.waitTurn(ctx, admitted); err != nil {
			return types.Task{}, errors.Join(err, last)
		}
		if !found { // after waitTurn, so that rejected launches make no call
			definition, err := l.taskDefinition(ctx, user)
			switch {
			case err != nil && !transient(err):
				return types.Task{}, err
			case err != nil:
				last = err
				if l.pause(ctx, user, retry, last) != nil {
					return types.Task{}, last
				}
				continue
			}
			found, in.TaskDefinition = true, &definition
		}
		out, err := l.Cloud.run.RunTask(ctx, in)
		l.Cloud.pace.observe(err)
		switch {
		case err == nil && len(out.Tasks) > 0:
			l.Cloud.poller(l.Cluster).expect(aws.ToString(out.Tasks[0].TaskArn))
			l.Cloud.invalidateListing(l.Cluster)
			return out.Tasks[0], nil
		case err == nil:
			// ECS replays this answer to later requests, so the generation is
			// used up.
			err := failureReason(out.Failures)
			l.observe(in, err)
			return types.Task{}, fmt.Errorf("RunTask in cluster %s, subnets %v: %w: %w", l.Cluster, subnets(in), bastion.ErrGone, err)
		}
		if ids, ok := conflictingTasks(err); ok {
			return l.existing(ctx, in, ids)
		}
		if !transient(err) {
			err = classify(err)
			l.observe(in, err)
			return types.Task{}, fmt.Errorf("RunTask in cluster %s: %w", l.Cluster, err)
		}
		last = fmt.Errorf("RunTask in cluster %s: %w", l.Cluster, classify(err))
		// Because of the token, the request can be repeated even if it was
		// carried out.
		if l.pause(ctx, user, retry, last) != nil {
			return types.Task{}, last
		}
	}
}

// reportedRetry is the retry of a start that is logged, about six seconds after the first
// failure: a start may go on for start_timeout.
const reportedRetry = 5

// pause waits before a retry of a user's start. The error is the cause of ctx's end.
func (l *Launcher) pause(ctx context.Context, user string, retry int, failed error) error {
	if retry == reportedRetry {
		l.Cloud.Log.Warn("calls of AWS for a start fail; trying again", "owner", bastion.Owner{User: user, Profile: l.Profile}, "err", failed)
	}
	return sleep(ctx, backoff(retry))
}

// waitTurn blocks until RunTask may be called. A launch asks the breaker once, at
// the head of the queue: while it queued, other launches may have found that there
// is no capacity. A launch that is rejected does not use a token of pace.
func (l *Launcher) waitTurn(ctx context.Context, admitted *bool) error {
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

// observe reports the outcome of the request to the breaker.
func (l *Launcher) observe(in *ecs.RunTaskInput, err error) {
	l.breaker.observe(l.Subnets, subnets(in)[0], len(in.CapacityProviderStrategy) > 0, err)
}

// existing returns the task of an earlier request with the same token and other
// parameters, which was made with another configuration.
func (l *Launcher) existing(ctx context.Context, in *ecs.RunTaskInput, arns []string) (types.Task, error) {
	if len(arns) == 0 { // that request failed
		return types.Task{}, errReplayed
	}
	l.Cloud.poller(l.Cluster).expect(arns[0])
	task, err := l.find(ctx, arns[0])
	switch {
	case errors.Is(err, bastion.ErrGone):
		return types.Task{}, errReplayed
	case err != nil:
		return types.Task{}, fmt.Errorf("describing the task that was started with other parameters: %w", err)
	case environment(task, envPrincipal) != aws.ToString(in.ClientToken):
		return types.Task{}, fmt.Errorf("%w: the client token of this generation belongs to task %s, which is not a bastion", bastion.ErrConfig, arns[0])
	case !alive(task):
		return types.Task{}, errReplayed
	}
	return task, nil
}

// awaitAddress returns when the task has an address. The task that comes with an
// error has only its ID.
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
			continue // the poller has logged it, and delays the next answer
		case !alive(task):
			return unknown, &bastion.GoneError{TaskID: arn, Why: stopReason(task), Usage: usage(task)}
		}
		addrs, err := l.addresses(ctx, []types.Task{task})
		switch addr := addrs[arn]; {
		case addr != "":
			return bastion.Task{ID: arn, Addr: addr, Usage: usage(task)}, nil
		case errors.Is(err, bastion.ErrDenied):
			return unknown, err
		case err != nil:
			l.Cloud.Log.Warn("cannot find the address of a bastion", "task", arn, "err", err)
		}
	}
}

// addresses returns the addresses of agents by their tasks' ARNs, for those tasks
// that have one.
func (l *Launcher) addresses(ctx context.Context, tasks []types.Task) (map[string]string, error) {
	addrs := map[string]string{}
	interfaces := map[string]string{} // ARN by interface
	for _, task := range tasks {
		arn := aws.ToString(task.TaskArn)
		v4, v6, eni := attachment(task)
		switch host := cmp.Or(v4, v6); {
		case l.ConnectPublic && eni != "":
			interfaces[eni] = arn
		case !l.ConnectPublic && host != "":
			addrs[arn] = net.JoinHostPort(host, strconv.Itoa(agentPort))
		}
	}
	for some := range slices.Chunk(slices.Sorted(maps.Keys(interfaces)), describeMax) {
		// With the parameter NetworkInterfaceIds, one deleted interface would
		// make the whole call fail.
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

// attachment returns the addresses and the ID of a task's network interface, empty
// where ECS does not have them yet.
func attachment(task types.Task) (v4, v6, eni string) {
	for _, a := range task.Attachments {
		// In events, the type is "eni".
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
	// In an IPv6-only subnet, only the container has the address
	// (API_NetworkInterface).
	for _, c := range task.Containers {
		for _, i := range c.NetworkInterfaces {
			v4 = cmp.Or(v4, aws.ToString(i.PrivateIpv4Address))
			v6 = cmp.Or(v6, aws.ToString(i.Ipv6Address))
		}
	}
	return v4, v6, eni
}
