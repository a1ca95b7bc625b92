package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/policy"
)

const (
	// dialTimeout bounds a direct-tcpip's wait for its target.
	dialTimeout = 10 * time.Second
	// drainTimeout bounds how long what a client sent before it closed a
	// forward waits to be taken by the target.
	drainTimeout = 10 * time.Second
)

// A stream is what both *net.TCPConn and *net.UnixConn are.
type stream interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
}

// directTCP connects a client to a TCP port (RFC 4254 section 7.2).
func (c *conn) directTCP(nc ssh.NewChannel) {
	r, err := parseDirectTCP(nc.ExtraData())
	if err != nil {
		nc.Reject(ssh.Prohibited, "open failed")
		return
	}
	refuse := func(why error) {
		c.log.Info("forward refused", "to", r.Host, "port", r.Port, "why", why)
		nc.Reject(ssh.Prohibited, why.Error())
	}
	if err := policy.MayOpen(c.id.Permissions, r.Host, r.Port); err != nil {
		refuse(err)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	// Each address that the name stands for is asked about right before it is
	// connected to: what a second look at the name might bring would be
	// another one.
	d := net.Dialer{Control: func(_, address string, raw syscall.RawConn) error {
		at, err := netip.ParseAddrPort(address)
		if err == nil {
			err = policy.MayConnect(c.id.Permissions, r.Host, at.Addr(), r.Port)
		}
		if err != nil {
			return &refusal{err}
		}
		return c.server.Account.makeSocket(raw)
	}}
	sock, err := d.DialContext(ctx, "tcp", net.JoinHostPort(r.Host, strconv.Itoa(int(r.Port))))
	if refused := (*refusal)(nil); errors.As(err, &refused) {
		refuse(refused.error)
		return
	}
	if err != nil {
		nc.Reject(ssh.ConnectionFailed, dialErrorText(err))
		return
	}
	c.accept(nc, sock.(stream))
}

// A refusal is why an address may not be connected to.
type refusal struct{ error }

// dialErrorText says what sshd would: strerror(3) or gai_strerror(3).
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

// directStreamlocal connects a client to a Unix socket (OpenSSH PROTOCOL
// section 2.4), with the account's rights. sshd's permitopen does not speak of
// sockets; a key that has it gets none.
func (c *conn) directStreamlocal(nc ssh.NewChannel) {
	path, err := parseDirectStreamlocal(nc.ExtraData())
	if err != nil {
		nc.Reject(ssh.Prohibited, "open failed")
		return
	}
	if err := policy.MayOpenSocket(c.id.Permissions); err != nil {
		nc.Reject(ssh.Prohibited, err.Error())
		return
	}
	var sock *net.UnixConn
	err = c.server.Account.do(func() error {
		var err error
		sock, err = net.DialUnix("unix", nil, c.socketAddr(path))
		return err
	})
	if err != nil {
		nc.Reject(ssh.ConnectionFailed, dialErrorText(err))
		return
	}
	c.accept(nc, sock)
}

// socketAddr makes a path absolute, relative ones being in the home directory.
// That also keeps package net from taking a leading @ for an abstract name.
func (c *conn) socketAddr(path string) *net.UnixAddr {
	if !filepath.IsAbs(path) {
		path = filepath.Join(c.server.Account.Home, path)
	}
	return &net.UnixAddr{Name: path, Net: "unix"}
}

// accept joins a channel the client opened with sock, and closes both.
func (c *conn) accept(nc ssh.NewChannel, sock stream) {
	ch, reqs, err := nc.Accept()
	if err != nil {
		sock.Close()
		return
	}
	c.join(ch, reqs, sock)
}

// join carries bytes between a channel and a socket until both directions have
// ended, each of which may end alone, or the client closes the channel.
func (c *conn) join(ch ssh.Channel, reqs <-chan *ssh.Request, sock stream) {
	defer sock.Close()
	var wg sync.WaitGroup
	spawn := func(f func()) {
		wg.Add(1)
		c.spawn("forward", func() { defer wg.Done(); f() })
	}
	spawn(func() { io.Copy(io.Discard, ch.Stderr()) }) // or it would use up the window
	sent := make(chan struct{})
	spawn(func() {
		err := copyTo(sock, ch)
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
	for req := range reqs {
		req.Reply(false, nil)
	}
	// The client has closed the channel: what it sent before still goes out.
	sock.SetReadDeadline(time.Now())
	sock.SetWriteDeadline(time.Now().Add(drainTimeout))
	wg.Wait()
}

// A listenKey names a remote forward as its client does: with the port it got,
// if it had asked for port 0.
type listenKey struct {
	host string // or the path of a socket
	port uint32 // 0 for a socket
}

// A listener accepts connections for a client to answer.
type listener struct {
	socks []net.Listener
	// cleanup, if not nil, removes what the listening left behind.
	cleanup func()
	once    sync.Once
}

// close is safe to call more than once. Connections already made live on.
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

// serve opens a channel to the client for each connection to l, until that is
// closed. open says which type of channel; none closes the connection.
func (c *conn) serve(l *listener, open func(net.Conn) (kind string, payload []byte)) {
	for _, sock := range l.socks {
		c.spawn("listener", func() {
			for {
				nc, err := sock.Accept()
				if err != nil {
					if errors.Is(err, net.ErrClosed) {
						return
					}
					c.log.Warn("accepting a connection to forward", "err", err)
					time.Sleep(100 * time.Millisecond) // out of descriptors, most likely
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
					ch, reqs, err := c.ssh.OpenChannel(kind, payload)
					if err != nil {
						nc.Close()
						return
					}
					c.join(ch, reqs, nc.(stream))
				})
			}
		})
	}
}

// keep remembers a listener under a key, unless that is taken, there are too
// many, or the connection is ending; then it closes l and returns false.
func (c *conn) keep(key listenKey, l *listener) bool {
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

// drop closes the listener of a key.
func (c *conn) drop(key listenKey) bool {
	c.mu.Lock()
	l, ok := c.listeners[key]
	delete(c.listeners, key)
	c.mu.Unlock()
	if ok {
		l.close()
	}
	return ok
}

// listenTCP answers tcpip-forward (RFC 4254 section 7.1). It listens on
// loopback addresses only, like an sshd with GatewayPorts no.
func (c *conn) listenTCP(payload []byte) (ok bool, reply []byte) {
	r, err := parseTCPAddr(payload)
	if err != nil || policy.MayListen(c.id.Permissions, r.Host, r.Port) != nil {
		return false, nil
	}
	if r.Port != 0 && r.Port < 1024 && c.server.Account.UID != 0 {
		return false, nil // the account could not have bound it
	}
	l, port, err := c.server.Account.listenLoopback(r.Host, r.Port)
	if err != nil {
		c.log.Info("remote forward refused", "host", r.Host, "port", r.Port, "err", err)
		return false, nil
	}
	if !c.keep(listenKey{r.Host, port}, l) {
		return false, nil
	}
	c.serve(l, func(nc net.Conn) (string, []byte) {
		origin := addrPort(nc.RemoteAddr())
		return "forwarded-tcpip", ssh.Marshal(directTCP{
			Host: r.Host, Port: port, // as the client knows them
			OriginHost: origin.Addr().String(), OriginPort: uint32(origin.Port()),
		})
	})
	if r.Port == 0 {
		reply = ssh.Marshal(struct{ Port uint32 }{port})
	}
	return true, reply
}

// listenLoopback listens on a port, 0 meaning any, of the loopback address
// that host names; every host that does not name one stands for both. If the
// machine has only one of the two, that is enough. But a port that is somebody
// else's on either is not ours: people who connect to it would meet both.
func (a Account) listenLoopback(host string, port uint32) (l *listener, got uint32, err error) {
	addrs := []string{"127.0.0.1", "::1"}
	if host == "127.0.0.1" || host == "::1" {
		addrs = []string{host}
	}
	err = a.do(func() error {
		if port != 0 {
			l, got, err = listenAll(addrs, port, net.Listen)
		} else {
			l, got, err = listenAny(addrs, net.Listen)
		}
		return err
	})
	return l, got, err
}

// listenAny listens on a port that is free on all addresses: the kernel chooses
// one that is on the first.
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
		sock, err := listen("tcp", net.JoinHostPort(addr, strconv.Itoa(int(port))))
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
		port = uint32(addrPort(sock.Addr()).Port())
	}
	if len(l.socks) == 0 {
		return nil, 0, firstErr
	}
	return l, port, nil
}

func (c *conn) cancelTCP(payload []byte) bool {
	r, err := parseTCPAddr(payload)
	return err == nil && c.drop(listenKey{r.Host, r.Port})
}

// listenUnix answers streamlocal-forward (OpenSSH PROTOCOL section 2.4). As
// with sshd's default StreamLocalBindUnlink, a file that is there already is in
// the way; unlike sshd, the socket's file is removed at the end.
func (c *conn) listenUnix(payload []byte) bool {
	path, err := parseStreamlocal(payload)
	if err != nil || policy.MayListenSocket(c.id.Permissions) != nil {
		return false
	}
	l, err := c.listenSocket(c.socketAddr(path))
	if err != nil {
		c.log.Info("remote forward refused", "path", path, "err", err)
		return false
	}
	if !c.keep(listenKey{host: path}, l) {
		return false
	}
	c.serve(l, func(net.Conn) (string, []byte) {
		return "forwarded-streamlocal@openssh.com", ssh.Marshal(forwardedStreamlocal{Path: path})
	})
	return true
}

// listenSocket listens on a socket file that belongs to the account and nobody
// else can connect to.
func (c *conn) listenSocket(addr *net.UnixAddr) (*listener, error) {
	a := c.server.Account
	// The file gets the mode of the socket, less the umask (unix(7)).
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		if ctlErr := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); ctlErr != nil {
			return ctlErr
		}
		return os.NewSyscallError("fchmod", err)
	}}
	var sock net.Listener
	err := a.do(func() error {
		var err error
		sock, err = config.Listen(context.Background(), "unix", addr.Name)
		return err
	})
	if err != nil {
		return nil, err
	}
	sock.(*net.UnixListener).SetUnlinkOnClose(false) // by us, with the account's rights
	return &listener{
		socks:   []net.Listener{sock},
		cleanup: func() { a.do(func() error { return os.Remove(addr.Name) }) },
	}, nil
}

