package config

import (
	"strings"
	"testing"

	"github.com/sallyport-ssh/sallyport/internal/fargate"
)

func TestFargateMistakes(t *testing.T) {
	dir := site(t)
	const start = "profiles:\n  f:\n    launcher: fargate\n    fargate:\n      "
	good := []string{"cluster: c", "task_definition: d:1", "subnets: [subnet-1]"}
	tests := []struct{ in, want string }{
		{"cluster: a b", `g.yaml:5: profiles.f.fargate.cluster: "a b" is not the name or ARN of a cluster`},
		{"task_definition: bastion", `g.yaml:5: profiles.f.fargate.task_definition: "bastion" has no revision; write it like bastion:7, so that a new revision is not used before the configuration names it`},
		{"task_definition: arn:aws:ecs:eu-west-1:123456789012:task-definition/b", `g.yaml:5: profiles.f.fargate.task_definition: "arn:aws:ecs:eu-west-1:123456789012:task-definition/b" has no revision; write it like arn:aws:ecs:eu-west-1:123456789012:task-definition/b:7, so that a new revision is not used before the configuration names it`},
		{"user_task_definitions: bastion-of-alice", `g.yaml:5: profiles.f.fargate.user_task_definitions: "bastion-of-alice" is not a pattern of families; write it like sallyport-user-%u, with up to 30 letters, digits, - and _ before %u, and as many after it`},
		{`user_task_definitions: "%u"`, `g.yaml:5: profiles.f.fargate.user_task_definitions: "%u" is not a pattern of families`},
		{"user_task_definitions: user-%u:1", `g.yaml:5: profiles.f.fargate.user_task_definitions: "user-%u:1" is not a pattern of families`},
		{"user_task_definitions: user-%u-%u", `g.yaml:5: profiles.f.fargate.user_task_definitions: "user-%u-%u" is not a pattern of families`},
		{"groups: ['a b']", `g.yaml:5: profiles.f.fargate.groups: "a b" is not the name of a group`},
		{"groups: [" + strings.Repeat("audio, ", 17) + "]", `g.yaml:5: profiles.f.fargate.groups: 17 entries; the most is 16`},
		{"subnets: [vpc-1]", `g.yaml:5: profiles.f.fargate.subnets: "vpc-1" is not the id of a subnet`},
		{"subnets: [" + strings.Repeat("subnet-1, ", 17) + "]", `g.yaml:5: profiles.f.fargate.subnets: 17 entries; the most is 16`},
		{"security_groups: [sg-1, sg-2, sg-3, sg-4, sg-5, sg-6]", `g.yaml:5: profiles.f.fargate.security_groups: 6 entries; the most is 5`},
		{"public_ip: maybe", `g.yaml:5: profiles.f.fargate.public_ip: "maybe" is neither true nor false`},
		{"assign_public_ip: maybe", `g.yaml:5: profiles.f.fargate.assign_public_ip: "maybe" is neither true nor false`},
		{"connect_by: foot", `g.yaml:5: profiles.f.fargate.connect_by: "foot" is neither private nor public`},
		{"connect_by: public", `g.yaml:4: profiles.f.fargate: connect_by: public needs assign_public_ip: true, or bastions have no public address`},
		{"public_ip: true\n      connect_by: private", `g.yaml:4: profiles.f.fargate: public_ip: true means assign_public_ip: true and connect_by: public; write these two, and leave it out`},
		{"capacity: cheap", `g.yaml:5: profiles.f.fargate.capacity: "cheap" is neither on-demand nor spot`},
		{"cpu: 300", `g.yaml:5: profiles.f.fargate.cpu: Fargate has no size with cpu 300; there are 256, 512, 1024, 2048, 4096, 8192, 16384 and 32768`},
		{"cpu: 256\n      memory: 4096", `g.yaml:4: profiles.f.fargate: Fargate has no size with cpu 256 and memory 4096`},
		{"task_role: bastion", `g.yaml:5: profiles.f.fargate.task_role: "bastion" is not the ARN of a role`},
		{"isolate: true", `g.yaml:4: profiles.f.fargate: isolate needs ingress_from: the security groups or networks of the gateways, the only ones that may connect`},
		{"egress: all 0.0.0.0/0", `g.yaml:4: profiles.f.fargate: ingress_from and egress need isolate: true; without it, put these rules into security_groups`},
		{"isolate: true\n      ingress_from: 10.0.0.1/8", `g.yaml:6: profiles.f.fargate.ingress_from: "10.0.0.1/8" has bits set after its length; do you mean 10.0.0.0/8?`},
		{"isolate: true\n      ingress_from: gateway", `g.yaml:6: profiles.f.fargate.ingress_from: "gateway" is neither a network, like 10.0.0.0/8, nor the id of a security group`},
		{"isolate: true\n      ingress_from: sg-1\n      security_groups: [sg-1, sg-2, sg-3, sg-4, sg-5]", `g.yaml:4: profiles.f.fargate: isolate adds a security group to security_groups, and a task may have 5`},
		{"isolate: true\n      ingress_from: sg-1\n      egress: [tcp https 10.0.0.0/8]", `g.yaml:7: profiles.f.fargate.egress: "tcp https 10.0.0.0/8" is not a rule; write it like "tcp 443 10.0.0.0/8", "udp 1000-2000 sg-0123abcd" or "all 0.0.0.0/0"`},
		{"isolate: true\n      ingress_from: sg-1\n      egress: [tcp 2-1 10.0.0.0/8]", `g.yaml:7: profiles.f.fargate.egress: "tcp 2-1 10.0.0.0/8" is not a rule; write it like "tcp 443 10.0.0.0/8", "udp 1000-2000 sg-0123abcd" or "all 0.0.0.0/0"`},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			text := start + tt.in
			for _, line := range good {
				if key, _, _ := strings.Cut(line, ":"); !strings.HasPrefix(tt.in, key+":") {
					text += "\n      " + line
				}
			}
			_, err := parse([]byte(text+"\n"+required), "g.yaml", dir, nil, nil)
			if err == nil {
				t.Fatal("no mistake was found")
			}
			// One value that is wrong can make others so, which are after it.
			if first, _, _ := strings.Cut(err.Error(), "\n"); first != tt.want && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("\n got %s\nwant %s", err, tt.want)
			}
		})
	}
	if _, err := parse([]byte("profiles:\n  f:\n    launcher: fargate\n    fargate: {account: x}\n"+required), "g.yaml", dir, nil, nil); err == nil ||
		strings.Count(err.Error(), "is missing") != 3 {
		t.Errorf("with all that is required missing: %v", err)
	}
}

func TestEgress(t *testing.T) {
	for in, want := range map[string]fargate.Rule{
		"tcp 443 10.0.0.0/8":   {Protocol: "tcp", From: 443, To: 443, Peer: "10.0.0.0/8"},
		"udp 1000-2000 sg-1":   {Protocol: "udp", From: 1000, To: 2000, Peer: "sg-1"},
		"tcp 10.1.2.3":         {Protocol: "tcp", From: 0, To: 65535, Peer: "10.1.2.3/32"},
		"icmp fd00::/8":        {Protocol: "icmp", From: -1, To: -1, Peer: "fd00::/8"},
		"all pl-12ab":          {Protocol: "-1", From: -1, To: -1, Peer: "pl-12ab"},
		" all   0.0.0.0/0 ":    {Protocol: "-1", From: -1, To: -1, Peer: "0.0.0.0/0"},
		"tcp 443 FD00:0::/112": {Protocol: "tcp", From: 443, To: 443, Peer: "fd00::/112"},
	} {
		if got, err := parseEgress(in); err != nil || got != want {
			t.Errorf("%q: got %+v, %v", in, got, err)
		}
	}
}
