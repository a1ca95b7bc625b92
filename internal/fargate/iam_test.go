package fargate

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestPolicy holds docs/iam.md against the code: each call that is made is in its
// policies and in its tables, and nothing else is.
func TestPolicy(t *testing.T) {
	called := map[string]bool{}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	// Calls, and paginators, of the clients.
	call := regexp.MustCompile(`\b(?:c\.|api\.|Cloud\.)?(ecs|run|ec2|sts|api)\.(?:New)?([A-Z][A-Za-z]+?)(?:Paginator)?\((?:ctx|l\.Cloud|c\.)`)
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
	}
	// What comes with another call.
	called["ecs:TagResource"], called["iam:PassRole"], called["ec2:CreateTags"] = true, true, true
	if len(called) < 15 {
		t.Errorf("only %d calls found in the code: %v", len(called), called)
	}

	doc, err := os.ReadFile("../../docs/iam.md")
	if err != nil {
		t.Fatal(err)
	}
	granted := map[string]bool{"sts:GetCallerIdentity": true} // permitted to everybody
	for _, block := range regexp.MustCompile("(?s)```json\n(.*?)```").FindAllStringSubmatch(string(doc), -1) {
		text := strings.TrimSpace(block[1])
		if strings.HasPrefix(text, "{") && !strings.Contains(text, `"Statement"`) {
			text = "[" + text + "]"
		}
		if strings.HasPrefix(text, "[") {
			text = `{"Statement": ` + text + "}"
		}
		var policy struct{ Statement []struct{ Action any } }
		if err := json.Unmarshal([]byte(text), &policy); err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		for _, s := range policy.Statement {
			switch action := s.Action.(type) {
			case string:
				granted[action] = true
			case []any:
				for _, a := range action {
					granted[a.(string)] = true
				}
			}
		}
	}
	explained := map[string]bool{}
	for _, line := range regexp.MustCompile(`(?m)^\| (\x60.*?) \|`).FindAllStringSubmatch(string(doc), -1) {
		for _, action := range regexp.MustCompile("`([a-z0-9]+:[A-Za-z]+)`").FindAllStringSubmatch(line[1], -1) {
			explained[action[1]] = true
		}
	}
	for _, list := range []struct {
		name    string
		actions map[string]bool
	}{{"policies", granted}, {"tables", explained}} {
		for action := range called {
			if !list.actions[action] {
				t.Errorf("%s is called, and not in the %s of docs/iam.md", action, list.name)
			}
		}
		var unused []string
		for action := range list.actions {
			if !called[action] {
				unused = append(unused, action)
			}
		}
		if slices.Sort(unused); len(unused) > 0 {
			t.Errorf("in the %s of docs/iam.md, and never called: %v", list.name, unused)
		}
	}
}
