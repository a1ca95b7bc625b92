// Package agent is the SSH server inside a bastion.
//
// Only gateways log in to it, with certificates of their fleet (package sshca)
// that say whom they speak for and what that user may do. Behind the login it
// behaves like OpenSSH's sshd: sessions with and without a terminal, sftp, and
// forwards of TCP ports, Unix sockets, the ssh-agent and X11.
//
// # One connection, straight down
//
//	Serve      accept, limit of half-open connections, login deadline
//	login      certificate -> identity, the idle clock stops
//	conn.run   global requests and channel opens, in the order they came
//	session    pty, environment, one process, its output and exit status
//	forward    direct-*, forwarded-*, agent and X11 channels
//
// # Whose rights
//
// An agent that runs as root runs nothing as root: every process, socket file
// and connection to a socket file is made with the rights of one account.
// See [Account].
//
// # Who ends a bastion
//
// This package does: [Server.Serve] returns some time after the last connection
// has gone, or when the bastion has lived long enough.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/wire"
)

// A Server is the SSH server of one bastion. Its fields must not be changed
// once Serve has been called.
type Server struct {
	// HostKey proves who the bastion is.
	HostKey ssh.Signer
	// Verifier says which certificates open this bastion.
	Verifier sshca.Verifier
	// Owner is the one user whose logins are accepted.
	Owner string
	// Account is the local user that everything runs as. It must be this
	// process's own unless that is root.
	Account Account

	// Idle is how long Serve goes on without an authenticated connection,
	// and MaxLife how long at most. Zero means forever.
	Idle, MaxLife time.Duration

	// AcceptEnv lists the environment variables that clients may set, as
	// patterns with * and ?. Empty means none.
	AcceptEnv []string
	// SFTP is the command line that serves the sftp subsystem; it is run by
	// the account's shell. Empty refuses the subsystem.
	SFTP string
	// MaxSessions is how many sessions one connection may have open; zero
	// means 10.
	MaxSessions int
	// Lastlog is the file where logins with a terminal are remembered, and
	// which lastlog(8) shows. It is not made if it is not there. Empty means
	// none.
	Lastlog string
	// TZ, if not empty, is the sessions' time zone variable.
	TZ string

	// Log gets one record for each thing worth knowing. It must not be nil.
	Log *slog.Logger

	// mu guards what follows.
	mu    sync.Mutex
	conns map[*conn]struct{}
	// entering counts logins that have been promised to be let in.
	entering int
	// closing refuses new connections.
	closing bool
	// idle runs while there is no authenticated connection.
	idle *time.Timer
	// lastLogin is the last with a terminal, for where Lastlog does not tell.
	lastLogin login

	// processes are those that run, of clients that have gone too; reaping
	// waits for them.
	processes map[*process]struct{}
	reaping   sync.WaitGroup
}

const (
	// loginGrace bounds a connection's life until it has authenticated.
	loginGrace = 30 * time.Second
	// maxHalfOpen is how many connections may be busy authenticating.
	maxHalfOpen = 100
	// maxLifeWarning is how long before the end sessions are warned.
	maxLifeWarning = 5 * time.Minute
	// hangupGrace is how long processes get between SIGHUP and SIGKILL.
	hangupGrace = 5 * time.Second
	// stopGrace is how long connections get to deliver the ends of their
	// sessions when the agent stops. It outlasts hangupGrace.
	stopGrace = 8 * time.Second
)

// Why Serve returns, as the cause of its context.
var (
	errIdle    = errors.New("no connection for the idle time")
	errMaxLife = errors.New("the bastion has reached its maximum life")
)

