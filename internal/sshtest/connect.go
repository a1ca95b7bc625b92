package sshtest

import (
	"fmt"
	"net"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// Connect logs in to a server that accepts the method "none".
func Connect(nc net.Conn, user string) (*transport.Conn, error) {
	c := transport.NewClient(nc, &transport.Config{HostKey: func(ssh.PublicKey) error { return nil }})
	if err := c.Handshake(); err != nil {
		return nil, err
	}
	const authRequest, authSuccess = 50, 52 // RFC 4250, section 4.1.2
	for _, request := range [][]byte{
		ssh.Marshal(struct {
			Name string `sshtype:"5"`
		}{"ssh-userauth"}),
		ssh.Marshal(struct {
			User            string `sshtype:"50"`
			Service, Method string
		}{user, "ssh-connection", "none"}),
	} {
		c.WritePacket(request)
		c.Flush()
		answer, err := c.ReadPacket()
		if err != nil {
			return nil, err
		}
		if request[0] == authRequest && answer[0] != authSuccess {
			return nil, fmt.Errorf("login: unexpected message %d", answer[0])
		}
	}
	c.LoggedIn()
	return c, nil
}
