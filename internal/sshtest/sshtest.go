// Package sshtest has the helpers that the tests of several packages share: keys and
// certificates, connections and listeners in memory, OpenSSH's sshd, accounts in a
// private /etc. Nothing that is shipped imports it.
package sshtest

import (
	"crypto/ed25519"
	"crypto/rand"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// NewKey returns a new Ed25519 key.
func NewKey(t testing.TB) ssh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromSigner(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// eventuallyTimeout is far above the time that any condition takes, also on a loaded
// machine: no test passes or fails by it.
const eventuallyTimeout = time.Minute

// Eventually polls until condition reports true. It is for conditions that another
// process or the kernel brings about, which a test cannot wait for otherwise. If
// the condition never comes true, the test fails with its name.
func Eventually(t testing.TB, name string, condition func() bool) {
	t.Helper()
	pause := time.Millisecond
	for deadline := time.Now().Add(eventuallyTimeout); !condition(); time.Sleep(pause) {
		if time.Now().After(deadline) {
			t.Fatalf("never true: %s", name)
		}
		pause = min(2*pause, 50*time.Millisecond)
	}
}
