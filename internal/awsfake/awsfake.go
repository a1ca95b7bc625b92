// Package awsfake is for tests only: an AWS account with ECS on Fargate, a VPC and
// STS, as far as bastions need them. It speaks AWS's own wire protocols, so that
// the unmodified SDK and the aws command can be pointed at it, checks their
// signatures, and does to its callers what the real one does: it is slow,
// forgetful, throttled, and loses replies.
//
// What it knows of AWS is from the API references and developer guides of ECS,
// EC2 and STS; the place is cited where it is not obvious. Nothing in it has been
// compared with a real account.
//
// It works in a bubble of testing/synctest, with [Cloud.HTTPClient] as the
// network, and as an HTTP server.
package awsfake

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
)

// What there is in every account.
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

// Times is how long tasks are in the states of their life (Amazon ECS task
// lifecycle, Developer Guide). Each is called for each task; nil is no time.
type Times struct {
	// Provisioning ends with the attachment of the network interface, Pending
	// with the pull of the image, Activating with the start of the container.
	Provisioning, Pending, Activating func() time.Duration
	// Reporting is from then until the task is said to run.
	Reporting func() time.Duration
	// Deactivating is between being told to stop and SIGTERM.
	Deactivating func() time.Duration
	// Deprovisioning is from the end of the container until the network
	// interface is gone and the task STOPPED.
	Deprovisioning func() time.Duration
}

// Fixed is the same each time.
func Fixed(d time.Duration) func() time.Duration { return func() time.Duration { return d } }

// Between is something from least to most, by chance.
func Between(rng *rand.Rand, least, most time.Duration) func() time.Duration {
	var mu sync.Mutex
	return func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return least + time.Duration(rng.Int64N(int64(most-least)+1))
	}
}

// A Backend runs containers.
type Backend interface {
	// Start runs the container of a task, with these variables, at an
	// address that is its own. The container that is returned has been
	// started.
	Start(task, ip string, env map[string]string) (Container, error)
}

// A Container runs until it exits by itself or is made to.
type Container interface {
	// Stop asks it to exit (SIGTERM), or makes it (SIGKILL). It does not wait.
	Stop(kill bool)
	// Exited is closed when it has exited.
	Exited() <-chan struct{}
	// ExitCode is its exit status, once it has exited.
	ExitCode() int
}

// A Call is one request, as OnCall sees it.
type Call struct {
	Action string // as in IAM: "ecs:RunTask"
	// N counts the calls of this action from 1, repetitions included.
	N    int
	Time time.Time
	// Owner is whose task it is about, for RunTask.
	Owner string
	// Refused says with which code it was answered, once it was; empty is
	// success.
	Refused string
	Tasks   int // that DescribeTasks was asked about
}

// A Fault is what goes wrong with a call. The zero Fault is nothing.
type Fault struct {
	// Status and Code, if set, are the answer, and nothing is done.
	Status        int
	Code, Message string
	// LoseReply does what was asked and then breaks the connection. With a
	// Code, nothing is done and the connection broken.
	LoseReply bool
	// Delay is before anything else. A caller that has gone by then has asked
	// nothing.
	Delay time.Duration
}

// Faults that AWS has.
var (
	Throttled   = Fault{Status: 400, Code: "ThrottlingException", Message: "Rate exceeded"}
	Unavailable = Fault{Status: 503, Code: "ServiceUnavailableException", Message: "Service Unavailable. Please try again later."}
	Broken      = Fault{Status: 500, Code: "ServerException", Message: "Internal server error"}
	// ThrottledEC2 is how EC2 says it.
	ThrottledEC2 = Fault{Status: 503, Code: "RequestLimitExceeded", Message: "Request limit exceeded."}
)

// A Fate is what becomes of a launch. The zero Fate is a bastion.
type Fate struct {
	// Failure, if set, is the reason in failures[], and there is no task.
	Failure string
	// FailIn is the state, such as "PENDING", at the end of which the task
	// stops by itself, with the Reason. A task that fails in RUNNING has run
	// for After.
	FailIn, Reason string
	After          time.Duration
	// StopCode, such as SpotInterruption, is by default TaskFailedToStart,
	// and in RUNNING EssentialContainerExited.
	StopCode string
	// NoAddress keeps it in PROVISIONING for good.
	NoAddress bool
}

