package fargate

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/aws/smithy-go"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

func TestResult(t *testing.T) {
	api := func(f awsfake.Fault) error {
		return fmt.Errorf("operation error: %w", &smithy.GenericAPIError{Code: f.Code, Message: f.Message})
	}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{nil, "ok"},
		{api(awsfake.Fault{Code: "ConditionalCheckFailedException", Message: "The conditional request failed"}), "ok"},
		{api(awsfake.Throttled), "throttled"},
		{api(awsfake.ThrottledInside), "throttled"},
		{api(awsfake.ThrottledEC2), "throttled"},
		{api(awsfake.Broken), "error"},
		{errNoAnswer{}, "error"},
		{context.DeadlineExceeded, "error"},
		{fmt.Errorf("sending: %w", context.Canceled), "canceled"},
		{errors.New("no route to host"), "error"},
	} {
		if got := result(tt.err); got != tt.want {
			t.Errorf("%v: %s, want %s", tt.err, got, tt.want)
		}
	}
}
