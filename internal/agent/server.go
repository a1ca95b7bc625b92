package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/transport"
	"github.com/sallyport-ssh/sallyport/internal/userauth"
)

// A Server is the SSH server of one bastion. Its fields must not be changed once Serve has
// been called.
type Server struct {
	// HostKey is the host key. It must not be nil.
	HostKey ssh.Signer
	// Verifier verifies the certificates of gateways.
	Verifier sshca.Verifier
	// Owner is the only user whose logins are accepted.
	Owner string
	// Account is the local account that everything runs as. It must be this process's
	// own unless that is root.
	Account Account
	// LookupLogin is called at each login, and returns the current state of Account. Its
	// errors are those of the function [LookupLogin]. Nil means that Account does not
	// change and has no limits.
	LookupLogin func() (Login, error)

	// Idle is how long the bastion stays up without a connection, and MaxLife how long
	// it stays up at most. Zero means forever.
	Idle, MaxLife time.Duration

	// StopTimeout is the time between the signal to stop and SIGKILL: ECS's stopTimeout.
	// When Serve's context ends, connections stay open for StopTimeout less the time
	// that an orderly shutdown takes. If that is not positive, Serve closes them at once.
	StopTimeout time.Duration

	// AcceptEnv are the environment variables that clients may set, as patterns with *
	// and ?. Empty means none.
	AcceptEnv []string
	// SFTP is the command of the sftp subsystem; the program is an absolute path. As in
	// sshd, the account's shell starts it, except for logins that may only copy files.
	// Empty disables the subsystem.
	SFTP []string
	// MaxSessions limits the sessions of one connection, and MaxChannels its channels
	// of all types, opened by either side. Zero means 10 and 1,000.
	MaxSessions, MaxChannels int
	// GatewayPorts and StreamLocalBindUnlink are the options of sshd_config(5) for
	// remote forwards; an empty GatewayPorts means "no". SocketMode is the mode of
	// forwarded sockets, the complement of StreamLocalBindMask; zero means 0600.
	GatewayPorts          string
	StreamLocalBindUnlink bool
	SocketMode            os.FileMode
	// Lastlog is the file of lastlog(8), which is updated by sessions with a terminal.
	// It is not created. Empty means none.
	Lastlog string
	// Environment are the default variables of sessions, as NAME=value; see
	// [ContainerEnvironment].
	Environment []string
	// TZ, if not empty, is the variable TZ of sessions.
	TZ string

	// Log must not be nil. ClientLog takes the messages that clients can cause in any
	// number, so that their rate can be limited; nil means Log.
	Log, ClientLog *slog.Logger

	// Tests set these. Zero values mean the constants and variables with the same names.
	systemRC         string
	environmentFiles []string
	hangupGrace      time.Duration

	// mu guards the fields below. Those up to noConns decide when the bastion ends.
	mu sync.Mutex
	// conns are the authenticated connections.
	conns map[*conn]struct{}
	// reserved counts gateways that have authenticated and are not in conns yet.
	reserved int
	// idle runs while conns is empty and reserved is 0. It is nil without Idle.
	idle *time.Timer
	// closing is set when the bastion is ending: no connection is accepted any more.
	closing bool
	// noConns, if not nil, is closed when conns is empty and reserved is 0.
	noConns chan struct{}
	// processes are the running processes of all sessions, including those whose client
	// has disconnected.
	processes map[*process]struct{}
	// lastLogin is the last login with a terminal, for an agent without a lastlog file.
	lastLogin terminalLogin

	// stop cancels the context of Serve with a cause. Serve sets it.
	stop context.CancelCauseFunc

	// reaping counts the goroutines that wait for processes.
	reaping sync.WaitGroup
}

const (
	// loginGrace is sshd's LoginGraceTime.
	loginGrace = 30 * time.Second
	// logFullEvery is the interval of messages about too many unauthenticated
	// connections.
	logFullEvery = 10 * time.Second
)

