// Package durable replaces and locks files so that a crash, of the process or of the
// machine, leaves the old content or the new one, and no lock.
package durable

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Replace gives a file new content, with mode 0600. A reader, also after a crash,
// finds the old content or the new one; once Replace has returned nil, the new one.
// It writes to name+".new" first, so two calls for one file must not overlap.
func Replace(name string, content []byte) error {
	temp, err := os.OpenFile(name+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = temp.Write(content)
	if err == nil {
		err = temp.Sync()
	}
	if err = errors.Join(err, temp.Close()); err != nil {
		return err
	}
	if err := os.Rename(temp.Name(), name); err != nil {
		return err
	}
	// Until the directory is synced, a power failure may bring the old file back
	// (fsync(2)).
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// lockPoll is the time between two attempts to get a lock.
const lockPoll = 10 * time.Millisecond

// ErrLocked is returned by TryLock if another open file has the lock.
var ErrLocked = errors.New("file is locked")

// Lock gets the lock of a file, see flock(2); how is syscall.LOCK_EX or
// syscall.LOCK_SH. It waits until ctx ends. The kernel releases the lock when the
// last descriptor of this open file is closed, at the latest by the end of the
// processes that have one.
func Lock(ctx context.Context, file *os.File, how int) error {
	for {
		// A blocking flock could not be interrupted by the end of ctx.
		err := TryLock(file, how)
		if !errors.Is(err, ErrLocked) {
			return err
		}
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// TryLock is Lock without waiting. The error is ErrLocked (wrapped) if another open
// file has the lock.
func TryLock(file *os.File, how int) error {
	err := flock(file, how|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return &os.PathError{Op: "lock", Path: file.Name(), Err: ErrLocked}
	}
	return err
}

// Unlock releases the lock before the file is closed.
func Unlock(file *os.File) error { return flock(file, syscall.LOCK_UN) }

func flock(file *os.File, how int) error {
	for {
		err := syscall.Flock(int(file.Fd()), how)
		if err == nil {
			return nil
		}
		if err != syscall.EINTR {
			return &os.PathError{Op: "lock", Path: file.Name(), Err: err}
		}
	}
}
