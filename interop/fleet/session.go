package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// patience is the time after which a client gives up: the longest start, after the
// longest lease, on a slow machine.
const patience = 6 * time.Minute

// A session is a connection of a user with one session, which runs cat.
type session struct {
	user    int
	began   time.Time
	gateway int // to which the balancer has passed it
	client  *ssh.Client
	session *ssh.Session
	in      io.WriteCloser
	stderr  syncBuffer

	mu       sync.Mutex
	pending  []byte // sent, and not echoed yet
	sent     int64
	received int64
	echoed   time.Time // when the last byte was
	differs  error     // the echo is not the input
	progress chan struct{}

	ended chan struct{} // closed when the output has ended
}

// A refusal is a login that has failed before its first echo.
type refusal struct {
	gateway      int
	began, ended time.Time
	reason       string // the user's sentence, or the client's error
}

func (r *refusal) Error() string {
	return fmt.Sprintf("%s, after %v: %s", routeName(r.gateway), r.ended.Sub(r.began).Round(time.Millisecond), r.reason)
}

func routeName(gateway int) string {
	if gateway == 0 {
		return "no gateway"
	}
	return namespaceOf(gateway)
}

// open logs in as a user, and returns when the first line was echoed. Via is the number
// of a gateway, or zero for the balancer. The error is a *refusal.
func (f *fleet) open(ctx context.Context, user, via int) (*session, error) {
	s := &session{user: user, began: time.Now(), gateway: via, progress: make(chan struct{}, 1), ended: make(chan struct{})}
	var banners syncBuffer
	local := ""
	refused := func(err error) (*session, error) {
		if s.client != nil {
			s.client.Close()
		}
		if s.gateway == 0 {
			s.gateway = f.balancer.route(local)
		}
		return nil, &refusal{s.gateway, s.began, time.Now(), reason(err, banners.String()+s.stderr.String())}
	}

	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(clientAddr(user))}}
	addr := f.balancer.addr
	if via != 0 {
		addr = f.gateways[via].addr
	}
	nc, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return refused(err)
	}
	local = nc.LocalAddr().String()
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	defer stop()
	conn, chans, reqs, err := ssh.NewClientConn(nc, addr, &ssh.ClientConfig{
		User:            userName(user),
		Auth:            []ssh.AuthMethod{ssh.PublicKeys(f.keys[user])},
		HostKeyCallback: ssh.FixedHostKey(f.hostKey),
		BannerCallback:  func(text string) error { io.WriteString(&banners, text); return nil },
	})
	if err != nil {
		nc.Close()
		return refused(err)
	}
	s.client = ssh.NewClient(conn, chans, reqs)
	if s.session, err = s.client.NewSession(); err != nil {
		return refused(err)
	}
	s.session.Stderr = &s.stderr
	if s.in, err = s.session.StdinPipe(); err != nil {
		return refused(err)
	}
	out, err := s.session.StdoutPipe()
	if err != nil {
		return refused(err)
	}
	if err := s.session.Start("cat"); err != nil {
		return refused(err)
	}
	go s.read(out) // ends with the connection
	if err := s.send(); err != nil {
		return refused(err)
	}
	select {
	case <-s.progress:
	case <-s.ended:
		if s.empty() {
			return refused(errors.Join(errors.New("the session ended"), s.session.Wait()))
		}
	case <-ctx.Done():
		return refused(fmt.Errorf("no answer within %v", patience))
	}
	if !stop() {
		return refused(fmt.Errorf("no answer within %v", patience))
	}
	if s.gateway == 0 {
		s.gateway = f.balancer.route(local)
	}
	return s, nil
}

// empty reports whether nothing was echoed.
func (s *session) empty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.received == 0
}

// send sends a line.
func (s *session) send() error {
	s.mu.Lock()
	line := fmt.Appendf(nil, "%s at %d\n", userName(s.user), s.sent)
	s.pending = append(s.pending, line...)
	s.sent += int64(len(line))
	if s.echoed.IsZero() {
		s.echoed = time.Now()
	}
	s.mu.Unlock()
	_, err := s.in.Write(line)
	return err
}

// read compares the output with the input, until it ends.
func (s *session) read(out io.Reader) {
	defer close(s.ended)
	buf := make([]byte, 4096)
	for {
		n, err := out.Read(buf)
		s.mu.Lock()
		if s.differs == nil && (n > len(s.pending) || !bytes.Equal(buf[:n], s.pending[:n])) {
			s.differs = fmt.Errorf("after %d bytes got %q, want %q", s.received, buf[:n], s.pending)
		} else if s.differs == nil {
			s.pending = s.pending[n:]
			s.received += int64(n)
			s.echoed = time.Now()
		}
		s.mu.Unlock()
		if n > 0 {
			select {
			case s.progress <- struct{}{}:
			default:
			}
		}
		if err != nil {
			return
		}
	}
}

// errSilent says that a session does not echo and has not ended.
var errSilent = fmt.Errorf("no echo for %v", patience)

// hold sends a line each second, until the time given or until ctx ends, and then ends
// the session. Its error says that the session was lost.
func (s *session) hold(ctx context.Context, d time.Duration) error {
	defer s.client.Close()
	end := time.NewTimer(d)
	defer end.Stop()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for open := true; open; {
		select {
		case <-tick.C:
			s.mu.Lock()
			silent := len(s.pending) > 0 && time.Since(s.echoed) > patience
			s.mu.Unlock()
			if silent {
				return errSilent
			}
			if err := s.send(); err != nil {
				return s.lost(err)
			}
		case <-s.ended:
			return s.lost(io.EOF)
		case <-end.C:
			open = false
		case <-ctx.Done():
			open = false
		}
	}
	if err := s.in.Close(); err != nil && !errors.Is(err, io.EOF) {
		return s.lost(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- s.session.Wait() }() // ends with the connection
	select {
	case err := <-exited:
		if err != nil {
			return s.lost(err)
		}
	case <-time.After(patience):
		return errSilent
	}
	<-s.ended
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.differs == nil && s.received != s.sent {
		s.differs = fmt.Errorf("sent %d bytes, got %d", s.sent, s.received)
	}
	return nil
}

func (s *session) lost(err error) error {
	return errors.New(reason(err, s.stderr.String()))
}

// wrong returns the difference between echo and input, if the session was not lost.
func (s *session) wrong() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.differs
}

var (
	progressText  = regexp.MustCompile(`(Starting your bastion|Your bastion is still starting, [^.]* s) *[. \r\n]*`)
	referenceText = regexp.MustCompile(` *\(Reference: [a-z2-7]+\)`)
	addressText   = regexp.MustCompile(`\d+\.\d+\.\d+\.\d+(:\d+)?`)
	reasonText    = regexp.MustCompile(`disconnect, reason \d+: (.*)`)
)

// reason returns the sentence for a user in the text, or the client's error if there is
// none, without addresses and references.
func reason(err error, text string) string {
	text = strings.TrimSpace(progressText.ReplaceAllString(text, ""))
	if m := reasonText.FindStringSubmatch(err.Error()); text == "" && m != nil {
		text = m[1]
	}
	if text == "" {
		text = "client: " + err.Error()
	}
	text = addressText.ReplaceAllString(referenceText.ReplaceAllString(text, ""), "ADDRESS")
	return strings.Join(strings.Fields(text), " ")
}

// A syncBuffer is a buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
