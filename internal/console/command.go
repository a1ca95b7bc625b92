package console

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/sallyport-ssh/sallyport/internal/audit"
)

// A call is a command line taken apart.
type call struct {
	*command
	line string // all of it, its words one blank apart
	args []string
	json bool // --json
	yes  bool // --yes
	last int  // --last N; zero if it was not given
}

// A command is what can be asked for.
type command struct {
	name  string
	usage string // of its arguments
	help  string
	admin bool // for administrators only
	args  int  // how many there may be
	needs int  // how many there must be
	asks  bool // takes --yes
	last  bool // takes --last
	run   func(*session, call) error
}

// commands returns them in the order in which help shows them. Of two with the
// same name the first counts, and the second is for help only.
func commands() []*command {
	return []*command{
		{name: "status", help: "your bastions", run: (*session).status},
		{name: "sessions", help: "your open connections, and what runs in them", run: (*session).sessions},
		{name: "stop", usage: "[PROFILE] [--yes]", help: "end your bastion, and every connection to it", args: 1, asks: true, run: (*session).stop},
		{name: "log", usage: "[--last N]", help: "what happened lately, the newest last", last: true, run: (*session).log},
		{name: "whoami", help: "who the gateway takes you for, and what you may do", run: (*session).whoami},
		{name: "help", help: "this", run: (*session).help},
		{name: "bastions", admin: true, help: "all bastions that run", run: (*session).bastions},
		{name: "users", admin: true, help: "who is connected to this gateway", run: (*session).users},
		{name: "kick", usage: "USER|ID [--yes]", admin: true, help: "end all connections of a user to this gateway, or one by its id", args: 1, needs: 1, asks: true, run: (*session).kick},
		{name: "stop", usage: "USER[+PROFILE] [--yes]", admin: true, help: "end somebody's bastion, and every connection to it", run: (*session).stop},
		{name: "drain", usage: "[--yes]", admin: true, help: "take this gateway out of service, as SIGTERM does", asks: true, run: (*session).drain},
	}
}

// A usage is why a command line was not understood: exit status 2. It is for
// the user.
type usage string

func (u usage) Error() string { return string(u) }

// A sentence is why something was not done: exit status 1. It is for the user.
type sentence string

func (s sentence) Error() string { return string(s) }

// parse takes a command line apart: words, with blanks between them. The first
// is the command; the others are arguments and flags in any order.
func parse(line string) (call, error) {
	if len(line) > maxLine {
		return call{}, errLong
	}
	words := strings.Fields(line)
	if len(words) == 0 {
		return call{}, usage("no command was given; help lists them")
	}
	all := commands()
	i := slices.IndexFunc(all, func(c *command) bool { return c.name == words[0] })
	if i < 0 {
		return call{}, usage(fmt.Sprintf("there is no command %q; help lists them", harmless(words[0])))
	}
	c := call{command: all[i], line: strings.Join(words, " ")}
	for rest := words[1:]; len(rest) > 0; rest = rest[1:] {
		word := rest[0]
		switch {
		case word == "--json":
			c.json = true
		case c.asks && (word == "--yes" || word == "-y"):
			c.yes = true
		case c.command.last && (word == "--last" || word == "-n"):
			if len(rest) == 1 {
				return call{}, usage(word + " needs a number")
			}
			n, err := strconv.Atoi(rest[1])
			if err != nil || n < 1 {
				return call{}, usage(fmt.Sprintf("%s needs a number from 1 on, and not %q", word, harmless(rest[1])))
			}
			c.last = n
			rest = rest[1:]
		case strings.HasPrefix(word, "-"):
			return call{}, usage(fmt.Sprintf("%s has no option %q", c.name, harmless(word)))
		case len(c.args) == c.command.args:
			return call{}, usage(fmt.Sprintf("%s has no use for %q", c.name, harmless(word)))
		default:
			c.args = append(c.args, word)
		}
	}
	if len(c.args) < c.needs {
		return call{}, usage(fmt.Sprintf("usage: %s %s", c.name, c.usage))
	}
	return c, nil
}

// do carries out one command line and returns its exit status.
func (s *session) do(line string) int {
	c, err := parse(line)
	if err != nil {
		return s.fail(err)
	}
	if c.admin && !s.admin() {
		return s.fail(s.forbid(c, c.name+" is for administrators."))
	}
	if err := s.audit(audit.Event{Type: audit.Exec, Command: c.line}); err != nil {
		return s.fail(err)
	}
	if err := c.run(s, c); err != nil {
		return s.fail(err)
	}
	return 0
}

// forbid writes that somebody wants to do what administrators only may, and
// returns why it is not done.
func (s *session) forbid(c call, why string) error {
	if err := s.audit(audit.Event{Type: audit.Refused, Kind: "exec", Command: c.line, By: "gateway", Rule: "not an administrator"}); err != nil {
		return err
	}
	return sentence(why)
}

// audit writes an event of this connection. What it tells of must not happen if
// it returns an error.
func (s *session) audit(e audit.Event) error {
	id := s.Identity
	e.Conn, e.User, e.Profile, e.Client = id.ConnID, id.User, id.Profile, id.Client
	if s.Audit.Write(e) != nil {
		return sentence(withRef("What is done here cannot be written down at the moment, so nothing can be done. Please tell your administrator.", id.ConnID))
	}
	return nil
}

// fail says why something was not done and returns the exit status. What is not
// for the user goes to the log.
func (s *session) fail(err error) int {
	var misused usage
	if errors.As(err, &misused) {
		fmt.Fprintln(s.err, misused)
		return 2
	}
	var said sentence
	if !errors.As(err, &said) {
		s.Console.Log.Error("console", "conn", s.Identity.ConnID, "user", s.Identity.User, "err", err)
		said = sentence(withRef("That did not work. Please tell your administrator; the gateway's log has the reason.", s.Identity.ConnID))
	}
	fmt.Fprintln(s.err, said)
	return 1
}

func withRef(text, ref string) string { return text + " (Reference: " + ref + ")" }

// admin says whether the user is an administrator.
func (s *session) admin() bool {
	if s.Roles == nil {
		return false
	}
	_, admin := s.Roles(s.Identity)
	return admin
}

func (s *session) help(c call) error {
	type entry struct {
		Command string `json:"command"`
		Usage   string `json:"usage"`
		Help    string `json:"help"`
		Admin   bool   `json:"admin"`
	}
	entries := []entry{}
	admin := s.admin()
	for _, c := range commands() {
		if !c.admin || admin {
			entries = append(entries, entry{c.name, c.usage, c.help, c.admin})
		}
	}
	if c.json {
		return s.writeJSON(entries)
	}
	return s.table(func(w *tabwriter.Writer) {
		for i, e := range entries {
			if e.Admin && !entries[i-1].Admin {
				fmt.Fprintln(w, "For administrators:")
			}
			fmt.Fprintf(w, "  %s\t%s\n", cmp.Or(strings.TrimSpace(e.Command+" "+e.Usage), e.Command), e.Help)
		}
		fmt.Fprint(w, "\nAll take --json. What asks before it acts takes --yes instead.\n")
	})
}
