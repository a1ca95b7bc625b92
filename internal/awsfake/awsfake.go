// Package awsfake is for tests only: an AWS account with ECS on Fargate, a VPC and
// STS, as far as bastions need them. It serves AWS's wire protocols, so that the
// unmodified SDK and the aws command can use it, and checks signatures. It has AWS's
// faults: eventual consistency, latency, throttling, lost replies.
//
// Its behaviour is that of the API references and developer guides of ECS, EC2 and
// STS, which are cited where it is not obvious. It has not been compared with a real
// account.
//
// It works in a bubble of testing/synctest, with [Cloud.HTTPClient] as the
// network, and as an HTTP server.
package awsfake

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
)

// Resources of every account.
const (
	Region    = "eu-west-1"
	Account   = "123456789012"
	AccessKey = "AKIAFAKEFAKEFAKEFAKE"
	SecretKey = "no/secret+at/all+of/the/fake+account1234"
	Cluster   = "sallyport"
	// TaskDefinition is of family "sallyport-bastion" with one container,
	// "bastion", which stops within 30 s.
	TaskDefinition = "sallyport-bastion:7"
	VPC            = "vpc-0fa4e000"
	// SecurityGroup is the gateway's.
	SecurityGroup = "sg-0fa4e001"
	// defaultGroup is the VPC's, for tasks that name none.
	defaultGroup = "sg-0fa4e000"
)

// Subnets are in three zones.
var Subnets = []string{"subnet-0fa4e00a", "subnet-0fa4e00b", "subnet-0fa4e00c"}

// A Backend runs containers.
type Backend interface {
	// Start starts the container of a task, with the environment env, at an
	// address of its own.
	Start(task, ip string, env map[string]string) (Container, error)
}

// A Container is a running container.
type Container interface {
	// Stop sends SIGTERM, or with kill SIGKILL. It does not wait.
	Stop(kill bool)
	// Exited is closed when it has exited.
	Exited() <-chan struct{}
	// ExitCode is its exit status, after it has exited.
	ExitCode() int
}

// A Cloud is the account. Make one with [New], set the fields before the first
// call, and [Cloud.Close] it.
type Cloud struct {
	Times   Times
	Backend Backend
	// MissingFor is how long DescribeTasks and StopTask do not know a new
	// task.
	MissingFor time.Duration
	// ListLag is the age of the state that ListTasks returns.
	ListLag time.Duration
	// Duplicates makes ListTasks return a task twice.
	Duplicates bool
	// Buckets throttle calls, see [Documented] and [DocumentedRunTask]; the
	// bucket "ec2" is for all actions of EC2. By default there are none.
	Buckets map[string]Bucket
	// Policy, if not nil, is the caller's IAM policy; by default, everything is
	// permitted.
	Policy *Policy
	// IPv6Only makes the subnets IPv6-only: tasks have only an IPv6 address, which
	// DescribeTasks reports only for their containers.
	IPv6Only bool
	// ClockOffset is the difference of AWS's clock to this machine's.
	ClockOffset time.Duration
	// OnCall, if not nil, returns the Fault of a call. It is called by several
	// goroutines at once.
	OnCall func(Call) Fault
	// OnLaunch, if not nil, returns the Fate of each task of a RunTask. It must
	// not call methods of the Cloud.
	OnLaunch func(Launch) Fate
	// StopTimeout is the time from SIGTERM to SIGKILL, if the task definition has
	// none; New sets 30 s.
	StopTimeout time.Duration
	// Network is the first half of all addresses; New sets "10.0". With real
	// processes it has to be of loopback; see [Loopback].
	Network string

	mu          sync.Mutex
	denied      map[string]bool
	calls       []Call
	counts      map[string]int
	launches    int
	clusters    map[string]bool
	tasks       map[string]*task      // by ARN
	tokens      map[string]*token     // by cluster and client token
	definitions map[string]definition // by family:revision
	groups      map[string]*group
	levels      map[string]*level
	nextIP      map[string]int // by subnet
	serial      int
	violations  []string
	closed      bool
	living      sync.WaitGroup
	ending      chan struct{}
}

// New returns an account with a cluster, a task definition, a VPC with three
// subnets, and a security group, in which tasks take no time.
func New(b Backend) *Cloud {
	c := &Cloud{
		Backend:     b,
		StopTimeout: 30 * time.Second,
		Network:     "10.0",
		denied:      map[string]bool{},
		counts:      map[string]int{},
		tasks:       map[string]*task{},
		tokens:      map[string]*token{},
		clusters:    map[string]bool{Cluster: true},
		nextIP:      map[string]int{},
		definitions: map[string]definition{TaskDefinition: preset()},
		groups: map[string]*group{
			SecurityGroup: {ID: SecurityGroup, Name: "gateway", VPC: VPC, Description: "The gateway", preset: true, egress: openEgress()},
			defaultGroup: {ID: defaultGroup, Name: "default", VPC: VPC, Description: "default VPC security group", preset: true,
				ingress: []rule{{"-1", "", "", defaultGroup}}, egress: openEgress()},
		},
		levels: map[string]*level{},
		ending: make(chan struct{}),
	}
	return c
}

