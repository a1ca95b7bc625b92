package auth

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/account"
	"github.com/sallyport-ssh/sallyport/internal/runas"
)

// This file runs AuthorizedKeysCommand of sshd_config(5). Its arguments may contain
// these tokens:
//
//	%u  the user's name
//	%t  the type of the offered key, %k the key in base64, %f its fingerprint
//	%%  a percent sign
//
// A command without arguments gets the user's name as the only one. The tokens %h,
// %U, %D and %C of sshd are not supported: they describe the user's account on the
// machine, which does not exist here, and the connection.
//
// The command runs without a shell, with a fixed environment, in /, and in a process
// group of its own. The group is killed when the command has exited, or when it
// exceeds the timeout. Its output is used only if it exits with status 0. As with
// sshd, its standard error is discarded.

// needsKey reports whether the output of the command may depend on the key.
func needsKey(args []string) bool {
	return slices.ContainsFunc(args, func(arg string) bool {
		without := strings.ReplaceAll(arg, "%%", "")
		return strings.Contains(without, "%t") || strings.Contains(without, "%k") || strings.Contains(without, "%f")
	})
}

// expandArgs replaces the tokens. args[0] is the program.
func expandArgs(args []string, name string, key ssh.PublicKey) ([]string, error) {
	out := []string{args[0]}
	for _, arg := range args[1:] {
		var b strings.Builder
		for i := 0; i < len(arg); i++ {
			if arg[i] != '%' {
				b.WriteByte(arg[i])
				continue
			}
			i++
			if i == len(arg) {
				return nil, errors.New("an argument ends in %; write %% for a percent sign")
			}
			switch arg[i] {
			case '%':
				b.WriteByte('%')
			case 'u':
				b.WriteString(name)
			case 't':
				b.WriteString(key.Type())
			case 'k':
				b.WriteString(base64.StdEncoding.EncodeToString(key.Marshal()))
			case 'f':
				b.WriteString(Fingerprint(key))
			default:
				return nil, fmt.Errorf("unknown token %%%c; the tokens are %%u, %%t, %%k, %%f and %%%%", arg[i])
			}
		}
		out = append(out, b.String())
	}
	if len(args) == 1 {
		out = append(out, name)
	}
	return out, nil
}

// runCommand is lookup.fetch for Command.
func (k *Keys) runCommand(ctx context.Context, name string, key ssh.PublicKey, _ answer) (answer, error) {
	cmd, err := k.command()
	if err != nil {
		return answer{}, err
	}
	args, err := expandArgs(k.Command, name, key)
	if err != nil {
		return answer{}, err
	}
	cmd.Args = args
	out, err := output(ctx, cmd, maxAnswer)
	if err != nil {
		return answer{}, err
	}
	return newAnswer(name, out, nil), nil
}

// command prepares Command, without its arguments. It checks the owner and mode of
// the program, because an account that can change it could grant logins.
func (k *Keys) command() (*exec.Cmd, error) {
	if _, err := expandArgs(k.Command, "", noKey{}); err != nil {
		return nil, err
	}
	program := k.Command[0]
	if !filepath.IsAbs(program) {
		return nil, fmt.Errorf("%s: not an absolute path", program)
	}
	real, err := filepath.EvalSymlinks(program)
	if err != nil {
		return nil, err
	}
	if err := checkPath(real); err != nil {
		return nil, err
	}
	if k.CommandUser == "" {
		return nil, errors.New("no authorized_keys_command_user to run it as")
	}
	user, err := account.Lookup(k.CommandUser)
	if err != nil {
		return nil, fmt.Errorf("authorized_keys_command_user: %w", err)
	}
	cred, err := credential(user)
	if err != nil {
		return nil, err
	}
	return &exec.Cmd{
		Path: real,
		Dir:  "/",
		Env: []string{
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"USER=" + user.Name, "LOGNAME=" + user.Name, "HOME=" + user.Home, "LANG=C.UTF-8",
		},
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true, Credential: cred},
	}, nil
}

// noKey is the key for a check of the tokens.
type noKey struct{}

func (noKey) Type() string                        { return "" }
func (noKey) Marshal() []byte                     { return nil }
func (noKey) Verify([]byte, *ssh.Signature) error { return errors.New("no key") }

