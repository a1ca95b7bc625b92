package agent

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// startSSHD starts OpenSSH's sshd on a loopback port, and returns a configuration for ssh -F
// that logs in to an account. The host is called "bastion". Lines of settings take
// precedence over the test's own.
func startSSHD(t *testing.T, account, keyOptions, settings string) (config string) {
	t.Helper()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, format string, args ...any) {
		t.Helper()
		if err := os.WriteFile(name, fmt.Appendf(nil, format, args...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"id", "host"} {
		if err := sshtest.Run("ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", path(name)); err != nil {
			t.Fatal(err)
		}
	}
	key, err := os.ReadFile(path("id.pub"))
	if err != nil {
		t.Fatal(err)
	}
	addr := sshtest.FreeAddr(t)
	_, port, _ := net.SplitHostPort(addr)
	write(path("keys"), "%s%s", keyOptions, key)
	write(path("sshd_config"), `%s
ListenAddress 127.0.0.1:%s
HostKey %s
AuthorizedKeysFile %s
PidFile none
StrictModes no
PermitRootLogin yes
PermitUserEnvironment yes
PrintLastLog no
AcceptEnv LANG LC_*
`, settings, port, path("host"), path("keys"))
	write(path("config"), "Host bastion\n  HostName 127.0.0.1\n  Port %s\n  User %s\n  IdentityFile %s\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n", port, account, path("id"))
	// The keys are read with the rights of the account.
	for _, name := range []string{filepath.Dir(dir), dir, path("keys")} {
		if err := os.Chmod(name, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	sshtest.StartSSHD(t, path("sshd_config"), addr, "TZ=Asia/Tokyo")
	return path("config")
}
