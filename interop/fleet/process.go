package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// A process is a child of this one.
type process struct {
	name    string
	process *os.Process
	log     string        // path of its output
	done    chan struct{} // closed after it has ended and was waited for
	// state says how it has ended. It is set before done is closed.
	state *os.ProcessState
}

// A spawner starts processes that end with this one, also if this one is killed.
type spawner struct{ starts chan func() }

// newSpawner starts the thread whose end would end the processes (PR_SET_PDEATHSIG in
// prctl(2)). It is never released, so it ends with this process.
func newSpawner() *spawner {
	s := &spawner{starts: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for start := range s.starts {
			start()
		}
	}()
	return s
}

// start starts cmd, with its output in dir/name.log.
func (s *spawner) start(dir, name string, cmd *exec.Cmd) (*process, error) {
	p := &process{name: name, log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	s.starts <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	p.process = cmd.Process
	go func() { // ends with the process
		cmd.Wait()
		p.state = cmd.ProcessState
		close(p.done)
	}()
	return p, nil
}

// adopt returns the process with the ID, which another one has started as a child of this
// one (CLONE_PARENT in clone(2)), with its output in the log of that one.
func adopt(name, log string, pid int) (*process, error) {
	found, err := os.FindProcess(pid)
	if err != nil {
		return nil, err
	}
	p := &process{name: name, process: found, log: log, done: make(chan struct{})}
	go func() { // ends with the process
		p.state, _ = found.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) signal(s syscall.Signal) { p.process.Signal(s) }

// kill ends the process at once, and waits for its end.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.done
}

// endWithin waits for the end of the process, and kills it after the time given.
func (p *process) endWithin(d time.Duration) error {
	select {
	case <-p.done:
	case <-time.After(d):
		p.kill()
		return fmt.Errorf("%s did not end within %v, and was killed", p.name, d)
	}
	if p.state == nil || !p.state.Success() { // nil: it was not a child
		return fmt.Errorf("%s: %v", p.name, p.state)
	}
	return nil
}

// tail returns the end of the process's output.
func (p *process) tail() string {
	text, _ := os.ReadFile(p.log)
	return string(text[max(0, len(text)-4096):])
}
