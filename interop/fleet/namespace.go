package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
)

// gateways is the number of gateways.
const gateways = 3

// maxUsers is the number of client addresses.
const maxUsers = 10 * 250

// The addresses of a run. Each user, service and task has one of its own, in the namespaces
// only.
const (
	// linkPrefix is the network between the gateways' namespaces and the one of
	// everything else. All of localSpace is local to the latter: spacePrefix is in
	// it, and the random addresses that moto gives to tasks.
	linkPrefix  = "192.168.89."
	localSpace  = "10.0.0.0/8"
	spacePrefix = "10.90"

	bastionsNet  = spacePrefix + ".0.0/18"
	tableAddr    = spacePrefix + ".200.1"
	awsAddr      = spacePrefix + ".200.2"
	balancerAddr = spacePrefix + ".200.5"
)

// gatewayAddr returns the address of a gateway, numbered from 1.
func gatewayAddr(number int) string { return fmt.Sprint(linkPrefix, 10+number) }

// clientAddr returns the address of a user.
func clientAddr(user int) string {
	return fmt.Sprintf("%s.%d.%d", spacePrefix, 210+user/250, 1+user%250)
}

func namespaceOf(gateway int) string { return fmt.Sprint("gateway", gateway) }

// initProcess is the first process of the namespaces: it sets up their mounts and
// networks, runs the run, and reaps orphans. When it ends, the kernel kills all other
// processes of the namespace, and removes the networks.
func initProcess() (status int, err error) {
	if err := setUp(); err != nil {
		return notPermitted, err
	}
	self, err := os.Executable()
	if err != nil {
		return 1, err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	cmd := exec.Command(self, os.Args[1:]...)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, stageVar+"=") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, stageVar+"="+stageIsolated)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	go func() { // ends with the process
		for s := range signals {
			cmd.Process.Signal(s)
		}
	}()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 1, fmt.Errorf("waiting for children: %w", err)
		case pid == cmd.Process.Pid && ws.Signaled():
			return 1, fmt.Errorf("the run was ended by signal %d", ws.Signal())
		case pid == cmd.Process.Pid:
			return ws.ExitStatus(), nil
		}
	}
}

// setUp makes the mounts and the networks of the namespaces. The folder /run is the
// namespaces' own, because ip netns and iptables keep files there.
func setUp() error {
	const private = syscall.MS_REC | syscall.MS_PRIVATE
	if err := syscall.Mount("", "/", "", private, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mounting /run: %w", err)
	}
	commands := []string{
		"ip link set lo up",
		"ip link add fleet type bridge",
		"ip addr add " + linkPrefix + "1/24 dev fleet",
		"ip link set fleet up",
		// So that agents and clients can have addresses of their own.
		"ip route add local " + localSpace + " dev lo",
	}
	for i := 1; i <= gateways; i++ {
		name, veth := namespaceOf(i), fmt.Sprint("veth", i)
		commands = append(commands,
			"ip netns add "+name,
			"ip link add "+veth+" type veth peer name eth0 netns "+name,
			"ip link set "+veth+" master fleet up",
			"ip -n "+name+" link set lo up",
			fmt.Sprintf("ip -n %s addr add %s%d/24 dev eth0", name, linkPrefix, 10+i),
			"ip -n "+name+" link set eth0 up",
			"ip -n "+name+" route add "+localSpace+" via "+linkPrefix+"1",
			"ip netns exec "+name+" iptables -w -L -n",
		)
	}
	for _, c := range commands {
		if err := command(c); err != nil {
			return err
		}
	}
	return nil
}

// command runs a command of words.
func command(line string) error {
	words := strings.Fields(line)
	if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", line, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// cut drops all packets between a gateway and the addresses, until heal.
func cut(gateway int, addrs []string) error { return filter("-A", gateway, addrs) }

// heal undoes cut.
func heal(gateway int, addrs []string) error { return filter("-D", gateway, addrs) }

func filter(action string, gateway int, addrs []string) error {
	for _, addr := range addrs {
		for _, rule := range []string{"INPUT -s ", "OUTPUT -d "} {
			if err := command(fmt.Sprintf("ip netns exec %s iptables -w %s %s%s -j DROP", namespaceOf(gateway), action, rule, addr)); err != nil {
				return err
			}
		}
	}
	return nil
}
