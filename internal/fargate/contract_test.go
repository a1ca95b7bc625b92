package fargate

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	ecstypes "github.com/aws/aws-sdk-go-v2/service/ecs/types"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// motoLacks are differences between moto 5.2 and the documentation of AWS, by the
// name of the subtest that fails because of them.
var motoLacks = map[string]string{
	"same generation, same task": "ignores clientToken, and starts a task each time",
	"age":                        "gives tasks no createdAt",
	"another request":            "ignores clientToken, so it sees no conflict",
	"public address":             "ignores assignPublicIp: its network interfaces have no public address",
	"unknown task is gone":       "DescribeTasks reports no failure for a task that it does not know",
	"stopping an unknown task":   "StopTask answers HTTP 500 for a task that it does not know",
	"group in use stays":         "deletes security groups that are in use",
	"wrong secret":               "does not check signatures",
}

// TestContract runs the launcher against a server of AWS's protocols, over HTTP and
// in real time: awsfake, or the endpoint in SALLYPORT_AWS, such as an independent
// implementation like moto. With that, the subtests in motoLacks are skipped.
func TestContract(t *testing.T) {
	endpoint := os.Getenv("SALLYPORT_AWS")
	foreign := endpoint != ""
	if !foreign {
		cloud := awsfake.New(newAgents(t))
		quick := awsfake.Fixed(20 * time.Millisecond)
		cloud.Times = awsfake.Times{Provisioning: quick, Pending: quick, Activating: quick, Reporting: quick, Deprovisioning: quick}
		server := httptest.NewServer(cloud)
		t.Cleanup(func() { cloud.Close(); server.Close() })
		endpoint = server.URL
	}
	for _, v := range awsfake.Environ(endpoint) {
		name, value, _ := strings.Cut(v, "=")
		t.Setenv(name, value)
	}
	cfg, err := Load(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	part := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			if why := motoLacks[name]; foreign && why != "" {
				t.Skip("moto " + why)
			}
			f(t)
		})
	}

	cluster, definition, subnets, group := awsfake.Cluster, awsfake.TaskDefinition, awsfake.Subnets, awsfake.SecurityGroup
	if foreign {
		definition, subnets, group = furnish(t, cfg, endpoint, cluster)
	}
	launcher := func(change func(*Launcher)) *Launcher {
		l := &Launcher{
			Cloud: NewCloud(cfg, "contract"), Profile: "default", FleetKeys: []ssh.PublicKey{sshtest.NewKey(t).PublicKey()},
			Options: Options{
				Cluster: cluster, TaskDefinition: definition, Container: "bastion", Account: "bastion",
				Subnets: subnets, SecurityGroups: []string{group},
			},
		}
		if !foreign {
			l.Cloud.pollEvery = 20 * time.Millisecond
		}
		if change != nil {
			change(l)
		}
		return l
	}
	l := launcher(nil)
	alice := bastion.Owner{User: "alice", Profile: "default"}
	want := bastion.Launch{Owner: alice, Generation: 1, Idle: 15 * time.Minute, MaxLife: time.Hour}
	var task bastion.Task

	part("launch", func(t *testing.T) {
		var err error
		if task, err = l.Launch(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(task.ID, "arn:aws:ecs:") || task.Generation != 1 || task.Principal == "" || !strings.HasSuffix(task.Addr, ":2022") {
			t.Errorf("got %+v", task)
		}
		if err := l.Alive(t.Context(), alice, task.ID); err != nil {
			t.Error(err)
		}
		if task.ID == "" {
			t.FailNow()
		}
	})
	part("attributes of the task", func(t *testing.T) {
		out, err := l.Cloud.ecs.DescribeTasks(t.Context(), &ecs.DescribeTasksInput{Cluster: &cluster, Tasks: []string{task.ID}, Include: []ecstypes.TaskField{ecstypes.TaskFieldTags}})
		if err != nil || len(out.Tasks) != 1 {
			t.Fatal(out, err)
		}
		got := out.Tasks[0]
		tags := map[string]string{}
		for _, tag := range got.Tags {
			tags[aws.ToString(tag.Key)] = aws.ToString(tag.Value)
		}
		if tags["sallyport:user"] != "alice" || tags["sallyport:profile"] != "default" || tags["sallyport:generation"] != "1" || tags["sallyport:deployment"] != "contract" {
			t.Errorf("tags %v", tags)
		}
		if environment(got, envOwner) != "alice" || environment(got, envPrincipal) != task.Principal || got.LaunchType != ecstypes.LaunchTypeFargate || aws.ToString(got.StartedBy) != l.Cloud.startedBy() {
			t.Errorf("task %+v", got)
		}
	})
	part("same generation, same task", func(t *testing.T) {
		again, err := l.Launch(t.Context(), want)
		if err != nil || again.ID != task.ID {
			t.Errorf("got %+v, %v; want %s", again, err, task.ID)
		}
	})
	part("another request", func(t *testing.T) {
		other := launcher(func(x *Launcher) { x.FleetKeys = l.FleetKeys; x.CPU, x.Memory = 512, 1024 })
		again, err := other.Launch(t.Context(), want)
		if err != nil || again.ID != task.ID {
			t.Errorf("after a change of the configuration: %+v, %v; want the task that runs", again, err)
		}
	})
	part("list", func(t *testing.T) {
		sshtest.Eventually(t, "List has the task", func() bool {
			found, err := l.List(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return slices.ContainsFunc(found, func(o bastion.OwnedTask) bool {
				return o.Owner == alice && o.Task.ID == task.ID && o.Task.Generation == 1 && o.Task.Principal == task.Principal && o.Task.Addr == task.Addr
			})
		})
	})
	part("adopt", func(t *testing.T) {
		ledger := &bastion.Memory{}
		d := &bastion.Dialer{Ledger: ledger, Settings: bastion.Settings{Profiles: map[string]bastion.Profile{"default": {Launcher: l}}}, Log: slog.New(slog.DiscardHandler)}
		if err := d.Adopt(t.Context()); err != nil {
			t.Fatal(err)
		}
		entry, err := ledger.Get(t.Context(), alice)
		if err != nil || entry.State != bastion.Running || entry.Generation != 1 || entry.Task.ID != task.ID || entry.Task.Addr != task.Addr || entry.Task.Principal != task.Principal {
			t.Errorf("adopted as %+v, %v; want %+v", entry, err, task)
		}
	})
	part("age", func(t *testing.T) {
		found, err := l.List(t.Context())
		if err != nil || len(found) == 0 {
			t.Fatal(found, err)
		}
		for _, o := range found { // Started is by the launcher's clock
			if age := time.Since(o.Started); age < -time.Minute || age > 5*time.Minute {
				t.Errorf("started %v ago", age)
			}
		}
	})
	part("stop", func(t *testing.T) {
		for range 2 {
			if err := l.Stop(t.Context(), alice, task.ID); err != nil {
				t.Error(err)
			}
		}
		sshtest.Eventually(t, "the ended task is gone", func() bool { return errors.Is(l.Alive(t.Context(), alice, task.ID), bastion.ErrGone) })
		found, err := l.List(t.Context())
		if err != nil || slices.ContainsFunc(found, func(o bastion.OwnedTask) bool { return o.Task.ID == task.ID }) {
			t.Errorf("listed after the end: %+v, %v", found, err)
		}
	})
	unknown := task.ID[:len(task.ID)-8] + "00000000"
	part("unknown task is gone", func(t *testing.T) {
		sshtest.Eventually(t, "an unknown task is gone", func() bool { return errors.Is(l.Alive(t.Context(), alice, unknown), bastion.ErrGone) })
	})
	part("stopping an unknown task", func(t *testing.T) {
		if err := l.Stop(t.Context(), alice, unknown); err != nil {
			t.Error(err)
		}
	})
	part("public address", func(t *testing.T) {
		public := launcher(func(l *Launcher) { l.AssignPublicIP, l.ConnectPublic = true, true })
		got, err := public.Launch(t.Context(), bastion.Launch{Owner: bastion.Owner{User: "bob", Profile: "default"}, Generation: 1, Idle: time.Minute, MaxLife: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		if err := public.Stop(t.Context(), alice, got.ID); err != nil {
			t.Error(err)
		}
	})

	part("a user's task definition", func(t *testing.T) {
		own := launcher(ownDefinitions)
		registered, err := l.Cloud.ecs.RegisterTaskDefinition(t.Context(), &ecs.RegisterTaskDefinitionInput{
			Family: aws.String("sallyport-user-erin"), NetworkMode: ecstypes.NetworkModeAwsvpc,
			RequiresCompatibilities: []ecstypes.Compatibility{ecstypes.CompatibilityFargate}, Cpu: aws.String("256"), Memory: aws.String("512"),
			ContainerDefinitions: []ecstypes.ContainerDefinition{{Name: aws.String("bastion"), Image: aws.String("erin:1"), Cpu: 256, Memory: aws.Int32(512), Essential: aws.Bool(true)}},
			Tags:                 []ecstypes.Tag{{Key: aws.String("sallyport:user"), Value: aws.String("erin")}},
		})
		if err != nil {
			t.Fatal(err)
		}
		hers := aws.ToString(registered.TaskDefinition.TaskDefinitionArn)
		for user, want := range map[string]string{"erin": hers, "frank": definition} {
			got, err := own.Launch(t.Context(), bastion.Launch{Owner: bastion.Owner{User: user, Profile: "default"}, Generation: 1, Idle: time.Minute, MaxLife: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			out, err := l.Cloud.ecs.DescribeTasks(t.Context(), &ecs.DescribeTasksInput{Cluster: &cluster, Tasks: []string{got.ID}})
			if err != nil || len(out.Tasks) != 1 || !strings.HasSuffix(aws.ToString(out.Tasks[0].TaskDefinitionArn), want) {
				t.Errorf("%s: got %+v, %v; want the definition %s", user, out, err, want)
			}
			if err := own.Stop(t.Context(), alice, got.ID); err != nil {
				t.Error(err)
			}
		}
	})

	isolated := launcher(func(l *Launcher) {
		l.Isolate = &Isolation{Ingress: []string{group, "10.9.0.0/16"}, Egress: []Rule{{"tcp", 443, 443, "10.0.0.0/8"}}}
	})
	carol := bastion.Owner{User: "carol", Profile: "default"}
	groupsOf := func(t *testing.T) []ec2types.SecurityGroup {
		out, err := l.Cloud.ec2.DescribeSecurityGroups(t.Context(), &ec2.DescribeSecurityGroupsInput{Filters: []ec2types.Filter{filter("tag:sallyport:user", "carol")}})
		if err != nil {
			t.Fatal(err)
		}
		return out.SecurityGroups
	}
	part("isolate", func(t *testing.T) {
		var ids []string
		for generation := range int64(2) { // the second finds the group of the first
			got, err := isolated.Launch(t.Context(), bastion.Launch{Owner: carol, Generation: generation + 1, Idle: time.Minute, MaxLife: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, got.ID)
			found := groupsOf(t)
			if len(found) != 1 {
				t.Fatalf("%d groups", len(found))
			}
			in, out := rules(found[0].IpPermissions), rules(found[0].IpPermissionsEgress)
			wantIn := []Rule{{"tcp", 2022, 2022, group}, {"tcp", 2022, 2022, "10.9.0.0/16"}}
			if missing, extra := difference(wantIn, in); missing != nil || extra != nil {
				t.Errorf("ingress %v", in)
			}
			if missing, extra := difference(isolated.Isolate.Egress, out); missing != nil || extra != nil {
				t.Errorf("egress %v", out)
			}
			isolated.forgetGroup(carol) // as after a restart
		}
		t.Run("rules that change", func(t *testing.T) {
			isolated.Isolate.Egress = []Rule{{"-1", -1, -1, "0.0.0.0/0"}}
			got, err := isolated.Launch(t.Context(), bastion.Launch{Owner: carol, Generation: 3, Idle: time.Minute, MaxLife: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, got.ID)
			if missing, extra := difference(isolated.Isolate.Egress, rules(groupsOf(t)[0].IpPermissionsEgress)); missing != nil || extra != nil {
				t.Errorf("missing %v, too many %v", missing, extra)
			}
		})
		part("group in use stays", func(t *testing.T) {
			if err := isolated.Cloud.deleteGroup(t.Context(), carol, aws.ToString(groupsOf(t)[0].GroupId)); err != nil {
				t.Error(err)
			}
			if len(groupsOf(t)) != 1 {
				t.Error("deleted")
			}
		})
		for _, id := range ids {
			if err := isolated.Stop(t.Context(), carol, id); err != nil {
				t.Error(err)
			}
		}
		sshtest.Eventually(t, "unused groups are deleted", func() bool {
			if err := isolated.Cloud.DeleteUnusedGroups(t.Context(), nil, map[string]bastion.Launcher{isolated.Profile: isolated}); err != nil {
				t.Fatal(err)
			}
			isolated.Cloud.groups.mu.Lock()
			for id := range isolated.Cloud.groups.unused { // an hour later
				isolated.Cloud.groups.unused[id] = time.Now().Add(-groupIdle)
			}
			isolated.Cloud.groups.mu.Unlock()
			return len(groupsOf(t)) == 0
		})
	})

	for name, change := range map[string]func(*Launcher){
		"no such cluster":         func(l *Launcher) { l.Cluster = "other" },
		"no such task definition": func(l *Launcher) { l.TaskDefinition = "other:1" },
	} {
		part(name, func(t *testing.T) {
			if _, err := launcher(change).Launch(t.Context(), bastion.Launch{Owner: alice, Generation: 9, Idle: time.Minute, MaxLife: time.Hour}); !errors.Is(err, bastion.ErrConfig) {
				t.Errorf("got %v", err)
			}
		})
	}
	part("wrong secret", func(t *testing.T) {
		t.Setenv("AWS_SECRET_ACCESS_KEY", "wrong")
		cfg, err := config.LoadDefaultConfig(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		wrong := launcher(func(x *Launcher) { x.Cloud = NewCloud(cfg, "contract") })
		if _, err := wrong.Launch(t.Context(), bastion.Launch{Owner: alice, Generation: 9, Idle: time.Minute, MaxLife: time.Hour}); !errors.Is(err, bastion.ErrDenied) {
			t.Errorf("got %v", err)
		}
	})
}

// furnish creates, at another endpoint, the resources that awsfake has from the
// start.
func furnish(t *testing.T, cfg aws.Config, endpoint, cluster string) (definition string, subnets []string, group string) {
	// Without this, moto advances a task to its next status with each
	// DescribeTasks, until it has stopped.
	resp, err := http.Post(endpoint+"/moto-api/state-manager/set-transition", "application/json",
		strings.NewReader(`{"model_name":"ecs::task","transition":{"progression":"manual","times":1000000}}`))
	if err != nil {
		t.Fatal(err)
	}
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode/100 != 2 {
		t.Fatalf("%s: %s", resp.Status, body)
	}
	resp.Body.Close()
	e, n := ecs.NewFromConfig(cfg), ec2.NewFromConfig(cfg)
	if _, err := e.CreateCluster(t.Context(), &ecs.CreateClusterInput{ClusterName: &cluster}); err != nil {
		t.Fatal(err)
	}
	registered, err := e.RegisterTaskDefinition(t.Context(), &ecs.RegisterTaskDefinitionInput{
		Family: aws.String("sallyport-bastion"), NetworkMode: ecstypes.NetworkModeAwsvpc,
		RequiresCompatibilities: []ecstypes.Compatibility{ecstypes.CompatibilityFargate}, Cpu: aws.String("256"), Memory: aws.String("512"),
		ContainerDefinitions: []ecstypes.ContainerDefinition{{Name: aws.String("bastion"), Image: aws.String("sallyport-bastion:1"), Cpu: 256, Memory: aws.Int32(512), Essential: aws.Bool(true)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	found, err := n.DescribeSubnets(t.Context(), &ec2.DescribeSubnetsInput{})
	if err != nil || len(found.Subnets) == 0 {
		t.Fatal("no subnets", err)
	}
	vpc := found.Subnets[0].VpcId
	for _, s := range found.Subnets {
		if aws.ToString(s.VpcId) == aws.ToString(vpc) {
			subnets = append(subnets, aws.ToString(s.SubnetId))
		}
	}
	made, err := n.CreateSecurityGroup(t.Context(), &ec2.CreateSecurityGroupInput{GroupName: aws.String("gateway"), Description: aws.String("The gateway"), VpcId: vpc})
	if err != nil {
		t.Fatal(err)
	}
	return aws.ToString(registered.TaskDefinition.TaskDefinitionArn), subnets, aws.ToString(made.GroupId)
}
