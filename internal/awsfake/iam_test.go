package awsfake

import "testing"

func TestPolicy(t *testing.T) {
	var p Policy
	for _, text := range []string{
		`{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": ["ecs:StopTask", "ecs:Describe*"], "Resource": "arn:aws:ecs:*:task/a/*",
			"Condition": {"ArnEquals": {"ecs:cluster": ["arn:a", "arn:b"]}, "StringEquals": {"k": "v"}}}]}`,
		`{"Effect": "Allow", "Action": "ecs:ListTasks", "Resource": "*"}`,
		`[{"Effect": "Allow", "Action": "iam:PassRole", "Resource": ["r1", "r2"]}]`,
	} {
		if err := p.Allow([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	task := "arn:aws:ecs:eu-west-1:1:task/a/1"
	both := map[string]string{"ecs:cluster": "arn:b", "k": "v", "other": "x"}
	for _, tt := range []struct {
		need need
		want bool
	}{
		{need{"ecs:StopTask", task, both}, true},
		{need{"ecs:DescribeTasks", task, both}, true},
		{need{"ecs:RunTask", task, both}, false},
		{need{"ecs:StopTask", "arn:aws:ecs:eu-west-1:1:task/b/1", both}, false},
		{need{"ecs:StopTask", task, map[string]string{"ecs:cluster": "arn:c", "k": "v"}}, false},
		{need{"ecs:StopTask", task, map[string]string{"ecs:cluster": "arn:a"}}, false}, // a key that is not there
		{need{"ecs:ListTasks", "*", nil}, true},
		{need{"iam:PassRole", "r2", nil}, true},
		{need{"iam:PassRole", "r3", nil}, false},
		{need{"sts:GetCallerIdentity", "*", nil}, true},
	} {
		if got := p.allows(tt.need); got != tt.want {
			t.Errorf("%+v: %v", tt.need, got)
		}
	}
	for _, text := range []string{
		`{`, `{"Effect": "Deny", "Action": "ecs:ListTasks", "Resource": "*"}`,
		`{"Effect": "Allow", "Action": "ecs:ListTasks", "Resource": "*", "Condition": {"StringLike": {"k": "v"}}}`,
	} {
		if p.Allow([]byte(text)) == nil {
			t.Errorf("taken: %s", text)
		}
	}
}
