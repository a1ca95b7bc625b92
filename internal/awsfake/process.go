package awsfake

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// Processes is a backend whose containers are real processes, such as
// bastion-agent, each with an address of its own; see Network of [Cloud].
type Processes struct {
	// Port is where it is told to listen, at the task's address, by
	// SALLYPORT_LISTEN.
	Port int
	// Dir is where a file for the output of each is made.
	Dir string
	// Env is added to the environment.
	Env []string

	mu      sync.Mutex
	program string
	running map[string]*process // by task
}

// Run has containers that are started from now on run a program, with the
// argument "serve".
func (p *Processes) Run(program string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.program = program
}

type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
}

// Start implements [Backend].
func (p *Processes) Start(task, ip string, env map[string]string) (Container, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	log, err := os.Create(p.Log(task))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(p.program, "serve")
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, p.Env...)
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Env = append(cmd.Env, fmt.Sprintf("SALLYPORT_LISTEN=%s:%d", ip, p.Port))
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &process{cmd: cmd, exited: make(chan struct{})}
	if p.running == nil {
		p.running = map[string]*process{}
	}
	p.running[task] = c
	go func() { // ends with the process, which the task's goroutine waits for
		cmd.Wait()
		// What it has left behind in its process group ends too, as in a
		// container. Sessions with a terminal are not in it: they end
		// because their terminal does.
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		p.mu.Lock()
		delete(p.running, task)
		p.mu.Unlock()
		close(c.exited)
	}()
	return c, nil
}

// Pids returns the processes that run.
func (p *Processes) Pids() []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	var pids []int
	for _, c := range p.running {
		pids = append(pids, c.cmd.Process.Pid)
	}
	return pids
}

// Pid returns the process of a task, by its ARN; 0 if it runs no more.
func (p *Processes) Pid(task string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.running[task]; c != nil {
		return c.cmd.Process.Pid
	}
	return 0
}

// Kill ends the process of a task, and all in its group, with SIGKILL. It does not
// wait.
func (p *Processes) Kill(task string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.running[task]; c != nil {
		c.Stop(true)
	}
}

// Log returns where a task's output is, by its ARN.
func (p *Processes) Log(task string) string {
	return filepath.Join(p.Dir, "task-"+task[strings.LastIndexByte(task, '/')+1:]+".log")
}

// Stop implements [Container]. All that is in the container ends with it.
func (c *process) Stop(kill bool) {
	if kill {
		syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
		return
	}
	c.cmd.Process.Signal(syscall.SIGTERM)
}

// Exited implements [Container].
func (c *process) Exited() <-chan struct{} { return c.exited }

// ExitCode implements [Container].
func (c *process) ExitCode() int { return c.cmd.ProcessState.ExitCode() }
