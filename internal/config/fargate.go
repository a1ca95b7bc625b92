package config

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/fargate"
)

const (
	maxSubnets = 16 // API_AwsVpcConfiguration
	maxGroups  = 5
	// maxAccountGroups limits groups because overrides have 8,192 characters.
	maxAccountGroups = 16
	// maxRules is the quota of rules of a security group, in one direction.
	maxRules = 60
)

var (
	clusterPattern    = regexp.MustCompile(`^([A-Za-z0-9_-]{1,255}|arn:[a-z-]+:ecs:[a-z0-9-]+:\d{12}:cluster/[A-Za-z0-9_-]{1,255})$`)
	definitionPattern = regexp.MustCompile(`^(arn:[a-z-]+:ecs:[a-z0-9-]+:\d{12}:task-definition/)?[A-Za-z0-9_-]{1,255}(:[1-9]\d{0,8})?$`)
	familiesPattern   = regexp.MustCompile(`^[A-Za-z0-9_-]{1,30}%u[A-Za-z0-9_-]{0,30}$`)
	containerPattern  = regexp.MustCompile(`^[A-Za-z0-9_-]{1,255}$`)
	subnetPattern     = regexp.MustCompile(`^subnet-[0-9a-z]{1,32}$`)
	groupPattern      = regexp.MustCompile(`^sg-[0-9a-z]{1,32}$`)
	prefixListPattern = regexp.MustCompile(`^pl-[0-9a-z]{1,32}$`)
	rolePattern       = regexp.MustCompile(`^arn:[a-z-]+:iam::\d{12}:role/[A-Za-z0-9+=,.@_/-]{1,512}$`)
	platformPattern   = regexp.MustCompile(`^(LATEST|\d+\.\d+\.\d+)$`)
)

// matching reads a text of the given form; description is for mistakes.
func (v value) matching(form *regexp.Regexp, description string) string {
	s, ok := v.text()
	if ok && !form.MatchString(s) {
		v.mistake("%q is not %s", s, description)
		return ""
	}
	return s
}

