package console

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// This file asks the other gateways that share the ledger. There is no protocol between
// gateways but the console itself: a gateway logs in to the console of another one for the
// user, runs a command with --json, and reads its answer. A command that runs for another
// gateway is about its own gateway only, so questions are not passed on.

// A FleetGateway is one of the gateways that share a ledger, by its last heartbeat.
type FleetGateway struct {
	ID, Version string
	// Address is the "host:port" at which other gateways reach it; it may be empty.
	Address string
	// Self says that it is this gateway.
	Self bool
	// SameSettings says that its keys and profiles are those of this gateway.
	SameSettings bool
	Draining     bool
	Connections  int
	// Started is when its process began; Seen is the time of the heartbeat.
	Started, Seen time.Time
	// Ended says that the heartbeat is so old that its process is taken for ended.
	Ended bool
}

// A Fleet is the gateways that share the ledger, this one among them.
type Fleet interface {
	// Self returns this gateway as it is now. It makes no call.
	Self() FleetGateway
	// Gateways returns all of them. With an error, the result is an earlier one,
	// and may be empty.
	Gateways(ctx context.Context) ([]FleetGateway, error)
	// Run runs a command line on the console of another gateway, for the user of id
	// and with the permissions of id, and returns its standard output. It returns
	// an error if the command fails, or when ctx ends.
	Run(ctx context.Context, to FleetGateway, id identity.Identity, line string) ([]byte, error)
}

const (
	// listTimeout bounds the reading of the heartbeats, and askTimeout the wait for
	// the answers of all gateways: a person waits for the command.
	listTimeout = 4 * time.Second
	askTimeout  = 4 * time.Second

	// lostAfter is the age of a heartbeat from which on its gateway is shown as lost.
	lostAfter = time.Minute
)

// answers are those of the other gateways to one command.
type answers struct {
	// several says that there are other gateways.
	several bool
	from    []answer
	missing []missing
	// oldList says that the heartbeats could not be read.
	oldList bool
}

// An answer is the output of a command at another gateway.
type answer struct {
	gateway FleetGateway
	text    []byte
}

// A missing gateway is one that did not answer, or could not be asked because of why.
type missing struct{ id, why string }

// Why a gateway is missing. A gateway that drains accepts logins for its drain_delay only.
const (
	silent   = "did not answer"
	draining = "drains and takes no commands"
)

// others returns the gateways to ask, and those that cannot be asked. A gateway whose
// address belongs to a later one by now has ended, or is about to.
func others(all []FleetGateway) (ask []FleetGateway, not []missing) {
	for _, g := range all {
		if g.Self || g.Ended {
			continue
		}
		successor := slices.IndexFunc(all, func(o FleetGateway) bool {
			return o.ID != g.ID && o.Address != "" && o.Address == g.Address && o.Started.After(g.Started)
		})
		switch {
		case g.Address == "":
			not = append(not, missing{g.ID, "has no address for other gateways"})
		case successor < 0:
			ask = append(ask, g)
		case g.Draining:
			not = append(not, missing{g.ID, draining})
		case time.Since(g.Seen) <= lostAfter:
			not = append(not, missing{g.ID, "has the address of " + all[successor].ID})
		}
	}
	return ask, not
}

// list returns the heartbeats of all gateways, or this gateway's if it is alone or the
// session is another gateway's.
func (s *session) list() (all []FleetGateway, old bool) {
	if s.console.Fleet == nil {
		return nil, false
	}
	if s.identity.Via != "" {
		return []FleetGateway{s.console.Fleet.Self()}, false
	}
	ctx, cancel := context.WithTimeout(s.conn.ctx, listTimeout)
	defer cancel()
	all, err := s.console.Fleet.Gateways(ctx)
	if err != nil {
		s.conn.log.Warn("the list of gateways cannot be read; using an earlier one", "err", err)
	}
	return all, err != nil
}

// ask runs a command line at all other gateways, for the user of this session.
func (s *session) ask(line string) answers {
	all, old := s.list()
	return s.askThese(all, old, line)
}

func (s *session) askThese(all []FleetGateway, old bool, line string) answers {
	ask, not := others(all)
	a := answers{several: len(ask)+len(not) > 0, missing: not, oldList: old}
	ctx, cancel := context.WithTimeout(s.conn.ctx, askTimeout)
	defer cancel()
	texts, errs := make([][]byte, len(ask)), make([]error, len(ask))
	var wg sync.WaitGroup
	for i, g := range ask {
		errs[i] = errors.New("panic")
		wg.Go(func() {
			defer s.conn.closeOnPanic("question to another gateway")
			texts[i], errs[i] = s.runAt(ctx, g, line)
		})
	}
	wg.Wait()
	for i, g := range ask {
		if errs[i] != nil {
			why := silent
			if g.Draining {
				why = draining
			}
			a.missing = append(a.missing, missing{g.ID, why})
			continue
		}
		a.from = append(a.from, answer{g, texts[i]})
	}
	return a
}

