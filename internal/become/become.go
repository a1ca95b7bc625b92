// Package become starts programs as other users.
//
// Between fork and exec a child of a Go program shares the memory of its parent,
// which waits for it, and one that has taken another user's id there may be stopped
// by that user: no goroutine and no clock of the parent would ever go on. So such a
// child is first the parent's own program once more, with memory of its own, and
// becomes the user there.
package become

import (
	"context"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"io"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A User is whom to become. Groups are the supplementary groups.
type User struct {
	UID, GID uint32
	Groups   []uint32
}

// A Program is what to run, as [syscall.Exec] takes it. Dir, if not empty, is the
// working directory, which the user must be able to enter.
type Program struct {
	User User
	Dir  string
	Path string
	Argv []string
	Env  []string
}

const (
	// argument is the only one of a program that is to become a user.
	argument = "become-user"
	// programFD is a file with the Program. Arguments can be seen by everybody,
	// and the environment, which is the user's, may not be that of a program
	// that runs as root.
	programFD = 3
	// failFD is where to say, with an error number, what went wrong.
	failFD = 4
)

// Main must be called first of all by the main function of every program that
// calls [Program.Start]. It returns at once, unless it is to become a user.
func Main() {
	if len(os.Args) != 2 || os.Args[1] != argument {
		return
	}
	unix.CloseOnExec(programFD)
	unix.CloseOnExec(failFD)
	err := run(os.NewFile(programFD, "program"))
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		errno = syscall.EINVAL
	}
	unix.Write(failFD, binary.NativeEndian.AppendUint32(nil, uint32(errno)))
	os.Exit(127)
}

// run returns only if it cannot.
func run(file io.Reader) error {
	var p Program
	if err := gob.NewDecoder(file).Decode(&p); err != nil {
		return err
	}
	groups := make([]int, len(p.User.Groups))
	for i, g := range p.User.Groups {
		groups[i] = int(g)
	}
	uid, gid := int(p.User.UID), int(p.User.GID)
	if err := syscall.Setgroups(groups); err != nil {
		return err
	}
	if err := syscall.Setresgid(gid, gid, gid); err != nil {
		return err
	}
	if err := syscall.Setresuid(uid, uid, uid); err != nil {
		return err
	}
	if p.Dir != "" {
		if err := syscall.Chdir(p.Dir); err != nil {
			return err
		}
	}
	return syscall.Exec(p.Path, p.Argv, p.Env)
}

// Start has fork start a child, with the program and the arguments that it is
// given, no environment, and the two files as its descriptors 3 and 4, and returns
// when p runs in it. An error is that of fork, or a [syscall.Errno] that says why p
// could not be run, in which case the child ends, or the cause of ctx's end.
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
	// The user can keep her own process from coming to the end of this.
	defer context.AfterFunc(ctx, func() { failed.SetReadDeadline(time.Unix(1, 0)) })()
	var number [4]byte
	_, err = io.ReadFull(failed, number[:])
	switch {
	case err == nil:
		return syscall.Errno(binary.NativeEndian.Uint32(number[:]))
	case errors.Is(err, os.ErrDeadlineExceeded):
		return context.Cause(ctx)
	}
	return nil // closed by exec, or the child has been killed: its end will tell
}