func (v value) listMatching(form *regexp.Regexp, description string, most int) []string {
	var all []string
	for _, v := range v.list() {
		if s := v.matching(form, description); s != "" {
			all = append(all, s)
		}
	}
	if len(all) > most {
		v.mistake("%d entries; the most is %d", len(all), most)
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

// fargate reads the value of the key fargate. AssignPublicIP and ConnectPublic have
// an older form, public_ip, that sets both.
func (v value) fargate(f *fargate.Options) {
	var publicIP, isolate bool
	isolation := &fargate.Isolation{Egress: []fargate.Rule{{Protocol: "-1", From: -1, To: -1, Peer: "0.0.0.0/0"}, {Protocol: "-1", From: -1, To: -1, Peer: "::/0"}}}
	seen := v.mapping(map[string]func(value){
		"cluster": func(v value) { f.Cluster = v.matching(clusterPattern, "the name or ARN of a cluster") },
		"task_definition": func(v value) {
			f.TaskDefinition = v.matching(definitionPattern, "a task definition; write it like sallyport-bastion:7")
			if s := f.TaskDefinition; s != "" && !strings.Contains(s[strings.LastIndexByte(s, '/')+1:], ":") {
				v.mistake("%q has no revision; write it like %s:7, so that a new revision is not used before the configuration names it", s, s)
			}
		},
		"user_task_definitions": func(v value) {
			f.UserTaskDefinitions = v.matching(familiesPattern, "a pattern of families; write it like sallyport-user-%u, with up to 30 letters, digits, - and _ before %u, and as many after it")
		},
		"container": func(v value) { f.Container = v.matching(containerPattern, "the name of a container") },
		"account":   func(v value) { f.Account = v.account() },
		"groups":    func(v value) { f.Groups = v.listMatching(accountPattern, "the name of a group", maxAccountGroups) },
		"subnets":   func(v value) { f.Subnets = v.listMatching(subnetPattern, "the id of a subnet", maxSubnets) },
		"security_groups": func(v value) {
			f.SecurityGroups = v.listMatching(groupPattern, "the id of a security group", maxGroups)
		},
		"assign_public_ip":  func(v value) { f.AssignPublicIP = v.boolean() },
		"connect_by":        func(v value) { f.ConnectPublic = v.oneOf("private", "public") },
		"public_ip":         func(v value) { publicIP = v.boolean() },
		"capacity":          func(v value) { f.Spot = v.oneOf("on-demand", "spot") },
		"cpu":               func(v value) { f.CPU = v.cpu() },
		"memory":            func(v value) { f.Memory = v.integer(512, 245_760) },
		"ephemeral_storage": func(v value) { f.EphemeralStorage = v.integer(21, 200) }, // API_EphemeralStorage
		"task_role":         func(v value) { f.TaskRole = v.matching(rolePattern, "the ARN of a role") },
		"platform_version":  func(v value) { f.PlatformVersion = v.matching(platformPattern, "LATEST or a version like 1.4.0") },
		"isolate":           func(v value) { isolate = v.boolean() },
		"ingress_from":      func(v value) { isolation.Ingress = v.peers() },
		"egress":            func(v value) { isolation.Egress = v.egress() },
		"accept_env":        func(v value) { f.AcceptEnv = v.envPatterns() },
	})
	for _, required := range []string{"cluster", "task_definition", "subnets"} {
		if !seen[required] {
			v.mistake("%s is missing", required)
		}
	}
	switch {
	case seen["public_ip"] && (seen["assign_public_ip"] || seen["connect_by"]):
		v.mistake("public_ip: true means assign_public_ip: true and connect_by: public; write these two, and leave it out")
	case seen["public_ip"]:
		f.AssignPublicIP, f.ConnectPublic = publicIP, publicIP
	case f.ConnectPublic && !f.AssignPublicIP:
		v.mistake("connect_by: public needs assign_public_ip: true, or bastions have no public address")
	}
	switch {
	case isolate && !seen["ingress_from"]:
		v.mistake("isolate needs ingress_from: the security groups or networks of the gateways, the only ones that may connect")
	case !isolate && seen["ingress_from"], !isolate && seen["egress"]:
		v.mistake("ingress_from and egress need isolate: true; without it, put these rules into security_groups")
	case isolate && len(f.SecurityGroups) == maxGroups:
		v.mistake("isolate adds a security group to security_groups, and a task may have %d", maxGroups)
	}
	if isolate {
		f.Isolate = isolation
	}
	if f.CPU > 0 && f.Memory > 0 && !fits(f.CPU, f.Memory) {
		v.mistake("Fargate has no size with cpu %d and memory %d", f.CPU, f.Memory)
	}
}

// oneOf reports whether the value is yes; it must be yes or no.
func (v value) oneOf(no, yes string) bool {
	s, _ := v.text()
	switch s {
	case no:
		return false
	case yes:
		return true
	}
	v.mistake("%q is neither %s nor %s", s, no, yes)
	return false
}

// memories are the smallest and largest MiB that Fargate offers by CPU ("Task size",
// Amazon ECS Developer Guide), and the step between sizes.
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

// peers reads security groups and networks.
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

// parsePeer returns the id of a group or prefix list, or a network in the form of EC2.
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

func (v value) egress() []fargate.Rule {
	var all []fargate.Rule
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

// parseEgress reads a rule, which is written "PROTOCOL [PORT[-PORT]] PEER", as in
// "tcp 443 10.0.0.0/8", "icmp sg-0123abcd" or "all 0.0.0.0/0".
func parseEgress(s string) (fargate.Rule, error) {
	bad := fmt.Errorf("%q is not a rule; write it like \"tcp 443 10.0.0.0/8\", \"udp 1000-2000 sg-0123abcd\" or \"all 0.0.0.0/0\"", s)
	words := strings.Fields(s)
	if len(words) < 2 {
		return fargate.Rule{}, bad
	}
	peer, err := parsePeer(words[len(words)-1])
	if err != nil {
		return fargate.Rule{}, err
	}
	r := fargate.Rule{Protocol: words[0], From: -1, To: -1, Peer: peer}
	switch words[0] {
	case "all":
		r.Protocol = "-1"
		fallthrough
	case "icmp":
		if len(words) != 2 {
			return fargate.Rule{}, bad
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
			return fargate.Rule{}, bad
		}
		r.From, r.To = int32(from), int32(to)
	default:
		return fargate.Rule{}, bad
	}
	return r, nil
}
