package gateway

import (
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
)

// TestStrangersLeave: nothing is kept of clients whose login has ended, whatever
// else they had sent.
func TestStrangersLeave(t *testing.T) {
	w := newWorld(t)
	authorize := w.srv.Authorize
	w.srv.Authorize = func(user string, key ssh.PublicKey, from netip.Addr, now time.Time) (auth.Grant, error) {
		time.Sleep(50 * time.Millisecond) // as a command that is asked for keys
		return authorize(user, key, from, now)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	served := make(chan struct{})
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { w.srv.ServeConn(t.Context(), nc); served <- struct{}{} }()
		}
	}()
	readers := func() int {
		buf := make([]byte, 8<<20)
		return strings.Count(string(buf[:runtime.Stack(buf, true)]), "ssh.(*handshakeTransport).readLoop(")
	}
	before := readers()
	host, port, _ := net.SplitHostPort(ln.Addr().String())
	for _, what := range []string{"service", "request"} {
		// Debian's, whatever else is called python3.
		out, err := exec.Command("/usr/bin/python3", "testdata/stranger.py", host, port, what).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", what, err, out)
		}
		<-served
		for deadline := time.Now().Add(10 * time.Second); readers() > before; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: package ssh still reads; log:\n%s", what, w.logged())
			}
		}
	}
	if log := w.logged(); !strings.Contains(log, "ssh-nothing") || !strings.Contains(log, "parse error in message type 50") && !strings.Contains(log, "unexpected message type 80") {
		t.Errorf("the logins have ended otherwise:\n%s", log)
	}
}
