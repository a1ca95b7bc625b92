package fargate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// A Finding is the result of Check for one action.
type Finding struct {
	// Action is its IAM name, such as "ecs:RunTask".
	Action string
	// Err is nil if the action is permitted, wraps bastion.ErrDenied if not,
	// and is another error if the request failed otherwise.
	Err error
	// Unseen, if not empty, is the reason why the permission cannot be
	// determined; then Err is nil.
	Unseen string
}

// Check asks AWS, for each action that this launcher needs, whether the gateway is
// permitted it. It also checks that cluster, task definition and container exist,
// and subnets and groups if the gateway may describe them, and the own task
// definitions of these users, if the profile permits such. It starts and changes
// nothing: EC2 has a dry run, and the requests to ECS are such that it refuses them
// for another reason after it has found them permitted. All of them are within the
// policy of docs/iam.md. Caller is the gateway's identity at AWS.
func (l *Launcher) Check(ctx context.Context, users []string) (caller string, findings []Finding, err error) {
	me, err := l.Cloud.sts.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
	if err != nil {
		return "", nil, fmt.Errorf("asking AWS for the caller's identity: %w", err)
	}
	definitions := []string{l.TaskDefinition}
	var checks []check
	if l.UserTaskDefinitions != "" {
		own, err := l.checkDefinitions(ctx, users)
		checks = append(checks, check{actions: []string{"ecs:DescribeTaskDefinition"}, call: func(context.Context) error { return err }})
		if len(own) > 0 {
			definitions = append(definitions, own[0]) // the policy has a pattern for all of them
		}
	}
	checks = slices.Concat(checks, l.taskChecks(definitions), l.networkChecks())
	if l.Isolate != nil {
		checks = append(checks, l.groupChecks(ctx)...)
	}
	for _, c := range checks {
		findings = append(findings, c.run(ctx)...)
	}
	return aws.ToString(me.Arn), findings, nil
}

// A check is a request that shows whether actions are permitted.
type check struct {
	actions []string
	// call returns nil if all actions are permitted and the request is valid.
	call func(context.Context) error
	// advice, if not empty, replaces a denial that does not prove that a
	// permission which the gateway needs is missing.
	advice string
	// unproven, if not empty, is one more action, which call finds denied but
	// cannot find permitted, and unprovenAdvice the reason.
	unproven, unprovenAdvice string
}

// run returns a finding for each action. AWS names only the first action that is
// denied; the others are then hidden by it.
func (c check) run(ctx context.Context) []Finding {
	err := classify(c.call(ctx))
	var findings []Finding
	switch denied := cmp.Or(deniedAction(err), c.actions[0]); {
	case err == nil:
		for _, action := range c.actions {
			findings = append(findings, Finding{Action: action})
		}
	case c.advice != "" && errors.Is(err, bastion.ErrDenied):
		return []Finding{{Action: c.actions[0], Unseen: c.advice}}
	default:
		findings = append(findings, Finding{Action: denied, Err: err})
		for _, action := range c.actions {
			if action != denied {
				findings = append(findings, Finding{Action: action, Unseen: "hidden by " + denied})
			}
		}
	}
	if c.unproven != "" && findings[0].Action != c.unproven {
		findings = append(findings, Finding{Action: c.unproven, Unseen: c.unprovenAdvice})
	}
	return findings
}

// taskChecks are the actions of ECS on tasks, which the gateway starts with these task
// definitions.
func (l *Launcher) taskChecks(definitions []string) []check {
	noTask := aws.String("00000000000000000000000000000000")
	return []check{
		{actions: []string{"ecs:ListTasks"}, call: func(ctx context.Context) error {
			_, err := l.Cloud.ecs.ListTasks(ctx, &ecs.ListTasksInput{Cluster: &l.Cluster, StartedBy: aws.String(l.Cloud.startedBy())})
			return err
		}},
		{actions: []string{"ecs:DescribeTasks"}, call: func(ctx context.Context) error {
			_, err := l.Cloud.ecs.DescribeTasks(ctx, &ecs.DescribeTasksInput{Cluster: &l.Cluster, Tasks: []string{*noTask}})
			return err
		}},
		{actions: []string{"ecs:StopTask"}, call: func(ctx context.Context) error {
			_, err := l.Cloud.ecs.StopTask(ctx, &ecs.StopTaskInput{Cluster: &l.Cluster, Task: noTask, Reason: aws.String("a check of permissions")})
			if notFound(err) {
				return nil
			}
			return err
		}},
		{actions: []string{"ecs:RunTask", "ecs:TagResource"}, call: func(ctx context.Context) error {
			for _, definition := range definitions {
				if err := l.checkRunTask(ctx, definition); err != nil {
					return err
				}
			}
			return nil
		},
			unproven: "iam:PassRole", unprovenAdvice: "only seen when a task starts"},
	}
}

// checkRunTask calls RunTask without a network, so that no Fargate task can start.
func (l *Launcher) checkRunTask(ctx context.Context, definition string) error {
	in := l.request(bastion.Launch{Owner: bastion.Owner{User: "check", Profile: l.Profile}}, "")
	in.TaskDefinition, in.ClientToken, in.NetworkConfiguration = &definition, nil, nil
	out, err := l.Cloud.ecs.RunTask(ctx, in)
	switch {
	case err == nil && len(out.Tasks) > 0:
		return l.Stop(ctx, bastion.Owner{}, aws.ToString(out.Tasks[0].TaskArn))
	case hasCode(err, "InvalidParameterException") && strings.Contains(strings.ToLower(err.Error()), "network configuration"):
		return nil // "Network Configuration must be provided when networkMode 'awsvpc' is specified."
	}
	return err
}

