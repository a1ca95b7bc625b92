package sallyport_test

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"
)

// TestIAM compares the source, docs/iam.md and the templates of deploy: the policies and
// tables of the page have the actions of AWS that the gateway calls, and no others; each
// statement of a template's policy for gateways has the actions and the condition keys of
// the page's statement with the same Sid.
func TestIAM(t *testing.T) {
	doc, err := os.ReadFile("docs/iam.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := documentedStatements(t, string(doc))

	granted := map[string]bool{"sts:GetCallerIdentity": true} // needs no permission
	for _, s := range documented {
		for _, action := range s.actions {
			granted[action] = true
		}
	}
	explained := map[string]bool{}
	for _, line := range regexp.MustCompile(`(?m)^\| (\x60.*?) \|`).FindAllStringSubmatch(string(doc), -1) {
		for _, action := range regexp.MustCompile("`([a-z0-9]+:[A-Za-z]+)`").FindAllStringSubmatch(line[1], -1) {
			explained[action[1]] = true
		}
	}
	called := calledActions(t)
	for _, list := range []struct {
		name    string
		actions map[string]bool
	}{{"policies", granted}, {"tables", explained}} {
		for action := range called {
			if !list.actions[action] {
				t.Errorf("%s is called, and not in the %s of docs/iam.md", action, list.name)
			}
		}
		for action := range list.actions {
			if !called[action] {
				t.Errorf("%s is in the %s of docs/iam.md, and never called", action, list.name)
			}
		}
	}

	for _, template := range []struct {
		path       string
		statements map[string]statement
		without    []string // statements of the page that it does not need
	}{
		{"deploy/terraform/iam.tf", terraformStatements(t), []string{"PublicAddress", "CreateLedger"}},
		{"deploy/cloudformation/quickstart.yaml", quickstartStatements(t),
			[]string{"PublicAddress", "CreateLedger", "StartUsersOwn", "FindUsersOwn", "ReadSecrets", "Decrypt"}},
	} {
		for sid, want := range documented {
			got, ok := template.statements[sid]
			switch left := slices.Contains(template.without, sid); {
			case ok == left:
				t.Errorf("%s: statement %s is there: %v, want %v", template.path, sid, ok, !left)
			case ok && (!slices.Equal(got.actions, want.actions) || !slices.Equal(got.conditions, want.conditions)):
				t.Errorf("%s: statement %s has %q under %q, and docs/iam.md %q under %q", template.path, sid, got.actions, got.conditions, want.actions, want.conditions)
			}
		}
		for sid := range template.statements {
			if _, ok := documented[sid]; !ok {
				t.Errorf("%s: statement %s is not in docs/iam.md", template.path, sid)
			}
		}
	}
}

// A statement is one of a policy, without its resources.
type statement struct {
	actions    []string // sorted
	conditions []string // keys, sorted
}

// newStatement returns the statement in the form of JSON.
func newStatement(action any, condition map[string]map[string]any) statement {
	var s statement
	switch action := action.(type) {
	case string:
		s.actions = []string{action}
	case []any:
		for _, a := range action {
			s.actions = append(s.actions, a.(string))
		}
	}
	for _, keys := range condition {
		s.conditions = slices.AppendSeq(s.conditions, maps.Keys(keys))
	}
	slices.Sort(s.actions)
	slices.Sort(s.conditions)
	return s
}

// documentedStatements returns the statements of docs/iam.md, by Sid.
func documentedStatements(t *testing.T, doc string) map[string]statement {
	all := map[string]statement{}
	for _, block := range regexp.MustCompile("(?s)```json\n(.*?)```").FindAllStringSubmatch(doc, -1) {
		text := strings.TrimSpace(block[1])
		if strings.HasPrefix(text, "{") && !strings.Contains(text, `"Statement"`) {
			text = "[" + text + "]"
		}
		if strings.HasPrefix(text, "[") {
			text = `{"Statement": ` + text + "}"
		}
		var policy struct {
			Statement []struct {
				Sid       string
				Action    any
				Condition map[string]map[string]any
			}
		}
		if err := json.Unmarshal([]byte(text), &policy); err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		for _, s := range policy.Statement {
			if _, ok := all[s.Sid]; ok || s.Sid == "" {
				t.Errorf("docs/iam.md: statement %q is not the only one", s.Sid)
			}
			all[s.Sid] = newStatement(s.Action, s.Condition)
		}
	}
	return all
}

// calledActions returns the actions of AWS that the source calls, and those that these
// need.
func calledActions(t *testing.T) map[string]bool {
	called := map[string]bool{}
	// These match the calls and paginators of the AWS clients.
	call := regexp.MustCompile(`\b(?:c\.|api\.|Cloud\.)?(ecs|run|ec2|sts|api)\.(?:New)?([A-Z][A-Za-z]+?)(?:Paginator)?\((?:ctx|l\.Cloud|c\.)`)
	secret := regexp.MustCompile(`\br\.(ssm|secrets)\.([A-Z][A-Za-z]+)\(ctx`)
	item := regexp.MustCompile(`\bt\.client\.([A-Z][A-Za-z]+)\(|\bdynamodb\.New([A-Z][A-Za-z]+)Paginator\(`)
	for _, pattern := range []string{"internal/fargate/*.go", "internal/dynamo/*.go", "internal/secrets/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range call.FindAllStringSubmatch(string(text), -1) {
				service := map[string]string{"run": "ecs", "api": "ec2"}[m[1]]
				if service == "" {
					service = m[1]
				}
				called[service+":"+m[2]] = true
			}
			for _, m := range secret.FindAllStringSubmatch(string(text), -1) {
				called[map[string]string{"ssm": "ssm", "secrets": "secretsmanager"}[m[1]]+":"+m[2]] = true
			}
			for _, m := range item.FindAllStringSubmatch(string(text), -1) {
				called["dynamodb:"+m[1]+m[2]] = true
			}
		}
	}
	if len(called) < 15 {
		t.Errorf("only %d calls found in the code: %v", len(called), called)
	}
	// These are permissions that the calls above need without being calls, and that of
	// the endpoint that package ecstask calls.
	for _, action := range []string{"ecs:TagResource", "iam:PassRole", "ec2:CreateTags", "kms:Decrypt", "ecs:UpdateTaskProtection"} {
		called[action] = true
	}
	return called
}

