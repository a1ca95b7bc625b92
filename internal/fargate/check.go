package fargate

import (
	"context"
	"errors"
	"fmt"

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
}

// Check asks AWS, for each action that this launcher needs, whether the gateway is
// permitted it, and whether cluster, task definition and subnets are there. It
// starts and changes nothing: EC2 has a dry run for that, and ECS is given
// requests that it must refuse for another reason once it has found them
// permitted. Whether the gateway may pass the roles of the task definition
// (iam:PassRole) can only be seen by starting a task. The string says who the
// gateway is to AWS.
func (l *Launcher) Check(ctx context.Context) (who string, findings []Finding, err error) {
	c := l.Cloud
	me, err := c.sts.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
	if err != nil {
		return "", nil, fmt.Errorf("asking AWS who this is: %w", err)
	}
	add := func(action string, err error) { findings = append(findings, Finding{action, err}) }

	_, err = c.ecs.ListTasks(ctx, &ecs.ListTasksInput{Cluster: &l.Cluster, StartedBy: aws.String(c.startedBy())})
	add("ecs:ListTasks", classify(err))

	const nobody = "00000000000000000000000000000000" // a task that cannot be
	_, err = c.ecs.DescribeTasks(ctx, &ecs.DescribeTasksInput{Cluster: &l.Cluster, Tasks: []string{nobody}})
	add("ecs:DescribeTasks", classify(err))

	_, err = c.ecs.StopTask(ctx, &ecs.StopTaskInput{Cluster: &l.Cluster, Task: aws.String(nobody), Reason: aws.String("a check of permissions")})
	if notFound(err) {
		err = nil
	}
	add("ecs:StopTask", classify(err))

	// Without a network no Fargate task can start.
	in := l.request(bastion.Launch{Owner: bastion.Owner{User: "check", Profile: l.Profile}}, "")
	in.ClientToken, in.NetworkConfiguration = nil, nil
	out, err := c.ecs.RunTask(ctx, in)
	switch err = classify(err); {
	case err == nil && len(out.Tasks) > 0:
		err = l.Stop(ctx, bastion.Owner{}, aws.ToString(out.Tasks[0].TaskArn))
	case hasCode(err, "InvalidParameterException"):
		err = nil
	}
	add("ecs:RunTask", err)

	if l.PublicIP {
		_, err := c.ec2.DescribeNetworkInterfaces(ctx, &ec2.DescribeNetworkInterfacesInput{DryRun: aws.Bool(true)})
		add("ec2:DescribeNetworkInterfaces", dryRun(err))
	}
	if l.Isolate == nil {
		return aws.ToString(me.Arn), findings, nil
	}
	subnets, err := c.ec2.DescribeSubnets(ctx, &ec2.DescribeSubnetsInput{SubnetIds: l.Subnets})
	add("ec2:DescribeSubnets", classify(err))
	vpc := "vpc-00000000000000000"
	if err == nil && len(subnets.Subnets) > 0 {
		vpc = aws.ToString(subnets.Subnets[0].VpcId)
		for _, s := range subnets.Subnets {
			if aws.ToString(s.VpcId) != vpc {
				add("subnets", fmt.Errorf("%w: %s is in %s, and %s in %s", bastion.ErrConfig, aws.ToString(s.SubnetId), aws.ToString(s.VpcId), aws.ToString(subnets.Subnets[0].SubnetId), vpc))
			}
		}
	}
	id := aws.String("sg-00000000000000000")
	yes := aws.Bool(true)
	some := []types.IpPermission{{IpProtocol: aws.String("tcp"), FromPort: aws.Int32(agentPort), ToPort: aws.Int32(agentPort), IpRanges: []types.IpRange{{CidrIp: aws.String("127.0.0.1/32")}}}}
	for _, try := range []struct {
		action string
		call   func() error
	}{
		{"ec2:DescribeSecurityGroups", func() error {
			_, err := c.ec2.DescribeSecurityGroups(ctx, &ec2.DescribeSecurityGroupsInput{DryRun: yes})
			return err
		}},
		{"ec2:CreateSecurityGroup", func() error {
			_, err := c.ec2.CreateSecurityGroup(ctx, &ec2.CreateSecurityGroupInput{DryRun: yes, GroupName: aws.String("sallyport/check"), Description: aws.String("a check of permissions"), VpcId: &vpc,
				TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeSecurityGroup, Tags: []types.Tag{{Key: aws.String("sallyport:deployment"), Value: &c.deployment}}}}})
			return err
		}},
		{"ec2:AuthorizeSecurityGroupIngress", func() error {
			_, err := c.ec2.AuthorizeSecurityGroupIngress(ctx, &ec2.AuthorizeSecurityGroupIngressInput{DryRun: yes, GroupId: id, IpPermissions: some})
			return err
		}},
		{"ec2:AuthorizeSecurityGroupEgress", func() error {
			_, err := c.ec2.AuthorizeSecurityGroupEgress(ctx, &ec2.AuthorizeSecurityGroupEgressInput{DryRun: yes, GroupId: id, IpPermissions: some})
			return err
		}},
		{"ec2:RevokeSecurityGroupIngress", func() error {
			_, err := c.ec2.RevokeSecurityGroupIngress(ctx, &ec2.RevokeSecurityGroupIngressInput{DryRun: yes, GroupId: id, IpPermissions: some})
			return err
		}},
		{"ec2:RevokeSecurityGroupEgress", func() error {
			_, err := c.ec2.RevokeSecurityGroupEgress(ctx, &ec2.RevokeSecurityGroupEgressInput{DryRun: yes, GroupId: id, IpPermissions: some})
			return err
		}},
		{"ec2:DeleteSecurityGroup", func() error {
			_, err := c.ec2.DeleteSecurityGroup(ctx, &ec2.DeleteSecurityGroupInput{DryRun: yes, GroupId: id})
			return err
		}},
	} {
		add(try.action, dryRun(try.call()))
	}
	return aws.ToString(me.Arn), findings, nil
}

// dryRun turns EC2's answer to a dry run into nil if it would have been permitted.
func dryRun(err error) error {
	var api smithy.APIError
	if errors.As(err, &api) {
		switch api.ErrorCode() {
		case "DryRunOperation", "InvalidGroup.NotFound":
			return nil
		}
	}
	return classify(err)
}
