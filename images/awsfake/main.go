// Awsfake serves the tests' imitation of AWS to images/test: an ECS cluster whose tasks
// are run by a program that gets their task definition.
package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

func main() {
	var args struct {
		Run         string   `required:"" type:"existingfile" help:"Program that runs the container of a task. The variable AWSFAKE_DEFINITION is its task definition."`
		Dir         string   `required:"" type:"existingdir" help:"Folder for the output of tasks."`
		Definitions []string `arg:"" type:"existingfile" help:"Files with task definitions, as aws ecs register-task-definition reads them."`
	}
	kong.Parse(&args, kong.Name("awsfake"), kong.Description("Imitates an AWS account for gateways, and prints the environment variables to use it."))
	if err := run(args.Run, args.Dir, args.Definitions); err != nil {
		fmt.Fprintln(os.Stderr, "awsfake:", err)
		os.Exit(1)
	}
}

// containers adds the task definition to the environment of the program.
type containers struct {
	*awsfake.Processes
	cloud *awsfake.Cloud
	texts map[string]string // of task definitions, by ARN
}

// Start implements [awsfake.Backend].
func (c *containers) Start(task, ip string, env map[string]string) (awsfake.Container, error) {
	env = maps.Clone(env)
	for _, t := range c.cloud.Tasks() {
		if t.ARN == task {
			env["AWSFAKE_DEFINITION"] = c.texts[t.Definition]
		}
	}
	return c.Processes.Start(task, ip, env)
}

func run(program, dir string, definitions []string) error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)

	backend := &containers{Processes: &awsfake.Processes{Port: 2022, Dir: dir}, texts: map[string]string{}}
	backend.Run(program)
	cloud := awsfake.New(backend)
	backend.cloud = cloud
	defer cloud.Close() // ends all tasks, and waits for them
	network, release, err := awsfake.Loopback()
	if err != nil {
		return err
	}
	defer release()
	cloud.Network = network
	each := awsfake.Fixed(100 * time.Millisecond)
	cloud.Times = awsfake.Times{Provisioning: each, Pending: each, Activating: each, Reporting: each, Deprovisioning: each}
	for _, file := range definitions {
		if err := backend.define(file); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: cloud, ReadHeaderTimeout: 10 * time.Second}
	defer server.Close()
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(ln) }()
	for _, v := range awsfake.Environ("http://" + ln.Addr().String()) {
		if name, value, _ := strings.Cut(v, "="); value != "" {
			fmt.Println("export " + name + "=" + value)
		}
	}
	fmt.Println("# ready")
	select {
	case err := <-failed:
		return err
	case <-signals:
		return nil
	}
}

// define registers the task definition in a file.
func (c *containers) define(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var d struct {
		Family               string
		ContainerDefinitions []struct{ Name string }
		Tags                 []struct{ Key, Value string }
	}
	if err := json.Unmarshal(text, &d); err != nil {
		return err
	}
	if len(d.ContainerDefinitions) != 1 {
		return fmt.Errorf("%d containers, not one", len(d.ContainerDefinitions))
	}
	user := ""
	for _, t := range d.Tags {
		if t.Key == "sallyport:user" {
			user = t.Value
		}
	}
	arn, err := c.cloud.Define(d.Family, d.ContainerDefinitions[0].Name, user)
	c.texts[arn] = string(text)
	return err
}
