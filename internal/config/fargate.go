package config

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// Fargate is what the fargate launcher has to know. Region and credentials come
// from where all AWS tools have them.
type Fargate struct {
	// Cluster is the name or ARN of the ECS cluster. Required.
	Cluster string
	// TaskDefinition is "family:revision", or its ARN. Required.
	TaskDefinition string
	// Container is the one in it that runs the agent. Default "bastion".
	Container string
	// Account is the account in the image that sessions run as. Default
	// "bastion".
	Account string
	// Subnets is where bastions may be: 1 to 16, of one VPC. Required.
	Subnets []string
	// SecurityGroups is what every bastion belongs to, at most 5, or 4 with
	// Isolate. Default none, which means the default group of the VPC.
	SecurityGroups []string
	// PublicIP gives bastions a public address, and connects to that.
	// Default false.
	PublicIP bool
	// Spot asks for Fargate Spot first, in the file "capacity: spot". The
	// default is "capacity: on-demand".
	Spot bool
	// CPU (units of 1/1024 vCPU), Memory (MiB), EphemeralStorage (GiB) and
	// TaskRole (ARN) replace what the task definition says. Default 0 and "",
	// which leave it.
	CPU, Memory, EphemeralStorage int
	TaskRole                      string
	// PlatformVersion is Fargate's. Default "", which means LATEST.
	PlatformVersion string
	// Isolate gives each user a security group of her own, with these rules.
	// Default false.
	Isolate bool
	// IngressFrom is who may connect to an isolated bastion: security groups
	// and networks. Required with Isolate, and of no use without.
	IngressFrom []string
	// Egress is what an isolated bastion may connect to. Default everything,
	// by IPv4 and IPv6.
	Egress []EgressRule
	// AcceptEnv is as for the local launcher.
	AcceptEnv []string
}

// EgressRule is written "PROTOCOL [PORT[-PORT]] PEER", as in "tcp 443 10.0.0.0/8",
// "icmp sg-0123abcd" or "all 0.0.0.0/0".
type EgressRule struct {
	// Protocol is "tcp", "udp", "icmp", or "-1" for everything.
	Protocol string
	// From and To are ports; both -1 where there are none.
	From, To int
	// Peer is a network, or the id of a security group or prefix list.
	Peer string
}

const (
	maxSubnets = 16 // API_AwsVpcConfiguration
	maxGroups  = 5
	// maxRules is the quota of rules of a security group, in one direction.
	maxRules = 60
)

func defaultFargate() Fargate {
	return Fargate{
		Container: "bastion",
		Account:   "bastion",
		AcceptEnv: defaultAcceptEnv(),
		Egress:    []EgressRule{{"-1", -1, -1, "0.0.0.0/0"}, {"-1", -1, -1, "::/0"}},
	}
}

var (
	clusterPattern    = regexp.MustCompile(`^([A-Za-z0-9_-]{1,255}|arn:[a-z-]+:ecs:[a-z0-9-]+:\d{12}:cluster/[A-Za-z0-9_-]{1,255})$`)
	definitionPattern = regexp.MustCompile(`^(arn:[a-z-]+:ecs:[a-z0-9-]+:\d{12}:task-definition/)?[A-Za-z0-9_-]{1,255}(:[1-9]\d{0,8})?$`)
	containerPattern  = regexp.MustCompile(`^[A-Za-z0-9_-]{1,255}$`)
	subnetPattern     = regexp.MustCompile(`^subnet-[0-9a-z]{1,32}$`)
	groupPattern      = regexp.MustCompile(`^sg-[0-9a-z]{1,32}$`)
	prefixListPattern = regexp.MustCompile(`^pl-[0-9a-z]{1,32}$`)
	rolePattern       = regexp.MustCompile(`^arn:[a-z-]+:iam::\d{12}:role/[A-Za-z0-9+=,.@_/-]{1,512}$`)
	platformPattern   = regexp.MustCompile(`^(LATEST|\d+\.\d+\.\d+)$`)
)

