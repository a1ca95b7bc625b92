package auth_test

import (
	"crypto/ed25519"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
)

// A folder has a file of authorized keys for alice, and none for bob.
func ExampleKeys_Authorize() {
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		fmt.Println(err)
		return
	}
	dir, err := os.MkdirTemp("", "authorized_keys")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	line := `no-agent-forwarding,from="192.0.2.0/24" ` + string(ssh.MarshalAuthorizedKey(key))
	if err := os.WriteFile(filepath.Join(dir, "alice"), []byte(line), 0o600); err != nil {
		fmt.Println(err)
		return
	}

	keys := &auth.Keys{Dir: dir}
	office, elsewhere := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("198.51.100.1")
	for _, login := range []struct {
		user string
		from netip.Addr
	}{{"alice", office}, {"alice", elsewhere}, {"bob", office}} {
		grant, err := keys.Authorize(login.user, key, login.from, time.Now())
		if err != nil {
			fmt.Println("refused:", err)
			continue
		}
		fmt.Printf("granted by %s: terminal %t, agent forwarding %t\n", grant.Line, grant.PTY, grant.AgentForwarding)
	}
	// Output:
	// granted by alice:1: terminal true, agent forwarding false
	// refused: alice:1: the key may not be used from 198.51.100.1
	// refused: no line of bob's authorized keys has this key
}
