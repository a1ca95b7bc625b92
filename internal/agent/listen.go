package agent

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/unixsock"
)

// A listenKey identifies a remote forward in cancel requests: the host as the client wrote
// it, and the port that it got if it had asked for port 0.
type listenKey struct {
	host string // or the path of a socket
	port uint32 // 0 for a socket
}

// A listener accepts connections for a client to answer.
type listener struct {
	socks []net.Listener
	// cleanup, if not nil, removes files of the listener.
	cleanup func()
	once    sync.Once
}

// close may be called more than once. Accepted connections stay open.
func (l *listener) close() {
	l.once.Do(func() {
		for _, sock := range l.socks {
			sock.Close()
		}
		if l.cleanup != nil {
			l.cleanup()
		}
	})
}

// serve opens a channel to the client for each connection to l, until l is closed. open
// returns the type and payload of the channel; an empty type closes the connection.
func (c *conn) serve(l *listener, open func(net.Conn) (kind string, payload []byte)) {
	for _, sock := range l.socks {
		c.spawn("listener", func() {
			for {
				nc, err := sock.Accept()
				if err != nil {
					if errors.Is(err, net.ErrClosed) {
						return
					}
					c.log.Warn("accepting a connection to forward failed", "err", err)
					time.Sleep(100 * time.Millisecond) // probably out of descriptors
					continue
				}
				if !c.takeSlot() {
					nc.Close()
					continue
				}
				c.spawn("forward", func() {
					defer c.freeSlot()
					kind, payload := open(nc)
					if kind == "" {
						nc.Close()
						return
					}
					ch, err := c.mux.OpenChannel(kind, payload)
					if err != nil {
						nc.Close()
						return
					}
					c.join(ch, nc.(stream))
				})
			}
		})
	}
}

// addListener adds a listener. If the key is in use, there are too many, or the connection is
// closing, it closes l and returns false.
func (c *conn) addListener(key listenKey, l *listener) bool {
	c.mu.Lock()
	_, taken := c.listeners[key]
	ok := !taken && !c.closed && len(c.listeners) < maxListeners
	if ok {
		c.listeners[key] = l
	}
	c.mu.Unlock()
	if !ok {
		l.close()
	}
	return ok
}

// removeListener closes the listener with a key, and reports whether there was one.
func (c *conn) removeListener(key listenKey) bool {
	c.mu.Lock()
	l, ok := c.listeners[key]
	delete(c.listeners, key)
	c.mu.Unlock()
	if ok {
		l.close()
	}
	return ok
}

// listenTCP answers tcpip-forward (RFC 4254 section 7.1). GatewayPorts decides on which
// addresses it listens.
func (c *conn) listenTCP(payload []byte) (ok bool, reply []byte) {
	r, err := parseListen(payload)
	if err != nil || policy.MayListen(c.id.Permissions, r.Host, r.Port) != nil {
		return false, nil
	}
	if r.Port != 0 && r.Port < 1024 && c.login.Account.UID != 0 {
		return false, nil // a privileged port
	}
	l, port, err := c.login.Account.listen(bindAddresses(c.server.GatewayPorts, r.Host), r.Port)
	if err != nil {
		c.log.Info("remote forward failed", "host", r.Host, "port", r.Port, "err", err)
		return false, nil
	}
	if !c.addListener(listenKey{r.Host, port}, l) {
		return false, nil
	}
	c.serve(l, func(nc net.Conn) (string, []byte) {
		origin := identity.AddrPort(nc.RemoteAddr())
		return sshmsg.TypeForwardedTCPIP, sshmsg.TCPIP{
			Host: r.Host, Port: port, // the client's own names
			OriginHost: origin.Addr().String(), OriginPort: uint32(origin.Port()),
		}.Append(nil)
	})
	if r.Port == 0 {
		reply = sshmsg.AppendListenReply(nil, port)
	}
	return true, reply
}

// bindAddresses returns the addresses to listen on for a host that a client
// names, as sshd's channel_fwd_bind_addr does.
func bindAddresses(gatewayPorts, host string) []string {
	loopback, wildcard := []string{"127.0.0.1", "::1"}, []string{"0.0.0.0", "::"}
	switch {
	case gatewayPorts == "yes":
		return wildcard
	case host == "127.0.0.1" || host == "::1":
		return []string{host}
	case gatewayPorts != "clientspecified" || host == "localhost":
		return loopback
	case host == "" || host == "*":
		return wildcard
	}
	return []string{host}
}

// listen listens as the account on a port of all addresses; 0 means any port. Addresses that
// the machine does not have are skipped. But if the port is in use on one of them, listen
// fails, because clients would reach either listener.
func (a Account) listen(addrs []string, port uint32) (l *listener, got uint32, err error) {
	err = a.impersonate(func() error {
		if port != 0 {
			l, got, err = listenAll(addrs, port, net.Listen)
		} else {
			l, got, err = listenAny(addrs, net.Listen)
		}
		return err
	})
	return l, got, err
}

