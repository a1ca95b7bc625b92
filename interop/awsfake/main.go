// Awsfake is the AWS that the tests use, as a program: an ECS cluster whose tasks
// are bastion-agents of this machine, some of EC2, and STS. It is for trying a
// gateway with the launcher fargate, and AWS's own command line, without AWS.
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
		Listen string        `default:"127.0.0.1:0" help:"Where to listen; only what listens on loopback is safe: everybody who gets there runs programs."`
		Agent  string        `required:"" type:"existingfile" help:"The bastion-agent."`
		Dir    string        `required:"" type:"existingdir" help:"Where the output of tasks goes."`
		State  time.Duration `default:"1s" help:"How long a task stays in each state on its way."`
	}
	kong.Parse(&args, kong.Name("awsfake"), kong.Description("An AWS account for trying gateways without one. Prints the environment that leads there."))
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
