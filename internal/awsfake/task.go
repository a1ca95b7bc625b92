package awsfake

import (
	"encoding/json"
	"time"
)

// A task is one, from RunTask until an hour after it has stopped. All but what
// it was made with is guarded by the cloud's lock.
type task struct {
	cloud     *Cloud
	in        runTask
	arn, def  string
	owner     string // user+profile
	env       map[string]string
	subnet    string
	groups    []string
	spot      bool
	public    bool
	eni, ip   string
	created   time.Time
	tagsExist bool
	fate      Fate

	last, desired    string
	version          int
	attached         bool
	stopNow          chan struct{} // closed when desired becomes STOPPED
	stopping         time.Time     // when it did
	stoppedAt        time.Time
	stopCode, reason string
	exitCode         *int
}

// live takes the task through its states.
func (t *task) live() {
	c := t.cloud
	if !t.during("PROVISIONING", c.Times.Provisioning()) {
		t.end()
		return
	}
	if t.fate.NoAddress {
		<-t.stopNow
		t.end()
		return
	}
	t.update(func() { t.attached, t.last = true, "PENDING" })
	if !t.during("PENDING", c.Times.Pending()) {
		t.end()
		return
	}
	t.update(func() { t.last = "ACTIVATING" })
	if !t.during("ACTIVATING", c.Times.Activating()) {
		t.end()
		return
	}
	container, err := c.Backend.Start(t.arn, t.ip, t.env)
	if err != nil {
		t.update(func() { t.stop("TaskFailedToStart", "CannotStartContainerError: "+err.Error()) })
		t.end()
		return
	}
	reported := time.NewTimer(c.Times.Reporting())
	defer reported.Stop()
	for running := true; running; {
		select {
		case <-reported.C:
			t.update(func() { t.last = "RUNNING" })
			if t.fate.FailIn == "RUNNING" {
				t.update(func() { t.stop("EssentialContainerExited", t.fate.Reason) })
			}
		case <-container.Exited():
			t.update(func() { t.stop("EssentialContainerExited", "Essential container in task exited") })
			running = false
		case <-t.stopNow:
			running = false
		}
	}
	t.update(func() { t.last = "STOPPING" })
	container.Stop(false)
	select {
	case <-container.Exited():
	case <-time.After(c.StopTimeout):
		container.Stop(true)
		<-container.Exited()
	case <-c.ending:
		container.Stop(true)
		<-container.Exited()
	}
	code := container.ExitCode()
	t.update(func() { t.exitCode = &code })
	t.end()
}

// during waits, and returns false if the task is to stop, or fails as is its
// fate.
func (t *task) during(state string, d time.Duration) bool {
	select {
	case <-time.After(d):
	case <-t.stopNow:
		return false
	}
	if t.fate.FailIn == state {
		t.update(func() { t.stop("TaskFailedToStart", t.fate.Reason) })
		return false
	}
	return true
}

// end takes the network interface away.
func (t *task) end() {
	t.update(func() { t.last = "DEPROVISIONING" })
	select {
	case <-time.After(t.cloud.Times.Deprovisioning()):
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

// stop has it stop. The first reason stays.
func (t *task) stop(code, reason string) {
	if t.desired == "STOPPED" {
		return
	}
	t.desired, t.stopCode, t.reason, t.stopping = "STOPPED", code, reason, time.Now()
	close(t.stopNow)
}

// json is the task as DescribeTasks shows it (API_Task).
func (t *task) json(tags bool) any {
	seconds := func(at time.Time) float64 { return float64(at.Add(t.cloud.ClockOffset).UnixMilli()) / 1000 }
	details := []keyValue{{"subnetId", t.subnet}}
	status := "PRECREATED"
	switch {
	case t.attached:
		status = "ATTACHED"
		details = append(details, keyValue{"networkInterfaceId", t.eni}, keyValue{"macAddress", "0a:00:00:00:00:01"},
			keyValue{"privateDnsName", "ip.eu-west-1.compute.internal"}, keyValue{"privateIPv4Address", t.ip})
	case t.last == "STOPPED":
		status = "DELETED"
	}
	container := map[string]any{
		"name": "bastion", "taskArn": t.arn, "lastStatus": t.last, "cpu": "0", "networkInterfaces": []any{},
		"containerArn": arn("ecs", "container/"+Cluster+"/x"), "image": "bastion",
	}
	if t.attached {
		container["networkInterfaces"] = []any{map[string]any{"attachmentId": "a", "privateIpv4Address": t.ip}}
	}
	if t.exitCode != nil {
		container["exitCode"] = *t.exitCode
	}
	out := map[string]any{
		"taskArn": t.arn, "clusterArn": clusterARN(), "taskDefinitionArn": arn("ecs", "task-definition/"+t.def),
		"lastStatus": t.last, "desiredStatus": t.desired, "version": t.version, "startedBy": t.in.StartedBy,
		"createdAt": seconds(t.created), "cpu": "256", "memory": "512", "availabilityZone": zoneOf(t.subnet),
		"group": "family:sallyport-bastion", "enableExecuteCommand": false, "platformVersion": "1.4.0", "platformFamily": "Linux",
		"attachments": []any{map[string]any{"id": "a", "type": "ElasticNetworkInterface", "status": status, "details": details}},
		"containers":  []any{container},
		"overrides":   json.RawMessage("{}"),
		"tags":        []tag{},
	}
	if len(t.in.Overrides) > 0 {
		out["overrides"] = t.in.Overrides
	}
	if t.spot {
		out["capacityProviderName"] = "FARGATE_SPOT"
	} else {
		out["launchType"] = "FARGATE"
	}
	if tags && t.tagsExist && t.in.Tags != nil {
		out["tags"] = t.in.Tags
	}
	if t.desired == "STOPPED" {
		out["stopCode"], out["stoppedReason"], out["stoppingAt"] = t.stopCode, t.reason, seconds(t.stopping)
	}
	if t.last == "STOPPED" {
		out["stoppedAt"] = seconds(t.stoppedAt)
	}
	return out
}
