package console

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

// A call is a parsed command line.
type call struct {
	*command
	line string // the whole line, with one blank between words
	args []string
	json bool   // --json
	yes  bool   // --yes
	last int    // --last N; zero if it is missing
	rest string // unparsed argument of a raw command

	lasts  time.Duration // --for DURATION; zero if it is missing
	reason string        // --reason TEXT, with one blank between words
	stop   bool          // --stop
}

// A command is one command of the console.
type command struct {
	name    string
	usage   string // its arguments
	help    string
	admin   bool // for administrators only
	maxArgs int
	minArgs int
	asks    bool // asks before it acts, unless --yes is given
	last    bool // has --last
	raw     bool // has one unparsed argument after --json
	revokes bool // has --for, --reason and --stop
	ownKeys bool // exists only if users may add keys
	fleet   bool // exists only if gateways share a ledger
	peers   bool // may be run by other gateways, which act for a user
	private bool // may be run by other gateways only
	run     func(*session, call) error
}

// commands returns all commands, in the order of help. If two have the same name, the
// first is used, and the second is only for help.
func commands() []*command {
	return []*command{
		{name: "status", help: "your bastions", run: (*session).status},
		{name: "sessions", peers: true, help: "your open connections, and what runs in them", run: (*session).sessions},
		{name: "stop", usage: "[PROFILE] [--yes]", help: "stop your bastion, and end every connection to it", maxArgs: 1, asks: true, run: (*session).stop},
		{name: "log", usage: "[--last N]", help: "your recent events, the newest last", last: true, run: (*session).log},
		{name: "keys list", ownKeys: true, help: "your keys", run: (*session).keysList},
		{name: "keys add", usage: "[LINE]", ownKeys: true, raw: true, help: "add a public key; without LINE, from standard input", run: (*session).keysAdd},
		{name: "keys remove", usage: "FINGERPRINT [--yes]", ownKeys: true, help: "remove a key that you have added", maxArgs: 1, minArgs: 1, asks: true, run: (*session).keysRemove},
		{name: "whoami", help: "your user name, key, roles and permissions", run: (*session).whoami},
		{name: "help", help: "this", run: (*session).help},
		{name: "bastions", admin: true, help: "all running bastions", run: (*session).bastions},
		{name: "gateways", admin: true, fleet: true, peers: true, help: "the gateways that share the ledger", run: (*session).gateways},
		{name: "users", admin: true, peers: true, help: "connected users", run: (*session).users},
		{name: "kick", usage: "USER|ID [--yes]", admin: true, peers: true, help: "end all connections of a user, or one by its id", maxArgs: 1, minArgs: 1, asks: true, run: (*session).kick},
		{name: "stop", usage: "USER[+PROFILE] [--yes]", admin: true, help: "stop a user's bastion and end every connection to it", run: (*session).stop},
		{name: "revoke", usage: "USER [--for DURATION] [--reason TEXT] [--stop] [--yes]", admin: true, help: "refuse a user's logins, and end all her connections", maxArgs: 1, minArgs: 1, asks: true, revokes: true, run: (*session).revoke},
		{name: "permit", usage: "USER", admin: true, help: "undo a revoke", maxArgs: 1, minArgs: 1, run: (*session).permit},
		{name: "revoked", usage: "[USER]", admin: true, peers: true, help: "the revoked users", maxArgs: 1, run: (*session).revoked},
		{name: "drain", usage: "[GATEWAY] [--yes]", admin: true, peers: true, help: "drain and end this gateway, or another one", maxArgs: 1, asks: true, run: (*session).drain},
		{name: "disconnect", usage: "USER+PROFILE", peers: true, private: true, help: "end the connections to a bastion that is about to be stopped", maxArgs: 1, minArgs: 1, run: (*session).disconnect},
	}
}

// A usageError is the user's mistake in a command line: exit status 2. The user sees
// its text.
type usageError string

func (u usageError) Error() string { return string(u) }

