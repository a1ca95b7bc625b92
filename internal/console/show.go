package console

import (
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

// This file holds the commands that show something. The names of JSON fields
// are documented in docs/console.md and do not change.

// bastionJSON is a bastion.
type bastionJSON struct {
	User        string     `json:"user,omitempty"`
	Profile     string     `json:"profile"`
	State       string     `json:"state"` // starting or running
	Since       *time.Time `json:"since"`
	Generation  int64      `json:"generation"`
	Task        string     `json:"task,omitempty"`
	Idle        float64    `json:"idle_seconds"`
	MaxLife     float64    `json:"max_life_seconds"`
	Connections int        `json:"connections"` // of this gateway
}

// describe returns b, and how many of the connections go to it.
func describe(b bastion.Status, connections []gateway.Connection) bastionJSON {
	out := bastionJSON{
		User: b.Owner.User, Profile: b.Owner.Profile, State: "starting", Since: moment(b.Entry.Since),
		Generation: b.Entry.Generation, Task: b.Entry.Task.ID, Idle: b.Idle.Seconds(), MaxLife: b.MaxLife.Seconds(),
	}
	if b.Entry.State == bastion.Running {
		out.State = "running"
	}
	for _, c := range connections {
		if into(b.Owner)(c) {
			out.Connections++
		}
	}
	return out
}

// into says whether a connection is one to the owner's bastion.
func into(owner bastion.Owner) func(gateway.Connection) bool {
	return func(c gateway.Connection) bool {
		return !c.Console && c.Identity.User == owner.User && c.Identity.Profile == owner.Profile
	}
}

// present returns the user's bastions that run or are being started, as far as
// is known.
func (s *session) present(user string) ([]bastion.Status, error) {
	all, err := s.Bastions.Status(s.ctx, user)
	return slices.DeleteFunc(all, func(b bastion.Status) bool { return b.Entry.State == bastion.Idle }), err
}

func (s *session) status(c call) error {
	mine, err := s.present(s.Identity.User)
	if err != nil {
		return err
	}
	connections := s.Gateway.Connections()
	entries := []bastionJSON{}
	for _, b := range mine {
		e := describe(b, connections)
		e.User = ""
		e.Task = lastPart(e.Task)
		entries = append(entries, e)
	}
	if c.json {
		return s.writeJSON(entries)
	}
	if len(entries) == 0 {
		return s.say("No bastion of yours is running. The next login to one starts it.")
	}
	return s.table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "PROFILE\tSTATE\tFOR\tGENERATION\tCONNECTIONS\tIDLE\tMAX LIFE\tTASK")
		for i, e := range entries {
			b := mine[i]
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n", e.Profile, e.State, age(b.Entry.Since), e.Generation, e.Connections,
				short(b.Idle), short(b.MaxLife), harmless(task(e.Task)))
		}
	})
}

// task shortens the name of a task: of an ARN what comes last is enough for
// people.
func task(id string) string {
	if id == "" {
		return "-"
	}
	return lastPart(id)
}

// lastPart leaves out of an ARN the account and the cluster, which are for admins
// only.
func lastPart(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

// connectionJSON is a connection.
type connectionJSON struct {
	ID            string        `json:"id"`
	Since         *time.Time    `json:"since"`
	Client        string        `json:"client,omitempty"`
	ClientVersion string        `json:"client_version"`
	Profile       string        `json:"profile"`
	Console       bool          `json:"console"`
	FromClient    int64         `json:"bytes_from_client"`
	ToClient      int64         `json:"bytes_to_client"`
	Channels      []channelJSON `json:"channels"`
}

// channelJSON is a channel of one.
type channelJSON struct {
	Number     int        `json:"channel"`
	Kind       string     `json:"kind"`
	Runs       string     `json:"runs,omitempty"`
	Command    string     `json:"command,omitempty"`
	Since      *time.Time `json:"since"`
	FromClient int64      `json:"bytes_from_client"`
	ToClient   int64      `json:"bytes_to_client"`
}

// connection describes c. What is run in it is shown to its own user only.
func connection(c gateway.Connection, commands bool) connectionJSON {
	out := connectionJSON{
		ID: c.ID(), Since: moment(c.Since), ClientVersion: c.ClientVersion, Profile: c.Identity.Profile, Console: c.Console,
		FromClient: c.FromClient, ToClient: c.ToClient, Channels: []channelJSON{},
	}
	if c.Identity.Client.IsValid() {
		out.Client = c.Identity.Client.String()
	}
	for _, ch := range c.Channels {
		entry := channelJSON{Number: ch.Number, Kind: ch.Kind, Runs: ch.Runs, Since: moment(ch.Since), FromClient: ch.ToBastion, ToClient: ch.ToClient}
		if commands {
			entry.Command = ch.Command
		}
		out.Channels = append(out.Channels, entry)
	}
	return out
}

const connectionHeading = "ID\tFOR\tFROM\tPROFILE\tUP\tDOWN\tCLIENT"

// row is a connection as a row under connectionHeading.
func row(c gateway.Connection) string {
	return fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s", c.ID(), age(c.Since), c.Identity.Client, c.Identity.Profile,
		size(c.FromClient), size(c.ToClient), harmless(strings.TrimPrefix(c.ClientVersion, "SSH-2.0-")))
}

