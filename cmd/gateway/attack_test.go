package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/crypto/ssh"
)

// attackTime bounds an attack, so that a gateway that never cuts an attacker
// off fails the test. No pass depends on it.
const attackTime = 3 * time.Minute

// attack does what no honest client does, or no client of OpenSSH:
//
//	silence      connects and says nothing
//	drip         sends its version a byte at a time
//	drip-kex     sends a key exchange a byte at a time
//	garbage      sends what is not SSH
//	huge         announces a packet of 4 GiB
//	no-service   logs in as nobody: exchanges keys, and asks for channels at once
//	vanish       breaks the connection off at every stage of its life, many times
//	proxy        sends headers of the PROXY protocol, and is no balancer
//	failures N   fails to log in until a connection is turned away, about the N-th and no sooner
//	startups N   opens N connections that do not log in; the next is turned away
//	channels     opens 10,000 channels
//	requests     sends 10,000 requests on one channel and waits for no reply
//	unread       starts output that it does not read, and a second session
//	tiny         fills the memory with packets of one byte to commands that do not read, until it is cut off
//	signal       sends signals and a break
//	terminals    asks for a terminal twice, the second time to be refused, and then for a shell
//
// Each fails if the gateway did not do what it should.
func (w *world) attack(ts *testscript.TestScript, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: attack NAME")
	}
	ctx, cancel := context.WithTimeout(context.Background(), attackTime)
	defer cancel()
	a := &attacker{world: w, ctx: ctx}
	defer a.end()
	attacks := map[string]func() error{
		"silence":    func() error { return a.untilClosed("", 0) },
		"drip":       func() error { return a.untilClosed(strings.Repeat("SSH-2.0-x", 1000), 100*time.Millisecond) },
		"drip-kex":   func() error { return a.untilClosed("SSH-2.0-x\r\n\x00\x00\x80\x00", 100*time.Millisecond) },
		"garbage":    a.garbage,
		"huge":       a.huge,
		"no-service": a.noService,
		"vanish":     a.vanish,
		"proxy":      a.proxy,
		"failures":   func() error { return a.failures(args[1:]) },
		"startups":   func() error { return a.startups(args[1:]) },
		"channels":   a.channels,
		"requests":   a.requests,
		"unread":     a.unread,
		"tiny":       a.tiny,
		"signal":     a.signal,
		"terminals":  a.terminals,
	}
	run, ok := attacks[args[0]]
	if !ok {
		ts.Fatalf("no attack is called %s", args[0])
	}
	ts.Check(run())
}

type attacker struct {
	*world
	ctx context.Context

	mu    sync.Mutex
	conns []net.Conn
}

func (a *attacker) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.conns {
		c.Close()
	}
}