// runAt runs a command line at another gateway, and logs an error.
func (s *session) runAt(ctx context.Context, g FleetGateway, line string) ([]byte, error) {
	id := s.identity
	id.Permissions.Admin = s.admin()
	text, err := s.console.Fleet.Run(ctx, g, id, line)
	if err != nil && !g.Draining {
		s.conn.log.Warn("another gateway did not answer", "gateway", g.ID, "addr", g.Address, "err", err)
	}
	return text, err
}

// decode decodes each answer as a T and calls take. A gateway whose answer is no T has not
// answered.
func decode[T any](s *session, a *answers, take func(from FleetGateway, t T)) {
	a.from = slices.DeleteFunc(a.from, func(from answer) bool {
		var t T
		if err := json.Unmarshal(from.text, &t); err != nil {
			s.conn.log.Warn("another gateway did not answer", "gateway", from.gateway.ID, "addr", from.gateway.Address, "err", err)
			a.missing = append(a.missing, missing{from.gateway.ID, silent})
			return true
		}
		take(from.gateway, t)
		return false
	})
}

// unanswered returns the IDs of the gateways without an answer.
func (a *answers) unanswered() []string {
	var ids []string
	for _, m := range a.missing {
		ids = append(ids, m.id)
	}
	return ids
}

// gaps returns an error that names the gateways without an answer and the consequence, such
// as "its connections are not shown"; nil if all have answered.
func (a *answers) gaps(consequence string) error {
	var lines []string
	for _, m := range a.missing {
		lines = append(lines, fmt.Sprintf("Gateway %s %s: %s.", sanitize(m.id), sanitize(m.why), consequence))
	}
	if a.oldList {
		lines = append(lines, "The list of gateways cannot be read, so this may not be about all of them.")
	}
	if lines == nil {
		return nil
	}
	return userError(strings.Join(lines, "\n"))
}

// showGaps writes gaps to standard error, for commands that only show.
func (s *session) showGaps(a *answers, consequence string) {
	if err := a.gaps(consequence); err != nil {
		fmt.Fprintln(s.err, err)
	}
}

// self is this gateway's ID, or empty without a shared ledger.
func (s *session) self() string {
	if s.console.Fleet == nil {
		return ""
	}
	return s.console.ID
}

// connections returns those of this gateway, without the ones of other gateways.
func (s *session) connections() []gateway.Connection {
	return slices.DeleteFunc(s.console.Gateway.Connections(), func(c gateway.Connection) bool { return c.Identity.Via != "" })
}

// allConnections returns the connections of all users to all gateways, sorted by user.
func (s *session) allConnections() ([]Connection, answers) {
	all := []Connection{}
	for _, c := range s.connections() {
		all = append(all, s.describeConnection(c, false))
	}
	a := s.ask("users --json")
	decode(s, &a, func(from FleetGateway, users []userJSON) {
		for _, u := range users {
			for _, c := range u.Connections {
				c.User, c.Gateway = u.User, from.ID
				all = append(all, c)
			}
		}
	})
	slices.SortStableFunc(all, func(a, b Connection) int { return cmp.Or(strings.Compare(a.User, b.User), a.compare(b)) })
	return all, a
}

// ownConnections returns the user's connections to all gateways, the oldest first.
func (s *session) ownConnections() ([]Connection, answers) {
	all := []Connection{}
	for _, c := range s.connections() {
		if c.Identity.User == s.identity.User {
			all = append(all, s.describeConnection(c, true))
		}
	}
	a := s.ask("sessions --json")
	decode(s, &a, func(from FleetGateway, theirs []Connection) {
		for _, c := range theirs {
			c.User, c.Gateway = s.identity.User, from.ID
			all = append(all, c)
		}
	})
	slices.SortStableFunc(all, Connection.compare)
	return all, a
}

// endedJSON is the answer of kick and disconnect: the ids of the ended connections.
type endedJSON struct {
	Ended []string `json:"ended"`
	// Unanswered are the gateways that may have more.
	Unanswered []string `json:"unanswered,omitempty"`
}

// end ends the connections to this gateway for which match returns true, and those that
// other gateways end by the command line. It returns their ids.
func (s *session) end(why string, match func(gateway.Connection) bool, line string) (endedJSON, answers) {
	out := endedJSON{Ended: []string{}}
	for _, c := range s.console.Gateway.Disconnect(why, match) {
		out.Ended = append(out.Ended, c.ID())
	}
	a := s.ask(line)
	decode(s, &a, func(_ FleetGateway, theirs endedJSON) { out.Ended = append(out.Ended, theirs.Ended...) })
	out.Unanswered = a.unanswered()
	return out, a
}

// disconnect ends the connections to a bastion that another gateway is about to stop.
func (s *session) disconnect(c call) error {
	user, profile, _ := strings.Cut(c.args[0], "+")
	owner := bastion.Owner{User: user, Profile: profile}
	if user != s.identity.User && !s.admin() {
		return s.refuse(c, "Only administrators may stop another user's bastion.")
	}
	out, _ := s.end(s.stopMessage(owner), connectsTo(owner), "")
	return s.writeJSON(out)
}