// matching returns a text of the given form.
func (v value) matching(form *regexp.Regexp, what string) string {
	s, ok := v.text()
	if ok && !form.MatchString(s) {
		v.mistake("%q is not %s", s, what)
		return ""
	}
	return s
}

func (v value) listMatching(form *regexp.Regexp, what string, most int) []string {
	var all []string
	for _, v := range v.list() {
		if s := v.matching(form, what); s != "" {
			all = append(all, s)
		}
	}
	if len(all) > most {
		v.mistake("there are %d, and may be %d", len(all), most)
	}
	return all
}

func (v value) boolean() bool {
	s, _ := v.text()
	switch s {
	case "true", "yes":
		return true
	case "false", "no":
		return false
	}
	v.mistake("%q is neither true nor false", s)
	return false
}

func (v value) fargate(f *Fargate) {
	seen := v.mapping(map[string]func(value){
		"cluster": func(v value) { f.Cluster = v.matching(clusterPattern, "the name or ARN of a cluster") },
		"task_definition": func(v value) {
			f.TaskDefinition = v.matching(definitionPattern, "a task definition; write it like sallyport-bastion:7")
			if s := f.TaskDefinition; s != "" && !strings.Contains(s[strings.LastIndexByte(s, '/')+1:], ":") {
				v.mistake("%q has no revision; write it like %s:7, so that a new revision is not used before it is meant to", s, s)
			}
		},
		"container": func(v value) { f.Container = v.matching(containerPattern, "the name of a container") },
		"account":   func(v value) { f.Account = v.account() },
		"subnets":   func(v value) { f.Subnets = v.listMatching(subnetPattern, "the id of a subnet", maxSubnets) },
		"security_groups": func(v value) {
			f.SecurityGroups = v.listMatching(groupPattern, "the id of a security group", maxGroups)
		},
		"public_ip":         func(v value) { f.PublicIP = v.boolean() },
		"capacity":          func(v value) { f.Spot = v.spot() },
		"cpu":               func(v value) { f.CPU = v.cpu() },
		"memory":            func(v value) { f.Memory = v.integer(512, 245_760) },
		"ephemeral_storage": func(v value) { f.EphemeralStorage = v.integer(21, 200) }, // API_EphemeralStorage
		"task_role":         func(v value) { f.TaskRole = v.matching(rolePattern, "the ARN of a role") },
		"platform_version":  func(v value) { f.PlatformVersion = v.matching(platformPattern, "LATEST or a version like 1.4.0") },
		"isolate":           func(v value) { f.Isolate = v.boolean() },
		"ingress_from":      func(v value) { f.IngressFrom = v.peers() },
		"egress":            func(v value) { f.Egress = v.egress() },
		"accept_env":        func(v value) { f.AcceptEnv = v.envPatterns() },
	})
	for _, required := range []string{"cluster", "task_definition", "subnets"} {
		if !seen[required] {
			v.mistake("%s is missing", required)
		}
	}
	switch {
	case f.Isolate && !seen["ingress_from"]:
		v.mistake("isolate needs ingress_from: the security groups or networks of the gateways, which nobody else may connect from")
	case !f.Isolate && seen["ingress_from"], !f.Isolate && seen["egress"]:
		v.mistake("ingress_from and egress are of the groups that isolate: true makes; without it, write these rules into security_groups")
	case f.Isolate && len(f.SecurityGroups) == maxGroups:
		v.mistake("isolate adds a security group to security_groups, and there may be %d in all", maxGroups)
	}
	if f.CPU > 0 && f.Memory > 0 && !fits(f.CPU, f.Memory) {
		v.mistake("Fargate has no size with cpu %d and memory %d", f.CPU, f.Memory)
	}
}

func (v value) spot() bool {
	s, _ := v.text()
	switch s {
	case "on-demand":
		return false
	case "spot":
		return true
	}
	v.mistake("%q is neither on-demand nor spot", s)
	return false
}