// listenAny listens on a port that is free on all addresses. The kernel chooses a port that
// is free on the first address; if it is in use on another, listenAny tries again.
func listenAny(addrs []string, listen func(network, addr string) (net.Listener, error)) (l *listener, port uint32, err error) {
	const attempts = 20
	for range attempts {
		if l, port, err = listenAll(addrs, 0, listen); !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return l, port, err
}

func listenAll(addrs []string, port uint32, listen func(network, addr string) (net.Listener, error)) (*listener, uint32, error) {
	l := &listener{}
	var firstErr error
	for _, addr := range addrs {
		// An IPv6 socket is for IPv6 only, because IPv4 has a socket of its own.
		network := "tcp"
		if ip, err := netip.ParseAddr(addr); err == nil && ip.Is4() {
			network = "tcp4"
		} else if err == nil {
			network = "tcp6"
		}
		sock, err := listen(network, net.JoinHostPort(addr, strconv.Itoa(int(port))))
		if errors.Is(err, syscall.EADDRINUSE) {
			l.close()
			return nil, 0, err
		}
		if err != nil {
			if firstErr == nil {
				firstErr = err
			}
			continue
		}
		l.socks = append(l.socks, sock)
		port = uint32(identity.AddrPort(sock.Addr()).Port())
	}
	if len(l.socks) == 0 {
		return nil, 0, firstErr
	}
	return l, port, nil
}

func (c *conn) cancelTCP(payload []byte) bool {
	r, err := parseListen(payload)
	return err == nil && c.removeListener(listenKey{r.Host, r.Port})
}

// listenUnix answers streamlocal-forward (OpenSSH PROTOCOL section 2.4). If the file exists,
// listening fails unless StreamLocalBindUnlink is set. Unlike sshd, the agent removes the
// socket when the forward ends.
func (c *conn) listenUnix(payload []byte) bool {
	path, err := parseListenStreamlocal(payload)
	if err != nil || policy.MayListenSocket(c.id.Permissions) != nil {
		return false
	}
	addr := c.socketAddr(path)
	if c.server.StreamLocalBindUnlink {
		// If this fails, listening fails, too.
		c.login.Account.impersonate(func() error { return unix.Unlink(addr.Name) })
	}
	l, err := c.listenSocket(addr, cmp.Or(c.server.SocketMode, 0o600))
	if err != nil {
		c.log.Info("remote forward failed", "path", path, "err", err)
		return false
	}
	if !c.addListener(listenKey{host: path}, l) {
		return false
	}
	c.serve(l, func(net.Conn) (string, []byte) {
		return sshmsg.TypeForwardedStreamlocal, sshmsg.AppendForwardedStreamlocal(nil, path)
	})
	return true
}

// listenSocket listens on a socket that belongs to the account. Accounts that may write to
// the socket, by its mode, may connect.
func (c *conn) listenSocket(addr *net.UnixAddr, mode os.FileMode) (*listener, error) {
	a := c.login.Account
	// The file gets the mode of the socket, without the bits of the umask (unix(7)).
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		if ctlErr := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), uint32(mode)) }); ctlErr != nil {
			return ctlErr
		}
		return os.NewSyscallError("fchmod", err)
	}}
	var sock net.Listener
	err := a.impersonate(func() error {
		var err error
		if sock, err = config.Listen(context.Background(), "unix", addr.Name); err != nil {
			return err
		}
		if err := os.Chmod(addr.Name, mode); err != nil { // add the bits of the umask
			sock.Close()
			return err
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	sock.(*net.UnixListener).SetUnlinkOnClose(false) // cleanup removes it, as the account
	return &listener{
		socks:   []net.Listener{sock},
		cleanup: func() { a.impersonate(func() error { return os.Remove(addr.Name) }) },
	}, nil
}

func (c *conn) cancelUnix(payload []byte) bool {
	path, err := parseListenStreamlocal(payload)
	return err == nil && c.removeListener(listenKey{host: path})
}

// forwardAgent answers auth-agent-req: it creates a socket from which connections are
// forwarded to the client's ssh-agent. All sessions of the connection share the socket.
func (c *conn) forwardAgent() bool {
	if !c.id.Permissions.AgentForwarding {
		return false
	}
	if c.agentPath() != "" {
		return true
	}
	a := c.login.Account
	var dir string
	err := a.impersonate(func() error {
		var err error
		dir, err = os.MkdirTemp("/tmp", "ssh-")
		return err
	})
	if err != nil {
		c.log.Warn("creating the directory of an agent socket failed", "err", err)
		return false
	}
	// The same name as sshd's, because scripts look for /tmp/ssh-*/agent.*.
	name := filepath.Join(dir, "agent."+strconv.Itoa(os.Getpid()))
	l, err := c.listenSocket(&net.UnixAddr{Name: name, Net: "unix"}, 0o600)
	removeDir := func() { a.impersonate(func() error { return os.Remove(dir) }) }
	if err != nil {
		c.log.Warn("creating an agent socket failed", "err", err)
		removeDir()
		return false
	}
	removeSocket := l.cleanup
	l.cleanup = func() { removeSocket(); removeDir() }

	c.mu.Lock()
	ok := !c.closed && c.agent == nil
	if ok {
		c.agent = l
	}
	c.mu.Unlock()
	if !ok { // another session has created one, or the connection is closing
		l.close()
		return c.agentPath() != ""
	}
	c.serve(l, func(nc net.Conn) (string, []byte) {
		// As in ssh-agent, in case the modes of the socket and its directory were changed.
		if uid, err := unixsock.PeerUID(nc.(stream)); err != nil || uid != a.UID && uid != 0 {
			c.log.Warn("closed a connection of another account to the ssh-agent", "uid", uid, "err", err)
			return "", nil
		}
		return "auth-agent@openssh.com", nil
	})
	return true
}

// agentPath returns the path of the forwarded agent's socket, or "".
func (c *conn) agentPath() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.agent == nil {
		return ""
	}
	return c.agent.socks[0].Addr().String()
}
