package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

var bin string // holds the two programs under test

// TestMain is also what scripts get when they run one of these programs.
func TestMain(m *testing.M) {
	testscript.Main(withPrograms{m}, map[string]func(){"pty": ptyMain, "confined": confinedMain})
}

// withPrograms builds the real programs before it runs the tests: what is
// tested is what is shipped.
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
//	gateway.yaml   a configuration for user alice, whose bastions run as whoever runs the test
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
//	start            starts the gateway, logging to gateway.log
//	signal           sends it SIGTERM, and does not wait
//	terminate [INT]  sends it SIGTERM, or SIGINT, and waits for it to end; the exit status must be 0
//	kill9            kills it, as kill -9 does
//	agents N         waits until N bastions run
//	killagents       kills all bastions, as kill -9 does
//	freeze           has all bastions hang, as kill -STOP does
//	status N CMD     runs CMD, whose exit status must be N
//	eventually CMD   runs CMD until it succeeds, for a minute
//	append FILE TEXT adds a line to a file
//	listen ADDR HOW  serves TCP, or a Unix socket if ADDR is a path: with "echo", or "banner" and then echo
//	attack NAME      does what no honest client does; see attack_test.go
//	baseline         remembers how many files the gateway and the bastions have open, and how many processes the latter have
//	settled          waits until they are as many again
//	events FILE      compares the audit log with a file; see audit_test.go
//	goroutines       ends the gateway and counts its goroutines; the second time, there may not be more
//
// The names must not be those of testscript's own, which win: its "stop" ends the
// script, and lets it pass.
//
// And, for exec, the programs pty and confined; see pty_test.go and confined_test.go.
func TestScripts(t *testing.T) { runScripts(t, "testdata/script", false) }

// runScripts runs those in a folder; on Fargate, or what stands for it, if so
// asked.
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
	if ok { // time to say what hung
		deadline = deadline.Add(-15 * time.Second)
	}
	var worlds atomic.Int32
	testscript.Run(t, testscript.Params{
		Dir:                 dir,
		Deadline:            deadline,
		RequireExplicitExec: true,
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "mounts": // mount namespaces, which containers may not have
				return exec.Command("unshare", "--mount", "true").Run() == nil, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Setup: func(env *testscript.Env) error {
			n := worlds.Add(1)
			w := &world{dir: env.WorkDir, loop: fmt.Sprintf("127.%d.%d.%d", 1+os.Getpid()%200, 1+os.Getpid()/200%200, n)}
			env.Values[worldKey{}] = w
			if onFargate {
				if err := w.toFargate(); err != nil {
					return err
				}
			}
			env.Defer(func() { w.end(env.T()) })
			env.Setenv("PATH", bin+string(filepath.ListSeparator)+os.Getenv("PATH"))
			env.Setenv("ME", me.Username)
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("BIN", bin)
			env.Setenv("LOOP", w.loop)
			return w.prepare(me.Username)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"set":        inWorld((*world).set),
			"start":      inWorld((*world).start),
			"terminate":  inWorld((*world).terminate),
			"signal":     inWorld((*world).signal),
			"kill9":      inWorld((*world).kill9),
			"agents":     inWorld((*world).agents),
			"killagents": inWorld(signalAgents(syscall.SIGKILL)),
			"freeze":     inWorld(signalAgents(syscall.SIGSTOP)),
			"listen":     inWorld((*world).listen),
			"attack":     inWorld((*world).attack),
			"baseline":   inWorld((*world).baseline),
			"settled":    inWorld((*world).settled),
			"goroutines": inWorld((*world).goroutines),
			"fate":       inWorld(fate),
			"stoptasks":  inWorld(stopTasks),
			"deny":       inWorld(deny(true)),
			"permit":     inWorld(deny(false)),
			"calls":      inWorld(calls),
			"awsenv":     inWorld(awsEnv),
			"events":     inWorld((*world).events),
			"status":     status,
			"eventually": eventually,
			"append":     appendLine,
		},
	})
}

type worldKey struct{}

func inWorld(f func(*world, *testscript.TestScript, []string)) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if neg {
			ts.Fatalf("this command cannot fail as expected")
		}
		f(ts.Value(worldKey{}).(*world), ts, args)
	}
}

