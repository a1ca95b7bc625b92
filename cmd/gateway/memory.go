package main

import (
	"math"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// memoryBudget is how much the gateway may hold for connections if its
// configuration does not say it: half of what it may have in all, since that much
// may be garbage beside it before it is collected.
func memoryBudget() int64 {
	limit := debug.SetMemoryLimit(-1) // reads GOMEMLIMIT, which is set or infinite
	if limit == math.MaxInt64 {
		limit = min(machineMemory(), cgroupMemory("/proc/self/cgroup", "/sys/fs/cgroup"))
	}
	return max(limit/2, 64<<20)
}

func machineMemory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return math.MaxInt64
	}
	return int64(info.Totalram) * int64(info.Unit)
}

// cgroupMemory returns the least memory that the cgroup of this process, and those
// it is in, may have. membership is the file that names it, root where they are
// (cgroups(7)); in a container it is often the root itself.
func cgroupMemory(membership, root string) int64 {
	least := int64(math.MaxInt64)
	look := func(file string) {
		text, err := os.ReadFile(file)
		if err != nil {
			return // there is no such limit
		}
		// The word "max" stands for none.
		if limit, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil {
			least = min(least, limit)
		}
	}
	look(path.Join(root, "memory/memory.limit_in_bytes")) // version 1
	text, _ := os.ReadFile(membership)
	for line := range strings.Lines(string(text)) {
		name, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		for name = path.Clean("/" + name); ; name = path.Dir(name) {
			look(path.Join(root, name, "memory.max"))
			if name == "/" {
				break
			}
		}
	}
	return least
}
