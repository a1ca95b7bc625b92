package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

func (env *scriptEnv) start(ts *testscript.TestScript, args []string) {
	if len(args) > 0 {
		env.config = args[0]
	}
	ts.Check(env.startGateway())
	ts.Setenv("PORT", strconv.Itoa(env.port))
	ts.Setenv("GATEWAY", strconv.Itoa(env.gateway.Process.Pid))
}

// startGateway starts the gateway and writes the client's files for it.
func (env *scriptEnv) startGateway() error {
	out, err := os.OpenFile(env.path("gateway.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	from, err := out.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	env.gateway = exec.Command(filepath.Join(bin, "gateway"), "serve", "--config", env.config)
	env.gateway.Stderr, env.gateway.Stdout = out, out
	if env.logReader != "" {
		pipe, err := env.startLogReader(out)
		if err != nil {
			return err
		}
		defer pipe.Close()
		env.gateway.Stderr, env.gateway.Stdout = pipe, pipe
	}
	env.gateway.Dir = env.dir
	// A test that is killed must not leave gateways.
	env.gateway.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	env.gateway.Env = append(os.Environ(), "GORACE=halt_on_error=1 exitcode=66",
		"PATH="+bin+":"+os.Getenv("PATH")) // for agents that are scripts around bastion-agent
	env.gateway.Env = append(env.gateway.Env, env.gatewayEnv...)
	if env.fargate != nil {
		env.gateway.Env = append(env.gateway.Env, env.fargate.environ()...)
	}
	if err := env.gateway.Start(); err != nil {
		return err
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		log, err := os.ReadFile(env.path("gateway.log"))
		if err != nil {
			return err
		}
		if env.port = listening(log[from:]); env.port != 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the gateway does not listen:\n%s", log)
		}
	}
	hostKey, err := os.ReadFile(env.path("host_key.pub"))
	if err != nil {
		return err
	}
	known := os.WriteFile(env.path("known_hosts"), fmt.Appendf(nil, "[127.0.0.1]:%d %s", env.port, hostKey), 0o600)
	config := func(key string) []byte {
		return fmt.Appendf(nil, `Host gateway inner other
  HostName 127.0.0.1
  Port %d
  User alice
%s`, env.port, clientDefaults(env.dir, key))
	}
	return errors.Join(known,
		os.WriteFile(env.path("ssh_config"), config("id"), 0o600),
		os.WriteFile(env.path("ssh_config_stranger"), config("id2"), 0o600))
}

// clientDefaults returns the part of an ssh_config that is for all hosts.
func clientDefaults(dir, key string) string {
	return fmt.Sprintf(`Host *
  UserKnownHostsFile %[1]s/known_hosts
  GlobalKnownHostsFile /dev/null
  IdentityFile %[1]s/%[2]s
  IdentitiesOnly yes
  IdentityAgent none
  BatchMode yes
  ConnectTimeout 15
  StrictHostKeyChecking yes
`, dir, key)
}

func (env *scriptEnv) readLog(ts *testscript.TestScript, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: logreader CMD")
	}
	env.logReader = args[0]
}

// startLogReader starts the command of logreader, and returns where it reads
// from: a pipe that is full after 4 KiB. The reader is killed when the script
// ends.
func (env *scriptEnv) startLogReader(out *os.File) (*os.File, error) {
	r, pipe, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if _, err := unix.FcntlInt(pipe.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
		pipe.Close()
		return nil, err
	}
	reader := exec.Command("sh", "-c", env.logReader)
	reader.Stdin, reader.Stdout = r, out
	reader.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := reader.Start(); err != nil {
		pipe.Close()
		return nil, err
	}
	env.listeners = append(env.listeners, closerFunc(func() error {
		syscall.Kill(-reader.Process.Pid, syscall.SIGKILL)
		return reader.Wait()
	}))
	return pipe, nil
}

type closerFunc func() error

func (f closerFunc) Close() error { return f() }

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

func (env *scriptEnv) terminate(ts *testscript.TestScript, args []string) {
	sig := syscall.SIGTERM
	if len(args) > 0 && args[0] == "INT" {
		sig = syscall.SIGINT
	}
	if env.gateway == nil { // its successor
		ts.Check(syscall.Kill(env.successor(), sig))
		if status := ended(ts, env.successor()); status != 0 {
			ts.Fatalf("gateway: status %#x", status)
		}
		return
	}
	// It may have ended already; one that is about to, because it has been
	// told, would die of a second signal.
	if !env.signalled {
		env.gateway.Process.Signal(sig)
	}
	env.signalled = false
	err := env.gateway.Wait()
	env.gateway = nil
	if err != nil {
		log, _ := os.ReadFile(env.path("gateway.log"))
		ts.Fatalf("gateway: %v\n%s", err, log)
	}
}

