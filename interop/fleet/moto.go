package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

const (
	// motoPackage is moto's package, with its extras and its version.
	motoPackage = "moto[server,dynamodb]==5.2.5"
	// motoLogins is the number of logins a minute: moto answers one call at a time.
	motoLogins = 60
	// motoUsers is the number of users.
	motoUsers = 40
	// motoSessions is the number of sessions that stay.
	motoSessions = 5
	// motoPause limits the pauses of gateways. Moto ignores client tokens, so that a
	// second launch of a generation is a second task. A pause shorter than the lease
	// of a start, which is 30 s, causes none.
	motoPause = 8 * time.Second
)

// motoDir returns the folder of moto's virtual environment.
func motoDir() (string, error) {
	cache, err := os.UserCacheDir()
	return filepath.Join(cache, "sallyport-test", "moto@5.2.5"), err
}

// installMoto installs moto, unless it is there.
func installMoto() error {
	dir, err := motoDir()
	if err != nil {
		return err
	}
	done := filepath.Join(dir, "installed")
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	for _, args := range [][]string{
		{"python3", "-m", "venv", "--clear", dir},
		{filepath.Join(dir, "bin", "pip"), "install", "--quiet", "--disable-pip-version-check", motoPackage},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("installing %s (Debian packages python3 and python3-venv): %w\n%s", motoPackage, err, out)
		}
	}
	return os.WriteFile(done, nil, 0o644)
}

// startMoto starts moto as AWS and as the table. Its tasks run nothing by themselves:
// see motoTasks.
func startMoto(ctx context.Context, f *fleet) (environ []string, err error) {
	f.users, f.sessions, f.logins = motoUsers, motoSessions, int(motoLogins*f.time.Minutes())
	dir, err := motoDir()
	if err != nil {
		return nil, err
	}
	const port = "5000"
	server, err := f.spawner.start(f.dir, "moto", exec.Command(filepath.Join(dir, "bin", "python"), "interop/moto/server.py", "-H", awsAddr, "-p", port))
	if err != nil {
		return nil, err
	}
	f.depend(server)
	if err := awaitPort(ctx, awsAddr+":"+port); err != nil {
		return nil, fmt.Errorf("moto: %w\n%s", err, server.tail())
	}
	endpoint := "http://" + awsAddr + ":" + port
	cfg := aws.Config{
		Region: awsfake.Region, BaseEndpoint: &endpoint,
		Credentials: credentials.NewStaticCredentialsProvider(awsfake.AccessKey, awsfake.SecretKey, ""),
	}
	if err := f.furnishMoto(ctx, cfg, endpoint); err != nil {
		return nil, err
	}
	tasks, err := f.newMotoTasks(cfg)
	if err != nil {
		return nil, err
	}
	f.tasks = tasks.all
	f.probes = []string{endpoint + "/moto-api/"}
	return awsfake.Environ(endpoint), nil
}

// furnishMoto creates the cluster, the task definition and the security group.
func (f *fleet) furnishMoto(ctx context.Context, cfg aws.Config, endpoint string) error {
	// Otherwise each DescribeTasks would take a task to its next status.
	resp, err := http.Post(endpoint+"/moto-api/state-manager/set-transition", "application/json",
		strings.NewReader(`{"model_name":"ecs::task","transition":{"progression":"manual","times":1000000}}`))
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("set-transition of moto: %s", resp.Status)
	}
	e, n := ecs.NewFromConfig(cfg), ec2.NewFromConfig(cfg)
	if _, err := e.CreateCluster(ctx, &ecs.CreateClusterInput{ClusterName: aws.String(awsfake.Cluster)}); err != nil {
		return err
	}
	if _, err := e.RegisterTaskDefinition(ctx, &ecs.RegisterTaskDefinitionInput{
		Family: aws.String("sallyport-bastion"), NetworkMode: types.NetworkModeAwsvpc,
		RequiresCompatibilities: []types.Compatibility{types.CompatibilityFargate}, Cpu: aws.String("256"), Memory: aws.String("512"),
		ContainerDefinitions: []types.ContainerDefinition{{Name: aws.String("bastion"), Image: aws.String("sallyport-bastion:1"), Cpu: 256, Memory: aws.Int32(512), Essential: aws.Bool(true)}},
	}); err != nil {
		return err
	}
	f.definition = "sallyport-bastion:1"
	found, err := n.DescribeSubnets(ctx, &ec2.DescribeSubnetsInput{})
	if err != nil {
		return err
	}
	if len(found.Subnets) == 0 {
		return errors.New("moto has no subnets")
	}
	for _, s := range found.Subnets {
		f.subnets = append(f.subnets, aws.ToString(s.SubnetId))
	}
	made, err := n.CreateSecurityGroup(ctx, &ec2.CreateSecurityGroupInput{GroupName: aws.String("gateway"), Description: aws.String("The gateway"), VpcId: found.Subnets[0].VpcId})
	if err != nil {
		return err
	}
	f.securityGroup = aws.ToString(made.GroupId)
	return nil
}

