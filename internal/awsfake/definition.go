package awsfake

import (
	"encoding/json"
	"fmt"
	"slices"
)

// A definition is a registered task definition.
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
	RuntimePlatform      *runtimePlatform      `json:"runtimePlatform,omitempty"`
	Volumes              json.RawMessage       `json:"volumes,omitempty"`
	ContainerDefinitions []containerDefinition `json:"containerDefinitions"`

	tags []tag
}

type runtimePlatform struct {
	CPUArchitecture string `json:"cpuArchitecture,omitempty"`
}

type containerDefinition struct {
	Name        string     `json:"name"`
	Image       string     `json:"image"`
	Essential   bool       `json:"essential"`
	Environment []keyValue `json:"environment"`
	StopTimeout *int       `json:"stopTimeout,omitempty"`

	MountPoints json.RawMessage `json:"mountPoints,omitempty"`
}

func role(name string) string { return "arn:aws:iam::" + Account + ":role/" + name }

// preset is the definition of a new account.
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

// Define registers a revision of a family, with one container, and returns its ARN. If
// user is not empty, the definition is tagged as this user's.
func (c *Cloud) Define(family, container, user string) (string, error) {
	in := map[string]any{
		"family": family, "networkMode": "awsvpc", "requiresCompatibilities": []string{"FARGATE"}, "cpu": "256", "memory": "512",
		"containerDefinitions": []containerDefinition{{Name: container, Image: "tools:1", Essential: true}},
	}
	if user != "" {
		in["tags"] = []tag{{"sallyport:user", user}}
	}
	body, err := json.Marshal(in)
	if err != nil {
		return "", err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	d, failed := c.registerTaskDefinition(body)
	if failed != nil {
		return "", failed
	}
	return d.TaskDefinitionArn, nil
}

func (c *Cloud) registerTaskDefinition(body []byte) (d definition, failed *apiError) {
	if failed := decode(body, &d); failed != nil {
		return d, failed
	}
	var tagged struct{ Tags []tag }
	if failed := decode(body, &tagged); failed != nil {
		return d, failed
	}
	if why := badTags(tagged.Tags); why != "" {
		return d, refuse("InvalidParameterException", "%s", why)
	}
	d.tags = tagged.Tags
	switch {
	case !clusterPattern.MatchString(d.Family):
		return d, refuse("ClientException", "Family should not be empty, and consist of letters, numbers, hyphens and underscores.")
	case len(d.ContainerDefinitions) == 0:
		return d, refuse("ClientException", "Container list cannot be empty.")
	case d.NetworkMode != "awsvpc":
		return d, refuse("ClientException", "Fargate only supports network mode 'awsvpc'.")
	case d.CPU == "" || d.Memory == "":
		return d, refuse("ClientException", "Fargate requires that 'cpu' and 'memory' be defined at the task level.")
	}
	for i, container := range d.ContainerDefinitions {
		if container.Name == "" || container.Image == "" {
			return d, refuse("ClientException", "Container.name and Container.image should not be null or empty.")
		}
		if s := container.StopTimeout; s != nil && (*s < 2 || *s > 120) { // API_ContainerDefinition, for Fargate
			return d, refuse("ClientException", "stopTimeout must be between 2 and 120 seconds.")
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
	return d, nil
}

func (c *Cloud) describeTaskDefinition(body []byte) (any, *apiError) {
	var in struct {
		TaskDefinition string   `json:"taskDefinition"`
		Include        []string `json:"include"`
	}
	if failed := decode(body, &in); failed != nil {
		return nil, failed
	}
	d, ok := c.definitions[c.pinned(in.TaskDefinition)]
	if !ok {
		return nil, refuse("ClientException", "Unable to describe task definition.")
	}
	out := map[string]any{"taskDefinition": d}
	if slices.Contains(in.Include, "TAGS") {
		out["tags"] = append([]tag{}, d.tags...)
	}
	return out, nil
}
