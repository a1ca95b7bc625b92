package fargate

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"hash/fnv"
	"strconv"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
)

// The environment of an agent: flags of "bastion-agent serve", and values for List.
// Unlike tags, overrides remain after a task has stopped, and cannot be changed.
const (
	envOwner       = "SALLYPORT_OWNER"
	envAccount     = "SALLYPORT_ACCOUNT"
	envGroups      = "SALLYPORT_GROUPS"
	envFleetKey    = "SALLYPORT_FLEET_KEY"
	envPrincipal   = "SALLYPORT_PRINCIPAL"
	envIdle        = "SALLYPORT_IDLE"
	envMaxLife     = "SALLYPORT_MAX_LIFE"
	envMaxSessions = "SALLYPORT_MAX_SESSIONS"
	envMaxChannels = "SALLYPORT_MAX_CHANNELS"
	envAcceptEnv   = "SALLYPORT_ACCEPT_ENV"
	envContainer   = "SALLYPORT_CONTAINER_ENV"
	envTaskRole    = "SALLYPORT_TASK_ROLE"
	envProfile     = "SALLYPORT_PROFILE"
	envGeneration  = "SALLYPORT_GENERATION"
	envDeployment  = "SALLYPORT_DEPLOYMENT"
)

// request returns the RunTask input that launches a generation. It depends on the
// arguments and the configuration only, not on time, chance or state, because ECS
// returns the same task only for the same request.
func (l *Launcher) request(want bastion.Launch, group string) *ecs.RunTaskInput {
	c := l.Cloud
	env := []types.KeyValuePair{}
	set := func(name, value string) {
		env = append(env, types.KeyValuePair{Name: aws.String(name), Value: aws.String(value)})
	}
	generation := strconv.FormatInt(want.Generation, 10)
	set(envOwner, want.Owner.User)
	set(envProfile, want.Owner.Profile)
	set(envDeployment, c.deployment)
	set(envGeneration, generation)
	set(envAccount, l.Account)
	set(envGroups, cmp.Or(strings.Join(l.Groups, ","), "none")) // overrides a value in the image
	set(envFleetKey, sshca.FormatKeys(l.FleetKeys))
	set(envPrincipal, l.token(want.Owner, want.Generation))
	set(envIdle, want.Idle.String())
	set(envMaxLife, want.MaxLife.String())
	set(envAcceptEnv, cmp.Or(strings.Join(l.AcceptEnv, ","), "none"))
	set(envContainer, "true")
	set(envTaskRole, strconv.FormatBool(l.TaskRole != "")) // overrides a value in the image
	for _, f := range want.Forwarding.Flags() {
		set("SALLYPORT_"+strings.ToUpper(strings.ReplaceAll(f[0], "-", "_")), f[1])
	}
	if l.MaxSessions > 0 {
		set(envMaxSessions, strconv.Itoa(l.MaxSessions))
	}
	if l.MaxChannels > 0 {
		set(envMaxChannels, strconv.Itoa(l.MaxChannels))
	}

	overrides := &types.TaskOverride{
		ContainerOverrides: []types.ContainerOverride{{Name: &l.Container, Environment: env}},
	}
	if l.CPU > 0 {
		overrides.Cpu = aws.String(strconv.Itoa(l.CPU))
	}
	if l.Memory > 0 {
		overrides.Memory = aws.String(strconv.Itoa(l.Memory))
	}
	if l.EphemeralStorage > 0 {
		overrides.EphemeralStorage = &types.EphemeralStorage{SizeInGiB: int32(l.EphemeralStorage)}
	}
	if l.TaskRole != "" {
		overrides.TaskRoleArn = &l.TaskRole
	}

	groups := l.SecurityGroups
	if group != "" {
		groups = append([]string{group}, groups...)
	}
	network := &types.AwsVpcConfiguration{
		Subnets:        []string{l.subnet(want)},
		SecurityGroups: groups,
		AssignPublicIp: types.AssignPublicIpDisabled,
	}
	if l.AssignPublicIP {
		network.AssignPublicIp = types.AssignPublicIpEnabled
	}

	tag := func(name, value string) types.Tag {
		return types.Tag{Key: aws.String("sallyport:" + name), Value: aws.String(value)}
	}
	in := &ecs.RunTaskInput{
		Cluster:              &l.Cluster,
		TaskDefinition:       &l.TaskDefinition,
		Count:                aws.Int32(1),
		ClientToken:          aws.String(l.token(want.Owner, want.Generation)),
		StartedBy:            aws.String(c.startedBy()),
		NetworkConfiguration: &types.NetworkConfiguration{AwsvpcConfiguration: network},
		Overrides:            overrides,
		Tags: []types.Tag{
			tag("user", want.Owner.User),
			tag("profile", want.Owner.Profile),
			tag("generation", generation),
			tag("deployment", c.deployment),
		},
	}
	if l.PlatformVersion != "" {
		in.PlatformVersion = &l.PlatformVersion
	}
	// Fargate does not fall back from Spot to on-demand by itself.
	if l.spot(want) {
		in.CapacityProviderStrategy = []types.CapacityProviderStrategyItem{{CapacityProvider: aws.String("FARGATE_SPOT"), Weight: 1}}
	} else {
		in.LaunchType = types.LaunchTypeFargate
	}
	return in
}

// spot reports whether a launch asks for Spot: only the first attempt does.
func (l *Launcher) spot(want bastion.Launch) bool { return l.Spot && want.Attempt == 0 }

// subnet returns the subnet of a generation. An owner's first one depends on a hash
// of the owner's name, and each generation is in the next.
func (l *Launcher) subnet(want bastion.Launch) string {
	h := fnv.New32a()
	h.Write([]byte(want.Owner.String()))
	n := uint64(len(l.Subnets))
	return l.Subnets[(uint64(h.Sum32())+uint64(want.Generation))%n]
}

// token returns the client token of a generation: 52 characters. It is also the
// agent's principal, because the task's ARN is not known before the launch.
func (l *Launcher) token(owner bastion.Owner, generation int64) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\n%s\n%s\n%s\n%d", shortName(l.Cluster), l.Cloud.deployment, owner.User, owner.Profile, generation))
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:]))
}

// shortName returns the name of a cluster, given its name or its ARN.
func shortName(cluster string) string { return cluster[strings.LastIndexByte(cluster, '/')+1:] }

// clusterOf returns the name of the cluster in a task's ARN; empty if there is none,
// as in the format before 2018.
func clusterOf(task string) string {
	_, path, _ := strings.Cut(task, ":task/")
	cluster, _, ok := strings.Cut(path, "/")
	if !ok {
		return ""
	}
	return cluster
}

// startedBy is the same for all tasks of a deployment, so that ListTasks can filter
// by it.
func (c *Cloud) startedBy() string { return "sallyport/" + c.deployment }

// subnets returns the subnets of a request.
func subnets(in *ecs.RunTaskInput) []string {
	return in.NetworkConfiguration.AwsvpcConfiguration.Subnets
}

// environment returns the value of a variable in a task's overrides.
func environment(t types.Task, name string) string {
	if t.Overrides == nil {
		return ""
	}
	for _, c := range t.Overrides.ContainerOverrides {
		for _, v := range c.Environment {
			if aws.ToString(v.Name) == name {
				return aws.ToString(v.Value)
			}
		}
	}
	return ""
}