// memories are the least and the most MiB that Fargate offers with so much CPU
// ("Task size", Amazon ECS Developer Guide). Above 256 it goes in steps.
var memories = map[int]struct{ least, most, step int }{
	256:   {512, 2048, 512},
	512:   {1024, 4096, 1024},
	1024:  {2048, 8192, 1024},
	2048:  {4096, 16_384, 1024},
	4096:  {8192, 30_720, 1024},
	8192:  {16_384, 61_440, 4096},
	16384: {32_768, 122_880, 8192},
	32768: {61_440, 245_760, 4096},
}

func fits(cpu, memory int) bool {
	m := memories[cpu]
	if cpu == 256 && memory == 1536 {
		return false // 512, 1024 and 2048 only
	}
	return m.least <= memory && memory <= m.most && memory%m.step == 0
}

func (v value) cpu() int {
	n := v.integer(256, 32_768)
	if _, ok := memories[n]; n != 0 && !ok {
		v.mistake("Fargate has no size with cpu %d; there are 256, 512, 1024, 2048, 4096, 8192, 16384 and 32768", n)
	}
	return n
}

// peers are security groups and networks.
func (v value) peers() []string {
	var all []string
	for _, v := range v.list() {
		s, ok := v.text()
		if !ok {
			continue
		}
		peer, err := parsePeer(s)
		if err != nil {
			v.mistake("%v", err)
			continue
		}
		all = append(all, peer)
	}
	if len(all) > maxRules {
		v.mistake("there are %d, and a security group may have %d rules", len(all), maxRules)
	}
	return all
}

// parsePeer returns the id of a group or prefix list, or a network as EC2 writes
// it.
func parsePeer(s string) (string, error) {
	if groupPattern.MatchString(s) || prefixListPattern.MatchString(s) {
		return s, nil
	}
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		return netip.PrefixFrom(addr, addr.BitLen()).String(), nil
	}
	net, err := netip.ParsePrefix(s)
	if err != nil {
		return "", fmt.Errorf("%q is neither a network, like 10.0.0.0/8, nor the id of a security group", s)
	}
	if net != net.Masked() {
		return "", fmt.Errorf("%q has bits set after its length; do you mean %v?", s, net.Masked())
	}
	return net.String(), nil
}

func (v value) egress() []EgressRule {
	var all []EgressRule
	for _, v := range v.list() {
		s, ok := v.text()
		if !ok {
			continue
		}
		r, err := parseEgress(s)
		if err != nil {
			v.mistake("%v", err)
			continue
		}
		all = append(all, r)
	}
	if len(all) > maxRules {
		v.mistake("there are %d, and a security group may have %d rules", len(all), maxRules)
	}
	return all
}

// parseEgress reads a rule as [EgressRule] says.
func parseEgress(s string) (EgressRule, error) {
	bad := fmt.Errorf("%q is not a rule; write it like \"tcp 443 10.0.0.0/8\", \"udp 1000-2000 sg-0123abcd\" or \"all 0.0.0.0/0\"", s)
	words := strings.Fields(s)
	if len(words) < 2 {
		return EgressRule{}, bad
	}
	peer, err := parsePeer(words[len(words)-1])
	if err != nil {
		return EgressRule{}, err
	}
	r := EgressRule{Protocol: words[0], From: -1, To: -1, Peer: peer}
	switch words[0] {
	case "all":
		r.Protocol = "-1"
		fallthrough
	case "icmp":
		if len(words) != 2 {
			return EgressRule{}, bad
		}
	case "tcp", "udp":
		if len(words) == 2 {
			r.From, r.To = 0, 65535
			break
		}
		first, last, isRange := strings.Cut(words[1], "-")
		if !isRange {
			last = first
		}
		from, err1 := strconv.ParseUint(first, 10, 16)
		to, err2 := strconv.ParseUint(last, 10, 16)
		if len(words) != 3 || err1 != nil || err2 != nil || from > to {
			return EgressRule{}, bad
		}
		r.From, r.To = int(from), int(to)
	default:
		return EgressRule{}, bad
	}
	return r, nil
}
