package awsfake

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
)

// A definition is what is known of a task definition.
type definition struct {
	Family     string
	Revision   int
	Containers []string
}

type keyValue struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type tag struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

// runTask is the input of RunTask, as far as it matters. Everything in it counts
// for its sameness.
type runTask struct {
	Cluster                  string `json:"cluster"`
	TaskDefinition           string `json:"taskDefinition"`
	Count                    *int   `json:"count"`
	ClientToken              string `json:"clientToken"`
	StartedBy                string `json:"startedBy"`
	LaunchType               string `json:"launchType"`
	PropagateTags            string `json:"propagateTags"`
	PlatformVersion          string `json:"platformVersion"`
	CapacityProviderStrategy []struct {
		CapacityProvider string `json:"capacityProvider"`
	} `json:"capacityProviderStrategy"`
	NetworkConfiguration *struct {
		AwsvpcConfiguration *struct {
			Subnets        []string `json:"subnets"`
			SecurityGroups []string `json:"securityGroups"`
			AssignPublicIP string   `json:"assignPublicIp"`
		} `json:"awsvpcConfiguration"`
	} `json:"networkConfiguration"`
	Overrides json.RawMessage `json:"overrides"`
	Tags      []tag           `json:"tags"`
}

type overrides struct {
	ContainerOverrides []struct {
		Name        string     `json:"name"`
		Environment []keyValue `json:"environment"`
	} `json:"containerOverrides"`
}

// environment returns what the overrides set.
func (in runTask) environment() map[string]string {
	env := map[string]string{}
	var o overrides
	if json.Unmarshal(in.Overrides, &o) != nil {
		return env
	}
	for _, c := range o.ContainerOverrides {
		for _, v := range c.Environment {
			env[v.Name] = v.Value
		}
	}
	return env
}

// ownerOf returns the owner a RunTask is for, as user+profile.
func ownerOf(body []byte) string {
	var in runTask
	if json.Unmarshal(body, &in) != nil {
		return ""
	}
	return owner(in.environment())
}

func owner(env map[string]string) string {
	if env["SALLYPORT_OWNER"] == "" {
		return ""
	}
	return env["SALLYPORT_OWNER"] + "+" + env["SALLYPORT_PROFILE"]
}

// A token is what ECS remembers of a RunTask ("Ensuring idempotency", Amazon ECS
// API Reference).
type token struct {
	request  string
	made     time.Time
	tasks    []*task
	failures []failure
}

type failure struct {
	Arn    string `json:"arn,omitempty"`
	Reason string `json:"reason"`
}

const (
	tokenLife = 24 * time.Hour
	// afterlife is how long a token, and a stopped task, are known after the
	// task has stopped.
	afterlife = time.Hour
)

// expired reports whether a token is forgotten: after the least of 24 hours, and
// the lives of its tasks and an hour.
func (t *token) expired(now time.Time) bool {
	if now.Sub(t.made) > tokenLife {
		return true
	}
	if len(t.tasks) == 0 {
		return false
	}
	for _, task := range t.tasks {
		if task.last != "STOPPED" || now.Sub(task.stoppedAt) <= afterlife {
			return false
		}
	}
	return true
}

func (c *Cloud) ecs(action string, body []byte) ([]byte, *apiError) {
	var out any
	var failed *apiError
	switch action {
	case "RunTask":
		out, failed = c.runTask(body)
	case "DescribeTasks":
		out, failed = c.describeTasks(body)
	case "ListTasks":
		out, failed = c.listTasks(body)
	case "StopTask":
		out, failed = c.stopTask(body)
	case "DescribeClusters":
		out = map[string]any{"clusters": []any{map[string]any{"clusterArn": clusterARN(), "clusterName": Cluster, "status": "ACTIVE"}}, "failures": []any{}}
	case "RegisterTaskDefinition":
		out, failed = c.registerTaskDefinition(body)
	case "DescribeTaskDefinition":
		out, failed = c.describeTaskDefinition(body)
	default:
		return nil, refuse("UnknownOperationException", "there is no %s here", action)
	}
	if failed != nil {
		return nil, failed
	}
	text, err := json.Marshal(out)
	if err != nil {
		return nil, &apiError{500, "ServerException", err.Error(), nil}
	}
	return text, nil
}