// A userError is a failure of a command: exit status 1. The user sees its text.
type userError string

func (s userError) Error() string { return string(s) }

// parse parses a command line: words with blanks between them. The first is the
// command; the others are arguments and flags in any order.
func parse(line string) (call, error) {
	if len(line) > maxLine {
		return call{}, errLong
	}
	words := strings.Fields(line)
	if len(words) == 0 {
		return call{}, usageError("no command was given; help lists them")
	}
	all := commands()
	name, words := words[0], words[1:]
	if name == "keys" && len(words) > 0 {
		name, words = name+" "+words[0], words[1:]
	}
	i := slices.IndexFunc(all, func(c *command) bool { return c.name == name })
	if i < 0 && name == "keys" {
		return call{}, usageError("usage: keys list, keys add [LINE] or keys remove FINGERPRINT")
	}
	if i < 0 {
		return call{}, noCommand(name)
	}
	c := call{command: all[i], line: strings.Join(append(strings.Fields(name), words...), " ")}
	if c.raw {
		if len(words) > 0 && words[0] == "--json" {
			c.json, words = true, words[1:]
		}
		if len(words) > 0 { // keeps blanks
			_, c.rest, _ = strings.Cut(line, "add")
			c.rest = c.rest[strings.Index(c.rest, words[0]):]
		}
		return c, nil
	}
	for rest := words; len(rest) > 0; rest = rest[1:] {
		word := rest[0]
		switch {
		case word == "--json":
			c.json = true
		case c.asks && (word == "--yes" || word == "-y"):
			c.yes = true
		case c.command.last && (word == "--last" || word == "-n"):
			if len(rest) == 1 {
				return call{}, usageError(word + " needs a number")
			}
			n, err := strconv.Atoi(rest[1])
			if err != nil || n < 1 {
				return call{}, usageError(fmt.Sprintf("%s needs a number from 1 on, and not %q", word, sanitize(rest[1])))
			}
			c.last = n
			rest = rest[1:]
		case c.revokes && word == "--stop":
			c.stop = true
		case c.revokes && word == "--for":
			if len(rest) == 1 {
				return call{}, usageError(word + " needs a duration")
			}
			var err error
			if c.lasts, err = parseFor(rest[1]); err != nil {
				return call{}, err
			}
			rest = rest[1:]
		case c.revokes && word == "--reason":
			n := 1 // up to the next option
			for n < len(rest) && !strings.HasPrefix(rest[n], "--") {
				n++
			}
			c.reason = strings.Join(rest[1:n], " ")
			if c.reason == "" || len(c.reason) > maxReason {
				return call{}, usageError(fmt.Sprintf("%s needs a text of at most %d bytes", word, maxReason))
			}
			rest = rest[n-1:]
		case strings.HasPrefix(word, "-"):
			return call{}, usageError(fmt.Sprintf("%s has no option %q", c.name, sanitize(word)))
		case len(c.args) == c.maxArgs:
			return call{}, usageError(fmt.Sprintf("%s has no use for %q", c.name, sanitize(word)))
		default:
			c.args = append(c.args, word)
		}
	}
	if len(c.args) < c.minArgs {
		return call{}, usageError(fmt.Sprintf("usage: %s %s", c.name, c.usage))
	}
	return c, nil
}

// maxReason is the limit of a reason, in bytes.
const maxReason = 500

// parseFor parses the argument of --for: a duration of Go, or days as in 3d.
func parseFor(text string) (time.Duration, error) {
	const least, most = time.Minute, 10 * 365 * 24 * time.Hour
	d, err := time.ParseDuration(text)
	if days, ok := strings.CutSuffix(text, "d"); ok {
		var n uint64
		n, err = strconv.ParseUint(days, 10, 12)
		d = time.Duration(n) * 24 * time.Hour
	}
	if err != nil || d < least || d > most {
		return 0, usageError(fmt.Sprintf("--for needs a duration like 30m, 8h or 3d, of at least a minute, and not %q", sanitize(text)))
	}
	return d, nil
}

