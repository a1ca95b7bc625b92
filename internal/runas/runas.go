// Package runas starts programs as other users.
//
// [syscall.SysProcAttr.Credential] is not safe for this. Between fork and exec a child
// of a Go program shares the memory of its parent, and the parent is suspended. If the
// child takes another user's id there, that user can stop it with SIGSTOP, and with it
// every goroutine and timer of the parent.
//
// So [Program.Start] executes the parent's own program again, with memory of its own.
// [Init], at the top of main, recognises that case: it changes the user id and executes
// the real program.
package runas

import (
	"context"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/account"
)

// A User is the ids of a process. Groups are the supplementary groups.
type User struct {
	UID, GID uint32
	Groups   []uint32
}

// A Program is a program to start, with the arguments of [syscall.Exec].
//
// The program gets a new session keyring with the user's keyring linked into it, as
// pam_keyinit(8) does.
type Program struct {
	// User is the user that the program runs as. It must be this process's own unless
	// that is root.
	User User
	// Dir is the working directory, which the user must be able to enter; empty means
	// this process's own.
	Dir  string
	Path string
	Argv []string
	Env  []string

	// Limits are the resource limits. If this process may not raise a hard limit, the
	// limit stays as it is.
	Limits account.Limits
	// Login sets the login user id, with which the kernel's audit marks every action
	// of the program and its children, as pam_loginuid(8) does.
	Login bool
}

const (
	// argument is the only argument of this program when Start executes it.
	argument = "runas"
	// programFD is a file that holds the Program. It is not passed as arguments, which
	// every user can read, nor as the environment: user-controlled variables must not
	// reach a program that runs as root.
	programFD = 3
	// failFD is a pipe that takes the error number if the program cannot be executed.
	failFD = 4
)

// Init must be the first call in the main function of every program that calls
// [Program.Start]. If Start has executed this program, Init executes the [Program] in
// its place and does not return; otherwise it returns at once.
func Init() {
	if len(os.Args) != 2 || os.Args[1] != argument {
		return
	}
	// Credentials and the session keyring belong to the thread.
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	unix.CloseOnExec(programFD)
	unix.CloseOnExec(failFD)
	err := execute(os.NewFile(programFD, "program"))
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		errno = syscall.EINVAL
	}
	unix.Write(failFD, binary.NativeEndian.AppendUint32(nil, uint32(errno)))
	os.Exit(127)
}

// execute replaces this process with the Program in file. It returns only on failure.
func execute(file io.Reader) error {
	var p Program
	if err := gob.NewDecoder(file).Decode(&p); err != nil {
		return err
	}
	if p.Login {
		// Best effort: a container, or a login uid that is already set, may forbid it.
		os.WriteFile("/proc/self/loginuid", strconv.AppendUint(nil, uint64(p.User.UID), 10), 0)
	}
	if err := setLimits(p.Limits); err != nil { // while root: only root may raise hard limits
		return err
	}
	if err := p.User.assume(); err != nil {
		return err
	}
	joinKeyring()
	if p.Limits.NoNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return err
		}
	}
	if p.Dir != "" {
		if err := syscall.Chdir(p.Dir); err != nil {
			return err
		}
	}
	return syscall.Exec(p.Path, p.Argv, p.Env)
}

// assume changes the credentials of this process to the user's.
func (u User) assume() error {
	uid, gid := int(u.UID), int(u.GID)
	if euid := os.Geteuid(); euid != 0 {
		if euid != uid {
			return syscall.EPERM
		}
		return nil
	}
	groups := make([]int, len(u.Groups))
	for i, g := range u.Groups {
		groups[i] = int(g)
	}
	if err := syscall.Setgroups(groups); err != nil {
		return err
	}
	if err := syscall.Setresgid(gid, gid, gid); err != nil {
		return err
	}
	return syscall.Setresuid(uid, uid, uid)
}

