package fargate

import (
	"errors"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// policies returns the IAM policies of docs/iam.md for ECS and EC2, with the
// deployment and VPC of the tests: the basic one, that of public_ip, that of
// user_task_definitions, and that of isolate.
func policies(t *testing.T) []string {
	t.Helper()
	doc, err := os.ReadFile("../../docs/iam.md")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer(
		`"aws:ResourceTag/sallyport:deployment": "default"`, `"aws:ResourceTag/sallyport:deployment": "prod"`,
		"vpc-0123456789abcdef0", awsfake.VPC,
	).Replace(string(doc))
	var all []string
	for _, block := range regexp.MustCompile("(?s)```json\n(.*?)```").FindAllStringSubmatch(text, -1) {
		if strings.Contains(block[1], `"ecs:DescribeTask`) || strings.Contains(block[1], `"ec2:`) { // else of another package
			all = append(all, block[1])
		}
	}
	if len(all) != 4 {
		t.Fatalf("%d policies in docs/iam.md", len(all))
	}
	return all
}

// TestLeastPolicy: with the policies of docs/iam.md, Check finds nothing missing,
// and bastions start, stop and are swept.
func TestLeastPolicy(t *testing.T) {
	documented := policies(t)
	for name, tt := range map[string]struct {
		policies  []int
		configure func(*Launcher)
		unseen    string // before any group is there
	}{
		"plain":                 {[]int{0}, nil, "iam:PassRole ec2:DescribeSubnets ec2:DescribeSecurityGroups"},
		"public_ip":             {[]int{0, 1}, func(l *Launcher) { l.AssignPublicIP, l.ConnectPublic = true, true }, "iam:PassRole ec2:DescribeSubnets ec2:DescribeSecurityGroups"},
		"user_task_definitions": {[]int{0, 2}, ownDefinitions, "iam:PassRole ec2:DescribeSubnets ec2:DescribeSecurityGroups"},
		"isolate": {[]int{0, 3}, isolated, "iam:PassRole ec2:AuthorizeSecurityGroupIngress ec2:AuthorizeSecurityGroupEgress" +
			" ec2:RevokeSecurityGroupIngress ec2:RevokeSecurityGroupEgress ec2:DeleteSecurityGroup"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				account := newFakeAccount(t)
				defer account.end()
				account.cloud.Policy = &awsfake.Policy{}
				for _, i := range tt.policies {
					if err := account.cloud.Policy.Allow([]byte(documented[i])); err != nil {
						t.Fatal(err)
					}
				}
				g := account.gateway(tt.configure)
				check := func() (unseen string) {
					t.Helper()
					_, findings, err := g.launcher.Check(t.Context(), nil)
					if err != nil {
						t.Error(err)
					}
					for _, f := range findings {
						if f.Err != nil {
							t.Errorf("%s: %v", f.Action, f.Err)
						}
						if f.Unseen != "" {
							unseen += " " + f.Action
						}
					}
					return strings.TrimSpace(unseen)
				}
				if got := check(); got != tt.unseen {
					t.Errorf("could not see %s\nwant           %s", got, tt.unseen)
				}
				g.launch(t, "alice")
				if got := check(); name == "isolate" && got != "iam:PassRole" {
					t.Errorf("once there is a group: could not see %s", got)
				}
				time.Sleep(13 * time.Hour)
				for range 3 { // stop the task; find the group unused; delete it
					if err := g.Sweep(t.Context()); err != nil {
						t.Error(err)
					}
					time.Sleep(2 * time.Hour)
				}
				account.live()
				if left := account.cloud.Left(); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			})
		})
	}
}

// TestCheck denies each action in turn: Check reports its permission as missing.
func TestCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(func(l *Launcher) { isolated(l); l.AssignPublicIP, l.ConnectPublic = true, true })
		if _, err := g.launcher.makeGroup(t.Context(), alice.Owner); err != nil {
			t.Fatal(err)
		}
		caller, findings, err := g.launcher.Check(t.Context(), nil)
		if err != nil || !strings.Contains(caller, awsfake.Account) {
			t.Errorf("%s, %v", caller, err)
		}
		for _, f := range findings {
			if f.Err != nil {
				t.Errorf("%s: %v", f.Action, f.Err)
			}
		}
		if len(findings) < 15 {
			t.Errorf("only %d findings", len(findings))
		}
		for _, denied := range findings {
			account.cloud.Deny(denied.Action, true)
			_, findings, err := g.launcher.Check(t.Context(), nil)
			if err != nil {
				t.Error(err)
			}
			named := false
			for _, f := range findings {
				if is := errors.Is(f.Err, bastion.ErrDenied); is != (f.Action == denied.Action) {
					t.Errorf("without %s: %s: %v", denied.Action, f.Action, f.Err)
				}
				named = named || f.Action == denied.Action
			}
			if !named {
				t.Errorf("without %s: not named", denied.Action)
			}
			account.cloud.Deny(denied.Action, false)
		}
		account.live()
		if left := account.cloud.Left(); len(left) != 1 {
			t.Errorf("the check left %v", left)
		}
		account.cloud.Set(func() {
			account.cloud.OnCall = onCall("sts:GetCallerIdentity", 100, awsfake.Fault{Status: http.StatusForbidden, Code: "InvalidClientTokenId", Message: "The security token included in the request is invalid."})
		})
		if _, _, err := g.launcher.Check(t.Context(), nil); err == nil {
			t.Error("no error with invalid credentials")
		}
	})
}

// TestCheckConfiguration gives a profile resources that do not exist: Check reports
// each.
func TestCheckConfiguration(t *testing.T) {
	for name, change := range map[string]func(*Launcher){
		"cluster":          func(l *Launcher) { l.Cluster = "other" },
		"task definition":  func(l *Launcher) { l.TaskDefinition = "other:1" },
		"container":        func(l *Launcher) { l.Container = "other" },
		"platform version": func(l *Launcher) { l.PlatformVersion = "9.9.9" },
		"subnet":           func(l *Launcher) { l.Subnets = append(l.Subnets[:1:1], "subnet-12345678") },
		"security group":   func(l *Launcher) { l.SecurityGroups = []string{"sg-12345678"} },
	} {
		synctest.Test(t, func(t *testing.T) {
			account := newFakeAccount(t)
			defer account.end()
			_, findings, err := account.dialer(&bastion.Memory{}, change).launcher.Check(t.Context(), nil)
			if err != nil {
				t.Error(err)
			}
			found := false
			for _, f := range findings {
				found = found || errors.Is(f.Err, bastion.ErrConfig)
			}
			if !found {
				t.Errorf("%s: not found: %v", name, findings)
			}
			account.live()
		})
	}
}