// motoTasks plays Fargate for moto, which keeps records of tasks only: it starts a
// bastion-agent for each new task at the task's address, and stops the task when the
// agent exits, and the agent when the task is stopped.
type motoTasks struct {
	ecs        *ecs.Client
	containers *awsfake.Processes

	started, stopped map[string]awsfake.Container

	mu    sync.Mutex
	tasks []awsfake.Task // at the last look
}

func (f *fleet) newMotoTasks(cfg aws.Config) (*motoTasks, error) {
	if err := os.MkdirAll(f.path("tasks"), 0o755); err != nil {
		return nil, err
	}
	agent, err := filepath.Abs(filepath.Join(f.bin, "bastion-agent"))
	if err != nil {
		return nil, err
	}
	m := &motoTasks{ecs: ecs.NewFromConfig(cfg), containers: &awsfake.Processes{Port: agentPort, Dir: f.path("tasks")},
		started: map[string]awsfake.Container{}, stopped: map[string]awsfake.Container{}}
	m.containers.Run(agent)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			err := m.look(ctx)
			if !sleep(ctx, 200*time.Millisecond) {
				return
			}
			if err != nil {
				f.results.violate(failedGateways, "moto: %v", err)
				return
			}
		}
	})
	f.closers = append(f.closers, func() {
		cancel()
		running.Wait()
		for _, c := range m.started {
			c.Stop(true)
			<-c.Exited()
		}
	})
	return m, nil
}

// all returns the tasks at the last look.
func (m *motoTasks) all() []awsfake.Task {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.tasks
}

// look lists the tasks, and starts and stops agents accordingly.
func (m *motoTasks) look(ctx context.Context) error {
	var arns []string
	for _, desired := range []types.DesiredStatus{types.DesiredStatusRunning, types.DesiredStatusStopped} {
		pages := ecs.NewListTasksPaginator(m.ecs, &ecs.ListTasksInput{Cluster: aws.String(awsfake.Cluster), DesiredStatus: desired})
		for pages.HasMorePages() {
			page, err := pages.NextPage(ctx)
			if err != nil {
				return err
			}
			arns = append(arns, page.TaskArns...)
		}
	}
	var all []awsfake.Task
	for len(arns) > 0 {
		some := arns[:min(len(arns), 100)]
		arns = arns[len(some):]
		out, err := m.ecs.DescribeTasks(ctx, &ecs.DescribeTasksInput{Cluster: aws.String(awsfake.Cluster), Tasks: some})
		if err != nil {
			return err
		}
		for _, t := range out.Tasks {
			task, err := m.follow(ctx, t)
			if err != nil {
				return err
			}
			all = append(all, task)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tasks = all
	return nil
}

// follow starts or stops the agent of a task.
func (m *motoTasks) follow(ctx context.Context, t types.Task) (awsfake.Task, error) {
	task := awsfake.Task{ARN: aws.ToString(t.TaskArn), Env: map[string]string{}, Last: aws.ToString(t.LastStatus), Desired: aws.ToString(t.DesiredStatus)}
	if t.Overrides != nil {
		for _, c := range t.Overrides.ContainerOverrides {
			for _, v := range c.Environment {
				task.Env[aws.ToString(v.Name)] = aws.ToString(v.Value)
			}
		}
	}
	task.Owner = task.Env["SALLYPORT_OWNER"] + "+" + task.Env["SALLYPORT_PROFILE"]
	for _, a := range t.Attachments {
		for _, d := range a.Details {
			if aws.ToString(d.Name) == "privateIPv4Address" {
				task.IP = aws.ToString(d.Value)
			}
		}
	}
	container := m.started[task.ARN]
	exited := false
	if container != nil {
		select {
		case <-container.Exited():
			exited = true
		default:
		}
	}
	switch {
	case container == nil && task.Desired != "STOPPED":
		var err error
		if container, err = m.containers.Start(task.ARN, task.IP, task.Env); err != nil {
			return task, err
		}
		m.started[task.ARN] = container
	case task.Desired == "STOPPED" && (container == nil || exited):
		task.Last = "STOPPED" // moto leaves it at its last status
	case task.Desired == "STOPPED" && m.stopped[task.ARN] == nil:
		m.stopped[task.ARN] = container
		container.Stop(false)
	case exited:
		_, err := m.ecs.StopTask(ctx, &ecs.StopTaskInput{Cluster: aws.String(awsfake.Cluster), Task: &task.ARN, Reason: aws.String("Essential container in task exited")})
		return task, err
	}
	return task, nil
}

// moto is the run against moto: the same load, smaller, with the faults that do not
// depend on client tokens.
func (f *fleet) moto(ctx context.Context) error {
	defer f.watch(ctx)()
	d := min(f.time, time.Minute)
	loading, stopLoad := context.WithTimeout(ctx, d)
	defer stopLoad()
	var trouble sync.WaitGroup
	var failed error
	trouble.Go(func() {
		failed = f.inject(ctx, []*kind{paused, drained, cutGateways}, d*4/5, motoPause)
	})
	newLoad(f).run(loading)
	trouble.Wait()
	if failed != nil || ctx.Err() != nil {
		return failed
	}
	return f.finish(ctx)
}
