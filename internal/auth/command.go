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
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/become"
)

// This file runs AuthorizedKeysCommand of sshd_config(5). In its arguments stand
//
//	%u  the user's name
//	%t  the type of the key that is offered, %k the key in base64, and %f its fingerprint
//	%%  a percent sign
//
// and without arguments it gets the user's name as its only one. sshd has more
// tokens, %h, %U, %D and %C, that say something about the user's account on its
// machine or about the connection; there is no such account here.
//
// It runs without a shell, with an environment of its own, in / and in a process
// group that is killed when it has ended or takes too long. What it prints
// counts only if it exits with status 0. Its standard error goes nowhere, as
// with sshd.

// needsKey says whether what the command prints may depend on the key.
func needsKey(args []string) bool {
	return slices.ContainsFunc(args, func(arg string) bool {
		without := strings.ReplaceAll(arg, "%%", "")
		return strings.Contains(without, "%t") || strings.Contains(without, "%k") || strings.Contains(without, "%f")
	})
}

// expandArgs puts values in the place of tokens. args[0] is the program.
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
				b.WriteString(fingerprint(key))
			default:
				return nil, fmt.Errorf("the token %%%c is not known here; there are %%u, %%t, %%k, %%f and %%%%", arg[i])
			}
		}
		out = append(out, b.String())
	}
	if len(args) == 1 {
		out = append(out, name)
	}
	return out, nil
}

// fingerprint is that of the key, without a certificate around it.
func fingerprint(key ssh.PublicKey) string {
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	return ssh.FingerprintSHA256(key)
}

// runCommand is how a lookup asks Command.
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

// command prepares Command, but for its arguments, and checks what can be
// checked: whoever can change the program decides who gets in.
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
	account, err := user.Lookup(k.CommandUser)
	if err != nil {
		return nil, fmt.Errorf("authorized_keys_command_user: %w", err)
	}
	cred, err := credential(account)
	if err != nil {
		return nil, err
	}
	return &exec.Cmd{
		Path: real,
		Dir:  "/",
		Env: []string{
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"USER=" + account.Username, "LOGNAME=" + account.Username, "HOME=" + account.HomeDir, "LANG=C.UTF-8",
		},
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true, Credential: cred},
	}, nil
}

// noKey stands for a key where only the tokens are checked.
type noKey struct{}

func (noKey) Type() string                        { return "" }
func (noKey) Marshal() []byte                     { return nil }
func (noKey) Verify([]byte, *ssh.Signature) error { return errors.New("no key") }

// credential returns what makes a process the account's; nil if this one is.
func credential(account *user.User) (*syscall.Credential, error) {
	uid, err := strconv.ParseUint(account.Uid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("the account %s has the uid %q", account.Username, account.Uid)
	}
	gid, err := strconv.ParseUint(account.Gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("the account %s has the gid %q", account.Username, account.Gid)
	}
	if os.Geteuid() != 0 {
		if uint64(os.Geteuid()) != uid {
			return nil, fmt.Errorf("the gateway does not run as root, so it can run programs only as uid %d, and not as %s", os.Geteuid(), account.Username)
		}
		return nil, nil
	}
	c := &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	groups, err := account.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("the groups of the account %s: %w", account.Username, err)
	}
	for _, g := range groups {
		if id, err := strconv.ParseUint(g, 10, 32); err == nil {
			c.Groups = append(c.Groups, uint32(id))
		}
	}
	return c, nil
}

// checkPath is what sshd asks of a program it runs: neither it nor a folder on
// the way there may be changed by anybody but root and the gateway's own user. A
// folder with the sticky bit, such as /tmp, is fine here, since others cannot
// change what they do not own in it. path has no symbolic links.
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
			return fmt.Errorf("%s: its owner is not known", path)
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

// output runs cmd, which must be in a process group of its own, until it ends
// or ctx does, and returns what it printed: at most that many bytes. Then it
// kills what is left of the group.
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
		// Not collected yet: until then nobody else gets its number, so the
		// group may be killed by it.
		for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
	}()
	// A process that has left the group may hold the pipe open for as long as
	// it likes.
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
		return nil, fmt.Errorf("%s takes too long, and was killed", program)
	case readErr != nil:
		return nil, fmt.Errorf("reading from %s: %w", program, readErr)
	case int64(len(out)) > most:
		return nil, fmt.Errorf("%s prints more than %d bytes", program, most)
	case waitErr != nil:
		return nil, fmt.Errorf("%s: %w", program, waitErr)
	}
	return out, nil
}

// start is cmd.Start, also for another user than this process's. With the cause of
// ctx's end as the error, the child has been started, and has to be killed.
func start(ctx context.Context, cmd *exec.Cmd) error {
	cred := cmd.SysProcAttr.Credential
	if cred == nil || cred.Uid == 0 {
		return cmd.Start()
	}
	program := become.Program{
		User: become.User{UID: cred.Uid, GID: cred.Gid, Groups: cred.Groups},
		Dir:  cmd.Dir, Path: cmd.Path, Argv: cmd.Args, Env: cmd.Env,
	}
	cmd.SysProcAttr.Credential = nil
	err := program.Start(ctx, func(path string, argv []string, files [2]*os.File) error {
		cmd.Path, cmd.Args, cmd.Env, cmd.ExtraFiles = path, argv, []string{}, files[:]
		return cmd.Start()
	})
	if _, cannot := err.(syscall.Errno); cannot {
		cmd.Wait()
	}
	return err
}
