package wire

import (
	"net"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

// Package ssh (as of v0.58.0) has a goroutine that reads packets and queues sixteen
// of them for whoever is to have them next. Once nobody takes any more, because a
// client sent what is against the protocol and more behind it, the goroutine waits
// for room in the queue for ever, with all that it holds; closing the stream does
// not wake it. A stranger could have us keep a quarter of a megabyte for each packet
// of each connection, and a user could keep a connection from ever ending, and
// whoever waits for that. A channel, too, that is opened while package ssh ends a
// connection is waited for for ever.
//
// So once the stream is closed the queue is emptied, if nobody else does that, and
// such channels are given up, by hands in package ssh that it does not offer. The
// queue cannot be found before authentication begins; until then no more is read
// than it has room for.
//
// TestStrangersLeave, TestEndsAgainstTheProtocol and TestOpenWhileEnding fail if
// another version of package ssh needs it done in another way.

// keysRoom is how much may come after the keys are taken into use and before
// authentication begins: sixteen packets of the least size, which is that of
// AES-GCM (RFC 5647, section 7.2) with a payload of one byte. A client sends one,
// and waits for the answer (RFC 4253, section 10).
const keysRoom = 16 * (4 + 6 + 16)

// A hold keeps back what comes before authentication begins.
type hold struct {
	state atomic.Int32 // one of those below; changed under mu
	mu    sync.Mutex
	over  sync.Cond // state has become free or closed
	room  int       // while counting

	shut    bool // the stream is closed
	preAuth ssh.ServerPreAuthConn
	conn    ssh.Conn
}

const (
	free     = iota // nothing is kept back
	waiting         // for the keys to be taken into use
	counting        // room is left
	closed
)

// newKeys is the packet that announces that all that follows is encrypted
// (RFC 4253, section 7.3), but for the padding.
var newKeys = []byte{0, 0, 0, 12, 10, 21}

// wrote takes note of what is sent to the client.
func (h *hold) wrote(p []byte) {
	if h.state.Load() != waiting || len(p) != 16 || string(p[:len(newKeys)]) != string(newKeys) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state.Load() == waiting {
		h.room = 16 + keysRoom // with the client's own
		h.state.Store(counting)
	}
}

// limit returns as much of p as may be read into. It blocks until some may.
func (h *hold) limit(p []byte) ([]byte, error) {
	if h.state.Load() == free {
		return p, nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.state.Load() == counting && h.room == 0 {
		h.over.Wait()
	}
	switch h.state.Load() {
	case counting:
		return p[:min(len(p), h.room)], nil
	case closed: // before authentication began
		return nil, net.ErrClosed
	}
	return p, nil
}

// took takes note of what was read.
func (h *hold) took(n int) {
	if h.state.Load() == free {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.room = max(0, h.room-n)
}

// HoldBack is for the server's end, before package ssh is given c: as long as
// [Conn.Authenticates] has not been called, only little is read behind the key
// exchange.
func (c *Conn) HoldBack() { c.hold.state.CompareAndSwap(free, waiting) }

// Authenticates tells c that package ssh has begun to authenticate the client.
// When c is closed, package ssh lets go of it, and what has been received and not
// been looked at by then is lost.
func (c *Conn) Authenticates(p ssh.ServerPreAuthConn) {
	c.hold.carries(func(h *hold) { h.preAuth = p })
}

// Carries tells c that it carries a connection that is logged in, as the server's
// end or the client's. When c is closed, package ssh lets go of it, within some
// seconds if it is stuck.
func (c *Conn) Carries(conn ssh.Conn) {
	if server, ok := conn.(*ssh.ServerConn); ok {
		conn = server.Conn
	}
	c.hold.carries(func(h *hold) { h.conn = conn })
}

func (h *hold) carries(set func(*hold)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	set(h)
	if h.shut {
		h.letGo()
	}
	if h.state.Load() != closed {
		h.state.Store(free)
		h.over.Broadcast()
	}
}

// close is for when the stream is closed.
func (h *hold) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.shut {
		return
	}
	h.shut = true
	if h.state.Load() != free {
		h.state.Store(closed)
		h.over.Broadcast()
	}
	h.letGo()
}

// letGo is called with mu held. What it begins ends when package ssh has done with
// the connection.
func (h *hold) letGo() {
	preAuth, conn := h.preAuth, h.conn
	switch {
	case conn != nil:
		go func() {
			ended := make(chan struct{})
			go func() { conn.Wait(); close(ended) }()
			unstick(queue(conn), ended)
			<-ended
			giveUpOpens(conn)
		}()
	case preAuth != nil: // there is nobody any more who should have what is queued
		go func() {
			for range queue(preAuth) {
			}
		}()
	}
}

// stuckFor is how long nothing may be taken from a full queue. Package ssh closes a
// stream also when its end has been read, and may then be busy with what had come
// before, such as the exit status of a session.
const stuckFor = 5 * time.Second

// unstick takes what is queued if nobody else does, until ended is closed.
func unstick(queue <-chan []byte, ended <-chan struct{}) {
	tick := time.NewTicker(stuckFor / 20)
	defer tick.Stop()
	for full := 0; full < 20; {
		select {
		case <-ended:
			return
		case <-tick.C:
		}
		if full++; len(queue) < cap(queue) {
			full = 0
		}
	}
	for range queue {
	}
}

// queue returns the one of a connection, [ssh.Conn] or [ssh.ServerPreAuthConn]; one
// that is closed if it is not found.
func queue(conn any) (queue <-chan []byte) {
	defer func() {
		if recover() != nil {
			none := make(chan []byte)
			close(none)
			queue = none
		}
	}()
	field := inside(conn, "transport").Elem().Elem().FieldByName("incoming")
	return *(*chan []byte)(field.Addr().UnsafePointer())
}

// giveUpOpens is for when conn has ended: no channel is left of which package ssh
// takes care, and none can be added that is waited for.
func giveUpOpens(conn ssh.Conn) {
	defer ignore()
	list := inside(conn, "mux").Elem().FieldByName("chanList")
	mu := (*sync.Mutex)(list.FieldByName("Mutex").Addr().UnsafePointer())
	mu.Lock()
	defer mu.Unlock()
	channels := list.FieldByName("chans")
	for i := range channels.Len() {
		if channel := channels.Index(i); !channel.IsNil() {
			close(*(*chan any)(channel.Elem().FieldByName("msg").Addr().UnsafePointer()))
		}
	}
}

// inside returns a field of what package ssh has behind an interface.
func inside(conn any, field string) reflect.Value {
	return reflect.ValueOf(conn).Elem().FieldByName(field)
}

// ignore is for when package ssh is not made as it was: then things are as bad as
// they would be without all this.
func ignore() { _ = recover() }
