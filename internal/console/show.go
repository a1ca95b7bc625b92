package console

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

// This file holds the commands that show state. The names of the JSON fields are
// documented in docs/console.md and stable.

// bastionJSON is a bastion in JSON output.
type bastionJSON struct {
	User        string     `json:"user,omitempty"`
	Profile     string     `json:"profile"`
	State       string     `json:"state"` // starting or running
	Since       *time.Time `json:"since"`
	Generation  int64      `json:"generation"`
	Task        string     `json:"task,omitempty"`
	Idle        float64    `json:"idle_seconds"`
	MaxLife     float64    `json:"max_life_seconds"`
	Connections int        `json:"connections"` // of the gateways that have answered
}

// describeBastion returns b with the number of its connections.
func describeBastion(b bastion.Status, connections []Connection) bastionJSON {
	out := bastionJSON{
		User: b.Owner.User, Profile: b.Owner.Profile, State: "starting", Since: jsonTime(b.Entry.Since),
		Generation: b.Entry.Generation, Task: b.Entry.Task.ID, Idle: b.Idle.Seconds(), MaxLife: b.MaxLife.Seconds(),
	}
	if b.Entry.State == bastion.Running {
		out.State = "running"
	}
	for _, c := range connections {
		if c.connectsTo(b.Owner) {
			out.Connections++
		}
	}
	return out
}

// connectsTo returns a function that reports whether a connection is to the owner's
// bastion.
func connectsTo(owner bastion.Owner) func(gateway.Connection) bool {
	return func(c gateway.Connection) bool {
		return !c.Console && c.Identity.User == owner.User && c.Identity.Profile == owner.Profile
	}
}

// liveBastions returns the user's bastions that are starting or running. With an error,
// the list may be incomplete.
func (s *session) liveBastions(user string) ([]bastion.Status, error) {
	all, err := s.console.Bastions.Status(s.conn.ctx, user)
	return slices.DeleteFunc(all, func(b bastion.Status) bool { return b.Entry.State == bastion.Idle }), err
}

func (s *session) status(c call) error {
	mine, err := s.liveBastions(s.identity.User)
	if err != nil {
		return err
	}
	entries := []bastionJSON{}
	var connections []Connection
	if len(mine) > 0 {
		var a answers
		connections, a = s.ownConnections()
		s.showGaps(&a, "its connections are not counted")
	}
	for _, b := range mine {
		e := describeBastion(b, connections)
		e.User = ""
		e.Task = shortTaskID(e.Task)
		entries = append(entries, e)
	}
	if c.json {
		return s.writeJSON(entries)
	}
	if len(entries) == 0 {
		return s.say("No bastion of yours is running. The next login to one starts it.")
	}
	return s.table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "PROFILE\tSTATE\tFOR\tGEN\tCONNS\tIDLE\tLIFE\tTASK")
		for i, e := range entries {
			b := mine[i]
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n", e.Profile, e.State, age(b.Entry.Since), e.Generation, e.Connections,
				shortDuration(b.Idle), shortDuration(b.MaxLife), sanitize(taskColumn(e.Task)))
		}
	})
}

// taskColumn returns a task's id for a table.
func taskColumn(id string) string {
	if id == "" {
		return "-"
	}
	return shortTaskID(id)
}

