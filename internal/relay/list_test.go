package relay

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

// TestChannels looks at a relay while things go on in it, and afterwards.
func TestChannels(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		near, far := w.open("session")
		go func() {
			for req := range far.reqs {
				req.Reply(true, nil)
			}
		}()
		long := "cat " + strings.Repeat("x", 2*commandMax)
		if ok, err := near.SendRequest("exec", true, ssh.Marshal(struct{ Value string }{long})); !ok || err != nil {
			t.Fatal(ok, err)
		}
		gather(near)
		gather(far)
		near.Write([]byte("question"))
		far.Write([]byte("the answer"))
		w.open("direct-tcpip")
		synctest.Wait()

		open, up, down := w.relay.Channels()
		if len(open) != 2 || up != 8 || down != 10 {
			t.Fatalf("%d channels, %d bytes up, %d down: %+v", len(open), up, down, open)
		}
		if c := open[0]; c.Kind != "session" || !c.FromClient || c.Runs != "exec" || c.Command != long[:commandMax] ||
			c.ToBastion != 8 || c.ToClient != 10 || c.Since.IsZero() {
			t.Errorf("channel %+v", c)
		}
		if c := open[1]; c.Number != 1 || c.Kind != "direct-tcpip" || c.Runs != "" {
			t.Errorf("channel %+v", c)
		}

		far.Close()
		time.Sleep(time.Second) // the relay looks whether the bastion has gone
		synctest.Wait()
		if open, up, down := w.relay.Channels(); len(open) != 1 || up != 8 || down != 10 {
			t.Errorf("after its end %+v, %d, %d", open, up, down)
		}
	})
}

// TestExpect: who ends a bastion on purpose can say so.
func TestExpect(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		near, _ := w.open("session")
		errs := gather(near.Stderr())
		w.relay.Expect("You have stopped it.")
		w.bastion.Conn.Close()
		for range near.reqs {
		}
		<-w.done
		synctest.Wait()
		if text, _ := errs(); text != "\r\nYou have stopped it.\r\n" {
			t.Errorf("stderr %q", text)
		}
	})
}
