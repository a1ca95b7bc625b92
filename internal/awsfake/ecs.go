package awsfake

import (
	"encoding/json"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

type keyValue struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type tag struct {
	Key   string `json:"key"`
	Value string `json:"value"`
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
		d, refused := c.registerTaskDefinition(body)
		out, failed = map[string]any{"taskDefinition": d, "tags": append([]tag{}, d.tags...)}, refused
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

// cluster returns the name of a request's cluster, or the default.
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

// ofCluster returns an error if a task's ARN names another cluster.
func ofCluster(cluster, name string) *apiError {
	if m := longARN.FindStringSubmatch(name); m != nil && m[2] != cluster {
		return refuse("InvalidParameterException", "Invalid identifier: Identifier is for cluster %s. Your cluster is %s", m[2], cluster)
	} else if m != nil && m[1] != Region {
		return refuse("InvalidParameterException", "Invalid identifier: Identifier is for region %s. Your accountId is %s", m[1], Account)
	}
	return nil
}

// taskARN returns the ARN of a task, given its ARN or ID.
func taskARN(cluster, name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	return arn("ecs", "task/"+cluster+"/"+name)
}

// find returns a task by its ARN or ID; nil if there is none in the cluster, or it
// stopped longer ago than afterlife.
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
