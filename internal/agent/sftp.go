package agent

import (
	"errors"
	"io"
	"os"

	"github.com/pkg/sftp"
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

// ServeSFTP serves the sftp protocol on rw, with the rights of this process
// and relative to its working directory, until the client is done. It is meant
// for a process of its own that has become the account already.
func ServeSFTP(r io.Reader, w io.WriteCloser) error {
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	server, err := sftp.NewServer(struct {
		io.Reader
		io.WriteCloser
	}{r, w}, sftp.WithServerWorkingDirectory(dir))
	if err != nil {
		return err
	}
	if err := server.Serve(); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