// What ECS says, for Fates.
const (
	NoCapacity = "Capacity is unavailable at this time. Please try again later or in a different availability zone"
	NoVCPU     = "You've reached the limit on the number of vCPUs you can run concurrently"
	NoENI      = "Timeout waiting for network interface provisioning to complete."
	NoImage    = "CannotPullContainerError: pull image manifest has been retried 5 time(s): failed to resolve ref"
	NoStorage  = "Timeout waiting for EphemeralStorage provisioning to complete."
	SpotTaken  = "Your Spot Task was interrupted."
	Retired    = "ECS is performing maintenance on the underlying infrastructure hosting the task."
	NoLogGroup = "ResourceInitializationError: failed to validate logger args: create stream has been retried 1 times: failed to create Cloudwatch log stream: ResourceNotFoundException: The specified log group does not exist. : exit status 1"
	NoSecrets  = "ResourceInitializationError: unable to pull secrets or registry auth: execution resource retrieval failed"
)

// A Launch is a RunTask that was accepted, as OnLaunch sees it.
type Launch struct {
	N      int    // counts them from 1
	Owner  string // user+profile, by its environment
	Subnet string
	Spot   bool
}

// Bucket is a token bucket: Burst calls at once, Rate a second.
type Bucket struct{ Burst, Rate float64 }

// Documented is the throttling that AWS documents for ECS ("Request throttling",
// Amazon ECS API Reference) and Fargate ("AWS Fargate throttling quotas",
// Developer Guide). A RunTask takes from "modify", and for each of its tasks from
// "launch", or "spot"; StopTask takes from "modify"; DescribeTasks and ListTasks
// from "read".
var Documented = map[string]Bucket{
	"modify": {100, 40},
	"read":   {100, 20},
	"launch": {100, 20},
	"spot":   {100, 20},
}

// DocumentedRunTask is a limit of RunTask calls that the Developer Guide has
// besides, for the bucket "run". With it the burst of launches can be had only
// by calls that start several tasks each.
var DocumentedRunTask = Bucket{20, 20}

// A Cloud is the account. Make one with [New], set the fields before the first
// call, and [Cloud.Close] it.
type Cloud struct {
	Times   Times
	Backend Backend
	// MissingFor is how long DescribeTasks and StopTask do not know a new
	// task.
	MissingFor time.Duration
	// ListLag is how far behind ListTasks is.
	ListLag time.Duration
	// Duplicates has ListTasks name a task twice.
	Duplicates bool
	// Buckets throttle, as [Documented] and [DocumentedRunTask]; there is one
	// more, "ec2", for all actions of EC2. By default nothing does.
	Buckets map[string]Bucket
	// Policy, if not nil, is what the caller may do; by default it may do all.
	Policy *Policy
	// ClockOffset is how far AWS's clock is ahead.
	ClockOffset time.Duration
	// OnCall, if not nil, decides what goes wrong with a call. It is called by
	// several goroutines at once.
	OnCall func(Call) Fault
	// OnLaunch, if not nil, decides what becomes of a launch: of each task
	// that a RunTask asks for. It must not call methods of the Cloud.
	OnLaunch func(Launch) Fate
	// StopTimeout is between SIGTERM and SIGKILL, where the task definition
	// does not say; New sets 30 s.
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

// Environ returns what programs need to be told to use this account, which is
// served at the URL.
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

// Deny takes a permission, such as "ecs:RunTask" or "iam:PassRole", from the
// caller, or with false gives it back.
func (c *Cloud) Deny(action string, denied bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.denied[action] = denied
}

// Permit gives back all that Deny has taken.
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

// Violations returns what must never have been: an owner with two live tasks in
// one deployment, and a task whose tags name another owner than its environment.
func (c *Cloud) Violations() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.violations)
}

// Left returns what is there that costs money or stands in the way: tasks that
// have not stopped, and security groups that were made.
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

// Live returns the owners of the tasks that are meant to run, each as often as
// she has one.
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

// A Task is one that there has been.
type Task struct {
	ARN, Owner, IP string
	Env            map[string]string // that its container was given
	Last, Desired  string            // lastStatus and desiredStatus
	Created        time.Time
}

