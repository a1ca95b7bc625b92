package awsfake

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
)

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

// DocumentedRunTask is a limit of RunTask calls, in another place of the Developer
// Guide, for the bucket "run". With it, only calls that start several tasks each can
// use the burst of launches.
var DocumentedRunTask = Bucket{20, 20}

// An apiError is an error response.
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

// lost is the error of a broken connection, as in package net.
type lost struct{}

func (*lost) Error() string { return "read: connection reset by peer" }

func (*lost) Timeout() bool { return false }

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

// authorize checks the caller's permissions, as IAM does.
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

// A level is the number of tokens in a bucket.
type level struct {
	tokens float64
	at     time.Time
}

// throttle takes tokens from the buckets. A throttled call takes none.
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
