package awsfake

import (
	"encoding/json"
	"strings"
	"time"
)

// A task exists from RunTask until an hour after its end. The cloud's lock guards the
// fields that change.
type task struct {
	cloud   *Cloud
	in      runTask
	def     definition
	cluster string
	arn     string
	owner   string // user+profile
	env     map[string]string
	subnet  string
	groups  []string
	spot    bool
	public  bool
	eni, ip string
	created time.Time
	fate    Fate

	attachment  string
	stopTimeout time.Duration

	last, desired    string
	version          int
	attached         bool
	tagsExist        bool
	pulling          time.Time     // when the pull of its image began; zero: not yet
	started          time.Time     // when it was said to run; zero: not yet
	stopNow          chan struct{} // closed when desired becomes STOPPED
	stopping         time.Time     // when it did
	exited           time.Time     // when its container had exited
	stoppedAt        time.Time
	stopCode, reason string
	exitCode         *int
	container        Container // once it has been started
	containerReason  string
}

// forever is longer than any test.
const forever = 100 * 365 * 24 * time.Hour

func (f Fate) code(usual string) string {
	if f.StopCode != "" {
		return f.StopCode
	}
	return usual
}

func length(f func() time.Duration) time.Duration {
	if f == nil {
		return 0
	}
	return f()
}

// live runs the task through its states.
func (t *task) live() {
	c := t.cloud
	if !t.during("PROVISIONING", length(c.Times.Provisioning)) {
		t.end()
		return
	}
	if t.fate.NoAddress {
		<-t.stopNow
		t.end()
		return
	}
	t.update(func() { t.attached, t.last = true, "PENDING" })
	if !t.during("PENDING", length(c.Times.Pending)) {
		t.end()
		return
	}
	t.update(func() { t.last, t.pulling = "ACTIVATING", time.Now() })
	if !t.during("ACTIVATING", length(c.Times.Activating)) {
		t.end()
		return
	}
	container, err := c.Backend.Start(t.arn, t.ip, t.env)
	if err != nil {
		t.update(func() { t.stop("TaskFailedToStart", "CannotStartContainerError: "+err.Error()) })
		t.end()
		return
	}
	t.update(func() { t.container = container })
	reported := time.NewTimer(length(c.Times.Reporting))
	defer reported.Stop()
	failing := time.NewTimer(forever)
	defer failing.Stop()
	for running := true; running; {
		select {
		case <-reported.C:
			t.update(func() { t.last, t.started = "RUNNING", time.Now() })
			if t.fate.FailIn == "RUNNING" {
				failing.Reset(t.fate.After)
			}
		case <-failing.C:
			t.update(func() { t.stop(t.fate.code("EssentialContainerExited"), t.fate.Reason) })
		case <-container.Exited():
			t.update(func() { t.stop("EssentialContainerExited", "Essential container in task exited") })
			running = false
		case <-t.stopNow:
			running = false
		}
	}
	t.update(func() { t.last = "DEACTIVATING" })
	select {
	case <-time.After(length(c.Times.Deactivating)):
	case <-c.ending:
	}
	t.update(func() { t.last = "STOPPING" })
	container.Stop(false)
	select {
	case <-container.Exited():
	case <-time.After(t.stopTimeout):
		container.Stop(true)
		<-container.Exited()
	case <-c.ending:
		container.Stop(true)
		<-container.Exited()
	}
	code := container.ExitCode()
	t.update(func() { t.exitCode, t.exited = &code, time.Now() })
	t.end()
}

// during waits, and returns false if the task is stopped meanwhile, or fails as its
// Fate says.
func (t *task) during(state string, d time.Duration) bool {
	select {
	case <-time.After(d):
	case <-t.stopNow:
		return false
	}
	if t.fate.FailIn == state {
		t.update(func() { t.stop(t.fate.code("TaskFailedToStart"), t.fate.Reason) })
		return false
	}
	return true
}

// end deletes the network interface.
func (t *task) end() {
	t.update(func() { t.last = "DEPROVISIONING" })
	select {
	case <-time.After(length(t.cloud.Times.Deprovisioning)):
	case <-t.cloud.ending:
	}
	t.update(func() { t.last, t.attached, t.stoppedAt = "STOPPED", false, time.Now() })
}

func (t *task) update(f func()) {
	t.cloud.mu.Lock()
	defer t.cloud.mu.Unlock()
	t.version++
	f()
}

