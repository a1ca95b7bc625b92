package gateway

import (
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/relay"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/wire"
)

// TestMemory: when memory is scarce, who holds most loses her connection, and
// nobody else.
func TestMemory(t *testing.T) {
	const budget, scarce = 1000, 1001
	tests := []struct {
		name string
		heap int64
		// What alice does on 16 channels, which hold 2 MiB each, and on how many
		// connections; bob uses one that works.
		bastionReads, clientSends, bastionSends bool
		conns                                   int
		ends                                    bool // alice's connections
		says                                    string
	}{
		{name: "the bastion does not read", heap: scarce, clientSends: true, conns: 1, ends: true, says: "closing a connection that holds memory"},
		{name: "the client does not read", heap: scarce, bastionReads: true, bastionSends: true, conns: 1, ends: true, says: "closing a connection that holds memory"},
		{name: "on many connections", heap: scarce, clientSends: true, conns: 5, ends: true, says: "closing a connection that holds memory"},
		{name: "plenty", heap: budget, clientSends: true, conns: 1},
		{name: "much has passed", heap: scarce, bastionReads: true, clientSends: true, conns: 1, says: "no user holds much of it"},
		{name: "idle", heap: scarce, conns: 1, says: "no user holds much of it"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.srv.MaxMemory, w.srv.MaxSessions = budget, 16
				w.srv.heap = func() int64 { return tt.heap }
				w.srv.Dial = func(_ context.Context, id identity.Identity, _ func(bool)) (*bastion.Conn, error) {
					near, far := sshtest.Pipe()
					go serveStreams(far, id.User == "bob" || tt.bastionReads, id.User == "alice" && tt.bastionSends)
					stream := wire.New(near)
					conn, chans, reqs, err := ssh.NewClientConn(stream, "bastion", &ssh.ClientConfig{HostKeyCallback: ssh.InsecureIgnoreHostKey()})
					if err != nil {
						return nil, err
					}
					return &bastion.Conn{Conn: conn, Net: stream, Chans: chans, Reqs: reqs}, nil
				}
				var sending sync.WaitGroup
				use := func(user string, key ssh.Signer, channels int, send bool) *client {
					c, err := w.connect(t.Context(), user, key)
					if err != nil {
						t.Fatal(err)
					}
					for range channels {
						ch, reqs, err := c.OpenChannel("session", nil)
						if err != nil {
							t.Fatal(err)
						}
						go ssh.DiscardRequests(reqs)
						if send {
							sending.Go(func() { ch.Write(make([]byte, 5<<20)) })
						}
					}
					return c
				}
				var alices []*client
				for range tt.conns {
					alices = append(alices, use("alice", w.alice, 16, tt.clientSends))
				}
				quiet := use("alice", w.alice, 1, false)
				bob := use("bob", w.bob, 9, true)
				synctest.Wait()
				w.srv.freeMemory()
				synctest.Wait()
				for _, c := range alices {
					if got := ended(c); got != tt.ends {
						t.Errorf("alice's connection has ended: %t", got)
					}
					c.Close()
				}
				if ended(quiet) || ended(bob) {
					t.Error("a connection was closed that holds nothing")
				}
				quiet.Close()
				bob.Close()
				sending.Wait()
				synctest.Wait()
				if log := w.logged(); !strings.Contains(log, tt.says) || tt.says == "" && strings.Contains(log, "memory") {
					t.Errorf("the log:\n%s", log)
				}
			})
		})
	}
}

// TestHeld: what only surrounds data is not taken for something that is held.
func TestHeld(t *testing.T) {
	const MiB = 1 << 20
	var h held
	look := func(received, handed, back int64, heldUp bool) int64 {
		return h.look(received, relay.Direction{Bytes: handed, HeldUp: heldUp}, relay.Direction{Bytes: back})
	}
	for _, step := range []struct {
		what                   string
		received, handed, back int64
		heldUp                 bool
		want                   int64
	}{
		{"at rest after much typing", 500 * MiB, 10 * MiB, 0, false, 0},
		{"something has come in", 502 * MiB, 10 * MiB, 0, true, 2 * MiB},
		{"and has gone out, in packets of 300 bytes", 601 * MiB, 100 * MiB, 0, true, 0},
		{"and much has gone the other way", 603 * MiB, 100 * MiB, 2000 * MiB, true, 0},
		{"single bytes that stay", 700 * MiB, 100 * MiB, 2000 * MiB, true, 700*MiB - 500*MiB - 90*MiB - 90*MiB/8 - 2000*MiB/512},
		{"at rest again", 701 * MiB, 103 * MiB, 2000 * MiB, false, 0},
		{"something has come in", 702 * MiB, 103 * MiB, 2000 * MiB, true, MiB},
	} {
		if got := look(step.received, step.handed, step.back, step.heldUp); got != step.want {
			t.Errorf("%s: %d, want %d", step.what, got, step.want)
		}
	}
}

// ended reports whether a connection has, in a bubble.
func ended(c *client) bool {
	gone := make(chan struct{})
	go func() { c.Wait(); close(gone) }() // at the latest when the test closes it
	synctest.Wait()
	select {
	case <-gone:
		return true
	default:
		return false
	}
}

// serveStreams is a bastion whose channels read, or do not, and send, or do not.
func serveStreams(nc net.Conn, reads, sends bool) {
	cfg := &ssh.ServerConfig{NoClientAuth: true}
	cfg.AddHostKey(bastionHostKey())
	conn, chans, reqs, err := ssh.NewServerConn(nc, cfg)
	if err != nil {
		return
	}
	defer conn.Close()
	go ssh.DiscardRequests(reqs)
	for nc := range chans {
		ch, reqs, err := nc.Accept()
		if err != nil {
			return
		}
		go ssh.DiscardRequests(reqs)
		if reads {
			go io.Copy(io.Discard, ch)
		}
		if sends {
			go ch.Write(make([]byte, 5<<20))
		}
	}
}
