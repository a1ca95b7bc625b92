package awsfake

import (
	"encoding/xml"
	"fmt"
	"net/url"
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

// openEgress is what a new group has.
func openEgress() []rule { return []rule{{"-1", "", "", "0.0.0.0/0"}} }

func zoneOf(subnet string) string {
	return Region + string(rune('a'+slices.Index(Subnets, subnet)))
}

type xmlTag struct {
	Key   string `xml:"key"`
	Value string `xml:"value"`
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
	ID   string `xml:"subnetId"`
	VPC  string `xml:"vpcId"`
	Zone string `xml:"availabilityZone"`
	CIDR string `xml:"cidrBlock"`
}

// ec2 answers a query.
func (c *Cloud) ec2(action string, form url.Values) ([]byte, *apiError) {
	var out any
	var failed *apiError
	switch action {
	case "DescribeSubnets":
		out, failed = describeSubnets(form)
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

// filters returns the values by the filter's name.
func filters(form url.Values) map[string][]string {
	all := map[string][]string{}
	for i := 1; form.Has(fmt.Sprintf("Filter.%d.Name", i)); i++ {
		all[form.Get(fmt.Sprintf("Filter.%d.Name", i))] = list(form, fmt.Sprintf("Filter.%d.Value", i))
	}
	return all
}

func describeSubnets(form url.Values) (any, *apiError) {
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
	for i, id := range Subnets {
		if len(ids) == 0 || slices.Contains(ids, id) {
			out.Subnets = append(out.Subnets, xmlSubnet{id, VPC, zoneOf(id), fmt.Sprintf("10.0.%d.0/20", 16*i)})
		}
	}
	return out, nil
}

func (c *Cloud) describeInterfaces(form url.Values) (any, *apiError) {
	var out struct {
		XMLName    xml.Name       `xml:"r"`
		Interfaces []xmlInterface `xml:"networkInterfaceSet>item"`
	}
	ids := list(form, "NetworkInterfaceId")
	seen := map[string]bool{}
	for _, name := range keys(c.tasks) {
		t := c.tasks[name]
		if !t.attached || len(ids) > 0 && !slices.Contains(ids, t.eni) {
			continue
		}
		seen[t.eni] = true
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
	return out, nil
}

// publicIP is where a task with a public address is reached. It differs from the
// private one, so that it can be told which was used.
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
	ids, want := list(form, "GroupId"), filters(form)
	for _, id := range ids {
		if c.groups[id] == nil {
			return nil, refuse("InvalidGroup.NotFound", "The security group '%s' does not exist", id)
		}
	}
	for _, id := range keys(c.groups) {
		g := c.groups[id]
		if len(ids) > 0 && !slices.Contains(ids, id) || !g.matches(want) {
			continue
		}
		x := xmlGroup{Owner: Account, ID: g.ID, Name: g.Name, Description: g.Description, VPC: g.VPC,
			Ingress: permissions(g.ingress), Egress: permissions(g.egress)}
		for _, t := range g.tags {
			x.Tags = append(x.Tags, xmlTag(t))
		}
		out.Groups = append(out.Groups, x)
	}
	most, _ := strconv.Atoi(form.Get("MaxResults"))
	from, _ := strconv.Atoi(form.Get("NextToken"))
	if from < 0 || from > len(out.Groups) {
		return nil, refuse("InvalidNextToken", "The token is not valid")
	}
	out.Groups = out.Groups[from:]
	if most == 0 {
		most = 1000
	}
	if len(out.Groups) > most {
		out.Groups, out.Next = out.Groups[:most], strconv.Itoa(from+most)
	}
	return out, nil
}

func (g *group) matches(want map[string][]string) bool {
	for name, values := range want {
		have := ""
		switch key, isTag := strings.CutPrefix(name, "tag:"); {
		case isTag:
			for _, t := range g.tags {
				if t.Key == key {
					have = t.Value
				}
			}
		case name == "group-name":
			have = g.Name
		case name == "group-id":
			have = g.ID
		case name == "vpc-id":
			have = g.VPC
		}
		if !slices.Contains(values, have) {
			return false
		}
	}
	return true
}

func (c *Cloud) createGroup(form url.Values) (any, *apiError) {
	name, vpc := form.Get("GroupName"), form.Get("VpcId")
	switch {
	case vpc != VPC:
		return nil, refuse("InvalidVpcID.NotFound", "The vpc ID '%s' does not exist", vpc)
	case name == "" || form.Get("GroupDescription") == "":
		return nil, refuse("MissingParameter", "The request must contain the parameter GroupName or GroupDescription")
	case len(name) > 255 || strings.HasPrefix(name, "sg-"):
		return nil, refuse("InvalidParameterValue", "Value (%s) for parameter groupName is invalid.", name)
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
	c.groups[g.ID] = g
	return struct {
		XMLName xml.Name `xml:"r"`
		Return  bool     `xml:"return"`
		ID      string   `xml:"groupId"`
		Tags    []xmlTag `xml:"tagSet>item"`
	}{Return: true, ID: g.ID}, nil
}

func (c *Cloud) deleteGroup(id string) *apiError {
	if c.groups[id] == nil {
		return refuse("InvalidGroup.NotFound", "The security group '%s' does not exist", id)
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
	if len(changed) > 60 {
		return refuse("RulesPerSecurityGroupLimitExceeded", "The maximum number of rules per security group has been reached.")
	}
	*rules = changed
	return nil
}

// parseRules takes IpPermissions apart.
func (c *Cloud) parseRules(form url.Values) ([]rule, *apiError) {
	var all []rule
	for i := 1; form.Has(fmt.Sprintf("IpPermissions.%d.IpProtocol", i)); i++ {
		at := fmt.Sprintf("IpPermissions.%d.", i)
		r := rule{protocol: form.Get(at + "IpProtocol"), from: form.Get(at + "FromPort"), to: form.Get(at + "ToPort")}
		for _, peer := range []string{"IpRanges.%d.CidrIp", "Ipv6Ranges.%d.CidrIpv6", "Groups.%d.GroupId", "PrefixListIds.%d.PrefixListId"} {
			for j := 1; form.Has(at + fmt.Sprintf(peer, j)); j++ {
				r.peer = form.Get(at + fmt.Sprintf(peer, j))
				if strings.HasPrefix(r.peer, "sg-") && c.groups[r.peer] == nil {
					return nil, refuse("InvalidGroup.NotFound", "The security group '%s' does not exist", r.peer)
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
