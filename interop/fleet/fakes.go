package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

// startFakes starts dynalite, and the imitation of AWS with its faults. Each task is a
// bastion-agent.
func startFakes(ctx context.Context, f *fleet) (environ []string, err error) {
	if err := os.MkdirAll(f.path("tasks"), 0o755); err != nil {
		return nil, err
	}
	agent, err := filepath.Abs(filepath.Join(f.bin, "bastion-agent"))
	if err != nil {
		return nil, err
	}
	containers := &awsfake.Processes{Port: agentPort, Dir: f.path("tasks")}
	containers.Run(agent)
	f.cloud = awsfake.New(containers)
	state := awsfake.Between(rand.New(rand.NewPCG(f.results.Seed, 2)), 100*time.Millisecond, 600*time.Millisecond)
	f.cloud.Times = awsfake.Times{Provisioning: state, Pending: state, Activating: state, Reporting: state, Deactivating: state, Deprovisioning: state}
	f.cloud.MissingFor = 300 * time.Millisecond
	f.cloud.ListLag = time.Second
	f.cloud.Duplicates = true
	f.cloud.OnCall = func(awsfake.Call) (fault awsfake.Fault) {
		var carriedOut bool
		fault.Delay, fault.LoseReply, carriedOut = f.aws.next()
		if fault.LoseReply && !carriedOut {
			fault.Status, fault.Code = http.StatusInternalServerError, "ServerException"
		}
		return fault
	}
	return f.serveFakes(ctx)
}

// serveFakes starts dynalite, and serves it and the imitation of AWS.
func (f *fleet) serveFakes(ctx context.Context) (environ []string, err error) {
	f.tasks = f.cloud.Tasks
	f.definition, f.subnets, f.securityGroup = awsfake.TaskDefinition, awsfake.Subnets, awsfake.SecurityGroup
	f.cloud.Network = spacePrefix
	f.cloud.Buckets = awsfake.Documented
	program, err := awsfake.InstallDynalite()
	if err != nil {
		return nil, err
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := free.Addr().String()
	free.Close()
	_, port, _ := net.SplitHostPort(addr)
	dynalite, err := f.spawner.start(f.dir, "dynalite", exec.Command("node", program, "--host", "127.0.0.1", "--port", port, "--createTableMs", "0"))
	if err != nil {
		return nil, err
	}
	f.depend(dynalite)
	if err := awaitPort(ctx, addr); err != nil {
		return nil, fmt.Errorf("dynalite: %w\n%s", err, dynalite.tail())
	}
	if f.table, err = newTable("http://" + addr); err != nil {
		return nil, err
	}
	tableURL, end, err := serve(tableAddr, f.table)
	if err != nil {
		return nil, err
	}
	f.closers = append(f.closers, end)
	awsURL, end, err := serve(awsAddr, f.cloud)
	if err != nil {
		return nil, err
	}
	f.closers = append(f.closers, end, f.cloud.Close)
	f.probes = []string{"http://" + addr, awsURL}
	return append(awsfake.Environ(awsURL), "AWS_ENDPOINT_URL_DYNAMODB="+tableURL), nil
}