// setLimits sets resource limits and the priority.
func setLimits(l account.Limits) error {
	if l.SetPriority {
		err := syscall.Setpriority(syscall.PRIO_PROCESS, 0, l.Priority)
		if err != nil && err != syscall.EACCES && err != syscall.EPERM {
			return err
		}
	}
	for _, set := range l.Resources {
		var is syscall.Rlimit
		if err := syscall.Getrlimit(set.Resource, &is); err != nil {
			return err
		}
		to := is
		if set.SetSoft {
			to.Cur = set.Soft
		}
		if set.SetHard {
			to.Max = set.Hard
		}
		to.Cur = min(to.Cur, to.Max)
		// Not unix.Setrlimit: only this one keeps syscall.Exec from restoring the
		// original limit of open files.
		err := syscall.Setrlimit(set.Resource, &to)
		if err == syscall.EPERM && to.Max > is.Max {
			to.Cur, to.Max = min(to.Cur, is.Max), is.Max
			err = syscall.Setrlimit(set.Resource, &to)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// joinKeyring replaces the session keyring. If that fails, because a container has no
// keyrings or the user has too many keys, the process keeps the keyring of its parent.
func joinKeyring() {
	if newKeyring() == nil {
		unix.KeyctlInt(unix.KEYCTL_LINK, unix.KEY_SPEC_USER_KEYRING, unix.KEY_SPEC_SESSION_KEYRING, 0, 0)
	}
}

// newKeyring gives the calling thread a new, anonymous session keyring.
// [unix.KeyctlJoinSessionKeyring] cannot: it passes an empty name, and processes that
// join a keyring by name share it.
func newKeyring() error {
	_, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0)
	return err
}

// LeaveKeyring gives this process a session keyring of its own without any permissions.
// Children that cannot have a keyring of their own inherit this one instead of the
// keyring that this process has inherited. [Init] must have been called.
//
// A keyring belongs to a thread, so LeaveKeyring executes the program again, with the
// same arguments. It returns nil in the new execution, or if there are no keyrings.
func LeaveKeyring() error {
	const done = "SALLYPORT_KEYRING_LEFT"
	if os.Getenv(done) != "" {
		return os.Unsetenv(done)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if newKeyring() != nil {
		return nil // many containers have no keyrings, so there is none to inherit
	}
	if err := unix.KeyctlSetperm(unix.KEY_SPEC_SESSION_KEYRING, 0); err != nil {
		return os.NewSyscallError("keyctl", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return os.NewSyscallError("execve", syscall.Exec(self, os.Args, append(os.Environ(), done+"=1")))
}

// Start calls fork, which must start a child with the given program and arguments, an
// empty environment, and the two files as descriptors 3 and 4. Start returns nil once
// the child has executed p.
//
// The error is that of fork; or a [syscall.Errno] if p could not be executed, and the
// child then exits with status 127; or the cause of ctx's end. The caller must wait for the
// child if fork has started one.
func (p Program) Start(ctx context.Context, fork func(path string, argv []string, files [2]*os.File) error) error {
	fd, err := unix.MemfdCreate("program", unix.MFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	file := os.NewFile(uintptr(fd), "program")
	defer file.Close()
	if err := gob.NewEncoder(file).Encode(p); err != nil {
		return err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	failed, fail, err := os.Pipe()
	if err != nil {
		return err
	}
	defer failed.Close()
	err = fork("/proc/self/exe", []string{os.Args[0], argument}, [2]*os.File{file, fail})
	fail.Close()
	if err != nil {
		return err
	}
	// The user can stop the child once it runs as the user, so this read may block.
	defer context.AfterFunc(ctx, func() { failed.SetReadDeadline(time.Unix(1, 0)) })()
	var number [4]byte
	_, err = io.ReadFull(failed, number[:])
	switch {
	case err == nil:
		return syscall.Errno(binary.NativeEndian.Uint32(number[:]))
	case errors.Is(err, os.ErrDeadlineExceeded):
		return context.Cause(ctx)
	}
	return nil // exec has closed the pipe; or the child was killed, as wait(2) reports
}
