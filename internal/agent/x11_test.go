package agent

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// TestX11SingleConnection opens connections to a display with single_connection at the same
// time. Only one may be served.
func TestX11SingleConnection(t *testing.T) {
	b := start(t, nil)
	for range 20 {
		c := b.dial(alice())
		var opened atomic.Int32
		var serving sync.WaitGroup
		serving.Go(func() {
			for nc := range c.HandleChannelOpen("x11") {
				opened.Add(1)
				nc.Reject(ssh.Prohibited, "")
			}
		})
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		ok, err := s.SendRequest("x11-req", true, ssh.Marshal(x11Request{true, "MIT-MAGIC-COOKIE-1", "00112233445566778899aabbccddeeff", 0}))
		if !ok || err != nil {
			t.Fatal(ok, err)
		}
		out, err := s.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		s.StdinPipe() // stays open, and cat with it
		if err := s.Start("echo $DISPLAY; cat"); err != nil {
			t.Fatal(err)
		}
		var display int
		if _, err := fmt.Fscanf(out, "localhost:%d.0\n", &display); err != nil {
			t.Fatal(err)
		}
		var dials sync.WaitGroup
		for range 8 {
			dials.Go(func() {
				if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", x11Port+display)); err == nil {
					io.Copy(io.Discard, conn) // until it is closed
					conn.Close()
				}
			})
		}
		dials.Wait()
		c.Close()
		serving.Wait()
		if n := opened.Load(); n != 1 {
			t.Fatalf("%d connections were served, want 1", n)
		}
	}
}

func TestX11(t *testing.T) {
	b := start(t, nil)
	c := b.dial(alice())
	go func() {
		for nc := range c.HandleChannelOpen("x11") {
			ch, reqs, err := nc.Accept()
			if err != nil {
				return
			}
			go ssh.DiscardRequests(reqs)
			go func() { io.WriteString(ch, "hello "); io.Copy(ch, ch); ch.CloseWrite() }()
		}
	}()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	ok, err := s.SendRequest("x11-req", true, ssh.Marshal(x11Request{true, "MIT-MAGIC-COOKIE-1", "00112233445566778899aabbccddeeff", 0}))
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	in, _ := s.StdinPipe()
	outPipe, _ := s.StdoutPipe()
	if err := s.Start("echo $DISPLAY; xauth list; echo; cat"); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	buf := make([]byte, 1000)
	for !bytes.Contains(out.Bytes(), []byte("\n\n")) {
		n, err := outPipe.Read(buf)
		if out.Write(buf[:n]); err != nil {
			t.Fatal(err)
		}
	}
	var display int
	fmt.Sscanf(out.String(), "localhost:%d.0\n", &display)
	if display < 10 || !strings.Contains(out.String(), "MIT-MAGIC-COOKIE-1  00112233445566778899aabbccddeeff") {
		t.Fatalf("got %q", out.String())
	}
	addr := fmt.Sprintf("127.0.0.1:%d", 6000+display)
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	ask(t, conn, "x")
	sshtest.Eventually(t, "the listener has been closed", func() bool {
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	in.Close()
	s.Wait()
}
