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

// onFargate are the scripts of testdata/script that run on Fargate, too: those about
// the start, the settings and the end of bastions, which depend on the launcher, and
// some about data and forwards, because the connection to a task is TCP and not a
// Unix socket. The other scripts test client, gateway and agent, which are the same
// with each launcher.
var onFargate = []string{
	"boot", "first", "join", "slowboot", "starts", "strangers", "names", "profiles",
	"env", "listen", "channels", "reload", "rotatefleet",
	"crash", "drain", "hangs", "idle", "lost", "maxlife", "successor", "handover", "leaks",
	"exec", "streams", "forward", "jump",
}

// TestScriptsOnFargate runs these scripts again, unchanged, with the launcher fargate
// on an AWS account of the test's own. Each task in it is a real bastion-agent at an
// address of its own.
func TestScriptsOnFargate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range onFargate {
		text, err := os.ReadFile("testdata/script/" + name + ".txtar")
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name+".txtar"), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	runScripts(t, dir, true)
}

// TestFargateScripts runs testdata/fargate, the scripts for this launcher only. They
// also have these commands:
//
//	fate FATE ARG    has launches fail: "failure REASON", "stopped STATE REASON", "noaddress", "fine"
//	stoptasks CODE R stops all tasks from outside, as people, Spot and maintenance do
//	nomemory         has all tasks run out of memory
//	stoptime D       has the task definition say so as its stopTimeout, and to the agent
//	deny ACTION      takes a permission from the gateway
//	permit ACTION    gives it back
//	define FAMILY U  registers a task definition that is tagged as the user's
//	taskdefs ...     checks the owners of all tasks and their task definitions
//	calls ACTION N   checks that there were so many calls; "_" counts all
//	dynalite         starts a DynamoDB for the gateways that start from now on
//	nodynalite       ends it, and its tables with it
//	awsenv           has programs that the script runs use the account, too
//	fleet NAME ...   starts gateways that share a table; see fleet_test.go
func TestFargateScripts(t *testing.T) {
	t.Parallel()
	runScripts(t, "testdata/fargate", true)
}

// A fakeAccount is the AWS account of one script.
type fakeAccount struct {
	cloud      *awsfake.Cloud
	containers *awsfake.Processes
	server     *httptest.Server
	release    func() // of the network
	dynamodb   string // the URL of dynalite; empty until it is started
	stopTables func() // of dynalite; may be nil

	mu   sync.Mutex
	fate awsfake.Fate
}

func (env *scriptEnv) toFargate() error {
	f := &fakeAccount{containers: &awsfake.Processes{
		Port: 2022,
		Dir:  env.dir,
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
	env.fargate = f
	return nil
}

// settings turns those for the local launcher into those for Fargate.
func (f *fakeAccount) settings(local map[string]string) map[string]string {
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
// account down. No user may ever have had two live tasks, and the gateway must have
// stopped tasks without an agent. A group stays for an hour after that.
func (f *fakeAccount) end(report interface {
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
	if f.stopTables != nil {
		f.stopTables()
	}
	f.release()
	for _, p := range problems {
		report.Log(p)
		defer report.FailNow()
	}
}

func fate(env *scriptEnv, ts *testscript.TestScript, args []string) {
	var fate awsfake.Fate
	switch {
	case env.fargate == nil:
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
	env.fargate.mu.Lock()
	defer env.fargate.mu.Unlock()
	env.fargate.fate = fate
}

func stopTasks(env *scriptEnv, ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: stoptasks CODE REASON")
	}
	env.fargate.cloud.StopAll(args[0], args[1])
}

func noMemory(env *scriptEnv, ts *testscript.TestScript, _ []string) {
	for _, task := range env.fargate.cloud.Tasks() {
		env.fargate.cloud.OutOfMemory(task.ARN)
	}
}

func stopTime(env *scriptEnv, ts *testscript.TestScript, args []string) {
	timeout, err := time.ParseDuration(strings.Join(args, " "))
	ts.Check(err)
	env.fargate.cloud.Set(func() { env.fargate.cloud.StopTimeout = timeout })
	env.fargate.containers.Env = append(env.fargate.containers.Env, "SALLYPORT_STOP_TIMEOUT="+timeout.String())
}

func deny(denied bool) func(*scriptEnv, *testscript.TestScript, []string) {
	return func(env *scriptEnv, ts *testscript.TestScript, args []string) {
		if len(args) != 1 {
			ts.Fatalf("usage: deny ACTION or permit ACTION")
		}
		env.fargate.cloud.Deny(args[0], denied)
	}
}

func define(env *scriptEnv, ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: define FAMILY USER")
	}
	_, err := env.fargate.cloud.Define(args[0], "bastion", args[1])
	ts.Check(err)
}

func taskDefs(env *scriptEnv, ts *testscript.TestScript, args []string) {
	var got []string
	for _, task := range env.fargate.cloud.Tasks() {
		got = append(got, task.Owner+" "+task.Definition[strings.LastIndexByte(task.Definition, '/')+1:])
	}
	if want := strings.Join(args, " "); strings.Join(got, ", ") != want {
		ts.Fatalf("got  %s\nwant %s", strings.Join(got, ", "), want)
	}
}

func calls(env *scriptEnv, ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: calls ACTION N")
	}
	n := 0
	for _, c := range env.fargate.cloud.Calls() {
		if c.Action == args[0] || args[0] == "_" {
			n++
		}
	}
	if fmt.Sprint(n) != args[1] {
		ts.Fatalf("%d calls of %s, want %s", n, args[0], args[1])
	}
}

func startDynalite(env *scriptEnv, ts *testscript.TestScript, _ []string) {
	var err error
	env.fargate.dynamodb, env.fargate.stopTables, err = awsfake.StartDynalite()
	ts.Check(err)
}

func stopDynalite(env *scriptEnv, _ *testscript.TestScript, _ []string) {
	env.fargate.stopTables()
	env.fargate.stopTables = nil
}

// environ returns the environment of programs that use the account.
func (f *fakeAccount) environ() []string {
	env := awsfake.Environ(f.server.URL)
	if f.dynamodb != "" {
		env = append(env, "AWS_ENDPOINT_URL_DYNAMODB="+f.dynamodb)
	}
	return env
}

func awsEnv(env *scriptEnv, ts *testscript.TestScript, _ []string) {
	for _, v := range env.fargate.environ() {
		name, value, _ := strings.Cut(v, "=")
		ts.Setenv(name, value)
	}
}
