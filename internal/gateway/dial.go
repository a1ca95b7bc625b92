package gateway

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/relay"
	"github.com/sallyport-ssh/sallyport/internal/tracing"
	"github.com/sallyport-ssh/sallyport/internal/userauth"
)

const (
	// authWait bounds the wait for a bastion during authentication. Then the
	// login succeeds, and the relay confirms sessions while the bastion is
	// still starting: Node's ssh2 gives up after 20 s of authentication,
	// paramiko after 30 s.
	authWait = 10 * time.Second
	// progressInterval is the interval of the dots that a waiting user sees.
	// They also keep the connection alive: during authentication OpenSSH
	// disconnects after ServerAliveInterval × ServerAliveCountMax of silence.
	progressInterval = 4 * time.Second
)

// errNoBastion is the error of a dial that ended by a panic.
var errNoBastion = errors.New("no bastion")

// getBastion begins to dial the user's bastion and waits for up to authWait, with
// progress in banners. If the error is nil, the bastion is connected or still
// starting.
func (c *conn) getBastion(ctx context.Context, id identity.Identity, client *userauth.Server) error {
	if err := c.countUser(id.User, least(c.cfg.MaxConnectionsPerUser, id.Permissions.Limits.Connections)); err != nil {
		c.attempt.err = err
		return err
	}
	if err := c.auditLogin(id); err != nil {
		return err
	}
	c.dial = c.startDial(ctx, id)

	wait := time.NewTimer(authWait)
	defer wait.Stop()
	if waitsInAuth(c.clientVersion) {
		wait.Stop()
	}
	readable := c.ssh.Peek()
	var dots <-chan time.Time
	for starting := c.dial.starting; ; {
		var err error
		select {
		case <-c.dial.done:
			if dots != nil {
				client.Banner("\r\n")
			}
			return c.dial.err
		case <-starting:
			starting = nil
			tick := time.NewTicker(progressInterval)
			defer tick.Stop()
			dots = tick.C
			err = client.Banner(startingMessage)
		case <-dots:
			err = client.Banner(".")
		case <-wait.C:
			client.Banner("\r\n")
			return nil
		case <-readable:
			// Either the client has left, or it has sent its next request
			// before the answer to this one (RFC 4252, section 5.1).
			err = c.ssh.ReadError()
			readable = nil
		}
		if err != nil {
			return fmt.Errorf("client left while its bastion was starting: %w", err)
		}
	}
}

// waitsInAuth reports whether the client has to stay in authentication until its
// bastion is connected. PHP's phpseclib waits there without a limit, but abandons a
// command 10 s after it was opened, and reports that as success.
func waitsInAuth(clientVersion string) bool {
	return strings.HasPrefix(clientVersion, "SSH-2.0-phpseclib_")
}

// A dial gets one connection its bastion. If the bastion has to be started, the
// start is not part of the dial, and goes on after the dial is cancelled.
type dial struct {
	id       identity.Identity
	began    time.Time
	cancel   context.CancelFunc
	starting chan struct{} // closed if the user has to wait for a start
	done     chan struct{} // closed when conn or err is set
	conn     *bastion.Conn
	err      error
}

func (c *conn) startDial(ctx context.Context, id identity.Identity) *dial {
	ctx, cancel := context.WithCancel(ctx)
	d := &dial{id: id, began: time.Now(), cancel: cancel, starting: make(chan struct{}), done: make(chan struct{}), err: errNoBastion}
	go func() { // endDial waits for it
		defer close(d.done)
		defer cancel() // a context keeps memory until then
		defer c.closeOnPanic(c.ssh)
		dialing, dialed := tracing.Start(ctx, "bastion")
		d.conn, d.err = c.srv.Dial(dialing, id, func(bool) { close(d.starting) })
		dialed(d.err)
		if d.err == nil {
			d.err = c.auditJoined(id, d.conn)
		}
		switch {
		case d.err == nil:
			c.trace.Connected()
			c.log.Info("connected", "user", id.User, "task", d.conn.Task.ID, "generation", d.conn.Task.Generation)
			c.keepBastion.start(c, "bastion", d.conn.Conn, bastionAliveInterval, bastionAliveCountMax)
		case ctx.Err() != nil: // the client has left, or the gateway drains
			d.err = context.Cause(ctx)
		default:
			c.log.Error("no bastion for user", "user", id.User, "profile", id.Profile, "err", d.err)
		}
	}()
	return d
}

// endDial cancels the dial, waits for it, and closes its connection.
func (c *conn) endDial() {
	if c.dial == nil {
		return
	}
	c.dial.cancel()
	if <-c.dial.done; c.dial.conn != nil {
		c.dial.conn.Close()
	}
}

// stillStarting returns the progress message for a terminal whose bastion is
// starting.
func (c *conn) stillStarting() string {
	usually := time.Duration(0)
	if c.srv.UsualStart != nil {
		usually = c.srv.UsualStart(c.identity.Profile)
	}
	return stillStartingMessage(time.Since(c.dial.began), usually)
}

// reason returns why there is no bastion, or nil if there is one or the dial has
// not ended.
func (d *dial) reason() error {
	select {
	case <-d.done:
		return d.err
	default:
		return nil
	}
}

// deliver returns a channel that gets the bastion's connection when the dial ends,
// or is closed if there is none. If the dial has ended, the connection is on the
// channel when deliver returns: the relay confirms sessions early only if it is not.
func (d *dial) deliver() <-chan relay.Conn {
	server := make(chan relay.Conn, 1)
	send := func() {
		defer close(server)
		if <-d.done; d.err == nil {
			server <- d.conn
		}
	}
	select {
	case <-d.done:
		send()
	default:
		go send() // ends with the dial
	}
	return server
}
