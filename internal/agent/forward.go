package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/mux"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

const (
	// dialTimeout is the timeout for connecting to the target of a direct-tcpip channel.
	dialTimeout = 10 * time.Second
	// drainTimeout is the timeout for writing the data that a client has sent before it
	// closed the channel.
	drainTimeout = 10 * time.Second
)

// A stream is a *net.TCPConn or a *net.UnixConn.
type stream interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
}

// directTCP connects a client to a TCP port (RFC 4254 section 7.2).
func (c *conn) directTCP(nc *mux.NewChannel) {
	r, err := parseDirectTCP(nc.Payload)
	if err != nil {
		nc.Reject(sshmsg.Prohibited, "open failed")
		return
	}
	reject := func(reason error) {
		c.log.Info("forward denied", "to", r.Host, "port", r.Port, "reason", reason)
		nc.Reject(sshmsg.Prohibited, reason.Error())
	}
	if err := policy.MayOpen(c.id.Permissions, r.Host, r.Port); err != nil {
		reject(err)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	// Check each address of the host immediately before connecting to it. A lookup
	// before the dial could return other addresses than the dial's own (DNS rebinding).
	d := net.Dialer{Control: func(_, address string, raw syscall.RawConn) error {
		at, err := netip.ParseAddrPort(address)
		if err == nil {
			err = policy.MayConnect(c.id.Permissions, r.Host, at.Addr(), r.Port, isOwnAddr)
		}
		if err != nil {
			return &notPermitted{err}
		}
		return c.login.Account.replaceSocket(raw)
	}}
	sock, err := d.DialContext(ctx, "tcp", net.JoinHostPort(r.Host, strconv.Itoa(int(r.Port))))
	if denied := (*notPermitted)(nil); errors.As(err, &denied) {
		reject(denied.error)
		return
	}
	if err != nil {
		nc.Reject(sshmsg.ConnectFailed, dialErrorText(err))
		return
	}
	c.accept(nc, sock.(stream))
}

// isOwnAddr reports whether an address belongs to an interface of this bastion. It asks each
// time, because addresses may change. If that fails, it returns true.
func isOwnAddr(a netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return true
	}
	a = a.Unmap().WithZone("")
	return slices.ContainsFunc(addrs, func(own net.Addr) bool {
		block, ok := own.(*net.IPNet)
		if !ok {
			return false
		}
		ip, ok := netip.AddrFromSlice(block.IP)
		return ok && ip.Unmap() == a
	})
}

// notPermitted is the error for a connection to an address that the policy denies.
type notPermitted struct{ error }

// dialErrorText returns sshd's message for the error: strerror(3) or gai_strerror(3).
func dialErrorText(err error) string {
	var dns *net.DNSError
	if errors.As(err, &dns) {
		if dns.IsNotFound {
			return "Name or service not known"
		}
		return "Temporary failure in name resolution"
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return "Connection timed out"
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errorText(errno)
	}
	return "open failed"
}

// directStreamlocal connects a client to a Unix socket (OpenSSH PROTOCOL section 2.4) as the
// account. Unlike in sshd, permitopen restricts sockets: a key with permitopen may not
// connect to any.
func (c *conn) directStreamlocal(nc *mux.NewChannel) {
	path, err := parseDirectStreamlocal(nc.Payload)
	if err != nil {
		nc.Reject(sshmsg.Prohibited, "open failed")
		return
	}
	if err := policy.MayOpenSocket(c.id.Permissions); err != nil {
		nc.Reject(sshmsg.Prohibited, err.Error())
		return
	}
	var sock *net.UnixConn
	err = c.login.Account.impersonate(func() error {
		var err error
		sock, err = net.DialUnix("unix", nil, c.socketAddr(path))
		return err
	})
	if err != nil {
		nc.Reject(sshmsg.ConnectFailed, dialErrorText(err))
		return
	}
	c.accept(nc, sock)
}

// socketAddr makes a path absolute; relative paths are in the home directory. An absolute
// path cannot begin with @, which package net would take for an abstract socket.
func (c *conn) socketAddr(path string) *net.UnixAddr {
	if !filepath.IsAbs(path) {
		path = filepath.Join(c.login.Account.Home, path)
	}
	return &net.UnixAddr{Name: path, Net: "unix"}
}

// accept confirms a channel that the client has opened, joins it with sock, and closes both.
func (c *conn) accept(nc *mux.NewChannel, sock stream) {
	ch, err := nc.Accept(0)
	if err != nil {
		sock.Close()
		return
	}
	c.join(ch, sock)
}

// join copies data between a channel and a socket until both directions are at EOF, or the
// client closes the channel. It half-closes each direction on its own.
func (c *conn) join(ch *mux.Channel, sock stream) {
	defer sock.Close()
	var wg sync.WaitGroup
	spawn := func(f func()) {
		wg.Add(1)
		c.spawn("forward", func() { defer wg.Done(); f() })
	}
	spawn(func() { io.Copy(io.Discard, ch.Stderr()) }) // otherwise it would fill the window
	sent := make(chan struct{})
	spawn(func() {
		_, err := ch.WriteTo(sock)
		sock.CloseWrite()
		close(sent)
		if err != nil {
			io.Copy(io.Discard, ch)
		}
	})
	spawn(func() {
		err := copyFrom(ch, sock)
		if err == nil {
			ch.CloseWrite()
			<-sent
		}
		ch.Close() // at once if the socket is broken
	})
	for req := range ch.Requests() {
		req.Reply(false, nil)
	}
	// The client has closed the channel. Data that it sent before is still written.
	sock.SetReadDeadline(time.Now())
	sock.SetWriteDeadline(time.Now().Add(drainTimeout))
	wg.Wait()
}
