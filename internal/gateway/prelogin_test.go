package gateway

import (
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
)

// TestRefusedLoginLeavesNoReader: after a login has failed, no goroutine reads from the
// client, even if it has sent more.
func TestRefusedLoginLeavesNoReader(t *testing.T) {
	gw := newTestGateway(t)
	authorize := gw.srv.Authorize
	gw.srv.Authorize = func(user string, key ssh.PublicKey, from netip.Addr, now time.Time) (auth.Grant, error) {
		time.Sleep(50 * time.Millisecond) // like an authorized_keys_command
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
			go func() { gw.srv.ServeConn(t.Context(), nc); served <- struct{}{} }()
		}
	}()
	readers := func() int {
		buf := make([]byte, 8<<20)
		return strings.Count(string(buf[:runtime.Stack(buf, true)]), "transport.(*Conn).nextPacket(")
	}
	before := readers()
	host, port, _ := net.SplitHostPort(ln.Addr().String())
	for _, attack := range []string{"service", "request"} {
		// Debian's python3, which has paramiko.
		out, err := exec.Command("/usr/bin/python3", "testdata/prelogin.py", host, port, attack).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", attack, err, out)
		}
		<-served
		for deadline := time.Now().Add(10 * time.Second); readers() > before; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: the transport still reads; log:\n%s", attack, gw.logged())
			}
		}
	}
	if log := gw.logged(); !strings.Contains(log, "bad service request") || !strings.Contains(log, "unexpected message 80") {
		t.Errorf("the log lacks the reasons:\n%s", log)
	}
}

// TestBeforeLogin: a client that has not logged in gets one key exchange, and 1 MiB is
// read from it.
func TestBeforeLogin(t *testing.T) {
	for _, tt := range []struct {
		attack, log string
		most        int
	}{
		{"rekey", "key exchange before authentication", 0},
		{"flood", "too much before authentication", 8 << 10}, // the sockets hold some of it
	} {
		t.Run(tt.attack, func(t *testing.T) {
			gw := newTestGateway(t)
			gw.srv.KexAlgorithms = []string{ssh.KeyExchangeDH14SHA256}
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			served := make(chan struct{})
			go func() {
				defer close(served)
				if nc, err := ln.Accept(); err == nil {
					gw.srv.ServeConn(t.Context(), nc)
				}
			}()
			host, port, _ := net.SplitHostPort(ln.Addr().String())
			out, err := exec.Command("/usr/bin/python3", "testdata/prelogin.py", host, port, tt.attack).Output()
			if err != nil {
				t.Fatal(err)
			}
			<-served
			if n, err := strconv.Atoi(strings.TrimSpace(string(out))); err != nil || n > tt.most {
				t.Errorf("%s: %s times, want %d at most", tt.attack, out, tt.most)
			}
			if log := gw.logged(); !strings.Contains(log, tt.log) {
				t.Errorf("the log does not say %q:\n%s", tt.log, log)
			}
		})
	}
}
