package fargate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// A Finding is what Check has found out about one action.
type Finding struct {
	// Action is its IAM name, such as "ecs:RunTask".
	Action string
	// Err is nil if the action is permitted, wraps bastion.ErrDenied if not,
	// and otherwise says what else is wrong.
	Err error
	// Unseen, if not empty, says why it could not be found out whether the
	// action is permitted; then Err is nil.
	Unseen string
}

// Check asks AWS, for each action that this launcher needs, whether the gateway is
// permitted it, and whether cluster, task definition and container are there, and
// subnets and groups if it may look. It starts and changes nothing: EC2 has a dry
// run for that, and ECS is given requests that it must refuse for another reason
// once it has found them permitted. All of them are within what docs/iam.md
// permits. The string says who the gateway is to AWS.
func (l *Launcher) Check(ctx context.Context) (who string, findings []Finding, err error) {
	c := l.Cloud
	me, err := c.sts.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
	if err != nil {
		return "", nil, fmt.Errorf("asking AWS who this is: %w", err)
	}
	add := func(action string, err error) {
		findings = append(findings, Finding{Action: action, Err: classify(err)})
	}
	unseen := func(action, why string) { findings = append(findings, Finding{Action: action, Unseen: why}) }

	// together adds what one request says about the actions that it takes: AWS
	// names the first that is not permitted.
	together := func(err error, actions ...string) {
		refused := cmp.Or(deniedAction(err), actions[0])
		if err != nil {
			add(refused, err)
		}
		for _, action := range actions {
			if err == nil {
				add(action, nil)
			} else if action != refused {
				unseen(action, "hidden by "+refused)
			}
		}
	}

	_, err = c.ecs.ListTasks(ctx, &ecs.ListTasksInput{Cluster: &l.Cluster, StartedBy: aws.String(c.startedBy())})
	add("ecs:ListTasks", err)

	const nobody = "00000000000000000000000000000000" // a task that cannot be
	_, err = c.ecs.DescribeTasks(ctx, &ecs.DescribeTasksInput{Cluster: &l.Cluster, Tasks: []string{nobody}})
	add("ecs:DescribeTasks", err)

	_, err = c.ecs.StopTask(ctx, &ecs.StopTaskInput{Cluster: &l.Cluster, Task: aws.String(nobody), Reason: aws.String("a check of permissions")})
	if notFound(err) {
		err = nil
	}
	add("ecs:StopTask", err)

	// Without a network no Fargate task can start.
	in := l.request(bastion.Launch{Owner: bastion.Owner{User: "check", Profile: l.Profile}}, "")
	in.ClientToken, in.NetworkConfiguration = nil, nil
	out, err := c.ecs.RunTask(ctx, in)
	switch {
	case err == nil && len(out.Tasks) > 0:
		err = l.Stop(ctx, bastion.Owner{}, aws.ToString(out.Tasks[0].TaskArn))
	case hasCode(err, "InvalidParameterException") && strings.Contains(strings.ToLower(err.Error()), "network configuration"):
		err = nil // "Network Configuration must be provided when networkMode 'awsvpc' is specified."
	}
	together(err, "ecs:RunTask", "ecs:TagResource")
	if deniedAction(err) != "iam:PassRole" {
		unseen("iam:PassRole", "only seen when a task starts")
	}

	if l.PublicIP {
		_, err := c.ec2.DescribeNetworkInterfaces(ctx, &ec2.DescribeNetworkInterfacesInput{DryRun: aws.Bool(true)})
		add("ec2:DescribeNetworkInterfaces", dryRun(err))
	}
	// A launcher without Isolate need not be permitted to look.
	look := func(action, at string, err error) {
		if err = classify(err); errors.Is(err, bastion.ErrDenied) && l.Isolate == nil {
			unseen(action, "not needed; whether the "+at+" exist is seen when a task starts")
			return
		}
		add(action, err)
	}
	subnets, err := c.ec2.DescribeSubnets(ctx, &ec2.DescribeSubnetsInput{SubnetIds: l.Subnets})
	vpc := "vpc-00000000000000000"
	if err == nil && len(subnets.Subnets) > 0 {
		first := subnets.Subnets[0]
		vpc = aws.ToString(first.VpcId)
		for _, s := range subnets.Subnets {
			if aws.ToString(s.VpcId) != vpc {
				err = fmt.Errorf("%w: %s is in %s, and %s in %s", bastion.ErrConfig, aws.ToString(s.SubnetId), aws.ToString(s.VpcId), aws.ToString(first.SubnetId), vpc)
			}
		}
	}
	look("ec2:DescribeSubnets", "subnets", err)
	describe := &ec2.DescribeSecurityGroupsInput{GroupIds: l.SecurityGroups}
	if len(l.SecurityGroups) == 0 {
		describe.DryRun = aws.Bool(true)
	}
	_, err = c.ec2.DescribeSecurityGroups(ctx, describe)
	look("ec2:DescribeSecurityGroups", "security groups", dryRun(err))
	if l.Isolate == nil {
		return aws.ToString(me.Arn), findings, nil
	}

	yes := aws.Bool(true)
	_, err = c.ec2.CreateSecurityGroup(ctx, &ec2.CreateSecurityGroupInput{DryRun: yes, GroupName: aws.String("sallyport/check"), Description: aws.String("a check of permissions"), VpcId: &vpc,
		TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeSecurityGroup, Tags: []types.Tag{{Key: aws.String("sallyport:deployment"), Value: &c.deployment}}}}})
	together(dryRun(err), "ec2:CreateSecurityGroup", "ec2:CreateTags")

	// What may be done to groups can depend on their tags, and until the first
	// user has one there is none with the right tags.
	id, real := "sg-00000000000000000", false
	if own, err := c.ec2.DescribeSecurityGroups(ctx, &ec2.DescribeSecurityGroupsInput{Filters: []types.Filter{filter("tag:sallyport:deployment", c.deployment)}}); err == nil && len(own.SecurityGroups) > 0 {
		id, real = aws.ToString(own.SecurityGroups[0].GroupId), true
	}
	some := []types.IpPermission{{IpProtocol: aws.String("tcp"), FromPort: aws.Int32(agentPort), ToPort: aws.Int32(agentPort), IpRanges: []types.IpRange{{CidrIp: aws.String("127.0.0.1/32")}}}}
	for _, try := range []struct {
		action string
		call   func() error
	}{
		{"ec2:AuthorizeSecurityGroupIngress", func() error {
			_, err := c.ec2.AuthorizeSecurityGroupIngress(ctx, &ec2.AuthorizeSecurityGroupIngressInput{DryRun: yes, GroupId: &id, IpPermissions: some})
			return err
		}},
		{"ec2:AuthorizeSecurityGroupEgress", func() error {
			_, err := c.ec2.AuthorizeSecurityGroupEgress(ctx, &ec2.AuthorizeSecurityGroupEgressInput{DryRun: yes, GroupId: &id, IpPermissions: some})
			return err
		}},
		{"ec2:RevokeSecurityGroupIngress", func() error {
			_, err := c.ec2.RevokeSecurityGroupIngress(ctx, &ec2.RevokeSecurityGroupIngressInput{DryRun: yes, GroupId: &id, IpPermissions: some})
			return err
		}},
		{"ec2:RevokeSecurityGroupEgress", func() error {
			_, err := c.ec2.RevokeSecurityGroupEgress(ctx, &ec2.RevokeSecurityGroupEgressInput{DryRun: yes, GroupId: &id, IpPermissions: some})
			return err
		}},
		{"ec2:DeleteSecurityGroup", func() error {
			_, err := c.ec2.DeleteSecurityGroup(ctx, &ec2.DeleteSecurityGroupInput{DryRun: yes, GroupId: &id})
			return err
		}},
	} {
		err := dryRun(try.call())
		if !real && hasCode(err, "InvalidGroup.NotFound") {
			err = nil
		}
		if !real && errors.Is(err, bastion.ErrDenied) {
			unseen(try.action, "not permitted for a group without tags; seen once a user has a group")
			continue
		}
		add(try.action, err)
	}
	return aws.ToString(me.Arn), findings, nil
}

// deniedAction returns the action that AWS says is not permitted; empty if it does
// not say.
func deniedAction(err error) string {
	var api smithy.APIError
	if !errors.As(err, &api) || !errors.Is(classify(err), bastion.ErrDenied) {
		return ""
	}
	_, action, _ := strings.Cut(api.ErrorMessage(), "is not authorized to perform: ")
	action, _, _ = strings.Cut(action, " ")
	return action
}

// dryRun turns EC2's answer to a dry run into nil if it would have been permitted.
func dryRun(err error) error {
	var api smithy.APIError
	if errors.As(err, &api) && api.ErrorCode() == "DryRunOperation" {
		return nil
	}
	return classify(err)
}