// shortTaskID returns the last part of an ARN, without the account and the cluster, which
// only administrators may see.
func shortTaskID(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

// Connection is a connection in JSON output.
type Connection struct {
	User          string     `json:"-"`
	ID            string     `json:"id"`
	Gateway       string     `json:"gateway,omitempty"`
	Since         *time.Time `json:"since"`
	Client        string     `json:"client,omitempty"`
	ClientVersion string     `json:"client_version"`
	Profile       string     `json:"profile"`
	Console       bool       `json:"console"`
	FromClient    int64      `json:"bytes_from_client"`
	ToClient      int64      `json:"bytes_to_client"`
	Channels      []Channel  `json:"channels"`
}

// Channel is a channel of a connection.
type Channel struct {
	Number     int        `json:"channel"`
	Kind       string     `json:"kind"`
	Runs       string     `json:"runs,omitempty"`
	Command    string     `json:"command,omitempty"`
	Since      *time.Time `json:"since"`
	FromClient int64      `json:"bytes_from_client"`
	ToClient   int64      `json:"bytes_to_client"`
}

// compare orders connections by age.
func (c Connection) compare(other Connection) int {
	if c.Since == nil || other.Since == nil {
		return strings.Compare(c.ID, other.ID)
	}
	return cmp.Or(c.Since.Compare(*other.Since), strings.Compare(c.ID, other.ID))
}

// connectsTo reports whether the connection is to the owner's bastion.
func (c Connection) connectsTo(owner bastion.Owner) bool {
	return !c.Console && c.User == owner.User && c.Profile == owner.Profile
}

// describeConnection returns c. The command lines of its channels are included only if
// commands is set: they are shown to the connection's own user only.
func (s *session) describeConnection(c gateway.Connection, commands bool) Connection {
	out := Connection{
		User: c.Identity.User, Gateway: s.self(),
		ID: c.ID(), Since: jsonTime(c.Since), ClientVersion: c.ClientVersion, Profile: c.Identity.Profile, Console: c.Console,
		FromClient: c.FromClient, ToClient: c.ToClient, Channels: []Channel{},
	}
	if c.Identity.Client.IsValid() {
		out.Client = c.Identity.Client.String()
	}
	for _, ch := range c.Channels {
		entry := Channel{Number: ch.Number, Kind: ch.Kind, Runs: ch.Runs, Since: jsonTime(ch.Since), FromClient: ch.ToBastion, ToClient: ch.ToClient}
		if commands {
			entry.Command = ch.Command
		}
		out.Channels = append(out.Channels, entry)
	}
	return out
}

// connectionHeading has the longest column last, where it widens no other.
func connectionHeading(several bool) string {
	heading := "ID\tFOR\tPROFILE\tUP\tDOWN\tFROM\tCLIENT"
	if several {
		heading += "\tGATEWAY"
	}
	return heading
}

// row returns a connection as a row under connectionHeading. Other gateways are not trusted
// to send text that is safe for a terminal.
func row(c Connection, several bool) string {
	software, _, _ := strings.Cut(strings.TrimPrefix(c.ClientVersion, "SSH-2.0-"), " ") // without the comment
	text := fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s", sanitize(c.ID), ageOf(c.Since), sanitize(c.Profile),
		size(c.FromClient), size(c.ToClient), sanitize(c.Client), sanitize(software))
	if several {
		text += "\t" + sanitize(c.Gateway)
	}
	return text
}

func (s *session) sessions(c call) error {
	mine, a := s.ownConnections()
	s.showGaps(&a, "its connections are not shown")
	if c.json {
		return s.writeJSON(mine)
	}
	return s.table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, connectionHeading(a.several))
		for _, c := range mine {
			mark := ""
			if c.Gateway == s.self() && c.ID == s.identity.ConnID {
				mark = " (this one)"
			}
			fmt.Fprintf(w, "%s%s\n", row(c, a.several), mark)
			for _, ch := range c.Channels {
				text := sanitize(ch.Kind)
				if ch.Runs != "" {
					text += ": " + sanitize(strings.TrimSpace(ch.Runs+" "+ch.Command))
				}
				fmt.Fprintf(w, "  #%d\t%s\t\t%s\t%s\t%s\n", ch.Number, ageOf(ch.Since), size(ch.FromClient), size(ch.ToClient), text)
			}
		}
	})
}

func (s *session) log(c call) error {
	if s.console.Recent == nil {
		return userError("This gateway keeps no log for the console.")
	}
	events := s.console.Recent.of(s.identity.User)
	n := c.last
	if n == 0 {
		n = 20
	}
	events = events[max(0, len(events)-n):]
	if c.json {
		return s.writeJSON(append([]Event{}, events...))
	}
	return s.table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "TIME (UTC)\tID\tFROM\tEVENT")
		for _, e := range events {
			from, id := e.Client, e.Conn
			if from == "" {
				from = "-"
			}
			if id == "" {
				id = "-"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", e.Time.UTC().Format(time.DateTime), id, from, sanitize(e.Text()))
		}
	})
}

// Text describes the event in a few words.
func (e Event) Text() string {
	words := []string{string(e.Type)}
	if e.Profile != "" && e.Profile != "default" {
		words = append(words, "+"+e.Profile)
	}
	for _, w := range []string{e.Kind, e.Subsystem, e.Command, e.Destination, e.Listener} {
		if w != "" {
			words = append(words, w)
		}
	}
	if e.Times > 1 {
		words = append(words, fmt.Sprintf("%d times", e.Times))
	}
	if e.ExitStatus != nil {
		words = append(words, fmt.Sprintf("status %d", *e.ExitStatus))
	}
	if e.ExitSignal != "" {
		words = append(words, "signal "+e.ExitSignal)
	}
	if e.By != "" {
		words = append(words, "by "+e.By)
	}
	if e.Rule != "" {
		words = append(words, "rule: "+e.Rule)
	}
	return strings.Join(words, " ")
}

