package oplog

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

func TestClip(t *testing.T) {
	long := strings.Repeat("é", 200_000)
	var b bytes.Buffer
	log := New(&b).With("user", long)
	log.Error("m", "err", errors.New(long), "short", "x", "n", 7, "stack", long)
	if b.Len() > 3*maxValue+maxStack {
		t.Errorf("a line of %d bytes", b.Len())
	}
	var line map[string]any
	if err := json.Unmarshal(b.Bytes(), &line); err != nil {
		t.Fatal(err)
	}
	if line["short"] != "x" || line["n"] != 7.0 || line["msg"] != "m" {
		t.Errorf("what is short has changed: %v", line)
	}
	if user := line["user"].(string); !strings.HasPrefix(user, "éé") || !strings.HasSuffix(user, "bytes more)") {
		t.Errorf("user is %q", user[len(user)-40:])
	}
}
