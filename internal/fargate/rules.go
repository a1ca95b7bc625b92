package fargate

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
)

// A Rule permits traffic with a peer.
type Rule struct {
	// Protocol is "tcp", "udp", "icmp", or "-1" for everything.
	Protocol string
	// From and To are the first and last port; both -1 where there are none.
	From, To int32
	// Peer is a network as a CIDR, or the id of a security group.
	Peer string
}

// fixRules makes the rules of a group the configured ones: it first removes rules,
// then adds some. A new group permits no ingress and all egress.
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
		done  string // code of the error for a change that was made before
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
		if hasCode(err, step.done) && len(step.rules) > 1 {
			// Because of one rule, EC2 has made none of the changes.
			for _, r := range step.rules {
				if err = step.call(permissions([]Rule{r})); err != nil && !hasCode(err, step.done) {
					break
				}
			}
		}
		if err != nil && !hasCode(err, step.done) {
			return fmt.Errorf("%s %s: %w", step.name, aws.ToString(g.GroupId), classify(err))
		}
	}
	return nil
}

// rules converts permissions of EC2 into rules with one peer each.
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

// permissions converts rules into permissions of EC2.
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

// difference returns the rules in want and not in have, and those in have and not in
// want.
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
