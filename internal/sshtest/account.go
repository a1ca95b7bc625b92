package sshtest

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
)

// privateEtc is the environment variable that [PrivateEtc] sets for the program that it
// executes: "yes" if /etc is private, and otherwise "no".
const privateEtc = "SALLYPORT_TEST_PRIVATE_ETC"

// mountScript runs in a mount namespace of its own. It mounts a copy of /etc over /etc,
// without the files that set variables in sessions, and an empty directory with a lastlog
// file over /var/log. Then it executes its arguments.
const mountScript = `
if dir=$(mktemp -d) &&
	mount -t tmpfs -o mode=755 etc "$dir" && cp -a /etc/. "$dir" && rm -f "$dir/environment" "$dir/default/locale" && mount --move "$dir" /etc &&
	mount -t tmpfs -o mode=755 log "$dir" && touch "$dir/lastlog" && mount --move "$dir" /var/log
then ` + privateEtc + `=yes
else ` + privateEtc + `=no
fi
rmdir "$dir"
export ` + privateEtc + `
exec "$@"`

// PrivateEtc gives the process a private copy of /etc, so that tests can add accounts and
// change files there without changing the machine. It executes the program again, inside a
// mount namespace, so TestMain must call it first. Without root, or if mount namespaces
// are forbidden, it does nothing, and [NewAccount] skips its test.
func PrivateEtc() {
	if os.Geteuid() != 0 || os.Getenv(privateEtc) != "" {
		return
	}
	self, err := os.Executable()
	if err != nil {
		return
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil || exec.Command(unshare, "--mount", "true").Run() != nil {
		return
	}
	// The new program has the same flags and descriptors.
	syscall.Exec(unshare, append([]string{"unshare", "--mount", "sh", "-c", mountScript, "sh", self}, os.Args[1:]...), os.Environ())
}

// HasPrivateEtc reports whether /etc is a private copy.
func HasPrivateEtc() bool { return os.Getenv(privateEtc) == "yes" }

// An Account is a local account.
type Account struct {
	Name        string
	UID, GID    uint32
	Home, Shell string
}

// NewAccount adds an account with a unique name and user id, a group of its own, an empty
// home directory and bash. options are options of useradd(8). The home directory is removed
// when the test ends.
func NewAccount(t testing.TB, options ...string) Account {
	t.Helper()
	if !HasPrivateEtc() {
		t.Skip("adding an account needs root, mount namespaces, and a TestMain that calls sshtest.PrivateEtc")
	}
	home, err := os.MkdirTemp("/tmp", "sallyport-home-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	a, err := AddAccount(home, options...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// AddAccount is [NewAccount] with an existing home directory, whose owner it changes. /etc
// must be private.
func AddAccount(home string, options ...string) (Account, error) {
	if !HasPrivateEtc() {
		return Account{}, errors.New("adding an account: /etc is not private")
	}
	var random [8]byte
	rand.Read(random[:])
	// Several packages are tested at the same time, each with its own /etc. A random user
	// id is unlikely to be in use in another.
	id := 20_000 + binary.NativeEndian.Uint32(random[4:])%40_000
	a := Account{Name: "test-" + hex.EncodeToString(random[:4]), UID: id, GID: id, Home: home, Shell: "/bin/bash"}
	number := strconv.Itoa(int(id))
	if err := Run("groupadd", "--gid", number, a.Name); err != nil {
		return Account{}, err
	}
	// The password "*" matches nothing. Without a password the account would be locked,
	// and sshd without PAM would reject it.
	args := append([]string{"--no-create-home", "--home-dir", home, "--shell", a.Shell, "--uid", number, "--gid", number, "--password", "*"}, options...)
	if err := Run("useradd", append(args, a.Name)...); err != nil {
		return Account{}, err
	}
	if err := os.Chmod(home, 0o755); err != nil {
		return Account{}, err
	}
	return a, os.Chown(home, int(id), int(id))
}

// Run runs a program. The error contains its output.
func Run(name string, args ...string) error {
	cmd := exec.Command(name, args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", cmd, err, bytes.TrimSpace(out))
	}
	return nil
}
