package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// This file hands a gateway over to a successor: another process of the program that is
// now on disk, which accepts connections from the same sockets. docs/adr/0016 has the
// reasons.

// successorTimeout limits the start of a successor. It exceeds the time for which a
// gateway waits for secrets and for the listing of bastions.
const successorTimeout = 2 * time.Minute

// accepting is written to the pipe of a predecessor.
const accepting = "accepting\n"

// startSuccessor starts a successor, and returns its process ID when it accepts
// connections. If it does not, or ctx ends before, the successor is killed.
func (s *sockets) startSuccessor(ctx context.Context) (pid int, err error) {
	if err := mayEndBeforeSuccessor(); err != nil {
		return 0, err
	}
	// Not os.Executable: that is the file of this process, even if a newer version has
	// replaced it, or the link to it.
	program, err := exec.LookPath(os.Args[0])
	if err != nil {
		return 0, err
	}
	read, write, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer read.Close()
	defer write.Close()
	cmd := exec.Command(program, os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	var names []string
	for _, socket := range s.all() {
		file, err := duplicate(socket.TCPListener)
		if err != nil {
			return 0, fmt.Errorf("duplicating the socket at %s: %w", socket.Addr(), err)
		}
		defer file.Close()
		names = append(names, socket.name)
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
	cmd.ExtraFiles = append(cmd.ExtraFiles, write)
	cmd.Env = append(os.Environ(), socketsVariable+"="+strings.Join(names, " "))
	// The parent of this process is that of the successor, too. A child of this process
	// could crash while this one drains, and systemd would not notice.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_PARENT}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer cmd.Process.Release()
	write.Close()

	read.SetReadDeadline(time.Now().Add(successorTimeout))
	defer context.AfterFunc(ctx, func() { read.SetReadDeadline(time.Unix(1, 0)) })()
	line, err := bufio.NewReader(read).ReadString('\n')
	if line == accepting {
		return cmd.Process.Pid, nil
	}
	cmd.Process.Kill() // its parent reaps it
	switch {
	case ctx.Err() != nil:
		return 0, context.Cause(ctx)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, fmt.Errorf("it did not accept connections within %v", successorTimeout)
	default: // it has closed the pipe
		return 0, errors.New("it has ended; its messages are before this one")
	}
}

// duplicate returns another descriptor of a socket. It is not [net.TCPListener.File],
// which makes both descriptors blocking when they are passed on, so that Accept ignores
// the close of its listener.
func duplicate(ln *net.TCPListener) (*os.File, error) {
	conn, err := ln.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var dupErr error
	if err := conn.Control(func(of uintptr) { fd, dupErr = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, os.NewSyscallError("fcntl", dupErr)
	}
	return os.NewFile(uintptr(fd), ln.Addr().String()), nil
}

// mayEndBeforeSuccessor returns an error if the end of this process would be the end of
// its children.
func mayEndBeforeSuccessor() error {
	self := fmt.Sprint(os.Getpid())
	switch {
	case self == "1":
		return errors.New("this gateway is process 1 of its container, which ends with it; replace the container instead")
	case os.Getenv("SYSTEMD_EXEC_PID") == self && os.Getenv("NOTIFY_SOCKET") == "":
		return errors.New("systemd would end the successor with this process; set Type=notify in the unit, and restart it once")
	}
	return nil
}

// A serviceManager is told about the states of this process, see sd_notify(3). While a
// predecessor waits for this process, it is the main process of the service, and is told
// instead.
type serviceManager struct {
	log *slog.Logger

	mu          sync.Mutex
	predecessor *os.File // nil: none waits
	handedOver  bool     // to a successor
}

// notify sends a state.
func (m *serviceManager) notify(state string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	switch {
	case m.handedOver:
	case m.predecessor == nil:
		if state == sd.SdNotifyReloading {
			state += "\n" + sd.SdNotifyMonotonicUsec()
		}
		_, err = sd.SdNotify(false, state)
	case state == sd.SdNotifyReady:
		_, err = m.predecessor.WriteString(accepting)
		m.predecessor.Close()
		m.predecessor = nil
	}
	if err != nil {
		m.log.Warn("cannot notify the service manager", "state", state, "err", err)
	}
}

// handOver makes a successor the main process of the service.
func (m *serviceManager) handOver(pid int) {
	m.notify(fmt.Sprintf("MAINPID=%d", pid))
	m.mu.Lock()
	defer m.mu.Unlock()
	m.handedOver = true
}
