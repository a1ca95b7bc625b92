package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"
)

// opensshSFTP is Debian's sftp-server, which knows more extensions than ours.
const opensshSFTP = "/usr/lib/openssh/sftp-server"

// SFTPCommand returns the command line for [Server.SFTP]: OpenSSH's server if
// the machine has it, and otherwise fallback.
func SFTPCommand(fallback string) string {
	if _, err := os.Stat(opensshSFTP); err == nil {
		return opensshSFTP
	}
	return fallback
}

// An SFTP is the fallback for OpenSSH's sftp-server, with those of its options
// that make sense in a forced command: see sftp-server(8).
type SFTP struct {
	ReadOnly bool   `short:"R" help:"Refuse what would change anything."`
	Dir      string `short:"d" placeholder:"DIR" help:"Begin in this directory; %d is the home directory, %u the user name, %% a %."`
	Umask    string `short:"u" placeholder:"UMASK" help:"Umask, in octal."`
}

// Serve serves the sftp protocol, with the rights of this process and relative to
// its working directory, until the client is done. It is meant for a process of
// its own that has become the account already, and that nobody may look into
// from then on: a client could otherwise run what she likes by writing it to
// /proc/self/mem.
func (s SFTP) Serve(r io.Reader, w io.WriteCloser) error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	if s.Umask != "" {
		umask, err := strconv.ParseUint(s.Umask, 8, 12)
		if err != nil || umask > 0o777 {
			return fmt.Errorf("%q is no umask", s.Umask)
		}
		unix.Umask(int(umask))
	}
	if s.Dir != "" {
		dir := strings.NewReplacer("%%", "%", "%d", os.Getenv("HOME"), "%u", os.Getenv("USER")).Replace(s.Dir)
		if err := os.Chdir(dir); err != nil {
			return err
		}
	}
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	options := []sftp.ServerOption{sftp.WithServerWorkingDirectory(dir)}
	if s.ReadOnly {
		options = append(options, sftp.ReadOnly())
	}
	server, err := sftp.NewServer(struct {
		io.Reader
		io.WriteCloser
	}{r, w}, options...)
	if err != nil {
		return err
	}
	if err := server.Serve(); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
