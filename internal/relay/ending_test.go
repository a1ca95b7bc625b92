package relay

import (
	"net"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// unknownChannel is data for a channel that is not there, for which package ssh
// ends the connection.
var unknownChannel = []byte{94, 0, 0, 0, 77, 0, 0, 0, 1, 'x'}

// waitEnd waits for the end of Run.
func (w *world) waitEnd() {
	w.t.Helper()
	select {
	case <-w.done:
	case <-time.After(20 * time.Second):
		panic("Run has not returned") // the cleanup would wait for ever
	}
}

// TestEndsAgainstTheProtocol: what comes behind a packet that ends the connection
// is not in the way of its end, on either side.
func TestEndsAgainstTheProtocol(t *testing.T) {
	for _, name := range []string{"client", "bastion"} {
		t.Run(name, func(t *testing.T) {
			w := join(t, permitAll(), overTCP)
			peer := w.client.Conn
			if name == "bastion" {
				peer = w.bastion.Conn
			}
			for range 40 {
				sshtest.WritePacket(peer, unknownChannel)
			}
			peer.Close()
			w.waitEnd()
		})
	}
}

// TestOpenWhileEnding: a channel that the bastion opens while package ssh closes
// those of the client, which takes as long as the client likes, is not waited for.
func TestOpenWhileEnding(t *testing.T) {
	valve := newValve()
	links := 0
	w := join(t, permitAll(), func(t testing.TB) (a, b net.Conn) {
		a, b = overTCP(t)
		if links++; links == 1 {
			a = valved{Conn: a, reading: valve}
		}
		return a, b
	})
	var fars []channel
	for range 14 {
		near, far := w.open("other")
		go ssh.DiscardRequests(near.reqs)
		fars = append(fars, far)
	}
	valve.shut()
	for _, far := range fars[1:] { // more than fits into the sockets
		go far.Write(make([]byte, 8<<20))
	}
	time.Sleep(time.Second)
	sshtest.WritePacket(w.client.Conn, unknownChannel)
	time.Sleep(300 * time.Millisecond)
	opened := make(chan error, 1)
	go func() {
		_, _, err := w.bastion.Conn.OpenChannel("forwarded-tcpip", nil)
		opened <- err
	}()
	time.Sleep(300 * time.Millisecond)
	go fars[0].Write(make([]byte, 1000)) // behind the open, and before the end of the channels
	time.Sleep(300 * time.Millisecond)
	valve.open()
	w.waitEnd()
	w.bastion.Conn.Close()
	if err := <-opened; err == nil {
		t.Error("a channel was opened to a client that has gone")
	}
}
