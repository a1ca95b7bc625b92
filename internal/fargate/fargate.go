// Package fargate runs bastions as AWS Fargate tasks. It implements
// [bastion.Launcher].
//
// A bastion is one ECS task with one essential container, so the task ends when
// the agent in it exits. The agent's settings (owner, fleet keys, idle and maximum
// time) are environment variables in the overrides of RunTask. They are visible to
// everybody who may call DescribeTasks, and none is secret.
//
// # One task per generation
//
// The client token of a RunTask is a hash of cluster, deployment, owner and
// generation. The other parameters depend only on the configuration, on whether
// this is the second attempt of a start, which does not ask for Spot, and on whether
// the user has a task definition of her own. So every launch of a generation, by any
// gateway, gets the same task; if the parameters differ, ECS refuses with a conflict
// that names the task. ECS remembers a token
// until one hour after the end of its task, and for at most 24 hours ("Ensuring
// idempotency", Amazon ECS API Reference). It remembers failures, too. So a
// generation that has failed is used up, and the error wraps [bastion.ErrGone].
//
// # API calls
//
// A start is one RunTask, after one DescribeTaskDefinition if users may have task
// definitions of their own. All tasks that this process waits for share one
// DescribeTasks per second for each hundred of them. A login to a running bastion
// makes no call.
//
// # Failures
//
// ECS reports failures in three ways: an error, a list of failures in a successful
// answer, and a task that stops before it has run. Each becomes one of the errors
// of package bastion, see errors.go.
package fargate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go/middleware"
	"golang.org/x/crypto/ssh"
)

const (
	// agentPort is bastion-agent's default port.
	agentPort = 2022

	// maxReplays limits the generations of one owner that may have ended within
	// the time that ECS remembers them.
	maxReplays = 200
)

// A Cloud is shared by the launchers of one gateway: the clients of AWS, the rate
// of launches, the pollers, and the security groups. [NewCloud] makes one. It is
// safe for concurrent use.
type Cloud struct {
	// Log must be set before first use, if at all.
	Log *slog.Logger

	deployment string
	ecs        *ecs.Client
	run        *ecs.Client // for RunTask
	ec2        *ec2.Client
	sts        *sts.Client
	pace       *pace
	pollEvery  time.Duration // replaces the constant if not zero; tests in real time set it

	mu       sync.Mutex
	pollers  map[string]*poller // by cluster
	listings map[string]listing // by cluster
	groups   groups
}

// Load finds the Region and the credentials as all AWS tools do: environment,
// shared files, the role of the task or instance. Credentials are requested at
// their first use.
//
// If observed is not nil, it is called after each attempt of a call, with the names of
// service and operation in the SDK, such as ECS and RunTask. The result is "ok", "throttled",
// "canceled" (by the gateway) or "error". It must not block.
func Load(ctx context.Context, observed func(service, operation, result string)) (aws.Config, error) {
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return aws.Config{}, fmt.Errorf("loading the AWS configuration: %w", err)
	}
	if cfg.Region == "" {
		return aws.Config{}, errors.New("no AWS Region is configured; set AWS_REGION")
	}
	if observed != nil {
		cfg.APIOptions = append(cfg.APIOptions, observeAttempts(observed))
	}
	return cfg, nil
}

// NewCloud returns a Cloud that uses cfg; see [Load]. The deployment separates two
// installations in one account; it has letters, digits, "-" and "_".
func NewCloud(cfg aws.Config, deployment string) *Cloud {
	cfg.Retryer = func() aws.Retryer {
		return retry.NewStandard(func(o *retry.StandardOptions) {
			// By default, a client stops retrying after many failures. Here,
			// pace and breaker limit the calls.
			o.RateLimiter = ratelimit.None
		})
	}
	cfg.APIOptions = append(slices.Clip(cfg.APIOptions), limitAttempts)
	// The retries of a throttled RunTask are runTask's, since pace must observe
	// each one.
	run := cfg.Copy()
	run.Retryer = func() aws.Retryer {
		return retry.NewStandard(func(o *retry.StandardOptions) {
			o.RateLimiter = ratelimit.None
			o.Retryables = append([]retry.IsErrorRetryable{retry.IsErrorRetryableFunc(func(err error) aws.Ternary {
				if throttled(err) {
					return aws.FalseTernary
				}
				return aws.UnknownTernary
			})}, retry.DefaultRetryables...)
		})
	}
	return &Cloud{
		Log:        slog.New(slog.DiscardHandler),
		deployment: deployment,
		ecs:        ecs.NewFromConfig(cfg),
		run:        ecs.NewFromConfig(run),
		ec2:        ec2.NewFromConfig(cfg),
		sts:        sts.NewFromConfig(cfg),
		pace:       newPace(),
		pollers:    map[string]*poller{},
		listings:   map[string]listing{},
	}
}