// A world is what one script plays in.
type world struct {
	dir  string
	loop string // $LOOP

	settings  map[string]string // of gateway.yaml; "profile.name" for a profile's
	gateway   *exec.Cmd
	signalled bool // by the command signal
	port      int

	open     map[string]int // what baseline saw
	routines map[string]int // what the first goroutines saw, by who started them

	listeners []io.Closer
	serving   sync.WaitGroup

	fargate *fargateWorld // nil: bastions are processes of this machine
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
	w.settings = map[string]string{
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
	if err := os.Mkdir(w.path("authorized_keys.d"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(w.path("authorized_keys.d/alice"), alice, 0o600); err != nil {
		return err
	}
	return w.writeConfig()
}

// set changes one setting; an empty value takes it out.
func (w *world) set(ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: set NAME VALUE")
	}
	w.settings[args[0]] = args[1]
	if args[1] == "" {
		delete(w.settings, args[0])
	}
	ts.Check(w.writeConfig())
}

// sections are the keys of gateway.yaml that have others under them, profiles
// aside.
var sections = []string{"audit", "recordings"}

func (w *world) writeConfig() error {
	var top, profiles strings.Builder
	done := make(map[string]bool) // headings
	settings := w.settings
	if w.fargate != nil {
		settings = w.fargate.settings(settings)
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
	return os.WriteFile(w.path("gateway.yaml"), []byte(top.String()+"profiles:\n"+profiles.String()), 0o600)
}

func (w *world) start(ts *testscript.TestScript, _ []string) {
	ts.Check(w.startGateway())
	ts.Setenv("PORT", strconv.Itoa(w.port))
	ts.Setenv("GATEWAY", strconv.Itoa(w.gateway.Process.Pid))
}

// startGateway starts the gateway and writes the client's files for it.
func (w *world) startGateway() error {
	out, err := os.OpenFile(w.path("gateway.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	from, err := out.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	w.gateway = exec.Command(filepath.Join(bin, "gateway"), "serve", "--config", "gateway.yaml")
	w.gateway.Stderr, w.gateway.Stdout = out, out
	w.gateway.Dir = w.dir
	w.gateway.Env = append(os.Environ(), "GORACE=halt_on_error=1 exitcode=66",
		"PATH="+bin+":"+os.Getenv("PATH")) // for agents that are scripts around bastion-agent
	if w.fargate != nil {
		w.gateway.Env = append(w.gateway.Env, awsfake.Environ(w.fargate.server.URL)...)
	}
	if err := w.gateway.Start(); err != nil {
		return err
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		log, err := os.ReadFile(w.path("gateway.log"))
		if err != nil {
			return err
		}
		if w.port = listening(log[from:]); w.port != 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the gateway does not listen:\n%s", log)
		}
	}
	hostKey, err := os.ReadFile(w.path("host_key.pub"))
	if err != nil {
		return err
	}
	known := os.WriteFile(w.path("known_hosts"), fmt.Appendf(nil, "[127.0.0.1]:%d %s", w.port, hostKey), 0o600)
	config := func(key string) []byte {
		return fmt.Appendf(nil, `Host gateway inner other
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
	return errors.Join(known,
		os.WriteFile(w.path("ssh_config"), config("id"), 0o600),
		os.WriteFile(w.path("ssh_config_stranger"), config("id2"), 0o600))
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

func (w *world) terminate(ts *testscript.TestScript, args []string) {
	sig := syscall.SIGTERM
	if len(args) > 0 && args[0] == "INT" {
		sig = syscall.SIGINT
	}
	// It may have ended already; one that is about to, because it has been
	// told, would die of a second signal.
	if !w.signalled {
		w.gateway.Process.Signal(sig)
	}
	w.signalled = false
	err := w.gateway.Wait()
	w.gateway = nil
	if err != nil {
		log, _ := os.ReadFile(w.path("gateway.log"))
		ts.Fatalf("gateway: %v\n%s", err, log)
	}
}

func (w *world) signal(ts *testscript.TestScript, _ []string) {
	ts.Check(w.gateway.Process.Signal(syscall.SIGTERM))
	w.signalled = true
}

func (w *world) kill9(ts *testscript.TestScript, _ []string) {
	ts.Check(w.gateway.Process.Kill())
	w.gateway.Wait()
	w.signalled = false
	w.gateway = nil
}

// pids returns the bastions of this script's gateways that are alive: each
// holds the lock of its task.
func (w *world) pids() []int {
	if w.fargate != nil {
		return w.fargate.containers.Pids()
	}
	var pids []int
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if err != nil || !strings.HasPrefix(target, w.dir+"/") || filepath.Base(target) != "agent.lock" {
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
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if got := w.pids(); len(got) == want {
			return
		} else if time.Now().After(deadline) {
			ts.Fatalf("%d bastions run, want %d", len(got), want)
		}
	}
}

func signalAgents(sig syscall.Signal) func(*world, *testscript.TestScript, []string) {
	return func(w *world, ts *testscript.TestScript, _ []string) {
		for _, pid := range w.pids() {
			ts.Check(syscall.Kill(pid, sig))
		}
	}
}

// end leaves nothing running, whatever the script did.
func (w *world) end(report interface {
	Log(...any)
	FailNow()
}) {
	if t, ok := report.(interface{ Failed() bool }); ok && t.Failed() {
		log, _ := os.ReadFile(w.path("gateway.log"))
		agents, _ := filepath.Glob(w.path("state/bastions/*/agent.log"))
		for _, file := range agents {
			text, _ := os.ReadFile(file)
			log = append(log, text...)
		}
		report.Log("logs of gateway and agents:\n" + string(log))
	}
	if w.gateway != nil {
		w.gateway.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(20*time.Second, func() { w.gateway.Process.Kill() })
		defer kill.Stop()
		if err := w.gateway.Wait(); err != nil {
			report.Log("gateway: ", err)
		}
	}
	for _, pid := range w.pids() {
		syscall.Kill(pid, syscall.SIGTERM)
	}
	if w.fargate != nil {
		w.fargate.end(report)
	}
	for _, l := range w.listeners {
		l.Close()
	}
	w.serving.Wait()
	if log, err := os.ReadFile(w.path("gateway.log")); err == nil && bytes.Contains(log, []byte("DATA RACE")) {
		report.Log(string(log))
		report.FailNow()
	}
}

// listen serves echo or a banner, as nobody's bastion does.
func (w *world) listen(ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: listen ADDR echo|banner")
	}
	network, addr := "tcp", args[0]
	if strings.Contains(addr, "/") {
		network = "unix"
	}
	l, err := net.Listen(network, addr)
	ts.Check(err)
	w.listeners = append(w.listeners, l)
	w.serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.serving.Go(func() {
				defer c.Close()
				if args[1] == "banner" {
					io.WriteString(c, "220 ready\n")
				}
				io.Copy(c, c)
			})
		}
	})
}

// inUse returns how many files the gateway and each bastion have open, the epoll's
// and such included, and how many processes the bastions have started that have
// not ended, or have not been waited for.
// Connections to AWS are none of them: idle ones are kept, by intention.
func (w *world) inUse() map[string]int {
	if w.fargate != nil {
		w.fargate.server.CloseClientConnections()
	}
	count := func(pattern string, of int) int {
		found, _ := filepath.Glob(fmt.Sprintf(pattern, of))
		return len(found)
	}
	all := map[string]int{"files of the gateway": count("/proc/%d/fd/*", w.gateway.Process.Pid)}
	for _, pid := range w.pids() {
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

// baseline takes the least it sees for a while: what was used before may not have
// ended yet.
func (w *world) baseline(_ *testscript.TestScript, _ []string) {
	w.open = w.inUse()
	for range 10 {
		time.Sleep(50 * time.Millisecond)
		now := w.inUse()
		for what := range w.open {
			w.open[what] = min(w.open[what], now[what])
		}
	}
}

func (w *world) settled(ts *testscript.TestScript, _ []string) {
	deadline := time.Now().Add(time.Minute)
	for what, before := range w.open {
		for n := w.inUse()[what]; n > before; n = w.inUse()[what] {
			if time.Now().After(deadline) {
				ts.Fatalf("%d %s are there, and there were %d", n, what, before)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

// createdBy finds the function that started a goroutine in what the runtime
// prints about it. Of its own goroutines, whose number is its own affair (the
// garbage collector's workers come with the work), it says "created by runtime.".
// Idle connections to AWS are kept, by intention.
var createdBy = regexp.MustCompile(`(?m)^created by (.+?)(?: in goroutine \d+)?$`)

func (w *world) goroutines(ts *testscript.TestScript, _ []string) {
	before, err := os.ReadFile(w.path("gateway.log"))
	ts.Check(err)
	ts.Check(w.gateway.Process.Signal(syscall.SIGQUIT)) // the runtime prints all
	w.gateway.Wait()
	w.gateway = nil
	log, err := os.ReadFile(w.path("gateway.log"))
	ts.Check(err)
	ts.Check(os.WriteFile(w.path("gateway.log"), before, 0o600))
	now := make(map[string]int)
	for _, m := range createdBy.FindAllSubmatch(log[len(before):], -1) {
		if by := string(m[1]); !strings.HasPrefix(by, "runtime.") && !strings.HasPrefix(by, "net/http.(*Transport)") {
			now[by]++
		}
	}
	if len(now) == 0 {
		ts.Fatalf("the gateway did not say which goroutines it has:\n%s", log[len(before):])
	}
	if w.routines == nil {
		w.routines = now
	}
	for by, n := range now {
		if n > w.routines[by] {
			ts.Fatalf("%d goroutines of %s, and there were %d:\n%s", n, by, w.routines[by], log[len(before):])
		}
	}
}

// status runs a command that must exit with a certain status.
func status(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 || neg {
		ts.Fatalf("usage: status N CMD ...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		exit := (*exec.ExitError)(nil)
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit status %d, want %d", got, want)
	}
}

func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: eventually CMD ...")
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		err := ts.Exec(args[0], args[1:]...)
		if (err == nil) != neg {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("still %v after a minute", err)
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
