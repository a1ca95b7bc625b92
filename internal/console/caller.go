package console

import (
	"context"
	"log/slog"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// A Caller is a logged-in user without a session, such as one of the HTTP API. The callers
// of its methods decide about her permissions, and write to the audit log.
type Caller struct{ s *session }

// Caller returns the caller with this identity. Log has its reference.
func (c *Console) Caller(ctx context.Context, id identity.Identity, log *slog.Logger) Caller {
	conn := &connection{console: c, client: gateway.ConsoleConn{Identity: id}, ctx: ctx, log: log}
	return Caller{&session{console: c, conn: conn, identity: id}}
}

// Login describes the caller's login.
func (c Caller) Login() Login { return c.s.describeLogin() }

// Connections returns the caller's connections to all gateways, or, if all is set, those of
// all users. Missing are the gateways that did not answer.
func (c Caller) Connections(all bool) (connections []Connection, missing []string) {
	list := c.s.ownConnections
	if all {
		list = c.s.allConnections
	}
	connections, a := list()
	return connections, a.unanswered()
}

// Events returns the last n events of the caller at this gateway, the oldest first. It is
// empty without an audit log.
func (c Caller) Events(n int) []Event {
	if c.s.console.Recent == nil {
		return nil
	}
	all := c.s.console.Recent.of(c.s.identity.User)
	return all[max(0, len(all)-n):]
}

// Stop ends a bastion and all connections to it. The errors are those of
// [bastion.Dialer.Stop].
func (c Caller) Stop(owner bastion.Owner) (Stopped, error) {
	ended, _, err := c.s.stopBastion(owner)
	return Stopped{owner.User, owner.Profile, len(ended.Ended), ended.Unanswered}, err
}
