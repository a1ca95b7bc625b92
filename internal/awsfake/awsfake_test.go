package awsfake

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	ecstypes "github.com/aws/aws-sdk-go-v2/service/ecs/types"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"
)

// idle is a container that waits to be stopped, and obeys only if polite.
type idle struct {
	polite bool
	exited chan struct{}
	once   sync.Once
	code   int
}

func (i *idle) Start(_, _ string, _ map[string]string) (Container, error) {
	return &idle{polite: i.polite, exited: make(chan struct{})}, nil
}

func (i *idle) Stop(kill bool) {
	if !kill && !i.polite {
		return
	}
	i.once.Do(func() {
		if kill {
			i.code = 137
		}
		close(i.exited)
	})
}
func (i *idle) Exited() <-chan struct{} { return i.exited }
func (i *idle) ExitCode() int           { return i.code }

// account is a Cloud in a bubble, with the SDK's clients, which do not retry.
type account struct {
	*Cloud
	t   *testing.T
	ecs *ecs.Client
	ec2 *ec2.Client
}

func inAccount(t *testing.T, test func(t *testing.T, a *account)) {
	synctest.Test(t, func(t *testing.T) {
		c := New(&idle{polite: true})
		defer c.Close()
		cfg := c.Config()
		cfg.Retryer = func() aws.Retryer { return aws.NopRetryer{} }
		test(t, &account{c, t, ecs.NewFromConfig(cfg), ec2.NewFromConfig(cfg)})
	})
}

// request is a RunTask; owner and token may be empty.
func request(owner, token string) *ecs.RunTaskInput {
	in := &ecs.RunTaskInput{
		Cluster: aws.String(Cluster), TaskDefinition: aws.String(TaskDefinition), LaunchType: ecstypes.LaunchTypeFargate,
		NetworkConfiguration: &ecstypes.NetworkConfiguration{AwsvpcConfiguration: &ecstypes.AwsVpcConfiguration{Subnets: Subnets}},
		StartedBy:            aws.String("test"),
	}
	if token != "" {
		in.ClientToken = aws.String(token)
	}
	if owner != "" {
		in.Overrides = &ecstypes.TaskOverride{ContainerOverrides: []ecstypes.ContainerOverride{{Name: aws.String("bastion"),
			Environment: []ecstypes.KeyValuePair{{Name: aws.String("SALLYPORT_OWNER"), Value: &owner}, {Name: aws.String("SALLYPORT_PROFILE"), Value: aws.String("default")}}}}}
		in.Tags = []ecstypes.Tag{{Key: aws.String("sallyport:user"), Value: &owner}, {Key: aws.String("sallyport:profile"), Value: aws.String("default")}}
	}
	return in
}

func (a *account) run(in *ecs.RunTaskInput) string {
	a.t.Helper()
	out, err := a.ecs.RunTask(a.t.Context(), in)
	if err != nil || len(out.Tasks) != 1 {
		a.t.Fatal(out, err)
	}
	return *out.Tasks[0].TaskArn
}

func (a *account) describe(task string) (*ecstypes.Task, string) {
	a.t.Helper()
	out, err := a.ecs.DescribeTasks(a.t.Context(), &ecs.DescribeTasksInput{Cluster: aws.String(Cluster), Tasks: []string{task}, Include: []ecstypes.TaskField{ecstypes.TaskFieldTags}})
	if err != nil {
		a.t.Fatal(err)
	}
	if len(out.Failures) > 0 {
		return nil, *out.Failures[0].Reason
	}
	return &out.Tasks[0], *out.Tasks[0].LastStatus
}

func (a *account) list(in ecs.ListTasksInput) []string {
	a.t.Helper()
	in.Cluster = aws.String(Cluster)
	out, err := a.ecs.ListTasks(a.t.Context(), &in)
	if err != nil {
		a.t.Fatal(err)
	}
	return out.TaskArns
}