func arn(service, resource string) string {
	return "arn:aws:" + service + ":" + Region + ":" + Account + ":" + resource
}
func clusterARN() string { return arn("ecs", "cluster/"+Cluster) }

func decode(body []byte, into any) *apiError {
	if err := json.Unmarshal(body, into); err != nil {
		return refuse("SerializationException", "%v", err)
	}
	return nil
}

func checkCluster(name string) *apiError {
	if name != Cluster && name != clusterARN() {
		return refuse("ClusterNotFoundException", "Cluster not found.")
	}
	return nil
}

var (
	startedByPattern = regexp.MustCompile(`^[A-Za-z0-9_/-]{1,128}$`)
	tokenPattern     = regexp.MustCompile(`^[\x21-\x7e]{1,64}$`)
	tagPattern       = regexp.MustCompile(`^[\p{L}\p{N} +\-=._:/@]*$`)
)

// check is what ECS refuses at once (API_RunTask).
func (c *Cloud) check(in runTask) *apiError {
	invalid := func(format string, args ...any) *apiError {
		return refuse("InvalidParameterException", format, args...)
	}
	if failed := checkCluster(in.Cluster); failed != nil {
		return failed
	}
	def, ok := c.definitions[c.pinned(in.TaskDefinition)]
	if !ok {
		return refuse("ClientException", "Unable to describe task definition.")
	}
	if in.Count != nil && (*in.Count < 1 || *in.Count > 10) {
		return invalid("count must be between 1 and 10")
	}
	if in.ClientToken != "" && !tokenPattern.MatchString(in.ClientToken) {
		return invalid("clientToken is not valid")
	}
	if in.StartedBy != "" && !startedByPattern.MatchString(in.StartedBy) {
		return invalid("startedBy must be at most 128 letters, numbers, hyphens, forward slashes and underscores")
	}
	if in.PropagateTags == "SERVICE" {
		return invalid("propagateTags SERVICE is not valid for RunTask")
	}
	if in.LaunchType != "" && len(in.CapacityProviderStrategy) > 0 {
		return invalid("Specify either a capacityProviderStrategy or a launchType, not both.")
	}
	for _, p := range in.CapacityProviderStrategy {
		if p.CapacityProvider != "FARGATE" && p.CapacityProvider != "FARGATE_SPOT" {
			return invalid("The specified capacity provider '%s' was not found.", p.CapacityProvider)
		}
	}
	if len(in.Tags) > 50 {
		return invalid("too many tags")
	}
	for _, t := range in.Tags {
		if len(t.Key) < 1 || len(t.Key) > 128 || len(t.Value) > 256 || !tagPattern.MatchString(t.Key+t.Value) || strings.HasPrefix(t.Key, "aws:") {
			return invalid("tag %q is not valid", t.Key)
		}
	}
	if len(in.Overrides) > 8192 {
		return invalid("overrides are longer than 8192 characters")
	}
	if len(in.Overrides) > 0 {
		var o overrides
		if failed := decode(in.Overrides, &o); failed != nil {
			return failed
		}
		for _, co := range o.ContainerOverrides {
			if !slices.Contains(def.Containers, co.Name) {
				return invalid("Override for container named %s is not a container in the TaskDefinition.", co.Name)
			}
		}
	}
	if in.NetworkConfiguration == nil || in.NetworkConfiguration.AwsvpcConfiguration == nil {
		return invalid("Network Configuration must be provided when networkMode 'awsvpc' is specified.")
	}
	network := in.NetworkConfiguration.AwsvpcConfiguration
	if len(network.Subnets) < 1 || len(network.Subnets) > 16 {
		return invalid("subnets must have 1 to 16 members")
	}
	if len(network.SecurityGroups) > 5 {
		return invalid("securityGroups can have at most 5 members")
	}
	for _, s := range network.Subnets {
		if !slices.Contains(Subnets, s) {
			return invalid("Error retrieving subnet information for [%s]: The subnet ID '%s' does not exist (ErrorCode: InvalidSubnetID.NotFound)", s, s)
		}
	}
	for _, g := range network.SecurityGroups {
		if c.groups[g] == nil {
			return invalid("Error retrieving security group information for [%s]: The security group '%s' does not exist (ErrorCode: InvalidGroup.NotFound)", g, g)
		}
	}
	return nil
}

