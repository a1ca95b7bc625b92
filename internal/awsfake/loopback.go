package awsfake

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
)

// Loopback returns a network for [Cloud] on the loopback interface, where Linux has all
// of 127.0.0.0/8. No other process gets the same one from Loopback until release is
// called or this process has ended.
func Loopback() (network string, release func(), err error) {
	const first, last = 201, 254
	start := rand.IntN(last - first + 1)
	for i := range last - first + 1 {
		network := fmt.Sprintf("127.%d", first+(start+i)%(last-first+1))
		// The file stays: one that is removed while another process waits to
		// lock it could be locked twice.
		f, err := os.OpenFile(filepath.Join(os.TempDir(), "awsfake-"+network+".lock"), os.O_RDWR|os.O_CREATE, 0o666)
		if err != nil {
			continue // somebody else's
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			f.Close()
			continue
		}
		return network, func() { f.Close() }, nil
	}
	return "", nil, errors.New("all loopback networks are taken; see awsfake-127.*.lock in " + os.TempDir())
}
