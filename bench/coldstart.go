package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

// atOnce is the number of concurrent cold starts. This machine runs all their
// agents and clients.
const atOnce = 2

// coldStart measures the part of a start that follows AWS: from the agent's log
// record that it listens, until its user's first command has printed. AWS is
// awsfake, whose tasks are agents on this machine; their start is not measured.
func (b *bench) coldStart(ctx context.Context) (rows []row, err error) {
	dir := b.path("coldstart")
	for _, d := range []string{dir, filepath.Join(dir, "keys"), filepath.Join(dir, "tasks")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	public, err := os.ReadFile(b.key + ".pub")
	if err != nil {
		return nil, err
	}
	for i := range b.coldStarts {
		if err := os.WriteFile(filepath.Join(dir, "keys", userName(i)), public, 0o644); err != nil {
			return nil, err
		}
	}

	containers := &awsfake.Processes{Port: 2022, Dir: filepath.Join(dir, "tasks")}
	containers.Run(filepath.Join(filepath.Dir(b.binary), "bastion-agent"))
	cloud := awsfake.New(containers)
	cloud.Buckets = awsfake.Documented
	network, release, err := awsfake.Loopback()
	if err != nil {
		return nil, err
	}
	defer release()
	cloud.Network = network
	cloud.Times = awsfake.Times{
		Provisioning: awsfake.Fixed(300 * time.Millisecond), Pending: awsfake.Fixed(500 * time.Millisecond), Activating: awsfake.Fixed(500 * time.Millisecond),
		Reporting: awsfake.Fixed(2 * time.Second), Deprovisioning: awsfake.Fixed(time.Second),
	}
	api := httptest.NewServer(cloud)
	defer api.Close()
	defer cloud.Close()

	s := server{name: "fargate"}
	if s.addr, err = freeAddr(); err != nil {
		return nil, err
	}
	config := fmt.Sprintf(`listen: "%s"
host_keys: [%s]
fleet_key: %s
authorized_keys_dir: %s
state_dir: %s
starts_per_user: none
profiles:
  default:
    launcher: fargate
    idle: 1s
    fargate:
      cluster: %s
      task_definition: %s
      account: %s
      subnets: [%s]
`, s.addr, b.path("gateway_key"), b.path("fleet_key"), filepath.Join(dir, "keys"), filepath.Join(dir, "state"),
		awsfake.Cluster, awsfake.TaskDefinition, b.sshd.user, strings.Join(awsfake.Subnets, ", "))
	if err := os.WriteFile(filepath.Join(dir, "gateway.yaml"), []byte(config), 0o644); err != nil {
		return nil, err
	}
	cmd := exec.Command(b.binary, "serve", "--config", filepath.Join(dir, "gateway.yaml"))
	cmd.Env = append(os.Environ(), awsfake.Environ(api.URL)...)
	if s.pid, err = b.spawn(s.name, cmd); err != nil {
		return nil, err
	}
	if err := awaitSSH(ctx, s.addr); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, b.logOf(s.name))
	}
	host, port, err := net.SplitHostPort(s.addr)
	if err != nil {
		return nil, err
	}

	answered := make([]time.Time, b.coldStarts)
	errs := make([]error, b.coldStarts)
	turns := make(chan int)
	var clients sync.WaitGroup
	for range atOnce {
		clients.Go(func() {
			for i := range turns {
				cmd := exec.CommandContext(ctx, "ssh", "-F", "/dev/null", "-i", b.key, "-p", port, "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none",
					"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes", userName(i)+"@"+host, "echo up")
				var said bytes.Buffer
				cmd.Stderr = &said
				out, err := cmd.StdoutPipe()
				if err == nil {
					err = cmd.Start()
				}
				if err == nil {
					_, err = bufio.NewReader(out).ReadString('\n')
					answered[i] = time.Now()
					err = errors.Join(err, cmd.Wait())
				}
				if err != nil {
					errs[i] = fmt.Errorf("%s: %w\n%s", userName(i), err, &said)
				}
			}
		})
	}
	for i := range b.coldStarts {
		turns <- i
	}
	close(turns)
	clients.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, b.logOf(s.name))
	}

	listens, err := listening(filepath.Join(dir, "tasks"))
	if err != nil {
		return nil, err
	}
	var took samples
	for i, at := range answered {
		began, ok := listens[userName(i)]
		if !ok {
			return nil, fmt.Errorf("%s has got in, and no agent says that it has listened for her", userName(i))
		}
		took = append(took, float64(at.Sub(began).Microseconds())/1000)
	}
	counts := map[string]int{}
	for _, c := range cloud.Calls() {
		counts[c.Action]++
	}
	p99 := slices.Sorted(slices.Values(took))[len(took)*99/100]
	return []row{
		{What: "agent listens until the user's first command has answered, 99th percentile", Goal: "<= 300", Unit: "ms", Sallyport: samples{p99},
			Note: fmt.Sprintf("of %d cold starts, %d at a time", len(took), atOnce)},
		{What: "the same, median", Unit: "ms", Sallyport: took},
		{What: "AWS calls per cold start, beyond the shared poll", Goal: "<= 2", Unit: "calls",
			Sallyport: samples{float64(counts["ecs:RunTask"]+counts["ecs:StopTask"]+counts["ec2:DescribeNetworkInterfaces"]) / float64(len(took))}},
	}, nil
}

// listening returns the time at which each owner's agent began to listen, from the
// logs.
func listening(dir string) (map[string]time.Time, error) {
	since := map[string]time.Time{}
	logs, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil {
		return nil, err
	}
	for _, name := range logs {
		log, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		for line := range bytes.Lines(log) {
			var said struct {
				Time       time.Time
				Msg, Owner string
			}
			if json.Unmarshal(line, &said) == nil && said.Msg == "agent listens" {
				since[said.Owner] = said.Time
			}
		}
	}
	return since, nil
}
