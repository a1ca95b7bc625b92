package console

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/revoked"
)

// This file holds the commands that revoke a user's access at all gateways, whatever keys she
// has. The gateway that is asked writes to the store that all share, and then has the others
// read it. A gateway that does not answer reads it by itself, within a minute.

// revocationCommands exist only with [Console.Revoked].
var revocationCommands = []string{"revoke", "permit", "revoked"}

// storeTimeout bounds a reading of the revoked users and a write.
const storeTimeout = 8 * time.Second

// revokedJSON is a revoked user in JSON output.
type revokedJSON struct {
	User   string     `json:"user"`
	By     string     `json:"by"`
	Reason string     `json:"reason,omitempty"`
	Since  *time.Time `json:"since"`
	Until  *time.Time `json:"until"`
	// Unanswered are the gateways that have not confirmed it, in the answer of revoke.
	Unanswered []string `json:"unanswered,omitempty"`
}

func describeRevoked(e revoked.Entry) revokedJSON {
	return revokedJSON{User: e.User, By: e.By, Reason: e.Reason, Since: jsonTime(e.Since), Until: jsonTime(e.Until)}
}

// revoke revokes a user's access. Her connections end by the rechecks of logins, a few seconds
// later.
func (s *session) revoke(c call) error {
	user := c.args[0]
	switch {
	case auth.CheckUser(user) != nil:
		return usageError(fmt.Sprintf("%q cannot be the name of a user", sanitize(user)))
	case user == s.identity.User:
		return userError("You cannot revoke your own access; another administrator can.")
	}
	if !c.yes {
		question := fmt.Sprintf("Refuse the logins of %s from now on, and end her connections?", sanitize(user))
		if err := s.confirm(question); err != nil {
			return err
		}
	}
	now := time.Now()
	e := revoked.Entry{User: user, By: s.identity.User, Reason: c.reason, Since: now}
	if c.lasts > 0 {
		e.Until = now.Add(c.lasts)
	}
	ctx, cancel := context.WithTimeout(s.conn.ctx, storeTimeout)
	defer cancel()
	if err := s.console.Revoked.Revoke(ctx, e); err != nil {
		return s.notStored(err)
	}
	s.conn.log.Warn("access of a user revoked on the console", "target", user, "for", c.lasts.String(), "reason", c.reason)
	a := s.announce(user, true)
	out := describeRevoked(e)
	out.Unanswered = a.unanswered()
	var err error
	if c.json {
		err = s.writeJSON(out)
	} else {
		err = s.say(fmt.Sprintf("Logins of %s are refused%s, and her connections end within seconds.", sanitize(user), until(e)))
	}
	if err != nil {
		return err
	}
	gaps := a.gaps(followsLater)
	if c.stop {
		if err := s.stopAll(user); err != nil {
			if gaps != nil {
				fmt.Fprintln(s.err, gaps)
			}
			return err
		}
	}
	return gaps
}

// followsLater is the consequence if a gateway does not answer revoke or permit.
const followsLater = "it follows within a minute, if it reaches the table"

// until says when an entry ends, for a sentence.
func until(e revoked.Entry) string {
	if e.Until.IsZero() {
		return ""
	}
	return " until " + e.Until.UTC().Format(time.DateTime) + " UTC"
}

// permit undoes a revoke.
func (s *session) permit(c call) error {
	user := c.args[0]
	if auth.CheckUser(user) != nil {
		return usageError(fmt.Sprintf("%q cannot be the name of a user", sanitize(user)))
	}
	ctx, cancel := context.WithTimeout(s.conn.ctx, storeTimeout)
	defer cancel()
	if err := s.console.Revoked.Refresh(ctx); err != nil {
		return s.notStored(err)
	}
	if !s.isRevoked(user) {
		return userError(fmt.Sprintf("The access of %s is not revoked.", sanitize(user)))
	}
	if err := s.console.Revoked.Permit(ctx, user); err != nil {
		return s.notStored(err)
	}
	s.conn.log.Warn("access of a user permitted on the console", "target", user)
	a := s.announce(user, false)
	var err error
	if c.json {
		err = s.writeJSON(struct {
			User       string   `json:"user"`
			Unanswered []string `json:"unanswered,omitempty"`
		}{user, a.unanswered()})
	} else {
		err = s.say(fmt.Sprintf("The user %s may log in again, with the keys and roles that she has.", sanitize(user)))
	}
	if err != nil {
		return err
	}
	return a.gaps(followsLater)
}

