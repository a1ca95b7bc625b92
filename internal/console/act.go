package console

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

// This file holds the commands that end something. What they say on terminals
// of others is here, too.

func (s *session) stop(c call) error {
	owner, err := s.whose(c)
	if err != nil {
		return err
	}
	n := 0
	for _, c := range s.Gateway.Connections() {
		if into(owner)(c) {
			n++
		}
	}
	if !c.yes {
		if err := s.confirm(fmt.Sprintf("Stop %s, and end %s?", s.name(owner), count(n, "connection"))); err != nil {
			return err
		}
	}
	// Told first: the end of the bastion looks the same whatever the reason.
	told := "Your bastion was stopped from your console, and this session with it. Connect again and you get a new one."
	if owner.User != s.Identity.User {
		told = "Your bastion was stopped by an administrator, and this session with it."
	}
	s.Gateway.Disconnect(told, into(owner))
	_, err = s.Bastions.Stop(s.ctx, owner, "by "+s.Identity.User+" on the console")
	switch {
	case errors.Is(err, bastion.ErrGone):
		return sentence("It has just ended by itself.")
	case errors.Is(err, bastion.ErrStarting):
		return sentence("It is being started or stopped at this moment. Please try again in a minute.")
	case err != nil:
		return err
	}
	if c.json {
		return s.writeJSON(struct {
			User        string `json:"user"`
			Profile     string `json:"profile"`
			Connections int    `json:"connections"`
		}{owner.User, owner.Profile, n})
	}
	return s.say(upper(s.name(owner)) + " is stopped.")
}

// whose finds the bastion that stop is to end: of the profile, or of USER or
// USER+PROFILE, or the only one.
func (s *session) whose(c call) (bastion.Owner, error) {
	user, profile := s.Identity.User, ""
	if len(c.args) > 0 {
		name, rest, both := strings.Cut(c.args[0], "+")
		own, err := s.Bastions.Status(s.ctx, user)
		if err != nil {
			return bastion.Owner{}, err
		}
		isProfile := slices.ContainsFunc(own, func(b bastion.Status) bool { return b.Owner.Profile == name })
		switch {
		case both:
			user, profile = name, rest
		case isProfile || !s.admin():
			profile = name
		default:
			user = name
		}
		if user != s.Identity.User && !s.admin() {
			return bastion.Owner{}, s.forbid(c, "Only administrators may stop somebody else's bastion.")
		}
	}
	present, err := s.present(user)
	if err != nil {
		return bastion.Owner{}, err
	}
	if profile != "" {
		present = slices.DeleteFunc(present, func(b bastion.Status) bool { return b.Owner.Profile != profile })
	}
	switch len(present) {
	case 1:
		return present[0].Owner, nil
	case 0:
		which := "No bastion of yours is running"
		if user != s.Identity.User {
			which = fmt.Sprintf("No bastion of %s is running", harmless(user))
		}
		if profile != "" {
			which += fmt.Sprintf(" with the profile %s", harmless(profile))
		}
		return bastion.Owner{}, sentence(which + ".")
	}
	var names []string
	for _, b := range present {
		names = append(names, b.Owner.Profile)
	}
	return bastion.Owner{}, usage(fmt.Sprintf("there are several; name one of the profiles %s", strings.Join(names, ", ")))
}

// name says whose bastion it is.
func (s *session) name(owner bastion.Owner) string {
	if owner.User == s.Identity.User {
		return fmt.Sprintf("your bastion of profile %s", harmless(owner.Profile))
	}
	return fmt.Sprintf("the bastion %s", harmless(owner.String()))
}

func (s *session) kick(c call) error {
	who := c.args[0]
	var matches []gateway.Connection
	all := s.Gateway.Connections()
	for _, c := range all {
		if c.ID() == who {
			matches = []gateway.Connection{c}
			break
		}
		if c.Identity.User == who && c.ID() != s.Identity.ConnID {
			matches = append(matches, c)
		}
	}
	if len(matches) == 0 {
		return sentence(fmt.Sprintf("There is no connection with the id %s, nor another one of a user of that name, at this gateway.", harmless(who)))
	}
	if !c.yes {
		if err := s.confirm(fmt.Sprintf("End %s of %s?", count(len(matches), "connection"), harmless(matches[0].Identity.User))); err != nil {
			return err
		}
	}
	ended := s.Gateway.Disconnect("An administrator has ended this connection.", func(c gateway.Connection) bool {
		return slices.ContainsFunc(matches, func(m gateway.Connection) bool { return m.ID() == c.ID() })
	})
	s.visit.log.Info("kicked", "whom", who, "connections", len(ended))
	if c.json {
		ids := []string{}
		for _, c := range ended {
			ids = append(ids, c.ID())
		}
		return s.writeJSON(struct {
			Ended []string `json:"ended"`
		}{ids})
	}
	return s.say(count(len(ended), "connection") + " ended.")
}

func (s *session) drain(c call) error {
	if s.Drain == nil {
		return sentence("This gateway cannot be drained from here.")
	}
	n := 0
	for _, c := range s.Gateway.Connections() {
		if !c.Console {
			n++
		}
	}
	within := short(s.DrainTime)
	if !c.yes {
		if err := s.confirm(fmt.Sprintf("Take this gateway out of service, and end %s within %s?", count(n, "connection"), within)); err != nil {
			return err
		}
	}
	s.visit.log.Warn("draining is asked for on the console")
	var err error
	if c.json {
		err = s.writeJSON(struct {
			Connections int     `json:"connections"`
			Within      float64 `json:"drain_seconds"`
		}{n, s.DrainTime.Seconds()})
	} else {
		err = s.say(fmt.Sprintf("No new connections come in. %s may go on for %s; then the gateway ends, and this console with it.", upper(count(n, "connection")), within))
	}
	s.Drain()
	return err
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func upper(text string) string { return strings.ToUpper(text[:1]) + text[1:] }