// Config returns a configuration of the SDK for this account, with the network
// in memory: for tests in a bubble.
func (c *Cloud) Config() aws.Config {
	return aws.Config{
		Region:       Region,
		Credentials:  credentials.NewStaticCredentialsProvider(AccessKey, SecretKey, ""),
		BaseEndpoint: aws.String("http://aws.invalid"),
		HTTPClient:   c.HTTPClient(),
	}
}

// Environ returns the environment for programs that use this account, which is served
// at the URL.
func Environ(endpoint string) []string {
	return []string{
		"AWS_ENDPOINT_URL=" + endpoint,
		"AWS_REGION=" + Region,
		"AWS_DEFAULT_REGION=" + Region,
		"AWS_ACCESS_KEY_ID=" + AccessKey,
		"AWS_SECRET_ACCESS_KEY=" + SecretKey,
		"AWS_EC2_METADATA_DISABLED=true",
		"AWS_CONFIG_FILE=/dev/null",
		"AWS_SHARED_CREDENTIALS_FILE=/dev/null",
		"AWS_SESSION_TOKEN=",
		"AWS_PROFILE=",
	}
}

// Set calls f, which may change the fields, between calls.
func (c *Cloud) Set(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

// AddCluster makes another cluster.
func (c *Cloud) AddCluster(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clusters[name] = true
}

// Deny removes a permission, such as "ecs:RunTask" or "iam:PassRole", from the caller,
// or with false restores it.
func (c *Cloud) Deny(action string, denied bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.denied[action] = denied
}

// Permit restores all permissions that Deny has removed.
func (c *Cloud) Permit() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.denied)
}

// Calls returns all calls so far.
func (c *Cloud) Calls() []Call {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.calls)
}

// Violations returns broken invariants: an owner with two live tasks in one
// deployment, a task whose tags name another owner than its environment, and a task
// with the task definition of another user.
func (c *Cloud) Violations() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.violations)
}

// Left returns the resources that remain: tasks that have not stopped, and security
// groups that were made.
func (c *Cloud) Left() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var left []string
	for _, t := range c.tasks {
		if t.last != "STOPPED" {
			left = append(left, fmt.Sprintf("task %s of %s is %s, with %s", t.arn, t.owner, t.last, t.eni))
		}
	}
	for _, g := range c.groups {
		if !g.preset {
			left = append(left, fmt.Sprintf("security group %s %q", g.ID, g.Name))
		}
	}
	slices.Sort(left)
	return left
}

// Live returns the owners of the tasks whose desired status is RUNNING, once for each
// task.
func (c *Cloud) Live() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var owners []string
	for _, t := range c.tasks {
		if t.desired == "RUNNING" {
			owners = append(owners, t.owner)
		}
	}
	slices.Sort(owners)
	return owners
}

// A Task describes a task, running or stopped.
type Task struct {
	ARN, Owner, IP string
	Definition     string            // its ARN
	Env            map[string]string // of its container
	Last, Desired  string            // lastStatus and desiredStatus
	Created        time.Time
}

// Tasks returns all tasks, stopped ones too, in the order of their creation.
func (c *Cloud) Tasks() []Task {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []Task
	for _, t := range byAge(c.tasks) {
		all = append(all, Task{ARN: t.arn, Owner: t.owner, IP: t.ip, Definition: t.def.TaskDefinitionArn, Env: maps.Clone(t.env), Last: t.last, Desired: t.desired, Created: t.created})
	}
	return all
}

// Stop is StopAll for one task. It does nothing if there is none.
func (c *Cloud) Stop(task, stopCode, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.tasks[task]; t != nil {
		t.stop(stopCode, reason)
	}
}

// OutOfMemory ends a task's container as the kernel does if it uses too much memory. It
// does nothing if the container does not run.
func (c *Cloud) OutOfMemory(task string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.tasks[task]; t != nil && t.container != nil {
		t.containerReason = "OutOfMemoryError: Container killed due to memory usage"
		t.container.Stop(true)
	}
}

// StopAll stops all running tasks, with the stop code and the reason of a person, a
// Spot interruption or the retirement of a host.
func (c *Cloud) StopAll(stopCode, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.tasks {
		t.stop(stopCode, reason)
	}
}

// Close stops all tasks at once, and waits for their end. Later calls fail.
func (c *Cloud) Close() {
	c.mu.Lock()
	if !c.closed {
		c.closed = true
		close(c.ending)
	}
	for _, t := range c.tasks {
		t.stop("UserInitiated", "the end of the world")
	}
	c.mu.Unlock()
	c.living.Wait()
}

// now returns the time of AWS's clock.
func (c *Cloud) now() time.Time { return time.Now().Add(c.ClockOffset) }

// id returns a new hexadecimal number.
func (c *Cloud) id(digits int) string {
	c.serial++
	const odd = 0x9e3779b97f4a7c15 // so that they look like ids
	s := fmt.Sprintf("%016x%016x", uint64(c.serial)*odd, uint64(c.serial)*odd*odd)
	return s[:digits]
}

// byAge returns tasks in the order of their creation.
func byAge(tasks map[string]*task) []*task {
	return slices.SortedFunc(maps.Values(tasks), func(a, b *task) int {
		return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.arn, b.arn))
	})
}

// keys returns the sorted keys of a map.
func keys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