// A Login is a user's login, with its permissions.
type Login struct {
	User            string   `json:"user"`
	Key             string   `json:"key"`
	Client          string   `json:"client,omitempty"`
	Conn            string   `json:"conn"`
	Roles           []string `json:"roles"`
	Admin           bool     `json:"admin"`
	PTY             bool     `json:"pty"`
	PortForwarding  bool     `json:"port_forwarding"`
	AgentForwarding bool     `json:"agent_forwarding"`
	X11Forwarding   bool     `json:"x11_forwarding"`
	UserRC          bool     `json:"user_rc"`
	PermitOpen      []string `json:"permit_open"`
	PermitListen    []string `json:"permit_listen"`
	Shell           bool     `json:"shell"`
	Exec            bool     `json:"exec"`
	SFTP            bool     `json:"sftp"`
	Destinations    []string `json:"destinations"`
	Listen          []string `json:"listen"`
	RequirePTY      bool     `json:"require_pty"`
}

// describeLogin describes the login of this session.
func (s *session) describeLogin() Login {
	id, p := s.identity, s.identity.Permissions
	roles, admin := s.roles()
	return Login{
		id.User, id.Key, source(id.Client.String(), id.Client.IsValid()), id.ConnID, append([]string{}, roles...), admin,
		p.PTY, p.PortForwarding, p.AgentForwarding, p.X11Forwarding, p.UserRC,
		append([]string{}, p.PermitOpen...), append([]string{}, p.PermitListen...),
		!p.NoShell, !p.NoExec, !p.NoSFTP, append([]string{}, p.Destinations...), append([]string{}, p.Listen...), p.RequirePTY,
	}
}

// roles returns the names of the user's roles, and whether she is an administrator.
func (s *session) roles() (names []string, admin bool) {
	if s.console.Roles == nil {
		return nil, false
	}
	return s.console.Roles(s.identity)
}

func (s *session) whoami(c call) error {
	id, p := s.identity, s.identity.Permissions
	roles, admin := s.roles()
	if c.json {
		return s.writeJSON(s.describeLogin())
	}
	list := func(of []string, none string) string {
		if len(of) == 0 {
			return none
		}
		return sanitize(strings.Join(of, " "))
	}
	var may []string
	for _, m := range []struct {
		is   bool
		name string
	}{{!p.NoShell, "shell"}, {!p.NoExec, "commands"}, {!p.NoSFTP, "sftp"}, {p.PTY, "terminal"}, {p.PortForwarding, "port forwarding"}, {p.AgentForwarding, "agent forwarding"}, {p.X11Forwarding, "X11 forwarding"}, {p.UserRC, "~/.ssh/rc"}} {
		if m.is {
			may = append(may, m.name)
		}
	}
	return s.table(func(w *tabwriter.Writer) {
		fmt.Fprintf(w, "user\t%s\n", sanitize(id.User))
		fmt.Fprintf(w, "key\t%s\n", sanitize(id.Key))
		fmt.Fprintf(w, "from\t%s\n", source(id.Client.String(), id.Client.IsValid()))
		fmt.Fprintf(w, "connection\t%s\n", id.ConnID)
		fmt.Fprintf(w, "roles\t%s\n", list(roles, "none"))
		if admin {
			fmt.Fprintln(w, "\tadministrator")
		}
		fmt.Fprintf(w, "this login may use\t%s\n", strings.Join(may, ", "))
		if p.RequirePTY {
			fmt.Fprintln(w, "\tshell and commands with a terminal only")
		}
		if p.PortForwarding {
			fmt.Fprintf(w, "destinations of the key\t%s\n", list(p.PermitOpen, "any"))
			fmt.Fprintf(w, "destinations of the roles\t%s\n", list(p.Destinations, "any"))
			fmt.Fprintf(w, "listeners of the key\t%s\n", list(p.PermitListen, "any"))
			fmt.Fprintf(w, "listeners of the roles\t%s\n", list(p.Listen, "any"))
		}
	})
}

func source(addr string, valid bool) string {
	if !valid {
		return ""
	}
	return addr
}

// say writes one sentence.
func (s *session) say(text string) error {
	_, err := fmt.Fprintln(s.out, text)
	return err
}

func (s *session) bastions(c call) error {
	all, err := s.console.Bastions.List(s.conn.ctx)
	connections, a := s.allConnections()
	s.showGaps(&a, "its connections are not counted")
	entries := []bastionJSON{}
	for _, b := range all {
		entries = append(entries, describeBastion(b, connections))
	}
	if c.json {
		if writeErr := s.writeJSON(entries); writeErr != nil {
			return writeErr
		}
		return err // after the bastions that are known
	}
	tableErr := s.table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "USER\tPROFILE\tSTATE\tFOR\tGEN\tCONNS\tTASK")
		for i, e := range entries {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%s\n", sanitize(e.User), sanitize(e.Profile), e.State, age(all[i].Entry.Since), e.Generation,
				e.Connections, sanitize(taskColumn(e.Task)))
		}
	})
	if err == nil {
		err = tableErr
	}
	return err
}

