package fargate

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

const (
	// groupKnown is how long EC2 may take to know a group it has just made.
	groupKnown = 20 * time.Second
)

// Isolation gives each owner a security group of her own, so that bastions cannot
// reach each other. It is made when she starts her first bastion, and used again
// by the next: the second start costs no call more than without.
//
// A group is brought to the rules given here the first time that a process uses
// it. It is deleted by [Cloud.Sweep].
type Isolation struct {
	// Ingress is who may connect to agents: ids of security groups, and
	// networks as CIDRs; the gateway's.
	Ingress []string
	// Egress is what bastions may connect to.
	Egress []Rule
}

// A Rule permits traffic with some peer.
type Rule struct {
	// Protocol is "tcp", "udp", "icmp", or "-1" for everything.
	Protocol string
	// From and To are the first and last port; both -1 where there are none.
	From, To int32
	// Peer is a network as a CIDR, or the id of a security group.
	Peer string
}

// groups are those that this process knows.
type groups struct {
	mu      sync.Mutex
	byOwner map[bastion.Owner]*group
	unused  map[string]time.Time // since when, by id
}

type group struct {
	busy chan struct{} // held while EC2 is asked about it

	mu    sync.Mutex
	id    string // empty: not known
	users int    // launches under way
}

// lock waits for the group, or returns the cause of ctx's end: calls to EC2 can be
// slow.
func (g *group) lock(ctx context.Context) error {
	select {
	case g.busy <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (g *group) unlock() { <-g.busy }

// use counts the caller among the users of the group, if it is known.
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

// of returns the owner's.
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

// group returns the id of the owner's security group, or nothing if owners have
// none. It is not deleted before release is called.
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
	if err != nil { // its rules may not be right yet
		return "", nil, fmt.Errorf("making a security group for %s: %w", owner, err)
	}
	g.set(made)
	return g.use(), g.release, nil
}

// forgetGroup has the next launch look for the owner's group again.
func (l *Launcher) forgetGroup(owner bastion.Owner) { l.Cloud.groups.of(owner).set("") }

// makeGroup finds or makes the owner's group, and sees to its rules. Killed at any
// point, it is finished by the next call.
func (l *Launcher) makeGroup(ctx context.Context, owner bastion.Owner) (string, error) {
	vpc, err := l.findVPC(ctx)
	if err != nil {
		return "", err
	}
	// Unique in a VPC. None of the names has a slash in it.
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
		if err != nil && !hasCode(err, "InvalidGroup.Duplicate") { // another gateway was faster
			return "", fmt.Errorf("CreateSecurityGroup %s: %w", name, classify(err))
		}
		for until := time.Now().Add(groupKnown); found == nil; {
			if found, err = l.findGroup(ctx, vpc, name); err != nil {
				return "", err
			}
			if found == nil && time.Now().After(until) {
				return "", fmt.Errorf("EC2 does not know the security group %s it has just made", name)
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

// A vpc is one that is looked up at first use.
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

// findGroup returns nil if there is none of that name.
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

// fixRules makes the rules of a group those that are configured. A new group
// lets nobody in, and everything out. What is too much is taken away first.
func (l *Launcher) fixRules(ctx context.Context, g *types.SecurityGroup) error {
	var ingress []Rule
	for _, peer := range l.Isolate.Ingress {
		ingress = append(ingress, Rule{"tcp", agentPort, agentPort, peer})
	}
	api := l.Cloud.ec2
	moreIn, lessIn := difference(ingress, rules(g.IpPermissions))
	moreOut, lessOut := difference(l.Isolate.Egress, rules(g.IpPermissionsEgress))
	for _, step := range []struct {
		name  string
		rules []Rule
		call  func([]types.IpPermission) error
		fine  string // an error that says it was done before
	}{
		{"RevokeSecurityGroupEgress", lessOut, func(p []types.IpPermission) error {
			_, err := api.RevokeSecurityGroupEgress(ctx, &ec2.RevokeSecurityGroupEgressInput{GroupId: g.GroupId, IpPermissions: p})
			return err
		}, "InvalidPermission.NotFound"},
		{"RevokeSecurityGroupIngress", lessIn, func(p []types.IpPermission) error {
			_, err := api.RevokeSecurityGroupIngress(ctx, &ec2.RevokeSecurityGroupIngressInput{GroupId: g.GroupId, IpPermissions: p})
			return err
		}, "InvalidPermission.NotFound"},
		{"AuthorizeSecurityGroupIngress", moreIn, func(p []types.IpPermission) error {
			_, err := api.AuthorizeSecurityGroupIngress(ctx, &ec2.AuthorizeSecurityGroupIngressInput{GroupId: g.GroupId, IpPermissions: p})
			return err
		}, "InvalidPermission.Duplicate"},
		{"AuthorizeSecurityGroupEgress", moreOut, func(p []types.IpPermission) error {
			_, err := api.AuthorizeSecurityGroupEgress(ctx, &ec2.AuthorizeSecurityGroupEgressInput{GroupId: g.GroupId, IpPermissions: p})
			return err
		}, "InvalidPermission.Duplicate"},
	} {
		if len(step.rules) == 0 {
			continue
		}
		err := step.call(permissions(step.rules))
		if hasCode(err, step.fine) && len(step.rules) > 1 {
			// One of them stands in the way of the others.
			for _, r := range step.rules {
				if err = step.call(permissions([]Rule{r})); err != nil && !hasCode(err, step.fine) {
					break
				}
			}
		}
		if err != nil && !hasCode(err, step.fine) {
			return fmt.Errorf("%s %s: %w", step.name, aws.ToString(g.GroupId), classify(err))
		}
	}
	return nil
}

// rules takes what EC2 says of a group apart into single rules.
func rules(permissions []types.IpPermission) []Rule {
	var out []Rule
	for _, p := range permissions {
		r := Rule{Protocol: aws.ToString(p.IpProtocol), From: -1, To: -1}
		if p.FromPort != nil && r.Protocol != "-1" {
			r.From = *p.FromPort
		}
		if p.ToPort != nil && r.Protocol != "-1" {
			r.To = *p.ToPort
		}
		add := func(peer *string) {
			r.Peer = aws.ToString(peer)
			out = append(out, r)
		}
		for _, n := range p.IpRanges {
			add(n.CidrIp)
		}
		for _, n := range p.Ipv6Ranges {
			add(n.CidrIpv6)
		}
		for _, n := range p.UserIdGroupPairs {
			add(n.GroupId)
		}
		for _, n := range p.PrefixListIds {
			add(n.PrefixListId)
		}
	}
	return out
}

// permissions is the opposite of rules.
func permissions(rules []Rule) []types.IpPermission {
	var out []types.IpPermission
	for _, r := range rules {
		p := types.IpPermission{IpProtocol: aws.String(r.Protocol)}
		if r.Protocol != "-1" {
			p.FromPort, p.ToPort = aws.Int32(r.From), aws.Int32(r.To)
		}
		switch n, err := netip.ParsePrefix(r.Peer); {
		case strings.HasPrefix(r.Peer, "pl-"):
			p.PrefixListIds = []types.PrefixListId{{PrefixListId: aws.String(r.Peer)}}
		case err != nil:
			p.UserIdGroupPairs = []types.UserIdGroupPair{{GroupId: aws.String(r.Peer)}}
		case n.Addr().Is4():
			p.IpRanges = []types.IpRange{{CidrIp: aws.String(r.Peer)}}
		default:
			p.Ipv6Ranges = []types.Ipv6Range{{CidrIpv6: aws.String(r.Peer)}}
		}
		out = append(out, p)
	}
	return out
}

// difference returns the rules that are wanted and not there, and those that are
// there and not wanted.
func difference(want, have []Rule) (missing, extra []Rule) {
	for _, r := range want {
		if !slices.Contains(have, r) {
			missing = append(missing, r)
		}
	}
	for _, r := range have {
		if !slices.Contains(want, r) {
			extra = append(extra, r)
		}
	}
	return missing, extra
}

// hasCode reports whether AWS has answered with an error of that code.
func hasCode(err error, code string) bool {
	var api smithy.APIError
	return errors.As(err, &api) && api.ErrorCode() == code
}
