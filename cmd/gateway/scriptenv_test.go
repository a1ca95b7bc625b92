package main

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// A scriptEnv is the environment of a script: its folder, configuration, gateway and
// bastions.
type scriptEnv struct {
	dir  string
	loop string // $LOOP

	settings  map[string]string // of gateway.yaml; "profile.name" for a profile's
	config    string            // that the gateway is started with
	gateway   *exec.Cmd
	signalled bool      // by the command signal
	succeeded *exec.Cmd // the gateway before, which drains
	// successors are the processes by hand-over; gateway is nil then.
	successors []int
	port       int

	open     map[string]int // counted by baseline
	routines map[string]int // counted by the first goroutines command, by the function that started them

	logReader  string   // the command of logreader
	gatewayEnv []string // for the gateway, by the commands secrets and gatewayenv
	listeners  []io.Closer
	serving    sync.WaitGroup

	fargate   *fakeAccount // nil: bastions are processes of this machine
	collector *collector   // of traces; nil before the command collector
}

// environments is how many have been made by this process.
var environments atomic.Int32

// newScriptEnv returns an environment in a folder, with an address of its own: no
// other environment of this process has it, and hardly one of another process.
func newScriptEnv(dir string) *scriptEnv {
	pid := os.Getpid()
	return &scriptEnv{dir: dir, config: "gateway.yaml", loop: fmt.Sprintf("127.%d.%d.%d", 1+pid%200, 1+pid/200%200, environments.Add(1))}
}

func (env *scriptEnv) path(name string) string { return filepath.Join(env.dir, name) }

func (env *scriptEnv) prepare(account string) error {
	for _, key := range []string{"id", "id2", "host_key", "fleet_key"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", env.path(key)).CombinedOutput(); err != nil {
			return fmt.Errorf("ssh-keygen: %v: %s", err, out)
		}
	}
	alice, err := os.ReadFile(env.path("id.pub"))
	if err != nil {
		return err
	}
	env.settings = map[string]string{
		"listen":                "127.0.0.1:0",
		"host_keys":             "[host_key]",
		"fleet_key":             "fleet_key",
		"authorized_keys_dir":   "authorized_keys.d",
		"state_dir":             "state",
		"drain":                 "2s",
		"per_source_penalties":  "none", // all clients are at one address
		"default.idle":          "1m",
		"default.local.account": account,
	}
	if err := os.Mkdir(env.path("authorized_keys.d"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(env.path("authorized_keys.d/alice"), alice, 0o600); err != nil {
		return err
	}
	return env.writeConfig()
}

// set changes one setting; an empty value takes it out.
func (env *scriptEnv) set(ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: set NAME VALUE")
	}
	env.settings[args[0]] = args[1]
	if args[1] == "" {
		delete(env.settings, args[0])
	}
	ts.Check(env.writeConfig())
}

// sections are the keys of gateway.yaml that have others under them, profiles
// aside.
var sections = []string{"audit", "recordings"}

func (env *scriptEnv) writeConfig() error { return env.writeConfigTo("gateway.yaml") }

func (env *scriptEnv) writeConfigTo(file string) error {
	var top, profiles strings.Builder
	done := make(map[string]bool) // headings
	settings := env.settings
	if env.fargate != nil {
		settings = env.fargate.settings(settings)
	}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		path := strings.Split(name, ".")
		if len(path) == 1 {
			fmt.Fprintf(&top, "%s: %s\n", name, settings[name])
			continue
		}
		to, indent := &profiles, 2
		if slices.Contains(sections, path[0]) {
			to, indent = &top, 0
		}
		for i := range path[1:] {
			if heading := strings.Join(path[:i+1], "."); !done[heading] {
				done[heading] = true
				fmt.Fprintf(to, "%*s%s:\n", 2*i+indent, "", path[i])
			}
		}
		fmt.Fprintf(to, "%*s%s: %s\n", 2*len(path)-2+indent, "", path[len(path)-1], settings[name])
	}
	return os.WriteFile(env.path(file), []byte(top.String()+"profiles:\n"+profiles.String()), 0o600)
}

// end ends all processes of the script.
func (env *scriptEnv) end(report interface {
	Log(...any)
	FailNow()
}) {
	if t, ok := report.(interface{ Failed() bool }); ok && t.Failed() {
		log, _ := os.ReadFile(env.path("gateway.log"))
		members, _ := filepath.Glob(env.path("*.log"))
		for _, file := range members {
			if text, _ := os.ReadFile(file); filepath.Base(file) != "gateway.log" {
				log = append(append(log, "\n"+filepath.Base(file)+":\n"...), text...)
			}
		}
		agents, _ := filepath.Glob(env.path("state/bastions/*/agent.log"))
		for _, file := range agents {
			text, _ := os.ReadFile(file)
			log = append(log, text...)
		}
		report.Log("logs of gateway and agents:\n" + string(log))
	}
	if env.gateway != nil {
		env.gateway.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(20*time.Second, func() { env.gateway.Process.Kill() })
		defer kill.Stop()
		if err := env.gateway.Wait(); err != nil {
			report.Log("gateway: ", err)
		}
	}
	env.killGateways()
	if env.succeeded != nil {
		env.succeeded.Process.Kill()
		env.succeeded.Wait()
	}
	for _, pid := range env.pids() {
		syscall.Kill(pid, syscall.SIGTERM)
	}
	if env.fargate != nil {
		env.fargate.end(report)
	}
	for _, l := range env.listeners {
		l.Close()
	}
	env.serving.Wait()
	if log, err := os.ReadFile(env.path("gateway.log")); err == nil && bytes.Contains(log, []byte("DATA RACE")) {
		report.Log(string(log))
		report.FailNow()
	}
}

// killGateways kills the gateways that are no exec.Cmd: those by hand-over, and by
// systemd-socket-activate.
func (env *scriptEnv) killGateways() {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		cwd, _ := os.Readlink(dir + "/cwd")
		exe, _ := os.Readlink(dir + "/exe")
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil && cwd == env.dir && exe == filepath.Join(bin, "gateway") {
			syscall.Kill(pid, syscall.SIGKILL)
			syscall.Wait4(pid, nil, 0, nil)
		}
	}
}
