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

// policies returns those of docs/iam.md, for the account of awsfake: what is always
// needed, what public_ip takes, and what isolate takes.
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
		all = append(all, block[1])
	}
	if len(all) != 3 {
		t.Fatalf("%d policies in docs/iam.md", len(all))
	}
	return all
}

// TestLeastPolicy: with what docs/iam.md permits, a check finds nothing missing,
// and bastions start, stop and are swept.
func TestLeastPolicy(t *testing.T) {
	documented := policies(t)
	for name, tt := range map[string]struct {
		policies  []int
		configure func(*Launcher)
		unseen    string // before any group is there
	}{
		"plain":     {[]int{0}, nil, "iam:PassRole ec2:DescribeSubnets ec2:DescribeSecurityGroups"},
		"public_ip": {[]int{0, 1}, func(l *Launcher) { l.PublicIP = true }, "iam:PassRole ec2:DescribeSubnets ec2:DescribeSecurityGroups"},
		"isolate": {[]int{0, 2}, isolated, "iam:PassRole ec2:AuthorizeSecurityGroupIngress ec2:AuthorizeSecurityGroupEgress" +
			" ec2:RevokeSecurityGroupIngress ec2:RevokeSecurityGroupEgress ec2:DeleteSecurityGroup"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.end()
				w.cloud.Policy = &awsfake.Policy{}
				for _, i := range tt.policies {
					if err := w.cloud.Policy.Allow([]byte(documented[i])); err != nil {
						t.Fatal(err)
					}
				}
				g := w.gateway(tt.configure)
				check := func() (unseen string) {
					t.Helper()
					_, findings, err := g.launcher.Check(t.Context())
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
				for range 2 {
					if err := errors.Join(g.Sweep(t.Context()), g.launcher.Cloud.Sweep(t.Context(), g.launcher)); err != nil {
						t.Error(err)
					}
					time.Sleep(2 * time.Hour)
				}
				w.live()
				if left := w.cloud.Left(); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			})
		})
	}
}

// TestCheck: what is missing is named.
func TestCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		g := w.gateway(func(l *Launcher) { isolated(l); l.PublicIP = true })
		if _, err := g.launcher.makeGroup(t.Context(), alice.Owner); err != nil {
			t.Fatal(err)
		}
		who, findings, err := g.launcher.Check(t.Context())
		if err != nil || !strings.Contains(who, awsfake.Account) {
			t.Errorf("%s, %v", who, err)
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
			w.cloud.Deny(denied.Action, true)
			_, findings, err := g.launcher.Check(t.Context())
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
			w.cloud.Deny(denied.Action, false)
		}
		w.live()
		if left := w.cloud.Left(); len(left) != 1 {
			t.Errorf("the check left %v", left)
		}
		w.cloud.OnCall = onCall("sts:GetCallerIdentity", 100, awsfake.Fault{Status: http.StatusForbidden, Code: "InvalidClientTokenId", Message: "The security token included in the request is invalid."})
		if _, _, err := g.launcher.Check(t.Context()); err == nil {
			t.Error("with wrong credentials all is well")
		}
	})
}

// TestCheckConfiguration: what the profile names and is not there is found.
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
			w := newWorld(t)
			defer w.end()
			_, findings, err := w.dialer(&bastion.Memory{}, change).launcher.Check(t.Context())
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
			w.live()
		})
	}
}
