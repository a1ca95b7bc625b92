package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// daemonise starts this program again in the background and returns when it
// has written its PidFile.
func daemonise(args []string, c call) error {
	dir, err := os.MkdirTemp(home, "check-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	site, err := translate(c, dir) // to report an error in the foreground
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, append([]string{"-D"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }() // this process is short-lived
	for range 1000 {
		if _, err := os.Stat(site.pidFile); err == nil {
			return nil
		}
		select {
		case err := <-exited:
			return fmt.Errorf("the gateway did not start (%v); its log ends:\n%s", err, lastLines(c.log))
		case <-time.After(10 * time.Millisecond):
		}
	}
	cmd.Process.Kill()
	return errors.New("the gateway did not start in time")
}

// lastLines returns the end of a log.
func lastLines(path string) []byte {
	log, _ := os.ReadFile(path)
	return log[max(0, len(log)-1000):]
}

// supervise runs a gateway until SIGTERM, and starts it anew at SIGHUP.
func supervise(c call, log io.Writer) error {
	// Pdeathsig kills the gateway when the thread that started it ends.
	runtime.LockOSThread()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	dir, err := os.MkdirTemp(home, "daemon-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	for {
		site, err := translate(c, dir)
		if err != nil {
			return err
		}
		gateway, exited, err := startGateway(site, dir, log)
		if err != nil {
			return err
		}
		pid := fmt.Appendf(nil, "%d\n", os.Getpid())
		if err := os.WriteFile(site.pidFile, pid, 0o644); err != nil {
			return err
		}
		var sig os.Signal
		select {
		case sig = <-signals:
			gateway.Process.Signal(syscall.SIGTERM)
			<-exited
			os.RemoveAll(filepath.Join(dir, "keys"))
		case err := <-exited:
			return fmt.Errorf("the gateway ended by itself: %v", err)
		}
		if sig != syscall.SIGHUP {
			return os.Remove(site.pidFile)
		}
	}
}

// startGateway returns when the gateway listens. The returned channel receives the
// result of its exit.
func startGateway(site site, dir string, log io.Writer) (*exec.Cmd, <-chan error, error) {
	file := filepath.Join(dir, "gateway.yaml")
	if err := os.WriteFile(file, site.yaml, 0o600); err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(filepath.Join(home, "bin", "gateway"), "serve", "--config", file)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	listening := make(chan struct{})
	exited := make(chan error, 1)
	go func() { // ends with the gateway
		lines := bufio.NewReader(stderr)
		for said := false; ; {
			line, err := lines.ReadBytes('\n')
			log.Write(line)
			if !said && bytes.Contains(line, []byte(`"msg":"listening"`)) {
				said = true
				close(listening)
			}
			if err != nil {
				break
			}
		}
		exited <- cmd.Wait()
	}()
	select {
	case <-listening:
		return cmd, exited, nil
	case err := <-exited:
		return nil, nil, fmt.Errorf("the gateway did not start: %v", err)
	}
}