func code(err error) string {
	var e smithy.APIError
	if errors.As(err, &e) {
		return e.ErrorCode()
	}
	return ""
}

// TestLife is the life of a task as the Developer Guide tells it ("Amazon ECS
// task lifecycle").
func TestLife(t *testing.T) {
	inAccount(t, func(t *testing.T, a *account) {
		second := Fixed(time.Second)
		a.Times = Times{second, second, second, second, second, second}
		a.MissingFor = 500 * time.Millisecond
		task := a.run(request("alice", ""))
		var states []string
		see := func(f func(*ecstypes.Task)) {
			t.Helper()
			got, state := a.describe(task)
			if len(states) == 0 || states[len(states)-1] != state {
				states = append(states, state)
			}
			if got != nil && f != nil {
				f(got)
			}
		}
		address := func(got *ecstypes.Task) bool {
			return len(got.Attachments) > 0 && slices.ContainsFunc(got.Attachments[0].Details, func(d ecstypes.KeyValuePair) bool { return aws.ToString(d.Name) == "privateIPv4Address" })
		}
		see(nil)
		for range 8 {
			time.Sleep(501 * time.Millisecond)
			see(func(got *ecstypes.Task) {
				if want := *got.LastStatus != "PROVISIONING"; address(got) != want {
					t.Errorf("in %s it has an address: %v", *got.LastStatus, !want)
				}
			})
		}
		if _, err := a.ecs.StopTask(t.Context(), &ecs.StopTaskInput{Cluster: aws.String(Cluster), Task: &task, Reason: aws.String("enough")}); err != nil {
			t.Fatal(err)
		}
		for range 7 {
			see(func(got *ecstypes.Task) {
				if len(got.Tags) > 0 {
					t.Error("the tags are still there after StopTask")
				}
			})
			time.Sleep(501 * time.Millisecond)
		}
		see(func(got *ecstypes.Task) {
			if got.StopCode != "UserInitiated" || aws.ToString(got.StoppedReason) != "enough" || got.Containers[0].ExitCode == nil {
				t.Errorf("stopped: %s, %q, %+v", got.StopCode, aws.ToString(got.StoppedReason), got.Containers[0])
			}
		})
		if want := []string{"MISSING", "PROVISIONING", "PENDING", "ACTIVATING", "RUNNING", "DEACTIVATING", "DEPROVISIONING", "STOPPED"}; !slices.Equal(states, want) {
			t.Errorf("states %v, want %v", states, want)
		}
		time.Sleep(2 * time.Hour)
		if _, state := a.describe(task); state != "MISSING" {
			t.Errorf("two hours later it is %s", state)
		}
	})
}

// TestStopTimeout: a container that ignores SIGTERM is killed.
func TestStopTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(&idle{})
		defer c.Close()
		a := &account{c, t, ecs.NewFromConfig(c.Config()), nil}
		task := a.run(request("", ""))
		synctest.Wait()
		c.Stop(task, "SpotInterruption", SpotTaken)
		time.Sleep(29 * time.Second)
		if _, state := a.describe(task); state != "STOPPING" {
			t.Error(state)
		}
		time.Sleep(2 * time.Second)
		got, state := a.describe(task)
		if state != "STOPPED" || *got.Containers[0].ExitCode != 137 || got.StopCode != "SpotInterruption" {
			t.Errorf("%s: %+v", state, got)
		}
	})
}

