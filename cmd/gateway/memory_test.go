package main

import (
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"testing"
)

func TestCgroupMemory(t *testing.T) {
	tests := []struct {
		name, membership string
		files            map[string]string
		want             int64
	}{
		{"none", "0::/\n", nil, math.MaxInt64},
		{"a container", "0::/\n", map[string]string{"memory.max": "1000\n"}, 1000},
		{"a service", "0::/system.slice/gateway.service\n", map[string]string{
			"memory.max": "9000", "system.slice/memory.max": "max\n", "system.slice/gateway.service/memory.max": "3000\n",
		}, 3000},
		{"in a smaller slice", "0::/small.slice/gateway.service\n", map[string]string{
			"small.slice/memory.max": "2000\n", "small.slice/gateway.service/memory.max": "3000\n",
		}, 2000},
		{"version 1", "5:memory:/docker/1234\n", map[string]string{"memory/memory.limit_in_bytes": "4000\n"}, 4000},
		{"version 1 without a limit", "5:memory:/\n", map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 9223372036854771712},
		{"outside of what can be seen", "0::/../../elsewhere\n", map[string]string{"memory.max": "1000\n"}, 1000},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			membership := filepath.Join(root, "membership")
			files := map[string]string{"membership": tt.membership}
			for name, text := range tt.files {
				files[name] = text
			}
			for name, text := range files {
				file := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got := cgroupMemory(membership, root); got != tt.want {
				t.Errorf("got %d, want %d", got, tt.want)
			}
		})
	}
}

func TestMemoryBudget(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	debug.SetMemoryLimit(1 << 30)
	if got := memoryBudget(); got != 1<<29 {
		t.Errorf("with GOMEMLIMIT=1GiB: %d", got)
	}
	debug.SetMemoryLimit(math.MaxInt64)
	if got := memoryBudget(); got < 64<<20 || got > machineMemory() {
		t.Errorf("on this machine: %d", got)
	}
}