// pinned returns family:revision.
func (c *Cloud) pinned(name string) string {
	name = name[strings.LastIndexByte(name, '/')+1:]
	if strings.Contains(name, ":") {
		return name
	}
	latest, best := "", 0
	for key, d := range c.definitions {
		if d.Family == name && d.Revision > best {
			latest, best = key, d.Revision
		}
	}
	return latest
}

type taskList struct {
	Tasks    []any     `json:"tasks"`
	Failures []failure `json:"failures"`
}

func (c *Cloud) runTask(body []byte) (any, *apiError) {
	var in runTask
	if failed := decode(body, &in); failed != nil {
		return nil, failed
	}
	if failed := c.check(in); failed != nil {
		return nil, failed
	}
	now := time.Now()
	if old := c.tokens[in.ClientToken]; in.ClientToken != "" && old != nil && !old.expired(now) {
		return replay(old, string(body), now)
	}

	network := in.NetworkConfiguration.AwsvpcConfiguration
	env := in.environment()
	c.launches++
	launch := Launch{
		N: c.launches, Owner: owner(env), Subnet: network.Subnets[c.launches%len(network.Subnets)],
		Spot: len(in.CapacityProviderStrategy) > 0 && in.CapacityProviderStrategy[0].CapacityProvider == "FARGATE_SPOT",
	}
	var fate Fate
	if c.OnLaunch != nil {
		fate = c.OnLaunch(launch)
	}
	record := &token{request: string(body), made: now}
	if in.ClientToken != "" {
		c.tokens[in.ClientToken] = record
	}
	if fate.Failure != "" {
		record.failures = []failure{{Reason: fate.Failure}}
		return taskList{Tasks: []any{}, Failures: record.failures}, nil
	}

	if launch.Owner != "" {
		for _, t := range c.tasks {
			if t.owner == launch.Owner && t.desired == "RUNNING" {
				c.violations = append(c.violations, fmt.Sprintf("%s has task %s, and is given another", t.owner, t.arn))
			}
		}
	}
	c.nextIP++
	t := &task{
		cloud: c, fate: fate, owner: launch.Owner, env: env,
		arn:       arn("ecs", "task/"+Cluster+"/"+c.id(32)),
		def:       c.pinned(in.TaskDefinition),
		in:        in,
		subnet:    launch.Subnet,
		spot:      launch.Spot,
		groups:    network.SecurityGroups,
		public:    network.AssignPublicIP == "ENABLED",
		eni:       "eni-" + c.id(17),
		ip:        fmt.Sprintf("%s.%d.%d", c.Network, c.nextIP/250, 4+c.nextIP%250),
		created:   now,
		last:      "PROVISIONING",
		desired:   "RUNNING",
		version:   1,
		stopNow:   make(chan struct{}),
		tagsExist: true,
	}
	c.tasks[t.arn] = t
	record.tasks = []*task{t}
	c.living.Add(1)
	go func() { // Close waits for it
		defer c.living.Done()
		t.live()
	}()
	return taskList{Tasks: []any{t.json(true)}, Failures: []failure{}}, nil
}