func (s *session) sessions(c call) error {
	mine := slices.DeleteFunc(s.Gateway.Connections(), func(c gateway.Connection) bool { return c.Identity.User != s.Identity.User })
	entries := []connectionJSON{}
	for _, c := range mine {
		entries = append(entries, connection(c, true))
	}
	if c.json {
		return s.writeJSON(entries)
	}
	return s.table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, connectionHeading)
		for _, c := range mine {
			mark := ""
			if c.ID() == s.Identity.ConnID {
				mark = " (this one)"
			}
			fmt.Fprintf(w, "%s%s\n", row(c), mark)
			for _, ch := range c.Channels {
				what := harmless(ch.Kind)
				if ch.Runs != "" {
					what += ": " + harmless(strings.TrimSpace(ch.Runs+" "+ch.Command))
				}
				fmt.Fprintf(w, "  #%d\t%s\t%s\t\t%s\t%s\t\n", ch.Number, age(ch.Since), what, size(ch.ToBastion), size(ch.ToClient))
			}
		}
	})
}

func (s *session) log(c call) error {
	if s.Recent == nil {
		return sentence("This gateway keeps no log that could be shown here.")
	}
	events := s.Recent.of(s.Identity.User)
	n := c.last
	if n == 0 {
		n = 20
	}
	events = events[max(0, len(events)-n):]
	if c.json {
		return s.writeJSON(append([]event{}, events...))
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
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", e.Time.UTC().Format(time.DateTime), id, from, harmless(e.text()))
		}
	})
}

// text says what happened, in a few words.
func (e event) text() string {
	words := []string{string(e.Event)}
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

func (s *session) whoami(c call) error {
	id, p := s.Identity, s.Identity.Permissions
	var roles []string
	admin := false
	if s.Roles != nil {
		roles, admin = s.Roles(id)
	}
	if c.json {
		return s.writeJSON(struct {
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
		}{
			id.User, id.Key, source(id.Client.String(), id.Client.IsValid()), id.ConnID, append([]string{}, roles...), admin,
			p.PTY, p.PortForwarding, p.AgentForwarding, p.X11Forwarding, p.UserRC,
			append([]string{}, p.PermitOpen...), append([]string{}, p.PermitListen...),
			!p.NoShell, !p.NoExec, !p.NoSFTP, append([]string{}, p.Destinations...), append([]string{}, p.Listen...), p.RequirePTY,
		})
	}
	list := func(of []string, none string) string {
		if len(of) == 0 {
			return none
		}
		return harmless(strings.Join(of, " "))
	}
	var may []string
	for _, m := range []struct {
		is   bool
		what string
	}{{!p.NoShell, "shell"}, {!p.NoExec, "commands"}, {!p.NoSFTP, "sftp"}, {p.PTY, "terminal"}, {p.PortForwarding, "port forwarding"}, {p.AgentForwarding, "agent forwarding"}, {p.X11Forwarding, "X11 forwarding"}, {p.UserRC, "~/.ssh/rc"}} {
		if m.is {
			may = append(may, m.what)
		}
	}
	return s.table(func(w *tabwriter.Writer) {
		fmt.Fprintf(w, "user\t%s\n", harmless(id.User))
		fmt.Fprintf(w, "key\t%s\n", harmless(id.Key))
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

// say answers with one sentence.
func (s *session) say(text string) error {
	_, err := fmt.Fprintln(s.out, text)
	return err
}

func (s *session) bastions(c call) error {
	all, err := s.Bastions.List(s.ctx)
	connections := s.Gateway.Connections()
	entries := []bastionJSON{}
	for _, b := range all {
		entries = append(entries, describe(b, connections))
	}
	if c.json {
		if writeErr := s.writeJSON(entries); writeErr != nil {
			return writeErr
		}
		return err // what is there is shown all the same
	}
	tableErr := s.table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "USER\tPROFILE\tSTATE\tFOR\tGENERATION\tCONNECTIONS\tTASK")
		for i, e := range entries {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%s\n", harmless(e.User), harmless(e.Profile), e.State, age(all[i].Entry.Since), e.Generation,
				e.Connections, harmless(task(e.Task)))
		}
	})
	if err == nil {
		err = tableErr
	}
	return err
}

func (s *session) users(c call) error {
	type userJSON struct {
		User        string           `json:"user"`
		Connections []connectionJSON `json:"connections"`
	}
	all := s.Gateway.Connections()
	slices.SortStableFunc(all, func(a, b gateway.Connection) int { return strings.Compare(a.Identity.User, b.Identity.User) })
	if c.json {
		entries := []userJSON{}
		for _, c := range all {
			if n := len(entries); n == 0 || entries[n-1].User != c.Identity.User {
				entries = append(entries, userJSON{User: c.Identity.User})
			}
			last := &entries[len(entries)-1]
			last.Connections = append(last.Connections, connection(c, false))
		}
		return s.writeJSON(entries)
	}
	return s.table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "USER\t"+connectionHeading)
		for _, c := range all {
			fmt.Fprintf(w, "%s\t%s\n", harmless(c.Identity.User), row(c))
		}
	})
}
