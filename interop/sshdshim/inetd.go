package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/local"
	"github.com/sallyport-ssh/sallyport/internal/wire"
)

// serveStdio is a gateway of one connection. It exits with 255 if the client
// was refused, as sshd -i does.
func serveStdio(c call, logTo io.Writer) error {
	// The client may be gone at any time; that is no reason to die.
	signal.Ignore(syscall.SIGPIPE)
	dir, err := os.MkdirTemp(home, "inetd-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// A client ends its ProxyCommand like this; dir is not to stay.
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP, syscall.SIGTERM)
	go func() { // until the process ends
		<-hangup
		os.RemoveAll(dir)
		os.Exit(255)
	}()
	site, err := translate(c, dir)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "gateway.yaml")
	if err := os.WriteFile(file, site.yaml, 0o600); err != nil {
		return err
	}
	cfg, err := config.Load(file)
	if err != nil {
		return err
	}
	nc, err := newStdio()
	if err != nil {
		return err
	}

	refused := &refusals{Handler: slog.NewJSONHandler(logTo, nil), seen: new(atomic.Bool)}
	log := slog.New(refused)
	kinds := make(map[string]bastion.Profile)
	for name, p := range cfg.Profiles {
		kinds[name] = bastion.Profile{
			Launcher: &local.Launcher{
				Dir:       filepath.Join(cfg.StateDir, "bastions"),
				Agent:     p.Local.Agent,
				FleetKey:  cfg.FleetKey.PublicKey(),
				Account:   p.Local.Account,
				AcceptEnv: p.Local.AcceptEnv,
				Log:       log,
			},
			Idle: p.Idle, MaxLife: p.MaxLife, StartTimeout: p.StartTimeout,
		}
	}
	dialer := &bastion.Dialer{
		Ledger:   &bastion.Memory{},
		Profiles: kinds,
		FleetKey: cfg.FleetKey,
		WrapConn: func(nc net.Conn) net.Conn { return wire.New(nc) },
		Log:      log,
	}
	ctx := context.Background()
	if err := dialer.Adopt(ctx); err != nil {
		return err
	}
	keys := &auth.Keys{
		Dir:                     cfg.AuthorizedKeysDir,
		TrustedUserCAKeys:       cfg.TrustedUserCAKeys,
		AuthorizedPrincipalsDir: cfg.AuthorizedPrincipalsDir,
		RevokedKeys:             cfg.RevokedKeys,
		Command:                 cfg.AuthorizedKeysCommand,
		CommandUser:             cfg.AuthorizedKeysCommandUser,
		LookupTimeout:           cfg.AuthorizedKeysTimeout,
		Log:                     log,
	}
	server := &gateway.Server{
		HostKeys:            cfg.HostKeys,
		Authorize:           keys.Authorize,
		Dial:                dialer.Dial,
		LoginGraceTime:      cfg.LoginGraceTime,
		MaxAuthTries:        cfg.MaxAuthTries,
		MaxSessions:         cfg.MaxSessions,
		ClientAliveInterval: cfg.ClientAliveInterval,
		ClientAliveCountMax: cfg.ClientAliveCountMax,
		Ciphers:             cfg.Ciphers,
		MACs:                cfg.MACs,
		KexAlgorithms:       cfg.KexAlgorithms,
		VersionAddendum:     cfg.VersionAddendum,
		Banner:              cfg.Banner,
		Log:                 log,
	}
	server.ServeConn(ctx, nc)
	if refused.seen.Load() {
		os.RemoveAll(dir)
		os.Exit(255)
	}
	return nil
}

// refusals is a log that remembers whether a login was refused.
type refusals struct {
	slog.Handler
	seen *atomic.Bool
}

func (r *refusals) Handle(ctx context.Context, rec slog.Record) error {
	if rec.Message == "login refused" {
		r.seen.Store(true)
	}
	return r.Handler.Handle(ctx, rec)
}

func (r *refusals) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &refusals{r.Handler.WithAttrs(attrs), r.seen}
}

// stdio is standard input and output as a connection. It has no address, like
// sshd's "UNKNOWN".
type stdio struct{ in, out *os.File }

func newStdio() (*stdio, error) {
	// Nonblocking, so that Close ends a Read and deadlines work.
	for fd := range 2 {
		if err := syscall.SetNonblock(fd, true); err != nil {
			return nil, err
		}
	}
	return &stdio{os.NewFile(0, "stdin"), os.NewFile(1, "stdout")}, nil
}

func (s *stdio) Read(p []byte) (int, error)  { return s.in.Read(p) }
func (s *stdio) Write(p []byte) (int, error) { return s.out.Write(p) }

func (s *stdio) Close() error {
	s.in.Close()
	return s.out.Close()
}

func (s *stdio) LocalAddr() net.Addr  { return stdioAddr{} }
func (s *stdio) RemoteAddr() net.Addr { return stdioAddr{} }

// Files that cannot wait, such as a regular one, have no deadlines.
func (s *stdio) SetDeadline(t time.Time) error {
	s.SetReadDeadline(t)
	s.SetWriteDeadline(t)
	return nil
}

func (s *stdio) SetReadDeadline(t time.Time) error {
	s.in.SetReadDeadline(t)
	return nil
}

func (s *stdio) SetWriteDeadline(t time.Time) error {
	s.out.SetWriteDeadline(t)
	return nil
}

type stdioAddr struct{}

func (stdioAddr) Network() string { return "stdio" }
func (stdioAddr) String() string  { return "UNKNOWN" }