func (a *attacker) dial() (*net.TCPConn, error) {
	c, err := (&net.Dialer{}).DialContext(a.ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", a.port))
	if err != nil {
		return nil, err
	}
	deadline, _ := a.ctx.Deadline()
	c.SetDeadline(deadline)
	a.mu.Lock()
	a.conns = append(a.conns, c)
	a.mu.Unlock()
	return c.(*net.TCPConn), nil
}

// login connects as alice.
func (a *attacker) login() (*ssh.Client, error) {
	c, err := a.dial()
	if err != nil {
		return nil, err
	}
	return a.loginOn(c)
}

func (a *attacker) loginOn(c net.Conn) (*ssh.Client, error) { return a.loginWith(c, "id") }

func (a *attacker) loginWith(c net.Conn, key string) (*ssh.Client, error) {
	text, err := os.ReadFile(a.path(key))
	if err != nil {
		return nil, err
	}
	signer, err := ssh.ParsePrivateKey(text)
	if err != nil {
		return nil, err
	}
	conn, chans, reqs, err := ssh.NewClientConn(c, "", &ssh.ClientConfig{
		User:            "alice",
		Auth:            []ssh.AuthMethod{ssh.PublicKeys(signer)},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(), // scripts with ssh look at it
	})
	if err != nil {
		return nil, err
	}
	return ssh.NewClient(conn, chans, reqs), nil
}

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

// vanish breaks off connections: after the TCP handshake, in the version, in
// the key exchange, once logged in, and in the middle of output.
func (a *attacker) vanish() error {
	for range 20 {
		for _, text := range []string{"", "SSH-2", "SSH-2.0-x\r\n", "SSH-2.0-x\r\n\x00\x00\x04\x00\x08\x14"} {
			c, err := a.dial()
			if err != nil {
				return err
			}
			io.WriteString(c, text)
			c.SetLinger(0) // a reset, and nothing that says goodbye
			c.Close()
		}
	}
	for i := range 10 {
		c, err := a.dial()
		if err != nil {
			return err
		}
		client, err := a.loginOn(c)
		if err != nil {
			return err
		}
		if i%2 == 0 {
			session, err := client.NewSession()
			if err != nil {
				return err
			}
			out, err := session.StdoutPipe()
			if err != nil {
				return err
			}
			if err := session.Start("yes"); err != nil {
				return err
			}
			if _, err := io.ReadFull(out, make([]byte, 1000)); err != nil {
				return err
			}
		}
		c.SetLinger(0)
		c.Close()
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
	if !strings.HasPrefix(string(answer), "Exceeded MaxStartups") {
		return fmt.Errorf("one more connection was told %q", answer)
	}
	return nil
}

// channels opens 10,000 channels of all kinds without closing one.
func (a *attacker) channels() error {
	client, err := a.login()
	if err != nil {
		return err
	}
	target, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts
	if err != nil {
		return err
	}
	defer target.Close()
	tcp := ssh.Marshal(struct {
		Host       string
		Port       uint32
		From       string
		OriginPort uint32
	}{"127.0.0.1", uint32(target.Addr().(*net.TCPAddr).Port), "127.0.0.1", 1})
	var opened, refused int
	var mu sync.Mutex
	var all sync.WaitGroup
	for worker := range 10 {
		all.Go(func() {
			for range 1000 {
				kind, extra := "session", []byte(nil)
				switch worker % 3 {
				case 1:
					kind, extra = "direct-tcpip", tcp
				case 2:
					kind = "no-such-channel@example.org"
				}
				_, _, err := client.OpenChannel(kind, extra)
				mu.Lock()
				if refusal := (*ssh.OpenChannelError)(nil); errors.As(err, &refusal) {
					refused++
				} else if err == nil {
					opened++
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	if opened == 0 || opened > 500 || opened+refused != 10_000 {
		return fmt.Errorf("of 10,000 channels %d were opened and %d refused", opened, refused)
	}
	return a.works()
}

// requests sends many requests on one channel, and never waits for a reply.
func (a *attacker) requests() error {
	client, err := a.login()
	if err != nil {
		return err
	}
	ch, reqs, err := client.OpenChannel("session", nil)
	if err != nil {
		return err
	}
	go ssh.DiscardRequests(reqs) // ends with the channel
	env := ssh.Marshal(struct{ Name, Value string }{"LC_X", strings.Repeat("x", 1000)})
	for range 10_000 {
		if _, err := ch.SendRequest("env", false, env); err != nil {
			break // the channel or the connection may be closed for it
		}
	}
	return a.works()
}

// unread leaves the output of one session unread, and of a second; a third on
// the same connection still works.
func (a *attacker) unread() error {
	client, err := a.login()
	if err != nil {
		return err
	}
	for range 2 {
		ch, reqs, err := client.OpenChannel("session", nil)
		if err != nil {
			return err
		}
		go ssh.DiscardRequests(reqs) // ends with the channel
		if _, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{"yes; yes >&2"})); err != nil {
			return err
		}
	}
	for range 5 {
		session, err := client.NewSession()
		if err != nil {
			return err
		}
		out, err := session.Output("echo works")
		if err != nil || string(out) != "works\n" {
			return fmt.Errorf("beside sessions that are not read: %q, %v", out, err)
		}
	}
	return a.works()
}

// tiny sends what nobody reads, at first so much that it fills the bastion, and
// then in packets of a byte, which stay in the gateway.
func (a *attacker) tiny() error {
	client, err := a.login()
	if err != nil {
		return err
	}
	var told [4][]byte
	var all sync.WaitGroup
	for i := range told {
		ch, reqs, err := client.OpenChannel("session", nil)
		if err != nil {
			return err
		}
		go ssh.DiscardRequests(reqs) // ends with the channel
		if _, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{"sleep 1000"})); err != nil {
			return err
		}
		all.Go(func() { told[i], _ = io.ReadAll(ch.Stderr()) })
		all.Go(func() {
			_, err := ch.Write(make([]byte, 2400<<10))
			for err == nil {
				_, err = ch.Write([]byte{0})
			}
		})
	}
	all.Wait()
	for _, text := range told {
		if !strings.Contains(string(text), "The gateway was short of memory") {
			return fmt.Errorf("a session was told %q", text)
		}
	}
	return a.works()
}

// works says whether others can work.
func (a *attacker) works() error {
	client, err := a.login()
	if err != nil {
		return err
	}
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		return err
	}
	out, err := session.Output("echo works")
	if err == nil && string(out) != "works\n" {
		err = fmt.Errorf("output %q", out)
	}
	return err
}

// signal sends what OpenSSH's client has no option for.
func (a *attacker) signal() error {
	client, err := a.login()
	if err != nil {
		return err
	}
	for _, name := range []ssh.Signal{ssh.SIGTERM, ssh.SIGUSR1, ssh.SIGKILL} {
		session, err := client.NewSession()
		if err != nil {
			return err
		}
		out, err := session.StdoutPipe()
		if err != nil {
			return err
		}
		if err := session.Start("echo started; exec sleep 1000"); err != nil {
			return err
		}
		if _, err := io.ReadFull(out, make([]byte, len("started\n"))); err != nil {
			return err
		}
		if err := session.Signal(name); err != nil {
			return err
		}
		err = session.Wait()
		if exit := (*ssh.ExitError)(nil); !errors.As(err, &exit) || exit.Signal() != string(name) {
			return fmt.Errorf("signal %s ended the session with %v", name, err)
		}
	}
	// A break on a terminal is an interrupt, if the terminal is set to it.
	session, err := client.NewSession()
	if err != nil {
		return err
	}
	if err := session.RequestPty("xterm", 24, 80, nil); err != nil {
		return err
	}
	out, err := session.StdoutPipe()
	if err != nil {
		return err
	}
	if err := session.Start("echo started; exec sleep 1000"); err != nil {
		return err
	}
	if _, err := io.ReadFull(out, make([]byte, len("started\r\n"))); err != nil {
		return err
	}
	ok, err := session.SendRequest("break", true, ssh.Marshal(struct{ Milliseconds uint32 }{500}))
	if err != nil || !ok {
		return fmt.Errorf("break: %v, %v", ok, err)
	}
	// What is not known is refused, and does not end anything.
	if ok, err := session.SendRequest("no-such-request@example.org", true, nil); err != nil || ok {
		return fmt.Errorf("unknown request: %v, %v", ok, err)
	}
	return session.Close()
}

// terminals ends with the output of a command that has a terminal.
func (a *attacker) terminals() error {
	client, err := a.login()
	if err != nil {
		return err
	}
	session, err := client.NewSession()
	if err != nil {
		return err
	}
	defer session.Close()
	if err := session.RequestPty("xterm", 24, 80, nil); err != nil {
		return err
	}
	if session.RequestPty("xterm", 24, 80, nil) == nil {
		return errors.New("a second terminal was granted")
	}
	out, err := session.Output("tty; echo twice asked")
	if err != nil {
		return err
	}
	if !strings.HasPrefix(string(out), "/dev/") {
		return fmt.Errorf("no terminal: %q", out)
	}
	return nil
}
