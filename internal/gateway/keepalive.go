package gateway

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

const (
	// clientAliveCountMax is the default of ClientAliveCountMax, as in
	// sshd_config(5).
	clientAliveCountMax = 3
	// bastionAliveInterval and bastionAliveCountMax apply to connections to
	// bastions. Unlike a client, an agent is never suspended.
	bastionAliveInterval = 15 * time.Second
	bastionAliveCountMax = 4
)

// tcpKeepAlive applies to clients' connections. The kernel answers these probes even
// for a suspended client, so only a host or network that is down ends a connection:
// after 16 minutes, about as long as Linux retransmits (tcp(7), tcp_retries2). sshd's
// two hours would keep a bastion running for a client that is gone. The interval is
// below the idle timeout of load balancers, 350 s.
var tcpKeepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: time.Minute, Count: 15}

// keepAliveTCP applies TCPKeepAlive (sshd_config(5)) to the client's connection.
func (c *conn) keepAliveTCP(nc net.Conn) {
	tcp, ok := nc.(*net.TCPConn)
	switch {
	case !ok:
	case c.cfg.DisableTCPKeepAlive:
		tcp.SetKeepAlive(false)
	default:
		tcp.SetKeepAliveConfig(tcpKeepAlive)
	}
}

// A keepalive sends a request to a peer that was silent for an interval. If the peer
// stays silent for max more intervals, it closes the connection, like sshd.
//
// It is a timer instead of a goroutine, to save the stack of a goroutine for each
// connection.
type keepalive struct {
	conn     *conn
	name     string          // of the peer
	peer     *transport.Conn // nil before start
	received atomic.Uint64   // bytes from the peer at the last tick or answer
	missed   int             // requests in a row without any byte from the peer
	answered atomic.Bool     // the last request was answered

	interval time.Duration
	max      int

	mu    sync.Mutex
	timer *time.Timer // nil before start and after stop
}

// start begins the keepalives to peer, until stop is called. An interval of zero
// disables them.
func (k *keepalive) start(c *conn, name string, peer *transport.Conn, interval time.Duration, max int) {
	if interval == 0 {
		return
	}
	k.conn, k.name, k.peer, k.interval, k.max = c, name, peer, interval, max
	k.received.Store(peer.Received())
	k.mu.Lock()
	defer k.mu.Unlock()
	k.timer = time.AfterFunc(k.untilNext(), k.tick)
}

func (c *conn) stopKeepalives() {
	c.keepClient.stop()
	c.keepBastion.stop()
}

func (k *keepalive) stop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.timer != nil {
		k.timer.Stop()
		k.timer = nil
	}
}

// untilNext returns the time to the next tick: interval, rounded so that the timers of
// many connections fire together. Thousands of separate wakeups would cost more CPU
// than the requests.
func (k *keepalive) untilNext() time.Duration {
	now := time.Now()
	return now.Add(k.interval).Round(k.interval / 15).Sub(now)
}

// tick runs in the timer's goroutine.
func (k *keepalive) tick() {
	defer k.conn.closeOnPanic(k.conn.ssh)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.timer == nil {
		return
	}
	if k.answered.Swap(false) {
		k.missed = 0
	}
	now := k.peer.Received()
	if now != k.received.Swap(now) {
		k.missed = 0
	} else if k.missed++; k.missed > k.max {
		silence := time.Duration(k.missed) * k.interval
		k.conn.log.Info("no answer to keepalives", "from", k.name, "for", silence.String())
		k.conn.setCause(k.name, "no answer to keepalives for "+silence.String())
		k.timer = nil
		go k.peer.Close() // may take a second
		return
	} else {
		// An answer does not count as activity of the peer, so the next
		// request follows an interval later.
		k.conn.ask(k.peer, func() { k.answered.Store(true); k.received.Store(k.peer.Received()) })
	}
	k.timer.Reset(k.untilNext())
}

// ask sends a request that the peer must answer, and calls answered then. For the
// console it does not call answered.
func (c *conn) ask(peer *transport.Conn, answered func()) {
	c.srv.mu.Lock()
	relay := c.relay
	c.srv.mu.Unlock()
	if relay != nil {
		relay.Ask(peer == c.ssh, answered)
		return
	}
	// The console sends no requests of its own. Its endpoint drops the reply,
	// which counts as bytes received.
	peer.WritePacket(keepaliveRequest)
	peer.Flush()
}

var keepaliveRequest = sshmsg.GlobalRequest{Type: sshmsg.Keepalive, WantReply: true}.Append(nil)
