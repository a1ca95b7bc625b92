package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

var bin string // holds the two programs under test

// TestMain also runs the programs pty and confined, which are this binary.
func TestMain(m *testing.M) {
	programs := map[string]func(){"pty": ptyMain, "confined": confinedMain}
	if programs[filepath.Base(os.Args[0])] == nil {
		sshtest.PrivateEtc()
	}
	testscript.Main(withPrograms{m}, programs)
}

// withPrograms builds the programs before it runs the tests: the shipped binaries are
// tested.
type withPrograms struct{ m *testing.M }

func (w withPrograms) Run() int {
	flag.Parse()
	// Scripts mostly wait, for boots, clocks and each other.
	parallel := "8"
	flag.Visit(func(f *flag.Flag) {
		if f.Name == "test.parallel" {
			parallel = f.Value.String()
		}
	})
	flag.Set("test.parallel", parallel)

	dir, err := os.MkdirTemp("", "sallyport-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	bin = dir
	build := exec.Command("go", "build", "-o", dir, "../gateway", "../bastion-agent")
	if raceEnabled {
		build = exec.Command("go", "build", "-race", "-o", dir, "../gateway", "../bastion-agent")
	}
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n%s", build, err, out)
		return 1
	}
	return w.m.Run()
}

// TestScripts runs testdata/script. Each script finds
//
//	gateway.yaml   a configuration for user alice, whose bastions run as the account that runs the test
//	id, id2        alice's key, and a key that is nobody's
//	ssh_config     which is all that ssh reads: host "gateway", and "inner" and "other", which are the same
//	               gateway under other names, for jumps; ssh_config_stranger has key id2
//	$LOOP          an address of this machine that no other script uses, so that ports may be fixed
//	$ME            the account that bastions run in
//	$PORT $GATEWAY once it is started, where the gateway listens on 127.0.0.1, and its process
//
// and these commands beside testscript's own:
//
//	set NAME VALUE   sets a setting in gateway.yaml: "drain", "audit.to", or "default.idle" for one of a profile
//	start [CONFIG]   starts the gateway, logging to gateway.log; with gateway.yaml, or another configuration
//	logreader CMD    pipes the output of the next gateway to a shell command, whose output is gateway.log
//	signal           sends it SIGTERM, and does not wait
//	terminate [INT]  sends it SIGTERM, or SIGINT, and waits for it to end; the exit status must be 0
//	succeed          sends it SIGTERM, and starts its successor on the same port while it drains
//	                 ($GATEWAY is the successor, and $BEFORE the one that drains)
//	handover         sends it SIGUSR2, and waits until its successor has the port
//	ended PID        waits for the end of a successor; the exit status must be 0
//	gatewayenv N=V   sets variables in the environment of gateways that start from now on
//	retired          waits for the gateway that has been succeeded to end; the exit status must be 0
//	kill9            kills it, as kill -9 does
//	agents N         waits until N bastions run
//	killagents       kills all bastions, as kill -9 does
//	freeze           has all bastions hang, as kill -STOP does
//	status N CMD     runs CMD, whose exit status must be N
//	logged REGEXP F  waits, for a minute, until a line of file F matches; with -count=N before it, until N do
//	eventually CMD   runs CMD until it succeeds, for a minute
//	append FILE TEXT adds a line to a file
//	secrets          serves each file stored/NAME as the parameter NAME of AWS, to the gateway and to the script's programs
//	listen ADDR HOW  serves TCP, or a Unix socket if ADDR is a path: with "echo", or "banner" and then echo
//	attack NAME      behaves as no honest client does; see attack_test.go
//	baseline         remembers how many files the gateway and the bastions have open, and how many processes the latter have
//	settled          waits until they are as many again
//	account NAME     adds an account to a private copy of /etc, and has its name in $NAME and its home directory in $NAME_HOME
//	cert FILE        makes a certificate of TLS for localhost and its key, FILE.pem and FILE.key
//	shell PAGE       writes the shell blocks of docs/PAGE to PAGE.1, PAGE.2 and so on
//	events FILE      compares the audit log with a file; see audit_test.go
//	collector        starts a collector of traces at $LOOP:4318
//	traces FILE ...  compares the traces that it has with files; see tracing_test.go
//	goroutines       ends the gateway and counts its goroutines; the second time, there may not be more
//
// The names must not be those of testscript's own, which win: its "stop" ends the
// script, and lets it pass.
//
// And, for exec, the programs pty and confined; see pty_test.go and confined_test.go.
func TestScripts(t *testing.T) {
	t.Parallel()
	runScripts(t, "testdata/script", false)
}

