package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// closed returns nil when the far side has closed the connection.
func closed(c net.Conn) error {
	_, err := io.Copy(io.Discard, c)
	if timeout := (net.Error)(nil); errors.As(err, &timeout) && timeout.Timeout() {
		return errors.New("the gateway did not close the connection")
	}
	return nil // end of file, or reset
}

// untilClosed sends text, a byte each pause, and then goes on waiting.
func (a *attacker) untilClosed(text string, pause time.Duration) error {
	c, err := a.dial()
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- closed(c) }() // ends with the connection
	for i := 0; ; i++ {
		select {
		case err := <-done:
			return err
		case <-time.After(max(pause, time.Millisecond)):
			if i < len(text) {
				io.WriteString(c, text[i:i+1])
			} else if len(text) > 0 {
				c.Write([]byte{0})
			}
		}
	}
}

func (a *attacker) garbage() error {
	for _, text := range []string{
		"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n",
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		strings.Repeat("\x00", 1<<20),
		strings.Repeat("A", 1<<20),
		strings.Repeat("a line\r\n", 1<<17),
		"SSH-1.5-old\r\n",
		"SSH-2.0-" + strings.Repeat("x", 1<<16) + "\r\n",
		"SSH-2.0-x\r\n" + strings.Repeat("not a packet ", 1000),
	} {
		c, err := a.dial()
		if err != nil {
			return err
		}
		go io.WriteString(c, text) // ends with the connection
		if err := closed(c); err != nil {
			return fmt.Errorf("after %.20q: %w", text, err)
		}
	}
	return nil
}

func (a *attacker) huge() error {
	for _, length := range []uint32{1<<32 - 1, 1 << 31, 1 << 20, 0, 3} {
		c, err := a.dial()
		if err != nil {
			return err
		}
		packet := binary.BigEndian.AppendUint32([]byte("SSH-2.0-x\r\n"), length)
		go c.Write(append(packet, make([]byte, 1<<20)...)) // ends with the connection
		if err := closed(c); err != nil {
			return fmt.Errorf("a packet of %d bytes: %w", length, err)
		}
	}
	return nil
}

// proxy claims to come from elsewhere. That is garbage like any other: the
// gateway says so, and reads nothing that comes after it.
func (a *attacker) proxy() error {
	for _, header := range []string{
		"PROXY TCP4 10.1.2.3 10.1.2.4 5000 22\r\n",
		"PROXY UNKNOWN\r\n",
		"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x0a\x01\x02\x03\x0a\x01\x02\x04\x13\x88\x00\x16",
		"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00",
	} {
		c, err := a.dial()
		if err != nil {
			return err
		}
		if _, err := io.WriteString(c, header); err != nil {
			return err
		}
		answer, _ := io.ReadAll(c)
		if !strings.Contains(string(answer), "Invalid SSH identification string.") {
			return fmt.Errorf("after %q: answered %q", header, answer)
		}
		// The whole of it, in front of a login that would be right.
		if c, err = a.dial(); err != nil {
			return err
		}
		if _, err := io.WriteString(c, header); err != nil {
			return err
		}
		if _, err := a.loginOn(c); err == nil {
			return fmt.Errorf("logged in after %q", header)
		}
	}
	return nil
}

// failures tries keys that are nobody's.
func (a *attacker) failures(args []string) error {
	n, err := strconv.Atoi(strings.Join(args, ""))
	if err != nil {
		return err
	}
	for i := 1; ; i++ {
		c, err := a.dial()
		if err != nil {
			return err
		}
		_, err = a.loginWith(c, "id2")
		if err == nil {
			return errors.New("logged in with a key that is nobody's")
		}
		refused := !strings.Contains(err.Error(), "unable to authenticate")
		// The gateway may still be at the end of the last when the next comes.
		if refused && i < n || !refused && i > n+5 {
			return fmt.Errorf("login %d: %w", i, err)
		}
		if refused {
			return nil
		}
	}
}

// noService asks for everything without ever logging in.
func (a *attacker) noService() error {
	c, err := a.dial()
	if err != nil {
		return err
	}
	_, _, _, err = ssh.NewClientConn(c, "", &ssh.ClientConfig{
		User:            "alice",
		HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err == nil {
		return errors.New("logged in without anything")
	}
	return nil
}

// startups opens n connections that say nothing and, once they are counted,
// one more. A login then works as soon as they are gone.
func (a *attacker) startups(args []string) error {
	n, err := strconv.Atoi(strings.Join(args, ""))
	if err != nil {
		return err
	}
	for range n {
		c, err := a.dial()
		if err != nil {
			return err
		}
		if _, err := c.Read(make([]byte, 8)); err != nil { // it has been let in
			return err
		}
	}
	c, err := a.dial()
	if err != nil {
		return err
	}
	answer, _ := io.ReadAll(c)
	if !strings.Contains(string(answer), "Exceeded MaxStartups") {
		return fmt.Errorf("one more connection was told %q", answer)
	}
	return nil
}