// stop sets the desired status to STOPPED. The first reason stays.
func (t *task) stop(code, reason string) {
	if t.desired == "STOPPED" {
		return
	}
	t.version++
	t.desired, t.stopCode, t.reason, t.stopping = "STOPPED", code, reason, time.Now()
	close(t.stopNow)
}

// json returns the task as in DescribeTasks (API_Task).
func (t *task) json(tags bool) any {
	seconds := func(at time.Time) float64 { return float64(at.Add(t.cloud.ClockOffset).UnixMilli()) / 1000 }
	details := []keyValue{{"subnetId", t.subnet}}
	interfaces := []any{}
	status := "PRECREATED"
	switch {
	case t.attached:
		status = "ATTACHED"
		details = append(details, keyValue{"networkInterfaceId", t.eni}, keyValue{"macAddress", "0a:" + colons(t.eni[4:14])},
			keyValue{"privateDnsName", "ip-" + strings.ReplaceAll(t.ip, ".", "-") + "." + Region + ".compute.internal"})
		if strings.Contains(t.ip, ":") {
			interfaces = append(interfaces, map[string]any{"attachmentId": t.attachment, "ipv6Address": t.ip}) // API_NetworkInterface
			break
		}
		details = append(details, keyValue{"privateIPv4Address", t.ip})
		interfaces = append(interfaces, map[string]any{"attachmentId": t.attachment, "privateIpv4Address": t.ip})
	case t.last == "STOPPED":
		status = "DELETED"
	}
	containers := []any{}
	for _, d := range t.def.ContainerDefinitions {
		container := map[string]any{
			"name": d.Name, "taskArn": t.arn, "lastStatus": t.containerStatus(), "cpu": "0", "networkInterfaces": interfaces,
			"containerArn": strings.Replace(t.arn, ":task/", ":container/", 1) + "/" + t.attachment, "image": d.Image,
		}
		if t.exitCode != nil {
			container["exitCode"] = *t.exitCode
		}
		if t.containerReason != "" {
			container["reason"] = t.containerReason
		}
		containers = append(containers, container)
	}
	out := map[string]any{
		"taskArn": t.arn, "clusterArn": clusterARN(t.cluster), "taskDefinitionArn": t.def.TaskDefinitionArn,
		"lastStatus": t.last, "desiredStatus": t.desired, "version": t.version, "startedBy": t.in.StartedBy,
		"createdAt": seconds(t.created), "cpu": t.def.CPU, "memory": t.def.Memory, "availabilityZone": zoneOf(t.subnet),
		"group": "family:" + t.def.Family, "enableExecuteCommand": false, "platformVersion": "1.4.0", "platformFamily": "Linux",
		"attachments": []any{map[string]any{"id": t.attachment, "type": "ElasticNetworkInterface", "status": status, "details": details}},
		"containers":  containers,
		"overrides":   json.RawMessage("{}"),
		"tags":        []tag{},
	}
	if len(t.in.Overrides) > 0 {
		out["overrides"] = t.in.Overrides
	}
	architecture := "x86_64"
	if p := t.def.RuntimePlatform; p != nil && p.CPUArchitecture == "ARM64" {
		architecture = "arm64"
	}
	out["attributes"] = []keyValue{{"ecs.cpu-architecture", architecture}}
	if t.spot {
		out["capacityProviderName"] = "FARGATE_SPOT"
	} else {
		out["launchType"] = "FARGATE"
	}
	if tags && t.tagsExist && t.in.Tags != nil {
		out["tags"] = t.in.Tags
	}
	for name, at := range map[string]time.Time{"pullStartedAt": t.pulling, "startedAt": t.started, "executionStoppedAt": t.exited} {
		if !at.IsZero() {
			out[name] = seconds(at)
		}
	}
	if t.desired == "STOPPED" {
		out["stopCode"], out["stoppedReason"], out["stoppingAt"] = t.stopCode, t.reason, seconds(t.stopping)
	}
	if t.last == "STOPPED" {
		out["stoppedAt"] = seconds(t.stoppedAt)
	}
	return out
}

// containerStatus returns the status of the task's container.
func (t *task) containerStatus() string {
	switch t.last {
	case "PROVISIONING", "PENDING", "ACTIVATING":
		return "PENDING"
	case "RUNNING", "DEACTIVATING", "STOPPING":
		return "RUNNING"
	}
	return "STOPPED"
}

// colons formats hexadecimal digits as a MAC address.
func colons(digits string) string {
	var pairs []string
	for i := 0; i+2 <= len(digits); i += 2 {
		pairs = append(pairs, digits[i:i+2])
	}
	return strings.Join(pairs, ":")
}
