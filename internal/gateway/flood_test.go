package gateway

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// TestFlood: 500 sources fail 10,000 logins as fast as they can, over real sockets, while a
// user logs in repeatedly; with an audit log and without.
func TestFlood(t *testing.T) {
	t.Run("without audit log", func(t *testing.T) { testFlood(t, false) })
	t.Run("with audit log", func(t *testing.T) { testFlood(t, true) })
}

func testFlood(t *testing.T, audited bool) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	other, err := net.Listen("tcp", "127.7.0.1:0")
	if err != nil {
		t.Skip("this system has one loopback address only: ", err)
	}
	other.Close()
	const sources, logins, workers = 500, 10_000, 50
	gw := newTestGateway(t)
	var checked atomic.Int64 // calls of Authorize
	authorize := gw.srv.Authorize
	gw.srv.Authorize = func(user string, key ssh.PublicKey, from netip.Addr, now time.Time) (auth.Grant, error) {
		if user == "mallory" {
			checked.Add(1)
		}
		return authorize(user, key, from, now)
	}
	gw.srv.PerSourcePenalties = sshdPenalties
	gw.srv.Log = slog.New(slog.DiscardHandler)
	events := func() []audit.Event { return nil }
	if audited {
		events = gw.auditTo(t)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- gw.srv.Serve(ctx, ln) }()
	end := sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	defer end()

	connect := func(from net.IP, user string, key ssh.Signer) error {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}
		nc, err := d.DialContext(ctx, "tcp", ln.Addr().String())
		if err != nil {
			return err
		}
		defer nc.Close()
		c, err := loginOn(nc, user, key)
		if err == nil {
			c.Close()
		}
		return err
	}
	before := heapInUse()
	began := time.Now()
	var done, in atomic.Int64
	var flood sync.WaitGroup
	wrong := sshtest.NewKey(t)
	for range workers {
		flood.Go(func() {
			for {
				n := done.Add(1)
				if n > logins {
					return
				}
				if connect(net.IPv4(127, 7, byte(n%sources/250), byte(1+n%sources%250)), "mallory", wrong) == nil {
					in.Add(1)
				}
			}
		})
	}
	over := make(chan struct{})
	go func() { flood.Wait(); close(over) }()
	var refused error // the last one
	tried, good, running, longest := 0, 0, 0, 0
	for under := true; under; {
		select {
		case <-over:
			under = false
		default:
		}
		tried++
		if err := connect(net.IPv4(127, 0, 0, 1), "alice", gw.alice); err != nil {
			refused = err
			running++
			longest = max(longest, running)
		} else {
			good++
			running = 0
		}
	}
	took := time.Since(began)
	end() // so that no login in progress counts as memory
	after := heapInUse()
	t.Logf("%d logins in %v, of which %d were looked at; the honest user tried %d times and got in %d times, refused %d times running at most (%v); %d KiB more memory",
		logins, took.Round(time.Millisecond), checked.Load(), tried, good, longest, refused, (after-before)>>10)
	if in.Load() > 0 {
		t.Errorf("%d logins with unknown keys succeeded", in.Load())
	}
	// If all workers are logging in, the default of MaxStartups rejects 61 of
	// 100 connections.
	if good == 0 || longest > 60 {
		t.Errorf("%d of %d logins of the user succeeded, and %d in a row were rejected: %v", good, tried, longest, refused)
	}
	// A penalty decreases with time, so a source may fail once for each
	// AuthFail that has passed, and until it reaches Min. Two more logins may
	// be in progress then.
	each := 2 + int64((took+sshdPenalties.Min)/sshdPenalties.AuthFail) + 1
	if most := sources * each; checked.Load() > most {
		t.Errorf("%d calls of Authorize, want %d at most", checked.Load(), most)
	}
	if after-before > 16<<20 {
		t.Errorf("%d MiB more memory", (after-before)>>20)
	}
	if n := len(gw.srv.penalties.v4.of); n > sources {
		t.Errorf("%d sources are kept", n)
	}
	if !audited {
		return
	}
	// The log counts every connection. The rejected ones are few lines: in five
	// minutes, two for each source that is counted apart, and two for the rest.
	lines, refusedLines, connections := 0, 0, 0
	for _, e := range events() {
		lines++
		switch e.Type {
		case audit.Connection:
			connections++
		case audit.ConnectionRefused:
			refusedLines++
			connections += max(e.Times, 1)
		}
	}
	t.Logf("%d lines of audit log, of which %d are about refused connections", lines, refusedLines)
	if want := logins + tried; connections != want {
		t.Errorf("the audit log counts %d connections, want %d", connections, want)
	}
	if most := 2 * (suppressSources + 1) * (1 + int(took/suppressInterval)); refusedLines > most {
		t.Errorf("%d lines about refused connections, want %d at most", refusedLines, most)
	}
}
