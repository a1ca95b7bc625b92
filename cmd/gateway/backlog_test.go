package main

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestBacklog lets a command write to a terminal whose client does not read, until
// it can write no more, and wants it to get no further than with sshd: all of that
// is shown after a ^C.
func TestBacklog(t *testing.T) {
	t.Parallel()
	differentials(t, testBacklog)
}

func testBacklog(t *testing.T, w *differential) {
	sshd := w.backlog(t, "sshd")
	gateway := w.backlog(t, "gateway")
	// The packets between bastion and gateway add at most 32 KiB; the
	// rest is for the kernel's buffers, which are filled by chance. The client's
	// window is 1 MiB: less is what a slow machine has not filled in time.
	if gateway > max(sshd, 1<<20)+128<<10 {
		t.Errorf("%d bytes are between a command and its client, with sshd %d", gateway, sshd)
	}
	t.Logf("%d bytes, with sshd %d", gateway, sshd)
}

// backlog returns how many bytes a command can write before somebody reads.
func (w *differential) backlog(t *testing.T, host string) int {
	t.Helper()
	pid := filepath.Join(w.env.path(host+".tmp"), "pid")
	cmd := exec.Command("ssh", "-F", w.env.path("ssh_config"), "-tt", host, "stty raw -echo; echo $$ >"+pid+".new; mv "+pid+".new "+pid+"; exec yes")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + w.env.dir, "TERM=xterm", "SHLVL=1"}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		io.Copy(io.Discard, stdout)
		cmd.Wait()
	}()
	written := -1
	for same := 0; same < 40; time.Sleep(50 * time.Millisecond) {
		n := writtenBy(pid)
		if same++; n != written || n == 0 {
			same = 0
		}
		written = n
	}
	return written
}

// writtenBy returns how many bytes the process whose pid is in a file has
// written, 0 if there is none yet.
func writtenBy(file string) int {
	pid, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/io")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(stat)) {
		if n, ok := strings.CutPrefix(line, "wchar: "); ok {
			written, _ := strconv.Atoi(strings.TrimSpace(n))
			return written
		}
	}
	return 0
}
