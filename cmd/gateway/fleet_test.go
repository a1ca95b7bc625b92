package main

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// startFleet starts gateways that share everything but their ports, state folders and logs:
//
//	fleet NAME ...
//
// Gateway x has the configuration x.yaml, the log x.log, the audit log x.audit and the
// process $x; ssh_config and ssh_config_stranger have it as host x. A name that the script has
// used before is that of a new process. Files of the configuration are those of gateway.yaml
// at this moment.
func (env *scriptEnv) startFleet(ts *testscript.TestScript, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: fleet NAME ...")
	}
	for _, name := range args {
		ts.Check(env.startMember(ts, name))
	}
}

func (env *scriptEnv) startMember(ts *testscript.TestScript, name string) error {
	common := env.settings
	defer func() { env.settings = common }()
	env.settings = maps.Clone(common)
	env.settings["state_dir"] = "state-" + name
	env.settings["audit.to"] = "./" + name + ".audit"
	if err := env.writeConfigTo(name + ".yaml"); err != nil {
		return err
	}
	out, err := os.OpenFile(env.path(name+".log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	gateway := exec.Command(filepath.Join(bin, "gateway"), "serve", "--config", name+".yaml")
	gateway.Dir, gateway.Stdout, gateway.Stderr = env.dir, out, out
	// A test that is killed must not leave gateways.
	gateway.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	gateway.Env = append(os.Environ(), "GORACE=halt_on_error=1 exitcode=66")
	if env.fargate != nil {
		gateway.Env = append(gateway.Env, env.fargate.environ()...)
	}
	if err := gateway.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { gateway.Wait(); close(ended) }() // ends with the process
	// Ended by SIGKILL, because the script may have stopped it.
	env.listeners = append(env.listeners, closerFunc(func() error {
		err := gateway.Process.Kill()
		<-ended
		return err
	}))
	port := 0
	for deadline := time.Now().Add(time.Minute); port == 0; time.Sleep(10 * time.Millisecond) {
		log, err := os.ReadFile(env.path(name + ".log"))
		if err != nil {
			return err
		}
		if port = listening(log); port == 0 && time.Now().After(deadline) {
			return fmt.Errorf("the gateway %s does not listen:\n%s", name, log)
		}
	}
	ts.Setenv(name, strconv.Itoa(gateway.Process.Pid))
	return env.addHost(name, port)
}

// addHost adds a gateway to the client's files.
func (env *scriptEnv) addHost(name string, port int) error {
	hostKey, err := os.ReadFile(env.path("host_key.pub"))
	if err != nil {
		return err
	}
	known, err := os.OpenFile(env.path("known_hosts"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer known.Close()
	if _, err := fmt.Fprintf(known, "[127.0.0.1]:%d %s", port, hostKey); err != nil {
		return err
	}
	for config, key := range map[string]string{"ssh_config": "id", "ssh_config_stranger": "id2"} {
		old, err := os.ReadFile(env.path(config))
		if err != nil && !os.IsNotExist(err) {
			return err
		}
		rest := string(old)
		if !strings.Contains(rest, "Host *\n") {
			rest = clientDefaults(env.dir, key)
		}
		// The first entry for a host is used.
		text := fmt.Sprintf("Host %s\n  HostName 127.0.0.1\n  Port %d\n  User alice\n", name, port) + rest
		if err := os.WriteFile(env.path(config), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}
