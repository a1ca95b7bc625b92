// Package console is what users reach as user+ctl: a few commands that show what
// the gateway knows of them and end what is theirs, and some more for
// administrators. docs/console.md describes it for people.
//
// Nothing here starts a bastion, costs money, or lets anybody in: the gateway
// has done that before (see [gateway.Server.Console]). There are sessions,
// terminals and commands, and no forwarding, subsystems or environment.
//
// # gliderlabs/ssh
//
// Sessions run on the session handler of github.com/gliderlabs/ssh, which knows
// terminals and their sizes. Its server, which would authenticate, is not used.
// What that handler does not defend itself against is kept from it, see
// [narrow].
package console

import (
	"context"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"time"

	gliderssh "github.com/gliderlabs/ssh"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// A Console serves users' consoles. Set the fields, then use [Console.Serve];
// they may not change afterwards.
type Console struct {
	Gateway  Gateway
	Bastions Bastions
	// Recent, if not nil, holds the last events of each user.
	Recent *Recent
	// Audit is told of every command before it is carried out; nil is a log
	// that keeps nothing.
	Audit *audit.Log
	// Roles says which roles somebody has, and whether one of them makes an
	// administrator. It is asked for each command. If it is nil nobody has
	// any.
	Roles func(identity.Identity) (names []string, admin bool)
	// Drain begins the end of the gateway, as SIGTERM does, and returns at
	// once. DrainTime is how long connections may go on then; it is only
	// told.
	Drain     func()
	DrainTime time.Duration

	// MaxSessions is how many sessions one connection may have open at once,
	// and IdleTimeout how long a connection may last in which nobody types or
	// starts anything. Zero means ten, and 15 minutes.
	MaxSessions int
	IdleTimeout time.Duration

	Log *slog.Logger
}

// A Gateway is what lists and ends the connections of this gateway:
// a [gateway.Server].
type Gateway interface {
	Connections() []gateway.Connection
	Disconnect(why string, end func(gateway.Connection) bool) []gateway.Connection
}

// Bastions is what knows the bastions: a [bastion.Dialer].
type Bastions interface {
	Status(ctx context.Context, user string) ([]bastion.Status, error)
	List(ctx context.Context) ([]bastion.Status, error)
	Stop(ctx context.Context, owner bastion.Owner, why string) (bastion.Entry, error)
}

const (
	maxSessionsDefault = 10
	idleDefault        = 15 * time.Minute

	forwardsNothing = "this is the console: it has sessions only, and forwards nothing"
	idleMessage     = "Nothing was typed for a long time, so this console closes."
)

// Serve serves one connection to the console, until it has ended; see
// [gateway.Server.Console]. Every goroutine it starts has returned then.
func (c *Console) Serve(ctx context.Context, conn gateway.ConsoleConn) {
	ctx, cancel := context.WithCancel(ctx)
	v := &visit{Console: c, ConsoleConn: conn, ctx: ctx, terminals: make(map[*session]struct{})}
	v.log = c.Log.With("conn", conn.Identity.ConnID, "user", conn.Identity.User)
	v.idle = time.AfterFunc(v.idleTimeout(), v.expire)
	defer v.idle.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer conn.Close() // should this panic
	wg.Go(func() { ssh.DiscardRequests(conn.Reqs) })
	wg.Go(v.passNotices)

	open := make(chan struct{}, v.maxSessions())
	for nc := range conn.Chans {
		if nc.ChannelType() != "session" {
			nc.Reject(ssh.Prohibited, forwardsNothing)
			continue
		}
		select {
		case open <- struct{}{}:
		default:
			nc.Reject(ssh.ResourceShortage, "too many sessions are open on this connection")
			continue
		}
		v.touch()
		wg.Go(func() {
			defer func() { <-open }()
			v.serve(nc)
		})
	}
}

// A visit is one connection.
type visit struct {
	*Console
	gateway.ConsoleConn
	ctx  context.Context // ends with it
	log  *slog.Logger
	idle *time.Timer

	mu        sync.Mutex
	terminals map[*session]struct{} // the sessions that have one
}

func (v *visit) maxSessions() int {
	if v.MaxSessions == 0 {
		return maxSessionsDefault
	}
	return v.MaxSessions
}

func (v *visit) idleTimeout() time.Duration {
	if v.IdleTimeout == 0 {
		return idleDefault
	}
	return v.IdleTimeout
}

// touch notes that somebody does something.
func (v *visit) touch() { v.idle.Reset(v.idleTimeout()) }

// expire ends a connection on which nobody does anything.
func (v *visit) expire() {
	v.log.Info("console is idle", "for", v.idleTimeout().String())
	told := make(chan struct{})
	go func() { // ends with the connection, at the latest
		defer close(told)
		defer v.recover("notice")
		v.tell(idleMessage)
	}()
	select {
	case <-told:
	case <-time.After(time.Second):
	}
	v.Close()
}

// passNotices shows what the gateway has to say, until the connection ends.
func (v *visit) passNotices() {
	defer v.recover("notices")
	for {
		select {
		case line := <-v.Notices:
			v.tell(line)
		case <-v.ctx.Done():
			return
		}
	}
}

// tell writes a line to every terminal.
func (v *visit) tell(line string) {
	v.mu.Lock()
	var all []*session
	for s := range v.terminals {
		all = append(all, s)
	}
	v.mu.Unlock()
	for _, s := range all {
		s.terminal.Write([]byte("\n" + line + "\n"))
	}
}

// recover keeps a panic to the connection that it happens on.
func (v *visit) recover(where string) {
	if p := recover(); p != nil {
		v.log.Error("panic", "in", "console "+where, "panic", p, "stack", string(debug.Stack()))
		v.Close()
	}
}

// serve serves one session until its channel is closed.
func (v *visit) serve(nc ssh.NewChannel) {
	defer v.recover("session")
	s := &session{visit: v}
	server := &gliderssh.Server{Handler: s.run, SessionRequestCallback: s.begin}
	gliderssh.DefaultSessionHandler(server, v.ServerConn, &narrow{NewChannel: nc, visit: v}, &sshContext{Context: v.ctx, conn: v.ServerConn})
	s.running.Wait()
}

// A narrow channel lets those requests through that a console has a use for, if
// they are well formed. The handler that gets them
//
//   - panics on some malformed pty-req, and takes a malformed exec for a shell,
//   - keeps all variables of the environment it is sent, however many,
//   - grants agent forwarding,
//   - waits for ever on a window-change that comes before the shell does.
type narrow struct {
	ssh.NewChannel
	*visit
}

// Accept implements [ssh.NewChannel].
func (n *narrow) Accept() (ssh.Channel, <-chan *ssh.Request, error) {
	ch, in, err := n.NewChannel.Accept()
	if err != nil {
		return nil, nil, err
	}
	out := make(chan *ssh.Request)
	go func() { // ends with the channel; the handler reads until then
		defer close(out)
		defer n.recover("request")
		started := false
		for req := range in {
			if !n.passes(req, &started) {
				req.Reply(false, nil)
				continue
			}
			select {
			case out <- req:
			case <-n.ctx.Done(): // the handler may have panicked
				req.Reply(false, nil)
			}
		}
	}()
	return ch, out, nil
}

func (n *narrow) passes(req *ssh.Request, started *bool) bool {
	switch req.Type {
	case "pty-req": // RFC 4254, section 6.2
		var pty struct {
			Term                         string
			Columns, Rows, Width, Height uint32
			Modes                        string
		}
		return !*started && n.Identity.Permissions.PTY && ssh.Unmarshal(req.Payload, &pty) == nil
	case "shell": // section 6.5
		first := !*started
		*started = true
		return first
	case "exec":
		var command struct{ Value string }
		if *started || ssh.Unmarshal(req.Payload, &command) != nil {
			return false
		}
		*started = true
		return true
	case "window-change":
		return *started
	}
	return false
}

// An sshContext is what the session handler wants to know of a connection. It
// decides nothing by it.
type sshContext struct {
	context.Context
	sync.Mutex
	conn *ssh.ServerConn
}

func (c *sshContext) Value(key any) any {
	if key == gliderssh.ContextKeyPermissions {
		return c.Permissions()
	}
	return c.Context.Value(key)
}

func (c *sshContext) SetValue(any, any)     {}
func (c *sshContext) User() string          { return c.conn.User() }
func (c *sshContext) SessionID() string     { return string(c.conn.SessionID()) }
func (c *sshContext) ClientVersion() string { return string(c.conn.ClientVersion()) }
func (c *sshContext) ServerVersion() string { return string(c.conn.ServerVersion()) }
func (c *sshContext) RemoteAddr() net.Addr  { return c.conn.RemoteAddr() }
func (c *sshContext) LocalAddr() net.Addr   { return c.conn.LocalAddr() }
func (c *sshContext) Permissions() *gliderssh.Permissions {
	return &gliderssh.Permissions{Permissions: &ssh.Permissions{}}
}