// replay answers a request whose token is known.
func replay(old *token, request string, now time.Time) (any, *apiError) {
	if old.request != request {
		ids := []string{}
		for _, t := range old.tasks {
			ids = append(ids, t.arn)
		}
		return nil, &apiError{400, "ConflictException", "The request conflicts with an earlier one that has the same client token.", ids}
	}
	out := taskList{Tasks: []any{}, Failures: []failure{}}
	for _, t := range old.tasks {
		if t.last == "STOPPED" {
			out.Tasks = append(out.Tasks, map[string]any{"taskArn": t.arn, "lastStatus": t.last, "desiredStatus": t.desired})
			continue
		}
		out.Tasks = append(out.Tasks, t.json(true))
	}
	for _, f := range old.failures {
		if now.Sub(old.made) > afterlife {
			f.Reason = ""
		}
		out.Failures = append(out.Failures, f)
	}
	return out, nil
}

func (c *Cloud) describeTasks(body []byte) (any, *apiError) {
	var in struct {
		Cluster string   `json:"cluster"`
		Tasks   []string `json:"tasks"`
		Include []string `json:"include"`
	}
	if failed := decode(body, &in); failed != nil {
		return nil, failed
	}
	if failed := checkCluster(in.Cluster); failed != nil {
		return nil, failed
	}
	if len(in.Tasks) < 1 || len(in.Tasks) > 100 {
		return nil, refuse("InvalidParameterException", "Tasks must have 1 to 100 members.")
	}
	out := taskList{Tasks: []any{}, Failures: []failure{}}
	for _, name := range in.Tasks {
		t := c.find(name)
		if t == nil || time.Since(t.created) < c.MissingFor {
			if !strings.Contains(name, "/") {
				name = arn("ecs", "task/"+Cluster+"/"+name)
			}
			out.Failures = append(out.Failures, failure{name, "MISSING"})
			continue
		}
		out.Tasks = append(out.Tasks, t.json(slices.Contains(in.Include, "TAGS")))
	}
	return out, nil
}

// find returns a task by its ARN or id; nil if there is none, or it stopped long
// ago.
func (c *Cloud) find(name string) *task {
	if !strings.Contains(name, "/") {
		name = arn("ecs", "task/"+Cluster+"/"+name)
	}
	t := c.tasks[name]
	if t != nil && t.last == "STOPPED" && time.Since(t.stoppedAt) > afterlife {
		return nil
	}
	return t
}

func (c *Cloud) listTasks(body []byte) (any, *apiError) {
	var in struct {
		Cluster           string `json:"cluster"`
		StartedBy         string `json:"startedBy"`
		Family            string `json:"family"`
		DesiredStatus     string `json:"desiredStatus"`
		LaunchType        string `json:"launchType"`
		ServiceName       string `json:"serviceName"`
		ContainerInstance string `json:"containerInstance"`
		MaxResults        *int   `json:"maxResults"`
		NextToken         string `json:"nextToken"`
	}
	if failed := decode(body, &in); failed != nil {
		return nil, failed
	}
	if failed := checkCluster(in.Cluster); failed != nil {
		return nil, failed
	}
	if in.StartedBy != "" && in.Family+in.DesiredStatus+in.LaunchType+in.ServiceName+in.ContainerInstance != "" {
		return nil, refuse("InvalidParameterException", "cannot specify startedBy with other arguments")
	}
	desired := in.DesiredStatus
	if desired == "" {
		desired = "RUNNING"
	}
	then := time.Now().Add(-c.ListLag)
	var found []*task
	for _, t := range c.tasks {
		was := "RUNNING"
		if t.desired == "STOPPED" && !t.stopping.After(then) {
			was = "STOPPED"
		}
		switch {
		case t.created.After(then), was != desired:
		case in.StartedBy != "" && t.in.StartedBy != in.StartedBy:
		case in.Family != "" && !strings.HasPrefix(t.def, in.Family+":"):
		case c.find(t.arn) == nil:
		default:
			found = append(found, t)
		}
	}
	sort.Slice(found, func(i, j int) bool {
		return found[i].created.Before(found[j].created) || found[i].created.Equal(found[j].created) && found[i].arn < found[j].arn
	})
	arns := []string{}
	for _, t := range found {
		arns = append(arns, t.arn)
	}
	if c.Duplicates && len(arns) > 0 {
		arns = append(arns, arns[0])
	}
	most, from := 100, 0
	if in.MaxResults != nil {
		most = *in.MaxResults
	}
	if most < 1 || most > 100 {
		return nil, refuse("InvalidParameterException", "maxResults must be between 1 and 100")
	}
	if in.NextToken != "" {
		n, err := strconv.Atoi(in.NextToken)
		if err != nil || n < 0 || n > len(arns) {
			return nil, refuse("InvalidParameterException", "Invalid token")
		}
		from = n
	}
	out := map[string]any{"taskArns": arns[from:min(len(arns), from+most)]}
	if from+most < len(arns) {
		out["nextToken"] = strconv.Itoa(from + most)
	}
	return out, nil
}

