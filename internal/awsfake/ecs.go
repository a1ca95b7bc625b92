package awsfake

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// A definition is a task definition, as it was registered.
type definition struct {
	Family               string                `json:"family"`
	Revision             int                   `json:"revision"`
	TaskDefinitionArn    string                `json:"taskDefinitionArn"`
	Status               string                `json:"status"`
	NetworkMode          string                `json:"networkMode"`
	Compatibilities      []string              `json:"requiresCompatibilities"`
	CPU                  string                `json:"cpu"`
	Memory               string                `json:"memory"`
	TaskRole             string                `json:"taskRoleArn,omitempty"`
	ExecutionRole        string                `json:"executionRoleArn,omitempty"`
	ContainerDefinitions []containerDefinition `json:"containerDefinitions"`
}

type containerDefinition struct {
	Name        string     `json:"name"`
	Image       string     `json:"image"`
	Essential   bool       `json:"essential"`
	Environment []keyValue `json:"environment"`
	StopTimeout *int       `json:"stopTimeout,omitempty"`
}

func role(name string) string { return "arn:aws:iam::" + Account + ":role/" + name }

// preset is the definition that is there from the start.
func preset() definition {
	return definition{
		Family: "sallyport-bastion", Revision: 7, TaskDefinitionArn: arn("ecs", "task-definition/"+TaskDefinition), Status: "ACTIVE",
		NetworkMode: "awsvpc", Compatibilities: []string{"FARGATE"}, CPU: "256", Memory: "512",
		TaskRole: role("sallyport-bastion-task"), ExecutionRole: role("sallyport-bastion-execution"),
		ContainerDefinitions: []containerDefinition{{
			Name: "bastion", Image: Account + ".dkr.ecr." + Region + ".amazonaws.com/sallyport-bastion:7", Essential: true, Environment: []keyValue{},
		}},
	}
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
	TaskRole string `json:"taskRoleArn"`
}

// count is how many tasks are asked for.
func (in runTask) count() int {
	if in.Count == nil {
		return 1
	}
	return *in.Count
}

