package bastion

import (
	"context"
	"net"
	"slices"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/unixsock"
)

const (
	// attemptInterval is the time between two TCP connection attempts.
	attemptInterval = 200 * time.Millisecond
	// maxAttempts is the number of attempts that may be pending.
	maxAttempts = 5
)

// dialAddr connects to the address of a task: a Unix socket, or a TCP address, for
// which netDial, if not nil, replaces a net.Dialer.
func dialAddr(ctx context.Context, netDial func(ctx context.Context, network, addr string) (net.Conn, error), addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	if path, ok := unixsock.Path(addr); ok {
		return unixsock.Dial(ctx, path)
	}
	if netDial == nil {
		// Package net sets TCP_NODELAY by itself. With these keepalives, the
		// loss of a bastion's network is noticed within two minutes.
		netDial = (&net.Dialer{KeepAliveConfig: net.KeepAliveConfig{
			Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4,
		}}).DialContext
	}
	return dialTCP(ctx, netDial, addr)
}

// dialTCP makes a TCP connection to a machine that may be booting. Such a machine
// does not refuse a SYN but loses it, and TCP repeats it after 1, 2 and 4 seconds.
// So dialTCP begins another attempt every 200 ms, and the first that is answered
// wins. At most maxAttempts are pending: the second-oldest makes room, and the very
// first is kept, for networks that are slow.
func dialTCP(ctx context.Context, netDial func(ctx context.Context, network, addr string) (net.Conn, error), addr string) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		conn net.Conn
		err  error // nil also if the attempt has made room
	}
	outcomes := make(chan outcome)
	pending := 0
	var cancels []context.CancelFunc // of the pending attempts
	attempt := func() {
		if len(cancels) == maxAttempts {
			cancels[1]()
			cancels = slices.Delete(cancels, 1, 2)
		}
		one, cancel := context.WithCancel(ctx)
		cancels = append(cancels, cancel)
		pending++
		go func() { // the loops below wait for it
			c, err := netDial(one, "tcp", addr)
			if one.Err() != nil && ctx.Err() == nil {
				err = nil
			}
			outcomes <- outcome{c, err}
		}()
	}
	attempt()
	tick := time.NewTicker(attemptInterval)
	defer tick.Stop()
	var first outcome
	for first.conn == nil && first.err == nil {
		select {
		case first = <-outcomes:
			pending--
		case <-tick.C:
			attempt()
		}
	}
	cancel()
	for ; pending > 0; pending-- {
		if late := <-outcomes; late.conn != nil {
			late.conn.Close()
		}
	}
	return first.conn, first.err
}
