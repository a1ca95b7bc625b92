package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// inUse returns how many files the gateway and each bastion have open, the epoll's
// and such included, and how many processes the bastions have started that have
// not ended, or have not been waited for.
// Connections to AWS are none of them: idle ones are kept, by intention.
func (env *scriptEnv) inUse() map[string]int {
	if env.fargate != nil {
		env.fargate.server.CloseClientConnections()
	}
	count := func(pattern string, of int) int {
		found, _ := filepath.Glob(fmt.Sprintf(pattern, of))
		return len(found)
	}
	all := map[string]int{"files of the gateway": count("/proc/%d/fd/*", env.gateway.Process.Pid)}
	for _, pid := range env.pids() {
		all[fmt.Sprintf("files of bastion %d", pid)] = count("/proc/%d/fd/*", pid)
		children := 0
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		for _, thread := range threads {
			text, _ := os.ReadFile(thread)
			children += len(strings.Fields(string(text)))
		}
		all[fmt.Sprintf("processes of bastion %d", pid)] = children
	}
	return all
}

// baseline takes the minimum over half a second, because connections from before may
// still be ending.
func (env *scriptEnv) baseline(_ *testscript.TestScript, _ []string) {
	env.open = env.inUse()
	for range 10 {
		time.Sleep(50 * time.Millisecond)
		now := env.inUse()
		for what := range env.open {
			env.open[what] = min(env.open[what], now[what])
		}
	}
}

func (env *scriptEnv) settled(ts *testscript.TestScript, _ []string) {
	deadline := time.Now().Add(time.Minute)
	for what, before := range env.open {
		for n := env.inUse()[what]; n > before; n = env.inUse()[what] {
			if time.Now().After(deadline) {
				ts.Fatalf("%d %s are there, and there were %d", n, what, before)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

// createdBy matches the function that started a goroutine in the runtime's output. Of its own goroutines, whose number is its own affair (the
// garbage collector's workers come with the work), it says "created by runtime.".
// Idle connections to AWS are kept, by intention.
var createdBy = regexp.MustCompile(`(?m)^created by (.+?)(?: in goroutine \d+)?$`)

func (env *scriptEnv) goroutines(ts *testscript.TestScript, _ []string) {
	before, err := os.ReadFile(env.path("gateway.log"))
	ts.Check(err)
	ts.Check(env.gateway.Process.Signal(syscall.SIGQUIT)) // the runtime prints all
	env.gateway.Wait()
	env.gateway = nil
	log, err := os.ReadFile(env.path("gateway.log"))
	ts.Check(err)
	ts.Check(os.WriteFile(env.path("gateway.log"), before, 0o600))
	now := make(map[string]int)
	for _, m := range createdBy.FindAllSubmatch(log[len(before):], -1) {
		if by := string(m[1]); !strings.HasPrefix(by, "runtime.") && !strings.HasPrefix(by, "net/http.(*Transport)") {
			now[by]++
		}
	}
	if len(now) == 0 {
		ts.Fatalf("the gateway did not say which goroutines it has:\n%s", log[len(before):])
	}
	if env.routines == nil {
		env.routines = now
	}
	for by, n := range now {
		if n > env.routines[by] {
			ts.Fatalf("%d goroutines of %s, and there were %d:\n%s", n, by, env.routines[by], log[len(before):])
		}
	}
}
