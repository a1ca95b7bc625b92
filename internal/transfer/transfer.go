// Package transfer parses the bytes that the client and the server of an sftp or scp
// session exchange, and reports which files are transferred and changed. It only reads.
//
// [SFTP] parses version 3 of the SFTP protocol (draft-ietf-secsh-filexfer-02) with
// OpenSSH's extensions (PROTOCOL, section 4). [SCP] parses the protocol of rcp, which
// scp -O speaks. Neither keeps the contents of files.
//
// If a stream violates its protocol or exceeds a limit, the parser reports the open files
// as unfinished, returns an error that wraps [ErrLost], and ignores the rest.
package transfer

import (
	"errors"
	"fmt"
)

// A Kind is the kind of an [Event].
type Kind int

const (
	// Opened is the start of a transfer. Exactly one Transfer follows for each
	// direction in which the file is used.
	Opened Kind = iota
	// Transfer is the end of a transfer, complete or not.
	Transfer
	// Change is a change of names or attributes.
	Change
)

// An Event is an operation on a file, or an attempt at one.
type Event struct {
	Kind Kind
	// Path is the file, as the client names it. With scp it is either relative to
	// Base, or Base is the file; only the server knows which.
	Path string
	Base string

	// Upload is the direction of a Transfer, Bytes the number of bytes transferred,
	// and Offset the lowest offset of them in the file. Bytes that the receiver has
	// not confirmed do not count.
	Upload        bool
	Bytes, Offset int64

	// Op is the kind of a Change: rename, remove, mkdir, rmdir, symlink, link,
	// copy, mode, owner or truncate. To is the new name, the target of a link,
	// or the new mode (octal), owner (uid:gid) or size.
	Op, To string

	// Failure is the reason of a failure, or that the operation was not finished. It
	// is empty if the operation succeeded.
	Failure string
}

// ErrLost is wrapped by the error for a stream that cannot be parsed further.
var ErrLost = errors.New("file transfers cannot be followed")

func lost(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrLost, fmt.Sprintf(format, args...))
}

const (
	// unfinished is the Failure of an operation that the end of the session interrupted.
	unfinished = "not finished"
	// maxPath is the number of bytes of a path that are kept: Linux's PATH_MAX.
	maxPath = 4096
)

// clip copies a path, of which it keeps maxPath bytes.
func clip(path []byte) string {
	if len(path) <= maxPath {
		return string(path)
	}
	return fmt.Sprintf("%s... (%d bytes more)", path[:maxPath], len(path)-maxPath)
}
