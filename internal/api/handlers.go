package api

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/console"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// routes are all methods and paths. openapi.json describes them.
var routes = []route{
	{pattern: "GET /v1/openapi.json", serve: (*request).openAPI, public: true},
	{pattern: "GET /v1/whoami", serve: (*request).whoami},
	{pattern: "GET /v1/bastions", serve: (*request).list, params: []string{"user", "profile", "state"}},
	{pattern: "POST /v1/bastions/{owner}", serve: (*request).start},
	{pattern: "GET /v1/bastions/{owner}", serve: (*request).find},
	{pattern: "DELETE /v1/bastions/{owner}", serve: (*request).stop},
	{pattern: "GET /v1/connections", serve: (*request).connections, params: []string{"user"}},
	{pattern: "GET /v1/events", serve: (*request).events, params: []string{"last"}},
}

const (
	// startWait is how long a POST waits for a bastion unless it prefers another time,
	// and maxWait the longest time that it may prefer.
	startWait = 2 * time.Second
	maxWait   = 10 * time.Minute
	// pollInterval is the time after which a client is told to ask again.
	pollInterval = 4 * time.Second

	defaultEvents, maxEvents = 20, 100
)

//go:embed openapi.json
var openAPI []byte

func (q *request) openAPI() error {
	q.writeText(http.StatusOK, "application/json", openAPI)
	return nil
}

// caller is the user on the console.
func (q *request) caller() console.Caller {
	return q.server.Console.Caller(q.Context(), q.id, q.call.Log())
}

func (q *request) admin() bool { return q.id.Permissions.Admin }

// refuse audits a request that is for administrators only.
func (q *request) refuse() error {
	err := q.call.Audit(audit.Event{Type: audit.Refused, Kind: "exec", Command: q.commandLine(), By: "gateway", Rule: "not an administrator"})
	return cmp.Or[error](err, errAdminOnly)
}

// owner returns the owner that the path names, as before the "@" of ssh. Only administrators
// may name others.
func (q *request) owner() (bastion.Owner, error) {
	user, profile, both := strings.Cut(q.PathValue("owner"), "+")
	if !both {
		profile = "default"
	}
	owner := bastion.Owner{User: user, Profile: profile}
	if auth.CheckUser(user) != nil || profile == "" || len(profile) > maxName {
		return owner, errOwner
	}
	if user != q.id.User && !q.admin() {
		return owner, q.refuse()
	}
	return owner, nil
}

func (q *request) whoami() error { return q.answer(http.StatusOK, q.caller().Login()) }

// A Bastion is a bastion in an answer.
type Bastion struct {
	User       string     `json:"user"`
	Profile    string     `json:"profile"`
	State      string     `json:"state"` // starting or running
	Since      *time.Time `json:"since"`
	Generation int64      `json:"generation"`
	Task       string     `json:"task,omitempty"`
	Idle       float64    `json:"idle_seconds"`
	MaxLife    float64    `json:"max_life_seconds"`
	// UsualStart is the usual duration of a start, while the bastion starts; zero if it
	// is not known.
	UsualStart float64 `json:"usual_start_seconds,omitempty"`
	// SSH says how to connect, once the bastion runs.
	SSH *SSH `json:"ssh,omitempty"`
}

// SSH says how its user connects to a bastion.
type SSH struct {
	Command  string    `json:"command"`
	User     string    `json:"user"`
	Host     string    `json:"host"`
	Port     int       `json:"port"`
	HostKeys []HostKey `json:"host_keys"`
	// Config is a section of ssh_config(5).
	Config string `json:"config"`
}

// A HostKey is a host key of the gateway.
type HostKey struct {
	Type        string `json:"type"`
	Fingerprint string `json:"fingerprint"`
	// KnownHosts is the key's line for known_hosts.
	KnownHosts string `json:"known_hosts"`
}

// describe describes a bastion that runs or is starting.
func (q *request) describe(b bastion.Status) (Bastion, error) {
	out := Bastion{
		User: b.Owner.User, Profile: b.Owner.Profile, State: "starting", Generation: b.Entry.Generation,
		Task: b.Entry.Task.ID, Idle: b.Idle.Seconds(), MaxLife: b.MaxLife.Seconds(),
	}
	if !b.Entry.Since.IsZero() {
		since := b.Entry.Since.UTC().Truncate(time.Second)
		out.Since = &since
	}
	if !q.admin() { // as on the console: without the account and the cluster
		out.Task = out.Task[strings.LastIndexByte(out.Task, '/')+1:]
	}
	if b.Entry.State != bastion.Running {
		out.UsualStart = q.server.Bastions.UsualStart(b.Owner.Profile).Seconds()
		return out, nil
	}
	out.State = "running"
	var err error
	out.SSH, err = q.ssh(b.Owner)
	return out, err
}