// TestToken is "Ensuring idempotency" of the API Reference.
func TestToken(t *testing.T) {
	inAccount(t, func(t *testing.T, a *account) {
		first := a.run(request("alice", "one"))
		if again := a.run(request("alice", "one")); again != first {
			t.Error("the same request started another task")
		}
		other := request("alice", "one")
		other.StartedBy = aws.String("somebody-else")
		_, err := a.ecs.RunTask(t.Context(), other)
		var conflict *ecstypes.ConflictException
		if !errors.As(err, &conflict) || !slices.Equal(conflict.ResourceIds, []string{first}) {
			t.Errorf("another request with its token: %v", err)
		}
		if a.run(request("bob", "two")) == first {
			t.Error("another token led to the same task")
		}

		// The token returns a stopped task until an hour later.
		a.Stop(first, "UserInitiated", "")
		time.Sleep(30 * time.Minute)
		if a.run(request("alice", "one")) != first {
			t.Error("half an hour after its end the token is forgotten")
		}
		time.Sleep(31 * time.Minute)
		if a.run(request("alice", "one")) == first {
			t.Error("an hour after its end it is not")
		}

		// A failed launch fails again, also after a change.
		a.Set(func() { a.OnLaunch = func(Launch) Fate { return Fate{Failure: NoCapacity} } })
		failed := func() {
			t.Helper()
			out, err := a.ecs.RunTask(t.Context(), request("carol", "three"))
			if err != nil || len(out.Tasks) != 0 || len(out.Failures) != 1 || *out.Failures[0].Reason != NoCapacity {
				t.Errorf("%+v, %v", out, err)
			}
		}
		failed()
		a.Set(func() { a.OnLaunch = nil })
		failed()
	})
}

// TestListTasks: lag, duplicates, and filters that exclude each other.
func TestListTasks(t *testing.T) {
	inAccount(t, func(t *testing.T, a *account) {
		a.Set(func() { a.ListLag = 3 * time.Second })
		task := a.run(request("", ""))
		if got := a.list(ecs.ListTasksInput{}); len(got) != 0 {
			t.Errorf("at once: %v", got)
		}
		time.Sleep(3 * time.Second)
		if got := a.list(ecs.ListTasksInput{StartedBy: aws.String("test")}); !slices.Equal(got, []string{task}) {
			t.Errorf("3 s later: %v", got)
		}
		if got := a.list(ecs.ListTasksInput{StartedBy: aws.String("other")}); len(got) != 0 {
			t.Errorf("of another: %v", got)
		}
		_, err := a.ecs.ListTasks(t.Context(), &ecs.ListTasksInput{Cluster: aws.String(Cluster), StartedBy: aws.String("test"), Family: aws.String("sallyport-bastion")})
		if code(err) != "InvalidParameterException" {
			t.Errorf("startedBy and family: %v", err)
		}
		a.Set(func() { a.Duplicates = true })
		if got := a.list(ecs.ListTasksInput{}); !slices.Equal(got, []string{task, task}) {
			t.Errorf("with duplicates: %v", got)
		}
		a.Stop(task, "UserInitiated", "")
		if got := a.list(ecs.ListTasksInput{}); len(got) == 0 {
			t.Error("it is gone from the list at once")
		}
		time.Sleep(3 * time.Second)
		if got := a.list(ecs.ListTasksInput{}); len(got) != 0 {
			t.Errorf("3 s after its end: %v", got)
		}
	})
}

// TestFaultsAndBuckets: the effect of OnCall and Buckets on a call.
func TestFaultsAndBuckets(t *testing.T) {
	inAccount(t, func(t *testing.T, a *account) {
		fault := Fault{LoseReply: true}
		a.Set(func() { a.OnCall = func(Call) Fault { return fault } })
		if _, err := a.ecs.RunTask(t.Context(), request("alice", "one")); err == nil || code(err) != "" {
			t.Errorf("a lost reply: %v", err)
		}
		if got := a.Live(); !slices.Equal(got, []string{"alice+default"}) {
			t.Errorf("after it: %v", got)
		}
		fault = Unavailable
		if _, err := a.ecs.RunTask(t.Context(), request("bob", "two")); code(err) != Unavailable.Code {
			t.Errorf("%v", err)
		}
		fault = Fault{}
		a.Set(func() { a.Buckets = map[string]Bucket{"launch": {2, 1}} })
		ok := 0
		for range 5 {
			if _, err := a.ecs.RunTask(t.Context(), request("", "")); err == nil {
				ok++
			} else if code(err) != "ThrottlingException" {
				t.Errorf("%v", err)
			}
		}
		time.Sleep(time.Second)
		if _, err := a.ecs.RunTask(t.Context(), request("", "")); ok != 2 || err != nil {
			t.Errorf("of a burst of 2 there were %d, and then %v", ok, err)
		}
	})
}

