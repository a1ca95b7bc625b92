package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"

	"github.com/sallyport-ssh/sallyport/internal/config"
)

// A socket is a listener with the name by which a successor of this process finds it:
// the setting, an equals sign, and the address in the configuration. Without an address,
// systemd has opened it in place of the setting.
type socket struct {
	*net.TCPListener
	name string
}

// The settings in the names of sockets.
const (
	forSSH        = "listen"
	forMonitoring = "monitoring"
	forAPI        = "api"
)

// sockets are those of a gateway.
type sockets struct {
	ssh, monitoring, api []socket
	// predecessor is a pipe to the process that waits for this one to accept
	// connections, see [serviceManager]; nil if there is none.
	predecessor *os.File
}

// openSockets opens the sockets of a configuration. It takes those that another process
// has opened: a predecessor of this one, or systemd (socket activation).
func openSockets(ctx context.Context, cfg *config.Gateway) (_ *sockets, err error) {
	var s sockets
	given, predecessor, err := inheritedSockets()
	if err != nil {
		return nil, err
	}
	s.predecessor = predecessor
	defer func() {
		closeAll(given) // not in the configuration any more
		if err != nil {
			s.close()
		}
	}()
	// open returns the given sockets for a setting, and opens those that are missing.
	open := func(setting string, addrs []string) ([]socket, error) {
		if activated := take(&given, setting+"="); activated != nil {
			return activated, nil
		}
		var opened []socket
		for _, addr := range addrs {
			name := setting + "=" + addr
			if found := take(&given, name); found != nil {
				opened = append(opened, found...)
				continue
			}
			ln, err := listen(ctx, addr)
			if err != nil {
				closeAll(opened)
				return nil, err
			}
			opened = append(opened, socket{ln, name})
		}
		return opened, nil
	}
	if s.ssh, err = open(forSSH, cfg.Listen); err != nil {
		return nil, err
	}
	var monitoring []string
	if cfg.Monitoring.Listen != "" {
		monitoring = []string{cfg.Monitoring.Listen}
	}
	if s.monitoring, err = open(forMonitoring, monitoring); err != nil {
		return nil, fmt.Errorf("monitoring.listen: %w", err)
	}
	// Not from systemd: the configuration requires TLS by the address.
	if s.api, err = open(forAPI, cfg.API.Listen); err != nil {
		return nil, fmt.Errorf("api.listen: %w", err)
	}
	return &s, nil
}

// take removes the sockets of a name from all, and returns them.
func take(all *[]socket, name string) (taken []socket) {
	*all = slices.DeleteFunc(*all, func(s socket) bool {
		if s.name == name {
			taken = append(taken, s)
		}
		return s.name == name
	})
	return taken
}

func closeAll(all []socket) {
	for _, s := range all {
		s.Close()
	}
}

// close closes all sockets. If a predecessor waits, it learns that this process fails.
func (s *sockets) close() {
	closeAll(s.all())
	if s.predecessor != nil {
		s.predecessor.Close()
	}
}

func (s *sockets) all() []socket { return slices.Concat(s.ssh, s.monitoring, s.api) }

func listeners(sockets []socket) (all []net.Listener) {
	for _, socket := range sockets {
		all = append(all, socket)
	}
	return all
}

// socketsVariable is the environment variable with the names of the sockets that a
// predecessor passes on, separated by spaces. Their descriptors begin at firstSocket, and
// the one after them is the write end of a pipe.
const (
	socketsVariable = "SALLYPORT_SOCKETS"
	firstSocket     = 3 // as with systemd, sd_listen_fds(3)
)

// inheritedSockets returns the sockets that another process has opened for this one. The
// variables of the environment that describe them are not passed on to children.
func inheritedSockets() (given []socket, predecessor *os.File, err error) {
	use := func(file *os.File, name string) {
		defer file.Close()
		ln, listenErr := net.FileListener(file)
		if listenErr != nil {
			err = errors.Join(err, fmt.Errorf("an inherited socket: %w", listenErr))
			return
		}
		tcp, ok := ln.(*net.TCPListener)
		if !ok {
			ln.Close()
			err = errors.Join(err, fmt.Errorf("an inherited socket has the address %s, which is not of TCP", ln.Addr()))
			return
		}
		given = append(given, socket{tcp, name})
	}
	if names, ok := os.LookupEnv(socketsVariable); ok {
		os.Unsetenv(socketsVariable)
		fd := firstSocket
		for _, name := range strings.Fields(names) {
			use(os.NewFile(uintptr(fd), name), name)
			fd++
		}
		syscall.CloseOnExec(fd)
		predecessor = os.NewFile(uintptr(fd), "predecessor")
	}
	for _, file := range activation.Files(true) {
		setting := forSSH
		if file.Name() == forMonitoring { // FileDescriptorName=, see systemd.socket(5)
			setting = forMonitoring
		}
		use(file, setting+"=")
	}
	if err != nil {
		closeAll(given)
		return nil, nil, err
	}
	return given, predecessor, nil
}

// listen opens a socket. If the address is in use it tries again for 3 s: the gateway
// before this one may have been told to drain, and be about to close its listener.
func listen(ctx context.Context, addr string) (*net.TCPListener, error) {
	for deadline := time.Now().Add(3 * time.Second); ; {
		var config net.ListenConfig
		ln, err := config.Listen(ctx, "tcp", addr)
		if err == nil {
			return ln.(*net.TCPListener), nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) || time.Now().After(deadline) {
			return nil, err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}
