package agent

import (
	"io"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

func TestTerminal(t *testing.T) {
	t.Parallel()
	c := start(t, nil).dial(alice())
	ch, reqs, err := c.OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	modes := "\x03\x00\x00\x00\x15" + "\x35\x00\x00\x00\x00" + "\x2a\x00\x00\x00\x01" + "\x48\x00\x00\x00\x00" + // VERASE ^U, no ECHO, IUTF8, no ONLCR
		"\x81\x00\x00\x96\x00" + "\x00" // 38400
	request := func(kind string, payload any) {
		t.Helper()
		if ok, err := ch.SendRequest(kind, true, ssh.Marshal(payload)); !ok || err != nil {
			t.Fatal(kind, ok, err)
		}
	}
	request("pty-req", ptyRequest{"vt100", 91, 17, 910, 170, modes})
	request("window-change", windowChangeRequest{Cols: 92, Rows: 18, XPixels: 920, YPixels: 180})
	request("exec", commandRequest{`trap 'echo winch' WINCH; stty -a; stty size; echo $TERM; [ "$(tty)" = "$SSH_TTY" ] && echo same; ps -o sid= $$ | grep -q $$ && echo leads; echo ready; while read l; do echo "got $l $(stty size)"; done`})

	var got strings.Builder
	until := func(want string) {
		t.Helper()
		buf := make([]byte, 4096)
		for !strings.Contains(got.String(), want) {
			n, err := ch.Read(buf)
			got.Write(buf[:n])
			if err != nil {
				t.Fatalf("no %q: %v in %q", want, err, got.String())
			}
		}
	}
	until("ready\n")
	for _, want := range []string{"erase = ^U", "-echo ", "iutf8", "-onlcr", "speed 38400 baud", "18 92\n", "vt100\n", "same\n", "leads\n"} {
		if !strings.Contains(got.String(), want) {
			t.Errorf("no %q in %q", want, got.String())
		}
	}
	for i := range 50 { // none of them blocks, and the last one applies
		ch.SendRequest("window-change", false, ssh.Marshal(windowChangeRequest{Cols: uint32(100 + i), Rows: 40}))
	}
	request("window-change", windowChangeRequest{Cols: 150, Rows: 41})
	io.WriteString(ch, "line\n")
	until("got line 41 150\n")
	until("winch\n")
	io.WriteString(ch, "\x04") // end of file, at the terminal
	if rest, err := io.ReadAll(ch); err != nil {
		t.Errorf("after ^D: %q, %v", rest, err)
	}
}

// TestBackgroundJobs leaves a job running. With a terminal, the session must end with its
// shell; without one, when the job closes the output.
func TestBackgroundJobs(t *testing.T) {
	t.Parallel()
	c := start(t, nil).dial(alice())
	session := func(pty bool) (ssh.Channel, chan string) {
		ch, reqs, err := c.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		if pty {
			ch.SendRequest("pty-req", true, ssh.Marshal(ptyRequest{Term: "vt100"}))
		}
		events := make(chan string, 10)
		go func() {
			for req := range reqs {
				events <- req.Type
			}
			events <- "close"
		}()
		return ch, events
	}
	const command = "sleep 1000 & echo $!"

	ch, events := session(true)
	ch.SendRequest("exec", true, ssh.Marshal(commandRequest{"trap '' HUP; " + command}))
	out, _ := io.ReadAll(ch)
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	if got := <-events + " " + <-events; got != "exit-status close" {
		t.Errorf("with a terminal: %s", got)
	}
	if !alive(pid) {
		t.Error("the background job has ended with its terminal")
	}
	unix.Kill(pid, unix.SIGKILL)

	ch, events = session(false)
	ch.SendRequest("exec", true, ssh.Marshal(commandRequest{command}))
	buf := make([]byte, 100)
	n, _ := ch.Read(buf)
	if pid, err = strconv.Atoi(strings.TrimSpace(string(buf[:n]))); err != nil {
		t.Fatal(err)
	}
	if got := <-events; got != "exit-status" {
		t.Errorf("got %s, want exit-status", got)
	}
	select {
	case got := <-events:
		t.Errorf("got %s while the job has the output open", got)
	case <-time.After(100 * time.Millisecond):
	}
	unix.Kill(pid, unix.SIGKILL)
	if got := <-events; got != "close" {
		t.Errorf("got %s, want close", got)
	}
}