// TestViolations: broken invariants are reported.
func TestViolations(t *testing.T) {
	inAccount(t, func(t *testing.T, a *account) {
		first := a.run(request("alice", "one"))
		a.run(request("bob", "two"))
		if v := a.Violations(); len(v) != 0 {
			t.Errorf("two users: %v", v)
		}
		a.Stop(first, "UserInitiated", "")
		a.run(request("alice", "three"))
		if v := a.Violations(); len(v) != 0 {
			t.Errorf("a dying one aside: %v", v)
		}
		a.run(request("alice", "four"))
		if v := a.Violations(); len(v) != 1 || !strings.Contains(v[0], "alice+default") {
			t.Errorf("two tasks of alice: %v", v)
		}
		liar := request("alice", "five")
		liar.Tags[0].Value = aws.String("carol")
		a.run(liar)
		if v := a.Violations(); !slices.ContainsFunc(v, func(s string) bool { return strings.Contains(s, "carol+default") }) {
			t.Errorf("tags of another: %v", v)
		}
		if left := a.Left(); len(left) < 4 {
			t.Errorf("left: %v", left)
		}
	})
}

// TestGroupDependencies: a security group that something has cannot be deleted.
func TestGroupDependencies(t *testing.T) {
	inAccount(t, func(t *testing.T, a *account) {
		create := func(name string) string {
			t.Helper()
			out, err := a.ec2.CreateSecurityGroup(t.Context(), &ec2.CreateSecurityGroupInput{GroupName: &name, Description: aws.String("test"), VpcId: aws.String(VPC)})
			if err != nil {
				t.Fatal(err)
			}
			return *out.GroupId
		}
		remove := func(id string) string {
			_, err := a.ec2.DeleteSecurityGroup(t.Context(), &ec2.DeleteSecurityGroupInput{GroupId: &id})
			return code(err)
		}
		a.Set(func() { a.Times.Deprovisioning = Fixed(10 * time.Second) })
		used, named := create("used"), create("named")
		if _, err := a.ec2.CreateSecurityGroup(t.Context(), &ec2.CreateSecurityGroupInput{GroupName: aws.String("used"), Description: aws.String("test"), VpcId: aws.String(VPC)}); code(err) != "InvalidGroup.Duplicate" {
			t.Errorf("a second of its name: %v", err)
		}
		if _, err := a.ec2.AuthorizeSecurityGroupIngress(t.Context(), &ec2.AuthorizeSecurityGroupIngressInput{GroupId: &used, IpPermissions: []ec2types.IpPermission{
			{IpProtocol: aws.String("tcp"), FromPort: aws.Int32(2022), ToPort: aws.Int32(2022), UserIdGroupPairs: []ec2types.UserIdGroupPair{{GroupId: &named}}},
		}}); err != nil {
			t.Fatal(err)
		}
		in := request("", "")
		in.NetworkConfiguration.AwsvpcConfiguration.SecurityGroups = []string{used}
		task := a.run(in)
		if got := remove(used); got != "DependencyViolation" {
			t.Errorf("a group of a task: %q", got)
		}
		if got := remove(named); got != "DependencyViolation" {
			t.Errorf("a group that another's rule names: %q", got)
		}
		a.Stop(task, "UserInitiated", "")
		time.Sleep(9 * time.Second)
		if got := remove(used); got != "DependencyViolation" {
			t.Errorf("while the network interface is there: %q", got)
		}
		time.Sleep(2 * time.Second)
		if got := remove(used) + remove(named); got != "" {
			t.Errorf("when it is gone: %q", got)
		}
	})
}

