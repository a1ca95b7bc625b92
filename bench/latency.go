package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/creack/pty"
)

// keystroke measures how long a typed character takes to appear: from a byte
// written to the terminal the stock client runs in, to that byte read back from
// it. On its way are the client, the server, the remote terminal in raw mode,
// and the cat that answers there.
func (b *bench) keystroke(ctx context.Context) ([]row, error) {
	const block = 100 // keystrokes before the other server has its turn
	servers := []server{b.sshd, b.gateway}
	var terminals []*terminal
	for _, s := range servers {
		t, err := b.openTerminal(ctx, s)
		if err != nil {
			return nil, err
		}
		defer t.close()
		terminals = append(terminals, t)
	}
	got := make([]samples, len(servers))
	for turn := 0; len(got[0]) < b.keystrokes; turn++ {
		for i, t := range terminals {
			for range block {
				took, err := t.echo()
				if err != nil {
					return nil, fmt.Errorf("keystroke to %s: %w", servers[i].name, err)
				}
				if turn > 0 { // the first block warms up
					got[i] = append(got[i], float64(took.Microseconds()))
				}
			}
		}
	}
	return []row{{
		What: "keystroke echo", Goal: "<= 2 x", Unit: "µs", SSHD: got[0], Sallyport: got[1],
		Note: "ssh -tt, raw remote terminal, cat",
	}}, nil
}

// A terminal is a stock client in a pseudo-terminal of ours.
type terminal struct {
	cmd *exec.Cmd
	pty *os.File
	buf [1]byte
}

func (b *bench) openTerminal(ctx context.Context, s server) (*terminal, error) {
	const ready = "READY-TO-ECHO"
	// The word is put together over there, so that it cannot be an echo of
	// the command.
	cmd := b.ssh(ctx, s, "-tt", "stty raw -echo; printf READY-; printf TO-ECHO; exec cat")
	file, err := pty.Start(cmd)
	if err != nil {
		return nil, fmt.Errorf("ssh to %s in a terminal: %w", s.name, err)
	}
	t := &terminal{cmd: cmd, pty: file}
	file.SetReadDeadline(time.Now().Add(20 * time.Second))
	var seen []byte
	for !bytes.HasSuffix(seen, []byte(ready)) {
		if _, err := file.Read(t.buf[:]); err != nil {
			t.close()
			return nil, fmt.Errorf("ssh to %s in a terminal: %w after %q", s.name, err, seen)
		}
		seen = append(seen, t.buf[0])
	}
	return t, nil
}

// echo types one byte and returns when it is back.
func (t *terminal) echo() (time.Duration, error) {
	t.pty.SetDeadline(time.Now().Add(10 * time.Second))
	t.buf[0] = 'x'
	began := time.Now()
	if _, err := t.pty.Write(t.buf[:]); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(t.pty, t.buf[:]); err != nil {
		return 0, err
	}
	took := time.Since(began)
	if t.buf[0] != 'x' {
		return 0, fmt.Errorf("%q came back", t.buf)
	}
	return took, nil
}

func (t *terminal) close() error {
	t.cmd.Process.Kill()
	return errors.Join(t.pty.Close(), t.cmd.Wait())
}

// connect measures a whole run of the stock client: start, key exchange, login,
// one session with the command true, and the end. The bastion runs already.
func (b *bench) connect(ctx context.Context) ([]row, error) {
	servers := []server{b.sshd, b.gateway}
	got := make([]samples, len(servers))
	for run := range b.connects + 1 {
		for i, s := range servers {
			began := time.Now()
			if out, err := b.ssh(ctx, s, "true").CombinedOutput(); err != nil {
				return nil, fmt.Errorf("ssh %s true: %w\n%s", s.name, err, out)
			}
			if run > 0 { // the first run warms up
				got[i] = append(got[i], time.Since(began).Seconds()*1000)
			}
		}
	}
	return []row{{
		What: "connect + true", Goal: "<= 1.2 x", Unit: "ms", SSHD: got[0], Sallyport: got[1],
		Note: "to a running bastion",
	}}, nil
}
