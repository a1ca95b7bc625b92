// Package console serves connections to user+ctl: a few commands with which users see
// and end their own bastions and connections, and more commands for administrators.
// docs/console.md describes the commands.
//
// The console starts no bastion, costs no money and authenticates nobody: the gateway
// has done that before (see [gateway.Server.Console]). It serves sessions with terminals
// and commands; it refuses forwarding, subsystems and environment variables.
//
// Sessions run on the session handler of github.com/gliderlabs/ssh; see gliderlabs.go.
package console

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/mux"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
	"github.com/sallyport-ssh/sallyport/internal/revoked"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// A Console serves users' consoles. Its fields must be set before [Console.Serve] is
// called, and must not change afterwards.
type Console struct {
	Gateway  Gateway
	Bastions Bastions
	// Recent holds the last events of each user. If it is nil, there is no log
	// command.
	Recent *Recent
	// Roles returns the names of a user's roles, and whether one of them makes
	// the user an administrator. It is called for each command. If it is nil,
	// nobody has a role.
	Roles func(identity.Identity) (names []string, admin bool)
	// OwnKeys returns the store of the keys that users have added themselves,
	// or nil if users may not add keys. It may be nil, too.
	OwnKeys func() Keys
	// Drain begins to drain the gateway, like SIGTERM, and returns at once. If
	// it is nil, there is no drain command.
	Drain func()

	// Fleet is the gateways that share the ledger, and ID this one's among them. If
	// Fleet is nil, there is no gateways command, and the others are about this
	// gateway.
	Fleet Fleet
	ID    string

	// Revoked is the users whose access is revoked. If it is nil, there are no
	// commands about them.
	Revoked Revoked

	// IdleTimeout is the time after which a connection without input and new
	// sessions is closed. Zero means 15 minutes.
	IdleTimeout time.Duration

	Log *slog.Logger
}

// A Gateway lists and ends the connections of this gateway. It is a [gateway.Server].
type Gateway interface {
	Connections() []gateway.Connection
	Disconnect(why string, match func(gateway.Connection) bool) []gateway.Connection
	DrainTime() time.Duration
}

// Bastions lists and stops bastions. It is a [bastion.Dialer].
type Bastions interface {
	Status(ctx context.Context, user string) ([]bastion.Status, error)
	List(ctx context.Context) ([]bastion.Status, error)
	Stop(ctx context.Context, owner bastion.Owner, why string) (bastion.Entry, error)
}

// Revoked revokes users' access, and permits it again. It is a [revoked.List].
type Revoked interface {
	Refresh(ctx context.Context) error
	Entries(now time.Time) []revoked.Entry
	Revoke(ctx context.Context, e revoked.Entry) error
	Permit(ctx context.Context, user string) error
}

const (
	maxSessionsDefault = 10
	idleTimeoutDefault = 15 * time.Minute

	noForwarding = "this is the console: it has sessions only, and forwards nothing"
	idleMessage  = "This console was idle for too long and closes."
)

// Serve serves one connection until it has ended, and returns the reason for the end.
// Every goroutine it starts has returned then. See [gateway.Server.Console].
func (c *Console) Serve(ctx context.Context, client gateway.ConsoleConn) error {
	ctx, cancel := context.WithCancel(ctx)
	conn := &connection{console: c, client: client, ctx: ctx, terminals: make(map[*session]struct{})}
	conn.log = c.Log.With("conn", client.Identity.ConnID, "user", client.Identity.User)
	conn.idle = time.AfterFunc(conn.idleTimeout(), conn.expire)
	defer conn.idle.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer client.Conn.Close() // in case of a panic
	wg.Go(conn.showNotices)

	slots := make(chan struct{}, conn.maxSessions())
	return mux.New(client.Conn, conn.maxSessions()).Serve(refuseRequest, func(nc *mux.NewChannel) {
		if nc.Type != sshmsg.TypeSession {
			nc.Reject(sshmsg.Prohibited, noForwarding)
			return
		}
		select {
		case slots <- struct{}{}:
		default:
			nc.Reject(sshmsg.ResourceShortage, "too many sessions are open on this connection")
			return
		}
		conn.resetIdle()
		wg.Go(func() {
			defer func() { <-slots }()
			conn.serveSession(nc)
		})
	})
}

// refuseRequest answers a global request with REQUEST_FAILURE. So does sshd for
// keepalives.
func refuseRequest(req *mux.Request) { req.Reply(false, nil) }

// A connection is one client's connection to the console.
type connection struct {
	console *Console
	client  gateway.ConsoleConn
	ctx     context.Context // ends with the connection
	log     *slog.Logger
	idle    *time.Timer // calls expire

	mu        sync.Mutex
	terminals map[*session]struct{} // sessions with a terminal
}

func (c *connection) maxSessions() int {
	if c.client.MaxSessions == 0 {
		return maxSessionsDefault
	}
	return c.client.MaxSessions
}

func (c *connection) idleTimeout() time.Duration {
	if c.console.IdleTimeout == 0 {
		return idleTimeoutDefault
	}
	return c.console.IdleTimeout
}

// resetIdle restarts the idle timeout.
func (c *connection) resetIdle() { c.idle.Reset(c.idleTimeout()) }

// expire closes an idle connection.
func (c *connection) expire() {
	c.log.Info("console is idle", "for", c.idleTimeout().String())
	shown := make(chan struct{})
	go func() { // ends with the connection, at the latest
		defer close(shown)
		defer c.closeOnPanic("notice")
		c.showLine(idleMessage)
	}()
	select {
	case <-shown:
	case <-time.After(time.Second):
	}
	c.client.Conn.Close()
}

// showNotices shows the gateway's notices until the connection ends.
func (c *connection) showNotices() {
	defer c.closeOnPanic("notices")
	for {
		select {
		case line := <-c.client.Notices:
			c.showLine(line)
		case <-c.ctx.Done():
			return
		}
	}
}

// showLine writes a line to every terminal of the connection.
func (c *connection) showLine(line string) {
	c.mu.Lock()
	var all []*session
	for s := range c.terminals {
		all = append(all, s)
	}
	c.mu.Unlock()
	for _, s := range all {
		s.terminal.Write([]byte("\n" + line + "\n"))
	}
}

// closeOnPanic is deferred. It turns a panic into the end of this connection, so that
// the others of the process go on.
func (c *connection) closeOnPanic(where string) {
	if p := recover(); p != nil {
		oplog.Panic(c.log, "console "+where, p)
		if c.client.Conn != nil { // else it is a Caller's
			c.client.Conn.Close()
		}
	}
}