// terraformStatements returns the statements for gateways in deploy/terraform/iam.tf.
func terraformStatements(t *testing.T) map[string]statement {
	text, err := os.ReadFile("deploy/terraform/iam.tf")
	if err != nil {
		t.Fatal(err)
	}
	gateway, _, found := strings.Cut(string(text), "# The execution roles")
	if !found {
		t.Fatal("deploy/terraform/iam.tf has no execution roles")
	}
	all := map[string]statement{}
	for _, part := range regexp.MustCompile(`(?m)^\s*\{?\s*Sid += `).Split(gateway, -1)[1:] {
		m := regexp.MustCompile(`(?s)^"(\w+)".*?\bAction += \[(.*?)\](.*)`).FindStringSubmatch(part)
		if m == nil {
			t.Fatalf("deploy/terraform/iam.tf: no actions in\n%s", part)
		}
		var s statement
		for _, quoted := range regexp.MustCompile(`"([^"]+)"`).FindAllStringSubmatch(m[2], -1) {
			s.actions = append(s.actions, quoted[1])
		}
		if condition := regexp.MustCompile(`(?m)^\s*Condition += (.*)$`).FindStringSubmatch(m[3]); condition != nil {
			value := strings.Replace(condition[1], "local.in_cluster", `{ ArnEquals = { "ecs:cluster" = x } }`, 1)
			for _, key := range regexp.MustCompile(`"([a-z0-9]+:[^"]+)" = `).FindAllStringSubmatch(value, -1) {
				s.conditions = append(s.conditions, key[1])
			}
			if s.conditions == nil {
				t.Errorf("deploy/terraform/iam.tf: no key in the condition %s", value)
			}
		}
		slices.Sort(s.actions)
		slices.Sort(s.conditions)
		all[m[1]] = s
	}
	return all
}

// quickstartStatements returns the statements of the gateways' task role in
// deploy/cloudformation/quickstart.yaml, with those of the policies that parameters add.
func quickstartStatements(t *testing.T) map[string]statement {
	text, err := os.ReadFile("deploy/cloudformation/quickstart.yaml")
	if err != nil {
		t.Fatal(err)
	}
	type document struct {
		Statement []struct {
			Sid       string                    `yaml:"Sid"`
			Action    []any                     `yaml:"Action"`
			Condition map[string]map[string]any `yaml:"Condition"`
		} `yaml:"Statement"`
	}
	var template struct {
		Resources map[string]struct {
			Type       string `yaml:"Type"`
			Properties struct {
				PolicyDocument document `yaml:"PolicyDocument"`
				Roles          []string `yaml:"Roles"`
				Policies       []struct {
					PolicyDocument document `yaml:"PolicyDocument"`
				} `yaml:"Policies"`
			} `yaml:"Properties"`
		} `yaml:"Resources"`
	}
	// Functions such as !Sub are tags, of which the values matter here only.
	plain := regexp.MustCompile(`!(Sub|Ref|GetAtt|If|Select|Cidr|GetAZs|Join|Equals|Not|And|Condition|Contains)\b`).ReplaceAll(text, nil)
	if err := yaml.Unmarshal(plain, &template); err != nil {
		t.Fatal(err)
	}
	all := map[string]statement{}
	add := func(d document) {
		for _, s := range d.Statement {
			if _, ok := all[s.Sid]; ok {
				t.Errorf("deploy/cloudformation/quickstart.yaml: statement %s is there twice", s.Sid)
			}
			all[s.Sid] = newStatement(s.Action, s.Condition)
		}
	}
	for _, r := range template.Resources {
		if r.Type == "AWS::IAM::Policy" && slices.Contains(r.Properties.Roles, "GatewayTaskRole") {
			add(r.Properties.PolicyDocument)
		}
	}
	for _, policy := range template.Resources["GatewayTaskRole"].Properties.Policies {
		add(policy.PolicyDocument)
	}
	return all
}