// attemptTimeout limits each attempt of a call. AWS answers within a second or two;
// if not, another attempt is better than a longer wait, and all calls can be
// repeated.
const attemptTimeout = 10 * time.Second

// limitAttempts adds attemptTimeout to the SDK's middleware. By itself, the SDK limits
// only the time to connect.
func limitAttempts(stack *middleware.Stack) error {
	return stack.Finalize.Insert(middleware.FinalizeMiddlewareFunc("LimitAttempts",
		func(ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler) (middleware.FinalizeOutput, middleware.Metadata, error) {
			bounded, cancel := context.WithTimeout(ctx, attemptTimeout)
			defer cancel()
			out, metadata, err := next.HandleFinalize(bounded, in)
			if err != nil && bounded.Err() != nil && ctx.Err() == nil {
				err = errNoAnswer{}
			}
			return out, metadata, err
		}), "Retry", middleware.After)
}

// errNoAnswer is a network timeout to the SDK's retryer.
type errNoAnswer struct{}

func (errNoAnswer) Error() string { return fmt.Sprintf("no answer within %v", attemptTimeout) }

func (errNoAnswer) Timeout() bool { return true }

// A Launcher runs the bastions of one profile. Set the fields before first use.
type Launcher struct {
	Cloud *Cloud
	// Profile is the name of the profile.
	Profile string
	// FleetKeys are the public keys of the CA whose certificates agents accept.
	FleetKeys []ssh.PublicKey

	Options
	// MaxSessions limits the open sessions of one connection, and MaxChannels
	// its open channels of all kinds; zero means the agent's default.
	MaxSessions, MaxChannels int

	breaker breaker
	vpc     vpc // of the subnets; for Isolate
}

// Options are the settings of a profile on Fargate. Package config reads them from
// the configuration file, where they have the same names in snake_case. Region and
// credentials come from the environment and files that all AWS tools use.
type Options struct {
	// Cluster is the name or ARN of the ECS cluster.
	Cluster string
	// TaskDefinition is "family:revision" or its ARN. It should have a
	// revision: without one, the next to be registered is used at once.
	TaskDefinition string
	// UserTaskDefinitions, if not empty, permits users to have task definitions
	// of their own. It is the pattern of their families: "%u" in it, which is
	// not its beginning, stands for the user's name. See [Launcher.family].
	UserTaskDefinitions string
	// Container is the name of the agent's container in the task definition.
	Container string
	// Account is the account, in the image, that sessions run as. They are in
	// these Groups of the image, too.
	Account string
	Groups  []string
	// Subnets of bastions, at most 16. Each generation of a bastion is launched
	// in the next one. If neighbours in the list are in different zones, a lack
	// of capacity in one zone is thus followed by an attempt in another.
	Subnets []string
	// SecurityGroups of every bastion, at most five, with Isolate at most four.
	// If empty, bastions have the default group of the VPC.
	SecurityGroups []string
	// AssignPublicIP gives each bastion a public address, which it needs to
	// reach the internet from a public subnet. With ConnectPublic, the gateway
	// connects to the public address instead of the private one.
	AssignPublicIP, ConnectPublic bool
	// Spot asks for Fargate Spot first, and for on-demand capacity if Spot has
	// none.
	Spot bool
	// CPU (units of 1/1024 vCPU), Memory (MiB), EphemeralStorage (GiB) and
	// TaskRole (an ARN) override the task definition if not zero.
	CPU, Memory, EphemeralStorage int
	TaskRole                      string
	// PlatformVersion is that of Fargate; empty means LATEST.
	PlatformVersion string
	// Isolate, if not nil, gives each owner a security group.
	Isolate *Isolation
	// AcceptEnv are patterns of the environment variables clients may set;
	// empty means none.
	AcceptEnv []string
}