// gatewayJSON is a gateway in JSON output.
type gatewayJSON struct {
	ID           string     `json:"id"`
	Version      string     `json:"version"`
	State        string     `json:"state"` // up, draining or lost
	Self         bool       `json:"self"`
	SameSettings bool       `json:"same_settings"`
	Connections  int        `json:"connections"`
	Since        *time.Time `json:"since"`
	Seen         *time.Time `json:"seen"`
	Address      string     `json:"address,omitempty"`
	Answers      *bool      `json:"answers,omitempty"` // nil: none was asked
}

func describeGateway(g FleetGateway) gatewayJSON {
	e := gatewayJSON{
		ID: g.ID, Version: g.Version, State: "up", Self: g.Self, SameSettings: g.SameSettings,
		Connections: g.Connections, Since: jsonTime(g.Started), Seen: jsonTime(g.Seen), Address: g.Address,
	}
	switch {
	case time.Since(g.Seen) > lostAfter:
		e.State = "lost"
	case g.Draining:
		e.State = "draining"
	}
	return e
}

func (s *session) gateways(c call) error {
	all, old := s.list()
	if len(all) == 0 && old {
		return userError("The list of gateways cannot be read. Try again in a minute.")
	}
	a := s.askThese(all, old, "gateways --json")
	live := map[string]gatewayJSON{}
	decode(s, &a, func(from FleetGateway, theirs []gatewayJSON) {
		if len(theirs) == 1 {
			live[from.ID] = theirs[0]
		}
	})
	entries := []gatewayJSON{}
	for _, g := range all {
		e := describeGateway(g)
		now, ok := live[g.ID]
		if ok {
			e.Connections = now.Connections
		}
		ok = ok || g.Self
		e.Answers = &ok
		entries = append(entries, e)
	}
	if old {
		fmt.Fprintln(s.err, "The list of gateways cannot be read, so this is an earlier one.")
	}
	if c.json {
		return s.writeJSON(entries)
	}
	return s.table(func(w *tabwriter.Writer) { writeGateways(w, entries) })
}

// PrintFleet prints gateways as the gateways command does, without asking any of them.
func PrintFleet(to io.Writer, all []FleetGateway, asJSON bool) error {
	entries := []gatewayJSON{}
	for _, g := range all {
		entries = append(entries, describeGateway(g))
	}
	if asJSON {
		return writeJSON(to, entries)
	}
	return table(to, func(w *tabwriter.Writer) { writeGateways(w, entries) })
}

// writeGateways writes a table of gateways.
func writeGateways(w io.Writer, entries []gatewayJSON) {
	fmt.Fprintln(w, "GATEWAY\tSTATE\tANSWERS\tUP\tSEEN\tCONNS\tSETTINGS\tADDRESS\tVERSION")
	for _, e := range entries {
		id, settings, answers := e.ID, "same", "-"
		if e.Self {
			id += " (this)"
		}
		if !e.SameSettings {
			settings = "differ"
		}
		if e.Answers != nil {
			answers = map[bool]string{true: "yes", false: "no"}[*e.Answers]
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", sanitize(id), e.State, answers, ageOf(e.Since), ageOf(e.Seen),
			e.Connections, settings, cmp.Or(sanitize(e.Address), "-"), sanitize(shortVersion(e.Version)))
	}
}

// shortVersion returns the release in the version of a gateway, which also has the names of
// the program and of its platform.
func shortVersion(version string) string {
	release, _, _ := strings.Cut(strings.TrimPrefix(version, "sallyport gateway "), " go1.")
	return release
}

// userJSON is a user with her connections, in JSON output.
type userJSON struct {
	User        string       `json:"user"`
	Connections []Connection `json:"connections"`
}

func (s *session) users(c call) error {
	all, a := s.allConnections()
	s.showGaps(&a, "its connections are not shown")
	if c.json {
		entries := []userJSON{}
		for _, c := range all {
			if n := len(entries); n == 0 || entries[n-1].User != c.User {
				entries = append(entries, userJSON{User: c.User})
			}
			last := &entries[len(entries)-1]
			last.Connections = append(last.Connections, c)
		}
		return s.writeJSON(entries)
	}
	return s.table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "USER\t"+connectionHeading(a.several))
		for _, c := range all {
			fmt.Fprintf(w, "%s\t%s\n", sanitize(c.User), row(c, a.several))
		}
	})
}
