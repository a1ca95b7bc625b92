package fargate

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/ecs/types"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// TestAssignedButPrivate: without ConnectPublic, a task with a public address is
// reached at its private one, and DescribeNetworkInterfaces is not called.
func TestAssignedButPrivate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(func(l *Launcher) { l.AssignPublicIP = true })
		task := g.mustLogin(t, "alice")
		if !strings.HasPrefix(task.Addr, "10.") || account.calls(0)["ec2:DescribeNetworkInterfaces"] > 0 {
			t.Errorf("address %s, calls %v", task.Addr, account.calls(0))
		}
		in := g.launcher.request(bastion.Launch{Owner: bastion.Owner{User: "alice", Profile: "default"}}, "")
		if in.NetworkConfiguration.AwsvpcConfiguration.AssignPublicIp != types.AssignPublicIpEnabled {
			t.Error("the request assigns no public address")
		}
	})
}

// TestIPv6Only: in an IPv6-only subnet, a task's address is found in its container's
// network interface.
func TestIPv6Only(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		account.cloud.IPv6Only = true
		g := account.gateway(nil)
		task := g.mustLogin(t, "alice")
		if !strings.HasPrefix(task.Addr, "[fd00:") || !strings.HasSuffix(task.Addr, "]:2022") {
			t.Errorf("address %s", task.Addr)
		}
		time.Sleep(time.Minute)
		all, err := g.launcher.List(t.Context())
		if err != nil || len(all) != 1 || all[0].Task.Addr != task.Addr {
			t.Errorf("listed %+v, %v", all, err)
		}
	})
}

// TestPublicIP: with ConnectPublic, Dial connects to the public address. A start needs
// one call of DescribeNetworkInterfaces more.
func TestPublicIP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.dialer(&bastion.Memory{}, func(l *Launcher) { l.AssignPublicIP, l.ConnectPublic = true, true })
		g.NetDial = account.agents.dialPublic
		before := len(account.cloud.Calls())
		task := g.mustLogin(t, "alice")
		if calls := account.calls(before); calls["ecs:RunTask"] != 1 || calls["ec2:DescribeNetworkInterfaces"] != 1 {
			t.Errorf("calls %v", calls)
		}
		if !strings.HasPrefix(task.Addr, "203.") {
			t.Errorf("address %s", task.Addr)
		}
		for i := range 150 { // more than one call may describe
			if _, err := g.launcher.Launch(t.Context(), bastion.Launch{Owner: bastion.Owner{User: user(i), Profile: "default"}, Generation: 1}); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Minute) // until ECS reports them as RUNNING
		before = len(account.cloud.Calls())
		all, err := g.launcher.List(t.Context())
		if err != nil || len(all) != 151 {
			t.Fatalf("listed %d, %v", len(all), err)
		}
		if calls := account.calls(before); calls["ecs:ListTasks"] != 2 || calls["ecs:DescribeTasks"] != 2 || calls["ec2:DescribeNetworkInterfaces"] != 2 {
			t.Errorf("calls for 151 tasks: %v", calls)
		}
		// An interface is deleted before ECS reports its task as stopped.
		tasks, err := g.launcher.Cloud.list(t.Context(), g.launcher.Cluster)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range all[75:] {
			account.cloud.Stop(o.Task.ID, "EssentialContainerExited", "")
		}
		time.Sleep(time.Minute)
		addrs, err := g.launcher.addresses(t.Context(), tasks)
		if err != nil || len(addrs) != 75 {
			t.Errorf("%d addresses, %v; want those of 75", len(addrs), err)
		}
		for _, o := range all[:75] {
			if o.Task.Addr == "" || addrs[o.Task.ID] != o.Task.Addr {
				t.Errorf("%s: address %q, and then %q", o.Owner, o.Task.Addr, addrs[o.Task.ID])
			}
		}
		found, err := g.launcher.List(t.Context())
		if err != nil || len(found) != 75 || !slices.ContainsFunc(found, func(o bastion.OwnedTask) bool {
			return o.Owner.User == "alice" && o.Task.Addr == task.Addr && o.Task.Generation == 1
		}) {
			t.Errorf("listed %+v, %v", found, err)
		}
	})
}
