// Package ecstask protects the task of Amazon ECS in which this process runs from
// being stopped by its service, for a deployment or because the service gets smaller
// ("Amazon ECS task scale-in protection endpoint", Developer Guide).
//
// # Permissions
//
// The role of the task needs ecs:UpdateTaskProtection: the endpoint calls it.
package ecstask

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

const (
	// Shortest and Longest are the limits of the duration of a protection.
	Shortest = time.Minute
	Longest  = 48 * time.Hour

	timeout     = 5 * time.Second
	maxResponse = 16 << 10
)

// ErrBlocked is the error if a deployment of the service already waits for protected
// tasks. A protection that was set before continues until it expires.
var ErrBlocked = errors.New("a deployment waits for protected tasks (DEPLOYMENT_BLOCKED)")

// Protect protects the task for a time from now on, or with zero ends its protection.
// The time is rounded up to minutes. agent is the value of the variable ECS_AGENT_URI,
// with which ECS starts containers.
func Protect(ctx context.Context, agent string, d time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	request := map[string]any{"ProtectionEnabled": d > 0}
	if d > 0 {
		request["ExpiresInMinutes"] = (d + time.Minute - 1) / time.Minute
	}
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, agent+"/task-protection/v1/state", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse))
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	var answer struct {
		Protection *struct{ ProtectionEnabled bool } `json:"protection"`
		Failure    *struct{ Reason, Detail string }  `json:"failure"`
		Error      *struct{ Code, Message string }   `json:"error"`
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return fmt.Errorf("the answer, with status %d, is not JSON: %w", resp.StatusCode, err)
	}
	switch {
	case answer.Failure != nil && answer.Failure.Reason == "DEPLOYMENT_BLOCKED":
		return ErrBlocked
	case answer.Failure != nil:
		return fmt.Errorf("%s: %q", answer.Failure.Reason, answer.Failure.Detail)
	case answer.Error != nil:
		return fmt.Errorf("%s: %q", answer.Error.Code, answer.Error.Message)
	case answer.Protection == nil || answer.Protection.ProtectionEnabled != (d > 0):
		return fmt.Errorf("the answer, with status %d, does not have the protection that was requested", resp.StatusCode)
	}
	return nil
}
