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

// TestProgress: what is held up is known to be, in its direction.
func TestProgress(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := join(t, permitAll(), inMemory)
		near, far := w.open("direct-tcpip")
		check := func(what string, bytes int64, up, down bool) {
			t.Helper()
			synctest.Wait()
			toBastion, toClient := w.relay.Progress()
			if toBastion.HeldUp != up || toClient.HeldUp != down {
				t.Errorf("%s: held up towards the bastion: %t, towards the client: %t", what, toBastion.HeldUp, toClient.HeldUp)
			}
			if bytes >= 0 && toBastion.Bytes != bytes {
				t.Errorf("%s: %d bytes", what, toBastion.Bytes)
			}
		}
		check("at rest", 0, false, false)
		const size = 6<<20 + 1 // after reads that fill the buffer it is not known whether there is more
		go near.Write(make([]byte, size))
		check("not read", -1, true, false)
		gather(far)
		check("read", size, false, false)
		go far.Write(make([]byte, size))
		check("not read by the client", size, false, true)
		gather(near)
		check("read by the client", size, false, false)
		go near.SendRequest("question", true, nil)
		check("a request", size, true, false)
		req := <-far.reqs
		req.Reply(true, nil)
		check("its answer", size, false, false)
		near.CloseWrite()
		check("nothing is read after the end", size, true, false)
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
