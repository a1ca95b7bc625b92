package main

import (
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

// notOnFargate are the scripts of testdata/script about what only the local
// launcher has.
var notOnFargate = map[string]string{
	"accounts": "an image has one account for sessions; these are accounts of the gateway's machine",
	"config":   "is about the agent's program, which is in the image",
	"demo":     "gateway demo has the local launcher always",
	"confined": "runs an agent of its own",
	"noboot":   "reads the agent's last words, which go to the task's log; see failures in testdata/fargate",
}

// beforeBastions are the beginnings of the names of those about what happens, or
// is written down, in the gateway, whatever the launcher.
var beforeBastions = []string{"audit", "cert", "commands", "console", "keyscommand", "penalt", "proxy", "record", "revoke", "roles", "totp"}

// TestScriptsOnFargate runs the scripts of testdata/script again, unchanged, with
// the launcher fargate on an AWS account of the test's own. Each task in it is a
// real bastion-agent at an address of its own.
func TestScriptsOnFargate(t *testing.T) {
	dir := t.TempDir()
	all, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, script := range all {
		name := filepath.Base(script)
		if why, ok := notOnFargate[strings.TrimSuffix(name, ".txtar")]; ok {
			t.Logf("left out: %s: %s", name, why)
			continue
		}
		if slices.ContainsFunc(beforeBastions, func(begin string) bool { return strings.HasPrefix(name, begin) }) {
			continue
		}
		text, err := os.ReadFile(script)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	runScripts(t, dir, true)
}

// TestFargateScripts runs testdata/fargate, about what only that launcher has. The
// scripts have these commands more:
//
//	fate FATE ARG    has launches fail: "failure REASON", "stopped STATE REASON", "noaddress", "fine"
//	stoptasks CODE R stops all tasks from outside, as people, Spot and maintenance do
//	deny ACTION      takes a permission from the gateway
//	permit ACTION    gives it back
//	calls ACTION N   checks that there were so many calls; "_" counts all
//	awsenv           has programs that the script runs use the account, too
func TestFargateScripts(t *testing.T) { runScripts(t, "testdata/fargate", true) }

// A fargateWorld is the AWS account of one script.
type fargateWorld struct {
	cloud      *awsfake.Cloud
	containers *awsfake.Processes
	server     *httptest.Server
	release    func() // of the network

	mu   sync.Mutex
	fate awsfake.Fate
}

func (w *world) toFargate() error {
	f := &fargateWorld{containers: &awsfake.Processes{
		Port: 2022,
		Dir:  w.dir,
		Env:  []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "GORACE=halt_on_error=1 exitcode=66"},
	}}
	f.cloud = awsfake.New(f.containers)
	var err error
	if f.cloud.Network, f.release, err = awsfake.Loopback(); err != nil {
		return err
	}
	quick := awsfake.Fixed(50 * time.Millisecond)
	f.cloud.Times = awsfake.Times{Provisioning: quick, Pending: quick, Activating: quick, Reporting: quick, Deprovisioning: quick}
	f.cloud.MissingFor = 20 * time.Millisecond
	f.cloud.Duplicates = true
	f.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.fate
	}
	f.server = httptest.NewServer(f.cloud)
	w.fargate = f
	return nil
}

// settings turns those for the local launcher into those for Fargate.
func (f *fargateWorld) settings(local map[string]string) map[string]string {
	out := map[string]string{}
	program := filepath.Join(bin, "bastion-agent")
	for name, value := range local {
		profile, key, isLocal := strings.Cut(name, ".local.")
		switch {
		case isLocal && key == "agent":
			program = value
			continue
		case isLocal:
			name = profile + ".fargate." + key
		case name == "state_dir", !strings.Contains(name, "."):
			out[name] = value
			continue
		default:
			profile, _, _ = strings.Cut(name, ".")
		}
		out[name] = value
		switch profile {
		case "audit", "recordings":
			continue
		}
		for key, value := range map[string]string{
			".launcher":                "fargate",
			".fargate.cluster":         awsfake.Cluster,
			".fargate.task_definition": awsfake.TaskDefinition,
			".fargate.subnets":         "[" + strings.Join(awsfake.Subnets, ", ") + "]",
			".fargate.security_groups": awsfake.SecurityGroup,
		} {
			if _, given := local[profile+key]; !given {
				out[profile+key] = value
			}
		}
	}
	f.containers.Run(program)
	return out
}

// end waits for the tasks to end, of which the agents end now, and takes the
// account down. No user may ever have had two live tasks, and what has no agent
// must have been stopped by the gateway. A group stays for an hour after that.
func (f *fargateWorld) end(report interface {
	Log(...any)
	FailNow()
}) {
	tasks := func() []string {
		return slices.DeleteFunc(f.cloud.Left(), func(s string) bool { return strings.HasPrefix(s, "security group") })
	}
	for until := time.Now().Add(30 * time.Second); len(tasks()) > 0 && time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		for _, pid := range f.containers.Pids() {
			syscall.Kill(pid, syscall.SIGTERM)
		}
	}
	problems := append(f.cloud.Violations(), tasks()...)
	f.cloud.Close()
	f.server.Close()
	f.release()
	for _, p := range problems {
		report.Log(p)
		defer report.FailNow()
	}
}

func fate(w *world, ts *testscript.TestScript, args []string) {
	var fate awsfake.Fate
	switch {
	case w.fargate == nil:
		ts.Fatalf("this script is not on Fargate")
	case len(args) == 2 && args[0] == "failure":
		fate.Failure = args[1]
	case len(args) == 3 && args[0] == "stopped":
		fate.FailIn, fate.Reason = args[1], args[2]
	case len(args) == 1 && args[0] == "noaddress":
		fate.NoAddress = true
	case len(args) == 1 && args[0] == "fine":
	default:
		ts.Fatalf("usage: fate failure REASON | stopped STATE REASON | noaddress | fine")
	}
	w.fargate.mu.Lock()
	defer w.fargate.mu.Unlock()
	w.fargate.fate = fate
}

func stopTasks(w *world, ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: stoptasks CODE REASON")
	}
	w.fargate.cloud.StopAll(args[0], args[1])
}

func deny(denied bool) func(*world, *testscript.TestScript, []string) {
	return func(w *world, ts *testscript.TestScript, args []string) {
		if len(args) != 1 {
			ts.Fatalf("usage: deny ACTION or permit ACTION")
		}
		w.fargate.cloud.Deny(args[0], denied)
	}
}

func calls(w *world, ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: calls ACTION N")
	}
	n := 0
	for _, c := range w.fargate.cloud.Calls() {
		if c.Action == args[0] || args[0] == "_" {
			n++
		}
	}
	if fmt.Sprint(n) != args[1] {
		ts.Fatalf("%d calls of %s, want %s", n, args[0], args[1])
	}
}

func awsEnv(w *world, ts *testscript.TestScript, _ []string) {
	for _, v := range awsfake.Environ(w.fargate.server.URL) {
		name, value, _ := strings.Cut(v, "=")
		ts.Setenv(name, value)
	}
}
