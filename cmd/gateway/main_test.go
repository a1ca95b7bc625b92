package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

var bin string // holds the two programs under test

// TestMain builds the real programs: what is tested is what is shipped.
func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "sallyport-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		bin = dir
		build := exec.Command("go", "build", "-o", dir, "../gateway", "../bastion-agent")
		if raceEnabled {
			build = exec.Command("go", "build", "-race", "-o", dir, "../gateway", "../bastion-agent")
		}
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n%s", build, err, out)
			return 1
		}
		return m.Run()
	}())
}

// TestScripts runs testdata/script. Each script finds
//
//	gateway.yaml   a configuration for user alice, whose bastions run as whoever runs the test
//	id, id2        alice's key, and a key that is nobody's
//	ssh_config     which is all that ssh reads: host "gateway", and "inner", which is the same
//	               gateway under another name, for jumps; ssh_config_stranger has key id2
//
// and these commands beside testscript's own:
//
//	start [CONFIG]   starts the gateway, logging to gateway.log
//	stop [SIGNAL]    sends it a signal (TERM) and waits for it to end; fails if that was not as it should be
//	kill9            kills it, as kill -9 does
//	agents N         waits until N bastions run
//	killagents       kills all bastions, as kill -9 does
//	eventually CMD   runs CMD until it succeeds, for 20 seconds
//	append FILE TEXT adds a line to a file
func TestScripts(t *testing.T) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			w := &world{dir: env.WorkDir, env: env}
			env.Values[worldKey{}] = w
			env.Defer(w.end)
			env.Setenv("PATH", bin+string(filepath.ListSeparator)+os.Getenv("PATH"))
			env.Setenv("ME", me.Username)
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("BIN", bin)
			return w.prepare(me.Username)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"start":      func(ts *testscript.TestScript, neg bool, args []string) { theWorld(ts).start(ts, neg, args) },
			"stop":       func(ts *testscript.TestScript, neg bool, args []string) { theWorld(ts).stop(ts, neg, args) },
			"kill9":      func(ts *testscript.TestScript, _ bool, _ []string) { theWorld(ts).kill9(ts) },
			"agents":     func(ts *testscript.TestScript, _ bool, args []string) { theWorld(ts).agents(ts, args) },
			"killagents": func(ts *testscript.TestScript, _ bool, _ []string) { theWorld(ts).killAgents(ts) },
			"eventually": eventually,
			"append":     appendLine,
		},
	})
}

type worldKey struct{}

func theWorld(ts *testscript.TestScript) *world { return ts.Value(worldKey{}).(*world) }