// Tasks returns all tasks, stopped ones too, in the order of their creation.
func (c *Cloud) Tasks() []Task {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []Task
	for _, t := range byAge(c.tasks) {
		all = append(all, Task{ARN: t.arn, Owner: t.owner, IP: t.ip, Env: maps.Clone(t.env), Last: t.last, Desired: t.desired, Created: t.created})
	}
	return all
}

// Stop stops one task as StopAll does all. It does nothing if there is none.
func (c *Cloud) Stop(task, stopCode, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.tasks[task]; t != nil {
		t.stop(stopCode, reason)
	}
}

// StopAll does to all tasks that run what a person, a Spot interruption or the
// retirement of a host do.
func (c *Cloud) StopAll(stopCode, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.tasks {
		t.stop(stopCode, reason)
	}
}

// Close stops all tasks at once, and waits until they have. Calls are answered
// with an error from then on.
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

// now is AWS's clock.
func (c *Cloud) now() time.Time { return time.Now().Add(c.ClockOffset) }

// id returns a new hexadecimal number.
func (c *Cloud) id(digits int) string {
	c.serial++
	const odd = 0x9e3779b97f4a7c15 // so that they look like ids
	s := fmt.Sprintf("%016x%016x", uint64(c.serial)*odd, uint64(c.serial)*odd*odd)
	return s[:digits]
}

// An apiError is an answer that is not success.
type apiError struct {
	status        int
	code, message string
	ids           []string // of ConflictException
}

func (e *apiError) Error() string { return e.code + ": " + e.message }

func refuse(code, format string, args ...any) *apiError {
	return &apiError{400, code, fmt.Sprintf(format, args...), nil}
}

// ServeHTTP implements [http.Handler].
func (c *Cloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Date", c.now().UTC().Format(http.TimeFormat))
	if !c.serve(w, r) {
		// The reply is lost.
		if h, ok := w.(http.Hijacker); ok {
			if conn, _, err := h.Hijack(); err == nil {
				conn.Close()
				return
			}
		}
		panic(http.ErrAbortHandler)
	}
}

// HTTPClient returns a client whose requests are served in the goroutine that
// makes them.
func (c *Cloud) HTTPClient() aws.HTTPClient { return inMemory{c} }

type inMemory struct{ cloud *Cloud }

