package sshtest

import (
	"os"
	"os/user"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	PrivateEtc()
	os.Exit(m.Run())
}

// TestAccount checks that the account exists for this process and its children, and that /etc
// is not the machine's.
func TestAccount(t *testing.T) {
	a := NewAccount(t)
	if u, err := user.Lookup(a.Name); err != nil || u.HomeDir != a.Home {
		t.Errorf("%+v, %v", u, err)
	}
	if err := Run("chage", "-E", "0", a.Name); err != nil {
		t.Error(err)
	}
	if err := Run("id", a.Name); err != nil {
		t.Error(err)
	}
	var etc unix.Statfs_t
	if err := unix.Statfs("/etc", &etc); err != nil || etc.Type != unix.TMPFS_MAGIC {
		t.Errorf("/etc is in a file system of type %x, %v; want tmpfs", etc.Type, err)
	}
}
