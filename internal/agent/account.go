package agent

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An Account is the local user that sessions run as.
type Account struct {
	Name     string
	UID, GID uint32
	// Groups are the supplementary groups.
	Groups []uint32
	Home   string
	// Shell is the login shell; empty means /bin/sh.
	Shell string
}

// LookupAccount finds a local account by name: in /etc/passwd, or else by
// asking getent, which knows of directories too.
func LookupAccount(name string) (Account, error) {
	if name == "" || strings.ContainsAny(name, ":\n\x00") || name[0] == '-' {
		return Account{}, fmt.Errorf("%q cannot be the name of an account", name)
	}
	passwd, err := os.ReadFile("/etc/passwd")
	if err != nil && !os.IsNotExist(err) {
		return Account{}, err
	}
	a, ok := findAccount(passwd, name)
	if !ok {
		out, _ := exec.Command("getent", "passwd", name).Output()
		if a, ok = findAccount(out, name); !ok {
			return Account{}, fmt.Errorf("there is no account %q on this machine", name)
		}
	}
	u := user.User{Username: a.Name, Uid: strconv.Itoa(int(a.UID)), Gid: strconv.Itoa(int(a.GID))}
	gids, err := u.GroupIds()
	if err != nil {
		return Account{}, fmt.Errorf("looking up the groups of account %s: %w", name, err)
	}
	for _, s := range gids {
		gid, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return Account{}, fmt.Errorf("looking up the groups of account %s: %w", name, err)
		}
		a.Groups = append(a.Groups, uint32(gid))
	}
	return a, nil
}

// findAccount finds name in the lines of a passwd(5) file.
func findAccount(passwd []byte, name string) (Account, bool) {
	for lines := bufio.NewScanner(bytes.NewReader(passwd)); lines.Scan(); {
		f := strings.Split(lines.Text(), ":")
		if len(f) != 7 || f[0] != name {
			continue
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			continue
		}
		return Account{Name: name, UID: uint32(uid), GID: uint32(gid), Home: f[5], Shell: f[6]}, true
	}
	return Account{}, false
}

func (a Account) shell() string {
	if a.Shell == "" {
		return "/bin/sh"
	}
	return a.Shell
}

// check says whether this process can run things as the account.
func (a Account) check() error {
	if euid := os.Geteuid(); euid != 0 && uint32(euid) != a.UID {
		return fmt.Errorf("only root can run sessions as another account: this is uid %d, %s is %d", euid, a.Name, a.UID)
	}
	if a.Home == "" || !strings.HasPrefix(a.Home, "/") {
		return fmt.Errorf("account %s has no absolute home directory", a.Name)
	}
	return nil
}

// credential is what a child process needs to become the account; nil if this
// process is it already, and could not set it.
func (a Account) credential() *syscall.Credential {
	if os.Geteuid() != 0 {
		return nil
	}
	return &syscall.Credential{Uid: a.UID, Gid: a.GID, Groups: a.Groups}
}

// do runs f with the rights of the account: files it makes belong to the
// account, files the account may not touch cannot be touched, and sockets it
// connects carry the account's credentials (SO_PEERCRED). f must not hand work
// to other goroutines.
//
// Linux keeps credentials by thread, and package syscall's Setuid deliberately
// changes them all; so this makes the system calls itself, on a thread that ends
// with the goroutine. The real and saved user id stay root's, or the user could
// signal the thread, and with it this process. The umask stays the process's:
// one of the thread's own would need unshare(2), which many containers forbid.
func (a Account) do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread is of no more use
		if unix.Gettid() == unix.Getpid() {
			// But this one cannot end, and by it the process is told whose
			// it is, in /proc and by ps(1). While it waits, it is not taken again.
			defer runtime.UnlockOSThread()
			done <- a.do(f)
			return
		}
		var err error
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("panic: %v", r)
			}
			done <- err
		}()
		if err = a.assume(); err == nil {
			err = f()
		}
	}()
	return <-done
}

// makeSocket puts in the place of a socket that is neither bound nor connected
// yet one that the account has made. Firewall rules by user (iptables' owner,
// nftables' skuid) go by who made a socket, which in package net may be any
// goroutine. Options set before are lost; it is for the Control of a net.Dialer,
// which by then has set none that matters to TCP.
func (a Account) makeSocket(raw syscall.RawConn) error {
	if os.Geteuid() != 0 {
		return nil
	}
	return a.do(func() error {
		var err error
		if ctlErr := raw.Control(func(fd uintptr) { err = remakeSocket(int(fd)) }); ctlErr != nil {
			return ctlErr
		}
		return err
	})
}

func remakeSocket(fd int) error {
	var is [3]int
	for i, option := range []int{unix.SO_DOMAIN, unix.SO_TYPE, unix.SO_PROTOCOL} {
		var err error
		if is[i], err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, option); err != nil {
			return os.NewSyscallError("getsockopt", err)
		}
	}
	sock, err := unix.Socket(is[0], is[1]|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, is[2])
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(sock)
	return os.NewSyscallError("dup3", unix.Dup3(sock, fd, unix.O_CLOEXEC))
}

// assume gives the calling thread the rights of the account.
func (a Account) assume() error {
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
