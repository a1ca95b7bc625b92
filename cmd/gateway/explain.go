package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// A question asks about the permissions of a user.
type question struct {
	As        string    `placeholder:"USER" help:"List what the roles of this user permit. Her key may permit less."`
	Principal []string  `placeholder:"NAME" help:"With --as: a principal of her certificate; may be repeated."`
	From      string    `placeholder:"ADDRESS" help:"With --as: the address that she connects from."`
	Profile   string    `placeholder:"NAME" help:"With --as: the profile of the bastion (default \"default\")."`
	At        time.Time `placeholder:"TIME" help:"With --as: the time, such as 2006-01-02T15:04:05Z (default now)."`
	To        string    `placeholder:"HOST:PORT" help:"With --as: answer whether she may forward to this destination with -L, -D or -J."`
}

// errNo is the result of the command if the answer, which has been printed, is no.
var errNo = errors.New("not permitted")

// answer prints the permissions of the roles to out, with the lines of the file that say
// so. It returns errNo if they do not permit it.
func (q question) answer(out io.Writer, file string, cfg *config.Gateway) error {
	switch {
	case q.As == "":
		return errors.New("--from, --to, --principal, --profile and --at need --as USER")
	case strings.Contains(q.As, "+"):
		return fmt.Errorf("--as: %q is not the name of a user; select the profile with --profile", q.As)
	}
	q.Profile = cmp.Or(q.Profile, "default")
	if _, ok := cfg.Profiles[q.Profile]; !ok {
		return fmt.Errorf("--profile: there is no profile %q in %s", q.Profile, file)
	}
	l := policy.Login{User: q.As, Profile: q.Profile, Principals: q.Principal, Now: q.At, Key: identity.AllowAll()}
	if l.Now.IsZero() {
		l.Now = time.Now()
	}
	if q.From != "" {
		addr, err := netip.ParseAddr(q.From)
		if err != nil {
			return fmt.Errorf("--from: %q is not an address", q.From)
		}
		l.From = addr
	}
	var host string
	var port uint64
	if q.To != "" {
		var portText string
		var err, portErr error
		host, portText, err = net.SplitHostPort(q.To)
		port, portErr = strconv.ParseUint(portText, 10, 16)
		if err != nil || portErr != nil || host == "" || port == 0 {
			return fmt.Errorf("--to: %q is not HOST:PORT", q.To)
		}
	}
	no := func(why string, args ...any) error {
		fmt.Fprintf(out, "no: "+why+"\n", args...)
		return errNo
	}
	p, roles, err := cfg.Roles.Decide(l)
	if err != nil {
		if errors.Is(err, policy.ErrFrom) && q.From == "" {
			return no("%v (give the address that she connects from with --from)", err)
		}
		return no("%v", err)
	}
	if q.To != "" {
		return destination(out, file, p, roles, host, uint32(port), no)
	}
	if cfg.Roles == nil {
		fmt.Fprintf(out, "yes: there are no roles in %s, so every user may do what her key permits\n", file)
		return nil
	}
	fmt.Fprintf(out, "yes: %s has\n", q.As)
	for _, r := range roles {
		fmt.Fprintf(out, "  role %s (%s:%d)\n", r.Name, file, r.Line)
	}
	for _, line := range []struct {
		name, value string
	}{
		{"may", strings.Join(permitted(p), ", ")},
		{"requires", requires(p)},
		{"destinations", strings.Join(p.Destinations, ", ")},
		{"listens at", strings.Join(p.Listen, ", ")},
		{"connections", limit(p.Limits.Connections)},
		{"sessions", limit(p.Limits.Sessions)},
		{"bastions", limit(p.Limits.Bastions)},
		{"recorded", recorded(p.Record | cfg.Profiles[q.Profile].Record)},
	} {
		if line.value != "" {
			fmt.Fprintf(out, "  %s: %s\n", line.name, line.value)
		}
	}
	if p.Admin {
		fmt.Fprintln(out, "  administrator")
	}
	return nil
}

// recorded returns r in the words of the configuration.
func recorded(r identity.Record) string {
	var words []string
	switch {
	case r.Includes(identity.RecordInput):
		words = append(words, "input")
	case r.Includes(identity.RecordOutput):
		words = append(words, "output")
	}
	if r.Includes(identity.RecordExec) {
		words = append(words, "exec")
	}
	if r.Includes(identity.RecordTransfers) {
		words = append(words, "transfers")
	}
	return strings.Join(words, ", ")
}

// destination answers whether roles, whose permissions p are, permit a forward.
func destination(out io.Writer, file string, p identity.Permissions, roles []*policy.Role, host string, port uint32, no func(string, ...any) error) error {
	if err := policy.MayOpen(p, host, port); err != nil {
		var lines []string
		for _, r := range roles {
			lines = append(lines, fmt.Sprintf("%s:%d", file, r.Line))
		}
		if lines == nil {
			return no("%v", err)
		}
		return no("%v (%s)", err, strings.Join(lines, ", "))
	}
	if roles == nil {
		fmt.Fprintf(out, "yes: there are no roles in %s\n", file)
		return nil
	}
	_, err := netip.ParseAddr(host)
	isName := err != nil
	var unless, depends string // answers with a condition
	for _, r := range roles {
		if !r.Permit.PortForwarding {
			continue
		}
		if r.Destinations == nil {
			fmt.Fprintf(out, "yes: role %s has no limit of destinations (%s:%d)\n", r.Name, file, r.Line)
			return nil
		}
		for _, d := range r.Destinations {
			yes, maybe := d.MayPermit(host, port)
			switch {
			case yes && !isName:
				fmt.Fprintf(out, "yes: role %s permits %s (%s:%d)\n", r.Name, d, file, d.Line)
				return nil
			case yes && unless == "":
				unless = fmt.Sprintf("yes, unless %s stands for an address of the bastion itself, or a loopback, link-local or multicast address: role %s permits %s (%s:%d)", host, r.Name, d, file, d.Line)
			case maybe && depends == "":
				depends = fmt.Sprintf("yes, if the bastion finds that %s has an address that role %s permits: %s (%s:%d)", host, r.Name, d, file, d.Line)
			}
		}
	}
	fmt.Fprintln(out, cmp.Or(unless, depends))
	return nil
}

func permitted(p identity.Permissions) []string {
	var words []string
	for _, w := range []struct {
		word string
		is   bool
	}{
		{"shell", !p.NoShell}, {"exec", !p.NoExec}, {"sftp", !p.NoSFTP}, {"pty", p.PTY}, {"port-forwarding", p.PortForwarding},
		{"agent-forwarding", p.AgentForwarding}, {"X11-forwarding", p.X11Forwarding},
	} {
		if w.is {
			words = append(words, w.word)
		}
	}
	if words == nil {
		return []string{"nothing"}
	}
	return words
}

func requires(p identity.Permissions) string {
	if !p.RequirePTY {
		return ""
	}
	return "a terminal, for shells and commands"
}

func limit(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("at most %d", n)
}
