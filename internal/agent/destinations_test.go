package agent

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/crypto/ssh"
)

// TestSpecialDestinations runs in a network namespace of its own, in which the bastion has
// addresses beside loopback, and a server listens at the addresses of AWS's credential
// endpoints.
func TestSpecialDestinations(t *testing.T) {
	if os.Getenv("SPECIAL_DESTINATIONS") == "" {
		inNetwork(t, "SPECIAL_DESTINATIONS")
		return
	}
	for _, command := range []string{
		"link set lo up",
		"addr add 192.0.2.7/24 dev lo",
		"addr add 2001:db8::7/64 dev lo nodad",
		"addr add 169.254.169.254/32 dev lo",
		"addr add 169.254.170.2/32 dev lo",
		"addr add 169.254.170.23/32 dev lo",
		"addr add fd00:ec2::254/128 dev lo nodad",
		"addr add fd00:ec2::23/128 dev lo nodad",
		"link add veth0 type veth peer name veth1",
		"addr add 192.0.2.129/25 dev veth0",
		"link set veth0 up",
	} {
		if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", command, err, out)
		}
	}
	l := listen(t, "tcp", "[::]:8080") // IPv4, too
	defer l.Close()
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(nc, "reached\n")
			nc.Close()
		}
	}()
	credentials := []string{"169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23", "::ffff:169.254.169.254"}
	itself := []string{"192.0.2.7", "192.0.2.129", "2001:db8::7", "::ffff:192.0.2.7"}
	loopback := []string{"127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "localhost"}

	b := start(t, nil)
	tests := []struct {
		name                  string
		permitOpen, roles     []string
		reached, notPermitted []string
	}{
		{"no rules", nil, nil, append(itself, loopback...), credentials},
		{"permitopen of everything", []string{"*:*"}, nil, append(itself, loopback...), credentials},
		{"permitopen", []string{"169.254.169.254:8080"}, nil, []string{"169.254.169.254"}, append(itself, credentials[1:]...)},
		{"any name", nil, []string{"*:*"}, nil, append(append(itself, loopback...), credentials...)},
		{"any address", nil, []string{"0.0.0.0/0:*", "[::/0]:*"}, nil, append(append(itself, loopback...), credentials...)},
		{"own address", nil, []string{"192.0.2.7:8080"}, []string{"192.0.2.7", "::ffff:192.0.2.7"}, append(itself[1:3], credentials...)},
		{"credentials", nil, []string{"169.254.170.2:8080", "[fd00:ec2::23]:8080"}, []string{"169.254.170.2", "fd00:ec2::23"}, []string{"169.254.169.254", "169.254.170.23", "fd00:ec2::254"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id := alice()
			id.Permissions.PermitOpen, id.Permissions.Destinations = tt.permitOpen, tt.roles
			c := b.dial(id)
			try := func(host string) error {
				nc, err := c.Dial("tcp", net.JoinHostPort(host, "8080"))
				if err != nil {
					return err
				}
				defer nc.Close()
				_, err = bufio.NewReader(nc).ReadString('\n')
				return err
			}
			for _, host := range tt.reached {
				if err := try(host); err != nil {
					t.Errorf("%s: %v", host, err)
				}
			}
			for _, host := range tt.notPermitted {
				var refused *ssh.OpenChannelError
				if err := try(host); !errors.As(err, &refused) || refused.Reason != ssh.Prohibited {
					t.Errorf("%s: %v, want a notPermitted", host, err)
				}
			}
		})
	}
}

// inNetwork runs the test again in a network namespace of its own, with the variable set. If
// there can be none, it skips the test.
func inNetwork(t *testing.T, variable string) {
	t.Helper()
	if _, err := exec.LookPath("ip"); err != nil || os.Geteuid() != 0 || exec.Command("unshare", "--net", "true").Run() != nil {
		t.Skip("needs root, ip(8) and a network namespace")
	}
	again := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	again.Env = append(os.Environ(), variable+"=1")
	again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if out, err := again.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
