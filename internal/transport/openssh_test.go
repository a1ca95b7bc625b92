package transport_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// An opensshPair is OpenSSH's client and server with a relay between them.
type opensshPair struct {
	t       testing.TB
	dir     string
	user    string
	key     ssh.Signer
	sshd    []string // options of its configuration
	server  []string // another server's command line; nil means sshd
	relayed chan error
	hostKey string // the relay's, for clients that want to be told
}

func fingerprint(key ssh.Signer) string { return ssh.FingerprintSHA256(key.PublicKey()) }

func newOpenSSH(t testing.TB) *opensshPair {
	t.Helper()
	for _, program := range []string{"/usr/bin/ssh", "/usr/sbin/sshd"} {
		if _, err := os.Stat(program); err != nil {
			t.Skip(err)
		}
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	os.Mkdir("/run/sshd", 0o755) // sshd wants it when it runs as root
	w := &opensshPair{t: t, dir: t.TempDir(), user: me.Username, relayed: make(chan error, 1)}
	w.key = w.newKey("id")
	w.newKey("host")
	w.write("authorized_keys", string(ssh.MarshalAuthorizedKey(w.key.PublicKey())))
	return w
}

func (w *opensshPair) path(name string) string { return filepath.Join(w.dir, name) }

func (w *opensshPair) write(name, text string) {
	w.t.Helper()
	if err := os.WriteFile(w.path(name), []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *opensshPair) newKey(name string) ssh.Signer {
	w.t.Helper()
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		w.t.Fatal(err)
	}
	w.write(name, string(pem.EncodeToMemory(block)))
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		w.t.Fatal(err)
	}
	return signer
}

// serve has sshd, or another server, serve nc.
func (w *opensshPair) serve(nc net.Conn) *exec.Cmd {
	w.t.Helper()
	w.write("sshd_config", strings.Join(append(w.sshd,
		"HostKey "+w.path("host"), "AuthorizedKeysFile "+w.path("authorized_keys"),
		"StrictModes no", "UsePAM no", "PermitRootLogin yes", "LogLevel DEBUG", "PidFile none", ""), "\n"))
	f, err := nc.(*net.TCPConn).File()
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	command := w.server
	if command == nil {
		command = []string{"/usr/sbin/sshd", "-i", "-e", "-f", w.path("sshd_config")}
	}
	cmd := exec.Command(command[0], command[1:]...)
	log, err := os.Create(w.path("sshd.log"))
	if err != nil {
		w.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = f, f, log
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	nc.Close()
	return cmd
}

// ssh runs a command on sshd, through a relay with these configurations.
func (w *opensshPair) ssh(front, back transport.Config, options []string, command string, stdin []byte) (stdout []byte, stderr string) {
	w.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	defer ln.Close()
	backConn, inner := sshtest.TCPPipe(w.t)
	sshd := w.serve(inner)
	defer sshd.Wait()
	go func() {
		frontConn, err := ln.Accept()
		if err != nil {
			w.relayed <- err
			return
		}
		w.relayed <- runThrough(frontConn, backConn, &front, &back, w.user, w.key)
	}()
	args := append([]string{"-F", "none", "-p", fmt.Sprint(ln.Addr().(*net.TCPAddr).Port), "-i", w.path("id"),
		"-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"}, options...)
	cmd := exec.Command("/usr/bin/ssh", append(args, "alice@127.0.0.1", command)...)
	cmd.Stdin = bytes.NewReader(stdin)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	ln.Close()
	end := <-w.relayed
	if err != nil {
		log, _ := os.ReadFile(w.path("sshd.log"))
		w.t.Fatalf("ssh: %v; relay: %v\n%s\n%s", err, end, errs.String(), log)
	}
	return out, errs.String()
}

func configs(keys ...ssh.Signer) (front, back transport.Config) {
	return transport.Config{HostKeys: keys}, transport.Config{HostKey: func(ssh.PublicKey) error { return nil }}
}

// TestOpenSSH runs a command with each algorithm that OpenSSH has too.
func TestOpenSSH(t *testing.T) {
	w := newOpenSSH(t)
	out, err := exec.Command("/usr/bin/ssh", "-Q", "kex").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, cfg := range transport.Combinations() {
		if len(cfg.KexAlgorithms) > 0 && !strings.Contains(string(out), cfg.KexAlgorithms[0]) {
			continue
		}
		if len(cfg.HostKeyAlgorithms) > 0 {
			continue // sshd has one key
		}
		t.Run(strings.ReplaceAll(cfg.TestName(), " ", "_"), func(t *testing.T) {
			w.t = t
			front, back := cfg, cfg
			front.HostKeys = transport.TestHostKeys()
			back.HostKey = func(ssh.PublicKey) error { return nil }
			got, _ := w.ssh(front, back, nil, "cat", []byte("through"))
			if string(got) != "through" {
				t.Errorf("got %q", got)
			}
		})
	}
}

// TestOpenSSHRekey moves much in both directions while each of the four ends
// starts key exchanges.
func TestOpenSSHRekey(t *testing.T) {
	data := make([]byte, 12<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	for _, tt := range []struct {
		name        string
		ssh, sshd   string
		front, back uint64
	}{
		{name: "client", ssh: "1M"},
		{name: "server", sshd: "1M"},
		{name: "front", front: 1 << 20},
		{name: "back", back: 1 << 20},
		{name: "all", ssh: "800K", sshd: "900K", front: 1 << 20, back: 700 << 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newOpenSSH(t)
			front, back := configs(sshtest.NewKey(t))
			front.RekeyBytes, back.RekeyBytes = tt.front, tt.back
			options := []string{"-v"}
			if tt.ssh != "" {
				options = append(options, "-o", "RekeyLimit="+tt.ssh)
			}
			if tt.sshd != "" {
				w.sshd = append(w.sshd, "RekeyLimit "+tt.sshd)
			}
			out, log := w.ssh(front, back, options, "cat", data)
			if !bytes.Equal(out, data) {
				sum := sha256.Sum256(out)
				t.Errorf("got %d bytes (%s), want %d", len(out), hex.EncodeToString(sum[:4]), len(data))
			}
			outer := strings.Count(log, "SSH2_MSG_NEWKEYS received")
			sshdLog, _ := os.ReadFile(w.path("sshd.log"))
			inner := strings.Count(string(sshdLog), "SSH2_MSG_NEWKEYS received")
			t.Logf("key exchanges: client %d, server %d", outer, inner)
			if (tt.ssh != "" || tt.front > 0) && outer < 5 || (tt.sshd != "" || tt.back > 0) && inner < 5 {
				t.Errorf("too few key exchanges: client %d, server %d", outer, inner)
			}
		})
	}
}