func (env *scriptEnv) signal(ts *testscript.TestScript, _ []string) {
	ts.Check(env.gateway.Process.Signal(syscall.SIGTERM))
	env.signalled = true
}

func (env *scriptEnv) succeed(ts *testscript.TestScript, _ []string) {
	ts.Check(env.gateway.Process.Signal(syscall.SIGTERM))
	env.succeeded, env.gateway = env.gateway, nil
	ts.Setenv("BEFORE", strconv.Itoa(env.succeeded.Process.Pid))
	env.settings["listen"] = fmt.Sprintf("127.0.0.1:%d", env.port)
	ts.Check(env.writeConfig())
	ts.Check(env.startGateway())
	ts.Setenv("GATEWAY", strconv.Itoa(env.gateway.Process.Pid))
}

// handOver sends SIGUSR2 to the gateway, and waits until a successor that it has started
// has its sockets.
func (env *scriptEnv) handOver(ts *testscript.TestScript, _ []string) {
	log, err := os.ReadFile(env.path("gateway.log"))
	ts.Check(err)
	before := len(log)
	if env.gateway != nil {
		env.succeeded, env.gateway = env.gateway, nil
		ts.Setenv("BEFORE", strconv.Itoa(env.succeeded.Process.Pid))
		ts.Check(env.succeeded.Process.Signal(syscall.SIGUSR2))
	} else {
		ts.Setenv("BEFORE", strconv.Itoa(env.successor()))
		ts.Check(syscall.Kill(env.successor(), syscall.SIGUSR2))
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		log, err := os.ReadFile(env.path("gateway.log"))
		ts.Check(err)
		if pid := handedOver(log[before:]); pid != 0 {
			env.successors = append(env.successors, pid)
			ts.Setenv("GATEWAY", strconv.Itoa(pid))
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("the gateway is not handed over:\n%s", log[before:])
		}
	}
}

// handedOver returns the process ID of the successor that the log has; 0 if it has none.
func handedOver(log []byte) int {
	for lines := bufio.NewScanner(bytes.NewReader(log)); lines.Scan(); {
		var line struct {
			Msg string
			PID int
		}
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "handed over to the successor" {
			return line.PID
		}
	}
	return 0
}

// successor returns the last process that the gateway has been handed over to. It is a
// child of this process, like its predecessor.
func (env *scriptEnv) successor() int { return env.successors[len(env.successors)-1] }

// ended waits for the end of a child that is not an exec.Cmd, and returns its exit status.
func ended(ts *testscript.TestScript, pid int) syscall.WaitStatus {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(pid, &status, syscall.WNOHANG, nil)
		ts.Check(err)
		if got == pid {
			return status
		}
		if time.Now().After(deadline) {
			ts.Fatalf("the process %d goes on", pid)
		}
	}
}

func waitForEnd(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 || neg {
		ts.Fatalf("usage: ended PID")
	}
	pid, err := strconv.Atoi(args[0])
	ts.Check(err)
	if status := ended(ts, pid); status != 0 {
		ts.Fatalf("the process %d has ended with status %#x", pid, status)
	}
}

func (env *scriptEnv) setGatewayEnv(ts *testscript.TestScript, args []string) {
	env.gatewayEnv = append(env.gatewayEnv, args...)
}

func (env *scriptEnv) retired(ts *testscript.TestScript, _ []string) {
	err := env.succeeded.Wait()
	env.succeeded = nil
	ts.Check(err)
}

func (env *scriptEnv) kill9(ts *testscript.TestScript, _ []string) {
	ts.Check(env.gateway.Process.Kill())
	env.gateway.Wait()
	env.signalled = false
	env.gateway = nil
}

// pids returns the bastions of this script's gateways that are alive: each
// holds the lock of its task.
func (env *scriptEnv) pids() []int {
	if env.fargate != nil {
		return env.fargate.containers.Pids()
	}
	var pids []int
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if err != nil || !strings.HasPrefix(target, env.dir+"/") || filepath.Base(target) != "agent.lock" {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(fd, "/")[2])
		if err == nil && !slices.Contains(pids, pid) && (env.gateway == nil || pid != env.gateway.Process.Pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (env *scriptEnv) agents(ts *testscript.TestScript, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: agents N")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if got := env.pids(); len(got) == want {
			return
		} else if time.Now().After(deadline) {
			ts.Fatalf("%d bastions run, want %d", len(got), want)
		}
	}
}

func signalAgents(sig syscall.Signal) func(*scriptEnv, *testscript.TestScript, []string) {
	return func(env *scriptEnv, ts *testscript.TestScript, _ []string) {
		for _, pid := range env.pids() {
			ts.Check(syscall.Kill(pid, sig))
		}
	}
}