// TestSignature: each service rejects a wrong signature, with its own error.
func TestSignature(t *testing.T) {
	inAccount(t, func(t *testing.T, a *account) {
		good := a.Config()
		call := map[string]func(aws.Config) error{
			"ecs": func(c aws.Config) error {
				_, err := ecs.NewFromConfig(c).ListTasks(t.Context(), &ecs.ListTasksInput{Cluster: aws.String(Cluster)})
				return err
			},
			"ec2": func(c aws.Config) error {
				_, err := ec2.NewFromConfig(c).DescribeSubnets(t.Context(), &ec2.DescribeSubnetsInput{})
				return err
			},
			"sts": func(c aws.Config) error {
				_, err := sts.NewFromConfig(c).GetCallerIdentity(t.Context(), &sts.GetCallerIdentityInput{})
				return err
			},
		}
		for _, test := range []struct {
			what  string
			spoil func(*aws.Config)
			want  map[string]string
		}{
			{"nothing", func(*aws.Config) {}, map[string]string{}},
			{"the secret", func(c *aws.Config) {
				c.Credentials = credentials.NewStaticCredentialsProvider(AccessKey, "x"+SecretKey, "")
			},
				map[string]string{"ecs": "InvalidSignatureException", "ec2": "AuthFailure", "sts": "SignatureDoesNotMatch"}},
			{"the key id", func(c *aws.Config) {
				c.Credentials = credentials.NewStaticCredentialsProvider("AKIANOBODY", SecretKey, "")
			},
				map[string]string{"ecs": "UnrecognizedClientException", "ec2": "AuthFailure", "sts": "InvalidClientTokenId"}},
			{"the region", func(c *aws.Config) { c.Region = "us-east-1" },
				map[string]string{"ecs": "InvalidSignatureException", "ec2": "AuthFailure", "sts": "SignatureDoesNotMatch"}},
			{"the body", func(c *aws.Config) { c.HTTPClient = tampering{a.HTTPClient()} },
				map[string]string{"ecs": "InvalidSignatureException", "ec2": "AuthFailure", "sts": "SignatureDoesNotMatch"}},
		} {
			for service, do := range call {
				cfg := good.Copy()
				cfg.Retryer = func() aws.Retryer { return aws.NopRetryer{} }
				test.spoil(&cfg)
				if err := do(cfg); code(err) != test.want[service] || (err == nil) != (test.want[service] == "") {
					t.Errorf("%s, with %s spoilt: %v, want %q", service, test.what, err, test.want[service])
				}
			}
		}
		// The SDK learns the skew from the refusal; without a second attempt
		// it stays one.
		a.Set(func() { a.ClockOffset = 6 * time.Minute })
		if err := call["ecs"](func() aws.Config {
			c := good.Copy()
			c.Retryer = func() aws.Retryer { return aws.NopRetryer{} }
			return c
		}()); code(err) != "InvalidSignatureException" {
			t.Errorf("with a clock 6 minutes late: %v", err)
		}
	})
}

// tampering changes requests on their way.
type tampering struct{ next aws.HTTPClient }

