package awsfake

import (
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// A Policy is an identity-based policy of IAM. It may allow actions on resources, under
// conditions with the operators StringEquals and ArnEquals.
type Policy struct {
	Statement []statement
}

type statement struct {
	Effect    string
	Action    oneOrMore
	Resource  oneOrMore
	Condition map[string]map[string]oneOrMore // by operator and key
}

// oneOrMore is a string, or a list of strings.
type oneOrMore []string

func (o *oneOrMore) UnmarshalJSON(text []byte) error {
	var one string
	if json.Unmarshal(text, &one) == nil {
		*o = oneOrMore{one}
		return nil
	}
	return json.Unmarshal(text, (*[]string)(o))
}

// Allow adds a policy, a statement, or a list of statements, in JSON.
func (p *Policy) Allow(text []byte) error {
	var whole Policy
	trimmed := strings.TrimSpace(string(text))
	if !strings.Contains(trimmed, `"Statement"`) {
		if strings.HasPrefix(trimmed, "{") {
			trimmed = "[" + trimmed + "]"
		}
		trimmed = `{"Statement": ` + trimmed + "}"
	}
	if err := json.Unmarshal([]byte(trimmed), &whole); err != nil {
		return err
	}
	for _, s := range whole.Statement {
		if s.Effect != "Allow" {
			return fmt.Errorf("only Allow is understood, not %q", s.Effect)
		}
		for operator := range s.Condition {
			if operator != "StringEquals" && operator != "ArnEquals" {
				return fmt.Errorf("the operator %s is not understood", operator)
			}
		}
	}
	p.Statement = append(p.Statement, whole.Statement...)
	return nil
}

// A need is a permission that a request needs, with its context keys.
type need struct {
	action, resource string
	context          map[string]string
}

// allows reports whether a statement permits the need. Patterns are globs.
func (p *Policy) allows(n need) bool {
	if n.action == "sts:GetCallerIdentity" { // everybody may
		return true
	}
	return slices.ContainsFunc(p.Statement, func(s statement) bool {
		matches := func(value string) func(string) bool {
			return func(pattern string) bool { return glob(pattern, value) }
		}
		if !slices.ContainsFunc(s.Action, matches(n.action)) || !slices.ContainsFunc(s.Resource, matches(n.resource)) {
			return false
		}
		for _, keys := range s.Condition {
			for key, values := range keys {
				have, ok := n.context[key]
				if !ok || !slices.ContainsFunc(values, matches(have)) {
					return false
				}
			}
		}
		return true
	})
}

// needs returns the permissions that a request needs, with resources and context keys as
// in the Service Authorization Reference.
func (c *Cloud) needs(action string, in runTask, body []byte, form url.Values) []need {
	inCluster := func(name string) map[string]string {
		return map[string]string{"ecs:cluster": clusterARN(strings.TrimPrefix(name, clusterARN("")))}
	}
	var named struct {
		Cluster string   `json:"cluster"`
		Task    string   `json:"task"`
		Tasks   []string `json:"tasks"`
	}
	json.Unmarshal(body, &named) // what it cannot be is refused later
	short := strings.TrimPrefix(named.Cluster, clusterARN(""))
	group := func(id string) need {
		n := need{action, arn("ec2", "security-group/"+id), map[string]string{}}
		if g := c.groups[id]; g != nil {
			for _, t := range g.tags {
				n.context["aws:ResourceTag/"+t.Key] = t.Value
			}
		}
		return n
	}
	switch action {
	case "sts:GetCallerIdentity":
		return []need{{action, "*", nil}}
	case "ecs:RunTask":
		def := c.definitions[c.pinned(in.TaskDefinition)]
		definition := def.TaskDefinitionArn
		if definition == "" {
			definition = arn("ecs", "task-definition/"+in.TaskDefinition)
		}
		all := []need{{action, definition, inCluster(in.Cluster)}}
		taskRole := def.TaskRole
		var o overrides
		if json.Unmarshal(in.Overrides, &o) == nil && o.TaskRole != "" {
			taskRole = o.TaskRole
		}
		for _, role := range []string{taskRole, def.ExecutionRole} {
			if role != "" {
				all = append(all, need{"iam:PassRole", role, map[string]string{"iam:PassedToService": "ecs-tasks.amazonaws.com"}})
			}
		}
		if len(in.Tags) > 0 {
			all = append(all, need{"ecs:TagResource", arn("ecs", "task/"+short+"/*"), map[string]string{"ecs:CreateAction": "RunTask"}})
		}
		return all
	case "ecs:DescribeTasks", "ecs:StopTask":
		var all []need
		for _, t := range append(named.Tasks, named.Task) {
			if t != "" {
				all = append(all, need{action, taskARN(short, t), inCluster(named.Cluster)})
			}
		}
		return all
	case "ecs:ListTasks":
		return []need{{action, "*", inCluster(named.Cluster)}}
	case "ec2:CreateSecurityGroup":
		all := []need{group("*"), {action, arn("ec2", "vpc/"+form.Get("VpcId")), nil}}
		if form.Has("TagSpecification.1.ResourceType") {
			all = append(all, need{"ec2:CreateTags", arn("ec2", "security-group/*"), map[string]string{"ec2:CreateAction": "CreateSecurityGroup"}})
		}
		return all
	case "ec2:DeleteSecurityGroup", "ec2:AuthorizeSecurityGroupIngress", "ec2:AuthorizeSecurityGroupEgress",
		"ec2:RevokeSecurityGroupIngress", "ec2:RevokeSecurityGroupEgress":
		return []need{group(form.Get("GroupId"))}
	}
	return []need{{action, "*", nil}}
}