// notStored is the error if the store fails.
func (s *session) notStored(err error) error {
	s.conn.log.Error("the revoked users cannot be read or written", "err", err)
	return userError("The list of revoked users cannot be read or written, so nothing was changed. Use kick, and take the user's keys away.")
}

func (s *session) isRevoked(user string) bool {
	return slices.ContainsFunc(s.console.Revoked.Entries(time.Now()), func(e revoked.Entry) bool { return e.User == user })
}

// announce has the other gateways read the revoked users. Those that then do not agree on the
// user have not answered.
func (s *session) announce(user string, want bool) answers {
	a := s.ask("revoked " + user + " --json")
	decode(s, &a, func(from FleetGateway, theirs []revokedJSON) {
		if has := slices.ContainsFunc(theirs, func(r revokedJSON) bool { return r.User == user }); has != want {
			a.missing = append(a.missing, missing{from.ID, "has not taken this over"})
		}
	})
	return a
}

// revoked lists the revoked users, or one of them, as the store has them now.
func (s *session) revoked(c call) error {
	ctx, cancel := context.WithTimeout(s.conn.ctx, storeTimeout)
	defer cancel()
	refreshErr := s.console.Revoked.Refresh(ctx)
	if refreshErr != nil {
		refreshErr = s.notRead(refreshErr)
		if s.identity.Via != "" { // the other gateway relies on the answer
			return refreshErr
		}
	}
	all := s.console.Revoked.Entries(time.Now())
	if len(c.args) > 0 {
		all = slices.DeleteFunc(all, func(e revoked.Entry) bool { return e.User != c.args[0] })
	}
	if c.json {
		out := []revokedJSON{}
		for _, e := range all {
			out = append(out, describeRevoked(e))
		}
		if err := s.writeJSON(out); err != nil {
			return err
		}
		return refreshErr
	}
	err := s.table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "USER\tFOR\tUNTIL (UTC)\tBY\tREASON")
		for _, e := range all {
			end := "-"
			if !e.Until.IsZero() {
				end = e.Until.UTC().Format(time.DateTime)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", sanitize(e.User), age(e.Since), end, sanitize(e.By), sanitize(e.Reason))
		}
	})
	if err != nil {
		return err
	}
	return refreshErr
}

// notRead is the error if the store cannot be read.
func (s *session) notRead(err error) error {
	s.conn.log.Error("the revoked users cannot be read or written", "err", err)
	return userError("The list of revoked users cannot be read, so this is an earlier one.")
}

// stopAll stops all bastions of a user.
func (s *session) stopAll(user string) error {
	live, err := s.liveBastions(user)
	if err != nil {
		return err
	}
	all := true
	for _, b := range live {
		s.end(s.stopMessage(b.Owner), connectsTo(b.Owner), "disconnect "+b.Owner.String()+" --json")
		_, stopErr := s.console.Bastions.Stop(s.conn.ctx, b.Owner, "revoked by "+s.identity.User+" on the console")
		if stopErr == nil || errors.Is(stopErr, bastion.ErrGone) {
			continue
		}
		all = false
		if !errors.Is(stopErr, bastion.ErrStarting) {
			s.conn.log.Error("console", "err", stopErr)
		}
	}
	if !all {
		return userError(fmt.Sprintf("Not all bastions of %s were stopped. Try again with stop in a minute.", sanitize(user)))
	}
	return nil
}
