package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/account"
)

// An Account is the local account that sessions run as.
type Account account.Account

// LookupAccount finds an account of this machine by name.
func LookupAccount(name string) (Account, error) {
	a, err := account.Lookup(name)
	return Account(a), err
}

// LookupGroups returns the ids of groups of this machine.
func LookupGroups(names []string) ([]uint32, error) {
	var ids []uint32
	for _, name := range names {
		gid, err := account.LookupGroup(name)
		if err != nil {
			return nil, err
		}
		ids = append(ids, gid)
	}
	return ids, nil
}

// A Login is the state of an account at a login.
type Login struct {
	Account Account
	Limits  account.Limits // of each process
}

// LookupLogin returns the current groups, shell and limits of an account. The error is an
// [*account.DeniedError] if the account may not log in, does not exist any more, or has
// another user id. problems are the lines of limits.conf(5) that were ignored.
func LookupLogin(a Account, now time.Time) (l Login, problems []string, err error) {
	current, err := account.Lookup(a.Name)
	if errors.Is(err, account.ErrUnknown) || err == nil && current.UID != a.UID {
		// The files and processes of the bastion belong to a.UID.
		return Login{}, nil, &account.DeniedError{Text: "Your account does not exist any more. Please contact your system administrator.\n",
			Err: fmt.Errorf("account %s with uid %d does not exist any more", a.Name, a.UID)}
	}
	if err == nil {
		err = current.MayLogin(now)
	}
	if err == nil {
		l.Limits, problems, err = current.Limits()
	}
	l.Account = Account(current)
	return l, problems, err
}

// shell returns the path of the login shell.
func (a Account) shell() string {
	if a.Shell == "" {
		return "/bin/sh"
	}
	return a.Shell
}

// hasNoShell reports whether the login shell is nologin, and there is no such program. A
// nologin that exists prints a message of its own.
func (a Account) hasNoShell() bool {
	_, err := os.Stat(a.shell())
	return filepath.Base(a.shell()) == "nologin" && errors.Is(err, fs.ErrNotExist)
}

// check returns an error if this process cannot run programs as the account.
func (a Account) check() error {
	if euid := os.Geteuid(); euid != 0 && uint32(euid) != a.UID {
		return fmt.Errorf("only root can run sessions as another account: this process has uid %d, and %s has %d", euid, a.Name, a.UID)
	}
	if a.Home == "" || !strings.HasPrefix(a.Home, "/") {
		return fmt.Errorf("account %s has no absolute home directory", a.Name)
	}
	return nil
}

// impersonate runs f with the rights of the account: files that f creates belong to the
// account, access is checked against it, and sockets that f connects have its credentials
// (SO_PEERCRED). f must not start goroutines that need the rights.
//
// Credentials belong to a thread in Linux. syscall.Setuid changes those of all threads, so
// impersonate makes the system calls itself, on a thread that ends with its goroutine. The
// real and saved user ids stay root's, because otherwise the user could send signals to
// the thread, and so to this process. The umask is that of the process: a thread can have
// its own only after unshare(2), which many containers forbid.
func (a Account) impersonate(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // without unlock: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end, and /proc and ps(1) show its user as that
			// of the process. Use another thread: this one is busy until it is done.
			defer runtime.UnlockOSThread()
			done <- a.impersonate(f)
			return
		}
		var err error
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("panic: %v", r)
			}
			done <- err
		}()
		if err = a.assumeInThread(); err == nil {
			err = f()
		}
	}()
	return <-done
}

// pipe creates a pipe for a process of the account; its ends block. The account owns the
// pipe, so that the process can open /dev/stdin, /dev/stdout and /dev/stderr.
func (a Account) pipe() (fds [2]int, err error) {
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return fds, os.NewSyscallError("pipe2", err)
	}
	if os.Geteuid() == 0 {
		if err := unix.Fchown(fds[0], int(a.UID), int(a.GID)); err != nil { // both ends
			unix.Close(fds[0])
			unix.Close(fds[1])
			return fds, os.NewSyscallError("fchown", err)
		}
	}
	return fds, nil
}

// replaceSocket replaces a new socket with one that the account has created. Firewall rules
// by user (iptables' owner, nftables' skuid) match the creator of a socket, and package net
// creates sockets on any thread. It is for the Control function of a net.Dialer. Options of
// the old socket are lost; at that point the dialer has set none that matters to TCP.
func (a Account) replaceSocket(raw syscall.RawConn) error {
	if os.Geteuid() != 0 {
		return nil
	}
	return a.impersonate(func() error {
		var err error
		if ctlErr := raw.Control(func(fd uintptr) { err = newSocketAt(int(fd)) }); ctlErr != nil {
			return ctlErr
		}
		return err
	})
}

// newSocketAt replaces the socket with descriptor fd with a new one of the same type.
func newSocketAt(fd int) error {
	var props [3]int
	for i, option := range []int{unix.SO_DOMAIN, unix.SO_TYPE, unix.SO_PROTOCOL} {
		var err error
		if props[i], err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, option); err != nil {
			return os.NewSyscallError("getsockopt", err)
		}
	}
	sock, err := unix.Socket(props[0], props[1]|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, props[2])
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(sock)
	return os.NewSyscallError("dup3", unix.Dup3(sock, fd, unix.O_CLOEXEC))
}

// assumeInThread gives the calling thread the rights of the account.
func (a Account) assumeInThread() error {
	if os.Geteuid() != 0 {
		return nil
	}
	gids := a.Groups
	if len(gids) == 0 {
		gids = []uint32{a.GID}
	}
	_, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(gids)), uintptr(unsafe.Pointer(&gids[0])), 0)
	if errno != 0 {
		return os.NewSyscallError("setgroups", errno)
	}
	const keep = ^uintptr(0)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, keep, uintptr(a.GID), keep); errno != 0 {
		return os.NewSyscallError("setresgid", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(a.UID), keep); errno != 0 {
		return os.NewSyscallError("setresuid", errno)
	}
	return nil
}