func (m tampering) Do(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(body, []byte("{")) {
		body = append([]byte(" "), body...)
	} else {
		body = append(body, "&x=y"...)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	return m.next.Do(r)
}

// FuzzRequest sends requests that are signed and otherwise anything. Each is
// answered in the protocol that it spoke, and nobody else's group is touched.
func FuzzRequest(f *testing.F) {
	f.Add("ecs", "RunTask", `{"cluster":"sallyport","taskDefinition":"sallyport-bastion:7","count":2,"networkConfiguration":{"awsvpcConfiguration":{"subnets":["subnet-0fa4e00a"]}},"overrides":{"containerOverrides":[{"name":"bastion","environment":[{"name":"A","value":"b"}]}]}}`)
	f.Add("ecs", "DescribeTasks", `{"cluster":"sallyport","tasks":["x","arn:aws:ecs:eu-west-1:123456789012:task/sallyport/x"],"include":["TAGS"]}`)
	f.Add("ecs", "ListTasks", `{"cluster":"sallyport","maxResults":1,"nextToken":"0"}`)
	f.Add("ecs", "RegisterTaskDefinition", `{"family":"x","networkMode":"awsvpc","cpu":"256","memory":"512","containerDefinitions":[{"name":"bastion","image":"x"}]}`)
	f.Add("ecs", "CreateCluster", `{"clusterName":"x"}`)
	f.Add("ecs", "StopTask", `null`)
	f.Add("ec2", "", "Action=DescribeSecurityGroups&Version=2016-11-15&Filter.1.Name=tag:x&Filter.1.Value.1=*a?\\b&MaxResults=5&NextToken=1")
	f.Add("ec2", "", "Action=CreateSecurityGroup&Version=2016-11-15&GroupName=x&GroupDescription=y&VpcId=vpc-0fa4e000&TagSpecification.1.ResourceType=security-group&TagSpecification.1.Tag.1.Key=a&TagSpecification.1.Tag.1.Value=b")
	f.Add("ec2", "", "Action=AuthorizeSecurityGroupIngress&Version=2016-11-15&GroupId=sg-0fa4e001&IpPermissions.1.IpProtocol=6&IpPermissions.1.FromPort=1&IpPermissions.1.ToPort=2&IpPermissions.1.IpRanges.1.CidrIp=10.0.0.1/8")
	f.Add("ec2", "", "Action=DescribeNetworkInterfaces&Version=2016-11-15&NetworkInterfaceId.1=eni-1")
	f.Add("sts", "", "Action=GetCallerIdentity&Version=2011-06-15")
	f.Fuzz(func(t *testing.T, service, action, body string) {
		c := New(&idle{polite: true})
		defer c.Close()
		r := httptest.NewRequest("POST", "http://aws.invalid/", strings.NewReader(body))
		if action != "" {
			r.Header.Set("X-Amz-Target", ecsTarget+action)
		}
		hash := sha256.Sum256([]byte(body))
		key := aws.Credentials{AccessKeyID: AccessKey, SecretAccessKey: SecretKey}
		if err := v4.NewSigner().SignHTTP(context.Background(), key, r, hex.EncodeToString(hash[:]), service, Region, time.Now()); err != nil {
			t.Skip(err)
		}
		w := httptest.NewRecorder()
		c.ServeHTTP(w, r)
		switch kind := w.Header().Get("Content-Type"); {
		case strings.Contains(kind, "json"):
			if !json.Valid(w.Body.Bytes()) {
				t.Errorf("no JSON: %q", w.Body)
			}
		case strings.Contains(kind, "xml"):
			d := xml.NewDecoder(w.Body)
			for {
				if _, err := d.Token(); err == io.EOF {
					break
				} else if err != nil {
					t.Fatalf("no XML: %v", err)
				}
			}
		case w.Code != http.StatusNotFound:
			t.Errorf("%d, of type %q", w.Code, kind)
		}
	})
}

// FuzzAuthorization: nothing that is not signed is done.
func FuzzAuthorization(f *testing.F) {
	f.Add("AWS4-HMAC-SHA256 Credential="+AccessKey+"/20260102/"+Region+"/ecs/aws4_request, SignedHeaders=host;x-amz-date, Signature=00", "20260102T030405Z")
	f.Add("AWS4-HMAC-SHA256 Credential=/////, SignedHeaders=;, Signature=", "")
	f.Add("Basic x", "x")
	f.Fuzz(func(t *testing.T, authorization, date string) {
		c := New(&idle{polite: true})
		r := httptest.NewRequest("POST", "http://aws.invalid/", strings.NewReader("{}"))
		r.Header.Set("X-Amz-Target", ecsTarget+"RunTask")
		r.Header.Set("Authorization", authorization)
		r.Header.Set("X-Amz-Date", date)
		if failed := c.authenticate(r, []byte("{}"), "ecs"); failed == nil {
			t.Error("it is in")
		}
	})
}