func (c *conn) cancelUnix(payload []byte) bool {
	path, err := parseStreamlocal(payload)
	return err == nil && c.drop(listenKey{host: path})
}

// forwardAgent answers auth-agent-req: from now on the connection has a socket
// that leads to the client's ssh-agent. All its sessions share it.
func (c *conn) forwardAgent() bool {
	if !c.id.Permissions.AgentForwarding {
		return false
	}
	if c.agentPath() != "" {
		return true
	}
	a := c.server.Account
	var dir string
	err := a.do(func() error {
		var err error
		dir, err = os.MkdirTemp("/tmp", "ssh-")
		return err
	})
	if err != nil {
		c.log.Warn("no directory for an agent socket", "err", err)
		return false
	}
	// Named as sshd's are: scripts look for /tmp/ssh-*/agent.*.
	name := filepath.Join(dir, "agent."+strconv.Itoa(os.Getpid()))
	l, err := c.listenSocket(&net.UnixAddr{Name: name, Net: "unix"})
	removeDir := func() { a.do(func() error { return os.Remove(dir) }) }
	if err != nil {
		c.log.Warn("no agent socket", "err", err)
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
	if !ok { // another session of the connection was faster, or it is ending
		l.close()
		return c.agentPath() != ""
	}
	c.serve(l, func(nc net.Conn) (string, []byte) {
		if uid, err := peerUID(nc); err != nil || uid != a.UID && uid != 0 {
			c.log.Warn("somebody else asked for the user's ssh-agent", "uid", uid, "err", err)
			return "", nil
		}
		return "auth-agent@openssh.com", nil
	})
	return true
}

// peerUID is the user id of who has connected to a Unix socket (unix(7),
// SO_PEERCRED). The mode of the socket and of its folder keep others out; as
// ssh-agent does, this keeps them out if somebody has changed those.
func peerUID(nc net.Conn) (uint32, error) {
	raw, err := nc.(stream).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, os.NewSyscallError("getsockopt", credErr)
	}
	return cred.Uid, nil
}

// agentPath is the forwarded agent's socket, or "".
func (c *conn) agentPath() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.agent == nil {
		return ""
	}
	return c.agent.socks[0].Addr().String()
}