func (q *request) ssh(owner bastion.Owner) (*SSH, error) {
	host, port, err := q.settings.sshAddress(q.Host)
	if err != nil {
		return nil, err
	}
	out := &SSH{User: owner.User, Host: host, HostKeys: []HostKey{}}
	if out.Port, err = strconv.Atoi(port); err != nil {
		return nil, fmt.Errorf("the port of the SSH server: %w", err)
	}
	if owner.Profile != "default" {
		out.User = owner.String()
	}
	out.Command = fmt.Sprintf("ssh -p %d %s@%s", out.Port, out.User, host)
	out.Config = fmt.Sprintf("Host bastion-%s\n  HostName %s\n  Port %d\n  User %s\n", out.User, host, out.Port, out.User)
	address := net.JoinHostPort(host, port)
	for _, key := range q.settings.HostKeys {
		out.HostKeys = append(out.HostKeys, HostKey{key.Type(), ssh.FingerprintSHA256(key), knownhosts.Line([]string{address}, key)})
	}
	return out, nil
}

// status returns the state of the owner's bastion, or errGone. A start that has just begun
// may not be in the ledger yet; begun says that the caller knows of one.
func (q *request) status(owner bastion.Owner, begun bool) (bastion.Status, error) {
	starting, failed := q.server.starts.state(owner)
	all, err := q.server.Bastions.Status(q.Context(), owner.User)
	if err != nil {
		return bastion.Status{}, err
	}
	i := slices.IndexFunc(all, func(b bastion.Status) bool { return b.Owner == owner })
	switch {
	case i < 0:
		return bastion.Status{}, bastion.ErrNoProfile
	case all[i].Entry.State != bastion.Idle:
		return all[i], nil
	case starting || begun:
		all[i].Entry.State = bastion.Starting
		return all[i], nil
	case failed != nil:
		return bastion.Status{}, &problem{errGone.status, errGone.code, errGone.detail + " The last start has failed: " + failed.Detail}
	}
	return bastion.Status{}, errGone
}

func (q *request) find() error {
	owner, err := q.owner()
	if err != nil {
		return err
	}
	b, err := q.status(owner, false)
	if err != nil {
		return err
	}
	return q.answerBastion(http.StatusOK, b)
}

func (q *request) answerBastion(status int, b bastion.Status) error {
	out, err := q.describe(b)
	if err != nil {
		return err
	}
	return q.answer(status, out)
}

// start makes or finds a bastion, and waits for it for a short time, or as long as the client
// prefers (RFC 7240, section 4.3).
func (q *request) start() error {
	owner, err := q.owner()
	if err != nil {
		return err
	}
	wait, preferred, err := preferredWait(q.Header.Values("Prefer"))
	if err != nil {
		return err
	}
	var limits identity.Limits // none for an administrator, who starts it for the user
	if owner.User == q.id.User {
		permissions, err := q.call.MayUse(owner.Profile)
		if err != nil {
			return err
		}
		limits = permissions.Limits
	}
	dial := func(ctx context.Context, id identity.Identity) error {
		conn, err := q.server.Bastions.Dial(ctx, id, nil)
		if err == nil {
			conn.Close()
		}
		return err
	}
	st := q.server.starts.begin(owner, dial, limits, q.call)
	timer := time.NewTimer(wait)
	defer timer.Stop()
	running := false
	select {
	case <-st.done:
		switch {
		case st.failed == nil:
			running = true
		case !q.server.drains(): // otherwise the bastion goes on starting
			q.answerProblem(*st.failed)
			return nil
		}
	case <-timer.C:
	case <-q.server.draining:
	case <-q.Context().Done():
	}
	b, err := q.status(owner, true)
	if err != nil {
		return err
	}
	if preferred {
		q.w.Header().Set("Preference-Applied", "wait")
	}
	if running && b.Entry.State == bastion.Running {
		return q.answerBastion(http.StatusOK, b)
	}
	b.Entry.State = bastion.Starting
	q.w.Header().Set("Location", "/v1/bastions/"+owner.String())
	q.w.Header().Set("Retry-After", strconv.Itoa(int(pollInterval.Seconds())))
	return q.answerBastion(http.StatusAccepted, b)
}

