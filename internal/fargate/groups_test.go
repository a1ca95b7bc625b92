package fargate

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// TestGroups: an owner's security group is created at the first start, reused at
// later ones, updated if the configured rules change, and deleted an hour after its
// last use.
func TestGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		isolate := func(l *Launcher) {
			l.Isolate = &Isolation{Ingress: []string{awsfake.SecurityGroup, "10.9.0.0/16"}, Egress: []Rule{{"tcp", 443, 443, "0.0.0.0/0"}, {"-1", -1, -1, "fd00::/8"}}}
		}
		ledger := &bastion.Memory{} // as one that two gateways share
		g := account.dialer(ledger, isolate)
		before := len(account.cloud.Calls())
		g.mustLogin(t, "alice")
		if calls := account.calls(before); calls["ec2:CreateSecurityGroup"] != 1 {
			t.Errorf("first start: %v", calls)
		}
		account.cloud.StopAll("EssentialContainerExited", "")
		before = len(account.cloud.Calls())
		g.mustLogin(t, "alice")
		if calls := account.calls(before); len(calls) != 2 || calls["ecs:RunTask"] != 1 {
			t.Errorf("second start: %v", calls)
		}

		// Another gateway finds the group, and updates it to its own rules.
		other := account.dialer(ledger, func(l *Launcher) {
			isolate(l)
			l.Isolate.Egress[0].Peer = "10.0.0.0/8"
		})
		account.cloud.StopAll("EssentialContainerExited", "")
		before = len(account.cloud.Calls())
		other.mustLogin(t, "alice")
		calls := account.calls(before)
		if calls["ec2:CreateSecurityGroup"] != 0 || calls["ec2:RevokeSecurityGroupEgress"] != 1 || calls["ec2:AuthorizeSecurityGroupEgress"] != 1 || calls["ec2:AuthorizeSecurityGroupIngress"] != 0 {
			t.Errorf("with another rule: %v", calls)
		}

		// A group in use is kept. It is deleted once its owner has had no bastion
		// for an hour and its network interface is deleted.
		sweep := func(groups int) {
			t.Helper()
			if err := other.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			if left := account.groups(); len(left) != groups {
				t.Errorf("left: %v", left)
			}
		}
		sweep(1)
		time.Sleep(2 * time.Hour)
		sweep(1)
		account.cloud.Set(func() { account.cloud.Times.Deprovisioning = awsfake.Fixed(2 * time.Hour) }) // the interface is deleted late
		account.cloud.StopAll("EssentialContainerExited", "")
		time.Sleep(10 * time.Second)
		sweep(1)
		time.Sleep(groupIdle)
		sweep(1) // DependencyViolation
		time.Sleep(2 * time.Hour)
		sweep(0)
		// If the group in a gateway's cache was deleted, the gateway creates
		// another.
		g.mustLogin(t, "alice")
		other.mustLogin(t, "alice")
		account.live("alice")
	})
}

// TestGroupFaults: calls of EC2 fail at random. No bastion starts unless its group
// has the configured rules.
func TestGroupFaults(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		account.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
			if !strings.HasPrefix(c.Action, "ec2:") {
				return awsfake.Fault{}
			}
			switch rng.IntN(3) {
			case 0:
				return awsfake.Fault{LoseReply: true}
			case 1:
				return awsfake.ThrottledEC2
			}
			return awsfake.Fault{}
		}
		g := account.gateway(isolated)
		for range 40 {
			if _, err := g.login(t.Context(), "alice"); err == nil {
				break
			}
			account.live()
		}
		account.cloud.Set(func() { account.cloud.OnCall = nil })
		g.mustLogin(t, "alice")
		account.checkGroup(g, "alice")
	})
}

// TestRulesFail: if a group's rules cannot be updated, no bastion starts with it.
func TestRulesFail(t *testing.T) {
	for _, action := range []string{"RevokeSecurityGroupEgress", "AuthorizeSecurityGroupIngress", "AuthorizeSecurityGroupEgress"} {
		synctest.Test(t, func(t *testing.T) {
			account := newFakeAccount(t)
			defer account.end()
			g := account.gateway(isolated)
			account.cloud.Deny("ec2:"+action, true)
			for range 3 {
				_, err := g.login(t.Context(), "alice")
				account.must(err, bastion.ErrDenied)
				account.live()
			}
			account.cloud.Deny("ec2:"+action, false)
			g.mustLogin(t, "alice")
			account.checkGroup(g, "alice")
		})
	}
}

// checkGroup fails unless the user has one security group, with the rules of the
// gateway's profile.
func (account *fakeAccount) checkGroup(g gateway, user string) {
	account.t.Helper()
	out, err := g.launcher.Cloud.ec2.DescribeSecurityGroups(account.t.Context(), &ec2.DescribeSecurityGroupsInput{Filters: []ec2types.Filter{filter("tag:sallyport:user", user)}})
	if err != nil || len(out.SecurityGroups) != 1 {
		account.t.Fatalf("the groups of %s: %+v, %v", user, out, err)
	}
	var ingress []Rule
	for _, peer := range g.launcher.Isolate.Ingress {
		ingress = append(ingress, Rule{"tcp", agentPort, agentPort, peer})
	}
	group := out.SecurityGroups[0]
	if missing, extra := difference(ingress, rules(group.IpPermissions)); missing != nil || extra != nil {
		account.t.Errorf("ingress of %s: missing %v, too many %v", user, missing, extra)
	}
	if missing, extra := difference(g.launcher.Isolate.Egress, rules(group.IpPermissionsEgress)); missing != nil || extra != nil {
		account.t.Errorf("egress of %s: missing %v, too many %v", user, missing, extra)
	}
}