func noCommand(name string) error {
	return usageError(fmt.Sprintf("there is no command %q; help lists them", sanitize(name)))
}

var errAlone = userError("This gateway shares its ledger with no other gateway.")

// runLine runs one command line and returns its exit status.
func (s *session) runLine(line string) int {
	if s.kind == "exec" {
		switch {
		case strings.TrimSpace(line) == "exit": // ssh-copy-id, which tests its login with that
			return 0
		case isCopyID(line):
			line = "keys add"
		}
	}
	c, err := parse(line)
	if err != nil {
		return s.fail(err)
	}
	if c.private && s.identity.Via == "" {
		return s.fail(noCommand(c.name))
	}
	if s.identity.Via != "" && !c.peers {
		return s.fail(s.refuse(c, "Gateways may not run "+c.name+"."))
	}
	if c.admin && !s.admin() {
		return s.fail(s.refuse(c, c.name+" is for administrators."))
	}
	if c.fleet && s.console.Fleet == nil {
		return s.fail(errAlone)
	}
	if s.console.Revoked == nil && slices.Contains(revocationCommands, c.name) {
		return s.fail(noCommand(c.name))
	}
	if err := s.audit(audit.Event{Type: audit.Exec, Command: c.line}); err != nil {
		return s.fail(err)
	}
	if err := c.run(s, c); err != nil {
		return s.fail(err)
	}
	return 0
}

// refuse audits that a user who is no administrator, or a gateway, called a command that it
// may not run, and returns text as the error.
func (s *session) refuse(c call, text string) error {
	rule := "not an administrator"
	if s.identity.Via != "" && !c.peers {
		rule = "not for gateways"
	}
	if err := s.audit(audit.Event{Type: audit.Refused, Kind: "exec", Command: c.line, By: "gateway", Rule: rule}); err != nil {
		return err
	}
	return userError(text)
}

// audit writes an event of this connection. If it returns an error, the audited action
// must not happen.
func (s *session) audit(e audit.Event) error {
	if s.conn.client.Audit == nil {
		return nil
	}
	if err := s.conn.client.Audit(e); err != nil {
		return userError(err.Error())
	}
	return nil
}

// fail shows err to the user and returns the exit status. If err is not for the user,
// it logs err and shows a general message.
func (s *session) fail(err error) int {
	var misused usageError
	if errors.As(err, &misused) {
		fmt.Fprintln(s.err, misused)
		return 2
	}
	var said userError
	if !errors.As(err, &said) {
		s.conn.log.Error("console", "err", err)
		said = userError(gateway.WithRef("The command failed. Tell your administrator; the gateway's log has the reason.", s.identity.ConnID))
	}
	fmt.Fprintln(s.err, said)
	return 1
}

// admin reports whether the user is an administrator.
func (s *session) admin() bool {
	_, admin := s.roles()
	return admin
}

// maxUsage is the width, in columns, of a usage that has its help on the same line.
const maxUsage = 24

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
		if !c.private && (!c.admin || admin) && (!c.ownKeys || s.ownKeys() != nil) && (!c.fleet || s.console.Fleet != nil) && (s.console.Revoked != nil || !slices.Contains(revocationCommands, c.name)) {
			entries = append(entries, entry{c.name, c.usage, c.help, c.admin})
		}
	}
	if c.json {
		return s.writeJSON(entries)
	}
	var b strings.Builder
	for i, e := range entries {
		if e.Admin && !entries[i-1].Admin {
			b.WriteString("For administrators:\n")
		}
		usage := strings.TrimSpace(e.Command + " " + e.Usage)
		if len(usage) > maxUsage {
			b.WriteString("  " + usage + "\n")
			usage = ""
		}
		fmt.Fprintf(&b, "  %-*s  %s\n", maxUsage, usage, e.Help)
	}
	b.WriteString("\nAll commands take --json. With --yes a command does not ask.\n")
	_, err := io.WriteString(s.out, b.String())
	return err
}
