package userauth

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// TestOpenSSH logs in with OpenSSH's client: with a key and with a certificate,
// and a code after it.
func TestOpenSSH(t *testing.T) {
	if _, err := os.Stat("/usr/bin/ssh"); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	for _, kind := range []string{"ed25519", "ecdsa", "rsa"} {
		run("ssh-keygen", "-q", "-t", kind, "-N", "", "-f", path(kind))
	}
	run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path("ca"))
	run("cp", path("ed25519"), path("certified"))
	run("cp", path("ed25519.pub"), path("certified.pub"))
	run("ssh-keygen", "-q", "-s", path("ca"), "-I", "test", "-n", "alice", path("certified.pub"))
	if err := os.WriteFile(path("askpass"), []byte("#!/bin/sh\necho 123456\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	host := sshtest.NewKey(t)

	for _, kind := range []string{"ed25519", "ecdsa", "rsa", "certified"} {
		t.Run(kind, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			var proven *Signed
			code := ""
			done := make(chan error, 1)
			go func() {
				nc, err := ln.Accept()
				if err != nil {
					done <- err
					return
				}
				c := transport.NewServer(nc, &transport.Config{HostKeys: []ssh.Signer{host}, Extensions: Extensions(nil)})
				defer c.Close()
				done <- func() error {
					if err := c.Handshake(); err != nil {
						return err
					}
					s := NewServer(c, ServerConfig{})
					for {
						req, err := s.Next()
						if err != nil {
							return err
						}
						switch req := req.(type) {
						case *Query:
							// ssh offers the key before the certificate.
							if _, ok := req.Key.(*ssh.Certificate); ok == (kind == "certified") {
								err = s.Accept(req)
							} else {
								err = s.Fail()
							}
						case *Signed:
							proven = req
							s.Banner("one moment\r\n")
							err = s.Partial(MethodKeyboardInteractive)
						case *KeyboardInteractive:
							answers, err := s.Ask("", "", Prompt{Text: "Code: "})
							if err != nil {
								return err
							}
							code = answers[0]
							if err := s.Succeed(); err != nil {
								return err
							}
							_, err = c.ReadPacket() // the session is not served
							if err != nil {
								return err
							}
							c.Disconnect(transport.ReasonByApplication, "all is well")
							return nil
						default:
							err = s.Fail()
						}
						if err != nil {
							return err
						}
					}
				}()
			}()
			cmd := exec.Command("ssh", "-F", "none", "-v", "-p", fmt.Sprint(ln.Addr().(*net.TCPAddr).Port), "-i", path(kind),
				"-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "alice@127.0.0.1", "true")
			cmd.Env = append(os.Environ(), "SSH_ASKPASS="+path("askpass"), "SSH_ASKPASS_REQUIRE=force")
			out, _ := cmd.CombinedOutput()
			if err := <-done; err != nil && err != io.EOF {
				t.Fatalf("%v\n%s", err, out)
			}
			if !strings.Contains(string(out), "all is well") || !strings.Contains(string(out), "one moment") {
				t.Errorf("ssh says:\n%s", out)
			}
			if code != "123456" || proven == nil {
				t.Fatalf("code %q, proven %v\n%s", code, proven, out)
			}
			if !proven.HostBound {
				t.Errorf("not bound to the host key\n%s", out)
			}
			if _, ok := proven.Key.(*ssh.Certificate); ok != (kind == "certified") {
				t.Errorf("proven is %s", proven.Key.Type())
			}
			if kind == "rsa" && proven.Algorithm != ssh.KeyAlgoRSASHA512 {
				t.Errorf("algorithm %s", proven.Algorithm)
			}
		})
	}
}

// FuzzServer sends three messages of any kind to a server that lets in one key
// only: it must neither panic nor hang nor let anybody in.
func FuzzServer(f *testing.F) {
	host, key := sshtest.NewKey(f), sshtest.NewKey(f)
	begin := sshmsg.AppendString([]byte{transport.MsgServiceRequest}, serviceUserAuth)
	request := func(method string, rest ...byte) []byte {
		return append(sshmsg.AppendString(sshmsg.AppendString(sshmsg.AppendString([]byte{msgRequest}, "alice"), serviceConnection), method), rest...)
	}
	query := sshmsg.AppendString(sshmsg.AppendString([]byte{0}, ssh.KeyAlgoED25519), key.PublicKey().Marshal())
	signed := append([]byte{1}, query[1:]...)
	signed = sshmsg.AppendString(signed, ssh.Marshal(ssh.Signature{Format: ssh.KeyAlgoED25519, Blob: make([]byte, 64)}))
	f.Add(begin, request(MethodNone), request(MethodPublicKey, query...))
	f.Add(begin, request(MethodPublicKey, signed...), request(MethodPublicKey, signed...))
	f.Add(begin, request(MethodKeyboardInteractive, 0, 0, 0, 0, 0, 0, 0, 0), []byte{msgInfoResponse, 0, 0, 0, 1, 0, 0, 0, 1, 'x'})
	f.Add(begin, request(methodHostBound, append(signed, 0, 0, 0, 0)...), []byte{msgBanner})
	for _, p := range [][]byte{query, signed} {
		cert := certificate(f, key).PublicKey().Marshal()
		f.Add(begin, request(MethodPublicKey, append(sshmsg.AppendString([]byte{p[0]}, ssh.CertAlgoED25519v01), sshmsg.AppendString(nil, cert)...)...), []byte{msgRequest})
	}
	f.Fuzz(func(t *testing.T, a, b, c []byte) {
		nc, ns := sshtest.TCPPipe(t)
		server := transport.NewServer(ns, &transport.Config{HostKeys: []ssh.Signer{host}, KexAlgorithms: []string{"curve25519-sha256"}, Extensions: Extensions(nil)})
		defer server.Close()
		done := make(chan bool, 1)
		go func() {
			done <- func() bool {
				if server.Handshake() != nil {
					return false
				}
				s := NewServer(server, ServerConfig{Methods: []string{MethodPublicKey, MethodKeyboardInteractive}})
				for {
					req, err := s.Next()
					if err != nil {
						return false
					}
					switch req := req.(type) {
					case *Query:
						err = s.Accept(req)
					case *Signed:
						return true
					case *KeyboardInteractive:
						if _, err = s.Ask("name", "instruction", Prompt{Text: "?"}); err == nil {
							err = s.Fail()
						} else if err == ErrAbandoned {
							err = nil
						}
					default:
						err = s.Fail()
					}
					if err != nil {
						return false
					}
				}
			}()
		}()
		client := transport.NewClient(nc, &transport.Config{HostKey: func(ssh.PublicKey) error { return nil }, KexAlgorithms: []string{"curve25519-sha256"}})
		if err := client.Handshake(); err != nil {
			t.Fatal(err)
		}
		for _, p := range [][]byte{a, b, c} {
			if len(p) > 0 && len(p) < 30000 {
				client.WritePacket(p)
			}
		}
		client.Flush()
		client.WaitWritable(0)
		nc.(*net.TCPConn).CloseWrite()
		go io.Copy(io.Discard, nc)
		if <-done {
			t.Fatal("somebody has proven a key")
		}
	})
}