// A world is what one script plays in.
type world struct {
	dir string
	env *testscript.Env

	gateway *exec.Cmd
	log     *os.File
	port    int
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) prepare(account string) error {
	for _, key := range []string{"id", "id2", "host_key", "fleet_key"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", w.path(key)).CombinedOutput(); err != nil {
			return fmt.Errorf("ssh-keygen: %v: %s", err, out)
		}
	}
	alice, err := os.ReadFile(w.path("id.pub"))
	if err != nil {
		return err
	}
	files := map[string]string{
		"authorized_keys.d/alice": string(alice),
		"gateway.yaml": fmt.Sprintf(`listen: 127.0.0.1:0
host_keys: [host_key]
fleet_key: fleet_key
authorized_keys_dir: authorized_keys.d
state_dir: state
drain: 2s
profiles:
  default:
    idle: 1m
    local:
      account: %s
`, account),
	}
	if err := os.Mkdir(w.path("authorized_keys.d"), 0o700); err != nil {
		return err
	}
	for name, text := range files {
		if err := os.WriteFile(w.path(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// start starts the gateway and writes the client's files for it.
func (w *world) start(ts *testscript.TestScript, neg bool, args []string) {
	file := w.path("gateway.yaml")
	if len(args) > 0 {
		file = ts.MkAbs(args[0])
	}
	var err error
	if w.log, err = os.OpenFile(w.path("gateway.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		ts.Fatalf("%v", err)
	}
	defer w.log.Close()
	from, err := w.log.Seek(0, 2)
	ts.Check(err)
	w.gateway = exec.Command(filepath.Join(bin, "gateway"), "serve", "--config", file)
	w.gateway.Stderr, w.gateway.Stdout = w.log, w.log
	w.gateway.Dir = w.dir
	w.gateway.Env = append(os.Environ(), "GORACE=halt_on_error=1 exitcode=66")
	ts.Check(w.gateway.Start())
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		log, err := os.ReadFile(w.path("gateway.log"))
		ts.Check(err)
		if w.port = listening(log[from:]); w.port != 0 {
			break
		}
		if time.Now().After(deadline) || w.gateway.Process.Signal(syscall.Signal(0)) != nil {
			ts.Fatalf("the gateway does not listen:\n%s", log)
		}
	}
	hostKey, err := os.ReadFile(w.path("host_key.pub"))
	ts.Check(err)
	ts.Check(os.WriteFile(w.path("known_hosts"), fmt.Appendf(nil, "[127.0.0.1]:%d %s", w.port, hostKey), 0o600))
	config := func(key string) []byte {
		return fmt.Appendf(nil, `Host gateway inner
  HostName 127.0.0.1
  Port %d
  User alice
Host *
  UserKnownHostsFile %[2]s/known_hosts
  GlobalKnownHostsFile /dev/null
  IdentityFile %[2]s/%[3]s
  IdentitiesOnly yes
  IdentityAgent none
  BatchMode yes
  ConnectTimeout 15
  StrictHostKeyChecking yes
`, w.port, w.dir, key)
	}
	ts.Check(os.WriteFile(w.path("ssh_config"), config("id"), 0o600))
	ts.Check(os.WriteFile(w.path("ssh_config_stranger"), config("id2"), 0o600))
	ts.Setenv("PORT", strconv.Itoa(w.port))
}

// listening returns the port that the log says the gateway listens on.
func listening(log []byte) int {
	for lines := bufio.NewScanner(bytes.NewReader(log)); lines.Scan(); {
		var line struct{ Msg, Addr string }
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "listening" {
			port, _ := strconv.Atoi(line.Addr[strings.LastIndexByte(line.Addr, ':')+1:])
			return port
		}
	}
	return 0
}

func (w *world) stop(ts *testscript.TestScript, neg bool, args []string) {
	sig := syscall.SIGTERM
	if len(args) > 0 && args[0] == "INT" {
		sig = syscall.SIGINT
	}
	ts.Check(w.gateway.Process.Signal(sig))
	err := w.gateway.Wait()
	w.gateway = nil
	if err != nil {
		log, _ := os.ReadFile(w.path("gateway.log"))
		ts.Fatalf("gateway: %v\n%s", err, log)
	}
}

func (w *world) kill9(ts *testscript.TestScript) {
	ts.Check(w.gateway.Process.Kill())
	w.gateway.Wait()
	w.gateway = nil
}

// pids returns the bastions of this script's gateways that are alive: each
// holds the lock of its task.
func (w *world) pids() []int {
	var pids []int
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if err != nil || !strings.HasPrefix(target, w.dir) || filepath.Base(target) != "agent.lock" {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(fd, "/")[2])
		if err == nil && !slices.Contains(pids, pid) && (w.gateway == nil || pid != w.gateway.Process.Pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (w *world) agents(ts *testscript.TestScript, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: agents N")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if got := w.pids(); len(got) == want {
			return
		} else if time.Now().After(deadline) {
			ts.Fatalf("%d bastions run, want %d", len(got), want)
		}
	}
}

func (w *world) killAgents(ts *testscript.TestScript) {
	for _, pid := range w.pids() {
		ts.Check(syscall.Kill(pid, syscall.SIGKILL))
	}
}

// end leaves nothing running, whatever the script did.
func (w *world) end() {
	if w.gateway != nil {
		w.gateway.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(20*time.Second, func() { w.gateway.Process.Kill() })
		defer kill.Stop()
		if err := w.gateway.Wait(); err != nil {
			w.env.T().Log("gateway: ", err)
		}
	}
	for _, pid := range w.pids() {
		syscall.Kill(pid, syscall.SIGTERM)
	}
	if log, err := os.ReadFile(w.path("gateway.log")); err == nil && bytes.Contains(log, []byte("DATA RACE")) {
		w.env.T().Log(string(log))
		w.env.T().FailNow()
	}
}

func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: eventually CMD ...")
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		err := ts.Exec(args[0], args[1:]...)
		if (err == nil) != neg {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("still %v after 20 seconds", errors.Join(err))
		}
	}
}

func appendLine(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: append FILE TEXT")
	}
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	ts.Check(err)
	_, err = fmt.Fprintln(f, args[1])
	ts.Check(errors.Join(err, f.Close()))
}
