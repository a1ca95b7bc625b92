// Awsfake serves the tests' imitation of AWS: an ECS cluster whose tasks are
// bastion-agents on this machine, parts of EC2, and STS. A gateway with the
// launcher fargate, or AWS's own command line, can use it in place of AWS.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

func main() {
	var args struct {
		Listen string        `default:"127.0.0.1:0" help:"Address to listen on. Use a loopback address only: every client can run programs."`
		Agent  string        `required:"" type:"existingfile" help:"The bastion-agent."`
		Dir    string        `required:"" type:"existingdir" help:"Folder for the output of tasks."`
		State  time.Duration `default:"1s" help:"Duration of each state of a starting task."`
	}
	kong.Parse(&args, kong.Name("awsfake"), kong.Description("Imitates an AWS account for gateways, and prints the environment variables to use it."))
	if err := run(args.Listen, args.Agent, args.Dir, args.State); err != nil {
		fmt.Fprintln(os.Stderr, "awsfake:", err)
		os.Exit(1)
	}
}

func run(listen, agent, dir string, state time.Duration) error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)

	program, err := filepath.Abs(agent)
	if err != nil {
		return err
	}
	containers := &awsfake.Processes{Port: 2022, Dir: dir}
	containers.Run(program)
	cloud := awsfake.New(containers)
	defer cloud.Close() // ends all tasks, and waits for them
	network, release, err := awsfake.Loopback()
	if err != nil {
		return err
	}
	defer release()
	cloud.Network = network
	each := awsfake.Fixed(state)
	cloud.Times = awsfake.Times{Provisioning: each, Pending: each, Activating: each, Reporting: each, Deprovisioning: each}

	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: cloud, ReadHeaderTimeout: 10 * time.Second}
	defer server.Close()
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(ln) }()

	for _, v := range awsfake.Environ("http://" + ln.Addr().String()) {
		if name, value, _ := strings.Cut(v, "="); value == "" {
			fmt.Println("unset " + name)
			continue
		}
		fmt.Println("export " + v)
	}
	fmt.Printf("# cluster %s, task definition %s, security group %s, subnets %s\n",
		awsfake.Cluster, awsfake.TaskDefinition, awsfake.SecurityGroup, strings.Join(awsfake.Subnets, " "))
	select {
	case err := <-failed:
		return err
	case <-signals:
		return nil
	}
}