// Serve accepts connections on l until the bastion ends; see the package documentation. It
// then terminates the sessions and returns nil. It returns an error if a field is invalid,
// if accepting fails, or if processes survive SIGKILL for 16 seconds. It closes l, and may
// be called once.
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

	if s.ClientLog == nil {
		s.ClientLog = s.Log
	}
	s.stop = stop
	s.conns = make(map[*conn]struct{})
	s.processes = make(map[*process]struct{})
	if s.Idle > 0 {
		s.idle = time.AfterFunc(s.Idle, func() { s.idleExpired(stop) })
		defer s.idle.Stop()
	}
	if s.MaxLife > 0 {
		warning := time.AfterFunc(s.MaxLife-maxLifeWarning, func() {
			if s.MaxLife > maxLifeWarning {
				s.notify("This bastion ends in 5 minutes: it has reached its maximum life. Please finish your work.")
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
	case errIdle, errUnused:
	case errMaxLife:
		s.notify("This bastion has reached its maximum life and ends now.")
	default:
		s.giveNotice(s.StopTimeout - stopMargin)
		s.notify("This bastion is being stopped.")
	}
	s.Log.Info("agent stops", "reason", context.Cause(ctx).Error())
	s.shutdown()
	ended := make(chan struct{})
	go func() { serving.Wait(); s.reaping.Wait(); close(ended) }()
	select {
	case <-ended:
		return acceptErr
	case <-time.After(2 * stopGrace):
		// SIGKILL does not end a process that is blocked inside the kernel. It must not
		// keep the bastion up.
		return errors.New("stopping: some processes did not end")
	}
}

// acceptLoop serves connections in goroutines of serving. It returns nil when ctx ends.
func (s *Server) acceptLoop(ctx context.Context, l net.Listener, serving *sync.WaitGroup) error {
	var waiting halfOpen
	var lastLogged time.Time
	logFull := func(action string, nc net.Conn) {
		// Rate-limited, because unauthenticated clients cause these messages.
		if now := time.Now(); now.Sub(lastLogged) >= logFullEvery {
			lastLogged = now
			s.ClientLog.Warn("too many unauthenticated connections", action, nc.RemoteAddr().String())
		}
	}
	for {
		nc, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				nc.Close()
			}
			return nil
		}
		if err != nil {
			// Out of descriptors or memory, or the client has already closed the
			// connection. Retry.
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
		ok, evicted := waiting.add(nc)
		if evicted != nil {
			logFull("evicted", evicted)
			evicted.Close()
		}
		if !ok {
			logFull("rejected", nc)
			nc.Close()
			continue
		}
		serving.Go(func() {
			defer nc.Close()
			// A panic ends this connection only.
			defer func() {
				if r := recover(); r != nil {
					oplog.Panic(s.Log, "connection", r)
				}
			}()
			c, err := func() (*conn, error) {
				defer waiting.remove(nc)
				// Abort the login when the agent stops.
				defer context.AfterFunc(ctx, func() { nc.Close() })()
				return s.handshake(nc)
			}()
			if err != nil {
				s.ClientLog.Info("login failed", "remote", nc.RemoteAddr().String(), "err", err)
				return
			}
			c.run()
		})
	}
}

// identify returns the identity in a certificate. It rejects every user but the owner.
func (s *Server) identify(key ssh.PublicKey) (identity.Identity, error) {
	id, err := s.Verifier.Verify(key)
	if err != nil {
		return identity.Identity{}, err
	}
	if id.User != s.Owner {
		return identity.Identity{}, fmt.Errorf("this bastion belongs to %s, not to %s", s.Owner, id.User)
	}
	return id, nil
}

// keyAlgorithms are the algorithms of gateways' certificates (package sshca).
var keyAlgorithms = []string{ssh.KeyAlgoED25519}

// maxAuthTries is how many certificates a gateway may try. It tries one for each fleet key
// while the keys are rotated.
const maxAuthTries = 6

// handshake does the key exchange and authenticates the gateway. The connection that it
// returns keeps the bastion up until leave is called with it.
func (s *Server) handshake(nc net.Conn) (c *conn, err error) {
	nc.SetDeadline(time.Now().Add(loginGrace))
	t := transport.NewServer(nc, &transport.Config{
		Version:    "SSH-2.0-Sallyport_agent",
		HostKeys:   []ssh.Signer{s.HostKey},
		Ciphers:    []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM},
		Extensions: userauth.Extensions(keyAlgorithms),
	})
	defer func() { // also after a panic
		if c == nil {
			t.Close()
		}
	}()
	if err := t.Handshake(); err != nil {
		return nil, err
	}
	auth := userauth.NewServer(t, userauth.ServerConfig{MaxAuthTries: maxAuthTries, Algorithms: keyAlgorithms})
	id, err := s.authenticate(auth)
	if err != nil {
		return nil, err
	}
	// Close without a failure message, because the certificate is valid: the gateway
	// starts another bastion.
	if !s.reserve() {
		return nil, errStopping
	}
	entered := false
	defer func() {
		if !entered {
			s.leave(nil)
		}
	}()
	if err := auth.Succeed(); err != nil {
		return nil, err
	}
	nc.SetDeadline(time.Time{})
	opened := newConn(s, t, id)
	if entered = s.enter(opened); !entered {
		return nil, errStopping
	}
	return opened, nil
}

// authenticate answers the gateway's requests until one has a valid signature and a
// certificate that identify accepts.
func (s *Server) authenticate(auth *userauth.Server) (identity.Identity, error) {
	var rejected error // the reason for rejecting the last certificate
	for {
		req, err := auth.Next()
		if err != nil {
			return identity.Identity{}, errors.Join(rejected, err)
		}
		switch req := req.(type) {
		case *userauth.Query: // an offer without a signature: no side effects
			if _, rejected = s.identify(req.Key); rejected == nil {
				err = auth.Accept(req)
			} else {
				err = auth.Fail()
			}
		case *userauth.Signed:
			var id identity.Identity
			if id, rejected = s.identify(req.Key); rejected == nil {
				return id, nil
			}
			err = auth.Fail()
		default:
			err = auth.Fail()
		}
		if err != nil {
			return identity.Identity{}, errors.Join(rejected, err)
		}
	}
}
