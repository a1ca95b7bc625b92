package awsfake

import (
	"encoding/xml"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A group is a security group.
type group struct {
	ID, Name, VPC, Description string
	tags                       []tag
	ingress, egress            []rule
	preset                     bool
}

// A rule is one permission with one peer.
type rule struct {
	protocol, from, to, peer string // ports as written; empty where there are none
}

// openEgress is the rule of a new group.
func openEgress() []rule { return []rule{{"-1", "", "", "0.0.0.0/0"}} }

func zoneOf(subnet string) string {
	return Region + string(rune('a'+slices.Index(Subnets, subnet)))
}

type xmlTag struct {
	Key   string `xml:"key"`
	Value string `xml:"value"`
}

func xmlTags(tags []tag) []xmlTag {
	var all []xmlTag
	for _, t := range tags {
		all = append(all, xmlTag(t))
	}
	return all
}

type xmlPermission struct {
	Protocol string `xml:"ipProtocol"`
	From     string `xml:"fromPort,omitempty"`
	To       string `xml:"toPort,omitempty"`
	Groups   []struct {
		ID string `xml:"groupId"`
	} `xml:"groups>item"`
	Ranges []struct {
		CIDR string `xml:"cidrIp"`
	} `xml:"ipRanges>item"`
	Ranges6 []struct {
		CIDR string `xml:"cidrIpv6"`
	} `xml:"ipv6Ranges>item"`
	Lists []struct {
		ID string `xml:"prefixListId"`
	} `xml:"prefixListIds>item"`
}

type xmlGroup struct {
	Owner       string          `xml:"ownerId"`
	ID          string          `xml:"groupId"`
	Name        string          `xml:"groupName"`
	Description string          `xml:"groupDescription"`
	VPC         string          `xml:"vpcId"`
	Ingress     []xmlPermission `xml:"ipPermissions>item"`
	Egress      []xmlPermission `xml:"ipPermissionsEgress>item"`
	Tags        []xmlTag        `xml:"tagSet>item"`
}

type xmlInterface struct {
	ID          string `xml:"networkInterfaceId"`
	Subnet      string `xml:"subnetId"`
	VPC         string `xml:"vpcId"`
	Status      string `xml:"status"`
	IP          string `xml:"privateIpAddress"`
	Association *struct {
		PublicIP string `xml:"publicIp"`
	} `xml:"association"`
	Groups []struct {
		ID string `xml:"groupId"`
	} `xml:"groupSet>item"`
}

type xmlSubnet struct {
	ID    string `xml:"subnetId"`
	VPC   string `xml:"vpcId"`
	State string `xml:"state"`
	Zone  string `xml:"availabilityZone"`
	CIDR  string `xml:"cidrBlock"`
}

// ec2 answers a request to EC2.
func (c *Cloud) ec2(action string, form url.Values) ([]byte, *apiError) {
	var out any
	var failed *apiError
	switch action {
	case "DescribeSubnets":
		out, failed = c.describeSubnets(form)
	case "DescribeNetworkInterfaces":
		out, failed = c.describeInterfaces(form)
	case "DescribeSecurityGroups":
		out, failed = c.describeGroups(form)
	case "CreateSecurityGroup":
		out, failed = c.createGroup(form)
	case "DeleteSecurityGroup":
		failed = c.deleteGroup(form.Get("GroupId"))
	case "AuthorizeSecurityGroupIngress", "AuthorizeSecurityGroupEgress", "RevokeSecurityGroupIngress", "RevokeSecurityGroupEgress":
		failed = c.changeRules(action, form)
	default:
		failed = refuse("InvalidAction", "The action %s is not valid for this web service.", action)
	}
	if failed != nil {
		return nil, failed
	}
	if out == nil {
		out = struct {
			XMLName xml.Name `xml:"r"`
			Return  bool     `xml:"return"`
		}{Return: true}
	}
	text, err := xml.Marshal(out)
	if err != nil {
		return nil, &apiError{500, "InternalError", err.Error(), nil}
	}
	// The outermost element has the name of the action.
	_, inner, _ := strings.Cut(string(text), ">")
	inner = inner[:strings.LastIndex(inner, "</")]
	return fmt.Appendf(nil, "<%[1]sResponse xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><requestId>0</requestId>%[2]s</%[1]sResponse>", action, inner), nil
}

// list returns NAME.1, NAME.2 and so on.
func list(form url.Values, name string) []string {
	var all []string
	for i := 1; form.Has(name + "." + strconv.Itoa(i)); i++ {
		all = append(all, form.Get(name+"."+strconv.Itoa(i)))
	}
	return all
}

// A filter restricts the result of a Describe action ("List and filter using the API",
// Amazon EC2 User Guide) to one of its values, which may have wildcards "*" and "?".
type filter struct {
	name   string
	values []string
}

// filters returns the filters of a request. known are the permitted names; "tag:" is a
// prefix.
func filters(form url.Values, known ...string) ([]filter, *apiError) {
	var all []filter
	for i := 1; form.Has(fmt.Sprintf("Filter.%d.Name", i)); i++ {
		f := filter{form.Get(fmt.Sprintf("Filter.%d.Name", i)), list(form, fmt.Sprintf("Filter.%d.Value", i))}
		name := f.name
		if strings.HasPrefix(name, "tag:") {
			name = "tag:"
		}
		if !slices.Contains(known, name) {
			return nil, refuse("InvalidParameterValue", "The filter '%s' is invalid", f.name)
		}
		if len(f.values) > 200 {
			return nil, refuse("FilterLimitExceeded", "The maximum number of filter values is 200")
		}
		all = append(all, f)
	}
	return all, nil
}

// matches reports whether all filters match; have returns a resource's values for a
// filter.
func matches(all []filter, have func(name string) []string) bool {
	for _, f := range all {
		values := have(f.name)
		if !slices.ContainsFunc(f.values, func(pattern string) bool {
			return slices.ContainsFunc(values, func(v string) bool { return glob(pattern, v) })
		}) {
			return false
		}
	}
	return true
}

// glob reports whether a value matches a pattern with "*", "?" and "\\".
func glob(pattern, value string) bool {
	// Only the last star needs backtracking: at a mismatch, it takes one character
	// more.
	star, from := -1, 0
	p, v := 0, 0
	for v < len(value) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, from = p, v
			p++
		case p < len(pattern) && pattern[p] == '?':
			p, v = p+1, v+1
		case p+1 < len(pattern) && pattern[p] == '\\' && pattern[p+1] == value[v]:
			p, v = p+2, v+1
		case p < len(pattern) && pattern[p] != '\\' && pattern[p] == value[v]:
			p, v = p+1, v+1
		case star >= 0:
			from++
			p, v = star+1, from
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// page returns the requested page of a result, and the token for the next. Without
// MaxResults, the page is the whole result.
func page[T any](all []T, form url.Values) ([]T, string, *apiError) {
	most, from := len(all), 0
	if asked := form.Get("MaxResults"); asked != "" {
		n, err := strconv.Atoi(asked)
		if err != nil || n < 5 || n > 1000 {
			return nil, "", refuse("InvalidParameterValue", "Value ( %s ) for parameter maxResults is invalid. Expecting a value between 5 and 1000.", asked)
		}
		most = n
	}
	if token := form.Get("NextToken"); token != "" {
		n, err := strconv.Atoi(token)
		if err != nil || n < 0 || n > len(all) {
			return nil, "", refuse("InvalidNextToken", "The token '%s' is invalid", token)
		}
		from = n
	}
	if len(all)-from > most {
		return all[from : from+most], strconv.Itoa(from + most), nil
	}
	return all[from:], "", nil
}

func (c *Cloud) describeSubnets(form url.Values) (any, *apiError) {
	var out struct {
		XMLName xml.Name    `xml:"r"`
		Subnets []xmlSubnet `xml:"subnetSet>item"`
	}
	ids := list(form, "SubnetId")
	for _, id := range ids {
		if !slices.Contains(Subnets, id) {
			return nil, refuse("InvalidSubnetID.NotFound", "The subnet ID '%s' does not exist", id)
		}
	}
	want, failed := filters(form, "vpc-id", "subnet-id", "availability-zone")
	if failed != nil {
		return nil, failed
	}
	for i, id := range Subnets {
		s := xmlSubnet{id, VPC, "available", zoneOf(id), fmt.Sprintf("%s.%d.0/20", c.Network, 16*i)}
		if (len(ids) == 0 || slices.Contains(ids, id)) && matches(want, func(name string) []string {
			return []string{map[string]string{"vpc-id": s.VPC, "subnet-id": s.ID, "availability-zone": s.Zone}[name]}
		}) {
			out.Subnets = append(out.Subnets, s)
		}
	}
	return out, nil
}

func (c *Cloud) describeInterfaces(form url.Values) (any, *apiError) {
	var out struct {
		XMLName    xml.Name       `xml:"r"`
		Interfaces []xmlInterface `xml:"networkInterfaceSet>item"`
		Next       string         `xml:"nextToken,omitempty"`
	}
	ids := list(form, "NetworkInterfaceId")
	want, failed := filters(form, "network-interface-id", "group-id", "subnet-id", "vpc-id", "private-ip-address", "status")
	if failed != nil {
		return nil, failed
	}
	seen := map[string]bool{}
	for _, t := range byAge(c.tasks) {
		if !t.attached || len(ids) > 0 && !slices.Contains(ids, t.eni) {
			continue
		}
		seen[t.eni] = true
		if !matches(want, func(name string) []string {
			return map[string][]string{"network-interface-id": {t.eni}, "group-id": t.groups, "subnet-id": {t.subnet}, "vpc-id": {VPC},
				"private-ip-address": {t.ip}, "status": {"in-use"}}[name]
		}) {
			continue
		}
		i := xmlInterface{ID: t.eni, Subnet: t.subnet, VPC: VPC, Status: "in-use", IP: t.ip}
		if t.public {
			i.Association = &struct {
				PublicIP string `xml:"publicIp"`
			}{publicIP(t.ip)}
		}
		for _, g := range t.groups {
			i.Groups = append(i.Groups, struct {
				ID string `xml:"groupId"`
			}{g})
		}
		out.Interfaces = append(out.Interfaces, i)
	}
	for _, id := range ids {
		if !seen[id] {
			return nil, refuse("InvalidNetworkInterfaceID.NotFound", "The networkInterface ID '%s' does not exist", id)
		}
	}
	out.Interfaces, out.Next, failed = page(out.Interfaces, form)
	return out, failed
}

// publicIP returns the public address of a task, which differs from the private one so
// that tests see which was used.
func publicIP(private string) string {
	if rest, ok := strings.CutPrefix(private, "10.0."); ok {
		return "203.0." + rest
	}
	return private
}

func (c *Cloud) describeGroups(form url.Values) (any, *apiError) {
	var out struct {
		XMLName xml.Name   `xml:"r"`
		Groups  []xmlGroup `xml:"securityGroupInfo>item"`
		Next    string     `xml:"nextToken,omitempty"`
	}
	ids := list(form, "GroupId")
	want, failed := filters(form, "group-name", "group-id", "vpc-id", "owner-id", "description", "tag:", "tag-key")
	if failed != nil {
		return nil, failed
	}
	for _, id := range ids {
		if c.groups[id] == nil {
			return nil, refuse("InvalidGroup.NotFound", "The security group '%s' does not exist", id)
		}
	}
	if len(ids) > 0 && form.Has("MaxResults") {
		return nil, refuse("InvalidParameterCombination", "The parameter GroupId cannot be used with the parameter MaxResults")
	}
	for _, id := range keys(c.groups) {
		g := c.groups[id]
		if len(ids) > 0 && !slices.Contains(ids, id) || !matches(want, g.filtered) {
			continue
		}
		x := xmlGroup{Owner: Account, ID: g.ID, Name: g.Name, Description: g.Description, VPC: g.VPC,
			Ingress: permissions(g.ingress), Egress: permissions(g.egress)}
		x.Tags = xmlTags(g.tags)
		out.Groups = append(out.Groups, x)
	}
	out.Groups, out.Next, failed = page(out.Groups, form)
	return out, failed
}

// filtered returns the group's values for a filter.
func (g *group) filtered(name string) []string {
	var values []string
	key, byKey := strings.CutPrefix(name, "tag:")
	for _, t := range g.tags {
		switch {
		case byKey && t.Key == key:
			values = append(values, t.Value)
		case name == "tag-key":
			values = append(values, t.Key)
		}
	}
	switch name {
	case "group-name":
		return []string{g.Name}
	case "group-id":
		return []string{g.ID}
	case "vpc-id":
		return []string{g.VPC}
	case "owner-id":
		return []string{Account}
	case "description":
		return []string{g.Description}
	}
	return values
}

// The permitted names and descriptions of security groups (API_CreateSecurityGroup).
var groupPattern = regexp.MustCompile(`^[a-zA-Z0-9 ._\-:/()#,@\[\]+=&;{}!$*]{1,255}$`)

// Quotas of groups in a Region, and of rules in a group (Amazon VPC quotas).
const (
	maxGroups = 2500
	maxRules  = 60
)

func (c *Cloud) createGroup(form url.Values) (any, *apiError) {
	name, vpc := form.Get("GroupName"), form.Get("VpcId")
	switch {
	case vpc != VPC:
		return nil, refuse("InvalidVpcID.NotFound", "The vpc ID '%s' does not exist", vpc)
	case name == "" || form.Get("GroupDescription") == "":
		return nil, refuse("MissingParameter", "The request must contain the parameter GroupName or GroupDescription")
	case !groupPattern.MatchString(name) || strings.HasPrefix(name, "sg-"):
		return nil, refuse("InvalidParameterValue", "Value (%s) for parameter GroupName is invalid.", name)
	case !groupPattern.MatchString(form.Get("GroupDescription")):
		return nil, refuse("InvalidParameterValue", "Value (%s) for parameter GroupDescription is invalid. Character sets beyond ASCII are not supported.", form.Get("GroupDescription"))
	case len(c.groups) >= maxGroups:
		return nil, refuse("SecurityGroupLimitExceeded", "The maximum number of security groups has been reached.")
	}
	for _, g := range c.groups {
		if g.Name == name {
			return nil, refuse("InvalidGroup.Duplicate", "The security group '%s' already exists for VPC '%s'", name, vpc)
		}
	}
	g := &group{ID: "sg-" + c.id(17), Name: name, VPC: vpc, Description: form.Get("GroupDescription"), egress: openEgress()}
	for i := 1; form.Has(fmt.Sprintf("TagSpecification.1.Tag.%d.Key", i)); i++ {
		at := fmt.Sprintf("TagSpecification.1.Tag.%d.", i)
		g.tags = append(g.tags, tag{form.Get(at + "Key"), form.Get(at + "Value")})
	}
	if of := form.Get("TagSpecification.1.ResourceType"); len(g.tags) > 0 && of != "security-group" {
		return nil, refuse("InvalidParameterValue", "'%s' is not a valid taggable resource type for this operation.", of)
	}
	if why := badTags(g.tags); why != "" {
		return nil, refuse("InvalidParameterValue", "%s", why)
	}
	c.groups[g.ID] = g
	return struct {
		XMLName xml.Name `xml:"r"`
		Return  bool     `xml:"return"`
		ID      string   `xml:"groupId"`
		Tags    []xmlTag `xml:"tagSet>item"`
	}{Return: true, ID: g.ID, Tags: xmlTags(g.tags)}, nil
}

func (c *Cloud) deleteGroup(id string) *apiError {
	if c.groups[id] == nil {
		return refuse("InvalidGroup.NotFound", "The security group '%s' does not exist", id)
	}
	if id == defaultGroup {
		return refuse("CannotDelete", "the specified group: \"%s\" name: \"default\" cannot be deleted by a user", id)
	}
	inUse := refuse("DependencyViolation", "resource %s has a dependent object", id)
	for _, t := range c.tasks {
		if t.last != "STOPPED" && slices.Contains(t.groups, id) {
			return inUse
		}
	}
	for _, g := range c.groups {
		for _, r := range slices.Concat(g.ingress, g.egress) {
			if r.peer == id && g.ID != id {
				return inUse
			}
		}
	}
	delete(c.groups, id)
	return nil
}

func (c *Cloud) changeRules(action string, form url.Values) *apiError {
	g := c.groups[form.Get("GroupId")]
	if g == nil {
		return refuse("InvalidGroup.NotFound", "The security group '%s' does not exist", form.Get("GroupId"))
	}
	rules := &g.ingress
	if strings.HasSuffix(action, "Egress") {
		rules = &g.egress
	}
	asked, failed := c.parseRules(form)
	if failed != nil {
		return failed
	}
	changed := slices.Clone(*rules)
	for _, r := range asked {
		at := slices.Index(changed, r)
		switch revoke := strings.HasPrefix(action, "Revoke"); {
		case revoke && at < 0:
			return refuse("InvalidPermission.NotFound", "The specified rule does not exist in this security group.")
		case revoke:
			changed = slices.Delete(changed, at, at+1)
		case at >= 0:
			return refuse("InvalidPermission.Duplicate", "the specified rule \"peer: %s\" already exists", r.peer)
		default:
			changed = append(changed, r)
		}
	}
	if len(changed) > maxRules {
		return refuse("RulesPerSecurityGroupLimitExceeded", "The maximum number of rules per security group has been reached.")
	}
	*rules = changed
	return nil
}

// parseRules converts IpPermissions into rules.
func (c *Cloud) parseRules(form url.Values) ([]rule, *apiError) {
	var all []rule
	for i := 1; form.Has(fmt.Sprintf("IpPermissions.%d.IpProtocol", i)); i++ {
		at := fmt.Sprintf("IpPermissions.%d.", i)
		r := rule{protocol: form.Get(at + "IpProtocol"), from: form.Get(at + "FromPort"), to: form.Get(at + "ToPort")}
		if failed := r.checkPorts(); failed != nil {
			return nil, failed
		}
		for _, kind := range []string{"IpRanges.%d.CidrIp", "Ipv6Ranges.%d.CidrIpv6", "Groups.%d.GroupId", "PrefixListIds.%d.PrefixListId"} {
			for j := 1; form.Has(at + fmt.Sprintf(kind, j)); j++ {
				r.peer = form.Get(at + fmt.Sprintf(kind, j))
				network, err := netip.ParsePrefix(r.peer)
				switch kind[0] {
				case 'I':
					if err != nil || network.Addr().Is4() == strings.HasPrefix(kind, "Ipv6") {
						return nil, refuse("InvalidParameterValue", "CIDR block %s is malformed", r.peer)
					}
					r.peer = network.Masked().String()
				case 'G':
					if c.groups[r.peer] == nil {
						return nil, refuse("InvalidGroup.NotFound", "The security group '%s' does not exist", r.peer)
					}
				case 'P':
					if !strings.HasPrefix(r.peer, "pl-") {
						return nil, refuse("InvalidPrefixListId.Malformed", "The prefix list ID '%s' is malformed", r.peer)
					}
				}
				all = append(all, r)
			}
		}
	}
	if len(all) == 0 {
		return nil, refuse("MissingParameter", "The request must contain the parameter ipPermissions")
	}
	return all, nil
}

// checkPorts converts protocol and ports into the form of EC2's answers
// (API_IpPermission).
func (r *rule) checkPorts() *apiError {
	if name, ok := map[string]string{"6": "tcp", "17": "udp", "1": "icmp", "58": "icmpv6", "all": "-1"}[r.protocol]; ok {
		r.protocol = name
	}
	switch r.protocol {
	case "-1":
		r.from, r.to = "", ""
		return nil
	case "tcp", "udp", "icmp", "icmpv6":
	default:
		return refuse("InvalidPermission.Malformed", "Unsupported IP protocol \"%s\"", r.protocol)
	}
	from, err1 := strconv.Atoi(r.from)
	to, err2 := strconv.Atoi(r.to)
	ports := r.protocol == "tcp" || r.protocol == "udp"
	if err1 != nil || err2 != nil || from < -1 || to > 65535 || ports && (from < 0 || to < from) {
		return refuse("InvalidParameterValue", "Invalid TCP/UDP port (range): %s to %s", r.from, r.to)
	}
	return nil
}

func permissions(rules []rule) []xmlPermission {
	var all []xmlPermission
	for _, r := range rules {
		p := xmlPermission{Protocol: r.protocol, From: r.from, To: r.to}
		switch {
		case strings.HasPrefix(r.peer, "sg-"):
			p.Groups = append(p.Groups, struct {
				ID string `xml:"groupId"`
			}{r.peer})
		case strings.HasPrefix(r.peer, "pl-"):
			p.Lists = append(p.Lists, struct {
				ID string `xml:"prefixListId"`
			}{r.peer})
		case strings.Contains(r.peer, ":"):
			p.Ranges6 = append(p.Ranges6, struct {
				CIDR string `xml:"cidrIpv6"`
			}{r.peer})
		default:
			p.Ranges = append(p.Ranges, struct {
				CIDR string `xml:"cidrIp"`
			}{r.peer})
		}
		all = append(all, p)
	}
	return all
}

func (c *Cloud) sts(action string) ([]byte, *apiError) {
	if action != "GetCallerIdentity" {
		return nil, refuse("InvalidAction", "Could not find operation %s", action)
	}
	return []byte(`<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>` +
		`<Arn>arn:aws:iam::` + Account + `:user/gateway</Arn><UserId>AIDAFAKE</UserId><Account>` + Account + `</Account>` +
		`</GetCallerIdentityResult><ResponseMetadata><RequestId>0</RequestId></ResponseMetadata></GetCallerIdentityResponse>`), nil
}
