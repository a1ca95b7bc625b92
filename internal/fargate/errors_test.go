package fargate

import (
	"errors"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"
	"github.com/aws/smithy-go"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// TestClassify has an error of each kind that AWS documents or has returned.
func TestClassify(t *testing.T) {
	tests := []struct {
		code, text string
		want       error // nil: none of the known reasons
	}{
		{"AccessDeniedException", "User: arn:aws:sts::123456789012:assumed-role/gateway/i-1 is not authorized to perform: ecs:RunTask on resource: arn:aws:ecs:eu-west-1:123456789012:task-definition/bastion:1 because no identity-based policy allows the ecs:RunTask action", bastion.ErrDenied},
		{"AccessDeniedException", "User: arn:aws:sts::123456789012:assumed-role/gateway/i-1 is not authorized to perform: iam:PassRole on resource: arn:aws:iam::123456789012:role/task", bastion.ErrDenied},
		{"ClientException", "ECS was unable to assume the role 'arn:aws:iam::123456789012:role/task' that was provided for this task.", bastion.ErrDenied},
		{"UnauthorizedOperation", "You are not authorized to perform this operation.", bastion.ErrDenied},
		{"BlockedException", "Your AWS account has been blocked.", bastion.ErrDenied},
		{"ExpiredTokenException", "The security token included in the request is expired", bastion.ErrDenied},
		{"UnrecognizedClientException", "The security token included in the request is invalid.", bastion.ErrDenied},
		{"ClusterNotFoundException", "Cluster not found.", bastion.ErrConfig},
		{"ClientException", "Unable to describe task definition.", bastion.ErrConfig},
		{"InvalidParameterException", "TaskDefinition is inactive", bastion.ErrConfig},
		{"InvalidParameterException", "Error retrieving subnet information for [subnet-1]: The subnet ID 'subnet-1' does not exist (ErrorCode: InvalidSubnetID.NotFound)", bastion.ErrConfig},
		{"InvalidParameterException", "Error retrieving security group information for [sg-1]: The security group 'sg-1' does not exist (ErrorCode: InvalidGroup.NotFound)", bastion.ErrConfig},
		{"InvalidParameterException", "The specified capacity provider 'FARGATE_SPOT' was not found.", bastion.ErrConfig},
		{"PlatformUnknownException", "The specified platform version does not exist.", bastion.ErrConfig},
		{"PlatformTaskDefinitionIncompatibilityException", "The specified platform version does not satisfy the task definition’s required capabilities.", bastion.ErrConfig},
		{"ClientException", "You've reached the limit on the number of vCPUs you can run concurrently", bastion.ErrQuota},
		{"ThrottlingException", "Rate exceeded", bastion.ErrBusy},
		{"RequestLimitExceeded", "Request limit exceeded.", bastion.ErrBusy},
		{"SecurityGroupLimitExceeded", "The maximum number of security groups for VPC 'vpc-1' has been reached.", bastion.ErrQuota},
		{"InvalidParameterException", "Error retrieving security group information for [sg-1]: Request limit exceeded. (ErrorCode: RequestLimitExceeded)", bastion.ErrBusy},
		{"InvalidParameterException", "Error retrieving subnet information for [subnet-1]: Request limit exceeded. (ErrorCode: Client.RequestLimitExceeded)", bastion.ErrBusy},
		{"ClientException", "You've reached the limit on the number of tasks you can run concurrently", bastion.ErrQuota},
		{"ServerException", "Service Unavailable. Please try again later.", nil},
	}
	for _, tt := range tests {
		err := error(&smithy.GenericAPIError{Code: tt.code, Message: tt.text})
		got := classify(err)
		if !errors.Is(got, err) {
			t.Errorf("%s: the error is lost: %v", tt.code, got)
		}
		checkReason(t, tt.code+": "+tt.text, got, tt.want)
	}
	if classify(nil) != nil {
		t.Error("nil is an error")
	}
}

var allReasons = []error{bastion.ErrCapacity, bastion.ErrQuota, bastion.ErrBusy, bastion.ErrPlatform, bastion.ErrImage,
	bastion.ErrSecrets, bastion.ErrDenied, bastion.ErrConfig, bastion.ErrMemory, bastion.ErrMaintenance, bastion.ErrStopped}

func checkReason(t *testing.T, of string, got, want error) {
	t.Helper()
	for _, reason := range allReasons {
		if errors.Is(got, reason) != (reason == want) {
			t.Errorf("%s\n got %v\nwant %v", of, got, want)
			return
		}
	}
}

func TestFailure(t *testing.T) {
	for reason, want := range map[string]error{
		"Capacity is unavailable at this time. Please try again later or in a different availability zone": bastion.ErrCapacity,
		"The requested CPU configuration is above your limit":                                              bastion.ErrQuota,
		"You've reached the limit on the number of vCPUs you can run concurrently":                         bastion.ErrQuota,
		"You've reached the limit on the number of tasks you can run concurrently":                         bastion.ErrQuota,
		"RESOURCE:ENI":  bastion.ErrCapacity,
		"something new": nil,
	} {
		checkReason(t, reason, failureReason([]types.Failure{{Reason: aws.String(reason)}}), want)
	}
	checkReason(t, "nothing", failureReason(nil), nil)
}

func TestStopped(t *testing.T) {
	tests := []struct {
		code         types.TaskStopCode
		reason, more string
		want         error
	}{
		{types.TaskStopCodeTaskFailedToStart, "Timeout waiting for network interface provisioning to complete.", "", bastion.ErrPlatform},
		{types.TaskStopCodeTaskFailedToStart, "Timeout waiting for EphemeralStorage provisioning to complete.", "", bastion.ErrPlatform},
		{types.TaskStopCodeTaskFailedToStart, "CannotPullContainerError: pull image manifest has been retried 5 time(s): failed to resolve ref docker.io/x/y:latest", "", bastion.ErrImage},
		{types.TaskStopCodeTaskFailedToStart, "Task failed to start", "CannotPullContainerError: inspect image has been retried 1 time(s)", bastion.ErrImage},
		{types.TaskStopCodeTaskFailedToStart, "ResourceInitializationError: unable to pull secrets or registry auth: execution resource retrieval failed", "", bastion.ErrSecrets},
		{types.TaskStopCodeTaskFailedToStart, "ResourceInitializationError: failed to invoke EFS utils", "", bastion.ErrPlatform},
		{types.TaskStopCodeTaskFailedToStart, "ResourceInitializationError: failed to validate logger args: create stream has been retried 1 times: failed to create Cloudwatch log stream: ResourceNotFoundException: The specified log group does not exist. : exit status 1", "", bastion.ErrConfig},
		{types.TaskStopCodeTaskFailedToStart, "ResourceInitializationError: failed to validate logger args: AccessDeniedException: User: arn:aws:sts::123456789012:assumed-role/execution/1 is not authorized to perform: logs:CreateLogStream on resource: arn:aws:logs:eu-west-1:123456789012:log-group:/sallyport/bastions", "", bastion.ErrDenied},
		{types.TaskStopCodeTaskFailedToStart, "Unexpected EC2 error while attempting to Create Network Interface in subnet 'subnet-1': InsufficientFreeAddressesInSubnet", "", bastion.ErrPlatform},
		{types.TaskStopCodeTaskFailedToStart, "ResourceInitializationError: unable to pull secrets or registry auth: execution resource retrieval failed: unable to retrieve ecr registry auth: service call has been retried 3 time(s): RequestError: send request failed caused by: Post https://api.ecr.eu-west-1.amazonaws.com/: dial tcp 52.46.145.142:443: i/o timeout", "", bastion.ErrImage},
		{types.TaskStopCodeTaskFailedToStart, "ResourceInitializationError: unable to pull secrets or registry auth: The task cannot pull registry auth from Amazon ECR: There is a connection issue between the task and Amazon ECR. Check your task network configuration.", "", bastion.ErrImage},
		{types.TaskStopCodeTaskFailedToStart, "CannotPullContainerError: The task cannot pull 'x:1' from the Amazon ECR repository 'x'. There is a connection issue between the task and Amazon ECR. Check your task network configuration.", "", bastion.ErrImage},
		{types.TaskStopCodeTaskFailedToStart, "ResourceInitializationError: unable to pull secrets or registry auth: unable to retrieve secret from asm: There is a connection issue between the task and AWS Secrets Manager. Check your task network configuration.", "", bastion.ErrSecrets},
		{types.TaskStopCodeTaskFailedToStart, "ResourceInitializationError: failed to validate logger args: The task cannot find the Amazon CloudWatch log group defined in the task definition. There is a connection issue between the task and Amazon CloudWatch. Check your network configuration.", "", bastion.ErrConfig},
		{types.TaskStopCodeEssentialContainerExited, "Essential container in task exited", "OutOfMemoryError: Container killed due to memory usage", bastion.ErrMemory},
		{types.TaskStopCodeTerminationNotice, "ECS is performing maintenance on the underlying infrastructure hosting the task.", "", bastion.ErrMaintenance},
		{types.TaskStopCodeServiceSchedulerInitiated, "ECS is performing maintenance on the underlying infrastructure hosting the task", "", bastion.ErrMaintenance},
		{types.TaskStopCodeInfrastructureHealth, "", "", bastion.ErrMaintenance},
		{types.TaskStopCodeTerminationNotice, "Your Spot Task was interrupted.", "", bastion.ErrCapacity},
		{types.TaskStopCodeSpotInterruption, "Your Spot Task was interrupted.", "", bastion.ErrCapacity},
		{types.TaskStopCodeEssentialContainerExited, "Essential container in task exited", "", nil},
		{types.TaskStopCodeUserInitiated, "stopped by hand, secretsmanager and all", "", bastion.ErrStopped},
	}
	for _, tt := range tests {
		task := types.Task{StopCode: tt.code, StoppedReason: aws.String(tt.reason)}
		if tt.more != "" {
			task.Containers = []types.Container{{Name: aws.String("bastion"), Reason: aws.String(tt.more)}}
		}
		got := stopReason(task)
		checkReason(t, tt.reason+tt.more, got, tt.want)
		noRoute := strings.Contains(tt.reason+tt.more, "connection issue") || strings.Contains(tt.reason, "i/o timeout")
		if strings.Contains(got.Error(), "no route") != noRoute {
			t.Errorf("the hint is wrong: %v", got)
		}
	}
}
