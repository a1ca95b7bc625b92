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
	// Port is the port in SALLYPORT_LISTEN, at the task's address.
	Port int
	// Dir holds a file with the output of each process.
	Dir string
	// Env is added to the environment.
	Env []string

	mu      sync.Mutex
	program string
	running map[string]*process // by task
}

// Run sets the program of containers that are started from now on. Its argument is
// "serve".
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
	// Fargate sets these in each container with a task role.
	cmd.Env = append([]string{
		"PATH=" + os.Getenv("PATH"),
		"AWS_EXECUTION_ENV=AWS_ECS_FARGATE", "AWS_REGION=" + Region, "AWS_DEFAULT_REGION=" + Region,
		"ECS_CONTAINER_METADATA_URI_V4=http://169.254.170.2/v4/0123456789abcdef",
		"ECS_AGENT_URI=http://169.254.170.2/api/0123456789abcdef",
		"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=/v2/credentials/01234567-89ab-cdef",
	}, p.Env...)
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
		// Its process group ends, too, as in a container. Sessions with a
		// terminal are not in it; they end with their terminal.
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		p.mu.Lock()
		delete(p.running, task)
		p.mu.Unlock()
		close(c.exited)
	}()
	return c, nil
}

// Pids returns the running processes.
func (p *Processes) Pids() []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	var pids []int
	for _, c := range p.running {
		pids = append(pids, c.cmd.Process.Pid)
	}
	return pids
}

// Pid returns the process of a task, by its ARN; 0 if it has ended.
func (p *Processes) Pid(task string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.running[task]; c != nil {
		return c.cmd.Process.Pid
	}
	return 0
}

// Kill sends SIGKILL to the process group of a task. It does not wait.
func (p *Processes) Kill(task string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.running[task]; c != nil {
		c.Stop(true)
	}
}

// Log returns the path of a task's output, by its ARN.
func (p *Processes) Log(task string) string {
	return filepath.Join(p.Dir, "task-"+task[strings.LastIndexByte(task, '/')+1:]+".log")
}

// Stop implements [Container]. It signals the whole process group.
func (c *process) Stop(kill bool) {
	if kill {
		syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
		return
	}
	c.cmd.Process.Signal(syscall.SIGTERM)
}

// Exited implements [Container].
func (c *process) Exited() <-chan struct{} { return c.exited }

// ExitCode implements [Container]. For a signal, it is 128 plus the signal's number.
func (c *process) ExitCode() int {
	if status, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return c.cmd.ProcessState.ExitCode()
}
