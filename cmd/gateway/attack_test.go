package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/crypto/ssh"
)

// attackTime bounds an attack, so that a gateway that never cuts an attacker
// off fails the test. No pass depends on it.
const attackTime = 3 * time.Minute

// attack behaves as no honest client does, or no client of OpenSSH:
//
//	silence      connects and says nothing
//	drip         sends its version a byte at a time
//	drip-kex     sends a key exchange a byte at a time
//	garbage      sends data that is not SSH
//	huge         announces a packet of 4 GiB
//	no-service   opens channels after the key exchange, without a login
//	vanish       breaks the connection off at every stage of its life, many times
//	proxy        sends headers of the PROXY protocol, and is no balancer
//	failures N   fails to log in until a connection is turned away, about the N-th and no sooner
//	startups N   opens N connections that do not log in; the next is turned away
//	channels     opens 10,000 channels
//	requests     sends 10,000 requests on one channel and waits for no reply
//	unread       starts output that it does not read, and a second session
//	tiny         sends packets of one byte to commands that do not read, for as long as they are taken
//	flood        asks for forwards that are refused, to ever other hosts, until it is cut off and kept out
//	signal       sends signals and a break
//	terminals    asks for a terminal twice, the second time to be refused, and then for a shell
//
// Each fails if the gateway does not react as it should.
func (env *scriptEnv) attack(ts *testscript.TestScript, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: attack NAME")
	}
	ctx, cancel := context.WithTimeout(context.Background(), attackTime)
	defer cancel()
	a := &attacker{env: env, ctx: ctx}
	defer a.end()
	attacks := map[string]func() error{
		"silence":    func() error { return a.untilClosed("", 0) },
		"drip":       func() error { return a.untilClosed(strings.Repeat("SSH-2.0-x", 1000), 100*time.Millisecond) },
		"drip-kex":   func() error { return a.untilClosed("SSH-2.0-x\r\n\x00\x00\x7f\xfc", 100*time.Millisecond) },
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
		"flood":      a.flood,
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
	env *scriptEnv
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
	c, err := (&net.Dialer{}).DialContext(a.ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", a.env.port))
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

// login connects as alice. If PerSourceMaxStartups refuses the connection,
// login tries again, because the gateway still counts connections that an attack
// has just closed until it has read their end.
func (a *attacker) login() (*ssh.Client, error) {
	_, client, err := a.loginConn()
	return client, err
}

// loginConn is login, and returns the connection below the client too.
func (a *attacker) loginConn() (*net.TCPConn, *ssh.Client, error) {
	for {
		c, err := a.dial()
		if err != nil {
			return nil, nil, err
		}
		client, err := a.loginOn(c)
		if err == nil || !strings.Contains(err.Error(), "Exceeded MaxStartups") {
			return c, client, err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-a.ctx.Done():
			return nil, nil, err
		}
	}
}

func (a *attacker) loginOn(c net.Conn) (*ssh.Client, error) { return a.loginWith(c, "id") }

func (a *attacker) loginWith(c net.Conn, key string) (*ssh.Client, error) {
	text, err := os.ReadFile(a.env.path(key))
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
		c, client, err := a.loginConn()
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
	if opened == 0 || opened > 1000 || opened+refused != 10_000 {
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

// tiny sends packets of a byte to commands that do not read, until all windows are
// used up and none is taken any more. Many packets go in one write, because a
// system call for each would take the time of the test.
func (a *attacker) tiny() error {
	c, err := a.dial()
	if err != nil {
		return err
	}
	client, err := a.loginOn(newBatchConn(c))
	if err != nil {
		return err
	}
	defer client.Close()
	var sent atomic.Int64
	for range 2 {
		ch, reqs, err := client.OpenChannel("session", nil)
		if err != nil {
			return err
		}
		go ssh.DiscardRequests(reqs) // ends with the channel
		if _, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{"sleep 1000"})); err != nil {
			return err
		}
		go func() { // ends with the connection
			for {
				if _, err := ch.Write([]byte{0}); err != nil {
					return
				}
				sent.Add(1)
			}
		}()
	}
	for before := int64(-1); sent.Load() != before; {
		before = sent.Load()
		select {
		case <-time.After(2 * time.Second):
		case <-a.ctx.Done():
			return fmt.Errorf("after %d bytes: %w", before, context.Cause(a.ctx))
		}
	}
	return a.works()
}

// works returns an error if another login cannot run a command.
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

// signal sends requests for which OpenSSH's client has no option.
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
	// An unknown request is rejected, and the session goes on.
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

// flood fills the logs in the name of one user.
func (a *attacker) flood() error {
	pad := strings.Repeat("x", 1900)
	for logins := range 10 {
		client, err := a.login()
		if err != nil {
			if logins == 0 {
				return err
			}
			return nil // kept out
		}
		var opening sync.WaitGroup
		for w := range 32 {
			opening.Go(func() {
				for i := 0; a.ctx.Err() == nil; i++ {
					_, _, err := client.OpenChannel("direct-tcpip", ssh.Marshal(struct {
						Host       string
						Port       uint32
						OriginHost string
						OriginPort uint32
					}{fmt.Sprintf("%d.%d.%d.%s", logins, w, i, pad), 80, "::1", 1}))
					if !errors.As(err, new(*ssh.OpenChannelError)) {
						return
					}
				}
			})
		}
		opening.Wait()
		client.Close()
		if a.ctx.Err() != nil {
			return errors.New("it may go on")
		}
	}
	return errors.New("it is let in again and again")
}
