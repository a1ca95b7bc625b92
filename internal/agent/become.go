package agent

import (
	"encoding/binary"
	"encoding/gob"
	"errors"
	"io"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Between fork and exec a child shares the memory of this process, which waits for
// it, and one that has taken the user's id there may be stopped by the user: no
// goroutine and no clock of the agent would ever go on. So a child of another user
// is first this very program once more, as root, with memory of its own, and
// becomes the account there.

// becoming is the only argument of such a child.
const becoming = "become-account"

// A become is what the child is told, by a file: arguments can be seen by everybody,
// and the environment, which is the user's, may not be that of a program that
// runs as root.
type become struct {
	UID, GID uint32
	Groups   []uint32
	Dir      string
	Path     string
	Argv     []string
	Env      []string
}

const (
	becomeFD = 3 // the file
	failFD   = 4 // where the child says, with an error number, that it could not
)

// Become must be called first of all by every program that runs a [Server] as
// root. It returns at once, unless the program was started by the Server to become
// the account.
func Become() {
	if len(os.Args) != 2 || os.Args[1] != becoming {
		return
	}
	unix.CloseOnExec(becomeFD)
	unix.CloseOnExec(failFD)
	err := becomeAccount(os.NewFile(becomeFD, "become"))
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		errno = syscall.EINVAL
	}
	unix.Write(failFD, binary.NativeEndian.AppendUint32(nil, uint32(errno)))
	os.Exit(127)
}

// becomeAccount returns only if it cannot.
func becomeAccount(file io.Reader) error {
	var b become
	if err := gob.NewDecoder(file).Decode(&b); err != nil {
		return err
	}
	groups := make([]int, len(b.Groups))
	for i, g := range b.Groups {
		groups[i] = int(g)
	}
	if err := syscall.Setgroups(groups); err != nil {
		return err
	}
	if err := syscall.Setresgid(int(b.GID), int(b.GID), int(b.GID)); err != nil {
		return err
	}
	if err := syscall.Setresuid(int(b.UID), int(b.UID), int(b.UID)); err != nil {
		return err
	}
	if b.Dir != "" {
		if err := syscall.Chdir(b.Dir); err != nil {
			return err
		}
	}
	return syscall.Exec(b.Path, b.Argv, b.Env)
}

// fork starts a command as the account, which is another user's than this
// process's, and returns when it runs. attr is for [syscall.ForkExec], without
// credentials. The child is among the children.
func (a Account) fork(cmd command, attr syscall.ProcAttr) (pid int, err error) {
	fd, err := unix.MemfdCreate("become", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, os.NewSyscallError("memfd_create", err)
	}
	file := os.NewFile(uintptr(fd), "become")
	defer file.Close()
	err = gob.NewEncoder(file).Encode(become{UID: a.UID, GID: a.GID, Groups: a.Groups, Dir: cmd.dir, Path: cmd.path, Argv: cmd.argv, Env: cmd.env})
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		return 0, err
	}
	failed, fail, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer failed.Close()

	attr.Dir, attr.Env = "/", []string{}
	attr.Files = append(attr.Files, file.Fd(), fail.Fd())
	pid, err = forkExec("/proc/self/exe", []string{"bastion-agent", becoming}, &attr)
	runtime.KeepAlive(file)
	fail.Close()
	if err != nil {
		return 0, err
	}
	// The user may keep her own process from coming to the end of this, and
	// nothing else.
	var number [4]byte
	if _, err := io.ReadFull(failed, number[:]); err != nil {
		return pid, nil // closed by exec, or the child has been killed: its end will tell
	}
	unix.Wait4(pid, nil, 0, nil)
	children.pids.Delete(pid)
	return 0, syscall.Errno(binary.NativeEndian.Uint32(number[:]))
}

// forkExec is [syscall.ForkExec], after which the child is among the children.
func forkExec(path string, argv []string, attr *syscall.ProcAttr) (pid int, err error) {
	children.RLock()
	defer children.RUnlock()
	pid, err = syscall.ForkExec(path, argv, attr)
	if err == nil {
		children.pids.Store(pid, struct{}{})
	}
	return pid, err
}
