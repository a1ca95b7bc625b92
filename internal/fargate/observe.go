package fargate

import (
	"context"
	"errors"

	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/smithy-go/middleware"
)

// observeAttempts returns an option of clients that has observed called after each attempt
// of a call; see [Load].
func observeAttempts(observed func(service, operation, result string)) func(*middleware.Stack) error {
	return func(stack *middleware.Stack) error {
		return stack.Finalize.Insert(middleware.FinalizeMiddlewareFunc("Observe",
			func(ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler) (middleware.FinalizeOutput, middleware.Metadata, error) {
				out, metadata, err := next.HandleFinalize(ctx, in)
				observed(awsmiddleware.GetServiceID(ctx), awsmiddleware.GetOperationName(ctx), result(err))
				return out, metadata, err
			}), "Retry", middleware.After)
	}
}

func result(err error) string {
	switch {
	case err == nil, hasCode(err, "ConditionalCheckFailedException"): // an answer of DynamoDB like any other
		return "ok"
	case throttled(err):
		return "throttled"
	case errors.Is(err, context.Canceled):
		return "canceled"
	}
	return "error"
}
