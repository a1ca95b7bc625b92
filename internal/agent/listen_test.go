package agent

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestListenSettings requests the same remote forwards from an agent and from sshd, with
// the same settings. Both must listen on the same addresses and make the same sockets.
func TestListenSettings(t *testing.T) {
	t.Parallel()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		sshd  string
		agent func(*Server)
	}{
		{"", func(*Server) {}},
		{"GatewayPorts yes\nStreamLocalBindUnlink yes", func(s *Server) { s.GatewayPorts, s.StreamLocalBindUnlink = "yes", true }},
		{"GatewayPorts clientspecified\nStreamLocalBindMask 0111", func(s *Server) { s.GatewayPorts, s.SocketMode = "clientspecified", 0o777&^0o111 }},
	} {
		t.Run(tt.sshd, func(t *testing.T) {
			t.Parallel()
			bastion, sshd := start(t, tt.agent).sshConfig(alice()), startSSHD(t, me.Username, "", tt.sshd)
			var got, want string
			for range 5 { // another process may use the port on another address
				if got, want = remoteForwards(t, bastion), remoteForwards(t, sshd); got == want {
					break
				}
			}
			if got != want {
				t.Errorf("the agent:\n%s\nsshd:\n%s", got, want)
			}
		})
	}
}

// remoteForwards requests remote forwards for several hosts and for two socket files, one
// of which is there already. It returns the addresses that each host leads to, the types,
// modes and owners of the files, and the client's warnings.
func remoteForwards(t *testing.T, config string) string {
	t.Helper()
	hosts := []string{"", ":", "0.0.0.0:", "[::1]:", "127.0.0.2:", "192.0.2.1:"}
	args := []string{"-F", config, "-o", "LogLevel=INFO"}
	for i, host := range hosts { // the target's port is the number of the host
		args = append(args, "-R", fmt.Sprintf("%s0:127.0.0.1:%d", host, i+1))
	}
	dir := t.TempDir()
	newFile, oldFile := filepath.Join(dir, "new"), filepath.Join(dir, "old")
	if err := os.WriteFile(oldFile, []byte("a file"), 0o640); err != nil {
		t.Fatal(err)
	}
	args = append(args, "-R", newFile+":127.0.0.1:1", "-R", oldFile+":127.0.0.1:1")
	out, log, code := run(t, "", "ssh", append(args, "bastion", "stat -c '%n %F %a %U' "+newFile+" "+oldFile+"; ss -Hltn")...)
	if code != 0 {
		t.Fatalf("ssh: exit status %d\n%s%s", code, out, log)
	}
	sockets, listeners, _ := strings.Cut(out, "LISTEN")
	result := sockets
	for i, host := range hosts {
		var addrs []string
		if port := regexp.MustCompile(fmt.Sprintf(`Allocated port (\d+) for remote forward to 127\.0\.0\.1:%d\s`, i+1)).FindStringSubmatch(log); port != nil {
			for _, l := range regexp.MustCompile(`(\S+):`+port[1]+`\s`).FindAllStringSubmatch(listeners, -1) {
				addrs = append(addrs, l[1])
			}
		}
		slices.Sort(addrs)
		result += fmt.Sprintf("-R %sPORT: %q\n", host, addrs)
	}
	for line := range strings.Lines(log) {
		if strings.Contains(line, "forwarding failed") {
			result += line
		}
	}
	return strings.ReplaceAll(result, dir, "DIR")
}
