package main

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// TestAuthTries has the real client offer wrong keys before the right one, to a
// gateway and to OpenSSH's sshd with the same max_auth_tries, and wants as many to
// be accepted.
func TestAuthTries(t *testing.T) {
	t.Parallel()
	w := newDifferential(t)
	const tries = 6 // the default of both
	var wrong []string
	for i := range tries + 2 {
		key := w.env.path(fmt.Sprintf("wrong%d", i))
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
		wrong = append(wrong, "-i", key)
	}
	for _, n := range []int{1, tries - 1, tries, tries + 2} {
		for _, host := range []string{"sshd", "gateway"} {
			args := append([]string{"ssh", "-F", w.env.path("ssh_config"), "-o", "IdentityAgent=none"}, wrong[:2*n]...)
			got := w.run(t, append(args, host, "echo in"), "")
			switch in := n < tries; {
			case in && !strings.Contains(got, "stdout:\nin\n"):
				t.Errorf("%s, the right key behind %d others: not let in:\n%s", host, n, got)
			case !in && (!strings.Contains(got, "Too many authentication failures") || !strings.Contains(got, "status: 255")):
				t.Errorf("%s, the right key behind %d others: not cut off:\n%s", host, n, got)
			case strings.Contains(got, "Permission denied"):
				t.Errorf("%s, the right key behind %d others:\n%s", host, n, got)
			}
		}
	}
}