// Serve accepts connections on l until the bastion has been idle for s.Idle,
// has lived for s.MaxLife, or ctx ends; then it hangs up what runs, waits for
// it for some seconds, and returns nil. It returns an error if it cannot start
// or accepting fails. It closes l, and may be called once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	defer l.Close()
	if s.Owner == "" {
		return errors.New("an agent needs an owner")
	}
	if err := s.Account.check(); err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)

	s.conns = make(map[*conn]struct{})
	s.processes = make(map[*process]struct{})
	if s.Idle > 0 {
		s.idle = time.AfterFunc(s.Idle, func() { s.idled(stop) })
		defer s.idle.Stop()
	}
	if s.MaxLife > 0 {
		warning := time.AfterFunc(s.MaxLife-maxLifeWarning, func() {
			if s.MaxLife > maxLifeWarning {
				s.tell("This bastion ends in 5 minutes: it has reached its maximum life. Please finish your work.")
			}
		})
		end := time.AfterFunc(s.MaxLife, func() { stop(errMaxLife) })
		defer warning.Stop()
		defer end.Stop()
	}

	var serving sync.WaitGroup
	var acceptErr error
	serving.Go(func() {
		acceptErr = s.acceptLoop(ctx, l, &serving)
		stop(acceptErr)
	})
	<-ctx.Done()
	l.Close()

	switch context.Cause(ctx) {
	case errIdle:
	case errMaxLife:
		s.tell("This bastion has reached its maximum life and ends now.")
	default:
		s.tell("This bastion is being stopped.")
	}
	s.Log.Info("agent stops", "reason", context.Cause(ctx).Error())
	s.hangUp()
	ended := make(chan struct{})
	go func() { serving.Wait(); s.reaping.Wait(); close(ended) }()
	select {
	case <-ended:
		return acceptErr
	case <-time.After(2 * stopGrace):
		// A process that even SIGKILL does not end, waiting inside the kernel,
		// must not keep the bastion.
		return errors.New("stopping: some sessions did not end")
	}
}

// acceptLoop serves connections in goroutines of serving until ctx ends, and
// then returns nil.
func (s *Server) acceptLoop(ctx context.Context, l net.Listener, serving *sync.WaitGroup) error {
	halfOpen := make(chan struct{}, maxHalfOpen)
	for {
		nc, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				nc.Close()
			}
			return nil
		}
		if err != nil {
			// Out of descriptors or memory, or a client that left early. A
			// listener that is broken for good says so again.
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accepting connections: %w", err)
			}
			s.Log.Warn("accepting a connection failed", "err", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		select {
		case halfOpen <- struct{}{}:
		default:
			s.Log.Warn("too many connections are logging in", "remote", nc.RemoteAddr().String())
			nc.Close()
			continue
		}
		serving.Go(func() {
			defer nc.Close()
			// A panic ends this connection, not the sessions of others.
			defer func() {
				if r := recover(); r != nil {
					s.Log.Error("panic", "in", "connection", "panic", r, "stack", string(debug.Stack()))
				}
			}()
			c, err := func() (*conn, error) {
				defer func() { <-halfOpen }()
				// Nobody waits for a login when the agent stops.
				defer context.AfterFunc(ctx, func() { nc.Close() })()
				return s.login(nc)
			}()
			if err != nil {
				s.Log.Info("login failed", "remote", nc.RemoteAddr().String(), "err", err)
				return
			}
			c.run()
		})
	}
}

// config is how gateways are spoken to: with algorithms that gateways know,
// and none that x/crypto does slowly. promise is called once a login is proven,
// before the gateway is told so.
func (s *Server) config(promise func() error) *ssh.ServerConfig {
	config := &ssh.ServerConfig{
		Config: ssh.Config{
			KeyExchanges: []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519},
			Ciphers:      []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM},
			MACs:         []string{ssh.HMACSHA256ETM},
			// x/crypto deadlocks when its own side starts a key exchange
			// under load: its mux waits for room to write while the peer's
			// answer waits to be read. Let the peer start them.
			RekeyThreshold: 1 << 50,
		},
		PublicKeyAuthAlgorithms: []string{ssh.KeyAlgoED25519},
		MaxAuthTries:            3,
		ServerVersion:           "SSH-2.0-Sallyport_agent",
		PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			// Only offered so far: nothing may follow from this.
			_, err := s.identify(key)
			return nil, err
		},
		VerifiedPublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey, _ *ssh.Permissions, _ string) (*ssh.Permissions, error) {
			id, err := s.identify(key)
			if err != nil {
				return nil, err
			}
			if promise() != nil {
				// Leaves no method to go on with, so that package ssh hangs
				// up: the certificate is as good as ever, and the gateway
				// must not take this for a refusal.
				return nil, &ssh.PartialSuccessError{}
			}
			// x/crypto enforces the source-address option of what is
			// returned here. The maps are copies: the certificate's belong
			// to whoever made it.
			perms := &ssh.Permissions{ExtraData: map[any]any{identityKey{}: id}}
			if from, ok := key.(*ssh.Certificate).CriticalOptions["source-address"]; ok {
				perms.CriticalOptions = map[string]string{"source-address": from}
			}
			return perms, nil
		},
	}
	config.AddHostKey(s.HostKey)
	return config
}