// networkChecks are the actions that describe networks. Without Isolate, the
// gateway does not need those for subnets and groups.
func (l *Launcher) networkChecks() []check {
	api := l.Cloud.ec2
	advice := func(things string) string {
		if l.Isolate != nil {
			return ""
		}
		return "not needed; whether the " + things + " exist is seen when a task starts"
	}
	var checks []check
	if l.ConnectPublic {
		checks = append(checks, check{actions: []string{"ec2:DescribeNetworkInterfaces"}, call: func(ctx context.Context) error {
			_, err := api.DescribeNetworkInterfaces(ctx, &ec2.DescribeNetworkInterfacesInput{DryRun: aws.Bool(true)})
			return dryRun(err)
		}})
	}
	return append(checks,
		check{actions: []string{"ec2:DescribeSubnets"}, call: l.checkSubnets, advice: advice("subnets")},
		check{actions: []string{"ec2:DescribeSecurityGroups"}, advice: advice("security groups"), call: func(ctx context.Context) error {
			in := &ec2.DescribeSecurityGroupsInput{GroupIds: l.SecurityGroups}
			if len(l.SecurityGroups) == 0 {
				in.DryRun = aws.Bool(true)
			}
			_, err := api.DescribeSecurityGroups(ctx, in)
			return dryRun(err)
		}})
}

// checkSubnets describes the subnets, which must be in one VPC.
func (l *Launcher) checkSubnets(ctx context.Context) error {
	out, err := l.Cloud.ec2.DescribeSubnets(ctx, &ec2.DescribeSubnetsInput{SubnetIds: l.Subnets})
	if err != nil {
		return err
	}
	for _, s := range out.Subnets {
		if first := out.Subnets[0]; aws.ToString(s.VpcId) != aws.ToString(first.VpcId) {
			return fmt.Errorf("%w: %s is in %s, and %s in %s", bastion.ErrConfig,
				aws.ToString(s.SubnetId), aws.ToString(s.VpcId), aws.ToString(first.SubnetId), aws.ToString(first.VpcId))
		}
	}
	return nil
}

// groupChecks are the actions that make, change and delete owners' security groups.
func (l *Launcher) groupChecks(ctx context.Context) []check {
	api, deployment := l.Cloud.ec2, l.Cloud.deployment
	yes := aws.Bool(true)
	checks := []check{{actions: []string{"ec2:CreateSecurityGroup", "ec2:CreateTags"}, call: func(ctx context.Context) error {
		vpc, err := l.findVPC(ctx)
		if err != nil {
			vpc = "vpc-00000000000000000" // DescribeSubnets has its own check
		}
		_, err = api.CreateSecurityGroup(ctx, &ec2.CreateSecurityGroupInput{
			DryRun: yes, GroupName: aws.String("sallyport/check"), Description: aws.String("a check of permissions"), VpcId: &vpc,
			TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeSecurityGroup, Tags: []types.Tag{{Key: aws.String("sallyport:deployment"), Value: &deployment}}}},
		})
		return dryRun(err)
	}}}

	// The permission to change a group can depend on its tags. Until the first
	// owner has a group, there is none with the right tags.
	id, exists := "sg-00000000000000000", false
	own, err := api.DescribeSecurityGroups(ctx, &ec2.DescribeSecurityGroupsInput{Filters: []types.Filter{filter("tag:sallyport:deployment", deployment)}})
	if err == nil && len(own.SecurityGroups) > 0 {
		id, exists = aws.ToString(own.SecurityGroups[0].GroupId), true
	}
	rules := permissions([]Rule{{"tcp", agentPort, agentPort, "127.0.0.1/32"}})
	for _, c := range []struct {
		action string
		call   func(context.Context) error
	}{
		{"ec2:AuthorizeSecurityGroupIngress", func(ctx context.Context) error {
			_, err := api.AuthorizeSecurityGroupIngress(ctx, &ec2.AuthorizeSecurityGroupIngressInput{DryRun: yes, GroupId: &id, IpPermissions: rules})
			return err
		}},
		{"ec2:AuthorizeSecurityGroupEgress", func(ctx context.Context) error {
			_, err := api.AuthorizeSecurityGroupEgress(ctx, &ec2.AuthorizeSecurityGroupEgressInput{DryRun: yes, GroupId: &id, IpPermissions: rules})
			return err
		}},
		{"ec2:RevokeSecurityGroupIngress", func(ctx context.Context) error {
			_, err := api.RevokeSecurityGroupIngress(ctx, &ec2.RevokeSecurityGroupIngressInput{DryRun: yes, GroupId: &id, IpPermissions: rules})
			return err
		}},
		{"ec2:RevokeSecurityGroupEgress", func(ctx context.Context) error {
			_, err := api.RevokeSecurityGroupEgress(ctx, &ec2.RevokeSecurityGroupEgressInput{DryRun: yes, GroupId: &id, IpPermissions: rules})
			return err
		}},
		{"ec2:DeleteSecurityGroup", func(ctx context.Context) error {
			_, err := api.DeleteSecurityGroup(ctx, &ec2.DeleteSecurityGroupInput{DryRun: yes, GroupId: &id})
			return err
		}},
	} {
		group := check{actions: []string{c.action}, call: func(ctx context.Context) error {
			err := dryRun(c.call(ctx))
			if !exists && hasCode(err, "InvalidGroup.NotFound") {
				return nil
			}
			return err
		}}
		if !exists {
			group.advice = "not permitted for a group without tags; seen once a user has a group"
		}
		checks = append(checks, group)
	}
	return checks
}

// deniedAction returns the action that AWS names as not permitted; empty if it names
// none.
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
