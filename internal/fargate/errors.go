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

// This file turns what AWS says into the reasons that package bastion has. AWS
// documents few of the texts, and says the same thing in different places, so
// each text is looked for in all of them.

// reasons are pieces of texts, lower case, and what they mean; the first that
// matches counts.
var reasons = []struct {
	text string
	is   error
}{
	{"number of vcpus you can run concurrently", bastion.ErrQuota},
	{"configuration is above your limit", bastion.ErrQuota}, // "The requested CPU configuration is ..."
	{"vcpu limit", bastion.ErrQuota},
	{"capacity is unavailable", bastion.ErrCapacity},
	{"capacity provider", bastion.ErrConfig}, // unknown, or not of this cluster
	{"spot task was interrupted", bastion.ErrCapacity},
	{"network interface", bastion.ErrPlatform}, // "Timeout waiting for network interface provisioning ..."
	{"ephemeralstorage provisioning", bastion.ErrPlatform},
	{"free addresses in subnet", bastion.ErrPlatform}, // another subnet may have some
	{"not enough ip", bastion.ErrPlatform},
	{"unable to pull secrets", bastion.ErrSecrets},
	{"secretsmanager", bastion.ErrSecrets},
	{"cannotpull", bastion.ErrImage}, // CannotPullContainerError, CannotPullImageManifestError, ...
	{"pull image", bastion.ErrImage},
	{"image manifest", bastion.ErrImage},
	{"is not authorized to perform", bastion.ErrDenied},
	{"unable to assume", bastion.ErrDenied}, // a role
	{"does not exist", bastion.ErrConfig},   // "The subnet ID 'subnet-x' does not exist", "The specified log group does not exist."
	{"resourceinitializationerror", bastion.ErrPlatform},
	{"task definition", bastion.ErrConfig}, // "Unable to describe task definition."
	{"not found", bastion.ErrConfig},
}

// meaning returns the reason a text gives; nil if it gives none that is known.
func meaning(text string) error {
	text = strings.ToLower(text)
	for _, r := range reasons {
		if strings.Contains(text, r.text) {
			return r.is
		}
	}
	return nil
}

// codes are those of errors, for which the text does not matter.
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

// classify adds to an error of the SDK the reason that it amounts to.
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
			reason = meaning(api.ErrorMessage())
		}
		if reason == nil && (api.ErrorCode() == "InvalidParameterException" || api.ErrorCode() == "ClientException") {
			reason = bastion.ErrConfig
		}
	case strings.Contains(err.Error(), "get credentials"), strings.Contains(err.Error(), "retrieve credentials"):
		reason = bastion.ErrDenied
	}
	if reason == nil || errors.Is(err, reason) { // said before
		return err
	}
	return fmt.Errorf("%w: %w", reason, err)
}

// failure is why a RunTask that succeeded started nothing.
func failure(failures []types.Failure) error {
	if len(failures) == 0 {
		return errors.New("ECS started nothing, and does not say why")
	}
	var errs []error
	for _, f := range failures {
		text := strings.TrimSpace(aws.ToString(f.Reason) + " " + aws.ToString(f.Detail))
		reason := meaning(text)
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

// stopped is why a task has ended, or is about to.
func stopped(t types.Task) error {
	text := fmt.Sprintf("%s: %s", t.StopCode, aws.ToString(t.StoppedReason))
	for _, c := range t.Containers {
		if reason := aws.ToString(c.Reason); reason != "" {
			text += "; container " + aws.ToString(c.Name) + ": " + reason
		}
		if c.ExitCode != nil {
			text += fmt.Sprintf("; container %s exited with %d", aws.ToString(c.Name), *c.ExitCode)
		}
	}
	var reason error
	switch t.StopCode {
	case types.TaskStopCodeSpotInterruption, types.TaskStopCodeTerminationNotice:
		reason = bastion.ErrCapacity
	case types.TaskStopCodeTaskFailedToStart:
		reason = meaning(text)
	}
	if reason == nil {
		return errors.New(text)
	}
	return fmt.Errorf("%w: %s", reason, text)
}

// conflict returns the tasks that an earlier request with the same token has
// started, if it had other parameters.
func conflict(err error) ([]string, bool) {
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

// throttled reports whether AWS says that it is asked too often.
func throttled(err error) bool { return throttles.IsErrorThrottle(err) == aws.TrueTernary }

var retryables = retry.IsErrorRetryables(retry.DefaultRetryables)

// transient reports whether the same request may succeed later.
func transient(err error) bool {
	return retryables.IsErrorRetryable(err) == aws.TrueTernary || throttled(err)
}
