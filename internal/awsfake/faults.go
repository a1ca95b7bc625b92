package awsfake

import (
	"math/rand/v2"
	"sync"
	"time"
)

// Times are the durations of the states of a task (Amazon ECS task lifecycle,
// Developer Guide). Each function is called once for each task; nil means zero.
type Times struct {
	// Provisioning ends with the attachment of the network interface, Pending
	// with the pull of the image, Activating with the start of the container.
	Provisioning, Pending, Activating func() time.Duration
	// Reporting is the time from then until DescribeTasks reports RUNNING.
	Reporting func() time.Duration
	// Deactivating is the time from StopTask to SIGTERM.
	Deactivating func() time.Duration
	// Deprovisioning is the time from the end of the container until the network
	// interface is deleted and the task STOPPED.
	Deprovisioning func() time.Duration
}

// Fixed returns a function that returns d.
func Fixed(d time.Duration) func() time.Duration { return func() time.Duration { return d } }

// Between returns a function that returns random durations from least to most.
func Between(rng *rand.Rand, least, most time.Duration) func() time.Duration {
	var mu sync.Mutex
	return func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return least + time.Duration(rng.Int64N(int64(most-least)+1))
	}
}

// A Call is one request, as OnCall sees it.
type Call struct {
	Action string // as in IAM: "ecs:RunTask"
	// N counts the calls of this action from 1, retries included.
	N    int
	Time time.Time
	// Owner is the owner of the task, for RunTask.
	Owner string
	// Refused is the error code of the answer; empty means success.
	Refused string
	Tasks   int // number of tasks, for DescribeTasks
}

// A Fault is injected into a call. The zero Fault does nothing.
type Fault struct {
	// Status and Code, if set, are the answer, and the request is not carried
	// out.
	Status        int
	Code, Message string
	// LoseReply carries the request out and then breaks the connection. With a
	// Code, it only breaks the connection.
	LoseReply bool
	// Delay comes first. If the caller has gone by its end, the request is not
	// carried out.
	Delay time.Duration
}

// Faults of AWS.
var (
	Throttled   = Fault{Status: 400, Code: "ThrottlingException", Message: "Rate exceeded"}
	Unavailable = Fault{Status: 503, Code: "ServiceUnavailableException", Message: "Service Unavailable. Please try again later."}
	Broken      = Fault{Status: 500, Code: "ServerException", Message: "Internal server error"}
	// ThrottledInside is RunTask's error if its own call of EC2 is throttled
	// (dask-cloudprovider, issue 56).
	ThrottledInside = Fault{Status: 400, Code: "InvalidParameterException", Message: "Error retrieving security group information for [" + SecurityGroup + "]: Request limit exceeded. (ErrorCode: RequestLimitExceeded)"}
	// ThrottledEC2 is EC2's own error.
	ThrottledEC2 = Fault{Status: 503, Code: "RequestLimitExceeded", Message: "Request limit exceeded."}
)

// A Fate is the outcome of a launch. The zero Fate is a running task.
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
	// NoAddress keeps it in PROVISIONING.
	NoAddress bool
}

// Texts of ECS, for Fates.
const (
	NoCapacity = "Capacity is unavailable at this time. Please try again later or in a different availability zone"
	NoVCPU     = "You've reached the limit on the number of vCPUs you can run concurrently"
	NoTasks    = "You've reached the limit on the number of tasks you can run concurrently"
	NoRoute    = "ResourceInitializationError: unable to pull secrets or registry auth: The task cannot pull registry auth from Amazon ECR: There is a connection issue between the task and Amazon ECR. Check your task network configuration. RequestError: send request failed caused by: Post \"https://api.ecr.eu-west-1.amazonaws.com/\": dial tcp 10.0.3.4:443: i/o timeout"
	NoENI      = "Timeout waiting for network interface provisioning to complete."
	NoImage    = "CannotPullContainerError: pull image manifest has been retried 5 time(s): failed to resolve ref"
	NoStorage  = "Timeout waiting for EphemeralStorage provisioning to complete."
	SpotTaken  = "Your Spot Task was interrupted."
	Retired    = "ECS is performing maintenance on the underlying infrastructure hosting the task."
	NoLogGroup = "ResourceInitializationError: failed to validate logger args: create stream has been retried 1 times: failed to create Cloudwatch log stream: ResourceNotFoundException: The specified log group does not exist. : exit status 1"
	NoSecrets  = "ResourceInitializationError: unable to pull secrets or registry auth: execution resource retrieval failed"
)

// A Launch is an accepted RunTask, as OnLaunch sees it.
type Launch struct {
	N      int    // counts them from 1
	Owner  string // user+profile, by its environment
	Subnet string
	Spot   bool
}
