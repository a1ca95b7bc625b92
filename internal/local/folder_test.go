package local

import (
	"encoding/json"
	"testing"
)

const goodKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKHEChMJ0QYL9bXAQ8gm+zW9mX9KuGwX2IqBQyB1L8Sp"

func TestParseReport(t *testing.T) {
	tests := []struct {
		line string
		ok   bool
	}{
		{`{"addr":"unix:/run/a.sock","host_key":"` + goodKey + `"}`, true},
		{`{"addr":"127.0.0.1:40123","host_key":"` + goodKey + `"}`, false},
		{`{"addr":"10.0.0.1:22","host_key":"` + goodKey + `"}`, false},
		{`{"addr":"unix:a.sock","host_key":"` + goodKey + `"}`, false},
		{`{"addr":"unix:/run/../a.sock","host_key":"` + goodKey + `"}`, false},
		{`{"addr":"unix:/run/a.sock","host_key":"` + goodKey + `\n` + goodKey + `"}`, false},
		{`{"addr":"unix:/run/a.sock","host_key":"ssh-ed25519 AAAA"}`, false},
		{`{"addr":"unix:/run/a.sock"}`, false},
		{`{}`, false}, {`[]`, false}, {``, false}, {`null`, false},
	}
	for _, tt := range tests {
		if _, err := parseReport([]byte(tt.line)); (err == nil) != tt.ok {
			t.Errorf("%s: %v", tt.line, err)
		}
	}
}

func FuzzParseReport(f *testing.F) {
	f.Add([]byte(`{"addr":"unix:/run/a.sock","host_key":"` + goodKey + `"}`))
	f.Add([]byte(`{"addr":"[::1%eth0]:1","host_key":"no-pty ` + goodKey + ` x"}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := parseReport(line)
		if err != nil {
			return
		}
		// An accepted report is read back unchanged from the task file.
		data, err := json.Marshal(taskFile{ID: "x", Generation: 1, report: r})
		if err != nil {
			t.Fatal(err)
		}
		back, err := parseTaskFile(data)
		if err != nil || back.report != r {
			t.Errorf("%+v became %+v: %v", r, back, err)
		}
	})
}

func FuzzParseTaskFile(f *testing.F) {
	f.Add([]byte(`{"id":"local-alice+default-1-00c0ffee","generation":1}`))
	f.Add([]byte(`{"id":"x","generation":9223372036854775807,"addr":"127.0.0.1:1","host_key":"` + goodKey + `"}`))
	f.Add([]byte(`{"id":"x","generation":1,"addr":"unix:/a","host_key":"` + goodKey + `"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseTaskFile(data)
		if err != nil {
			return
		}
		if r.ID == "" || r.Generation < 1 {
			t.Errorf("accepted %+v", r)
		}
		if r.Addr != "" && r.task().HostKey == nil {
			t.Errorf("a task without a host key: %+v", r)
		}
	})
}
