// Package api is the HTTP API: it starts, finds, lists and stops bastions for programs, and
// for users without an SSH client at hand. docs/api.md describes its calls, and openapi.json
// is their schema.
//
// A request is a login, and may do no more than the same user's login to the console over
// SSH. There is one request on each connection, which package gateway treats like a
// connection over SSH (see [gateway.Call]): it has the same limits, penalties and log
// entries. This package verifies the credential:
//
//   - a signature by an SSH key, as ssh-keygen -Y sign makes it (signature.go), with a
//     nonce that is accepted once (nonces.go)
//   - a token of an OpenID provider, or an operator's (tokens.go)
//
// Package gateway then decides by key, code and roles, and package console lists
// connections and stops bastions. No request has a body.
package api

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/console"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

const (
	// headerTimeout bounds the TLS handshake, and the wait for the header after it.
	headerTimeout = 10 * time.Second
	// writeTimeout bounds each write to a client.
	writeTimeout = 10 * time.Second
	// maxHeader limits the header of a request, in bytes.
	maxHeader = 32 << 10
	// shutdownTimeout bounds the wait for answers to requests when the gateway drains.
	shutdownTimeout = 15 * time.Second
)

// A Server serves the API. Its fields must be set before [Server.Serve] is called, and must
// not change afterwards. [Server.Reload] replaces the Settings.
type Server struct {
	// Settings are in force until the first Reload.
	Settings

	// NewCall makes a call of a connection; see [gateway.Server.NewCall].
	NewCall func(ctx context.Context, nc net.Conn) *gateway.Call
	Console *console.Console
	// Bastions finds bastions. It is a [bastion.Dialer].
	Bastions Bastions
	// Nonces stores the nonces of requests for all gateways that have the same users.
	// If it is nil, this gateway is alone, and they are in memory.
	Nonces bastion.TextStore
	Log    *slog.Logger

	reloaded atomic.Pointer[Settings] // nil before the first Reload
	nonces   nonces
	provider provider
	routes   http.Handler
	starts   starts
	draining chan struct{}
}

// Bastions finds, starts and lists bastions.
type Bastions interface {
	Status(ctx context.Context, user string) ([]bastion.Status, error)
	List(ctx context.Context) ([]bastion.Status, error)
	Dial(ctx context.Context, id identity.Identity, notify func(starting bool)) (*bastion.Conn, error)
	UsualStart(profile string) time.Duration
}

// Settings are replaced as a whole by [Server.Reload]. A request keeps the settings that were
// in force when it began.
type Settings struct {
	Options
	// HostKeys are those of the gateway's SSH server, for its clients.
	HostKeys []ssh.PublicKey
}

// Options are the settings that are plain values. Package config reads them from the
// configuration file, where they have the same names in snake_case.
type Options struct {
	// Certificate is that of the TLS server, with its private key; nil means HTTP
	// without TLS.
	Certificate *tls.Certificate
	// Names are the host names and addresses of this API, which clients sign. Empty
	// means those in the certificate, or without TLS those of this machine.
	Names []string
	// SSHAddress is the "host:port" of the SSH server, for its users. If the host is
	// empty, it is the one in the request.
	SSHAddress string
	// OperatorToken is the hash of a token for an operator, who is an administrator and
	// no user; nil means that there is none.
	OperatorToken *[sha256.Size]byte
	// OIDC accepts tokens of users.
	OIDC OIDC
}

// Reload replaces the settings. It may be called at any time.
func (s *Server) Reload(next Settings) { s.reloaded.Store(&next) }

// settings returns the settings in force.
func (s *Server) settings() *Settings {
	if next := s.reloaded.Load(); next != nil {
		return next
	}
	return &s.Settings
}

// Serve answers requests until ctx ends or a listener fails. Then it closes the listeners,
// ends the waits for bastions, which go on starting, and returns when all requests are
// answered, or after shutdownTimeout. The error is nil if ctx has ended.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	s.nonces = nonces{store: s.Nonces}
	if s.Nonces == nil {
		s.nonces = nonces{store: &nonceMemory{}, began: time.Now()}
	}
	s.routes = s.newRoutes()
	s.draining = make(chan struct{})
	working, stopWork := context.WithCancelCause(context.WithoutCancel(ctx))
	s.starts.ctx = working

	server := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: headerTimeout,
		WriteTimeout:      writeTimeout, // handlers that wait set their own
		MaxHeaderBytes:    maxHeader,
		ConnContext: func(ctx context.Context, nc net.Conn) context.Context {
			if encrypted, ok := nc.(*tls.Conn); ok {
				nc = encrypted.NetConn()
			}
			return context.WithValue(ctx, callKey{}, nc.(*gateway.Call))
		},
		// That handler would wait for a body without a limit of time, and log nothing.
		DisableGeneralOptionsHandler: true,
		// The call logs each failure, within limits.
		ErrorLog: slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}
	// One request on each connection, so that limits of connections limit requests, too.
	server.SetKeepAlivesEnabled(false)

	ended := make(chan error, len(listeners))
	var serving sync.WaitGroup
	for _, ln := range listeners {
		ln = s.wrap(ctx, ln)
		serving.Go(func() { ended <- server.Serve(ln) })
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-ended:
	}
	close(s.draining)
	stopWork(errDraining)
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	// If the time is over, the gateway closes the connections at the end of its drain.
	if late := server.Shutdown(grace); late != nil {
		s.Log.Warn("requests to the HTTP API are not answered yet", "err", late)
	}
	serving.Wait()
	s.starts.running.Wait()
	return err
}

var errDraining = errors.New("the gateway drains")

// drains reports whether the gateway drains.
func (s *Server) drains() bool {
	select {
	case <-s.draining:
		return true
	default:
		return false
	}
}

// callKey is the key of the [gateway.Call] in the context of a request.
type callKey struct{}

// wrap returns a listener that accepts calls, with TLS if there is a certificate.
func (s *Server) wrap(ctx context.Context, ln net.Listener) net.Listener {
	ln = callListener{ln, ctx, s.NewCall}
	if s.Certificate == nil {
		return ln
	}
	return tls.NewListener(ln, &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.settings().Certificate, nil },
	})
}

type callListener struct {
	net.Listener
	ctx     context.Context
	newCall func(context.Context, net.Conn) *gateway.Call
}

// Accept implements [net.Listener].
func (l callListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.newCall(l.ctx, nc), nil
}

// named reports whether a Host header names this API.
func (o *Options) named(hostPort string) bool {
	host := hostPort
	if h, _, err := net.SplitHostPort(hostPort); err == nil {
		host = h
	}
	host = strings.ToLower(strings.Trim(host, "[]"))
	switch {
	case len(o.Names) > 0:
		return slices.Contains(o.Names, host)
	case o.Certificate != nil:
		return o.Certificate.Leaf.VerifyHostname(host) == nil
	}
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// sshAddress returns the address of the SSH server for the client of a request to hostPort.
func (o *Options) sshAddress(hostPort string) (host, port string, err error) {
	if host, port, err = net.SplitHostPort(o.SSHAddress); err != nil {
		return "", "", fmt.Errorf("the address of the SSH server: %w", err)
	}
	if host == "" {
		host = hostPort
		if h, _, err := net.SplitHostPort(hostPort); err == nil {
			host = h
		}
		host = strings.Trim(host, "[]")
	}
	return host, port, nil
}
