package transport_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// listen starts a relay in front of sshd, for the next client that connects to the
// port that it returns.
func (w *opensshPair) listen(front, back transport.Config) (port string) {
	w.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { ln.Close() })
	go func() {
		nc, err := ln.Accept()
		if err != nil {
			w.relayed <- err
			return
		}
		backConn, inner := sshtest.TCPPipe(w.t)
		sshd := w.serve(inner)
		defer sshd.Wait()
		w.relayed <- runThrough(nc, backConn, &front, &back, w.user, w.key)
	}()
	return fmt.Sprint(ln.Addr().(*net.TCPAddr).Port)
}

// TestOtherClients moves much through clients of other implementations while our
// side starts key exchanges.
func TestOtherClients(t *testing.T) {
	data := make([]byte, 5<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	for _, tt := range []struct {
		name, key string
		command   func(w *opensshPair, port string) *exec.Cmd
	}{
		{"dbclient", "dropbearconvert openssh dropbear id id.db", func(w *opensshPair, port string) *exec.Cmd {
			return exec.Command("dbclient", "-y", "-y", "-i", w.path("id.db"), "-p", port, "alice@127.0.0.1", "cat")
		}},
		{"plink", "puttygen id -o id.ppk", func(w *opensshPair, port string) *exec.Cmd {
			return exec.Command("plink", "-ssh", "-batch", "-i", w.path("id.ppk"), "-P", port, "-hostkey", w.hostKey, "alice@127.0.0.1", "cat")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := exec.LookPath(tt.name); err != nil {
				t.Skip(err)
			}
			w := newOpenSSH(t)
			convert := strings.Fields(tt.key)
			cmd := exec.Command(convert[0], convert[1:]...)
			cmd.Dir = w.dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Skipf("%v: %s", err, out)
			}
			front, back := configs(sshtest.NewKey(t))
			front.RekeyBytes, back.RekeyBytes = 1<<20, 1<<20
			w.hostKey = fingerprint(front.HostKeys[0])
			cmd = tt.command(w, w.listen(front, back))
			cmd.Env = append(os.Environ(), "HOME="+w.dir)
			cmd.Stdin = bytes.NewReader(data)
			var errs bytes.Buffer
			cmd.Stderr = &errs
			out, err := cmd.Output()
			end := <-w.relayed
			if err != nil || !bytes.Equal(out, data) {
				t.Errorf("%v; %d bytes of %d; relay: %v\n%s", err, len(out), len(data), end, errs.String())
			}
		})
	}
}

// TestDropbear has our client log in to dropbear's server, with each algorithm that
// both have, and then moves data while our side starts key exchanges. Dropbear reads
// authorized_keys in the home directory of the account only, so the test gives it
// another one in a mount namespace.
func TestDropbear(t *testing.T) {
	for _, program := range []string{"dropbear", "dropbearkey", "unshare"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("a mount namespace needs root")
	}
	w := newOpenSSH(t)
	if err := os.MkdirAll(w.path("home/.ssh"), 0o700); err != nil {
		t.Fatal(err)
	}
	w.write("home/.ssh/authorized_keys", string(ssh.MarshalAuthorizedKey(w.key.PublicKey())))
	server := "mount --bind " + w.path("home") + " /root && exec dropbear -i -s"
	for _, kind := range []string{"ed25519", "ecdsa", "rsa"} {
		if out, err := exec.Command("dropbearkey", "-t", kind, "-f", w.path("dropbear_"+kind)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		server += " -r " + w.path("dropbear_"+kind)
	}
	w.server = []string{"unshare", "-m", "sh", "-c", server}

	through := func(name string, back transport.Config, data []byte) {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			w.t = t
			front := transport.Config{HostKeys: transport.TestHostKeys()}
			back.HostKey = func(ssh.PublicKey) error { return nil }
			if got, _ := w.ssh(front, back, nil, "cat", data); !bytes.Equal(got, data) {
				t.Errorf("%d bytes of %d", len(got), len(data))
			}
		})
	}
	for _, cfg := range transport.Combinations() {
		name := cfg.TestName()
		switch {
		case strings.Contains(name, "mlkem"), strings.Contains(name, "gcm"), strings.Contains(name, "aes192"), strings.Contains(name, "etm"),
			strings.Contains(name, "hmac-sha2-512"), strings.Contains(name, "rsa-sha2-512"),
			len(cfg.HostKeyAlgorithms) > 0 && strings.HasSuffix(name, "nistp384"), len(cfg.HostKeyAlgorithms) > 0 && strings.HasSuffix(name, "nistp521"):
			continue // dropbear 2022.83 has none of these
		}
		through(name, cfg, []byte("through"))
	}
	data := make([]byte, 5<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	through("key exchanges", transport.Config{RekeyBytes: 1 << 20}, data)
}