// preferredWait returns the wait of a Prefer header, or startWait.
func preferredWait(headers []string) (wait time.Duration, preferred bool, err error) {
	for _, preference := range strings.Split(strings.Join(headers, ","), ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(preference), "=")
		if !strings.EqualFold(strings.TrimSpace(name), "wait") {
			continue
		}
		seconds, err := strconv.ParseUint(strings.TrimSpace(value), 10, 16)
		if err != nil {
			return 0, false, &problem{400, "parameter", "The header Prefer is not written like wait=60, with a number of seconds."}
		}
		return min(time.Duration(seconds)*time.Second, maxWait), true, nil
	}
	return startWait, false, nil
}

func (q *request) stop() error {
	owner, err := q.owner()
	if err != nil {
		return err
	}
	stopped, err := q.caller().Stop(owner)
	switch {
	case errors.Is(err, bastion.ErrGone):
		return errGone
	case errors.Is(err, bastion.ErrStarting):
		return errStarting
	case err != nil:
		return err
	}
	return q.answer(http.StatusOK, stopped)
}

// bastionsJSON is the answer of list.
type bastionsJSON struct {
	Bastions []Bastion `json:"bastions"`
	// Incomplete says that not all could be listed.
	Incomplete bool `json:"incomplete,omitempty"`
}

// list lists the bastions of the user, or, for an administrator, of all.
func (q *request) list() error {
	user, profile, state := q.FormValue("user"), q.FormValue("profile"), q.FormValue("state")
	if state != "" && state != "starting" && state != "running" {
		return &problem{400, "parameter", "The parameter state is starting or running."}
	}
	var all []bastion.Status
	var err error
	out := bastionsJSON{Bastions: []Bastion{}}
	switch {
	case user == "" && q.admin():
		if all, err = q.server.Bastions.List(q.Context()); err != nil {
			q.call.Log().Warn("not all bastions can be listed", "err", err)
			out.Incomplete, err = true, nil
		}
	case user == "" || user == q.id.User:
		all, err = q.server.Bastions.Status(q.Context(), q.id.User)
	case !q.admin():
		err = q.refuse()
	case auth.CheckUser(user) != nil:
		err = errOwner
	default:
		all, err = q.server.Bastions.Status(q.Context(), user)
	}
	if err != nil {
		return err
	}
	for _, b := range all {
		if b.Entry.State == bastion.Idle || profile != "" && b.Owner.Profile != profile {
			continue
		}
		described, err := q.describe(b)
		if err != nil {
			return err
		}
		if state == "" || described.State == state {
			out.Bastions = append(out.Bastions, described)
		}
	}
	return q.answer(http.StatusOK, out)
}

// A connection is a connection in an answer.
type connection struct {
	User string `json:"user"`
	console.Connection
}

// connectionsJSON is the answer of connections.
type connectionsJSON struct {
	Connections []connection `json:"connections"`
	// Missing are the gateways that did not answer.
	Missing []string `json:"missing,omitempty"`
}

// connections lists the connections of the user, or, for an administrator, of all, to all
// gateways.
func (q *request) connections() error {
	user := q.FormValue("user")
	if user != "" && user != q.id.User && !q.admin() {
		return q.refuse()
	}
	if user != "" && auth.CheckUser(user) != nil {
		return errOwner
	}
	all, missing := q.caller().Connections(q.admin() && user != q.id.User)
	out := connectionsJSON{Connections: []connection{}, Missing: missing}
	for _, c := range all {
		if user == "" || c.User == user {
			out.Connections = append(out.Connections, connection{c.User, c})
		}
	}
	return q.answer(http.StatusOK, out)
}

// eventsJSON is the answer of events.
type eventsJSON struct {
	Events []console.Event `json:"events"`
}

// events lists the last events of the user at this gateway, or streams them.
func (q *request) events() error {
	last := defaultEvents
	if text := q.FormValue("last"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > maxEvents {
			return &problem{400, "parameter", fmt.Sprintf("The parameter last is not a number from 1 to %d.", maxEvents)}
		}
		last = n
	}
	if acceptsStream(q.Header.Values("Accept")) {
		return q.stream(last)
	}
	return q.answer(http.StatusOK, eventsJSON{append([]console.Event{}, q.caller().Events(last)...)})
}
