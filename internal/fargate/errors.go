package fargate

import (
	"errors"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"
	"github.com/aws/smithy-go"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// This file maps the errors of AWS to those of package bastion. AWS documents few of
// its texts, and uses the same one in errors, failures and stopped reasons, so one
// table serves them all.

// reasons are substrings of AWS's texts, in lower case, and their meanings; the first
// match counts.
var reasons = []struct {
	text string
	is   error
}{
	{"number of vcpus you can run concurrently", bastion.ErrQuota},
	{"number of tasks you can run concurrently", bastion.ErrQuota}, // in new accounts
	{"configuration is above your limit", bastion.ErrQuota},        // "The requested CPU configuration is ..."
	{"vcpu limit", bastion.ErrQuota},
	{"capacity is unavailable", bastion.ErrCapacity},
	{"capacity provider", bastion.ErrConfig}, // unknown, or not of this cluster
	{"spot task was interrupted", bastion.ErrCapacity},
	{"network interface", bastion.ErrPlatform}, // "Timeout waiting for network interface provisioning ..."
	{"ephemeralstorage provisioning", bastion.ErrPlatform},
	{"free addresses in subnet", bastion.ErrPlatform}, // another subnet may have some
	{"not enough ip", bastion.ErrPlatform},
	{"retrieve ecr registry auth", bastion.ErrImage}, // in "unable to pull secrets or registry auth: ..."
	{"pull registry auth from", bastion.ErrImage},    // the same, by later versions
	{"unable to pull secrets", bastion.ErrSecrets},
	{"secretsmanager", bastion.ErrSecrets},
	{"cannotpull", bastion.ErrImage}, // CannotPullContainerError, CannotPullImageManifestError, ...
	{"pull image", bastion.ErrImage},
	{"image manifest", bastion.ErrImage},
	{"ecr repository", bastion.ErrImage}, // "The task cannot pull 'x' from the Amazon ECR repository 'y'. ..."
	{"is not authorized to perform", bastion.ErrDenied},
	{"unable to assume", bastion.ErrDenied}, // a role
	{"does not exist", bastion.ErrConfig},   // "The subnet ID 'subnet-x' does not exist", "The specified log group does not exist."
	{"connection issue between the task and", bastion.ErrConfig},
	{"resourceinitializationerror", bastion.ErrPlatform},
	{"task definition", bastion.ErrConfig}, // "Unable to describe task definition."
	{"not found", bastion.ErrConfig},
}

// reasonOf returns the meaning of a text of AWS; nil if it is unknown.
func reasonOf(text string) error {
	text = strings.ToLower(text)
	for _, r := range reasons {
		if strings.Contains(text, r.text) {
			return r.is
		}
	}
	return nil
}

// unreachable are substrings, in lower case, of the texts of tasks that could not
// connect to the registry, or to another service that they need to start.
var unreachable = []string{
	"connection issue between the task and", "i/o timeout", "context deadline exceeded", "request canceled while waiting for connection",
	"send request failed", "request send failed", "no route to host", "network is unreachable",
}

// noRouteAdvice is for the operator.
const noRouteAdvice = "; the subnet seems to have no route there: it needs a NAT gateway, or VPC endpoints (ecr.api, ecr.dkr, s3, logs, secretsmanager or ssm), or to be public, with assign_public_ip; and the security group must let out TCP port 443"

// routeAdvice returns noRouteAdvice if a start failed because the task could not
// connect to a service.
func routeAdvice(reason error, text string) string {
	text = strings.ToLower(text)
	switch reason {
	case bastion.ErrImage, bastion.ErrSecrets, bastion.ErrConfig:
		for _, sign := range unreachable {
			if strings.Contains(text, sign) {
				return noRouteAdvice
			}
		}
	}
	return ""
}

// codes maps error codes for which the text does not matter.
var codes = map[string]error{
	"AccessDeniedException":                          bastion.ErrDenied,
	"AccessDenied":                                   bastion.ErrDenied,
	"UnauthorizedOperation":                          bastion.ErrDenied,
	"BlockedException":                               bastion.ErrDenied,
	"ExpiredTokenException":                          bastion.ErrDenied,
	"UnrecognizedClientException":                    bastion.ErrDenied,
	"InvalidClientTokenId":                           bastion.ErrDenied,
	"InvalidSignatureException":                      bastion.ErrDenied,
	"SignatureDoesNotMatch":                          bastion.ErrDenied,
	"AuthFailure":                                    bastion.ErrDenied,
	"SecurityGroupLimitExceeded":                     bastion.ErrQuota,
	"ClusterNotFoundException":                       bastion.ErrConfig,
	"PlatformUnknownException":                       bastion.ErrConfig,
	"UnsupportedFeatureException":                    bastion.ErrConfig,
	"PlatformTaskDefinitionIncompatibilityException": bastion.ErrConfig,
}

// classify wraps an error of the SDK in the error of package bastion that it means.
func classify(err error) error {
	var api smithy.APIError
	var reason error
	switch {
	case err == nil:
		return nil
	case throttled(err):
		reason = bastion.ErrBusy
	case errors.As(err, &api):
		if reason = codes[api.ErrorCode()]; reason == nil {
			reason = reasonOf(api.ErrorMessage())
		}
		if reason == nil && (api.ErrorCode() == "InvalidParameterException" || api.ErrorCode() == "ClientException") {
			reason = bastion.ErrConfig
		}
	case strings.Contains(err.Error(), "get credentials"), strings.Contains(err.Error(), "retrieve credentials"):
		reason = bastion.ErrDenied
	}
	if reason == nil || errors.Is(err, reason) { // classified before
		return err
	}
	return fmt.Errorf("%w: %w", reason, err)
}

// failureReason returns the reason why a successful RunTask started no task.
func failureReason(failures []types.Failure) error {
	if len(failures) == 0 {
		return errors.New("ECS started no task and gave no reason")
	}
	var errs []error
	for _, f := range failures {
		text := strings.TrimSpace(aws.ToString(f.Reason) + " " + aws.ToString(f.Detail))
		reason := reasonOf(text)
		if reason == nil && strings.HasPrefix(text, "RESOURCE") {
			reason = bastion.ErrCapacity
		}
		err := errors.New(text)
		if reason != nil {
			err = fmt.Errorf("%w: %s", reason, text)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// stopReason returns the reason why a task has stopped, or is stopping.
func stopReason(t types.Task) error {
	text := fmt.Sprintf("%s: %s", t.StopCode, aws.ToString(t.StoppedReason))
	for _, c := range t.Containers {
		if reason := aws.ToString(c.Reason); reason != "" {
			text += "; container " + aws.ToString(c.Name) + ": " + reason
		}
		if c.ExitCode != nil {
			text += fmt.Sprintf("; container %s exited with %d", aws.ToString(c.Name), *c.ExitCode)
		}
	}
	var reasons []error
	lower := strings.ToLower(text)
	switch {
	case strings.Contains(lower, "outofmemory"): // "OutOfMemoryError: Container killed due to memory usage", of the container
		reasons = append(reasons, bastion.ErrMemory)
	case t.StopCode == types.TaskStopCodeSpotInterruption, strings.Contains(lower, "spot task was interrupted"):
		// With ErrCapacity, a start is repeated in another subnet.
		reasons = append(reasons, bastion.ErrInterrupted, bastion.ErrCapacity)
	case t.StopCode == types.TaskStopCodeTerminationNotice, t.StopCode == types.TaskStopCodeInfrastructureHealth,
		strings.Contains(lower, "maintenance on the underlying infrastructure"): // the retirement of a host
		reasons = append(reasons, bastion.ErrMaintenance)
	case t.StopCode == types.TaskStopCodeTaskFailedToStart:
		if reason := reasonOf(text); reason != nil {
			reasons = append(reasons, reason)
			text += routeAdvice(reason, text)
		}
	case t.StopCode == types.TaskStopCodeUserInitiated:
		reasons = append(reasons, bastion.ErrStopped)
	}
	err := errors.New(text)
	for _, reason := range reasons {
		err = fmt.Errorf("%w: %w", reason, err)
	}
	return err
}

// conflictingTasks returns the tasks of an earlier request with the same token and
// other parameters, if err says that there was one.
func conflictingTasks(err error) ([]string, bool) {
	var c *types.ConflictException
	if errors.As(err, &c) {
		return c.ResourceIds, true
	}
	return nil, false
}

// notFound reports whether an error of StopTask says that there is no such task.
func notFound(err error) bool {
	var api smithy.APIError
	return errors.As(err, &api) && api.ErrorCode() == "InvalidParameterException" &&
		strings.Contains(api.ErrorMessage(), "task was not found")
}

var throttles = retry.IsErrorThrottles(retry.DefaultThrottles)

// throttled reports whether err is a throttling error of ECS, or of EC2, which ECS
// calls for the gateway. In the latter case ECS's own error is another, such as
// "InvalidParameterException: Error retrieving security group information for
// [sg-1]: Request limit exceeded. (ErrorCode: RequestLimitExceeded)".
func throttled(err error) bool {
	if throttles.IsErrorThrottle(err) == aws.TrueTernary {
		return true
	}
	var api smithy.APIError
	if !errors.As(err, &api) {
		return false
	}
	_, code, ok := strings.Cut(api.ErrorMessage(), "(ErrorCode: ")
	code, _, _ = strings.Cut(code, ")")
	_, throttle := retry.DefaultThrottleErrorCodes[strings.TrimPrefix(code, "Client.")]
	return ok && throttle
}

var retryables = retry.IsErrorRetryables(retry.DefaultRetryables)

// transient reports whether the same request may succeed later.
func transient(err error) bool {
	return retryables.IsErrorRetryable(err) == aws.TrueTernary || throttled(err)
}

// hasCode reports whether err is an error of AWS with that code.
func hasCode(err error, code string) bool {
	var api smithy.APIError
	return errors.As(err, &api) && api.ErrorCode() == code
}
