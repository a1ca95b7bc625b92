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

// runTask is the input of RunTask. Two requests are the same if all its fields are
// equal.
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

// count is the number of tasks of the request.
func (in runTask) count() int {
	if in.Count == nil {
		return 1
	}
	return *in.Count
}

func (in runTask) spot() bool {
	return len(in.CapacityProviderStrategy) > 0 && in.CapacityProviderStrategy[0].CapacityProvider == "FARGATE_SPOT"
}

// environment returns the environment of the overrides.
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

// ownerInTags is the owner in the tags; empty if they have none.
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

// A token is the stored outcome of a RunTask ("Ensuring idempotency", Amazon ECS API
// Reference).
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
	// afterlife is the time from a task's end for which its token and the task are
	// known.
	afterlife = time.Hour
)

// expired reports whether a token is forgotten: after 24 hours, or one hour after the
// end of its tasks, whichever is first.
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

var (
	startedByPattern = regexp.MustCompile(`^[A-Za-z0-9_/-]{1,128}$`)
	tokenPattern     = regexp.MustCompile(`^[\x21-\x7e]{1,64}$`)
	clusterPattern   = regexp.MustCompile(`^[A-Za-z0-9_-]{1,255}$`)
	tagPattern       = regexp.MustCompile(`^[\p{L}\p{N} +\-=._:/@]*$`)
)

// check returns the error of an invalid request (API_RunTask).
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

// badTags returns the fault of invalid tags (API_Tag); empty if they are valid.
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

// canonical returns a request in a form that does not depend on its encoding.
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

// launch starts one task, or fails as its Fate says, and stores it.
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
	for _, t := range def.tags {
		if t.Key == "sallyport:user" && t.Value != env["SALLYPORT_OWNER"] {
			c.violations = append(c.violations, fmt.Sprintf("a task of %s has the task definition %s of %s", launch.Owner, def.TaskDefinitionArn, t.Value))
		}
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

// address returns the address of a subnet that has been unused for longest.
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
		ip := fmt.Sprintf("%s.%d.%d", c.Network, block+n/256, n%256)
		if c.IPv6Only {
			ip = fmt.Sprintf("fd00:%x::%x", block+1, n)
		}
		if !used[ip] {
			return ip, true
		}
	}
	return "", false
}

// replay returns the stored outcome for a known token.
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