func (c *Cloud) stopTask(body []byte) (any, *apiError) {
	var in struct{ Cluster, Task, Reason string }
	if failed := decode(body, &in); failed != nil {
		return nil, failed
	}
	if failed := checkCluster(in.Cluster); failed != nil {
		return nil, failed
	}
	t := c.find(in.Task)
	if t == nil {
		return nil, refuse("InvalidParameterException", "The referenced task was not found.")
	}
	t.stop("UserInitiated", in.Reason)
	t.tagsExist = false // API_StopTask: "Any tags associated with the task will be deleted"
	return map[string]any{"task": t.json(true)}, nil
}

func (c *Cloud) registerTaskDefinition(body []byte) (any, *apiError) {
	var in struct {
		Family               string     `json:"family"`
		ContainerDefinitions []keyValue `json:"containerDefinitions"`
	}
	if failed := decode(body, &in); failed != nil {
		return nil, failed
	}
	if in.Family == "" || len(in.ContainerDefinitions) == 0 {
		return nil, refuse("ClientException", "family and containerDefinitions are required.")
	}
	d := definition{Family: in.Family, Revision: 1}
	for _, other := range c.definitions {
		if other.Family == d.Family && other.Revision >= d.Revision {
			d.Revision = other.Revision + 1
		}
	}
	for _, container := range in.ContainerDefinitions {
		d.Containers = append(d.Containers, container.Name)
	}
	c.definitions[fmt.Sprintf("%s:%d", d.Family, d.Revision)] = d
	return map[string]any{"taskDefinition": d.json()}, nil
}

func (c *Cloud) describeTaskDefinition(body []byte) (any, *apiError) {
	var in struct {
		TaskDefinition string `json:"taskDefinition"`
	}
	if failed := decode(body, &in); failed != nil {
		return nil, failed
	}
	d, ok := c.definitions[c.pinned(in.TaskDefinition)]
	if !ok {
		return nil, refuse("ClientException", "Unable to describe task definition.")
	}
	return map[string]any{"taskDefinition": d.json()}, nil
}

func (d definition) json() any {
	containers := []any{}
	for _, name := range d.Containers {
		containers = append(containers, map[string]any{"name": name, "essential": true, "image": "bastion"})
	}
	return map[string]any{
		"taskDefinitionArn": arn("ecs", fmt.Sprintf("task-definition/%s:%d", d.Family, d.Revision)),
		"family":            d.Family, "revision": d.Revision, "status": "ACTIVE", "networkMode": "awsvpc",
		"requiresCompatibilities": []string{"FARGATE"}, "cpu": "256", "memory": "512", "containerDefinitions": containers,
	}
}
