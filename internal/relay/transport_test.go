package relay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
	"github.com/sallyport-ssh/sallyport/internal/transport"
	"github.com/sallyport-ssh/sallyport/internal/userauth"
)

// TestKeyExchangesUnderLoad relays between a client and a server of package ssh over
// real connections, with five channels full in both directions, while the relay's
// side of each connection starts a key exchange after every MiB. Neither peer reads
// while it waits to write, so that all four ends would wait for each other if the
// relay held up one connection for the other during a key exchange.
func TestKeyExchangesUnderLoad(t *testing.T) {
	// Package ssh must not start key exchanges itself: it deadlocks under load.
	never := ssh.Config{RekeyThreshold: 1 << 40}

	outer, front := sshtest.TCPPipe(t)
	back, inner := sshtest.TCPPipe(t)
	go func() {
		cfg := &ssh.ServerConfig{Config: never, PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil }}
		cfg.AddHostKey(sshtest.NewKey(t))
		_, chans, reqs, err := ssh.NewServerConn(inner, cfg)
		if err != nil {
			return
		}
		go ssh.DiscardRequests(reqs)
		for n := range chans {
			ch, reqs, err := n.Accept()
			if err != nil {
				return
			}
			go ssh.DiscardRequests(reqs)
			go func() {
				io.Copy(ch, ch)
				ch.CloseWrite()
				ch.Close()
			}()
		}
	}()
	relayed := make(chan error, 1)
	go func() {
		relayed <- func() error {
			c := transport.NewServer(front, &transport.Config{HostKeys: []ssh.Signer{sshtest.NewKey(t)}, RekeyBytes: 1 << 20})
			defer c.Close()
			if err := c.Handshake(); err != nil {
				return err
			}
			s := userauth.NewServer(c, userauth.ServerConfig{})
			for done := false; !done; {
				req, err := s.Next()
				if err != nil {
					return err
				}
				switch req := req.(type) {
				case *userauth.Query:
					err = s.Accept(req)
				case *userauth.Signed:
					done, err = true, s.Succeed()
				default:
					err = s.Fail()
				}
				if err != nil {
					return err
				}
			}
			b := transport.NewClient(back, &transport.Config{HostKey: func(ssh.PublicKey) error { return nil }, RekeyBytes: 700 << 10})
			defer b.Close()
			if err := b.Handshake(); err != nil {
				return err
			}
			if err := userauth.Client(b, "alice", nil, sshtest.NewKey(t)); err != nil {
				return err
			}
			server := make(chan Conn, 1)
			server <- b
			r := &Relay{Client: c, Permissions: identity.AllowAll(), Log: slog.New(slog.DiscardHandler)}
			_, err := r.Run(server, func() string { return "" })
			return err
		}()
	}()

	conn, chans, reqs, err := ssh.NewClientConn(outer, "", &ssh.ClientConfig{
		Config: never, User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(sshtest.NewKey(t))}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		t.Fatal(err)
	}
	client := ssh.NewClient(conn, chans, reqs)
	const channels, size = 5, 8 << 20
	errs := make(chan error, channels)
	for i := range channels {
		go func() {
			errs <- func() error {
				ch, reqs, err := client.OpenChannel("session", nil)
				if err != nil {
					return err
				}
				go ssh.DiscardRequests(reqs)
				sent := make([]byte, size)
				rand.NewChaCha8([32]byte{byte(i)}).Read(sent)
				var wg sync.WaitGroup
				wg.Go(func() { ch.Write(sent); ch.CloseWrite() })
				got, err := io.ReadAll(ch)
				wg.Wait()
				if err == nil && !bytes.Equal(got, sent) {
					err = fmt.Errorf("%d bytes of %d, or others", len(got), size)
				}
				return err
			}()
		}()
	}
	stuck := time.After(2 * time.Minute)
	for range channels {
		select {
		case err := <-errs:
			if err != nil {
				t.Error(err)
			}
		case err := <-relayed:
			t.Fatalf("the relay ended: %v", err)
		case <-stuck:
			t.Fatal("stuck")
		}
	}
	client.Close()
	if err := <-relayed; !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
		t.Errorf("the relay ended: %v", err)
	}
}
