package console

import (
	"context"
	"net"
	"sync"

	gliderssh "github.com/gliderlabs/ssh"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/mux"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// This file adapts the session handler of github.com/gliderlabs/ssh to package mux.
//
// gliderlabs/ssh serves the console and not the front. The console needs a server for
// sessions: terminals, window sizes and commands. Its session handler has these, and
// takes any channel of golang.org/x/crypto/ssh's types. The front must not use its
// server: that stores the identity while a key is only offered, so that one account's key
// could log in as another (CVE-2024-45337), and a relay has to pass unknown channel and
// request types, which a server of handlers cannot. The handler does not defend itself
// against hostile requests, either; requestFilter does.

// serveSession serves one session until its channel is closed.
func (c *connection) serveSession(nc *mux.NewChannel) {
	defer c.closeOnPanic("session")
	s := &session{console: c.console, conn: c, identity: c.client.Identity}
	server := &gliderssh.Server{Handler: s.run, SessionRequestCallback: s.begin}
	ctx := &sshContext{Context: c.ctx, client: c.client}
	gliderssh.DefaultSessionHandler(server, &ssh.ServerConn{Conn: connAdapter{c.client}}, &requestFilter{nc, c}, ctx)
	s.running.Wait()
}

// A requestFilter implements [ssh.NewChannel] for a session. It passes only well-formed
// requests that the console needs, because the handler
//
//   - panics on some malformed pty-req, and takes a malformed exec for a shell,
//   - keeps all environment variables, without a limit,
//   - grants agent forwarding,
//   - blocks for ever on a window-change before the shell.
type requestFilter struct {
	nc   *mux.NewChannel
	conn *connection
}

func (f *requestFilter) ChannelType() string { return f.nc.Type }
func (f *requestFilter) ExtraData() []byte   { return f.nc.Payload }
func (f *requestFilter) Reject(reason ssh.RejectionReason, message string) error {
	return f.nc.Reject(uint32(reason), message)
}

// Accept implements [ssh.NewChannel].
func (f *requestFilter) Accept() (ssh.Channel, <-chan *ssh.Request, error) {
	ch, err := f.nc.Accept(0)
	if err != nil {
		return nil, nil, err
	}
	out := make(chan *ssh.Request)
	go func() { // ends with the channel; the handler reads until then
		defer close(out)
		defer f.conn.closeOnPanic("request")
		started := false
		for req := range ch.Requests() {
			ok := f.passes(req, &started)
			// Answered here, because Reply of an ssh.Request that package ssh
			// has not made does nothing. The handler grants all that passes.
			req.Reply(ok, nil)
			if !ok {
				continue
			}
			select {
			case out <- &ssh.Request{Type: req.Type, Payload: req.Payload}:
			case <-f.conn.ctx.Done(): // the handler may have panicked
			}
		}
	}()
	return ch, out, nil
}

// passes reports whether the handler gets a request. Started says whether a shell or
// command was requested.
func (f *requestFilter) passes(req *mux.Request, started *bool) bool {
	switch req.Type {
	case sshmsg.RequestPTY:
		_, err := sshmsg.ParsePTY(req.Payload)
		return !*started && f.conn.client.Identity.Permissions.PTY && err == nil
	case sshmsg.RequestShell:
		first := !*started
		*started = true
		return first
	case sshmsg.RequestExec:
		if _, err := sshmsg.ParseString(req.Payload); *started || err != nil {
			return false
		}
		*started = true
		return true
	case sshmsg.RequestWindowChange:
		return *started
	}
	return false
}

// An sshContext implements [gliderssh.Context]. The handler only reads it.
type sshContext struct {
	context.Context
	sync.Mutex
	client gateway.ConsoleConn
}

func (c *sshContext) Value(key any) any {
	if key == gliderssh.ContextKeyPermissions {
		return c.Permissions()
	}
	return c.Context.Value(key)
}

func (c *sshContext) SetValue(any, any)     {}
func (c *sshContext) User() string          { return c.client.Identity.User }
func (c *sshContext) SessionID() string     { return string(c.client.Conn.SessionID()) }
func (c *sshContext) ClientVersion() string { return c.client.Conn.PeerVersion() }
func (c *sshContext) ServerVersion() string { return c.client.Conn.Version() }
func (c *sshContext) RemoteAddr() net.Addr  { return c.client.Conn.RemoteAddr() }
func (c *sshContext) LocalAddr() net.Addr   { return c.client.Conn.LocalAddr() }
func (c *sshContext) Permissions() *gliderssh.Permissions {
	return &gliderssh.Permissions{Permissions: &ssh.Permissions{}}
}

// A connAdapter implements [ssh.Conn]. The handler asks it for addresses and the user,
// and opens no channels.
type connAdapter struct{ client gateway.ConsoleConn }

func (a connAdapter) User() string          { return a.client.Identity.User }
func (a connAdapter) SessionID() []byte     { return a.client.Conn.SessionID() }
func (a connAdapter) ClientVersion() []byte { return []byte(a.client.Conn.PeerVersion()) }
func (a connAdapter) ServerVersion() []byte { return []byte(a.client.Conn.Version()) }
func (a connAdapter) RemoteAddr() net.Addr  { return a.client.Conn.RemoteAddr() }
func (a connAdapter) LocalAddr() net.Addr   { return a.client.Conn.LocalAddr() }
func (a connAdapter) Close() error          { return a.client.Conn.Close() }
func (a connAdapter) Wait() error           { return nil }
func (a connAdapter) OpenChannel(string, []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	return nil, nil, mux.ErrClosed
}
func (a connAdapter) SendRequest(string, bool, []byte) (bool, []byte, error) {
	return false, nil, mux.ErrClosed
}
