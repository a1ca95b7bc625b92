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

	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/daemon"
)

// serveStdio serves one connection on standard input and output. It exits with status
// 255 if the login was rejected, as sshd -i does.
func serveStdio(c call, logTo io.Writer) error {
	// The client may disconnect at any time; SIGPIPE must not end the process.
	signal.Ignore(syscall.SIGPIPE)
	dir, err := os.MkdirTemp(home, "inetd-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// A client ends its ProxyCommand with these signals; dir must be removed.
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP, syscall.SIGTERM)
	go func() { // until the process ends
		<-hangup
		os.RemoveAll(dir)
		os.Exit(255)
	}()
	cfg, err := load(c, dir)
	if err != nil {
		return err
	}
	nc, err := newStdio()
	if err != nil {
		return err
	}

	refused := &refusals{Handler: slog.NewJSONHandler(logTo, nil), seen: new(atomic.Bool)}
	ctx := context.Background()
	gateway, err := daemon.New(ctx, cfg, io.Discard, slog.New(refused))
	if err != nil {
		return err
	}
	gateway.ServeConn(ctx, nc)
	gateway.Close()
	if refused.seen.Load() {
		os.RemoveAll(dir)
		os.Exit(255)
	}
	return nil
}

// load returns the gateway's configuration for an sshd_config. Its files are in dir,
// which must be this call's own.
func load(c call, dir string) (*config.Gateway, error) {
	site, err := translate(c, dir)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "gateway.yaml")
	if err := os.WriteFile(file, site.yaml, 0o600); err != nil {
		return nil, err
	}
	return config.Load(file, nil)
}

// refusals is a log handler that detects the record of a rejected login.
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
