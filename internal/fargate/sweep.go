package fargate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

const (
	// leftAge is how old a task must be to be stopped because no profile has
	// it; a gateway with another configuration may just have ended.
	leftAge = 10 * time.Minute
	// overtime is how long after its own max_life a task is stopped. The agent
	// ends by itself, which may take a while.
	overtime = 15 * time.Minute
	// groupIdle is how long an owner must have had no bastion for her
	// security group to be deleted.
	groupIdle = time.Hour
)

// Sweep ends what is left in the account of what the configuration was before:
// tasks of this deployment that belong to none of the launchers, of which there is
// one for each profile; [bastion.Dialer.Sweep] sees to the others. It looks in the
// clusters that the launchers have.
//
// And it deletes the security groups of those owners who have had no bastion for
// an hour, as far as this process has seen. A group that is still in use, or whose
// network interface has not gone yet, is left for the next time.
func (c *Cloud) Sweep(ctx context.Context, launchers ...*Launcher) error {
	var errs []error
	busy := map[bastion.Owner]bool{}
	seen := map[string]bool{}
	for _, l := range launchers {
		if seen[shortName(l.Cluster)] {
			continue
		}
		seen[shortName(l.Cluster)] = true
		tasks, err := c.list(ctx, l.Cluster)
		if err != nil {
			return err // without the whole list, no group can be told to be unused
		}
		for _, task := range tasks {
			if !alive(task) {
				continue
			}
			busy[bastion.Owner{User: environment(task, envOwner), Profile: environment(task, envProfile)}] = true
			why := left(task, l.Cluster, launchers)
			if why == "" {
				continue
			}
			arn := aws.ToString(task.TaskArn)
			c.Log.Warn("stopping a bastion", "task", arn, "user", environment(task, envOwner), "profile", environment(task, envProfile), "why", why)
			if err := l.Stop(ctx, bastion.Owner{}, arn); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(append(errs, c.sweepGroups(ctx, busy, launchers))...)
}

// left says why a task in a cluster is to be stopped; empty if it is not.
func left(task types.Task, cluster string, launchers []*Launcher) string {
	age := time.Since(aws.ToTime(task.CreatedAt))
	profile := environment(task, envProfile)
	known := false
	for _, l := range launchers {
		if l.Profile == profile && shortName(l.Cluster) == shortName(cluster) {
			return ""
		}
		known = known || l.Profile == profile
	}
	life, err := time.ParseDuration(environment(task, envMaxLife))
	switch {
	case task.CreatedAt == nil || environment(task, envPrincipal) == "":
		return "" // none of ours, whatever it says
	case !known && age > leftAge:
		return "its profile is not configured any more"
	case err == nil && life > 0 && age > life+overtime: // its owner may be in it until then
		return "its profile is in another cluster now, and it has outlived its maximum life"
	}
	return ""
}

func (c *Cloud) sweepGroups(ctx context.Context, busy map[bastion.Owner]bool, launchers []*Launcher) error {
	isolate := false
	for _, l := range launchers {
		isolate = isolate || l.Isolate != nil
	}
	var found []ec2types.SecurityGroup
	pages := ec2.NewDescribeSecurityGroupsPaginator(c.ec2, &ec2.DescribeSecurityGroupsInput{
		Filters:    []ec2types.Filter{filter("tag:sallyport:deployment", c.deployment)},
		MaxResults: aws.Int32(groupsMax),
	})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err = classify(err); errors.Is(err, bastion.ErrDenied) && !isolate {
			return nil // a gateway whose owners never had groups need not be permitted it
		}
		if err != nil {
			return fmt.Errorf("DescribeSecurityGroups of deployment %s: %w", c.deployment, err)
		}
		found = append(found, page.SecurityGroups...)
	}

	now := time.Now()
	unused := map[string]time.Time{}
	c.groups.mu.Lock()
	before := c.groups.unused
	c.groups.unused = unused
	c.groups.mu.Unlock()
	var errs []error
	for _, g := range found {
		var owner bastion.Owner
		for _, tag := range g.Tags {
			switch aws.ToString(tag.Key) {
			case "sallyport:user":
				owner.User = aws.ToString(tag.Value)
			case "sallyport:profile":
				owner.Profile = aws.ToString(tag.Value)
			}
		}
		id := aws.ToString(g.GroupId)
		if owner.User == "" || owner.Profile == "" || busy[owner] {
			continue
		}
		since, ok := before[id]
		if !ok {
			since = now
		}
		unused[id] = since
		if now.Sub(since) >= groupIdle {
			errs = append(errs, c.deleteGroup(ctx, owner, id))
		}
	}
	return errors.Join(errs...)
}

// groupsMax is how many groups one DescribeSecurityGroups returns; 1,000 is the most
// (API_DescribeSecurityGroups).
const groupsMax = 200

func (c *Cloud) deleteGroup(ctx context.Context, owner bastion.Owner, id string) error {
	g := c.groups.of(owner)
	if err := g.lock(ctx); err != nil {
		return err
	}
	defer g.unlock()
	if g.used() {
		return nil
	}
	_, err := c.ec2.DeleteSecurityGroup(ctx, &ec2.DeleteSecurityGroupInput{GroupId: &id})
	switch {
	case hasCode(err, "DependencyViolation"):
		c.Log.Info("security group is still in use", "owner", owner, "group", id)
		return nil
	case err != nil && !hasCode(err, "InvalidGroup.NotFound"):
		return fmt.Errorf("DeleteSecurityGroup %s of %s: %w", id, owner, classify(err))
	}
	g.set("")
	c.Log.Info("security group deleted", "owner", owner, "group", id)
	return nil
}