func (in runTask) spot() bool {
	return len(in.CapacityProviderStrategy) > 0 && in.CapacityProviderStrategy[0].CapacityProvider == "FARGATE_SPOT"
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

func owner(env map[string]string) string {
	if env["SALLYPORT_OWNER"] == "" {
		return ""
	}
	return env["SALLYPORT_OWNER"] + "+" + env["SALLYPORT_PROFILE"]
}

// ownerInTags is the same by the tags; empty if they do not say.
func ownerInTags(tags []tag) string {
	env := map[string]string{}
	for _, t := range tags {
		switch t.Key {
		case "sallyport:user":
			env["SALLYPORT_OWNER"] = t.Value
		case "sallyport:profile":
			env["SALLYPORT_PROFILE"] = t.Value
		}
	}
	return owner(env)
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
	case "CreateCluster":
		out, failed = c.createCluster(body)
	case "DescribeClusters":
		out, failed = c.describeClusters(body)
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
func clusterARN(name string) string { return arn("ecs", "cluster/"+name) }

func decode(body []byte, into any) *apiError {
	if err := json.Unmarshal(body, into); err != nil {
		return refuse("SerializationException", "%v", err)
	}
	return nil
}

// cluster returns the name of a cluster that a request names, or does not.
func (c *Cloud) cluster(name string) (string, *apiError) {
	if name == "" {
		name = "default"
	}
	if short, ok := strings.CutPrefix(name, clusterARN("")); ok {
		name = short
	}
	if !c.clusters[name] {
		return "", refuse("ClusterNotFoundException", "Cluster not found.")
	}
	return name, nil
}

func (c *Cloud) createCluster(body []byte) (any, *apiError) {
	var in struct {
		Name string `json:"clusterName"`
	}
	if failed := decode(body, &in); failed != nil {
		return nil, failed
	}
	if in.Name == "" {
		in.Name = "default"
	}
	if !clusterPattern.MatchString(in.Name) {
		return nil, refuse("InvalidParameterException", "Invalid cluster name.")
	}
	c.clusters[in.Name] = true
	return map[string]any{"cluster": clusterJSON(in.Name)}, nil
}

func (c *Cloud) describeClusters(body []byte) (any, *apiError) {
	var in struct {
		Clusters []string `json:"clusters"`
	}
	if failed := decode(body, &in); failed != nil {
		return nil, failed
	}
	if len(in.Clusters) == 0 {
		in.Clusters = []string{"default"}
	}
	clusters, failures := []any{}, []failure{}
	for _, asked := range in.Clusters {
		if name, failed := c.cluster(asked); failed == nil {
			clusters = append(clusters, clusterJSON(name))
		} else {
			failures = append(failures, failure{clusterARN(asked), "MISSING"})
		}
	}
	return map[string]any{"clusters": clusters, "failures": failures}, nil
}

func clusterJSON(name string) any {
	return map[string]any{"clusterArn": clusterARN(name), "clusterName": name, "status": "ACTIVE"}
}

var (
	startedByPattern = regexp.MustCompile(`^[A-Za-z0-9_/-]{1,128}$`)
	tokenPattern     = regexp.MustCompile(`^[\x21-\x7e]{1,64}$`)
	clusterPattern   = regexp.MustCompile(`^[A-Za-z0-9_-]{1,255}$`)
	tagPattern       = regexp.MustCompile(`^[\p{L}\p{N} +\-=._:/@]*$`)
)

// check is what ECS refuses at once (API_RunTask).
func (c *Cloud) check(in runTask) *apiError {
	invalid := func(format string, args ...any) *apiError {
		return refuse("InvalidParameterException", format, args...)
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
	if len(in.CapacityProviderStrategy) > 20 {
		return invalid("capacityProviderStrategy can have at most 20 members.")
	}
	switch in.LaunchType {
	case "", "FARGATE":
	default: // EC2, EXTERNAL: there are no machines
		return invalid("No Container Instances were found in your cluster.")
	}
	if !slices.Contains([]string{"", "LATEST", "1.4.0", "1.3.0"}, in.PlatformVersion) {
		return refuse("PlatformUnknownException", "The specified platform version does not exist.")
	}
	if why := badTags(in.Tags); why != "" {
		return invalid("%s", why)
	}
	if utf8.RuneCount(in.Overrides) > 8192 {
		return invalid("Container Overrides length must be at most 8192")
	}
	if len(in.Overrides) > 0 {
		var o overrides
		if failed := decode(in.Overrides, &o); failed != nil {
			return failed
		}
		for _, co := range o.ContainerOverrides {
			if !slices.ContainsFunc(def.ContainerDefinitions, func(d containerDefinition) bool { return d.Name == co.Name }) {
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

// badTags says what is wrong with tags (API_Tag); empty is nothing.
func badTags(tags []tag) string {
	if len(tags) > 50 {
		return "The number of tags exceeds the limit of 50."
	}
	seen := map[string]bool{}
	for _, t := range tags {
		switch {
		case t.Key == "" || utf8.RuneCountInString(t.Key) > 128 || utf8.RuneCountInString(t.Value) > 256:
			return "The key of tag " + strconv.Quote(t.Key) + " must have 1 to 128 characters, and its value at most 256."
		case !tagPattern.MatchString(t.Key + t.Value):
			return "Tag " + strconv.Quote(t.Key) + " contains characters that are not allowed."
		case strings.HasPrefix(strings.ToLower(t.Key), "aws:"):
			return "Tag " + strconv.Quote(t.Key) + " begins with aws:, which is reserved."
		case seen[t.Key]:
			return "Tag " + strconv.Quote(t.Key) + " is given twice."
		}
		seen[t.Key] = true
	}
	return ""
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
	cluster, failed := c.cluster(in.Cluster)
	if failed != nil {
		return nil, failed
	}
	if failed := c.check(in); failed != nil {
		return nil, failed
	}
	now := time.Now()
	request, failed := canonical(body)
	if failed != nil {
		return nil, failed
	}
	key := cluster + "\n" + in.ClientToken
	if old := c.tokens[key]; in.ClientToken != "" && old != nil && !old.expired(now) {
		return replay(old, request, now)
	}
	record := &token{request: request, made: now}
	if in.ClientToken != "" {
		c.tokens[key] = record
	}
	for range in.count() {
		c.launch(in, cluster, record, now)
	}
	out := taskList{Tasks: []any{}, Failures: append([]failure{}, record.failures...)}
	for _, t := range record.tasks {
		out.Tasks = append(out.Tasks, t.json(true))
	}
	return out, nil
}

// canonical returns a request in a form that does not depend on how it was
// written down.
func canonical(body []byte) (string, *apiError) {
	var v any
	if failed := decode(body, &v); failed != nil {
		return "", failed
	}
	text, err := json.Marshal(v)
	if err != nil {
		return "", refuse("SerializationException", "%v", err)
	}
	return string(text), nil
}

// launch starts one task, or does not, and records it.
func (c *Cloud) launch(in runTask, cluster string, record *token, now time.Time) {
	network := in.NetworkConfiguration.AwsvpcConfiguration
	def := c.definitions[c.pinned(in.TaskDefinition)]
	env := map[string]string{}
	for _, container := range def.ContainerDefinitions {
		for _, v := range container.Environment {
			env[v.Name] = v.Value
		}
	}
	maps.Copy(env, in.environment())
	c.launches++
	launch := Launch{N: c.launches, Owner: owner(env), Subnet: network.Subnets[c.launches%len(network.Subnets)], Spot: in.spot()}
	var fate Fate
	if c.OnLaunch != nil {
		fate = c.OnLaunch(launch)
	}
	if fate.Failure != "" {
		record.failures = append(record.failures, failure{Reason: fate.Failure})
		return
	}
	if byTags := ownerInTags(in.Tags); byTags != "" && byTags != launch.Owner {
		c.violations = append(c.violations, fmt.Sprintf("the tags say that a task is of %s, and its environment, of %q", byTags, launch.Owner))
	}
	if launch.Owner != "" {
		for _, t := range c.tasks {
			if t.owner == launch.Owner && t.env["SALLYPORT_DEPLOYMENT"] == env["SALLYPORT_DEPLOYMENT"] && t.desired == "RUNNING" {
				c.violations = append(c.violations, fmt.Sprintf("%s has task %s, and is given another", t.owner, t.arn))
			}
		}
	}
	ip, ok := c.address(launch.Subnet)
	if !ok {
		fate = Fate{FailIn: "PROVISIONING", Reason: "Unexpected EC2 error while attempting to Create Network Interface in subnet '" + launch.Subnet + "': InsufficientFreeAddressesInSubnet"}
	}
	groups := network.SecurityGroups
	if len(groups) == 0 {
		groups = []string{defaultGroup}
	}
	t := &task{
		cloud: c, fate: fate, owner: launch.Owner, env: env, in: in, def: def,
		cluster:     cluster,
		arn:         arn("ecs", "task/"+cluster+"/"+c.id(32)),
		subnet:      launch.Subnet,
		groups:      groups,
		spot:        launch.Spot,
		public:      network.AssignPublicIP == "ENABLED",
		eni:         "eni-" + c.id(17),
		attachment:  c.id(32),
		ip:          ip,
		stopTimeout: c.StopTimeout,
		created:     now,
		last:        "PROVISIONING",
		desired:     "RUNNING",
		version:     1,
		stopNow:     make(chan struct{}),
		tagsExist:   true,
	}
	if s := def.ContainerDefinitions[0].StopTimeout; s != nil {
		t.stopTimeout = time.Duration(*s) * time.Second
	}
	c.tasks[t.arn] = t
	record.tasks = append(record.tasks, t)
	c.living.Add(1)
	go func() { // Close waits for it
		defer c.living.Done()
		t.live()
	}()
}

// address returns one of a subnet's that is not in use, and has not been for as
// long as possible.
func (c *Cloud) address(subnet string) (string, bool) {
	used := map[string]bool{}
	for _, t := range c.tasks {
		if t.last != "STOPPED" {
			used[t.ip] = true
		}
	}
	const first, last = 4, 4094 // of a /20, without those that AWS keeps
	block := 16 * slices.Index(Subnets, subnet)
	for range last - first + 1 {
		n := first + c.nextIP[subnet]%(last-first+1)
		c.nextIP[subnet]++
		if ip := fmt.Sprintf("%s.%d.%d", c.Network, block+n/256, n%256); !used[ip] {
			return ip, true
		}
	}
	return "", false
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
	cluster, failed := c.cluster(in.Cluster)
	if failed != nil {
		return nil, failed
	}
	if len(in.Tasks) < 1 || len(in.Tasks) > 100 {
		return nil, refuse("InvalidParameterException", "Tasks must have 1 to 100 members.")
	}
	out := taskList{Tasks: []any{}, Failures: []failure{}}
	for _, name := range in.Tasks {
		if failed := ofCluster(cluster, name); failed != nil {
			return nil, failed
		}
	}
	for _, name := range in.Tasks {
		t := c.find(cluster, name)
		if t == nil || time.Since(t.created) < c.MissingFor {
			out.Failures = append(out.Failures, failure{taskARN(cluster, name), "MISSING"})
			continue
		}
		out.Tasks = append(out.Tasks, t.json(slices.Contains(in.Include, "TAGS")))
	}
	return out, nil
}

var longARN = regexp.MustCompile(`^arn:[^:]*:ecs:([^:]*):[^:]*:task/([^/]+)/`)

// ofCluster refuses to look for a task in another cluster than its ARN names.
func ofCluster(cluster, name string) *apiError {
	if m := longARN.FindStringSubmatch(name); m != nil && m[2] != cluster {
		return refuse("InvalidParameterException", "Invalid identifier: Identifier is for cluster %s. Your cluster is %s", m[2], cluster)
	} else if m != nil && m[1] != Region {
		return refuse("InvalidParameterException", "Invalid identifier: Identifier is for region %s. Your accountId is %s", m[1], Account)
	}
	return nil
}

// taskARN returns the ARN of a task that is named by it or by its id.
func taskARN(cluster, name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	return arn("ecs", "task/"+cluster+"/"+name)
}

// find returns a task by its ARN or id; nil if there is none in the cluster, or it
// stopped long ago.
func (c *Cloud) find(cluster, name string) *task {
	t := c.tasks[taskARN(cluster, name)]
	if t == nil || t.cluster != cluster || t.last == "STOPPED" && time.Since(t.stoppedAt) > afterlife {
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
	cluster, failed := c.cluster(in.Cluster)
	if failed != nil {
		return nil, failed
	}
	if in.StartedBy != "" && in.Family+in.DesiredStatus+in.LaunchType+in.ServiceName+in.ContainerInstance != "" {
		return nil, refuse("InvalidParameterException", "cannot specify startedBy with other arguments")
	}
	desired := in.DesiredStatus
	if desired == "" {
		desired = "RUNNING"
	}
	if !slices.Contains([]string{"RUNNING", "PENDING", "STOPPED"}, desired) {
		return nil, refuse("InvalidParameterException", "desiredStatus must be RUNNING, PENDING or STOPPED")
	}
	then := time.Now().Add(-c.ListLag)
	var found []*task
	for _, t := range byAge(c.tasks) {
		was := "RUNNING"
		if t.desired == "STOPPED" && !t.stopping.After(then) {
			was = "STOPPED"
		}
		switch {
		case t.created.After(then), was != desired:
		case in.StartedBy != "" && t.in.StartedBy != in.StartedBy:
		case in.Family != "" && t.def.Family != in.Family:
		case in.LaunchType != "" && in.LaunchType != "FARGATE":
		case in.ServiceName+in.ContainerInstance != "": // there are none
		case c.find(cluster, t.arn) == nil:
		default:
			found = append(found, t)
		}
	}
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
	cluster, failed := c.cluster(in.Cluster)
	if failed != nil {
		return nil, failed
	}
	if failed := ofCluster(cluster, in.Task); failed != nil {
		return nil, failed
	}
	t := c.find(cluster, in.Task)
	if t == nil || time.Since(t.created) < c.MissingFor {
		return nil, refuse("InvalidParameterException", "The referenced task was not found.")
	}
	t.stop("UserInitiated", in.Reason)
	t.tagsExist = false // API_StopTask: "Any tags associated with the task will be deleted"
	return map[string]any{"task": t.json(true)}, nil
}

func (c *Cloud) registerTaskDefinition(body []byte) (any, *apiError) {
	var d definition
	if failed := decode(body, &d); failed != nil {
		return nil, failed
	}
	switch {
	case !clusterPattern.MatchString(d.Family):
		return nil, refuse("ClientException", "Family should not be empty, and consist of letters, numbers, hyphens and underscores.")
	case len(d.ContainerDefinitions) == 0:
		return nil, refuse("ClientException", "Container list cannot be empty.")
	case d.NetworkMode != "awsvpc":
		return nil, refuse("ClientException", "Fargate only supports network mode 'awsvpc'.")
	case d.CPU == "" || d.Memory == "":
		return nil, refuse("ClientException", "Fargate requires that 'cpu' and 'memory' be defined at the task level.")
	}
	for i, container := range d.ContainerDefinitions {
		if container.Name == "" || container.Image == "" {
			return nil, refuse("ClientException", "Container.name and Container.image should not be null or empty.")
		}
		if s := container.StopTimeout; s != nil && (*s < 2 || *s > 120) { // API_ContainerDefinition, for Fargate
			return nil, refuse("ClientException", "stopTimeout must be between 2 and 120 seconds.")
		}
		if container.Environment == nil {
			d.ContainerDefinitions[i].Environment = []keyValue{}
		}
	}
	d.Revision, d.Status = 1, "ACTIVE"
	for _, other := range c.definitions {
		if other.Family == d.Family && other.Revision >= d.Revision {
			d.Revision = other.Revision + 1
		}
	}
	pinned := fmt.Sprintf("%s:%d", d.Family, d.Revision)
	d.TaskDefinitionArn = arn("ecs", "task-definition/"+pinned)
	c.definitions[pinned] = d
	return map[string]any{"taskDefinition": d}, nil
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
	return map[string]any{"taskDefinition": d}, nil
}
