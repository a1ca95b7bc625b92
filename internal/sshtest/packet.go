package sshtest

import (
	"reflect"
	"unsafe"

	"golang.org/x/crypto/ssh"
)

// WritePacket sends what no client of package ssh would: a packet as it is, its
// message number first (RFC 4250, section 4.1.2).
func WritePacket(conn ssh.Conn, packet []byte) error {
	if server, ok := conn.(*ssh.ServerConn); ok {
		conn = server.Conn
	}
	transport := reflect.ValueOf(conn).Elem().FieldByName("transport").Elem()
	return writePacket(transport.UnsafePointer(), append([]byte(nil), packet...)) // which is encrypted in place
}

//go:linkname writePacket golang.org/x/crypto/ssh.(*handshakeTransport).writePacket
func writePacket(transport unsafe.Pointer, packet []byte) error