// identityKey is where a login's identity is kept in ssh.Permissions.ExtraData.
type identityKey struct{}

// identify says whom a certificate speaks for, and refuses all but the owner.
func (s *Server) identify(key ssh.PublicKey) (identity.Identity, error) {
	id, err := s.Verifier.Verify(key)
	if err != nil {
		return identity.Identity{}, err
	}
	if id.User != s.Owner {
		return identity.Identity{}, fmt.Errorf("this bastion is %s's, not %s's", s.Owner, id.User)
	}
	return id, nil
}

// login does the handshake. The connection it returns counts as use of the
// bastion until leave is called with it.
func (s *Server) login(nc net.Conn) (*conn, error) {
	promised, entered := false, false
	defer func() { // also if package ssh panics
		if promised && !entered {
			s.leave(nil)
		}
	}()
	config := s.config(func() error {
		if !promised && !s.promise() {
			return errEnding
		}
		promised = true
		return nil
	})
	nc.SetDeadline(time.Now().Add(loginGrace))
	stream := wire.New(nc)
	stream.HoldBack()
	config.PreAuthConnCallback = func(p ssh.ServerPreAuthConn) { stream.Authenticates(p) }
	sc, chans, reqs, err := ssh.NewServerConn(stream, config)
	if err != nil {
		return nil, err
	}
	stream.Carries(sc)
	nc.SetDeadline(time.Time{})
	c := newConn(s, stream, sc, chans, reqs)
	if entered = s.enter(c); !entered {
		sc.Close()
		// Package ssh has goroutines that end only when these are drained.
		go ssh.DiscardRequests(reqs)
		for nc := range chans {
			nc.Reject(ssh.ResourceShortage, errEnding.Error())
		}
		return nil, errEnding
	}
	return c, nil
}

var errEnding = errors.New("the bastion is ending")

// promise lets a login in, unless the bastion is ending. A gateway that has been
// told of success must find a bastion: so the idle clock stops here, before it
// is told. enter or leave must follow.
func (s *Server) promise() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.entering++
	if s.idle != nil {
		s.idle.Stop()
	}
	return true
}

// enter counts c as use of the bastion, as promised, unless the bastion has been
// told to end meanwhile.
func (s *Server) enter(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.entering--
	s.conns[c] = struct{}{}
	return true
}

// leave ends the use by c, or a promise if c is nil.
func (s *Server) leave(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c == nil {
		s.entering--
	}
	delete(s.conns, c)
	if s.idle != nil && len(s.conns)+s.entering == 0 {
		s.idle.Reset(s.Idle)
	}
}

// idled is called when the idle timer fires. A connection may have entered
// since: then the timer is set again when it leaves.
func (s *Server) idled(stop context.CancelCauseFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns)+s.entering == 0 {
		s.closing = true
		stop(errIdle)
	}
}

// open returns the connections there are.
func (s *Server) open() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*conn
	for c := range s.conns {
		all = append(all, c)
	}
	return all
}

// tell shows a line on every terminal. It does not wait for slow ones.
func (s *Server) tell(line string) {
	for _, c := range s.open() {
		c.tell(line)
	}
}

// hangUp refuses new connections, hangs up every process, also of clients that
// have gone, and after stopGrace, or when all sessions have told how they ended,
// closes the connections.
func (s *Server) hangUp() {
	s.mu.Lock()
	s.closing = true
	running := slices.Collect(maps.Keys(s.processes))
	s.mu.Unlock()
	for _, p := range running {
		p.hangUp()
	}

	var ended sync.WaitGroup
	deadline := time.Now().Add(stopGrace)
	for _, c := range s.open() {
		ended.Go(func() { c.shutdown(deadline) })
	}
	ended.Wait()
}

// start starts a command with the rights of the account, and waits for its end:
// see [process.ended]. It goes on when its client has gone, until the bastion
// ends.
func (s *Server) start(cmd command) (*process, error) {
	p, err := s.Account.start(cmd)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.processes[p] = struct{}{}
	closing := s.closing
	s.mu.Unlock()
	if closing {
		p.hangUp()
	}
	s.reaping.Go(func() {
		p.status = p.wait()
		s.mu.Lock()
		delete(s.processes, p)
		s.mu.Unlock()
		close(p.ended)
	})
	return p, nil
}
