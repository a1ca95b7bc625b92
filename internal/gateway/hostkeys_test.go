package gateway

import (
	"log/slog"
	"net"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

func proofRequest(keys ...ssh.Signer) []byte {
	var payload []byte
	for _, key := range keys {
		payload = append(payload, ssh.Marshal(struct{ Key []byte }{key.PublicKey().Marshal()})...)
	}
	return payload
}

func newProver(keys ...ssh.Signer) func([]byte) ([]byte, bool) {
	c := &conn{cfg: &Settings{Options: Options{HostKeys: keys}}, log: slog.New(slog.DiscardHandler)}
	near, _ := net.Pipe()
	c.ssh = transport.NewServer(near, &transport.Config{}) // whose session identifier is empty
	return c.hostKeyProver()
}

// TestHostKeyProof: the signatures have the order of the request and sign the session and
// the key. Each key signs once, and only if all keys of the request are the gateway's.
func TestHostKeyProof(t *testing.T) {
	one, two, foreign := sshtest.NewKey(t), sshtest.NewKey(t), sshtest.NewKey(t)
	prove := newProver(one, two)
	if reply, ok := prove(proofRequest(foreign)); ok {
		t.Errorf("a foreign key is proven: %x", reply)
	}
	reply, ok := prove(proofRequest(two, one))
	if !ok {
		t.Fatal("refused")
	}
	for _, key := range []ssh.Signer{two, one} {
		var next struct {
			Signature []byte
			Rest      []byte `ssh:"rest"`
		}
		var sig ssh.Signature
		if err := ssh.Unmarshal(reply, &next); err != nil {
			t.Fatal(err)
		}
		if err := ssh.Unmarshal(next.Signature, &sig); err != nil {
			t.Fatal(err)
		}
		signed := ssh.Marshal(struct{ Kind, Session, Key string }{"hostkeys-prove-00@openssh.com", "", string(key.PublicKey().Marshal())})
		if err := key.PublicKey().Verify(signed, &sig); err != nil {
			t.Error(err)
		}
		reply = next.Rest
	}
	if len(reply) > 0 {
		t.Errorf("%d bytes too many", len(reply))
	}
	if _, ok := prove(proofRequest(one)); ok {
		t.Error("a key is proven twice")
	}
}

func TestConfusedByHostKeys(t *testing.T) {
	for version, want := range map[string]bool{
		"SSH-2.0-TTSSH/2.72 Win32": true, "SSH-2.0-TTSSH/1.5.4": true, "SSH-2.0-TTSSH/2.91 Win32": false, "SSH-2.0-OpenSSH_9.2p1": false,
	} {
		if got := confusedByHostKeys.MatchString(version); got != want {
			t.Errorf("%s: %v", version, got)
		}
	}
}

func FuzzHostKeyProof(f *testing.F) {
	one, two := sshtest.NewKey(f), sshtest.NewKey(f)
	f.Add(proofRequest(one))
	f.Add(proofRequest(one, two))
	f.Add([]byte{0, 0, 0, 9, 1})
	f.Fuzz(func(t *testing.T, payload []byte) {
		prove := newProver(one, two)
		for range 3 {
			if reply, ok := prove(payload); ok == (len(reply) == 0) {
				t.Errorf("ok is %v with %d bytes", ok, len(reply))
			}
		}
	})
}