// credential returns the credential of a process of user; nil if it is that of this
// process.
func credential(user account.Account) (*syscall.Credential, error) {
	if os.Geteuid() == 0 {
		return &syscall.Credential{Uid: user.UID, Gid: user.GID, Groups: user.Groups}, nil
	}
	if uint32(os.Geteuid()) != user.UID {
		return nil, fmt.Errorf("the gateway does not run as root, so it can run programs only as uid %d, and not as %s", os.Geteuid(), user.Name)
	}
	return nil, nil
}

// checkPath is sshd's check of a program that it runs: only root and the user of this
// process may be able to change the program or a folder on its path. A folder with
// the sticky bit, such as /tmp, is accepted, because other users cannot replace files
// in it that they do not own. path has no symbolic links.
func checkPath(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return fmt.Errorf("%s: not a program", path)
	}
	for {
		s, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("%s: unknown owner", path)
		}
		if s.Uid != 0 && s.Uid != uint32(os.Geteuid()) {
			return fmt.Errorf("%s: belongs to uid %d, and must belong to root or to uid %d", path, s.Uid, os.Geteuid())
		}
		sticky := info.IsDir() && info.Mode()&fs.ModeSticky != 0
		if info.Mode()&0o022 != 0 && !sticky {
			return fmt.Errorf("%s: mode %04o lets others write to it; chmod go-w it", path, s.Mode&0o7777)
		}
		parent := filepath.Dir(path)
		if parent == path {
			return nil
		}
		path = parent
		if info, err = os.Lstat(path); err != nil {
			return err
		}
	}
}

// output runs cmd, which must be in a process group of its own, until it exits or ctx
// ends, and kills the rest of the group. It returns the standard output; more than
// most bytes of it are an error.
func output(ctx context.Context, cmd *exec.Cmd, most int64) ([]byte, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd.Stdout = w
	program := cmd.Path
	err = start(ctx, cmd)
	w.Close()
	if err != nil && (ctx.Err() == nil || err != context.Cause(ctx)) {
		return nil, fmt.Errorf("running %s: %w", program, err)
	}
	pid := cmd.Process.Pid
	exited := make(chan struct{})
	go func() { // ends with the process
		defer close(exited)
		// WNOWAIT leaves the process a zombie, so its number cannot be reused
		// before the group is killed.
		for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
	}()
	// A process that has left the group is not killed, and may hold the pipe open.
	stop := context.AfterFunc(ctx, func() { r.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	out, readErr := io.ReadAll(io.LimitReader(r, most+1))
	if int64(len(out)) <= most && readErr == nil {
		select {
		case <-exited:
		case <-ctx.Done():
		}
	}
	unix.Kill(-pid, unix.SIGKILL)
	<-exited
	waitErr := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%s exceeded the timeout and was killed", program)
	case readErr != nil:
		return nil, fmt.Errorf("reading from %s: %w", program, readErr)
	case int64(len(out)) > most:
		return nil, fmt.Errorf("%s prints more than %d bytes", program, most)
	case waitErr != nil:
		return nil, fmt.Errorf("%s: %w", program, waitErr)
	}
	return out, nil
}

// start is cmd.Start, also for another user than that of this process. If the error
// is the cause of ctx, the child has been started, and the caller must kill it.
func start(ctx context.Context, cmd *exec.Cmd) error {
	cred := cmd.SysProcAttr.Credential
	if cred == nil || cred.Uid == 0 {
		return cmd.Start()
	}
	program := runas.Program{
		User: runas.User{UID: cred.Uid, GID: cred.Gid, Groups: cred.Groups},
		Dir:  cmd.Dir, Path: cmd.Path, Argv: cmd.Args, Env: cmd.Env,
	}
	cmd.SysProcAttr.Credential = nil
	err := program.Start(ctx, func(path string, argv []string, files [2]*os.File) error {
		cmd.Path, cmd.Args, cmd.Env, cmd.ExtraFiles = path, argv, []string{}, files[:]
		return cmd.Start()
	})
	if _, failed := err.(syscall.Errno); failed {
		cmd.Wait()
	}
	return err
}