// groups returns the existing security groups of owners.
func (account *fakeAccount) groups() []string {
	return slices.DeleteFunc(account.cloud.Left(), func(s string) bool { return !strings.HasPrefix(s, "security group") })
}

// TestIsolateTurnedOff: after isolate was turned off, existing groups are still
// deleted. A gateway without groups needs no permission to list them.
func TestIsolateTurnedOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		account.gateway(isolated).mustLogin(t, "alice")
		g := account.gateway(nil)
		for range 2 {
			if err := g.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			time.Sleep(groupIdle)
		}
		if left := account.groups(); len(left) != 1 {
			t.Errorf("a group in use is gone: %v", left)
		}
		if _, err := g.Stop(t.Context(), alice.Owner, "a test"); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := g.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			time.Sleep(groupIdle)
		}
		if left := account.groups(); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
		account.cloud.Deny("ec2:DescribeSecurityGroups", true)
		if err := g.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		isolated(g.launcher)
		account.must(g.Sweep(t.Context()), bastion.ErrDenied)
	})
}

// TestManyGroups: there are more groups than fit on one page of
// DescribeSecurityGroups.
func TestManyGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(isolated)
		const many = groupsMax + 50
		for i := range many {
			if _, err := g.launcher.makeGroup(t.Context(), bastion.Owner{User: user(i), Profile: "default"}); err != nil {
				t.Fatal(err)
			}
		}
		// Groups without the tags of an owner in this deployment are kept.
		api := g.launcher.Cloud.ec2
		for _, tags := range [][]ec2types.Tag{
			nil,
			{{Key: aws.String("sallyport:deployment"), Value: aws.String("prod")}},
			{{Key: aws.String("sallyport:deployment"), Value: aws.String("test")}, {Key: aws.String("sallyport:user"), Value: aws.String("alice")}, {Key: aws.String("sallyport:profile"), Value: aws.String("default")}},
		} {
			in := &ec2.CreateSecurityGroupInput{GroupName: aws.String(fmt.Sprint("other", len(tags))), Description: aws.String("other"), VpcId: aws.String(awsfake.VPC)}
			if tags != nil {
				in.TagSpecifications = []ec2types.TagSpecification{{ResourceType: ec2types.ResourceTypeSecurityGroup, Tags: tags}}
			}
			made, err := api.CreateSecurityGroup(t.Context(), in)
			if err != nil {
				t.Fatal(err)
			}
			defer api.DeleteSecurityGroup(context.Background(), &ec2.DeleteSecurityGroupInput{GroupId: made.GroupId})
		}
		for range 2 {
			if err := g.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			time.Sleep(groupIdle)
		}
		if left := account.groups(); len(left) != 3 {
			t.Errorf("left %d: %v", len(left), left)
		}
	})
}

// TestDeleteWhileLaunching: a group is not deleted between the lookup of a launch and
// its RunTask.
func TestDeleteWhileLaunching(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(isolated)
		if _, err := g.launcher.makeGroup(t.Context(), alice.Owner); err != nil {
			t.Fatal(err)
		}
		if err := g.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		time.Sleep(groupIdle)
		account.cloud.Set(func() {
			account.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
				if c.Action == "ecs:RunTask" {
					return awsfake.Fault{Delay: 5 * time.Second}
				}
				return awsfake.Fault{}
			}
		})
		launched := make(chan error)
		go func() { _, err := g.launcher.Launch(t.Context(), alice); launched <- err }()
		time.Sleep(time.Second)
		if err := g.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		if n := account.calls(0)["ec2:DeleteSecurityGroup"]; n != 0 {
			t.Error("the group was deleted during a launch")
		}
		if err := <-launched; err != nil {
			t.Error(err)
		}
	})
}

// TestDeletionHangs: if DeleteSecurityGroup blocks, a launch of the group's owner
// waits for it only until its context ends.
func TestDeletionHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(isolated)
		g.mustLogin(t, "alice")
		if _, err := g.Stop(t.Context(), alice.Owner, "a test"); err != nil {
			t.Fatal(err)
		}
		if err := g.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(groupIdle + time.Minute)
		account.cloud.Set(func() {
			account.cloud.OnCall = func(c awsfake.Call) awsfake.Fault {
				if c.Action == "ec2:DeleteSecurityGroup" {
					return awsfake.Fault{Delay: 24 * time.Hour}
				}
				return awsfake.Fault{}
			}
		})
		swept := make(chan error)
		go func() { swept <- g.Sweep(t.Context()) }()
		time.Sleep(time.Second)
		short, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		began := time.Now()
		if _, err := g.launcher.Launch(short, bastion.Launch{Owner: alice.Owner, Generation: 2}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with five seconds: %v", err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("with five seconds: took %v", took)
		}
		g.mustLogin(t, "alice")
		if took := time.Since(began); took > 2*time.Minute {
			t.Errorf("took %v", took)
		}
		if err := <-swept; err == nil {
			t.Error("no error from the sweep")
		}
	})
}
