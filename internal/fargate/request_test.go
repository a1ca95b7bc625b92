package fargate

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

var alice = bastion.Launch{Owner: bastion.Owner{User: "alice", Profile: "default"}, Generation: 3, Idle: 15 * time.Minute, MaxLife: 12 * time.Hour}

func TestRequestIsFrozen(t *testing.T) {
	fleet := sshtest.NewKey(t)
	launcher := func() *Launcher {
		return &Launcher{
			Cloud:     NewCloud(aws.Config{Region: "eu-west-1"}, "prod"),
			FleetKeys: []ssh.PublicKey{fleet.PublicKey()},
			Profile:   "default",
			Options: Options{
				Cluster: "sallyport", TaskDefinition: "sallyport-bastion:7", Container: "bastion", Account: "bastion",
				Subnets: []string{"subnet-1", "subnet-2", "subnet-3"}, SecurityGroups: []string{"sg-1"},
				AcceptEnv: []string{"LANG", "LC_*"},
			},
			MaxSessions: 10, MaxChannels: 300,
		}
	}
	first := launcher().request(alice, "")
	time.Sleep(time.Millisecond)
	if again := launcher().request(alice, ""); !reflect.DeepEqual(first, again) {
		t.Errorf("two gateways, or one a moment later, send\n%+v and\n%+v", first, again)
	}
	if token := aws.ToString(first.ClientToken); len(token) > 64 || token == "" {
		t.Errorf("token %q", token)
	}
	text, err := json.Marshal(first)
	if err != nil {
		t.Fatal(err)
	}
	if seed := string(ssh.MarshalAuthorizedKey(fleet.PublicKey())); !strings.Contains(string(text), strings.Fields(seed)[1]) {
		t.Error("the agent is not told whom to trust")
	}

	if !strings.Contains(string(text), `{"Name":"SALLYPORT_MAX_CHANNELS","Value":"300"}`) {
		t.Errorf("the agent is not told how many channels there may be: %s", text)
	}

	byARN := launcher()
	byARN.Cluster = "arn:aws:ecs:eu-west-1:123456789012:cluster/sallyport"
	if a, b := launcher().token(alice.Owner, 3), byARN.token(alice.Owner, 3); a != b {
		t.Error("the token depends on how the cluster is named")
	}
	seen := map[string]bool{}
	for _, deployment := range []string{"prod", "test"} {
		for _, user := range []string{"alice", "alice2"} {
			for _, profile := range []string{"default", "2default"} {
				for _, generation := range []int64{1, 11} {
					l := launcher()
					l.Cloud.deployment = deployment
					seen[l.token(bastion.Owner{User: user, Profile: profile}, generation)] = true
				}
			}
		}
	}
	if len(seen) != 16 {
		t.Errorf("%d different tokens, want 16", len(seen))
	}

	// Consecutive generations are launched in different subnets.
	var zones []string
	for generation := range int64(3) {
		want := alice
		want.Generation = generation
		zones = append(zones, launcher().subnet(want))
	}
	if zones[0] == zones[1] || zones[1] == zones[2] || zones[0] == zones[2] {
		t.Errorf("subnets %v", zones)
	}
}

func TestRequestOptions(t *testing.T) {
	l := &Launcher{
		Cloud:     NewCloud(aws.Config{Region: "eu-west-1"}, "prod"),
		FleetKeys: []ssh.PublicKey{sshtest.NewKey(t).PublicKey()},
		Options: Options{
			Subnets: []string{"subnet-1"}, SecurityGroups: []string{"sg-1"}, Container: "bastion",
			AssignPublicIP: true, ConnectPublic: true, Spot: true, CPU: 1024, Memory: 2048, EphemeralStorage: 50, TaskRole: "arn:aws:iam::123456789012:role/x", PlatformVersion: "1.4.0",
		},
	}
	in := l.request(alice, "sg-alice")
	network := in.NetworkConfiguration.AwsvpcConfiguration
	if network.AssignPublicIp != types.AssignPublicIpEnabled || !reflect.DeepEqual(network.SecurityGroups, []string{"sg-alice", "sg-1"}) {
		t.Errorf("network %+v", network)
	}
	if o := in.Overrides; aws.ToString(o.Cpu) != "1024" || aws.ToString(o.Memory) != "2048" || o.EphemeralStorage.SizeInGiB != 50 || aws.ToString(o.TaskRoleArn) != l.TaskRole {
		t.Errorf("overrides %+v", o)
	}
	granted := func(in *ecs.RunTaskInput) string {
		return environment(types.Task{Overrides: in.Overrides}, envTaskRole)
	}
	l.TaskRole = ""
	if with, without := granted(in), granted(l.request(alice, "")); with != "true" || without != "false" {
		t.Errorf("the agent is told that the task role is granted: %q with one, %q without", with, without)
	}
	agent := func(l *Launcher) string {
		return environment(types.Task{Overrides: l.request(alice, "").Overrides}, envAcceptEnv)
	}
	if got := agent(l); got != "none" { // overrides the image and the task definition
		t.Errorf("without AcceptEnv the agent is told %q", got)
	}
	l.AcceptEnv = []string{"LANG", "LC_*"}
	if got := agent(l); got != "LANG,LC_*" {
		t.Errorf("the agent is told %q", got)
	}
	groups := func() string { return environment(types.Task{Overrides: l.request(alice, "").Overrides}, envGroups) }
	if got := groups(); got != "none" { // overrides the image and the task definition
		t.Errorf("without Groups the agent is told %q", got)
	}
	l.Groups = []string{"sudo", "adm"}
	if got := groups(); got != "sudo,adm" {
		t.Errorf("the agent is told %q", got)
	}
	if len(l.SecurityGroups) != 1 {
		t.Error("the launcher's own groups were changed")
	}
	if in.LaunchType != "" || len(in.CapacityProviderStrategy) != 1 || aws.ToString(in.CapacityProviderStrategy[0].CapacityProvider) != "FARGATE_SPOT" {
		t.Errorf("the first attempt is not for Spot: %+v", in)
	}
	again := alice
	again.Attempt = 1
	if in := l.request(again, ""); in.LaunchType != types.LaunchTypeFargate || in.CapacityProviderStrategy != nil {
		t.Errorf("the second attempt is not on demand: %+v", in)
	}
}
