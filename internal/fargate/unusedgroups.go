package fargate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// groupIdle is how long an owner must have had no bastion for the owner's security
// group to be deleted.
const groupIdle = time.Hour

// DeleteUnusedGroups deletes the security groups of owners without a bastion for an
// hour, as far as this process has observed; owners is the set with a bastion now. If
// a group is still in use, for example by a network interface that ECS has not
// deleted yet, it is left for the next call. See [bastion.Dialer.AfterSweep].
func (c *Cloud) DeleteUnusedGroups(ctx context.Context, owners map[bastion.Owner]bool, launchers map[string]bastion.Launcher) error {
	fargate, isolate := false, false
	for _, launcher := range launchers {
		if l, ok := launcher.(*Launcher); ok {
			fargate = true
			isolate = isolate || l.Isolate != nil
		}
	}
	if !fargate {
		return nil
	}
	found, err := c.listGroups(ctx)
	if errors.Is(err, bastion.ErrDenied) && !isolate {
		return nil // a gateway that never made groups does not need this permission
	}
	if err != nil {
		return err
	}
	now := time.Now()
	unused := map[string]time.Time{}
	c.groups.mu.Lock()
	before := c.groups.unused
	c.groups.unused = unused
	c.groups.mu.Unlock()
	var errs []error
	for _, g := range found {
		id, owner := aws.ToString(g.GroupId), ownerOf(g)
		if owner.User == "" || owner.Profile == "" || owners[owner] {
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

// listGroups returns the security groups of the deployment.
func (c *Cloud) listGroups(ctx context.Context) ([]types.SecurityGroup, error) {
	var found []types.SecurityGroup
	pages := ec2.NewDescribeSecurityGroupsPaginator(c.ec2, &ec2.DescribeSecurityGroupsInput{
		Filters:    []types.Filter{filter("tag:sallyport:deployment", c.deployment)},
		MaxResults: aws.Int32(groupsMax),
	})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, fmt.Errorf("DescribeSecurityGroups of deployment %s: %w", c.deployment, classify(err))
		}
		found = append(found, page.SecurityGroups...)
	}
	return found, nil
}

// groupsMax is the page size of DescribeSecurityGroups, of at most 1,000
// (API_DescribeSecurityGroups).
const groupsMax = 200

// ownerOf returns the owner in a group's tags; a group without these tags has a zero
// User or Profile.
func ownerOf(g types.SecurityGroup) bastion.Owner {
	var owner bastion.Owner
	for _, tag := range g.Tags {
		switch aws.ToString(tag.Key) {
		case "sallyport:user":
			owner.User = aws.ToString(tag.Value)
		case "sallyport:profile":
			owner.Profile = aws.ToString(tag.Value)
		}
	}
	return owner
}

// deleteGroup deletes an owner's group, unless a launch or a network interface uses
// it.
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