// runScripts runs the scripts in a folder; with onFargate, with a fake of AWS.
func runScripts(t *testing.T, dir string, onFargate bool) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	scripts, err := filepath.Glob(dir + "/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, script := range scripts {
		if text, err := os.ReadFile(script); err != nil || regexp.MustCompile(`(?m)^stop\b`).Match(text) {
			t.Errorf("%s: stop would end the script here; use terminate (%v)", script, err)
		}
	}
	deadline, ok := t.Deadline()
	if ok { // time to report the script that hung
		deadline = deadline.Add(-15 * time.Second)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 dir,
		Deadline:            deadline,
		RequireExplicitExec: true,
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "race": // the race detector takes several times the memory
				return raceEnabled, nil
			case "accounts": // the command account: root, and mount namespaces
				return sshtest.HasPrivateEtc(), nil
			case "mounts": // mount namespaces, which containers may not have
				return exec.Command("unshare", "--mount", "true").Run() == nil, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Setup: func(setup *testscript.Env) error {
			env := newScriptEnv(setup.WorkDir)
			setup.Values[scriptEnvKey{}] = env
			if onFargate {
				if err := env.toFargate(); err != nil {
					return err
				}
			}
			setup.Defer(func() { env.end(setup.T()) })
			setup.Setenv("PATH", bin+string(filepath.ListSeparator)+os.Getenv("PATH"))
			setup.Setenv("ME", me.Username)
			setup.Setenv("HOME", setup.WorkDir)
			setup.Setenv("BIN", bin)
			setup.Setenv("LOOP", env.loop)
			return env.prepare(me.Username)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"set":        withEnv((*scriptEnv).set),
			"start":      withEnv((*scriptEnv).start),
			"terminate":  withEnv((*scriptEnv).terminate),
			"logreader":  withEnv((*scriptEnv).readLog),
			"secrets":    withEnv((*scriptEnv).serveSecrets),
			"signal":     withEnv((*scriptEnv).signal),
			"succeed":    withEnv((*scriptEnv).succeed),
			"handover":   withEnv((*scriptEnv).handOver),
			"gatewayenv": withEnv((*scriptEnv).setGatewayEnv),
			"ended":      waitForEnd,
			"retired":    withEnv((*scriptEnv).retired),
			"kill9":      withEnv((*scriptEnv).kill9),
			"agents":     withEnv((*scriptEnv).agents),
			"killagents": withEnv(signalAgents(syscall.SIGKILL)),
			"freeze":     withEnv(signalAgents(syscall.SIGSTOP)),
			"listen":     withEnv((*scriptEnv).listen),
			"attack":     withEnv((*scriptEnv).attack),
			"baseline":   withEnv((*scriptEnv).baseline),
			"settled":    withEnv((*scriptEnv).settled),
			"goroutines": withEnv((*scriptEnv).goroutines),
			"fate":       withEnv(fate),
			"stoptasks":  withEnv(stopTasks),
			"nomemory":   withEnv(noMemory),
			"stoptime":   withEnv(stopTime),
			"deny":       withEnv(deny(true)),
			"permit":     withEnv(deny(false)),
			"calls":      withEnv(calls),
			"define":     withEnv(define),
			"taskdefs":   withEnv(taskDefs),
			"awsenv":     withEnv(awsEnv),
			"dynalite":   withEnv(startDynalite),
			"fleet":      withEnv((*scriptEnv).startFleet),
			"nodynalite": withEnv(stopDynalite),
			"events":     withEnv((*scriptEnv).events),
			"collector":  withEnv((*scriptEnv).startCollector),
			"traces":     withEnv((*scriptEnv).traces),
			"cert":       withEnv((*scriptEnv).certificate),
			"shell":      withEnv((*scriptEnv).shellOf),
			"account":    withEnv((*scriptEnv).account),
			"status":     status,
			"logged":     logged,
			"eventually": eventually,
			"append":     appendLine,
		},
	})
}

type scriptEnvKey struct{}

func withEnv(f func(*scriptEnv, *testscript.TestScript, []string)) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if neg {
			ts.Fatalf("this command cannot fail as expected")
		}
		f(ts.Value(scriptEnvKey{}).(*scriptEnv), ts, args)
	}
}