func (m inMemory) Do(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	w := httptest.NewRecorder()
	w.Header().Set("Date", m.cloud.now().UTC().Format(http.TimeFormat))
	answered := m.cloud.serve(w, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	if !answered {
		return nil, &url.Error{Op: r.Method, URL: r.URL.String(), Err: &lost{}}
	}
	return w.Result(), nil
}

// lost is how package net calls a connection that has broken.
type lost struct{}

func (*lost) Error() string   { return "read: connection reset by peer" }
func (*lost) Timeout() bool   { return false }
func (*lost) Temporary() bool { return true }

// serve answers a request, and returns false if the reply is to be lost.
func (c *Cloud) serve(w http.ResponseWriter, r *http.Request) bool {
	var body []byte
	var err error
	if r.Body != nil {
		body, err = io.ReadAll(io.LimitReader(r.Body, 1<<20))
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return true
	}
	proto, action, form, err := route(r, body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return true
	}
	service, name, _ := strings.Cut(action, ":")

	var in runTask
	if action == "ecs:RunTask" {
		json.Unmarshal(body, &in) // runTask complains
	}
	c.mu.Lock()
	c.counts[action]++
	call := Call{Action: action, N: c.counts[action], Time: time.Now(), Owner: owner(in.environment())}
	if action == "ecs:DescribeTasks" {
		call.Tasks = bytes.Count(body, []byte(":task/"))
	}
	c.calls = append(c.calls, call)
	index, decide := len(c.calls)-1, c.OnCall
	c.mu.Unlock()
	var fault Fault
	if decide != nil {
		fault = decide(call)
	}
	if fault.Delay > 0 {
		select {
		case <-time.After(fault.Delay):
		case <-r.Context().Done():
			return false
		}
	}

	var out []byte
	failed := c.authenticate(r, body, service)
	if failed == nil && fault.Status != 0 {
		failed = &apiError{fault.Status, fault.Code, fault.Message, nil}
	}
	if failed == nil {
		failed = c.throttle(action, in)
	}
	if failed == nil {
		failed = c.authorize(action, in, body, form)
	}
	if failed == nil {
		c.mu.Lock()
		switch {
		case c.closed:
			failed = &apiError{503, "ServiceUnavailable", "the cloud is closed", nil}
		case service == "ecs":
			out, failed = c.ecs(name, body)
		case service == "ec2":
			out, failed = c.ec2(name, form)
		case service == "sts":
			out, failed = c.sts(name)
		}
		c.mu.Unlock()
	}
	if failed != nil {
		c.mu.Lock()
		c.calls[index].Refused = failed.code
		c.mu.Unlock()
	}
	if fault.LoseReply {
		return false
	}
	proto.answer(w, out, failed)
	return true
}

// authorize is IAM.
func (c *Cloud) authorize(action string, in runTask, body []byte, form url.Values) *apiError {
	c.mu.Lock()
	defer c.mu.Unlock()
	missing, resource := "", "*"
	for _, n := range c.needs(action, in, body, form) {
		if c.denied[n.action] || c.Policy != nil && !c.Policy.allows(n) {
			missing, resource = n.action, n.resource
			break
		}
	}
	who := "User: arn:aws:iam::" + Account + ":user/gateway"
	switch {
	case missing == "" && strings.HasPrefix(action, "ec2:") && form.Get("DryRun") == "true":
		return &apiError{412, "DryRunOperation", "Request would have succeeded, but DryRun flag is set.", nil}
	case missing == "":
		return nil
	case strings.HasPrefix(missing, "ec2:"):
		return &apiError{403, "UnauthorizedOperation", "You are not authorized to perform this operation. " + who + " is not authorized to perform: " + missing + " on resource: " + resource + " because no identity-based policy allows the " + missing + " action", nil}
	case strings.HasPrefix(action, "sts:"):
		return &apiError{403, "AccessDenied", who + " is not authorized to perform: " + missing, nil}
	}
	return refuse("AccessDeniedException", "%s is not authorized to perform: %s on resource: %s because no identity-based policy allows the %s action", who, missing, resource, missing)
}

// A level is how full a bucket is.
type level struct {
	tokens float64
	at     time.Time
}

// throttle takes from the buckets. A call that is refused takes nothing.
func (c *Cloud) throttle(action string, in runTask) *apiError {
	type need struct {
		bucket string
		tokens float64
	}
	var needs []need
	switch action {
	case "ecs:RunTask":
		launch := "launch"
		if in.spot() {
			launch = "spot"
		}
		needs = []need{{"modify", 1}, {"run", 1}, {launch, float64(min(10, max(1, in.count())))}}
	case "ecs:StopTask":
		needs = []need{{"modify", 1}}
	case "ecs:DescribeTasks", "ecs:ListTasks":
		needs = []need{{"read", 1}}
	}
	if strings.HasPrefix(action, "ec2:") {
		needs = []need{{"ec2", 1}}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	var levels []*level
	for _, n := range needs {
		b, ok := c.Buckets[n.bucket]
		if !ok {
			levels = append(levels, &level{n.tokens, now})
			continue
		}
		l := c.levels[n.bucket]
		if l == nil {
			l = &level{b.Burst, now}
			c.levels[n.bucket] = l
		}
		l.tokens = min(b.Burst, l.tokens+b.Rate*now.Sub(l.at).Seconds())
		l.at = now
		if l.tokens < n.tokens {
			if n.bucket == "ec2" {
				return &apiError{ThrottledEC2.Status, ThrottledEC2.Code, ThrottledEC2.Message, nil}
			}
			return &apiError{Throttled.Status, Throttled.Code, Throttled.Message, nil}
		}
		levels = append(levels, l)
	}
	for i, l := range levels {
		l.tokens -= needs[i].tokens
	}
	return nil
}

// byAge returns tasks in the order of their creation.
func byAge(tasks map[string]*task) []*task {
	return slices.SortedFunc(maps.Values(tasks), func(a, b *task) int {
		return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.arn, b.arn))
	})
}

// keys returns those of a map, in order.
func keys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
