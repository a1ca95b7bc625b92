package console

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

// This file holds the commands that end bastions and connections, and the messages that
// the sessions they end see.

func (s *session) stop(c call) error {
	owner, err := s.ownerOf(c)
	if err != nil {
		return err
	}
	if !c.yes {
		n := s.countTo(owner)
		if err := s.confirm(fmt.Sprintf("Stop %s, and end %s?", s.name(owner), count(n, "connection"))); err != nil {
			return err
		}
	}
	ended, a, err := s.stopBastion(owner)
	switch {
	case errors.Is(err, bastion.ErrGone):
		return userError("The bastion has already ended.")
	case errors.Is(err, bastion.ErrStarting):
		return userError("The bastion is being started or stopped. Try again in a minute.")
	case err != nil:
		return err
	}
	// The bastion is stopped for all gateways, so this is no failure.
	s.showGaps(&a, "its sessions in the bastion end without this reason")
	if c.json {
		return s.writeJSON(Stopped{owner.User, owner.Profile, len(ended.Ended), ended.Unanswered})
	}
	return s.say(upper(s.name(owner)) + " is stopped.")
}

// Stopped is a bastion that was stopped.
type Stopped struct {
	User    string `json:"user"`
	Profile string `json:"profile"`
	// Connections is the number of connections that have ended with it.
	Connections int `json:"connections"`
	// Unanswered are the gateways that may have had more.
	Unanswered []string `json:"unanswered,omitempty"`
}

// stopBastion ends the connections to a bastion at all gateways, and stops it.
func (s *session) stopBastion(owner bastion.Owner) (endedJSON, answers, error) {
	// Before the stop, after which the relay would report a lost bastion.
	ended, a := s.end(s.stopMessage(owner), connectsTo(owner), "disconnect "+owner.String()+" --json")
	_, err := s.console.Bastions.Stop(s.conn.ctx, owner, "by "+s.identity.User+" on the console")
	return ended, a, err
}

// stopMessage is for the sessions in a bastion that the user of this session stops.
func (s *session) stopMessage(owner bastion.Owner) string {
	if owner.User != s.identity.User {
		return "Your bastion was stopped by an administrator, and this session with it."
	}
	return "Your bastion was stopped from your console, and this session with it. Connect again to get a new one."
}

// countTo returns the number of connections to the owner's bastion, as far as the gateways
// answer.
func (s *session) countTo(owner bastion.Owner) (n int) {
	list := s.ownConnections
	if owner.User != s.identity.User {
		list = s.allConnections
	}
	all, _ := list()
	for _, c := range all {
		if c.connectsTo(owner) {
			n++
		}
	}
	return n
}

// ownerOf returns the owner of the bastion that a stop command means: by PROFILE, by
// USER or USER+PROFILE, or the user's only bastion.
func (s *session) ownerOf(c call) (bastion.Owner, error) {
	user, profile := s.identity.User, ""
	if len(c.args) > 0 {
		name, rest, both := strings.Cut(c.args[0], "+")
		own, err := s.console.Bastions.Status(s.conn.ctx, user)
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
		if user != s.identity.User && !s.admin() {
			return bastion.Owner{}, s.refuse(c, "Only administrators may stop another user's bastion.")
		}
	}
	live, err := s.liveBastions(user)
	if err != nil {
		return bastion.Owner{}, err
	}
	if profile != "" {
		live = slices.DeleteFunc(live, func(b bastion.Status) bool { return b.Owner.Profile != profile })
	}
	switch len(live) {
	case 1:
		return live[0].Owner, nil
	case 0:
		text := "No bastion of yours is running"
		if user != s.identity.User {
			text = fmt.Sprintf("No bastion of %s is running", sanitize(user))
		}
		if profile != "" {
			text += fmt.Sprintf(" with the profile %s", sanitize(profile))
		}
		return bastion.Owner{}, userError(text + ".")
	}
	var names []string
	for _, b := range live {
		names = append(names, b.Owner.Profile)
	}
	return bastion.Owner{}, usageError(fmt.Sprintf("you have several bastions; name one of the profiles %s", strings.Join(names, ", ")))
}

// name names the bastion of owner in a sentence.
func (s *session) name(owner bastion.Owner) string {
	if owner.User == s.identity.User {
		return fmt.Sprintf("your bastion of profile %s", sanitize(owner.Profile))
	}
	return fmt.Sprintf("the bastion %s", sanitize(owner.String()))
}

