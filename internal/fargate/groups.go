package fargate

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// groupVisibleTimeout is the time within which EC2 must list a group that was just
// made.
const groupVisibleTimeout = 20 * time.Second

// Isolation gives each owner a security group, so that bastions cannot connect to
// each other. A group is made at the owner's first start, and used again by the
// next, which needs no additional call.
//
// The first time that a process uses a group, it corrects the group's rules.
// [Cloud.DeleteUnusedGroups] deletes it.
type Isolation struct {
	// Ingress are the peers that may connect to agents, which must include the
	// gateway: IDs of security groups, and networks as CIDRs.
	Ingress []string
	// Egress are the connections that bastions may make.
	Egress []Rule
}

// groups are the owners' security groups, as far as this process knows them.
type groups struct {
	mu      sync.Mutex
	byOwner map[bastion.Owner]*group
	unused  map[string]time.Time // since when, by ID
}

// A group is one owner's security group.
type group struct {
	busy chan struct{} // of size one: full during calls of EC2 about the group

	mu    sync.Mutex
	id    string // empty if unknown
	users int    // launches in progress
}

// lock waits for busy, or returns the cause of ctx's end. EC2 can be slow.
func (g *group) lock(ctx context.Context) error {
	select {
	case g.busy <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (g *group) unlock() { <-g.busy }

// use counts the caller as a user of the group, and returns its ID; if the ID is
// unknown, it counts nobody.
func (g *group) use() (id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.id != "" {
		g.users++
	}
	return g.id
}

func (g *group) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.users--
}

func (g *group) set(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.id = id
}

func (g *group) used() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.users > 0
}

// of returns the owner's group.
func (g *groups) of(owner bastion.Owner) *group {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.byOwner == nil {
		g.byOwner = map[bastion.Owner]*group{}
	}
	if g.byOwner[owner] == nil {
		g.byOwner[owner] = &group{busy: make(chan struct{}, 1)}
	}
	return g.byOwner[owner]
}

// group returns the ID of the owner's security group, which it makes if needed;
// empty without Isolate. The group is not deleted before release is called.
func (l *Launcher) group(ctx context.Context, owner bastion.Owner) (id string, release func(), err error) {
	if l.Isolate == nil {
		return "", func() {}, nil
	}
	g := l.Cloud.groups.of(owner)
	if err := g.lock(ctx); err != nil {
		return "", nil, fmt.Errorf("waiting for the security group of %s: %w", owner, err)
	}
	defer g.unlock()
	if id := g.use(); id != "" {
		return id, g.release, nil
	}
	made, err := l.makeGroup(ctx, owner)
	if err != nil { // even if the group exists, its rules may be wrong
		return "", nil, fmt.Errorf("making a security group for %s: %w", owner, err)
	}
	g.set(made)
	return g.use(), g.release, nil
}

// forgetGroup makes the next launch look for the owner's group again.
func (l *Launcher) forgetGroup(owner bastion.Owner) { l.Cloud.groups.of(owner).set("") }

// makeGroup finds or makes the owner's group, and corrects its rules. If the process
// is killed meanwhile, the next call finishes it.
func (l *Launcher) makeGroup(ctx context.Context, owner bastion.Owner) (string, error) {
	vpc, err := l.findVPC(ctx)
	if err != nil {
		return "", err
	}
	// Group names are unique in a VPC. Neither deployment, profile nor user has a
	// slash.
	name := "sallyport/" + l.Cloud.deployment + "/" + owner.Profile + "/" + owner.User
	found, err := l.findGroup(ctx, vpc, name)
	if err != nil {
		return "", err
	}
	if found == nil {
		tag := func(key, value string) types.Tag { return types.Tag{Key: aws.String(key), Value: aws.String(value)} }
		_, err := l.Cloud.ec2.CreateSecurityGroup(ctx, &ec2.CreateSecurityGroupInput{
			GroupName:   &name,
			Description: aws.String("The bastions of one user; made and deleted by Sallyport"),
			VpcId:       &vpc,
			TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeSecurityGroup, Tags: []types.Tag{
				tag("Name", name),
				tag("sallyport:deployment", l.Cloud.deployment),
				tag("sallyport:profile", owner.Profile),
				tag("sallyport:user", owner.User),
			}}},
		})
		if err != nil && !hasCode(err, "InvalidGroup.Duplicate") { // another gateway was first
			return "", fmt.Errorf("CreateSecurityGroup %s: %w", name, classify(err))
		}
		for until := time.Now().Add(groupVisibleTimeout); found == nil; {
			if found, err = l.findGroup(ctx, vpc, name); err != nil {
				return "", err
			}
			if found == nil && time.Now().After(until) {
				return "", fmt.Errorf("EC2 does not list the security group %s that was just made", name)
			}
			if found == nil {
				if err := sleep(ctx, time.Second); err != nil {
					return "", err
				}
			}
		}
		l.Cloud.Log.Info("security group made", "owner", owner, "group", aws.ToString(found.GroupId))
	}
	return aws.ToString(found.GroupId), l.fixRules(ctx, found)
}

// A vpc is the ID of a VPC, which is looked up at the first use.
type vpc struct {
	mu sync.Mutex
	id string
}

// findVPC returns the VPC of the subnets.
func (l *Launcher) findVPC(ctx context.Context) (string, error) {
	l.vpc.mu.Lock()
	id := l.vpc.id
	l.vpc.mu.Unlock()
	if id != "" {
		return id, nil
	}
	out, err := l.Cloud.ec2.DescribeSubnets(ctx, &ec2.DescribeSubnetsInput{SubnetIds: l.Subnets[:1]})
	if err != nil {
		return "", fmt.Errorf("DescribeSubnets %s: %w", l.Subnets[0], classify(err))
	}
	if len(out.Subnets) != 1 || aws.ToString(out.Subnets[0].VpcId) == "" {
		return "", fmt.Errorf("%w: EC2 does not know the subnet %s", bastion.ErrConfig, l.Subnets[0])
	}
	l.vpc.mu.Lock()
	defer l.vpc.mu.Unlock()
	l.vpc.id = *out.Subnets[0].VpcId
	return l.vpc.id, nil
}

// findGroup returns the group of that name, or nil.
func (l *Launcher) findGroup(ctx context.Context, vpc, name string) (*types.SecurityGroup, error) {
	out, err := l.Cloud.ec2.DescribeSecurityGroups(ctx, &ec2.DescribeSecurityGroupsInput{
		Filters: []types.Filter{filter("vpc-id", vpc), filter("group-name", name)},
	})
	if err != nil {
		return nil, fmt.Errorf("DescribeSecurityGroups %s: %w", name, classify(err))
	}
	if len(out.SecurityGroups) == 0 {
		return nil, nil
	}
	return &out.SecurityGroups[0], nil
}

func filter(name, value string) types.Filter {
	return types.Filter{Name: &name, Values: []string{value}}
}