// kick ends the connection whose id is the argument, or else the connections of the user of
// that name, without the one that asks.
func (s *session) kick(c call) error {
	target := c.args[0]
	if !c.yes {
		if err := s.confirmKick(target); err != nil {
			return err
		}
	}
	mine := s.connections()
	byID := slices.ContainsFunc(mine, func(c gateway.Connection) bool { return c.ID() == target })
	ended, a := s.end("An administrator has ended this connection.", func(c gateway.Connection) bool {
		switch {
		case c.Identity.Via != "":
			return false
		case byID:
			return c.ID() == target
		}
		return c.Identity.User == target && c.ID() != s.identity.ConnID
	}, "kick "+target+" --yes --json")
	s.conn.log.Info("kicked", "target", target, "connections", len(ended.Ended), "unanswered", len(ended.Unanswered))
	gaps := a.gaps("its connections may continue")
	switch {
	case c.json && (len(ended.Ended) > 0 || gaps != nil || s.identity.Via != ""):
		if err := s.writeJSON(ended); err != nil {
			return err
		}
	case len(ended.Ended) > 0:
		if err := s.say(count(len(ended.Ended), "connection") + " ended."); err != nil {
			return err
		}
	case gaps == nil:
		return s.nobody(target, a.several)
	}
	return gaps
}

// nobody is the error if no gateway that answers has a connection to kick.
func (s *session) nobody(target string, several bool) error {
	text := "This gateway has no connection with the id %s, and no other connection of a user of that name."
	if several {
		text = "No gateway has a connection with the id %s, or another connection of a user of that name."
	}
	return userError(fmt.Sprintf(text, sanitize(target)))
}

// confirmKick asks the user to confirm the end of the connections that kick finds.
func (s *session) confirmKick(target string) error {
	if !s.pty {
		return s.confirm("")
	}
	all, a := s.allConnections()
	matches := slices.DeleteFunc(slices.Clone(all), func(c Connection) bool { return c.ID != target })
	if len(matches) == 0 {
		matches = slices.DeleteFunc(all, func(c Connection) bool {
			return c.User != target || c.Gateway == s.self() && c.ID == s.identity.ConnID
		})
	}
	s.showGaps(&a, "its connections are not counted")
	switch {
	case len(matches) > 0:
		return s.confirm(fmt.Sprintf("End %s of %s?", count(len(matches), "connection"), sanitize(matches[0].User)))
	case len(a.missing) > 0:
		return s.confirm(fmt.Sprintf("End the connections of %s there?", sanitize(target)))
	}
	return s.nobody(target, a.several)
}

// drainJSON is the answer of drain.
type drainJSON struct {
	Gateway     string  `json:"gateway,omitempty"`
	Connections int     `json:"connections"`
	Within      float64 `json:"drain_seconds"`
}

func (s *session) drain(c call) error {
	if len(c.args) > 0 && c.args[0] != s.self() {
		return s.drainOther(c, c.args[0])
	}
	if s.console.Drain == nil {
		return userError("This gateway cannot be drained from the console.")
	}
	n := 0
	for _, c := range s.connections() {
		if !c.Console {
			n++
		}
	}
	within := s.console.Gateway.DrainTime()
	if !c.yes {
		if err := s.confirm(fmt.Sprintf("Take this gateway out of service, and end %s within %s?", count(n, "connection"), shortDuration(within))); err != nil {
			return err
		}
	}
	s.conn.log.Warn("drain requested on the console", "via", s.identity.Via)
	var err error
	if c.json {
		err = s.writeJSON(drainJSON{s.self(), n, within.Seconds()})
	} else {
		err = s.say(fmt.Sprintf("The gateway is going out of service. %s may go on for %s; then the gateway exits, and this console ends.", upper(count(n, "connection")), shortDuration(within)))
	}
	s.console.Drain()
	return err
}

// drainOther drains another gateway.
func (s *session) drainOther(c call, id string) error {
	if s.console.Fleet == nil {
		return errAlone
	}
	all, old := s.list()
	i := slices.IndexFunc(all, func(g FleetGateway) bool { return g.ID == id })
	if i < 0 {
		if old {
			return userError("The list of gateways cannot be read. Try again in a minute.")
		}
		return userError(fmt.Sprintf("There is no gateway %s; gateways lists them.", sanitize(id)))
	}
	target := all[i]
	if !c.yes {
		question := fmt.Sprintf("Take the gateway %s out of service, and end %s?", sanitize(id), count(target.Connections, "connection"))
		if err := s.confirm(question); err != nil {
			return err
		}
	}
	// Asked alone, but with the others known: one of them may have its address now.
	for j := range all {
		all[j].Self = j != i
	}
	a := s.askThese(all, false, "drain --yes --json")
	var out drainJSON
	decode(s, &a, func(_ FleetGateway, theirs drainJSON) { out = theirs })
	if gaps := a.gaps("it was not drained"); gaps != nil {
		return gaps
	}
	if len(a.from) == 0 {
		return userError(fmt.Sprintf("Gateway %s has ended.", sanitize(id)))
	}
	out.Gateway = id
	if c.json {
		return s.writeJSON(out)
	}
	within := shortDuration(time.Duration(out.Within * float64(time.Second)))
	return s.say(fmt.Sprintf("The gateway %s is going out of service. %s may go on for %s; then it exits.", sanitize(id), upper(count(out.Connections, "connection")), within))
}

// count returns a number and a noun, such as "2 connections".
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// upper returns text with an upper-case first letter, which must be ASCII.
func upper(text string) string { return strings.ToUpper(text[:1]) + text[1:] }
